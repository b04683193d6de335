"""Which attention layers should stay? Measured on the user's data before anything is trained for long.

Every attention layer of the teacher is converted and aligned with it for a few steps (objectives.py; or a student is given in which that
has happened). Then each layer in turn gets its attention back: by how much does KL to the teacher fall, on held-out data and on the
synthetic recall probe (recall.py)? A layer's score is the mean of the two shares of KL recovered, the second weighing as much as the
teacher itself answers of the probe. A plan keeps the layers of the best scores, and stands beside the paper's evenly spread ones. Scores
of single layers do not add up, so both are measured as a whole too. (After arXiv 2512.20569, which distils each of these students a
little before it looks.) Without alignment a ranking puts first what breaks most, be it learned again soon.

Of each plan: bytes, tokens/s, KL as it is, and a forecast of CE and KL at the end of the recipe. For that it is distilled by the recipe
for p, 2p and 4p steps (each a run of its own, with a whole schedule), and a + b·steps^-c is fitted to what held-out rows then lose."""
import itertools
import json
from pathlib import Path

import numpy as np
from tqdm import tqdm

from . import data as documents
from .convert import convert, kept_attention, restore_layers
from .generate import generate
from .info import held, readable
from .recall import associative, copying
from .recipe import load_recipe, read_recipe
from .train import distill
from .weights import replacing, writing

READ, HELD_OUT = 2048, 8           # rows of data that are read at most; every eighth of them is held out
PROBE_LENGTH, PROBE_ITEMS = 256, 8  # of the recall probe, tokens and rows of each kind
LENGTHS = (1, 2, 4)                # runs behind a forecast, in units of probe_steps
EXPONENTS = (0.1, 1.5)             # of learning curves
SAMPLES, INTERVAL = 200, (5, 95)   # bootstrap, percent
NEW_TOKENS = 48                    # decoded to measure speed
RECIPE = {"steps": 1000, "train": ["*mamba*"]}
ALIGN = {"align": "mixer", "lr": 1e-3, "train": ["*mamba*"]}  # the stage before it; the rate as in RADLADS, arXiv 2505.03005


