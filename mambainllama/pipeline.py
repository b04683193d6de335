"""A whole recipe in one file: pseudo-labels, conversion, alignment, distillation, SFT, DPO, one part after the other.

  teacher: Llama-3.2-1B-Instruct       # a folder
  start: …                             # a folder: what is converted (default: the teacher)
  device: cuda                         # "cpu"; dtype: as mil.load
  out: run                             # folder; a part has one in it, NUMBER-NAME
  config: {…}                          # config.json's values of `start`, and parameters of the teacher, for a dry run without the folders
  run:                                 # the parts, each a mapping of one name
    - convert: {attention: 0.5}        # or mamba_layers; mixer, window, init, data …: as mil.convert. Stages of a training part convert too
    - answer: {data: prompts.jsonl, max_new_tokens: 512}     # the teacher's answers (mil.answer): data of the parts after it that name none
    - cache: {k: 32, batch: 8}         # the teacher's k likeliest next tokens (mil.cache): what the next distill part, on its data, learns from
    - distill: {data: chats.jsonl, stages: […], …}           # as mil.distill: a recipe, and its data
    - sft: {data: chats.jsonl, epochs: 1, …}                 # as mil.sft; train: as mil.train
    - dpo: {data: pairs.jsonl, reference: teacher, …}        # as mil.dpo; reference: start | teacher

A part that is finished is skipped, one that was killed goes on. At the end out/report.html shows the curves, a table of the stages,
and answers beside the teacher's."""
import html
import json
import os
from math import prod
from pathlib import Path

from .answers import answer
from .cache import cache
from .checkpoint import load, save, shapes
from .config import architecture, mamba_config, read_folder
from .convert import convert, replaced
from .data import rows
from .generate import generate
from .info import count_kinds, readable, training_memory
from .model import fits
from .parallel import ranks
from .recipe import DEFAULTS, NO_TEACHER, check, identity, known, load_recipe, mixer_of, read_recipe, settings
from .report import curves, image, page, table
from .train import distill, dpo, sft, train
from .weights import replacing, writing

RECIPES = Path(__file__).parent / "recipes"
TOP = ("teacher", "start", "device", "dtype", "out", "config", "run")
TRAINING = {"distill": {}, "train": NO_TEACHER, "sft": NO_TEACHER, "dpo": NO_TEACHER}  # their defaults
OTHER = {"convert": ("data", "attention", "mamba_layers", "mixer", "window", "sinks", "init", "seed"),
         "cache": ("k", "batch"),
         "answer": ("data", "max_new_tokens", "temperature", "top_k", "top_p", "min_p", "seed", "batch")}
SPEED = 600e12   # FLOP/s that distillation at Llama-3-8B's shape reaches on an H200 (benchmarks/train.py)
SAMPLES, SAMPLE_TOKENS = 4, 96


def run(recipe, out=None, dry_run=False, progress=None):
    """Runs all parts of a recipe, skipping what is finished; → {"parts": [report of each training part, or None], "model": folder of the
    last one's model, "html": path of the page}.

    recipe: a dict, the path of a YAML or JSON file, or the name of one of the package's own (recipes/). out: instead of the recipe's.
    dry_run: nothing is computed or written; → the text that describes the run: stages, layers, tokens, bytes, expected time.
    ValueError: the recipe is wrong, or out holds another run's part. Ctrl-C and OSError as in mil.distill."""
    plan = load_plan(recipe)
    if dry_run:
        return _describe(plan)
    out = out or plan["out"]
    if not out:
        raise ValueError("the recipe names no out, and none is given")
    if not plan["teacher"]:
        raise ValueError("the recipe names no teacher")
    for name, part in plan["run"]:
        if name != "convert" and part["data"] is None:
            raise ValueError(f"the recipe's {name} names no data, and no answer part is before it")
    with ranks().job():
        return _Run(plan, Path(out), progress if ranks().first else False).all()


