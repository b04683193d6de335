"""The parity gate: with its own dynamics switched off, a converted layer is linear attention with the teacher's projections.

A converted layer's parameters go into a probe: a CPU model of one layer, in float32, that runs the product's own forward.
What is not copied from attention is set so that
- Delta is 1 (dt rows 0, softplus of the bias 1), nothing decays (A_log -100), D is 0, the convolution has one tap, +1 or -1;
- the gate is 1: the probe has one more channel, which holds a constant, and z reads that alone;
- the activation cancels: silu(a) - silu(-a) = a, so the sum of sign * output over the signs of the taps has none;
- norms are linear: their eps is so large that nothing else counts, and their weights take it back. The input is so small that
  it does not count beside what the layer adds to it; lm_head is the identity, the MLP 0.
"""
from itertools import product

import numpy as np

from . import backend
from .config import MAMBAS, SCAN_STATE, architecture
from .weights import widened

TOLERANCE = 1e-4
EPS, TINY = 2.0**80, 2.0**-60
OPEN = 1.2784645427610738  # silu(OPEN) = 1
SAME = ("width", "layers", "heads", "kv_heads", "head_dim", "vocab", "eps")


def parity(student, teacher, ids, layers=None):
    """{layer: error} of the layers that `student` has converted (default: all that are attention in `teacher` and Mamba in it).

    The error is ||a - b|| / ||b||. a: what the student's layer adds to its input with identity convolution, no activation, open
    gate, Delta = 1 and no decay. b: o_proj of the sum over s <= t of (q_t . k_s) v_s, in float64, heads of head_dim channels
    (Mamba-1: blocks of 16), K and V repeated as for attention. ValueError, naming the first such layer: an error above 1e-4.
    ids (batch, tokens): the embeddings of these tokens are every layer's input; two different tokens a row at least, better 16.
    Neither model changes.

    Its limits: it looks at what a conversion copies, so before any training, and at the CPU's forward in float32, wherever the
    models are. Mamba layers have no RoPE, no biases and no norm of q and k, so b has none either: how close student and teacher
    are it does not say. z, dt, A, D, the convolution and Mamba-2's norm are the probe's, not the student's.
    """
    sizes, other = architecture(student.config), architecture(teacher.config)
    for key in SAME:
        if sizes[key] != other[key]:
            raise ValueError(f"parity: {key} is {sizes[key]} in the student and {other[key]} in the teacher")
    ids = np.asarray(ids)
    if ids.ndim != 2 or ids.dtype.kind not in "iu" or not ids.size or ids.min() < 0 or ids.max() >= sizes["vocab"]:
        raise ValueError(f"parity: ids must be an array (batch, tokens) of numbers from 0 to {sizes['vocab'] - 1}")
    kinds = student.layer_kinds
    converted = [i for i, pair in enumerate(zip(kinds, teacher.layer_kinds)) if pair[0] in MAMBAS and pair[1] == "attention"]
    if layers is None:
        layers = converted
    elif other := [layer for layer in layers if layer not in converted]:
        raise ValueError(f"parity: layer {other[0]} is not one that is attention in the teacher and Mamba in the student")
    h = _rows(teacher, "model.embed_tokens.weight", ids)
    report, probes = {}, {}
    for layer in sorted(layers):
        kind, prefix = kinds[layer], f"model.layers.{layer}."
        if kind not in probes:
            probes[kind] = _Probe(sizes, kind, ids.shape)
        got = probes[kind](student, prefix, _normed(h, student, prefix, sizes["eps"]))
        expected = _linear_attention(teacher, prefix, _normed(h, teacher, prefix, sizes["eps"]),
                                     SCAN_STATE if kind == "mamba1" else sizes["head_dim"])
        difference, norm = np.linalg.norm(got - expected), np.linalg.norm(expected)
        report[layer] = float(difference / norm if norm else difference)
        if not report[layer] <= TOLERANCE:
            raise ValueError(f"parity: layer {layer} ({kind}) is not linear attention with the teacher's projections: "
                             f"error {report[layer]:.1e}, at most {TOLERANCE:.0e}")
    return report


def _rows(model, name, ids):
    """Rows of a matrix, float64."""
    rows = np.stack([model.c.raw(name, int(i), 1)[0] for i in ids.flat])
    if rows.dtype == np.uint16:
        rows = widened(rows)
    return rows.reshape(*ids.shape, -1).astype(np.float64)


def _normed(h, model, prefix, eps):
    return h / np.sqrt((h * h).mean(-1, keepdims=True) + eps) * model.get(prefix + "input_layernorm.weight")


