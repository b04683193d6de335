"""Distillation, training and DPO: one loop of stages, steps and micro-batches, which ends with the same bits however often it is killed.

A stage starts by converting the layers that its recipe lists and that are not Mamba yet, with a fresh optimiser (moments zero, bias
correction from step 1; float32 master weights stay) and a learning rate schedule of its own: rate(). A step adds up the gradients
of `accumulate` micro-batches, each weighted by its share of the tokens that count, so that it equals one batch of that many rows;
clips the norm of the whole gradient; and lets AdamW move the trainable parameters.

A run's folder holds metrics.jsonl (a line a step), checkpoint.npz, and when it is done model/ and report.json. What a step computes
depends on the weights, the moments and the step's number alone, and the checkpoint holds those: a run that goes on from it repeats
the steps that were lost, bit for bit, on the same module, thread count and number of ranks (parallel.py).

With a `guard`, recall is measured before the first step, every eval_every steps and at the end ("recall" in metrics.jsonl: its score). A
run in which it fell by more than the limit ends there, with a checkpoint and a ValueError, and goes on from it only with a larger limit."""
import json
import math
import os
import signal
import sys
import threading
import time
import warnings
import zipfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from tqdm import tqdm

from . import checkpoint
from .cache import Cache
from .config import said
from .convert import convert_layers, window_of
from .model import DTYPES, fits, need_model
from .objectives import LanguageModelling, evaluate, plus, share_of
from .parallel import lost, ranks
from .preference import Preference
from .recall import recall, recall_guard
from .recipe import DEFAULTS, NO_TEACHER, identity, load_recipe, mixer_of, settings
from .weights import replacing, writing


def distill(student, teacher, data, recipe, out=None, progress=None):
    """Trains student (in place) to predict what teacher predicts, and the data; → the report.

    teacher: a model, or the folder of its predictions for this data that mil.cache wrote (cache.py); eval is then cross-entropy alone.
    data: a list of rows or where they are (JSONL, Parquet, the hub, several of these); data.py tells their forms, and how they are
    packed and cut. recipe: a dict or the path of a YAML or JSON file, recipe.py. out: the run's folder; called again with it, and
    with the student and teacher that the run began with, the run goes on; a finished one only gives its weights to student. None:
    nothing is kept. progress: True or False for the bar; None: only on a terminal.

    Report: "steps", "loss", "ce", "kl" (of the last step), "eval" ({"loss", "ce", "kl"} on eval_data after the last step, or
    None), "guard" ({"before", "after"}: recall before the first step and after the last, or None), "stages" (the metrics of each stage's last
    step), "tokens" (positions computed), "seconds", "tokens_per_second", "fill" (share of an epoch's positions that hold tokens, the rest
    being padding), "recipe", "history" (path of metrics.jsonl), "model" (folder of the trained model); the last two are None without out.
    ValueError: bad recipe or data, models that do not fit, out holds another run. OSError: out cannot be written; the checkpoint
    before is intact. Ctrl-C: the micro-batch ends, a checkpoint is written, KeyboardInterrupt is raised; a second one does not wait."""
    need_model(student, "distill: student")
    if student is teacher:
        raise ValueError("student and teacher are one model; mil.convert(teacher, mamba_layers=[]) makes a student that shares its weights")
    recipe = load_recipe(recipe)
    if recipe["guard"]:
        raise ValueError("recipe: guard belongs to train, sft and dpo; a layer that has just become Mamba recalls little until it has learned")
    if isinstance(teacher, (str, os.PathLike)):
        teacher = Cache(teacher)
        teacher.check(student, recipe)
    return run(student, LanguageModelling(student, teacher, recipe), data, recipe, out, progress)


def train(model, data, recipe, out=None, progress=None):
    """Trains model (in place) on the data alone; → the report. As distill, but ce is 1 and kl 0 by default, and kl must be 0."""
    return _train(model, data, recipe, out, progress)


