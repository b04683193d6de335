"""Recipes: what a training run is told, from a dict or a YAML or JSON file, checked before anything is computed.

A recipe gives `steps` or `epochs` (one stage, no layer is converted), or `stages`, a list of mappings: `mamba_layers`, the layers that are
Mamba from the stage's start on (null: as they are; layers that are not Mamba yet are converted then); `steps`, how many optimiser steps
it lasts, or `epochs`, how often it goes through the data; and what it does otherwise than the recipe at large, of the keys in STAGE.
Everything else has a default, DEFAULTS. `load_recipe` returns every key, checked."""
import difflib
import json
import math
import numbers
import os

from .config import LARGEST, MIXERS
from .convert import INITS

DEFAULTS = {
    "length": 2048,           # tokens of a packed row
    "batch": 8,               # rows of a micro-batch
    "accumulate": 1,          # micro-batches of an optimiser step
    "lr": 1e-4,               # the largest learning rate of a stage
    "warmup": 0.05,           # share of a stage's steps over which the rate climbs from 0 to lr; above 1: so many steps
    "schedule": "cosine",     # then: "cosine" | "linear" (to 0 at the stage's end) | "constant"
    "betas": [0.9, 0.98],     # AdamW
    "weight_decay": 0.0,      # AdamW, decoupled
    "gradients": "float32",   # of bf16 matrices; or "bfloat16": half the memory, a micro-batch's sum rounded (Model.trainable)
    "moments": "float32",     # AdamW's; or "bfloat16": half the memory, rounded at random (Model.step)
    "clip": 1.0,              # largest norm of the whole gradient; null: not clipped
    "kl": 1.0,                # weight of KL to the teacher
    "ce": 0.1,                # weight of cross-entropy to the data
    "temperature": 1.0,       # of the KL
    "kl_kind": "forward",     # KL(teacher || student); or "reverse", "jensen-shannon"; or "paper": forward, summed over all positions, mean of rows
    "align": None,            # distil: learn the teacher's layers instead of its answers: "mixer" | "hidden" (align.py)
    "on_policy": False,       # align: each layer's input is what the student's own layers before it give, not the teacher's
    "preference": "sigmoid",  # dpo's loss; or "ipo"
    "beta": 0.1,              # dpo: how strongly the reference holds
    "label_smoothing": 0.0,   # dpo: share of pairs that are taken to be the wrong way round; below 0.5
    "prompt_length": None,    # dpo: tokens that stay of a prompt, its last ones, where a pair is longer than length; null: half of length
    "train": ["*"],           # parameters that learn: patterns as in a shell; "!PATTERN": these do not
    "recompute": False,       # keep only layer inputs and compute activations again in backward
    "seed": 0,                # order of the data, and what starts fresh at a conversion
    "checkpoint_every": 200,  # steps
    "eval_every": 200,        # steps
    "eval_data": None,        # held-out rows, or where they are, as data.py says
    "guard": None,            # train, sft, dpo: {"limit": 0.1, …} ends a run in which recall falls by more (recall.py; … its arguments)
    "mixer": None,            # "mamba1" | "mamba2" | "window" | "identity" of converted layers; null: the student's kind, or mamba2
    "window": None,           # of converted layers that are "window": the last tokens that are seen; null: as convert_layers says
    "sinks": None,            # of the same: the first tokens, seen as well
    "init": "attention",      # of converted layers: "attention" | "identity" | "calibrated" | "random", as convert_layers says
}

NO_TEACHER = {"kl": 0.0, "ce": 1.0}  # the defaults where there is none: train, sft, dpo
STAGE = ("lr", "warmup", "schedule", "betas", "weight_decay", "clip", "kl", "ce", "temperature", "kl_kind", "align", "on_policy", "train",
         "mixer", "window", "sinks", "init")  # what a stage may set for itself
GUARD = ("lengths", "depths", "items", "seed", "pairs", "filler", "batch")  # arguments of recall
MOST = 2**31 - 1  # tokens of a micro-batch


