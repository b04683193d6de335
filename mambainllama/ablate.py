"""Is a mixer used? The loss with some of them off: a Mamba layer that may as well be absent has been bypassed by its neighbours."""
import numpy as np

from .config import MAMBAS
from .convert import convert
from .recipe import NO_TEACHER, load_recipe
from .objectives import LanguageModelling, evaluate

OUTPUT = {"attention": "self_attn.o_proj", "mamba1": "mamba.out_proj", "mamba2": "mamba.out_proj", "window": "self_attn.o_proj"}


def ablate(model, data, length=2048, batch=8):
    """Cross-entropy of data (data.py) per token that counts, by what is off:

    "whole"                                                 nothing
    "without_mamba", "without_attention", "without_window"  all mixers of that sort; None where the model has none
    "layers"                                                of each layer its mixer alone: a list, one number a layer

    A mixer is off when its output projection is zero; that is done to a copy that shares all else. ValueError: bad data."""
    recipe = load_recipe({"steps": 1, "length": length, "batch": batch}, **NO_TEACHER)
    batches = LanguageModelling(model, None, recipe).read(data, "data", shuffle=False)
    kinds = model.layer_kinds

    def loss(layers):
        return evaluate(LanguageModelling(_without(model, layers), None, recipe), batches.once)["ce"]

    def without(*sort):
        layers = [i for i, kind in enumerate(kinds) if kind in sort]
        return loss(layers) if layers else None
    return {"whole": loss([]), "without_mamba": without(*MAMBAS), "without_attention": without("attention"),
            "without_window": without("window"), "layers": [loss([i]) for i in range(len(kinds))]}


def _without(model, layers):
    other = convert(model, mamba_layers=[])
    for i in layers:
        name = f"model.layers.{i}.{OUTPUT.get(model.layer_kinds[i])}"
        for part in ("weight", "bias"):
            if f"{name}.{part}" in model.names:  # identity has none
                other.set(f"{name}.{part}", np.zeros(model.names[f"{name}.{part}"], np.float32))
    return other