def load_plan(recipe):
    """The checked recipe: its top-level keys, "run" a list of (name, settings), a training part's as load_recipe returns them, with "data"
    (and "reference")."""
    recipe, where = (recipe, "recipe") if isinstance(recipe, dict) else (read_plan(recipe), str(recipe))
    known(where, recipe, TOP)
    if not isinstance(recipe.get("run"), list) or not recipe["run"]:
        raise ValueError(f"{where}: run must be a list of parts, such as distill")
    plan = {"device": "cpu", **dict.fromkeys(("teacher", "start", "dtype", "out", "config")), **recipe, "run": []}
    answers = None
    for i, part in enumerate(recipe["run"]):
        if not isinstance(part, dict) or len(part) != 1 or not isinstance(next(iter(part.values())), (dict, type(None))):
            raise ValueError(f"{where}: run[{i}] must be a mapping of one name, such as distill, to its settings")
        (name, given), = part.items()
        known(f"{where}: run[{i}]", [name], [*TRAINING, *OTHER])
        given, here = dict(given or {}), f"{where}: run[{i}]: {name}"
        if name in OTHER:
            known(here, given, OTHER[name])
            given.setdefault("data", None)
            answers = f"{i + 1}-answer/answers.jsonl" if name == "answer" else answers
        else:
            data, reference = given.pop("data", None), given.pop("reference", "start")
            if reference not in ("start", "teacher") or name != "dpo" and reference != "start":
                raise ValueError(f"{here}: reference must be 'start' or 'teacher', and belongs to dpo")
            known(here, given, [*DEFAULTS, "steps", "epochs", "stages", "data", "reference"])
            try:
                given = load_recipe(given, **TRAINING[name])
            except ValueError as error:
                raise ValueError(str(error).replace("recipe", here, 1)) from None
            given |= {"data": data or (answers and Path(answers)), "reference": reference}
        plan["run"].append((name, given))
    for i, (name, part) in enumerate(plan["run"]):
        if name != "cache":
            continue
        here = f"{where}: run[{i}]: cache"
        taught = next((other for after, other in plan["run"][i + 1:] if after == "distill"), None)
        if not taught:
            raise ValueError(f"{here}: no distill part comes after it")
        stages = [settings(taught, stage) for stage in taught["stages"]]
        temperatures = {stage["temperature"] for stage in stages if stage["kl"]}
        for wrong, what in ((any(stage["align"] for stage in stages), "has align, which needs the teacher's layers"),
                            (len(temperatures) > 1, f"has temperatures {sorted(temperatures)}, and a cache is of one"),
                            ("cache" in taught, "has a cache already"),
                            (taught["data"] in [Path(f"{n + 1}-answer/answers.jsonl") for n in range(i, len(plan["run"]))],
                             "learns from answers that come after the cache")):
            if wrong:
                raise ValueError(f"{here}: the distill part after it {what}")
        part |= {key: check(here, key, part[key]) for key in ("k", "batch") if key in part}
        part |= {"data": taught["data"], "length": taught["length"], "temperature": temperatures.pop() if temperatures else 1.0}
        taught["cache"] = f"{i + 1}-cache"
    return plan


def read_plan(recipe):
    """The mapping in a file, or in one of the package's own, by its name."""
    path = recipe
    if not os.path.exists(recipe):
        path = RECIPES / f"{recipe}.yaml"
        if not path.exists():
            own = ", ".join(sorted(path.stem for path in RECIPES.glob("*.yaml")))
            raise ValueError(f"{recipe}: no such file, and the package's own recipes are {own}")
    found = read_recipe(path)
    if not isinstance(found, dict):
        raise ValueError(f"{recipe}: a recipe is a mapping of keys to values, not {type(found).__name__}")
    return found


