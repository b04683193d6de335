"""`mambainllama demo`: a small teacher, hybrids made and distilled from it, what each can do, and a page that shows it."""
import html
import json
import tempfile
import time
from pathlib import Path

import numpy as np

from . import backend, tasks
from .checkpoint import load, save
from .config import architecture
from .convert import convert, kept_attention
from .generate import generate
from .info import memory
from .model import random
from .tokenizer import Tokenizer
from .report import axes, image, page, table
from .train import distill, train
from .weights import replacing, writing

SIZES = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
         "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 32, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
         "bos_token_id": 0, "eos_token_id": 3, "initializer_range": 0.08}
TRAINING = {"length": 128, "batch": 8, "warmup": 0.05, "betas": [0.9, 0.98], "checkpoint_every": 200}
TEACHER = TRAINING | {"steps": 2200, "lr": 4e-3, "weight_decay": 0.01}
STUDENT = TRAINING | {"lr": 4e-3, "kl": 1.0, "ce": 0.1}
STEPS = 400      # of each stage of a distillation
HELD_OUT = 400   # chats that measure
CONTEXT = 2048   # tokens at which memory is compared
TIE = 0.1        # KLs that differ by less than this share of the larger count as equal; there is one seed, so more can be chance too


def demo(out="demo", device="cpu", seed=0, teacher_steps=None, steps=STEPS):
    """Runs the whole demo into folder `out` and prints its table; returns the rows of the table.

    Writes out/chats.jsonl, the data, out/teacher, out/<student>/ (runs with their models in Hugging Face layout and metrics), out/results.json and
    out/report.html. Called again, finished parts are not computed again. seed: of data, weights and order."""
    out, began = Path(out), time.perf_counter()
    backend.module(device)  # this and the next lines: what would fail after minutes of work
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    data, held_out = tasks.rows(8000, seed + 1), tasks.rows(HELD_OUT, seed + 1_000_003)
    with replacing(out / "chats.jsonl") as file:
        file.writelines(json.dumps(row).encode() + b"\n" for row in data)
    print(f"1/4  teacher: a Llama of {SIZES['num_hidden_layers']} layers learns {', '.join(tasks.TASKS)}")
    teacher_steps = teacher_steps or TEACHER["steps"]
    teacher = _teacher(out, data, seed, device, teacher_steps)
    print("2/4  students: attention layers become Mamba-2, then are distilled, each from the one before")
    layers = range(SIZES["num_hidden_layers"])
    half = [i for i in layers if i not in kept_attention(len(layers), 0.5)]
    quarter = [i for i in layers if i not in kept_attention(len(layers), 0.25)]
    models = {"teacher": teacher}
    for init in ("attention", "calibrated", "random"):
        student = teacher
        for name, mamba in {"½ attention": half, "¼ attention": quarter, "no attention": list(layers)}.items():
            if name == "no attention" and init != "calibrated":
                continue
            title, student = f"{name}, {init} init", convert(student, mamba_layers=[])  # each starts from the one before
            print(f"     {title}: {steps} steps")
            recipe = STUDENT | {"seed": seed, "init": init, "stages": [{"mamba_layers": mamba, "steps": steps}]}
            distill(student, teacher, data, recipe, out=out / _slug(title))
            models[title] = student
    print("3/4  measuring: loss, KL, answers, speed, memory")
    results = [_measure(title, model, teacher, held_out) for title, model in models.items()]
    speculation = _speculate(teacher, models["no attention, calibrated init"], held_out[:200])
    print("4/4  report\n")
    print(_table(results) + "\n")
    print("\n".join([*_verdicts(results), speculation["sentence"]]))
    summary = {"results": results, "speculation": speculation, "seed": seed, "teacher_steps": teacher_steps, "steps": steps,
               "seconds": time.perf_counter() - began}
    (out / "results.json").write_text(json.dumps(summary, indent=1))
    (out / "report.html").write_text(_page(out, summary, models))
    print(f"\n{summary['seconds']:.0f} s; models, metrics and {out / 'report.html'} are in {out}/")
    return results