def plan(teacher, data, attention=(0.5, 0.25), recipe=None, student=None, align_steps=50, probe_steps=20, rows=16, context=512, out=None,
         progress=None):
    """Where attention should stay, what that costs and what it may lose; → a dict, also written as out/plan.json and out/plan.png:

    "layers"    [{"layer", "data", "recall", "score"}] of the teacher's attention layers: the shares of the KL of a student without
                attention that are recovered when this layer alone gets its attention back (negative: it gets worse), and their mean
    "student"   {"data", "recall"}: that student's KL
    "teacher_recall"  the share of the probe that the teacher itself answers
    "plans"     for each share of `attention` the evenly spread plan ("uniform") and the measured one: {"attention", "placement",
                "mamba_layers", "weight_bytes", "kv_bytes_per_token", "window", "state_bytes_per_sequence", "tokens_per_second" (batch 1
                behind `context` tokens), "ce", "kl" (as it is), "probes" ([{"steps", "ce", "kl"}]), "forecast"
                ({"ce" | "kl": {"at", "low", "high"}}), "chosen"}
    "stages"    {share: a recipe's "stages"} of the chosen plans, those of least KL (forecast, or as it is): alignment, then the recipe

    teacher: a model. data: as for distill; its first 2048 rows are read, and every eighth is held out unless the recipe has eval_data.
    recipe: that of the distillation to come: length, batch, lr, mixer, init, seed … and steps, which the forecast is for. Default:
    1000 steps, train ["*mamba*"]. student: a model like teacher, all of whose attention was converted; None: converted here, and aligned
    for align_steps. Layers that were distilled together lean on each other, and one alone put back can lose: better give one that was only
    aligned. restore_layers (convert.py) makes a plan's model of it, to go on from. probe_steps: of the shortest run behind the forecast; 0:
    no forecast. rows: packed rows that are measured, at most. context 0: no speed. Copies share what they do not change.

    The forecast's "low" and "high" are the 5th and 95th percentile over 200 resamplings of the held-out rows, each with a c drawn from
    0.1 to 1.5: they cover that other rows of the same data might have been held out, and that three short runs hardly tell c. They do not
    cover another seed of the training, other data, or a loss that does not follow a + b·steps^-c from the probes to the end, as when a
    model suddenly learns to look things up; the longer probe_steps, the less that matters.

    ValueError: bad data or recipe, stages or epochs in it, shares outside [0, 1), a student that does not fit. OSError: out cannot be
    written."""
    recipe = load_plan_recipe(recipe)
    kinds = teacher.layer_kinds
    own = [i for i, kind in enumerate(kinds) if kind == "attention"]
    shares = [attention] if isinstance(attention, (int, float)) else list(dict.fromkeys(attention))
    if not shares or not own:
        raise ValueError("plan needs a share of attention to keep" if own else "the teacher has no attention layer that could be converted")
    for share in shares:
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share < 1:
            raise ValueError(f"attention holds {share!r}, expected shares of the layers from 0 up and below 1")
        if set(own) <= set(kept_attention(len(kinds), share)):
            raise ValueError(f"attention {share:g} keeps all of the teacher's {len(own)} attention layers")
    for name, value, low in (("align_steps", align_steps, 0), ("probe_steps", probe_steps, 0), ("rows", rows, 1), ("context", context, 0)):
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < low:
            raise ValueError(f"{name} must be an integer from {low} up, not {value!r}")
    out = None if out is None else Path(out)
    if out is not None:  # what would fail after all the work
        with writing(out):
            out.mkdir(parents=True, exist_ok=True)
    learned, seen = _split(teacher, data, recipe, rows, probe_steps)
    before = []  # stages
    if student is None:
        student = convert(teacher, own, recipe["mixer"] or "mamba2", recipe["init"], recipe["seed"],
                          data=learned if recipe["init"] == "calibrated" else None)
        if align_steps:
            before = [{"steps": align_steps, **ALIGN}]
            distill(student, teacher, learned, {**recipe, "stages": before, "eval_data": None}, progress=progress)
    elif len(student.layer_kinds) != len(kinds):
        raise ValueError(f"the student has {len(student.layer_kinds)} layers and the teacher {len(kinds)}")
    elif left := [i for i in own if student.layer_kinds[i] == "attention"]:
        raise ValueError(f"layers {left} of the student are attention: it has to be one without any that could come back")
    probe = _probe(teacher, recipe["seed"])
    able = _right(teacher, probe)
    sets = {"data": seen, "recall": probe}
    works = tqdm(total=len(own) + 1 + 2 * len(shares), unit="model", desc="layers", dynamic_ncols=True,
                 disable=None if progress is None else not progress)
    with works:
        base = _kl(student, teacher, sets, works)
        layers = []
        for layer in own:
            kl = _kl(_with(student, teacher, [layer]), teacher, sets, works)
            share = {name: (base[name] - kl[name]) / base[name] if base[name] else 0.0 for name in sets}
            layers.append({"layer": layer, **share, "score": (share["data"] + able * share["recall"]) / (1 + able)})
        best = [row["layer"] for row in sorted(layers, key=lambda row: -row["score"])]
        works.set_description("plans")
        plans = []
        for share in shares:
            uniform = [i for i in kept_attention(len(kinds), share) if i in own]
            measured = sorted(best[:len(uniform)])
            placements = {"uniform": uniform, "measured": measured} if measured != uniform else {"uniform, measured": uniform}
            for placement, kept in placements.items():
                found = _examine(_with(student, teacher, kept), teacher, learned, seen, recipe, probe_steps, context)
                plans.append({"attention": share, "placement": placement, "mamba_layers": [i for i in range(len(kinds)) if i not in kept],
                              **found, "chosen": False})
                works.update(3 - len(placements))
    stages = {}
    for share in shares:
        chosen = min((p for p in plans if p["attention"] == share), key=lambda p: p["forecast"]["kl"]["at"] if p["forecast"] else p["kl"])
        chosen["chosen"] = True
        stages[f"{share:g}"] = [{"mamba_layers": chosen["mamba_layers"], **stage}
                                for stage in (*before, {"steps": recipe["stages"][0]["steps"]})]
    result = {"layers": layers, "student": base, "teacher_recall": able, "plans": plans, "stages": stages}
    if out is not None:
        with replacing(out / "plan.json") as file:
            file.write(json.dumps(result, indent=1).encode())
        with replacing(out / "plan.png") as file:
            _draw(result, file)
    return result