class _Run:
    """The parts in order; a model is loaded when a part needs it."""

    def __init__(self, plan, out, progress):
        self.plan, self.out, self.progress, self.models = plan, out, progress, {}
        self.current = plan["start"] or plan["teacher"]  # a model, or the folder of one

    def all(self):
        self.folder(self.out)
        reports, before = [], {"teacher": self.plan["teacher"], "start": self.plan["start"]}
        for i, (name, part) in enumerate(self.plan["run"]):
            folder = self.out / f"{i + 1}-{name}"
            before = {"before": before, name: json.loads(json.dumps(identity(part), default=str))}
            reports.append(self.part(name, part, folder, before))
        model, path = self.model(self.current), self.out / "report.html"
        if not isinstance(self.current, Path):
            self.current = self.out / "model"
            if ranks().first:
                save(model, self.current)
        if ranks().first:
            with replacing(path) as file:
                file.write(self.page(reports, model).encode())
        return {"parts": reports, "model": str(self.current), "html": str(path)}

    def part(self, name, part, folder, identity):
        if name == "convert":
            self.current = convert(self.model(self.current), **part)
            return None
        done, mark = folder / "report.json", folder / "part.json"
        before, report = ranks().every([json.loads(file.read_text()) if file.exists() else None for file in (mark, done)])[0]
        if before not in (None, identity):
            raise ValueError(f"{folder} holds a part that began with other settings, or after another part; name another out")
        self.folder(folder)
        if ranks().first and not before:
            with replacing(mark) as file:
                file.write(json.dumps(identity, indent=1).encode())
        report = report or self.work(name, part, folder)
        if name in OTHER:
            if ranks().first:
                with replacing(done) as file:
                    file.write(json.dumps(report).encode())
            return None
        self.current = folder / "model"
        return report

    def folder(self, path):
        """Makes it, on the first rank, before any goes on."""
        if ranks().first:
            with writing(path):
                path.mkdir(parents=True, exist_ok=True)
        ranks().every(None)

    def work(self, name, part, folder):
        data = self.out / part["data"] if isinstance(part["data"], Path) else part["data"]
        how = {key: value for key, value in part.items() if key not in ("data", "reference", "cache")}
        if name == "answer":
            return self.answers(data, folder, how)
        if name == "cache":
            return cache(self.model(self.plan["teacher"]), data, folder, progress=self.progress, **how)
        model = self.model(self.current)
        if model is self.models.get(self.plan["teacher"]):
            model = convert(model, mamba_layers=[])
        options = {"out": folder, "progress": self.progress}
        if name == "distill":
            return distill(model, self.out / part["cache"] if "cache" in part else self.model(self.plan["teacher"]), data, how, **options)
        if name == "dpo":
            return dpo(model, data, how, self.model(self.plan["teacher"]) if part["reference"] == "teacher" else "start", **options)
        return {"train": train, "sft": sft}[name](model, data, how, **options)

    def answers(self, data, folder, how):
        """The teacher's answers; of a job's ranks each gives a share of them to a file of its own, and the first one joins these."""
        rank, out = ranks(), folder / "answers.jsonl"
        own = out if rank.size == 1 else folder / f"answers.{rank.rank}.jsonl"
        report = answer(self.model(self.plan["teacher"]), data, own, shard=(rank.rank, rank.size), progress=self.progress, **how)
        files = rank.every(own)
        if rank.first and rank.size > 1:
            lines = {json.loads(line)["index"]: line for file in files for line in open(file, "rb")}
            with replacing(out) as file:
                file.writelines(lines[index] for index in sorted(lines))
        rank.every(None)
        return report

    def model(self, which):
        """A model as it is; a folder's, loaded once if it is the teacher's."""
        if not isinstance(which, (str, Path)):
            return which
        if which not in self.models:
            model = load(which, device=self.plan["device"], dtype=self.plan["dtype"])
            if which != self.plan["teacher"]:
                return model
            self.models[which] = model
        return self.models[which]

    def page(self, reports, model):
        parts = [(f"{i + 1} {name}", report) for i, ((name, _), report) in enumerate(zip(self.plan["run"], reports)) if report]
        out = [f"<p>Teacher: {html.escape(str(self.plan['teacher']))}. Layers: {html.escape(count_kinds(model.layer_kinds))}.</p>"]
        if parts:
            out.append(image(curves({title: report["history"] for title, report in parts})))
            stages = [(title, stage, end) for title, report in parts for stage, end in zip(report["recipe"]["stages"], report["stages"])]
            out.append(table(["part", "stage", "layers converted", "last step", "loss", "ce", "kl", "others", "million tokens", "hours"], [
                [title, end["stage"] + 1, "" if stage["mamba_layers"] is None else ", ".join(map(str, stage["mamba_layers"])), end["step"],
                 *(f"{end[key]:.4f}" if key in end else "" for key in ("loss", "ce", "kl")),
                 ", ".join(f"{key} {end[key]:.4g}" for key in ("error", "margin", "accuracy", "eval_loss") if key in end)
                 + (f", rolled back: {end['rolled_back']}" if end.get("rolled_back") else ""),
                 f"{end['tokens'] / 1e6:.2f}", f"{end['seconds'] / 3600:.2f}"] for title, stage, end in stages]))
        for title, report in parts:
            if report.get("guard"):
                out.append(f"<h2>Recall, {title}</h2><p>{html.escape(json.dumps(report['guard']))}</p>")
        if (self.out / "plan.json").exists():
            out.append(f"<h2>Plan</h2><pre>{html.escape((self.out / 'plan.json').read_text())}</pre>")
        return page("A hybrid and its teacher", *out, *self.samples(model))

    def samples(self, model):
        """The first prompts of the first part with data, answered by both."""
        data = next((part["data"] for name, part in self.plan["run"] if name != "convert"), None)
        data = self.out / data if isinstance(data, Path) else data
        prompts = [] if data is None else [p for p in (_prompt(row) for (_, row), _ in zip(rows(data), range(SAMPLES))) if p]
        if not prompts:
            return
        both = [generate(m, prompts, max_new_tokens=SAMPLE_TOKENS) for m in (self.model(self.plan["teacher"]), model)]
        yield "<h2>Answers, greedy</h2>"
        yield table(["prompt", "teacher", "hybrid"], [[_said(prompt), *(o.text if o.text is not None else o.tokens for o in answers)]
                                                      for prompt, *answers in zip(prompts, *both)], "text")