def _slug(title):
    return title.replace("½", "half").replace("¼", "quarter").replace(",", "").replace(" ", "-")


def _teacher(out, data, seed, device, steps):
    tasks.write_tokenizer(out / "tokenizer")
    tokenizer = Tokenizer.from_folder(out / "tokenizer")
    teacher = random(SIZES | {"vocab_size": len(tasks.VOCABULARY)}, seed=seed, device=device)
    teacher.folder, teacher.tokenizer = out / "tokenizer", tokenizer
    train(teacher, data, TEACHER | {"steps": steps, "seed": seed}, out=out / "teacher-run")
    save(teacher, out / "teacher")
    return load(out / "teacher", device=device)


def _measure(title, model, teacher, rows):
    from .data import Batches, read

    documents = read(rows, model.tokenizer, model.config["vocab_size"])
    sums = np.zeros(3)
    for ids, targets, prev in Batches(documents, TRAINING["length"], TRAINING["batch"], shuffle=False).once():
        same = model is teacher
        loss = model.loss(ids, targets, teacher=None if same else teacher, kl=0.0 if same else 1.0, prev=prev)
        sums += np.array([loss["ce"], loss["kl"], 1]) * loss["tokens"]
    right, output = tasks.exact_match(model, rows)
    held = memory(architecture(model.config, model.mamba_config))
    return {"model": title, "loss": sums[0] / sums[2], "kl": sums[1] / sums[2], "exact": right, "mean": float(np.mean(list(right.values()))),
            "tokens_per_second": output.stats["tokens_per_second"], "kv_bytes": held["kv_bytes_per_token"] * CONTEXT,
            "state_bytes": held["state_bytes_per_sequence"]}


def _speculate(teacher, draft, rows):
    prompts = [row["messages"][:1] for row in rows]
    plain = generate(teacher, prompts, max_new_tokens=10, batch=1)
    drafted = generate(teacher, prompts, max_new_tokens=10, draft=draft, lookahead=4, batch=1)
    equal = [a.tokens for a in plain] == [b.tokens for b in drafted]
    a, b = plain.stats["tokens_per_second"], drafted.stats["tokens_per_second"]
    sentence = (f"Teacher drafted by the student without attention, one prompt at a time: {drafted.stats['acceptance']:.0%} of the drafted tokens "
                f"accepted, {drafted.stats['tokens_per_verify']:.2f} tokens a verification, {b:.0f} tokens/s against {a:.0f} without a draft "
                f"({'faster' if b > a else 'slower'}: at this size a call costs its overhead, not its weights); greedy output "
                f"{'identical' if equal else 'DIFFERENT'}.")
    return {"equal": equal, "plain": plain.stats, "drafted": drafted.stats, "sentence": sentence}


def _cells(row):
    exact = [f"{row['exact'][task]:.0%}" for task in tasks.TASKS]
    return [row["model"], f"{row['loss']:.4f}", f"{row['kl']:.4f}", *exact, f"{row['tokens_per_second']:.0f}", f"{row['kv_bytes'] / 1024:.0f}",
            f"{row['state_bytes'] / 1024:.0f}"]


HEAD = ["model", "loss", "KL", *tasks.TASKS, "tokens/s", f"KV KiB at {CONTEXT}", "state KiB"]


def _table(results):
    cells = [HEAD] + [_cells(row) for row in results]
    widths = [max(len(line[i]) for line in cells) for i in range(len(HEAD))]
    return "\n".join("  ".join(f"{c:<{w}}" if i == 0 else f"{c:>{w}}" for i, (c, w) in enumerate(zip(line, widths))) for line in cells)