def sft(model, data, recipe, out=None, progress=None):
    """Supervised fine-tuning: train, on rows of chats or of ids with a mask (data.py), of which the answers alone count; eval_data too."""
    return _train(model, data, recipe, out, progress, answers=True)


def _train(model, data, recipe, out, progress, answers=False):
    need_model(model, "train: model")
    recipe = load_recipe(recipe, **NO_TEACHER)
    for stage in (settings(recipe, stage) for stage in recipe["stages"]):
        if stage["kl"] or stage["align"]:
            key = "kl" if stage["kl"] else "align"
            raise ValueError(f"recipe: {key} is {stage[key]} and there is no teacher; leave it out, or distill")
    return run(model, LanguageModelling(model, None, recipe, answers), data, recipe, out, progress)


def dpo(model, data, recipe, reference="start", out=None, progress=None):
    """Trains model (in place) to prefer chosen to rejected answers (preference.py: rows, losses); → the report.

    reference: what the model is held to: "start", the model as it came, or another model, such as its teacher (the paper's Eq. 4). Its
    log-probabilities are computed before the first step and kept in out/reference.npz, so that it is not needed after that.
    recipe: as for train, without kl and ce; and beta, label_smoothing, preference, prompt_length; batch counts pairs. Metrics: margin,
    accuracy, chosen and rejected (log-probabilities), kl. Everything else as distill."""
    need_model(model, "dpo: model")
    recipe = load_recipe(recipe, **NO_TEACHER)
    if any(stage["kl"] or stage["ce"] != 1 or stage["align"] for stage in (settings(recipe, stage) for stage in recipe["stages"])):
        raise ValueError("recipe: kl, ce and align are of other objectives; dpo has beta")
    if recipe["preference"] == "ipo" and recipe["label_smoothing"]:
        raise ValueError("recipe: label_smoothing belongs to preference sigmoid, not ipo")
    if isinstance(reference, str) and reference != "start":
        raise ValueError(f"reference is {reference!r}, expected 'start' or a model")
    if reference != "start" and reference.config["vocab_size"] != model.config["vocab_size"]:
        raise ValueError(f"the reference has {reference.config['vocab_size']} tokens, the model {model.config['vocab_size']}")
    return run(model, Preference(model, reference, recipe), data, recipe, out, progress)


METRICS = ("loss", "ce", "kl", "error", "margin", "accuracy", "chosen", "rejected")


def run(model, goal, data, recipe, out=None, progress=None):
    """The loop behind distill, train and dpo. goal: the objective; recipe as load_recipe returns it."""
    with ranks().job(lost(out)):
        return _run(model, goal, data, recipe, out, progress if ranks().first else False)