def _linear_attention(teacher, prefix, u, block):
    """u (B,T,C) -> (B,T,C), heads of `block` channels, in float64."""
    q, k, v = (u @ teacher.get(f"{prefix}self_attn.{name}_proj.weight").T.astype(np.float64) for name in "qkv")
    batch, length, wide = q.shape
    q, k, v = (a.reshape(batch, length, -1, block).swapaxes(1, 2) for a in (q, k, v))  # (B,heads,T,block)
    repeat = q.shape[1] // k.shape[1]
    k, v = k.repeat(repeat, 1), v.repeat(repeat, 1)
    o = np.tril(q @ k.swapaxes(2, 3)) @ v
    return o.swapaxes(1, 2).reshape(batch, length, wide) @ teacher.get(prefix + "self_attn.o_proj.weight").T.astype(np.float64)


class _Probe:
    """A model of one layer of `kind`; from a student's layer and its normed input (B,T,C) it returns what the layer adds.

    Token i is row i of the embedding, whose last channel is the constant. What is not set here stays zero."""

    def __init__(self, sizes, kind, shape):
        self.shape, self.width = shape, sizes["width"]
        self.inner, self.xb = sizes["inner"], sizes["kv_heads"] * sizes["head_dim"]
        rows = max(self.width, shape[0] * shape[1])
        plain = dict.fromkeys(("tied", "qkv_bias", "o_bias", "mlp_bias", "qk_norm", "dt_bias_twice"), 0)
        arch = sizes | plain | {"vocab": rows, "width": self.width + 1, "layers": 1, "mlp": 1, "eps": EPS, "norm_eps": EPS,
                                "kinds": [kind], "window": [0]}
        self.c = backend.module("cpu").Model(arch, "float32")
        self.names = self.c.names()
        self.fill("model.layers.0.input_layernorm.weight", EPS**0.5 / TINY)
        self.fill("model.norm.weight", EPS**0.5)
        self.c.set("lm_head.weight", np.eye(rows, self.width + 1, dtype=np.float32))
        mamba = "model.layers.0.mamba."
        self.fill(mamba + "A_log", -100)
        self.fill(mamba + ("dt_proj.bias" if kind == "mamba1" else "dt_bias"), np.log(np.e - 1))
        if kind == "mamba2":
            self.fill(mamba + "norm.weight", EPS**0.5)
        x, B, C = slice(self.xb), slice(self.xb, 2 * self.xb), slice(2 * self.xb, None)
        self.convolved = [slice(None)] if kind == "mamba1" else [x, B, C]
        self.matrices = ["in_proj_x", "in_proj_z", "B_proj", "C_proj"] if kind == "mamba1" else ["in_proj"]

    def fill(self, name, value):
        self.c.set(name, np.full(self.names[name], value, np.float32))

    def __call__(self, student, prefix, u):
        for name in [*self.matrices, "out_proj"]:
            self.copy(student, prefix, f"mamba.{name}.weight")
        embedding = np.zeros(self.names["model.embed_tokens.weight"], np.float32)
        embedding[:u.shape[0] * u.shape[1], :-1] = TINY * u.reshape(-1, self.width)
        embedding[:, -1] = TINY
        self.c.set("model.embed_tokens.weight", embedding)
        ids = np.arange(u.shape[0] * u.shape[1], dtype=np.int32).reshape(self.shape)
        total = 0.0
        for signs in product((1, -1), repeat=len(self.convolved)):
            taps = np.zeros(self.names["model.layers.0.mamba.conv1d.weight"], np.float32)
            for part, sign in zip(self.convolved, signs):
                taps[part, 0, -1] = sign
            self.c.set("model.layers.0.mamba.conv1d.weight", taps)
            out = self.c.logits(ids, None, None, None, None, -1, False)[..., :self.width]
            total = total + np.prod(signs) * out.astype(np.float64)
        return total

    def copy(self, student, prefix, name):
        """A matrix of the student, with zeros for the constant channel; z reads that alone, dt nothing."""
        weight = np.zeros(self.names["model.layers.0." + name], np.float32)
        value = student.get(prefix + name)
        weight[:len(value), :value.shape[1]] = value
        if name == "mamba.in_proj_z.weight":
            weight[:, :-1], weight[:, -1] = 0, OPEN
        if name == "mamba.in_proj.weight":
            z, dt = slice(self.inner), slice(2 * (self.inner + self.xb), None)
            weight[dt] = 0
            weight[z, :-1], weight[z, -1] = 0, OPEN
        self.c.set("model.layers.0." + name, weight)