def _verdicts(results):
    """Sentences from the numbers: what each model answers, and the starts from attention against the random one at each share of attention."""
    by = {row["model"]: row for row in results}
    yield "Questions answered exactly, mean of the tasks: " + "; ".join(f"{title} {row['mean']:.0%}" for title, row in by.items()) + "."
    for share in ("½ attention", "¼ attention"):
        for init, start in (("attention", "the attention's projections"), ("calibrated", "the projections, calibrated")):
            a, r = by[f"{share}, {init} init"], by[f"{share}, random init"]
            gap = a["kl"] - r["kl"]
            word = ("about as close to the teacher as" if abs(gap) < TIE * max(a["kl"], r["kl"]) else
                    "closer to the teacher than" if gap < 0 else "farther from the teacher than")
            yield (f"At {share} the student that started from {start} ends {word} the one that started at random: "
                   f"KL {a['kl']:.4f} against {r['kl']:.4f}, exact answers {a['mean']:.0%} against {r['mean']:.0%}.")


def _page(out, summary, models):
    results = summary["results"]
    figure, ((curves, answers, memories),) = axes(3)
    for title in models:
        path = out / _slug(title) / "metrics.jsonl"
        if title != "teacher" and path.exists():
            kl = [json.loads(line)["kl"] for line in path.read_text().splitlines()]
            smooth = np.convolve(kl, np.ones(20) / 20, "valid") if len(kl) > 40 else kl
            curves.plot(smooth, label=title)
    curves.set(title="KL to the teacher while distilling", xlabel="step of its stage", yscale="log")
    curves.legend(fontsize=7)
    names, wide = list(tasks.TASKS), 0.8 / len(results)
    for i, row in enumerate(results):
        answers.bar(np.arange(len(names)) + i * wide, [row["exact"][task] for task in names], wide, label=row["model"])
    answers.set(title="answers exactly right, held-out questions", ylim=(0, 1.4), yticks=np.arange(6) / 5)
    answers.set_xticks(np.arange(len(names)) + 0.4 - wide / 2, names)
    answers.legend(fontsize=7, ncols=2, loc="upper center")
    lengths = np.array([128, 512, 2048, 8192, 32768])
    for row in {row["model"].split(",")[0]: row for row in results}.values():
        memories.plot(lengths, (row["kv_bytes"] / CONTEXT * lengths + row["state_bytes"]) / 1024, marker="o", label=row["model"].split(",")[0])
    memories.set(title="memory of one sequence", xlabel="tokens", ylabel="KiB", xscale="log", yscale="log")
    memories.legend(fontsize=7)
    verdicts = "".join(f"<li>{html.escape(text)}</li>" for text in [*_verdicts(results), summary["speculation"]["sentence"]])
    return page("From a Llama to a Mamba hybrid", f"""
<p>A small Llama, the teacher, was trained for {summary['teacher_steps']} steps on chats of four tasks with checkable answers (seed {summary['seed']}).
In a copy of it half of the attention layers were replaced by Mamba-2 mixers, which started from the attention's own projections (v → x, k → B,
q → C, o → out; “attention”), from these with convolutions that pass their input on and with decays, gates and scales set to what the teacher's
attention does on a sample of the chats (“calibrated”), or at random, with random convolutions as in the first. The copy was distilled from the teacher for {summary['steps']} steps. From that student the one with a
quarter of the attention was made in the same way, and from that the one without, so these have learned two and three times as long. All starts
had the same data, steps and learning rate, and all parameters learned. Each was run once: another seed may order them otherwise.</p>
<p>{HELD_OUT} chats drawn with another seed are what is measured: their facts and strings were drawn anew, but of the 144 sums nearly all were
seen in training. An answer counts when every token of it is right. loss is the cross-entropy of the answers, KL that from the teacher.</p>""",
                table(HEAD, [_cells(row) for row in results]), f"<ul>{verdicts}</ul>", image(figure), f"""
<p>KV grows with every token, the state does not: that is what the conversion buys. Speed at this size is ruled by the cost of a call. One stage of
distillation sees {summary['steps'] / summary['teacher_steps']:.0%} as many tokens as the teacher's whole training, far more than when a large model is
converted, so that a random start has the time to learn anew what a copied one is given.</p>""")
