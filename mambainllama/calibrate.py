"""Where a converted layer starts, from the teacher's statistics: init="calibrated".

On a sample of the data the teacher's input u of the layer is known, and what its attention makes of it. In closed form:
- z: the direction in which u is most nearly constant, the ridge regression of 1 on u, so that the gate silu(z) starts open, at 1;
- the decay of a head: log a = -log(1 + 1/d), the geometric window of d, the mean distance that the head looks back;
- Delta: 1 whatever the token, its projection 0; D: 0, since the state holds the token itself; the convolution: the identity;
- the scale of what comes out: the regression of the attention's output on the mixer's, of a channel (Mamba-2: its norm's weight) or of a
  head (Mamba-1: Delta, with a kept). What is copied from attention stays as it is.
For some steps of alignment on these parameters alone after that, a stage: {"align": "mixer", "train": ["*mamba.A_log", "*mamba.dt_*",
"*mamba.D", "*mamba.conv1d*", "*mamba.norm*"]}."""
import numpy as np

from . import ops
from .config import SCAN_STATE, architecture
from .data import START
from .parity import OPEN

RIDGE = 1e-3               # of u's mean square
TOKENS, LENGTH, AT_ONCE = 8192, 512, 2048  # of the sample; of a row of it; whose hidden states are held at a time