def table(result):
    """A result as lines of text: the layers, the best first, then a line a plan."""
    head = ["attention", "placement", "kept", "weights", "KV a token", "state", "tokens/s", "KL now", "KL forecast (5-95 %)", "CE"]
    cells = [head]
    layers = {row["layer"] for row in result["layers"]}
    for p in result["plans"]:
        forecast = ["-" if not p["forecast"] else "{at:.3f} ({low:.3f}-{high:.3f})".format(**p["forecast"][name]) for name in ("kl", "ce")]
        cells.append([f"{p['attention']:g}", p["placement"] + (" *" if p["chosen"] else ""),
                      ",".join(map(str, sorted(layers - set(p["mamba_layers"])))) or "none", readable(p["weight_bytes"]),
                      readable(p["kv_bytes_per_token"]), readable(p["state_bytes_per_sequence"]),
                      f"{p['tokens_per_second']:.1f}" if p["tokens_per_second"] else "-", f"{p['kl']:.3f}", *forecast])
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    best = sorted(result["layers"], key=lambda row: -row["score"])
    lines = ["KL recovered by one layer's attention: " + ", ".join(f"{row['layer']} {row['score']:.0%}" for row in best),
             f"(of {result['student']['data']:.3f} on data, {result['student']['recall']:.3f} on the recall probe, on which the teacher "
             f"is right in {result['teacher_recall']:.0%})", ""]
    return "\n".join(lines + ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in cells])


def load_plan_recipe(recipe):
    """The checked recipe, with RECIPE's keys where it has none; ValueError for stages and epochs."""
    given = RECIPE if recipe is None else recipe if isinstance(recipe, dict) else read_recipe(recipe)
    if isinstance(given, dict) and (other := [key for key in ("stages", "epochs") if key in given]):
        raise ValueError(f"the recipe has {other[0]}: a plan finds the layers of one stage, whose length it takes as steps")
    return load_recipe(RECIPE | given if isinstance(given, dict) else given)


def _split(teacher, data, recipe, rows, probe_steps):
    """(rows of data to learn from, as ids and masks; batches of one packed row each that measure)."""
    def read(source, name):
        some = [row for _, row in itertools.islice(documents.rows(source, name), READ)]
        return list(documents.read(some, teacher.tokenizer, teacher.config["vocab_size"], name))
    found = read(data, "data")
    if recipe["eval_data"] is not None:
        learn, measure = found, read(recipe["eval_data"], "eval_data")
    elif len(found) == 1 and not probe_steps:
        learn = measure = found
    elif len(found) == 1:
        raise ValueError("data: one row is to be held out and others are to be learned from, so a forecast needs two; or probe_steps=0")
    else:
        learn, measure = [found[i] for i in range(len(found)) if i % HELD_OUT], found[::HELD_OUT]
    packed = documents.Batches(measure, recipe["length"], 1, shuffle=False, name="the held-out data")
    return [{"ids": ids, "mask": mask} for ids, mask in learn], list(itertools.islice(packed.once(), rows))


