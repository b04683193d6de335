"""Attention layers become other mixers: which ones, and the copy of a teacher that shares everything it has not changed."""
import copy

import numpy as np

from .calibrate import LENGTH, calibrate, sample
from .config import LARGEST, MAMBAS, MIXERS, SINKS, WINDOW, architecture
from .data import Batches, read
from .model import need_model
from .parity import parity

FRACTIONS = (0.5, 0.25, 0.125, 0)
INITS = ("attention", "identity", "calibrated", "random")
CHECKED_TOKENS, CHECKED_WEIGHTS = 16, 1 << 25  # of the parity gate at conversion: as many copied weights as take a second or so


def kept_attention(layers, fraction):
    """The attention layers that stay when `fraction` of `layers` do: n = round(fraction·layers), floor((i+1)·layers/n) - 1."""
    n = round(fraction * layers)
    return [(i + 1) * layers // n - 1 for i in range(n)]


def replaced(kinds, fraction):
    """The attention layers that go when `fraction` of all layers keep it; kinds: a model's layer_kinds."""
    kept = kept_attention(len(kinds), fraction)
    return [layer for layer, kind in enumerate(kinds) if layer not in kept and kind == "attention"]


def _spread(n, total):
    """n numbers from 0 on below `total`, evenly spread."""
    return [(2 * i + 1) * total // (2 * n) for i in range(n)]


def _layers(values, total):
    layers = [values] if isinstance(values, (int, np.integer)) else list(values)
    for layer in layers:
        if isinstance(layer, bool) or not isinstance(layer, (int, np.integer)) or not 0 <= layer < total:
            raise ValueError(f"mamba_layers holds {layer!r}, expected layer numbers from 0 to {total - 1}")
    if len(set(layers)) != len(layers):
        raise ValueError("mamba_layers names a layer twice")
    return sorted(int(layer) for layer in layers)


def convert_layers(student, layers, mixer="mamba2", init="attention", seed=0, check=True, data=None, window=None, sinks=None):
    """Changes `student` in place: each of `layers`, attention now, becomes `mixer`: "mamba1", "mamba2", or what they are measured by:

    "window": the attention as it is, but a token sees only the last `window` tokens and its document's first `sinks` (Xiao et al. 2023);
    its memory is bounded. Defaults: those of the student's window layers, else 128 and 4; sinks are one number for all of a model's layers.
    "identity": nothing is added, and the layer keeps its MLP alone.

    init, of Mamba: "attention": x ← v, B ← k, C ← q, out ← o, byte for byte, the rest fresh; "identity": so too, but the convolution
    starts as the identity and leaves what was copied in step, k with q; "calibrated": identity, and decays, gates, Delta and scale from what
    attention does on `data`, Batches (calibrate.py); "random": all of the mixer fresh. The same seed gives the same bits.
    Norms and MLP stay. check: the conversion is first done on a copy, which has to pass `parity` (Mamba, and not init "random").
    ValueError, `student` untouched: not an attention layer, unknown mixer or init, Mamba-1 where head_dim does not divide into
    blocks of 16, a copy that fails, a window below 1, other sinks than the student has already, either for another mixer.
    """
    if mixer not in MIXERS:
        raise ValueError(f"mixer is {mixer!r}, expected one of {', '.join(map(repr, MIXERS))}")
    if init not in INITS:
        raise ValueError(f"init is {init!r}, expected one of {', '.join(map(repr, INITS))}")
    seen, mamba = window_of(mixer, window, sinks, *student.c.windows()), mixer in MAMBAS
    if mamba and init == "calibrated" and not isinstance(data, Batches):
        raise ValueError("init 'calibrated' needs data to calibrate on: rows of chats, text or ids")
    layers = _layers(layers, len(student.layer_kinds))
    for layer in layers:
        if student.layer_kinds[layer] != "attention":
            raise ValueError(f"layer {layer} is {student.layer_kinds[layer]} already, expected attention")
    sizes = architecture(student.config)
    if mixer == "mamba1" and layers and (width := sizes["kv_heads"] * sizes["head_dim"]) % 16:
        raise ValueError(f"Mamba-1 reads its input in blocks of 16 channels: kv heads x head_dim = {width} must be a multiple of 16")
    if mamba and check and layers and init != "random":
        _gate(student, layers, sizes, mixer, seed)
    before = _clone(student) if mamba and init == "calibrated" else None
    for layer in layers:
        student.c.convert(layer, mixer, init != "random", int(seed) & (2**64 - 1), *seen)
    student._names = None
    for layer in layers if mamba and init in ("identity", "calibrated") else ():
        conv = f"model.layers.{layer}.mamba.conv1d"
        weight = np.zeros(student.names[f"{conv}.weight"], np.float32)
        weight[..., -1] = 1
        student.set(f"{conv}.weight", weight)
        student.set(f"{conv}.bias", np.zeros(len(weight), np.float32))
    if before and layers:
        calibrate(student, before, layers, sample(data))


def restore_layers(student, layers, source):
    """Undoes conversions: the mixer of each of `layers` becomes the one that it is in `source`, shared until one of the two changes it.

    Norms and MLP stay the student's, as they do when a layer is converted. ValueError, `student` untouched: no such layer, a source
    of other sizes, dtype or backend."""
    for layer in _layers(layers, len(student.layer_kinds)):
        student.c.share_mixer(layer, source.c)
    student._names = None


def window_of(mixer, window, sinks, windows, own, others="the model has window layers with"):
    """(window, sinks) of a conversion, (0, 0) where the mixer has none. windows, own: the student's (0: no window layer) and its sinks, which
    others speaks of. ValueError as convert_layers."""
    if mixer != "window":
        if window is not None or sinks is not None:
            raise ValueError(f"window and sinks go with mixer 'window', not with {mixer!r}")
        return 0, 0
    have = any(windows)
    window = next(filter(None, windows), WINDOW) if window is None else window
    sinks = own if sinks is None and have else SINKS if sinks is None else sinks
    for name, value, low in (("window", window, 1), ("sinks", sinks, 0)):
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not low <= value <= LARGEST:
            raise ValueError(f"{name} is {value!r}, expected a number of tokens from {low} to {LARGEST}")
    if have and sinks != own:
        raise ValueError(f"sinks is {sinks}, and {others} {own}: all have the same")
    return int(window), int(sinks)


def convert(teacher, mamba_layers=None, mixer="mamba2", init="attention", seed=0, attention=None, check=True, data=None, window=None,
            sinks=None):
    """A student: `teacher` with some attention layers replaced; what is not replaced is shared until one of the two changes it.

    mamba_layers: the layers to replace, or attention=0.5 | 0.25 | 0.125 | 0: the share of layers that keep attention, placed
    as in the paper (kept_attention). data: for init "calibrated", as for distill. Other arguments and errors as convert_layers.
    """
    need_model(teacher, "convert: teacher")
    kinds = teacher.layer_kinds
    if (mamba_layers is None) == (attention is None):
        raise ValueError("give either mamba_layers or attention")
    if attention is not None:
        if isinstance(attention, bool) or not isinstance(attention, (int, float)) or not 0 <= attention <= 1:
            raise ValueError(f"attention is {attention!r}, expected a share of the layers such as {', '.join(map(str, FRACTIONS))}")
        mamba_layers = replaced(kinds, attention)
    student = _clone(teacher)
    if data is not None:
        data = Batches(read(data, teacher.tokenizer, teacher.config["vocab_size"]), LENGTH, 1, seed)
    convert_layers(student, mamba_layers, mixer, init, seed, check, data, window, sinks)
    return student


def _clone(model):
    clone = copy.copy(model)
    clone.c = model.c.clone()
    return clone


def _gate(teacher, layers, sizes, mixer, seed):
    """Converts `layers` of a copy (of a large model some of them, evenly spread) and puts them through parity."""
    copied = 2 * (sizes["heads"] + sizes["kv_heads"]) * sizes["head_dim"] * sizes["width"]
    some = [layers[i] for i in _spread(min(len(layers), max(1, CHECKED_WEIGHTS // copied)), len(layers))]
    trial = _clone(teacher)
    convert_layers(trial, some, mixer, seed=seed, check=False)
    parity(trial, teacher, np.array([_spread(CHECKED_TOKENS, sizes["vocab"])]), some)
