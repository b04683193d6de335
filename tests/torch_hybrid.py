"""A hybrid in torch float64, one token after the other, from formats.md's maths: what gradients are compared with."""
import math

import torch
import torch.nn.functional as F


def rmsnorm(x, w, eps):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * w


def rotate(x, inv_freq, scale, position):
    angle = torch.outer(position.double(), inv_freq.double())
    cos, sin = scale * torch.cos(angle), scale * torch.sin(angle)
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def attention(p, u, c):
    B, T, _ = u.shape
    H, G, P = c["heads"], c["kv_heads"], c["head_dim"]

    def heads(name, n):
        y = F.linear(u, p[f"self_attn.{name}_proj.weight"], p.get(f"self_attn.{name}_proj.bias")).view(B, T, n, P)
        if f"self_attn.{name}_norm.weight" in p:
            y = rmsnorm(y, p[f"self_attn.{name}_norm.weight"], c["eps"])
        y = y.transpose(1, 2)
        return rotate(y, c["inv_freq"], c["rope_scale"], torch.arange(T)) if name != "v" else y

    q, k, v = heads("q", H), heads("k", G).repeat_interleave(H // G, 1), heads("v", G).repeat_interleave(H // G, 1)
    scores = (q @ k.transpose(-1, -2)) * P**-0.5
    age = torch.arange(T)[:, None] - torch.arange(T)[None]
    far = (age >= c["window"]) & (torch.arange(T)[None] >= c["sinks"]) if c["window"] else torch.zeros_like(age, dtype=torch.bool)
    hidden = (age < 0) | far
    o = torch.softmax(scores.masked_fill(hidden, -torch.inf), -1) @ v
    return F.linear(o.transpose(1, 2).reshape(B, T, H * P), p["self_attn.o_proj.weight"], p.get("self_attn.o_proj.bias"))


def conv(x, w, b):
    y = F.conv1d(F.pad(x.transpose(1, 2), (w.shape[-1] - 1, 0)), w, b, groups=w.shape[0])
    return F.silu(y).transpose(1, 2)


def blocks(x, count, N):
    """(B,T,J·N) to (B,T,count·N): block j of the result is block j // (count/J)."""
    B, T, width = x.shape
    return x.view(B, T, width // N, N).repeat_interleave(count // (width // N), 2).reshape(B, T, count * N)


def mamba1(p, u, c):
    B, T, _ = u.shape
    D, N = c["heads"] * c["head_dim"], 16
    x, z, Bm, C = (F.linear(u, p[f"mamba.{name}.weight"]) for name in ("in_proj_x", "in_proj_z", "B_proj", "C_proj"))
    dt = F.linear(F.linear(u, p["mamba.dt_proj_down.weight"]), p["mamba.dt_proj.weight"], p["mamba.dt_proj.bias"])
    x = conv(blocks(x, D // N, N), p["mamba.conv1d.weight"], p["mamba.conv1d.bias"])
    Bm = blocks(Bm, D // N, N).view(B, T, D // N, 1, N).expand(B, T, D // N, N, N).reshape(B, T, D, N)
    C = C.view(B, T, D // N, 1, N).expand(B, T, D // N, N, N).reshape(B, T, D, N)
    d = F.softplus(dt + p["mamba.dt_proj.bias"])  # the bias a second time, as released
    A, S, y = -torch.exp(p["mamba.A_log"]), u.new_zeros(B, D, N), []
    for t in range(T):
        S = torch.exp(d[:, t, :, None] * A) * S + d[:, t, :, None] * Bm[:, t] * x[:, t, :, None]
        y.append((C[:, t] * S).sum(-1) + p["mamba.D"] * x[:, t])
    return F.linear(torch.stack(y, 1) * F.silu(z), p["mamba.out_proj.weight"])


def mamba2(p, u, c):
    B, T, _ = u.shape
    H, G, P = c["heads"], c["kv_heads"], c["head_dim"]
    D, E = H * P, G * P
    z, xbc, dt = F.linear(u, p["mamba.in_proj.weight"]).split([D, 2 * E + D, H], -1)
    x, Bm, C = conv(xbc, p["mamba.conv1d.weight"], p["mamba.conv1d.bias"]).split([E, E, D], -1)
    x, Bm = (v.reshape(B, T, G, P).repeat_interleave(H // G, 2) for v in (x, Bm))
    C = C.reshape(B, T, H, P)
    d = F.softplus(dt + p["mamba.dt_bias"])
    a, S, y = torch.exp(-d * torch.exp(p["mamba.A_log"])), u.new_zeros(B, H, P, P), []
    for t in range(T):
        S = a[:, t, :, None, None] * S + d[:, t, :, None, None] * x[:, t, :, :, None] * Bm[:, t, :, None, :]
        y.append((S @ C[:, t, :, :, None])[..., 0] + p["mamba.D"][:, None] * x[:, t])
    y = torch.stack(y, 1) * F.silu(z).view(B, T, H, P)
    y = rmsnorm(y, p["mamba.norm.weight"].view(H, P), c["norm_eps"])
    return F.linear(y.reshape(B, T, D), p["mamba.out_proj.weight"])


MIXERS = {"attention": attention, "mamba1": mamba1, "mamba2": mamba2, "window": attention, "identity": lambda p, u, c: 0 * u}


def logits(params, ids, arch):
    """params {checkpoint name: float64 tensor}, ids (B,T) → float64 (B,T,V)."""
    h = params["model.embed_tokens.weight"][ids]
    for i, kind in enumerate(arch["kinds"]):
        prefix = f"model.layers.{i}."
        p = {name[len(prefix):]: value for name, value in params.items() if name.startswith(prefix)}
        sees = {"window": arch["window"][i], "sinks": arch["sinks"] if kind == "window" else 0}
        h = h + MIXERS[kind](p, rmsnorm(h, p["input_layernorm.weight"], arch["eps"]), arch | sees)
        u = rmsnorm(h, p["post_attention_layernorm.weight"], arch["eps"])
        gate, up = (F.linear(u, p[f"mlp.{name}_proj.weight"], p.get(f"mlp.{name}_proj.bias")) for name in ("gate", "up"))
        h = h + F.linear(F.silu(gate) * up, p["mlp.down_proj.weight"], p.get("mlp.down_proj.bias"))
    h = rmsnorm(h, params["model.norm.weight"], arch["eps"])
    return F.linear(h, params.get("lm_head.weight", params["model.embed_tokens.weight"]))


def outcomes(log_p, ids):
    """Of the tokens ids (B,T,k) and of any other."""
    return torch.cat([log_p.gather(-1, ids), log_p.scatter(-1, ids, -math.inf).logsumexp(-1, keepdim=True)], -1)


def loss(z, targets, u=None, ce=1.0, kl=0.0, temperature=1.0, kind="forward", ids=None):
    """The same mean as Model.loss; z, u (B,T,V), targets (B,T), -100 = none. ids: those of a cached teacher."""
    mask = targets >= 0
    total = ce * F.cross_entropy(z[mask], targets[mask])
    if kl:
        s, t = torch.log_softmax(z / temperature, -1), torch.log_softmax(u / temperature, -1)
        if ids is not None:
            s, t = outcomes(s, ids), outcomes(t, ids)
        if kind == "reverse":
            s, t = t, s
        each = (t.exp() * (t - s)).sum(-1) * temperature**2
        if kind == "jensen-shannon":
            mean = torch.logaddexp(s, t) - math.log(2)
            each = (s.exp() * (s - mean) + t.exp() * (t - mean)).sum(-1) * temperature**2 / 2
        total = total + kl * (each.sum() / len(z) if kind == "paper" else each[mask].mean())
    return total