def load_recipe(recipe, **defaults):
    """The checked recipe as a new dict: every key of DEFAULTS, and `stages` in place of `steps` and `epochs`; a stage has "mamba_layers",
    "steps" and "epochs" (one of them None), "mixer", "init", and what it sets for itself (settings()). recipe: a dict, or the path of a
    YAML or JSON file. defaults replace those of DEFAULTS. Loading what it returned changes nothing. ValueError: unreadable file, unknown
    key, wrong type or range."""
    recipe, where = (recipe, "recipe") if isinstance(recipe, dict) else (read_recipe(recipe), str(recipe))
    if not isinstance(recipe, dict):
        raise ValueError(f"{where}: a recipe is a mapping of keys to values, not {type(recipe).__name__}")
    if "run" in recipe:
        raise ValueError(f"{where}: this recipe has parts, which `mambainllama run` (mil.run) takes; one training takes the settings of one part")
    known(where, recipe, [*DEFAULTS, "steps", "epochs", "stages"])
    lengths = [key for key in ("steps", "epochs", "stages") if key in recipe]
    if len(lengths) != 1:
        raise ValueError(f"{where}: give one of steps, epochs and stages, " + (f"not {' and '.join(lengths)}" if lengths else "and it has none"))
    given = {**DEFAULTS, **defaults, **{key: recipe[key] for key in recipe if key in DEFAULTS}}
    checked = {key: check(where, key, value) for key, value in given.items()}
    if checked["batch"] * checked["length"] > MOST:
        raise ValueError(f"{where}: batch * length must be at most {MOST} tokens, not {checked['batch']} * {checked['length']}")
    stages = recipe.get("stages", [{key: recipe[key] for key in lengths}])
    if not isinstance(stages, (list, tuple)) or not stages:
        raise ValueError(f"{where}: stages must be a list of at least one stage, not {stages!r}")
    checked["stages"] = [_stage(f"{where}: stages[{i}]" if "stages" in recipe else where, stage, checked)
                         for i, stage in enumerate(stages)]
    before = set()
    for i, stage in enumerate(checked["stages"]):
        now = before if stage["mamba_layers"] is None else set(stage["mamba_layers"])
        if not before <= now:
            raise ValueError(f"{where}: stages[{i}]: mamba_layers lacks layers {sorted(before - now)} of the stage before, "
                             "and a Mamba layer is never turned back")
        before = now
    return checked


def read_recipe(path):
    """The object that a YAML or JSON file holds."""
    if not isinstance(path, (str, os.PathLike)):
        raise ValueError(f"recipe: expected a dict or a path, not {type(path).__name__}")
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: the recipe cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if str(path).endswith(".json"):
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{error.lineno}: not JSON: {error.msg}") from None
    import yaml
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise ValueError(f"{path}{line}: not YAML: {getattr(error, 'problem', None) or error}") from None


def known(where, given, keys):
    """ValueError for a key of `given` that is none of `keys`, with the nearest that is."""
    for key in given:
        if key not in keys:
            near = difflib.get_close_matches(str(key).lower(), keys, 1, 0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"the keys are {', '.join(keys)}."
            raise ValueError(f"{where}: unknown key {key!r}; {hint}")


def settings(recipe, stage):
    """What holds in a stage: its own values over the recipe's."""
    return {**recipe, **stage}


def mixer_of(stage, kinds):
    """What a stage makes of the layers that it converts, in a model of these layer_kinds."""
    return stage["mixer"] or next((kind for kind in kinds if kind != "attention"), "mamba2")


def identity(recipe):
    """The recipe without what its run's numbers do not depend on: how far recall may fall."""
    return {**recipe, "guard": {**recipe["guard"], "limit": None}} if recipe.get("guard") else recipe


def _stage(where, stage, recipe):
    if not isinstance(stage, dict):
        raise ValueError(f"{where}: a stage is a mapping with mamba_layers and steps, not {stage!r}")
    known(where, stage, ["mamba_layers", "steps", "epochs", *STAGE])
    given = {"mamba_layers": None, "steps": None, "epochs": None, "mixer": recipe["mixer"], "init": recipe["init"], **stage}
    if (given["steps"] is None) == (given["epochs"] is None):
        raise ValueError(f"{where}: " + ("steps is missing" if given["steps"] is None else "give either steps or epochs, not both"))
    checked = {key: None if key in ("steps", "epochs") and value is None else check(where, key, value) for key, value in given.items()}
    now = settings(recipe, checked)
    if not now["align"] and now["kl"] == 0 and now["ce"] == 0:
        raise ValueError(f"{where}: kl and ce are both 0, so there is nothing to learn")
    if now["mixer"] not in (None, "window") and (now["window"], now["sinks"]) != (None, None):
        raise ValueError(f"{where}: window and sinks go with mixer 'window', not with {now['mixer']!r}")
    if now["on_policy"] and not now["align"]:
        raise ValueError(f"{where}: on_policy belongs to align, which is not asked for")
    return checked


def check(where, key, value):
    """The value of a key of RULES as it is kept. ValueError: it is none."""
    convert, must = RULES[key]
    try:
        return convert(value)
    except (TypeError, ValueError):
        raise ValueError(f"{where}: {key} must be {must}, not {value!r}") from None


def _need(condition):
    if not condition:
        raise ValueError


def _integer(low, high=2**63 - 1):
    def convert(value):
        _need(isinstance(value, numbers.Integral) and not isinstance(value, bool) and low <= value <= high)
        return int(value)
    return convert, f"an integer from {low} {'up' if high == 2**63 - 1 else f'to {high}'}"


def _number(low, high=math.inf, open_low=False, open_high=False):
    def convert(value):
        value = float(value) if isinstance(value, str) else value  # YAML 1.1 reads 1e-4 as a string
        _need(isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value))
        _need((value > low if open_low else value >= low) and (value < high if open_high else value <= high))
        return float(value)
    above = f"above {low}" if open_low else f"from {low} up"
    return convert, f"a number {above}" + (f" {'and below' if open_high else 'to'} {high}" if high < math.inf else "")