def _run(model, goal, data, recipe, out, progress):
    stages, began = [settings(recipe, stage) for stage in recipe["stages"]], time.perf_counter()
    _check_layers(model, stages)
    ranks().share(model)

    def read():
        return (goal.read(data, "data", progress),
                goal.read(recipe["eval_data"], "eval_data", progress, shuffle=False) if recipe["eval_data"] is not None else None)
    data, held_out = ranks().in_turn(read)
    lengths = [stage["steps"] or math.ceil(stage["epochs"] * len(data) / (recipe["batch"] * recipe["accumulate"])) for stage in stages]
    folder = status = reference = None
    if out is not None:
        reference = goal.reference and goal.reference.fingerprint()
        folder = Folder(out, {**identity(recipe), "objective": type(goal).__name__, "data": data.fingerprint,
                              "eval_data": held_out and held_out.fingerprint, "teacher": reference, "student": _kept(model, stages)}, stages)
    for batches, name in ((data, "reference.npz"), (held_out, "reference_eval.npz")):
        if batches:
            goal.prepare(batches, folder and folder.path / name, reference)
    if folder:
        status = folder.restore(model)
    ranks().same(status, "reads another checkpoint than rank 0: out must be a folder that all ranks share")
    status = {"step": 0, "tokens": 0, "seconds": 0.0, "last": None, "ends": [], "guard": None, **(status or {})}
    guard = recipe["guard"]
    if guard and not status["guard"]:
        status["guard"] = {"before": _recall(model, guard)}
    if fell := _fell(status, guard):  # when it was stopped
        raise ValueError(fell)
    earlier, total, end = status["seconds"], sum(lengths), 0
    with _interruptible() as interrupted, tqdm(total=total, initial=status["step"], unit="step", dynamic_ncols=True,
                                               disable=None if progress is None else not progress) as bar:
        if not bar.disable:
            bar.write(f"{len(data):,} rows an epoch, {data.fill:.1%} filled with tokens", file=sys.stderr)
        for index, (stage, steps) in enumerate(zip(stages, lengths)):
            begin, end = end, end + steps
            if status["step"] >= end:
                continue
            if status["step"] == begin:
                _start(model, stage, data)
            objective = goal.stage(stage)
            objective.start(data, folder and folder.path / f"stage{index}.npz", fresh=status["step"] == begin)
            while status["step"] < end:
                step, tick = status["step"], time.perf_counter()
                lr = rate(stage, step - begin, steps)
                sums = _step(model, objective, data, stage, step, step - begin + 1, lr, interrupted)
                if sums is None:
                    if folder and status["last"]:
                        folder.save(model, status)
                    raise KeyboardInterrupt(f"stopped after step {step} of {total}" + (f"; the same call goes on from {out}" if out else ""))
                tokens = sums.pop("tokens")
                status["step"], status["tokens"] = step + 1, status["tokens"] + tokens
                record = {"step": step + 1, "stage": index, **sums, "lr": lr, "tokens": status["tokens"],
                          "tokens_per_second": tokens / (time.perf_counter() - tick)}
                if step + 1 == end:
                    record |= objective.finish(held_out or data)
                if held_out and ((step + 1) % recipe["eval_every"] == 0 or step + 1 == end):
                    record |= {f"eval_{key}": value for key, value in evaluate(objective, held_out.once).items()}
                if guard and ((step + 1) % recipe["eval_every"] == 0 or step + 1 == total):
                    status["guard"]["after"] = _recall(model, guard)
                    record["recall"] = status["guard"]["after"]["score"]
                record["seconds"] = status["seconds"] = earlier + time.perf_counter() - began
                status["last"] = record
                if step + 1 == end:
                    status["ends"].append(record)
                fell = _fell(status, guard)
                if folder:
                    folder.record(record)
                    if (step + 1) % recipe["checkpoint_every"] == 0 or step + 1 == total or fell:
                        folder.save(model, status)
                if fell:
                    raise ValueError(fell)
                bar.set_postfix({"loss": f"{record['loss']:.4f}", "tokens/s": f"{record['tokens_per_second']:.0f}"}, refresh=False)
                bar.update()
    report = _report(status, recipe, folder, data.fill)
    if folder:
        folder.finish(model, report)
    return report


def rate(recipe, step, steps):
    """Learning rate of step 0 … steps-1 of a stage: it climbs to lr over the first `warmup` of the steps, then follows `schedule`."""
    warm = recipe["warmup"] if recipe["warmup"] > 1 else round(recipe["warmup"] * steps)
    if step < warm:
        return recipe["lr"] * (step + 1) / warm
    gone = (step - warm) / (steps - warm)
    return recipe["lr"] * {"constant": 1.0, "linear": 1 - gone, "cosine": (1 + math.cos(math.pi * gone)) / 2}[recipe["schedule"]]