def sample(batches):
    """The beginnings of the rows of batches.once(), at most TOKENS tokens: [(ids, prev)], at most AT_ONCE each."""
    parts, left = [], TOKENS
    for ids, _, prev in batches.once():
        length = min(ids.shape[1], LENGTH)
        for row in range(0, len(ids), max(AT_ONCE // length, 1)):
            if left < length:
                return parts
            rows = slice(row, row + min(max(AT_ONCE // length, 1), left // length))
            parts.append((np.ascontiguousarray(ids[rows, :length]), np.ascontiguousarray(prev[rows, :length])))
            left -= parts[-1][0].size
    return parts


def calibrate(student, teacher, layers, parts):
    """Sets the parameters above in `layers` of student, as they were converted from attention with identity convolutions; teacher: the
    model whose layers they were; parts: sample(). Computes on the CPU but for the hidden states."""
    sizes, kinds = architecture(teacher.config, teacher.mamba_config), student.layer_kinds
    held = [teacher.hidden(ids, layers, prev=prev) for ids, prev in parts] if len(parts) * len(layers) <= 16 else None
    for i, layer in enumerate(layers):
        seen = [_attention(teacher, layer, sizes, held[j][i] if held else teacher.hidden(ids, [layer], prev=prev)[0], prev)
                for j, (ids, prev) in enumerate(parts)]
        mixer = {"mamba1": _Mamba1, "mamba2": _Mamba2}[kinds[layer]](student, f"model.layers.{layer}.mamba.", sizes)
        mixer.start(_constant(np.concatenate([u.reshape(-1, sizes["width"]) for u, *_ in seen])),
                    np.log1p(1 / np.maximum(np.mean([distance for *_, distance in seen], axis=0), 1e-3)))
        top = bottom = 0.0
        for (u, o, _), (_, prev) in zip(seen, parts):
            y = mixer.output(u, prev)
            top, bottom = top + (o * y).sum((0, 1), dtype=np.float64), bottom + (y * y).sum((0, 1), dtype=np.float64)
        mixer.scale(top, np.maximum(bottom, 1e-30))


def _constant(u):
    """r (C) with u r as near 1 as it can be."""
    u = u.astype(np.float64)
    second = u.T @ u / len(u)
    second[np.diag_indices(len(second))] += RIDGE * np.trace(second) / len(second)
    return np.linalg.solve(second, u.mean(0)).astype(np.float32)


def _attention(teacher, layer, sizes, h, prev):
    """Of the hidden state h (B,T,C): the mixer's input u, attention's output before o_proj (B,T,D), the mean distance looked back (H)."""
    prefix, (B, T, C), P = f"model.layers.{layer}.", h.shape, sizes["head_dim"]
    u = ops.rmsnorm_forward(x=h.reshape(-1, C), w=teacher.get(prefix + "input_layernorm.weight"), eps=sizes["eps"]).reshape(B, T, C)
    t = np.arange(T)
    start = np.maximum.accumulate(np.where(prev == START, t, 0), axis=1)  # of each token's document
    q, k, v = (_project(teacher, prefix + "self_attn.", name, sizes, u, (t - start).astype(np.int32)) for name in "qkv")
    o, lse = ops.attention_forward(q=q, k=k, v=v, window=sizes["window"][layer], prev=prev)
    unseen = (t > t[:, None]) | (t < start[:, :, None])
    if sizes["window"][layer]:
        unseen |= t <= t[:, None] - sizes["window"][layer]
    back, distance = t[:, None] - t, np.zeros(sizes["heads"])
    for head in range(sizes["heads"]):
        scores = q[:, :, head] @ k[:, :, head * sizes["kv_heads"] // sizes["heads"]].swapaxes(1, 2) / P**0.5 - lse[:, head, :, None]
        scores[unseen] = -np.inf
        distance[head] = (np.exp(scores) * back).sum(dtype=np.float64) / (B * T)
    return u, o.reshape(B, T, -1), distance


def _project(teacher, prefix, name, sizes, u, position):
    B, T, P = *u.shape[:2], sizes["head_dim"]
    y = u @ teacher.get(f"{prefix}{name}_proj.weight").T
    if sizes["qkv_bias"]:
        y += teacher.get(f"{prefix}{name}_proj.bias")
    if name == "v":
        return y.reshape(B, T, -1, P)
    if sizes["qk_norm"]:
        y = ops.rmsnorm_forward(x=y.reshape(-1, P), w=teacher.get(f"{prefix}{name}_norm.weight"), eps=sizes["eps"])
    return ops.rope_forward(x=y.reshape(B, T, -1, P), position=position, inv_freq=sizes["inv_freq"], scale=sizes["rope_scale"])


class _Mixer:
    """A converted layer's own parameters. D inner width, E that of x and B, H heads, P head dim."""

    def __init__(self, student, prefix, sizes):
        self.student, self.prefix, self.sizes = student, prefix, sizes
        self.D, self.E, self.H, self.P = sizes["inner"], sizes["kv_heads"] * sizes["head_dim"], sizes["heads"], sizes["head_dim"]

    def get(self, name):
        return self.student.get(self.prefix + name)

    def set(self, name, value):
        self.student.set(self.prefix + name, np.ascontiguousarray(value, np.float32))


class _Mamba1(_Mixer):
    def start(self, constant, rate):
        self.rate = np.repeat(rate, self.P)[:, None]  # a channel's -log a
        self.set("in_proj_z.weight", np.tile(OPEN * constant, (self.D, 1)))
        self.set("dt_proj.weight", np.zeros_like(self.get("dt_proj.weight")))
        self.set("D", np.zeros(self.D))
        self.delta(np.ones(self.D))

    def delta(self, value):
        """Delta of each channel, and A so that a stays."""
        self.set("dt_proj.bias", np.log(np.expm1(value)) / (2 if self.sizes["dt_bias_twice"] else 1))
        self.set("A_log", np.log(np.tile(self.rate / value[:, None], (1, SCAN_STATE))))

    def output(self, u, prev):
        x, z, B, C = (u @ self.get(f"{name}.weight").T for name in ("in_proj_x", "in_proj_z", "B_proj", "C_proj"))
        x = ops.conv1d_forward(x=x, w=self.get("conv1d.weight")[:, 0], bias=self.get("conv1d.bias"), block=SCAN_STATE, prev=prev)
        bias = self.get("dt_proj.bias")
        blocks = (*u.shape[:2], -1, SCAN_STATE)
        return ops.selective_scan_forward(x=x, dt=np.broadcast_to(bias * self.sizes["dt_bias_twice"], x.shape).copy(), A_log=self.get("A_log"),
                                          B=B.reshape(blocks), C=C.reshape(blocks), D=self.get("D"), dt_bias=bias, z=z, prev=prev)

    def scale(self, top, bottom):
        top, bottom = (a.reshape(self.H, self.P).sum(1) for a in (top, bottom))
        self.delta(np.repeat(np.clip(top / bottom, 1e-4, 20), self.P))


class _Mamba2(_Mixer):
    def start(self, constant, rate):
        weight = self.get("in_proj.weight")
        weight[:self.D], weight[2 * (self.D + self.E):] = OPEN * constant, 0
        self.set("in_proj.weight", weight)
        self.set("dt_bias", np.full(self.H, np.log(np.e - 1)))
        self.set("A_log", np.log(rate))
        self.set("D", np.zeros(self.H))
        self.set("norm.weight", np.ones(self.D))

    def output(self, u, prev):
        B, T, D, E = *u.shape[:2], self.D, self.E
        z, xbc, dt = np.split(u @ self.get("in_proj.weight").T, [D, 2 * (D + E)], axis=-1)
        xbc = ops.conv1d_forward(x=np.ascontiguousarray(xbc), w=self.get("conv1d.weight")[:, 0], bias=self.get("conv1d.bias"), prev=prev)
        x, b, c = (np.ascontiguousarray(part).reshape(B, T, -1, self.P) for part in np.split(xbc, [E, 2 * E], axis=-1))
        y = ops.ssd_forward(x=x, dt=np.ascontiguousarray(dt), A_log=self.get("A_log"), B=b, C=c, D=self.get("D"), dt_bias=self.get("dt_bias"), prev=prev)
        heads = (B * T, self.H, self.P)
        return ops.gated_rmsnorm_forward(x=y.reshape(heads), z=np.ascontiguousarray(z).reshape(heads), w=self.get("norm.weight").reshape(heads[1:]),
                                         eps=self.sizes["norm_eps"]).reshape(B, T, D)

    def scale(self, top, bottom):
        self.set("norm.weight", top / bottom)