def _prompt(row):
    """What a row asks: of a chat what precedes its last answer, of other rows their beginning; None: it cannot be told."""
    if "prompt" in row:
        return row["prompt"]
    if "messages" in row:
        turns = row["messages"]
        return turns[:-1] if turns[-1]["role"] == "assistant" else turns
    if "text" in row:
        return row["text"][:200]
    return row["ids"][:max(len(row["ids"]) // 2, 1)] if row.get("ids") else None


def _said(prompt):
    return prompt if isinstance(prompt, str) else prompt[-1]["content"] if isinstance(prompt[0], dict) else " ".join(map(str, prompt))


# -- the dry run ------------------------------------------------------------------------------------------------------------------------

def _describe(plan):
    start, teacher = _architecture(plan, plan["start"] or plan["teacher"]), None
    if plan["start"] and plan["teacher"] and os.path.isdir(plan["teacher"]):
        teacher = _architecture(plan, plan["teacher"])
    teacher, kinds, lines = teacher or start, list(start[1]["kinds"]), []
    real = 4 if plan["dtype"] == "float32" or plan["device"] == "cpu" and plan["dtype"] is None else 2
    lines.append(f"{plan['start'] or plan['teacher'] or 'the recipe'}: {len(kinds)} layers ({count_kinds(kinds)}), {_amount(_count(start[1]))} parameters, "
                 f"{plan['dtype'] or ('float32' if real == 4 else 'bfloat16')} on {plan['device']}")
    total = seconds = 0
    for i, (name, part) in enumerate(plan["run"]):
        lines.append(f"{i + 1} {name}" + (f": {part['data']}" if part["data"] else ""))
        if name == "answer":
            lines.append("    the teacher's answers, as many as there are rows")
            continue
        if name == "cache":
            k = part.get("k", 32)
            lines.append(f"    the teacher's {k} likeliest next tokens of it, {8 * k + 4} bytes a token: the next distill part learns from them")
            continue
        if name == "convert":
            kinds = _converted(kinds, part.get("mamba_layers"), part.get("attention"), part.get("mixer", "mamba2"))
            lines.append(f"    {count_kinds(kinds)}")
            continue
        for j, stage in enumerate(settings(part, stage) for stage in part["stages"]):
            now = _converted(kinds, stage["mamba_layers"], None, mixer_of(stage, kinds))
            fresh, kinds = [n for n, (a, b) in enumerate(zip(kinds, now)) if a != b], now
            arch = _with(start, kinds)
            trained = sum(prod(shape) for key, shape in shapes(arch).items() if fits(key, stage["train"]))
            rows_a_step = part["batch"] * part["accumulate"] * (2 if name == "dpo" else 1)
            tokens = rows_a_step * part["length"]
            steps = stage["steps"]
            compared = teacher[1] if name == "distill" and "cache" not in part else None
            flops = tokens * _flops(arch, trained, compared, stage["recompute"])
            held = training_memory(arch, compared, stage["train"], rows_a_step // part["accumulate"], part["length"], real, stage["moments"], stage["recompute"],
                                   shared=plan["start"] is None, gradients=stage["gradients"])
            lines.append(f"    stage {j + 1}: {count_kinds(kinds)}" + (f"; layers {', '.join(map(str, fresh))} are converted" if fresh else "")
                         + (f"; aligns {stage['align']}" if stage["align"] else ""))
            lines.append(f"      {_amount(trained)} parameters learn ({', '.join(stage['train'])}), lr {stage['lr']:g} {stage['schedule']}, "
                         f"{rows_a_step} rows a step = {tokens:,} tokens")
            hours = flops / SPEED / 3600
            if steps:
                total, seconds = total + steps * tokens, seconds + steps * hours * 3600
                lines.append(f"      {steps:,} steps, {steps * tokens / 1e6:,.1f} million tokens, about {steps * hours:,.2f} hours"
                             if plan["device"] != "cpu" else f"      {steps:,} steps, {steps * tokens / 1e6:,.1f} million tokens, {steps * flops / 1e12:,.1f} TFLOP")
            else:
                lines.append(f"      {stage['epochs']:g} epochs; 1000 steps are {tokens / 1e3:,.0f} million tokens" +
                             (f" and about {1000 * hours:,.1f} hours" if plan["device"] != "cpu" else f" and {flops / 1e9:,.1f} PFLOP"))
            lines.append(f"      about {readable(held.pop('total'))}: " + ", ".join(f"{key} {readable(value)}" for key, value in held.items()))
    if plan["start"] and teacher is start:
        lines.append("the teacher is counted as if it had the shape of the model that is converted")
    if total:
        lines.append(f"in all {total / 1e6:,.1f} million tokens with a known number of steps" + (f", about {seconds / 3600:,.2f} hours" if plan["device"] != "cpu" else ""))
    if plan["device"] != "cpu":
        lines.append(f"hours are those of one H200, at {SPEED / 1e12:.0f} TFLOP/s of matrix products")
    return "\n".join(lines)


def _amount(n):
    return f"{n / 1e9:.2f} billion" if n >= 1e8 else f"{n:,}"


def _architecture(plan, folder):
    """(config, architecture) of a folder, or of the recipe's config where there is none."""
    if folder and os.path.isdir(folder):
        config, mamba = read_folder(folder)
        return config, architecture(config, mamba)
    if plan["config"] is None:
        raise ValueError(f"{folder or 'the recipe'}: no such folder, and the recipe has no config to describe the run by")
    return plan["config"], architecture(plan["config"])


def _with(start, kinds):
    config, arch = start
    return architecture(config, None if all(k == "attention" for k in kinds) else mamba_config(config, kinds))


def _converted(kinds, layers, attention, mixer):
    if attention is not None:
        layers = replaced(kinds, attention)
    if layers and max(layers) >= len(kinds):
        raise ValueError(f"mamba_layers has layer {max(layers)}, and the model has layers 0 to {len(kinds) - 1}")
    return [mixer if kind == "attention" and layers and i in layers else kind for i, kind in enumerate(kinds)]


def _count(arch):
    return sum(prod(shape) for shape in shapes(arch).values())


def _matrices(arch):
    """Weights that a token is multiplied with."""
    return sum(prod(s) for key, s in shapes(arch).items() if len(s) == 2 and "embed_tokens" not in key) + arch["tied"] * arch["vocab"] * arch["width"]


def _flops(arch, trained, teacher, recompute):
    """Of the matrix products of a token: student forward, gradients of what comes in and of what learns, teacher's forward, recomputation."""
    own = _matrices(arch)
    return 2 * (own + own + min(trained, own) + (own if recompute else 0) + (_matrices(teacher) if teacher else 0))