def _step(model, objective, data, recipe, step, adam_step, lr, interrupted):
    """One optimiser step; → its {"loss", metric…, "grad_norm", "tokens" (positions computed)}, or None when interrupted: then no parameter
    has changed."""
    size, rows = recipe["batch"], recipe["batch"] * recipe["accumulate"]
    mine = list(ranks().part(range(step * rows, (step + 1) * rows)))
    micro = [data.take(mine[i:i + size]) for i in range(0, len(mine), size)]
    total, sums = {}, {}
    for batch in micro:
        total = plus(total, objective.counts(batch))
    total = ranks().sum(total)
    model.zero_grad()
    for batch in micro:
        sums = plus(sums, share_of(objective, batch, total, backward=True))
        if interrupted():
            break
    sums = ranks().sum({**sums, "tokens": sum(batch[0].size for batch in micro), "stopped": interrupted()})
    if sums.pop("stopped"):
        return None
    ranks().reduce(model)
    norm = math.hypot(*ranks().every(model.grad_norm()))
    if not math.isfinite(norm) or not math.isfinite(sums["loss"]):
        raise ValueError(f"step {step + 1}: loss {sums['loss']:g} with gradient norm {norm:g}; a smaller lr or a longer warmup may help")
    clip = recipe["clip"]
    model.step(lr, betas=tuple(recipe["betas"]), weight_decay=recipe["weight_decay"], step=adam_step,
               scale=clip / norm if clip and norm > clip else 1.0, moments=recipe["moments"])
    ranks().gather(model)
    return {**sums, "grad_norm": norm}


def _recall(model, guard):
    """What recall returns, as JSON gives it back."""
    found = recall(model, **{key: value for key, value in guard.items() if key != "limit"}) if ranks().first else None
    return json.loads(json.dumps(ranks().every(found)[0]))


def _fell(status, guard):
    """None, or a sentence if recall fell too far when it was measured last."""
    fell = guard and "after" in status["guard"] and recall_guard(status["guard"]["before"], status["guard"]["after"], guard["limit"])
    return f"step {status['step']}: {fell}; a larger limit of guard lets the run go on" if fell else None


def _check_layers(model, stages):
    """Every stage names layers that the model has, and window and sinks as convert_layers will take them."""
    kinds, (windows, sinks) = model.layer_kinds, model.c.windows()
    for i, stage in enumerate(stages):
        for layer in stage["mamba_layers"] or []:
            if layer >= len(kinds):
                raise ValueError(f"recipe: stages[{i}]: mamba_layers has layer {layer}, and the model has layers 0 to {len(kinds) - 1}")
        fresh, mixer = [layer for layer in stage["mamba_layers"] or [] if kinds[layer] == "attention"], mixer_of(stage, kinds)
        if not fresh:
            continue
        try:
            seen = window_of(mixer, stage["window"], stage["sinks"], windows, sinks, "the window layers before it have")
        except ValueError as error:
            raise ValueError(f"recipe: stages[{i}]: {error}") from None
        sinks = seen[1] if mixer == "window" else sinks
        for layer in fresh:
            kinds[layer], windows[layer] = mixer, seen[0]


def _start(model, stage, data):
    """The start of a stage: conversions (calibrated ones on data), what learns, a fresh optimiser."""
    if stage["mamba_layers"] is not None:
        mamba = [i for i, kind in enumerate(model.layer_kinds) if kind != "attention"]
        more = sorted(set(mamba) - set(stage["mamba_layers"]))
        if more:
            raise ValueError(f"the student's layers {more} are Mamba already, and mamba_layers {stage['mamba_layers']} of its stage lacks them")
        fresh = [i for i in stage["mamba_layers"] if i not in mamba]
        if fresh:
            convert_layers(model, fresh, mixer_of(stage, model.layer_kinds), stage["init"], stage["seed"], data=data, window=stage["window"],
                           sinks=stage["sinks"])
    model.trainable(stage["train"], stage["gradients"])
    for name, (m, _, master) in ranks().moments(model, everywhere=True):
        zero = np.zeros(m.shape, DTYPES[stage["moments"]])
        model.set_moments(name, zero, zero, master)
    if ranks().size > 1:
        ranks().same(model.fingerprint(), "has other weights than rank 0 at the start of a stage: another processor, or another build")