def _probe(model, seed):
    """Batches of the recall probe."""
    vocab = model.config["vocab_size"]
    pairs = min(8, (vocab - 1) // 4)
    kinds = [associative(model, PROBE_LENGTH, PROBE_ITEMS, seed, pairs)[:2], copying(model, PROBE_LENGTH, PROBE_ITEMS, seed)]
    return [(ids, targets, None) for ids, targets in kinds]


def _right(model, probe):
    """The share of the probe's answers that are the model's likeliest token, each kind weighing the same."""
    shares = []
    for ids, targets, _ in probe:
        last = ids.shape[1] - int(np.argmax((targets >= 0).any(0)))
        hits = model.logits(ids, last=last).argmax(-1) == targets[:, -last:]
        shares.append(hits[targets[:, -last:] >= 0].mean())
    return float(np.mean(shares))


def _with(student, teacher, layers):
    """The student with the teacher's mixer in these layers; all is shared."""
    model = convert(student, mamba_layers=[])
    restore_layers(model, layers, teacher)
    return model


def _losses(model, teacher, batches):
    """(batches,3) float64: sums of CE and of KL over the positions that count, and how many these are."""
    out = []
    for ids, targets, prev in batches:
        loss = model.loss(ids, targets, teacher=teacher, kl=1.0, prev=prev)
        out.append(np.array([loss["ce"], loss["kl"], 1]) * loss["tokens"])
    return np.array(out)


def _kl(model, teacher, sets, works):
    """{set: KL a position, batches of one set weighing by their positions}."""
    found = {name: _losses(model, teacher, batches).sum(0) for name, batches in sets.items()}
    works.update()
    return {name: float(sums[1] / sums[2]) for name, sums in found.items()}


def _examine(model, teacher, learned, seen, recipe, probe_steps, context):
    """What a plan costs and loses; its model is not changed."""
    now = _losses(model, teacher, seen)
    steps = [probe_steps * n for n in LENGTHS] if probe_steps else []
    after = []
    for n in steps:
        trial = convert(model, mamba_layers=[])
        distill(trial, teacher, learned, {**recipe, "stages": [{"mamba_layers": None, "steps": n}], "eval_data": None}, progress=False)
        after.append(_losses(trial, teacher, seen))
    ce, kl, _ = now.sum(0) / now[:, 2].sum()
    means = [sums.sum(0) / sums[:, 2].sum() for sums in after]
    return {**held(model), "tokens_per_second": _speed(model, context) if context else None, "ce": float(ce), "kl": float(kl),
            "probes": [{"steps": n, "ce": float(m[0]), "kl": float(m[1])} for n, m in zip(steps, means)],
            "forecast": _forecast(steps, np.array(after), recipe["stages"][0]["steps"]) if steps else None}


def _speed(model, context):
    """Tokens per second of decoding one sequence behind `context` tokens: the better of two runs, of which a GPU's first records calls."""
    prompt = np.random.RandomState(0).randint(0, model.config["vocab_size"], context).tolist()
    return max(generate(model, prompt, max_new_tokens=NEW_TOKENS, stop_tokens=[]).stats["tokens_per_second"] for _ in range(2))


def _forecast(steps, losses, target):
    """{"ce" | "kl": {"at", "low", "high"}} at `target` steps. losses (runs,rows,3): sums and counts of the held-out rows after `steps`."""
    rows, rng = losses.shape[1], np.random.RandomState(0)
    picks = [np.arange(rows), *rng.randint(0, rows, (SAMPLES, rows))]
    sums = np.stack([losses[:, pick].sum(1) for pick in picks])  # (samples,runs,3)
    exponents = [None, *rng.uniform(*EXPONENTS, SAMPLES)]
    out = {}
    for i, name in enumerate(("ce", "kl")):
        at, *others = (extrapolate(steps, y, target, c) for y, c in zip(sums[..., i] / sums[..., 2], exponents))
        low, high = np.percentile(others, INTERVAL)
        out[name] = {"at": float(at), "low": float(min(low, at)), "high": float(max(high, at))}
    return out


def extrapolate(steps, losses, target, exponent=None):
    """a + b·target^-c of the a, b >= 0 and the c (exponent; None: of 57 in EXPONENTS) that fit losses best by least squares."""
    y, fits = np.asarray(losses, np.float64), []
    for c in np.linspace(*EXPONENTS, 57) if exponent is None else [exponent]:
        x = np.asarray(steps, np.float64) ** -c
        b = max((x - x.mean()) @ y / ((x - x.mean()) @ (x - x.mean())), 0.0)
        a = y.mean() - b * x.mean()
        if a < 0:
            a, b = 0.0, x @ y / (x @ x)
        fits.append((((a + b * x - y) ** 2).sum(), a + b * float(target) ** -c))
    return min(fits)[1]


def _draw(result, file):
    """KL recovered a layer, on data and on the probe, and which layers the plans keep."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    layers = np.array([row["layer"] for row in result["layers"]])
    figure, (bars, marks) = plt.subplots(2, 1, figsize=(max(6, 0.3 * len(layers) + 3), 5), height_ratios=(3, 1), sharex=True,
                                         layout="constrained")
    for shift, name, label in ((-0.2, "data", "data"), (0.2, "recall", "recall probe")):
        bars.bar(layers + shift, [row[name] for row in result["layers"]], 0.4, label=label)
    bars.axhline(0, color="black", linewidth=0.8)
    bars.set(ylabel="share of KL recovered", title="one layer gets its attention back")
    bars.legend()
    names = []
    for i, p in enumerate(result["plans"]):
        names.append(f"{p['attention']:g} {p['placement']}" + (" *" if p["chosen"] else ""))
        kept = [layer for layer in layers if layer not in p["mamba_layers"]]
        marks.scatter(kept, [i] * len(kept), marker="s", color="C2" if p["chosen"] else "C7")
    marks.set(yticks=range(len(names)), yticklabels=names, xlabel="layer", xticks=layers, ylim=(len(names) - 0.5, -0.5),
              title="kept as attention (* chosen)")
    figure.savefig(file, format="png", dpi=120)
    plt.close(figure)