def _choice(*names):
    def convert(value):
        _need(value in names)
        return value
    return convert, " or ".join("null" if name is None else repr(name) for name in names)


def _optional(rule):
    return (lambda value: None if value is None else rule[0](value)), f"null or {rule[1]}"


def _layers(value):
    _need(isinstance(value, (list, tuple)))
    layers = sorted(_integer(0)[0](layer) for layer in value)
    _need(len(set(layers)) == len(layers))
    return layers


def _patterns(value):
    patterns = [value] if isinstance(value, str) else value
    _need(isinstance(patterns, (list, tuple)) and patterns and all(isinstance(p, str) for p in patterns))
    return list(patterns)


def _betas(value):
    _need(isinstance(value, (list, tuple)) and len(value) == 2)
    return [_number(0, 1, open_high=True)[0](beta) for beta in value]


def _warmup(value):
    value = _number(0)[0](value)
    _need(value <= 1 or value == int(value))
    return value


def _guard(value):
    _need(value is None or isinstance(value, dict) and set(value) <= {"limit", *GUARD})
    return None if value is None else {**value, "limit": _number(0, 1)[0](value.get("limit", 0.1))}


def _flag(value):
    _need(isinstance(value, bool))
    return value


def _data(value):
    _need(value is None or isinstance(value, (str, os.PathLike, list, tuple)))
    if isinstance(value, (list, tuple)):
        return [_data(item) if isinstance(item, os.PathLike) else item for item in value]
    return str(value) if isinstance(value, os.PathLike) else value


RULES = {  # key: (what converts a value or raises, what it must be)
    "length": _integer(1), "batch": _integer(1, 1 << 20), "accumulate": _integer(1, 1 << 20), "lr": _number(0),
    "warmup": (_warmup, "a share of the steps from 0 to 1, or a whole number of steps"),
    "schedule": _choice("cosine", "linear", "constant"), "betas": (_betas, "two numbers from 0 up and below 1"),
    "weight_decay": _number(0), "gradients": _choice("float32", "bfloat16"), "moments": _choice("float32", "bfloat16"),
    "clip": _optional(_number(0, open_low=True)), "kl": _number(0), "ce": _number(0),
    "temperature": _number(0, open_low=True), "kl_kind": _choice("forward", "reverse", "jensen-shannon", "paper"),
    "preference": _choice("sigmoid", "ipo"), "beta": _number(0, open_low=True), "label_smoothing": _number(0, 0.5, open_high=True),
    "prompt_length": _optional(_integer(1)),
    "train": (_patterns, "a list of name patterns"), "recompute": (_flag, "true or false"), "seed": _integer(0),
    "checkpoint_every": _integer(1), "eval_every": _integer(1), "eval_data": (_data, "null, a path, a list of paths or a list of rows"),
    "guard": (_guard, f"null or a mapping of limit, from 0 to 1, and of arguments of recall: {', '.join(GUARD)}"),
    "align": _choice(None, "mixer", "hidden"), "on_policy": (_flag, "true or false"),
    "mixer": _choice(None, *MIXERS), "window": _optional(_integer(1, LARGEST)), "sinks": _optional(_integer(0, LARGEST)),
    "init": _choice(*INITS), "steps": _integer(1), "epochs": _number(0, open_low=True),
    "mamba_layers": _optional((_layers, "a list of different layer numbers from 0 up")), "k": _integer(1),  # k: of a cache
}