def _report(status, recipe, folder, fill):
    last, held_out = status["last"], recipe["eval_data"]
    evaluated = {key[5:]: value for key, value in last.items() if key.startswith("eval_")}
    return {"steps": status["step"], **{key: last[key] for key in METRICS if key in last}, "eval": evaluated or None,
            "guard": status["guard"], "stages": status["ends"], "tokens": status["tokens"], "seconds": status["seconds"],
            "tokens_per_second": status["tokens"] / status["seconds"], "fill": fill,
            "recipe": {**recipe, "eval_data": f"{len(held_out)} rows"} if held_out and isinstance(held_out[0], dict) else recipe,
            "history": str(folder.metrics) if folder else None, "model": str(folder.model) if folder else None}


def _kept(model, stages):
    """Fingerprint of the weights that the run leaves as they are."""
    converted = {i for stage in stages for i in stage["mamba_layers"] or []}
    mixers = tuple(f"model.layers.{i}.{part}." for i in converted for part in ("self_attn", "mamba"))
    return model.fingerprint(name for name in model.names if not name.startswith(mixers) and not _trained(name, stages))


def _trained(name, stages):
    return any(fits(name, stage["train"]) for stage in stages)


class _Other(ValueError):
    """The folder's run or its student is another: no damage."""


class Folder:
    """A run's folder. identity: what the run's numbers depend on, by name; a run goes on only with the same. Of a job's ranks the first one
    writes, and all read.

    checkpoint.npz is replaced whole or not at all. It holds run.json (identity, status, layer kinds, module, threads, the arrays' names)
    and, as arrays, weight/NAME (as stored: float32 or bf16 bits in uint16) of the parameters that a stage trains or are Mamba's, and m/, v/
    (as stored), master/NAME, whole, whatever ranks held them. A run with other moments than the checkpoint's is another run, and refused."""

    def __init__(self, path, identity, stages):
        self.path, self.identity, self.stages = Path(path), json.loads(json.dumps(identity)), stages
        self.metrics, self.checkpoint = self.path / "metrics.jsonl", self.path / "checkpoint.npz"
        self.model, self.report = self.path / "model", self.path / "report.json"
        if ranks().first:
            with writing(self.path):
                self.path.mkdir(parents=True, exist_ok=True)
        ranks().same(self.identity, "has other data, another recipe or other models than rank 0")

    def restore(self, model):
        """Gives model the checkpoint's layers, weights and moments and cuts metrics.jsonl to its step; → its status, None without one."""
        status = None
        if self.checkpoint.exists():
            try:
                if not zipfile.is_zipfile(self.checkpoint):
                    raise zipfile.BadZipFile("it is no zip file, or cut short")
                with np.load(self.checkpoint) as file:
                    run = json.loads(file["run.json"])
                    self._same(run, model)
                    _restore(model, run, self.stages, file)
                    status = run["status"]
            except (_Other, Warning):
                raise
            except Exception as error:  # whatever zipfile, zlib, NumPy's header parser … raise for a damaged file
                raise ValueError(f"{self.checkpoint} is damaged ({said(error)}); without it the run begins again") from None
        if not ranks().first:
            return status
        step = status["step"] if status else 0
        lines = self.metrics.read_bytes().splitlines(keepends=True) if self.metrics.exists() else []
        with replacing(self.metrics) as file:
            file.writelines(line for line in lines if _step_of(line) <= step)
        return status

    def _same(self, run, model):
        for key in sorted({*run["identity"], *self.identity}):
            was, now = (values.get(key, DEFAULTS.get(key)) for values in (run["identity"], self.identity))
            if was != now:
                shown = key == "stages" or key in DEFAULTS and key != "eval_data"
                name = "reference ('start' is the model as it came: load it again)" if (key, self.identity["objective"]) == ("teacher", "Preference") else key
                what = f"began with {key} {was!r}, not {now!r}" if shown else f"began with another {name}"
                raise _Other(f"{self.path} holds a run that {what}; go on with the same, or name another folder")
        for key, now in _machine(model).items():
            was = run["machine"].get(key, 1)
            if was != now and ranks().first:
                warnings.warn(f"{self.path}: the checkpoint is of {key} {was} and this is {now}: the run goes on, but not to the same bits",
                              stacklevel=4)

    def save(self, model, status):
        """Writes the checkpoint. OSError: it could not be written; the one before is intact."""
        moments, arrays = ranks().moments(model), []
        if not ranks().first:
            return sum(1 for _ in moments)  # this rank's part goes to the first one
        with replacing(self.checkpoint) as file, zipfile.ZipFile(file, "w") as archive:
            def put(key, array):
                arrays.append(key)
                with archive.open(key + ".npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, np.ascontiguousarray(array), allow_pickle=False)
            for name in model.names:
                if ".mamba." in name or _trained(name, self.stages):
                    put(f"weight/{name}", model.raw(name))
            for name, values in moments:
                for part, array in zip(("m", "v", "master"), values):
                    if array is not None:
                        put(f"{part}/{name}", array)
            archive.writestr("run.json", json.dumps({
                "identity": self.identity, "status": status, "layer_kinds": model.layer_kinds, "windows": model.c.windows(),
                "machine": _machine(model), "arrays": arrays}))

    def record(self, record):
        if not ranks().first:
            return
        with writing(self.metrics), open(self.metrics, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def finish(self, model, report):
        """Writes model/, then report.json, unless an earlier call has."""
        if ranks().first and not self.report.exists():
            checkpoint.save(model, self.model)
            with replacing(self.report) as file:
                file.write(json.dumps(report, indent=1).encode())


def _step_of(line):
    """The step of a line of metrics.jsonl; infinity for one that was cut short."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf


def _machine(model):
    return {"module": model.module.__name__.rpartition(".")[2], "threads": model.module.workers(), "ranks": ranks().size}


def _restore(model, run, stages, file):
    """The checkpoint's layer kinds, weights and moments."""
    odd = sorted({*file.files} ^ {"run.json", *run["arrays"]})
    if odd:
        raise ValueError(f"the array {odd[0]} is missing or should not be there")
    have, kinds = model.layer_kinds, run["layer_kinds"]
    if len(have) != len(kinds) or any(a not in ("attention", b) for a, b in zip(have, kinds)):
        raise _Other(f"the student's layers are {have}, and the checkpoint's {kinds}: go on with the student that the run began with")
    windows, sinks = run["windows"]
    for kind, window in {*zip(kinds, windows)}:
        fresh = [i for i, (a, *b) in enumerate(zip(have, kinds, windows)) if a != kind and b == [kind, window]]
        if fresh:
            convert_layers(model, fresh, kind, "random", **({"window": window, "sinks": sinks} if kind == "window" else {}))
    stage = stages[run["status"]["last"]["stage"]]
    model.trainable(stage["train"], stage["gradients"])
    for key in file.files:
        part, _, name = key.partition("/")
        if part == "weight":
            array = file[key]
            if name not in model.names or array.dtype != model.raw(name).dtype or array.shape != model.raw(name).shape:
                raise _Other(f"the checkpoint's {name} is {array.dtype} {array.shape}, and the student has no such parameter")
            model.set(name, array)
    for key in file.files:
        part, _, name = key.partition("/")
        if part == "m":
            model.set_moments(name, file[key], file[f"v/{name}"], file[f"master/{name}"] if f"master/{name}" in file else None)


@contextmanager
def _interruptible():
    """Yields a function: has Ctrl-C been pressed? Only the first press is held back, and only where Python's own handler is set."""
    pressed = threading.Event()
    usual = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is signal.default_int_handler

    def press(*_):
        signal.signal(signal.SIGINT, signal.default_int_handler)
        pressed.set()
    if usual:
        signal.signal(signal.SIGINT, press)
    try:
        yield pressed.is_set
    finally:
        if usual:
            signal.signal(signal.SIGINT, signal.default_int_handler)
