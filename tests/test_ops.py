"""Every op on every built backend against its float64 twin: values, gradients, decode properties, distributions."""
import numpy as np
import pytest
import reference as twin
from conftest import same
from reference import f64

# ---- cases: op, reason, sizes and options of its draw_<op> ------------------------------------------------------------------


def documents(r, B, T):
    """prev of packed documents: some tokens start one."""
    prev = np.tile(np.arange(T) - 1, (B, 1))
    prev[r.random((B, T)) < 0.15] = -2
    return prev


def tree(r, B, T):
    """Any parents: earlier tokens, the incoming state (-1)."""
    return np.array([[r.integers(-1, t) if t else -1 for t in range(T)] for _ in range(B)])


PARENTS = {"chain": lambda r, B, T: None, "documents": documents, "tree": tree}


def matrix(r, bf16, *shape):
    w = r.standard_normal(shape)
    return twin.float_to_bf16(w) if bf16 else w


def draw_linear(r, B, T, K, O, bias=True, bf16=False):
    return dict(x=r.standard_normal((B, T, K)), w=matrix(r, bf16, O, K), bias=r.standard_normal(O) if bias else None)


def draw_embedding(r, B, T, V, C, bf16=False):
    return dict(w=matrix(r, bf16, V, C), ids=r.integers(0, V, (B, T)))


def draw_rmsnorm(r, M, C, eps=1e-5):
    return dict(x=r.standard_normal((M, C)), w=r.standard_normal(C), eps=eps)


def draw_gated_rmsnorm(r, M, H, P, eps=1e-5):
    return dict(x=r.standard_normal((M, H, P)), z=r.standard_normal((M, H, P)), w=r.standard_normal((H, P)), eps=eps)


def draw_swiglu(r, M, F, spread=1):
    return dict(gate=spread * r.standard_normal((M, F)), up=r.standard_normal((M, F)))


def draw_rope(r, B, T, H, P, far=4096, scale=None):
    inv_freq = 10000.0 ** (-np.arange(P // 2) / max(P // 2, 1))
    return dict(x=r.standard_normal((B, T, H, P)), position=r.integers(0, far, (B, T)), inv_freq=inv_freq, scale=scale)


def past_cache(r, S, K, pos, *width, sinks=0):
    """A cache of K entries whose slots hold tokens before pos; what was never written is NaN."""
    cache = np.full((S, K, *width), np.nan)
    for s in range(S):
        for i in twin.kept(cache, pos[s], sinks):
            cache[s, twin.entry(cache, i, sinks)] = r.standard_normal(width)
    return cache


def draw_attention(r, B, T, H, G, P, window=None, sinks=None, scale=None, parents="chain", pos=None, K=0):
    args = dict(q=r.standard_normal((B, T, H, P)), k=r.standard_normal((B, T, G, P)), v=r.standard_normal((B, T, G, P)),
                window=window, sinks=sinks, scale=scale, prev=PARENTS[parents](r, B, T))
    if pos is not None:
        S = len(pos)
        caches = {name: past_cache(r, S, K, pos, G, P, sinks=sinks or 0) for name in ("kcache", "vcache")}
        args.update(caches, pos=np.array(pos), slot=r.permutation(S)[:B])
    return args


def draw_conv1d(r, B, T, X, W, repeat=1, block=None, bias=True, silu=None, parents="chain", pos=None, K=0):
    D = X * repeat
    args = dict(x=r.standard_normal((B, T, X)), w=r.standard_normal((D, W)), bias=r.standard_normal(D) if bias else None,
                silu=silu, block=block, prev=PARENTS[parents](r, B, T))
    if pos is not None:
        args.update(cache=past_cache(r, len(pos), K, pos, X), pos=np.array(pos), slot=r.permutation(len(pos))[:B])
    return args


def resume(r, B, T, S, *width):
    """An initial state in permuted slots, each row of which keeps some of its tokens."""
    return dict(state=r.standard_normal((S, *width)), slot=r.permutation(S)[:B], keep=r.integers(0, T + 1, B))


def draw_selective_scan(r, B, T, J, rep, N, bias=True, skip=True, gate=True, parents="chain", S=0, spread=1):
    D = J * rep * N
    args = dict(x=r.standard_normal((B, T, D)), dt=spread * r.standard_normal((B, T, D)) - 1,
                A_log=np.log(r.uniform(1, 16, (D, N))), B=r.standard_normal((B, T, J, N)),
                C=r.standard_normal((B, T, D // N, N)), D=r.standard_normal(D) if skip else None,
                dt_bias=r.standard_normal(D) if bias else None,
                z=r.standard_normal((B, T, D)) if gate else None, prev=PARENTS[parents](r, B, T))
    return args | (resume(r, B, T, S, D, N) if S else {})


def draw_ssd(r, B, T, H, G, P, N, bias=True, skip=True, parents="chain", S=0, spread=1):
    args = dict(x=r.standard_normal((B, T, G, P)), dt=spread * r.standard_normal((B, T, H)) - 1,
                A_log=np.log(r.uniform(1, 16, H)), B=r.standard_normal((B, T, G, N)), C=r.standard_normal((B, T, H, N)),
                D=r.standard_normal(H) if skip else None, dt_bias=r.standard_normal(H) if bias else None,
                prev=PARENTS[parents](r, B, T))
    return args | (resume(r, B, T, S, H, P, N) if S else {})


def draw_lm_loss(r, M, C, V, K=0, J=0, tail=True, temperature=None, kind=None, weights=False, ignore=0.3, bf16=False, spread=1):
    target = np.where(r.random(M) < ignore, -100, r.integers(0, V, M))
    args = dict(h=spread * r.standard_normal((M, C)), w=matrix(r, bf16, V, C), target=target,
                temperature=temperature, kind=kind)
    if K:
        args.update(th=r.standard_normal((M, K)), tw=matrix(r, bf16, V, K))
    if J:
        ids, log_probs, rest = twin.top_log_probs(spread * r.standard_normal((M, 8)), r.standard_normal((V, 8)), J, temperature or 1)
        if not tail:
            log_probs, rest = log_probs - np.log(-np.expm1(rest))[:, None], np.full(M, -np.inf)
        args.update(ids=ids, log_probs=log_probs, tail=rest)
    if weights:
        args.update(wce=r.standard_normal(M) * (r.random(M) < 0.7), wkl=r.uniform(0, 2, M) * (r.random(M) < 0.7) if K or J else None)
    return args


def draw_squared_error(r, M, C, spread=1):
    return dict(a=spread * r.standard_normal((M, C)), b=r.standard_normal((M, C)))


CASES = [
    ("linear", "one row, odd widths", dict(B=1, T=1, K=5, O=3)),
    ("linear", "two tokens, no bias", dict(B=1, T=2, K=64, O=33, bias=False)),
    ("linear", "a decode batch", dict(B=40, T=1, K=37, O=19)),
    ("linear", "the longest call of few tokens", dict(B=3, T=16, K=70, O=50)),
    ("linear", "the shortest call of many", dict(B=2, T=17, K=33, O=41)),
    ("linear", "prefill", dict(B=2, T=64, K=96, O=130)),
    ("linear", "odd everything", dict(B=1, T=129, K=131, O=67)),
    ("linear", "one input, one output", dict(B=2, T=7, K=1, O=1)),
    ("linear", "bf16 matrix, few tokens", dict(B=2, T=7, K=75, O=29, bf16=True)),
    ("linear", "bf16 matrix, many tokens", dict(B=1, T=64, K=40, O=53, bf16=True)),
    ("linear", "no tokens", dict(B=2, T=0, K=4, O=3)),
    ("embedding", "ids repeat", dict(B=2, T=64, V=11, C=7)),
    ("embedding", "one id", dict(B=1, T=1, V=3, C=65)),
    ("embedding", "bf16 matrix", dict(B=2, T=7, V=30, C=33, bf16=True)),
    ("rmsnorm", "one element", dict(M=1, C=1, eps=0.5)),
    ("rmsnorm", "odd width", dict(M=7, C=5)),
    ("rmsnorm", "many rows", dict(M=129, C=64)),
    ("rmsnorm", "tail after vectors, large eps", dict(M=3, C=257, eps=0.5)),
    ("rmsnorm", "a warp a row", dict(M=19, C=200)),
    ("rmsnorm", "a block a row", dict(M=9, C=2056)),
    ("rmsnorm", "more than registers keep", dict(M=2, C=8200)),
    ("gated_rmsnorm", "one head", dict(M=1, H=1, P=3)),
    ("gated_rmsnorm", "odd head", dict(M=7, H=3, P=17)),
    ("gated_rmsnorm", "many rows", dict(M=129, H=2, P=64)),
    ("gated_rmsnorm", "many heads", dict(M=5, H=35, P=40)),
    ("gated_rmsnorm", "wide heads", dict(M=3, H=2, P=1032)),
    ("swiglu", "odd size", dict(M=7, F=13)),
    ("swiglu", "long", dict(M=129, F=64)),
    ("swiglu", "exp overflows", dict(M=3, F=33, spread=100)),
    ("rope", "smallest head", dict(B=1, T=1, H=1, P=2)),
    ("rope", "odd half", dict(B=2, T=7, H=3, P=6)),
    ("rope", "usual head, scaled (yarn)", dict(B=1, T=64, H=4, P=64, scale=1.25)),
    ("rope", "far positions", dict(B=2, T=7, H=2, P=128, far=1000000)),
    ("attention", "one token", dict(B=1, T=1, H=1, G=1, P=4)),
    ("attention", "two tokens, two heads a group", dict(B=2, T=2, H=4, G=2, P=5)),
    ("attention", "three heads a group, odd head", dict(B=2, T=7, H=6, G=2, P=13)),
    ("attention", "eight heads a group", dict(B=1, T=64, H=8, G=1, P=32)),
    ("attention", "a group a head, tail after blocks", dict(B=1, T=129, H=3, G=3, P=64)),
    ("attention", "large head", dict(B=1, T=33, H=2, G=1, P=128)),
    ("attention", "larger odd head", dict(B=1, T=70, H=1, G=1, P=161)),
    ("attention", "a window of one", dict(B=2, T=7, H=2, G=1, P=8, window=1)),
    ("attention", "window shorter than the call", dict(B=1, T=129, H=4, G=2, P=16, window=20)),
    ("attention", "window longer than the call", dict(B=1, T=7, H=2, G=2, P=8, window=50)),
    ("attention", "documents", dict(B=3, T=64, H=4, G=2, P=16, parents="documents")),
    ("attention", "documents and window", dict(B=2, T=129, H=2, G=1, P=8, window=9, parents="documents")),
    ("attention", "scale given", dict(B=1, T=7, H=2, G=1, P=8, scale=0.7)),
    ("attention", "exp of the scores overflows", dict(B=1, T=64, H=2, G=1, P=16, scale=6.0)),
    ("attention", "decode, ragged pasts", dict(B=3, T=1, H=6, G=2, P=16, pos=[0, 7, 70, 33, 1], K=80)),
    ("attention", "verify", dict(B=2, T=5, H=8, G=1, P=20, pos=[40, 3, 60], K=70)),
    ("attention", "a tree after a past", dict(B=2, T=32, H=4, G=4, P=8, pos=[17, 0, 64], K=100, parents="tree")),
    ("attention", "window over the past, cache wrapped", dict(B=3, T=7, H=4, G=2, P=8, window=9, pos=[100, 4, 41, 0], K=41)),
    ("attention", "prefill after a past", dict(B=2, T=64, H=4, G=2, P=16, pos=[13, 40], K=104)),
    ("attention", "tiles of 128: two and a tail", dict(B=1, T=300, H=2, G=1, P=128)),
    ("attention", "tiles of 128: odd heads, documents", dict(B=2, T=260, H=3, G=3, P=104, parents="documents")),
    ("attention", "tiles of 128: a window", dict(B=1, T=400, H=2, G=1, P=64, window=130)),
    ("attention", "tiles of 128: prefill after a past", dict(B=2, T=200, H=2, G=1, P=128, pos=[70, 300], K=500)),
    ("attention", "tiles of 128: window over the past, cache wrapped", dict(B=2, T=150, H=2, G=1, P=64, window=160, pos=[190, 400],
                                                                       K=200)),
    ("attention", "prefill longer than a windowed cache", dict(B=2, T=129, H=2, G=1, P=8, window=5, pos=[50, 3], K=40)),
    ("attention", "sinks", dict(B=2, T=70, H=4, G=2, P=16, window=9, sinks=3)),
    ("attention", "sinks, more than there are tokens", dict(B=1, T=7, H=2, G=1, P=8, window=2, sinks=50)),
    ("attention", "sinks, more than a block", dict(B=1, T=200, H=2, G=1, P=8, window=20, sinks=70)),
    ("attention", "sinks of documents", dict(B=2, T=129, H=4, G=2, P=8, window=3, sinks=2, parents="documents")),
    ("attention", "sinks, larger head than tiles", dict(B=2, T=20, H=2, G=1, P=260, window=3, sinks=2, parents="documents")),
    ("attention", "sinks without a window are none", dict(B=1, T=40, H=2, G=1, P=8, sinks=4)),
    ("attention", "sinks, tiles of 128", dict(B=1, T=300, H=2, G=1, P=64, window=130, sinks=4)),
    ("attention", "sinks, decode, cache wrapped", dict(B=3, T=1, H=6, G=2, P=16, window=9, sinks=4, pos=[0, 11, 100, 46, 2], K=45)),
    ("attention", "sinks, a tree after a past", dict(B=2, T=32, H=4, G=4, P=8, window=5, sinks=20, pos=[17, 0, 64], K=57, parents="tree")),
    ("attention", "sinks, prefill after a past", dict(B=2, T=200, H=2, G=1, P=128, window=140, sinks=90, pos=[70, 290], K=270)),
    ("attention", "sinks, prefill longer than the cache", dict(B=2, T=129, H=2, G=1, P=8, window=5, sinks=4, pos=[50, 3], K=41)),
    ("conv1d", "one token, width one", dict(B=1, T=1, X=3, W=1)),
    ("conv1d", "shorter than the width", dict(B=2, T=2, X=5, W=4)),
    ("conv1d", "odd channels, no bias", dict(B=2, T=7, X=37, W=4, bias=False)),
    ("conv1d", "no SiLU", dict(B=1, T=64, X=16, W=3, silu=0)),
    ("conv1d", "long, wide", dict(B=2, T=129, X=70, W=4)),
    ("conv1d", "width 5", dict(B=1, T=64, X=9, W=5)),
    ("conv1d", "wider than the call", dict(B=1, T=7, X=9, W=12)),
    ("conv1d", "documents", dict(B=2, T=64, X=20, W=4, parents="documents")),
    ("conv1d", "blocks of 16 repeated (Mamba-1)", dict(B=2, T=7, X=32, W=4, repeat=4, block=16)),
    ("conv1d", "odd blocks repeated, documents", dict(B=2, T=64, X=9, W=4, repeat=3, block=3, parents="documents")),
    ("conv1d", "single channels repeated", dict(B=1, T=7, X=5, W=2, repeat=2)),
    ("conv1d", "decode, ragged pasts", dict(B=3, T=1, X=20, W=4, pos=[0, 1, 2, 40, 3], K=35)),
    ("conv1d", "a tree after a past", dict(B=2, T=32, X=8, W=4, repeat=2, block=4, pos=[2, 0, 64], K=35, parents="tree")),
    ("conv1d", "prefill longer than the cache", dict(B=2, T=129, X=8, W=4, pos=[2, 7, 0], K=36)),
    ("selective_scan", "one token, one state", dict(B=1, T=1, J=1, rep=1, N=1)),
    ("selective_scan", "two tokens, nothing optional", dict(B=2, T=2, J=2, rep=1, N=3, bias=False, skip=False, gate=False)),
    ("selective_scan", "grouped B, odd state", dict(B=2, T=7, J=2, rep=3, N=5)),
    ("selective_scan", "the released shape, small", dict(B=2, T=64, J=2, rep=4, N=16)),
    ("selective_scan", "tail after chunks", dict(B=1, T=129, J=3, rep=1, N=16, skip=False)),
    ("selective_scan", "documents", dict(B=2, T=64, J=1, rep=2, N=16, parents="documents")),
    ("selective_scan", "many documents, no gate", dict(B=3, T=129, J=2, rep=1, N=4, gate=False, parents="documents")),
    ("selective_scan", "strong and weak decay in turn", dict(B=1, T=129, J=1, rep=2, N=16, spread=10)),
    ("selective_scan", "large odd state", dict(B=1, T=7, J=1, rep=2, N=33)),
    ("selective_scan", "resumes, ragged keep", dict(B=3, T=7, J=2, rep=2, N=8, S=5)),
    ("selective_scan", "resumes long, documents", dict(B=2, T=129, J=1, rep=2, N=16, S=4, parents="documents")),
    ("ssd", "one token", dict(B=1, T=1, H=1, G=1, P=1, N=1)),
    ("ssd", "two tokens, nothing optional", dict(B=2, T=2, H=2, G=1, P=3, N=5, bias=False, skip=False)),
    ("ssd", "three heads a group, odd sizes", dict(B=2, T=7, H=6, G=2, P=5, N=7)),
    ("ssd", "eight heads a group", dict(B=1, T=64, H=8, G=1, P=16, N=16)),
    ("ssd", "tail after chunks", dict(B=1, T=129, H=2, G=2, P=33, N=17)),
    ("ssd", "the released head", dict(B=1, T=70, H=2, G=1, P=64, N=64)),
    ("ssd", "the head of 8B models", dict(B=1, T=70, H=2, G=1, P=128, N=128)),
    ("ssd", "documents", dict(B=2, T=64, H=4, G=2, P=8, N=8, parents="documents")),
    ("ssd", "documents across chunks", dict(B=2, T=129, H=2, G=1, P=6, N=10, parents="documents")),
    ("ssd", "strong and weak decay in turn", dict(B=1, T=129, H=4, G=2, P=8, N=8, spread=10)),
    ("ssd", "state larger than the head", dict(B=1, T=40, H=2, G=1, P=40, N=130)),
    ("ssd", "resumes, ragged keep", dict(B=3, T=7, H=4, G=2, P=8, N=9, S=5)),
    ("ssd", "resumes long, documents", dict(B=2, T=129, H=2, G=1, P=16, N=16, S=4, parents="documents")),
    ("lm_loss", "one row", dict(M=1, C=4, V=3, ignore=0)),
    ("lm_loss", "a vocabulary of one", dict(M=2, C=4, V=1)),
    ("lm_loss", "no teacher", dict(M=64, C=24, V=57)),
    ("lm_loss", "teacher of another width", dict(M=33, C=12, V=101, K=20)),
    ("lm_loss", "temperature", dict(M=40, C=16, V=50, K=8, temperature=2.5)),
    ("lm_loss", "reverse KL", dict(M=40, C=8, V=50, K=8, temperature=0.7, kind=1)),
    ("lm_loss", "Jensen-Shannon", dict(M=40, C=8, V=50, K=8, temperature=0.7, kind=2)),
    ("lm_loss", "Jensen-Shannon, weights", dict(M=33, C=16, V=77, K=8, kind=2, weights=True)),
    ("lm_loss", "weights, some of them 0", dict(M=64, C=8, V=30, K=6, weights=True)),
    ("lm_loss", "weights without a teacher (DPO)", dict(M=64, C=8, V=30, weights=True)),
    ("lm_loss", "bf16 matrices", dict(M=30, C=16, V=70, K=24, bf16=True)),
    ("lm_loss", "nothing counts", dict(M=5, C=8, V=30, K=6, ignore=1)),
    ("lm_loss", "exp of the logits overflows", dict(M=20, C=16, V=40, K=6, spread=20)),
    ("lm_loss", "rows in chunks, vocabulary in blocks", dict(M=200, C=16, V=1001, K=16)),
    ("lm_loss", "cached: one token of 50", dict(M=30, C=8, V=50, J=1)),
    ("lm_loss", "cached: temperature, weights", dict(M=40, C=16, V=50, J=7, temperature=2.5, weights=True)),
    ("lm_loss", "cached: reverse KL", dict(M=40, C=8, V=50, J=7, temperature=0.7, kind=1)),
    ("lm_loss", "cached: Jensen-Shannon", dict(M=40, C=8, V=50, J=7, temperature=1.7, kind=2)),
    ("lm_loss", "cached: the whole vocabulary", dict(M=20, C=8, V=33, J=33)),
    ("lm_loss", "cached: the whole vocabulary, reverse", dict(M=20, C=8, V=33, J=33, kind=1)),
    ("lm_loss", "cached: no tail, forward", dict(M=20, C=8, V=33, J=5, tail=False)),
    ("lm_loss", "cached: no tail, Jensen-Shannon", dict(M=20, C=8, V=33, J=5, tail=False, kind=2)),
    ("lm_loss", "cached: exp of the logits overflows", dict(M=20, C=16, V=40, J=6, spread=20)),
    ("lm_loss", "cached: the same, reverse", dict(M=20, C=16, V=40, J=6, spread=20, kind=1)),
    ("lm_loss", "cached: rows in chunks, bf16 matrices", dict(M=300, C=16, V=1001, J=32, bf16=True)),
    ("squared_error", "one element", dict(M=1, C=1)),
    ("squared_error", "odd width", dict(M=7, C=13)),
    ("squared_error", "vectors, many rows", dict(M=129, C=264, spread=30)),
]
SANITIZED = {  # the cases that also run under compute-sanitizer: a few a kernel, some with tails
    "linear": ("odd everything", "bf16 matrix, few tokens", "bf16 matrix, many tokens"), "embedding": ("bf16 matrix",),
    "rmsnorm": ("odd width", "many rows"), "gated_rmsnorm": ("odd head", "many rows"), "swiglu": ("odd size",), "rope": ("odd half",),
    "attention": ("three heads a group, odd head", "a group a head, tail after blocks", "window shorter than the call", "verify",
                  "a tree after a past", "prefill after a past", "sinks of documents", "sinks, a tree after a past"),
    "conv1d": ("odd channels, no bias", "long, wide", "blocks of 16 repeated (Mamba-1)", "a tree after a past"),
    "selective_scan": ("grouped B, odd state", "tail after chunks", "resumes, ragged keep"),
    "ssd": ("three heads a group, odd sizes", "the head of 8B models", "documents across chunks", "resumes, ragged keep"),
    "lm_loss": ("temperature", "bf16 matrices", "cached: temperature, weights"), "squared_error": ("odd width", "vectors, many rows")}
sanitize = pytest.mark.sanitize
OUTPUTS = {"attention": ("o", "lse", "kcache", "vcache"), "conv1d": ("y", "cache"), "selective_scan": ("y", "state"),
           "ssd": ("y", "state"), "lm_loss": ("ce", "kl")}


def named(cases):
    return [pytest.param(*case, id=f"{case[0]}: {case[1]}", marks=[sanitize] if case[1] in SANITIZED[case[0]] else []) for case in cases]


def arguments(backend, op, sizes):
    drawn = globals()[f"draw_{op}"](np.random.default_rng(1), **sizes)
    return backend.prepare(f"{op}_forward", {k: v for k, v in drawn.items() if v is not None})


def outputs(op, args):
    """The twin's results by name."""
    values = getattr(twin, op)(**args)
    return dict(zip(OUTPUTS.get(op, ("y",)), values if isinstance(values, tuple) else (values,)))


COMPUTED = {}  # what the twins give for a case, shared by the backends that see the same numbers


def computed(backend, key, compute):
    key = backend.bf16, *key
    if key not in COMPUTED:
        COMPUTED[key] = compute()
    return COMPUTED[key]


# ---- values -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op, reason, sizes", named(CASES))
def test_forward(backend, op, reason, sizes):
    args = arguments(backend, op, sizes)
    expected = computed(backend, ("forward", op, reason), lambda: outputs(op, args))
    got = backend.call(f"{op}_forward", args)
    for name, value in expected.items():
        if value is None:
            continue
        if "cache" in name:  # copied, never computed; never-written entries stay as they were
            assert np.array_equal(got[name], value, equal_nan=True), f"{name} after the call"
        else:
            backend.close(got[name], value, name)
        if name in args:
            others = np.setdiff1d(np.arange(len(value)), args["slot"])
            assert same(got[name][others], args[name][others]), f"{name}: a slot that is not in the batch changed"


@sanitize
@pytest.mark.parametrize("step, gscale", [(1, None), (2, 0.25), (1000, 1.0)])
def test_adamw(backend, step, gscale):
    r = np.random.default_rng(1)
    args = backend.prepare("adamw", dict(w=r.standard_normal(1037), m=0.1 * r.standard_normal(1037),
                                         v=0.1 * r.random(1037), grad=r.standard_normal(1037)))
    args |= dict(lr=0.3, b1=0.9, b2=0.98, eps=1e-8, decay=0.1, step=step, gscale=gscale)
    got = backend.call("adamw", args)
    for name, value in zip("wmv", twin.adamw(**args | {"gscale": 1.0 if gscale is None else gscale})):
        backend.close(got[name], value, name)


@sanitize
@pytest.mark.parametrize("n, first", [(1, 0), (6, 16), (4099, 0), (4099, 1 << 20)])
def test_adamw_with_bf16_moments(backend, n, first):
    """The twin's bits, but where float32 sums stand at the edge between two of them; w moves by the moments before they are rounded."""
    r = np.random.default_rng(1)
    args = backend.prepare("adamw", dict(w=r.standard_normal(n), m=twin.float_to_bf16(r.standard_normal(n)),
                                         v=twin.float_to_bf16(r.random(n)), grad=r.standard_normal(n)))
    args |= dict(lr=0.3, b1=0.9, b2=0.999, eps=1e-8, decay=0.1, step=7, key=3, first=first)
    got, (w, m, v) = backend.call("adamw", args), twin.adamw(**args)
    backend.close(got["w"], w, "w")
    assert (got["m"] != m).sum() <= n / 1000 and (got["v"] != v).sum() <= n / 1000
    assert np.abs(got["m"].astype(int) - m).max() <= 1 and np.abs(got["v"].astype(int) - v).max() <= 1


@sanitize
@pytest.mark.parametrize("n", [1, 4099])
@pytest.mark.parametrize("moments", ["f4", "u2"])
def test_adamw_with_a_bf16_gradient(backend, n, moments):
    """The bits of the same numbers in float32."""
    r = np.random.default_rng(1)
    bits = twin.float_to_bf16(r.standard_normal(n))
    args = dict(w=r.standard_normal(n).astype("f4"), m=np.zeros(n, moments), v=np.zeros(n, moments))
    how = dict(lr=0.3, b1=0.9, b2=0.999, eps=1e-8, decay=0.1, step=7, gscale=0.5, key=3)
    ours, theirs = ({key: value.copy() for key, value in args.items()} for _ in range(2))
    backend.module.adamw(**ours, grad=bits, **how)
    backend.module.adamw(**theirs, grad=twin.bf16_to_float(bits), **how)
    for key in args:
        assert np.array_equal(ours[key], theirs[key]), key
    assert backend.module.sum_squares(bits) == pytest.approx(twin.sum_squares(twin.bf16_to_float(bits)), rel=1e-12)


def test_bf16_moments_move_by_less_than_their_bits(backend):
    """v rises by 1/2000 a step, an eighth of what bf16 can tell apart at 1; its mean arrives all the same."""
    n, steps = 4096, 64
    args = dict(w=np.zeros(n, "f4"), m=np.zeros(n, "u2"), v=twin.float_to_bf16(np.ones(n)), grad=np.full(n, 1.5**0.5, "f4"))
    for step in range(1, steps + 1):
        backend.module.adamw(**args, lr=0.0, b1=0.9, b2=0.999, eps=1e-8, decay=0.0, step=step)
    expected = 1.5 - 0.5 * 0.999**steps
    assert twin.bf16_to_float(args["v"]).mean() == pytest.approx(expected, abs=1e-3) and len(set(args["v"])) > 3


@sanitize
@pytest.mark.parametrize("M, F", [(1, 1), (7, 13), (129, 64)])
def test_accumulate(backend, M, F):
    r = np.random.default_rng(1)
    args = backend.prepare("accumulate", dict(y=r.standard_normal((M, F)), x=r.standard_normal((M, F))))
    backend.close(backend.call("accumulate", args)["y"], twin.accumulate(**args), "y")


@sanitize
@pytest.mark.parametrize("n", [0, 1, 7, 100003])
def test_sum_squares(backend, n):
    g = np.random.default_rng(1).standard_normal(n).astype(np.float32)
    assert backend.module.sum_squares(g) == pytest.approx(twin.sum_squares(g), rel=1e-12)  # double


@sanitize
@pytest.mark.parametrize("dst, src", [(d, s) for d in ("float32", "bf16") for s in ("float32", "bf16")])
def test_transfer(backend, dst, src):
    r = np.random.default_rng(1)
    a, b = (matrix(r, kind == "bf16", 9, 13) for kind in (dst, src))
    args = {"dst": a if dst == "bf16" else a.astype("f4"), "src": b if src == "bf16" else b.astype("f4"), "to": 2, "from": 5,
            "count": 4}
    got = backend.call("transfer", args)["dst"]
    assert same(got, twin.transfer(args["dst"], args["src"], 2, 5, 4))


@sanitize
@pytest.mark.parametrize("M, C, V, J, scale, temperature", [
    (3, 4, 1, 1, 1, None), (7, 5, 33, 1, 1, 2.5), (40, 6, 50, 7, 1, 0.7), (9, 6, 50, 50, 1, None), (9, 6, 50, 49, 64, 0.5),
    (300, 4, 1001, 32, 4, None)])
def test_top_log_probs(backend, M, C, V, J, scale, temperature):
    """Whole numbers, so that logits are exact and many of them equal; large ones, so that what is left is far below the largest."""
    r = np.random.default_rng(1)
    given = dict(h=scale * r.integers(-3, 4, (M, C)), w=r.integers(-3, 4, (V, C)))
    given = backend.prepare("top_log_probs", given) | {"temperature": temperature}
    room = dict(ids=np.zeros((M, J), "i4"), log_probs=np.zeros((M, J), "f4"), tail=np.zeros(M, "f4"))
    got = backend.call("top_log_probs", room | given)
    ids, log_probs, tail = twin.top_log_probs(given["h"], given["w"], J, temperature or 1.0)
    assert same(got["ids"], ids)
    backend.close(got["log_probs"], log_probs, "log_probs")
    if J < V:
        backend.close(got["tail"], tail, "tail")
    else:
        assert (got["tail"] == -np.inf).all()


# ---- gradients --------------------------------------------------------------------------------------------------------------

WANTED = {"linear": ("x", "w", "bias"), "embedding": ("w",), "rmsnorm": ("x", "w"), "gated_rmsnorm": ("x", "z", "w"),
          "swiglu": ("gate", "up"), "rope": ("x",), "attention": ("q", "k", "v"), "conv1d": ("x", "w", "bias"),
          "selective_scan": ("x", "dt", "A_log", "B", "C", "D", "dt_bias", "z", "state"),
          "ssd": ("x", "dt", "A_log", "B", "C", "D", "dt_bias", "state"), "lm_loss": ("h", "w"), "squared_error": ("a",)}
# dA_log of a head sums T P N terms of both signs; where they nearly cancel, float32 autograd of the plain loop is off by 1e-5.
LOOSER = {"A_log": 10}
GRADIENT_CASES = [c for c in CASES if "pos" not in c[2] and c[2].get("T") != 0]


def objective(op, args, cotangent):
    """The scalar whose gradient the backward op computes."""
    values = outputs(op, args)
    if op == "lm_loss":
        wce, wkl = twin.loss_weights(args["target"], args.get("th", args.get("ids")), args.get("wce"), args.get("wkl"))
        return (wce * values["ce"] + wkl * values["kl"]).sum()
    total = (f64(cotangent["y"]) * values["o" if op == "attention" else "y"]).sum()
    return total + ((f64(cotangent["state"]) * values["state"]).sum() if "state" in cotangent else 0)


def differences(op, args, cotangent):
    """{argument: (directions, central differences of the twin along them)}: the unit vectors of a small argument, else three
    normal ones: the derivative's error along such a one has the gradient error's norm as its standard deviation."""
    out, r, step = {}, np.random.default_rng(2), 1e-5
    for name in WANTED[op]:
        if args.get(name) is None:
            continue
        value = f64(args[name])
        along = np.eye(value.size) if value.size <= 40 else r.standard_normal((3, value.size))
        slopes = [(objective(op, args | {name: value + step * d.reshape(value.shape)}, cotangent) -
                   objective(op, args | {name: value - step * d.reshape(value.shape)}, cotangent)) / (2 * step) for d in along]
        out[name] = along, np.array(slopes)
    return out


@pytest.mark.parametrize("op, reason, sizes", named(GRADIENT_CASES))
def test_backward(backend, op, reason, sizes):
    args = arguments(backend, op, sizes)
    r = np.random.default_rng(3)
    backward, spec = f"{op}_backward", {p.name: p for p in backend.parameters(f"{op}_backward")}
    cotangent = {}
    if op != "lm_loss":
        name = "do" if op == "attention" else "dy"
        first = backend.call(f"{op}_forward", args)
        shape = first["o" if op == "attention" else "y"].shape
        cotangent["y"] = backend.prepare(backward, {name: r.standard_normal(shape)})[name]
    if args.get("state") is not None:  # backward takes the state of row b, and a cotangent of the state after all T
        args = {k: v for k, v in args.items() if k not in ("slot", "keep")} | {"state": args["state"][: len(args["x"])].copy()}
        cotangent["state"] = r.standard_normal(args["state"].shape).astype("f4")
    given = {k: v for k, v in args.items() if k in spec}
    if op == "attention":
        given |= {"do": cotangent["y"], "o": first["o"], "lse": first["lse"]}
    elif op != "lm_loss":
        given["dy"] = cotangent["y"]
    given |= {"dstate": cotangent["state"]} if "state" in cotangent else {}
    sums = [n for n in WANTED[op] if args.get(n) is not None and n != "state" and f"d{n}" in spec and spec[f"d{n}"].in_place]

    got = backend.call(backward, given | {f"d{n}": np.zeros(args[n].shape, "f4") for n in sums})
    weight = np.sqrt(sum(np.square(c).sum() for c in cotangent.values())) if cotangent else 1
    for name, (along, slopes) in computed(backend, ("backward", op, reason), lambda: differences(op, args, cotangent)).items():
        gradient = got[f"d{name}"].astype(np.float64).ravel()
        assert np.isfinite(gradient).all(), f"d{name}: not finite"
        error = np.sqrt(np.square(along @ gradient - slopes).sum() / (1 if len(along) == len(gradient) else len(along)))
        size = np.linalg.norm(gradient)
        if np.linalg.norm(slopes) < 1e-7 * weight:  # 0 but for rounding
            size = weight
        assert error <= LOOSER.get(name, 1) * backend.tolerance * size, f"d{name}: error {error / size:.2e}"

    start = {f"d{n}": (r.standard_normal(args[n].shape) * np.abs(got[f"d{n}"]).mean()).astype("f4") for n in sums}
    added, frozen = backend.call(backward, given | start), backend.call(backward, given | {f"d{n}": None for n in sums}
                                                                         if op != "embedding" else given | start)
    for name, value in got.items():
        if name in start:
            backend.close(added[name], f64(value) + start[name], f"{name} added to a start")
        elif value is not None:
            assert same(added[name], value), f"{name} depends on the start of another gradient"
            backend.close(frozen[name], f64(value), f"{name} with the parameters frozen")


# ---- decode: a stateful op and its State, moved by hand ---------------------------------------------------------------------

TIMES = {"attention": ("q", "k", "v"), "conv1d": ("x",), "selective_scan": ("x", "dt", "B", "C", "z"),
         "ssd": ("x", "dt", "B", "C")}
STREAMS = [
    ("attention", "grouped", dict(H=6, G=2, P=20)),
    ("attention", "window", dict(H=4, G=4, P=16, window=9)),
    ("attention", "eight heads a group", dict(H=8, G=1, P=64)),
    ("attention", "window and sinks", dict(H=4, G=2, P=16, window=9, sinks=35)),
    ("conv1d", "plain", dict(X=21, W=4)),
    ("conv1d", "repeated blocks", dict(X=32, W=4, repeat=2, block=16)),
    ("selective_scan", "odd", dict(J=2, rep=2, N=5)),
    ("selective_scan", "the released shape, small", dict(J=2, rep=2, N=16)),
    ("ssd", "odd", dict(H=6, G=2, P=10, N=7)),
    ("ssd", "a group a head", dict(H=2, G=2, P=16, N=32)),
    ("ssd", "whole vectors, tiles in turn", dict(H=8, G=2, P=64, N=64)),
]
SLOTS, LENGTH = 3, 150
streams = pytest.mark.parametrize("op, reason, sizes", named(STREAMS))


class Stream:
    """SLOTS sequences of LENGTH tokens, and the memory of `op` for them: everything that was never written is NaN."""

    def __init__(self, backend, op, sizes):
        self.module, self.op = backend.module, op
        self.args = arguments(backend, op, dict(B=SLOTS, T=LENGTH) | sizes)
        self.tokens = {k: self.args.pop(k) for k in TIMES[op]}
        self.committed, self.seen = np.zeros(SLOTS, "i4"), np.zeros(SLOTS, "i4")
        if op == "attention":
            K = sizes.get("sinks", 0) + sizes["window"] + 32 if "window" in sizes else LENGTH
            self.memory = {c: self.empty(K, "k") for c in ("kcache", "vcache")}
        elif op == "conv1d":
            self.memory = {"cache": self.empty(sizes["W"] + 31, "x")}
        else:
            R = self.module.SCAN_RING if op == "selective_scan" else self.module.SSD_RING
            x, B = self.tokens["x"], self.tokens["B"]
            state = (x.shape[2], B.shape[3]) if op == "selective_scan" else (self.tokens["dt"].shape[2], x.shape[3], B.shape[3])
            self.memory = {"state": np.zeros((SLOTS, *state), "f4")}
            self.memory |= {f"ring_{k}": self.empty(R + 32, k) for k in ("x", "dt", "B")}

    def empty(self, rows, like):
        return np.full((SLOTS, rows, *self.tokens[like].shape[2:]), 0x7fff0000, "u4").view("f4")  # the NaN that bf16 keeps

    def copy(self):
        other = object.__new__(Stream)
        other.__dict__ |= self.__dict__ | {"memory": {k: v.copy() for k, v in self.memory.items()},
                                           "committed": self.committed.copy(), "seen": self.seen.copy()}
        return other

    def take(self, slot, at, T):
        """T tokens from at[b] on of every row; behind the sequence's end they are the first ones."""
        index = (np.asarray(at)[:, None] + np.arange(T)) % LENGTH
        return {k: np.ascontiguousarray(v[np.asarray(slot)[:, None], index]) for k, v in self.tokens.items()}

    def call(self, tokens, slot, keep=None, prev=None, ahead=0):
        """One call behind the committed tokens and `ahead` pending ones; keep None: all."""
        T, slot = next(iter(tokens.values())).shape[1], np.array(slot, "i4")
        keep = np.full(len(slot), T if keep is None else keep, "i4") if np.ndim(keep) == 0 else np.array(keep, "i4")
        pos = self.committed.copy()
        pos[slot] += ahead
        args = self.args | tokens | self.memory | {"slot": slot, "keep": keep, "pos": pos}
        if prev is not None:
            args["prev"] = np.ascontiguousarray(prev, "i4")
        if "state" in self.memory:
            args |= {"committed": self.committed, "seen": self.seen}
        before = {k: v.copy() for k, v in self.memory.items()}
        out = getattr(self.module, f"{self.op}_forward")(**args)
        others = np.setdiff1d(np.arange(SLOTS), slot)
        assert all(same(v[others], before[k][others]) for k, v in self.memory.items()), "a slot outside the batch changed"
        self.seen[slot] = self.committed[slot] if T <= self.module.PENDING else pos[slot] + keep
        moved = slot[(keep > 0) | (T > self.module.PENDING)]
        self.committed[moved] = (pos[slot] + keep)[np.isin(slot, moved)]
        return out[0] if self.op == "attention" else out

    def commit(self, slot, n):
        self.committed[slot] += np.array(n, "i4")

    def commit_path(self, slot, path):
        """Accepts a branch of slot's pending tokens: their entries move together."""
        at, to = self.committed[slot] + np.array(path), self.committed[slot] + np.arange(len(path))
        for name, memory in self.memory.items():
            if name != "state":
                a, b = ([twin.entry(memory, i, self.args.get("sinks", 0)) for i in where] for where in (to, at))
                memory[slot, a] = memory[slot, b].copy()
        self.committed[slot] += len(path)


def steps(stream, slot, n, sizes=(1,)):
    """n tokens a row in calls of the given sizes -> y (B,n,...)"""
    out, done = [], 0
    while done < n:
        T = min(sizes[len(out) % len(sizes)], n - done)
        out.append(stream.call(stream.take(slot, stream.committed[slot], T), slot))
        done += T
    return np.concatenate(out, 1)


def whole(backend, stream, op, reason):
    """The twin's one forward over the whole sequences."""
    args = stream.args | stream.tokens
    return computed(backend, ("stream", op, reason), lambda: next(iter(outputs(op, args).values())))


@streams
@pytest.mark.parametrize("prefill", [1, 31, 32, 33, 48, 100])
def test_prefill_and_steps_equal_one_forward(backend, op, reason, sizes, prefill):
    stream, slot = Stream(backend, op, sizes), [2, 0, 1]
    y = np.concatenate([steps(stream, slot, prefill, [prefill]), steps(stream, slot, 50)], 1)
    backend.close(y, whole(backend, stream, op, reason)[slot, : prefill + 50], "y")


@sanitize
@streams
def test_prefill_goes_on_from_pending_tokens(backend, op, reason, sizes):
    stream, slot = Stream(backend, op, sizes), [1, 2]
    y = [steps(stream, slot, 21), stream.call(stream.take(slot, [21, 21], 5), slot, keep=0)]
    y += [stream.call(stream.take(slot, [26, 26], 40), slot, ahead=5), steps(stream, slot, 37, [37]), steps(stream, slot, 20)]
    backend.close(np.concatenate(y, 1), whole(backend, stream, op, reason)[slot, :123], "y")


@streams
@pytest.mark.parametrize("T", [20, 40])
def test_documents_cannot_start_inside_a_state(backend, op, reason, sizes, T):
    stream, slot = Stream(backend, op, sizes), [2, 0, 1]
    prev = np.tile(np.arange(T) - 1, (SLOTS, 1))
    prev[1, 7] = -2
    with pytest.raises(ValueError, match="prev"):
        stream.call(stream.take(slot, [0] * 3, T), slot, prev=prev)


@streams
@pytest.mark.parametrize("keep", [[64, 40, 33], [64, 5, 0]])
def test_prompts_of_different_lengths_prefill_together(backend, op, reason, sizes, keep):
    stream, slot = Stream(backend, op, sizes), [1, 2, 0]
    expected = whole(backend, stream, op, reason)
    padded = stream.take(slot, [0, 0, 0], 64)
    garbage = stream.take([0, 0, 0], [70, 80, 90], 64)
    for k in padded:
        for b in range(SLOTS):
            padded[k][b, keep[b] :] = garbage[k][b, keep[b] :]
    y = stream.call(padded, slot, keep=keep)
    for b, s in enumerate(slot):
        if keep[b]:
            backend.close(y[b, : keep[b]], expected[s, : keep[b]], f"row {b}")
    y = steps(stream, slot, 20)
    for b, s in enumerate(slot):
        backend.close(y[b], expected[s, keep[b] : keep[b] + 20], f"row {b} after its prompt")


@streams
@pytest.mark.parametrize("start", [0, 21, 40], ids=["empty", "short prompt", "prefilled"])
def test_grouping_and_companions_leave_every_bit(backend, op, reason, sizes, start):
    slot, n = [1, 2, 0], 70
    begin = Stream(backend, op, sizes)
    if start:
        begin.call(begin.take([0, 1, 2], [0, 0, 0], start), [0, 1, 2])
    expected = steps(begin.copy(), slot, n)
    for calls in ([2], [5], [16], [32], [7, 1, 32, 3, 16, 17]):
        assert same(steps(begin.copy(), slot, n, calls), expected), f"calls of {calls} tokens"
    for b, s in enumerate(slot):
        assert same(steps(begin.copy(), [s], n, [3, 1])[0], expected[b]), f"slot {s} alone"
    backwards = steps(begin.copy(), slot[::-1], n, [4])
    assert same(backwards[::-1].copy(), expected), "rows in another order"


@streams
@pytest.mark.parametrize("draft", [2, 6, 17, 32])
def test_rejected_tokens_leave_no_trace(backend, op, reason, sizes, draft):
    """Rounds of `draft` uncommitted tokens, of which a ragged number is right and accepted, the rest garbage."""
    slot, n, r = [2, 1, 0], 60, np.random.default_rng(4)
    begin = Stream(backend, op, sizes)
    begin.call(begin.take(slot, [0, 0, 0], 11), slot)
    expected = steps(begin.copy(), slot, n)
    stream, got, done = begin.copy(), np.zeros_like(expected), np.zeros(SLOTS, int)
    for _ in range(500):
        accepted = np.minimum(r.integers(0, draft + 1, SLOTS), n - done)
        tokens, garbage = stream.take(slot, 11 + done, draft), stream.take(slot, r.integers(0, LENGTH, SLOTS), draft)
        for k in tokens:
            for b in range(SLOTS):
                tokens[k][b, accepted[b] :] = garbage[k][b, accepted[b] :]
        y = stream.call(tokens, slot, keep=0)
        for b in range(SLOTS):
            got[b, done[b] : done[b] + accepted[b]] = y[b, : accepted[b]]
        stream.commit(slot, accepted)
        done += accepted
        if (done == n).all():
            break
    assert same(got, expected)


@sanitize
@streams
def test_pending_tokens_are_extended(backend, op, reason, sizes):
    """A draft model's steps: nothing is committed, calls go on from the pending tokens; then some of them are accepted."""
    slot = [0, 2]
    begin = Stream(backend, op, sizes)
    begin.call(begin.take(slot, [0, 0], 29), slot)
    expected = steps(begin.copy(), slot, 40)
    stream, ahead, y = begin.copy(), 0, []
    for T in (4, 3, 1, 1, 1, 16, 5, 1):
        y.append(stream.call(stream.take(slot, [29 + ahead] * 2, T), slot, keep=0, ahead=ahead))
        ahead += T
    assert same(np.concatenate(y, 1), expected[:, :32])
    stream.commit(slot, [19, 19])
    assert same(steps(stream, slot, 21, [6]), expected[:, 19:])


@streams
def test_trees_equal_chains(backend, op, reason, sizes):
    slot, T = [1, 0], 24
    begin = Stream(backend, op, sizes)
    begin.call(begin.take(slot, [0, 0], 45), slot)
    begin.call(begin.take(slot, [45, 45], 3), slot, keep=2)
    tokens, prev = begin.take(slot, [60, 60], T), tree(np.random.default_rng(5), 2, T)
    prev[:, 9] = 8
    stream = begin.copy()
    y = stream.call(tokens, slot, keep=0, prev=prev)
    for b in range(2):
        for t in range(T):
            path = twin.path(prev[b], t)[0]
            chain = {k: np.ascontiguousarray(v[b : b + 1, path]) for k, v in tokens.items()}
            other = begin.copy()
            alone = other.call(chain, slot[b : b + 1], keep=0)
            assert same(y[b, t], alone[0, -1]), f"row {b}, token {t} of path {path}"
    b, t = 0, next(t for t in range(T)[::-1] if twin.path(prev[0], t)[1] and len(twin.path(prev[0], t)[0]) > 2)
    path = twin.path(prev[b], t)[0]
    stream.commit_path(slot[b], path)
    chain = begin.copy()
    chain.call({k: np.ascontiguousarray(v[b : b + 1, path]) for k, v in tokens.items()}, slot[:1])
    assert same(steps(stream, slot[:1], 20), steps(chain, slot[:1], 20)), "after accepting a branch"


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("K, O", [(64, 64), (131, 67), (300, 5), (1304, 24), (72, 600)])
def test_linear_of_few_tokens_is_row_invariant(backend, K, O, bf16):
    r = np.random.default_rng(1)
    args = backend.prepare("linear_forward", draw_linear(r, 7, 16, K, O, bf16=bf16))
    x, rest = args.pop("x"), args
    expected = backend.module.linear_forward(x, **rest).reshape(-1, O)
    rows = x.reshape(-1, K)
    for B, T in ((1, 1), (112, 1), (37, 3), (1, 16), (5, 2), (2, 13)):
        part = np.ascontiguousarray(rows[: B * T].reshape(B, T, K))
        assert same(backend.module.linear_forward(part, **rest).reshape(-1, O), expected[: B * T]), f"B {B}, T {T}"


def draw_products(r, B, T, K, O, norm, bf16):
    return dict(x=r.standard_normal((B, T, K)), norm=r.standard_normal(K) if norm else None, eps=0.1, w=matrix(r, bf16, O, K),
                bias=r.standard_normal(O), w2=matrix(r, bf16, O + 9, K), bias2=None)


# K and O: one kernel or another, ends that are no whole unit or tile, several units a part, several tiles
PRODUCTS = pytest.mark.parametrize("K, O", [(64, 16), (131, 67), (1096, 40), (8, 3), (520, 136)])


@PRODUCTS
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("B, T", [(1, 1), pytest.param(2, 5, marks=sanitize), (1, 16), (20, 1), (5, 13), (1, 17)])
def test_linears_equal_one_by_one(backend, B, T, K, O, norm, bf16):
    r = np.random.default_rng(1)
    args = backend.prepare("linears_forward", draw_products(r, B, T, K, O, norm, bf16))
    start = backend.prepare("linears_forward", dict(y=r.standard_normal((B, T, O)), y2=r.standard_normal((B, T, O + 9))))
    u = args["x"] if not norm else twin.rmsnorm(args["x"], args["norm"], 0.1)
    expected = dict(y=twin.linear(u, args["w"], args["bias"]), y2=twin.linear(u, args["w2"]))
    for add in (0, 1):
        got = backend.call("linears_forward", args | start | {"add": add})
        for name, value in expected.items():
            backend.close(got[name], value + add * f64(start[name]), f"{name}, add {add}")
    args = dict(x=args["x"], norm=args["norm"], eps=0.1, gate=args["w"], up=args["w2"][:O].copy(), bias=args["bias"],
                bias2=args["bias"])
    expected = twin.swiglu(twin.linear(u, args["gate"], args["bias"]), twin.linear(u, args["up"], args["bias2"]))
    backend.close(backend.call("swiglu_linear_forward", args)["y"], expected, "swiglu")


@PRODUCTS
@pytest.mark.parametrize("bf16", [False, True])
def test_linears_of_few_tokens_are_row_invariant(backend, K, O, bf16):
    r = np.random.default_rng(1)
    args = backend.prepare("linears_forward", draw_products(r, 7, 16, K, O, True, bf16))
    rows, gated = args.pop("x").reshape(-1, K), dict(gate=args["w"], up=args["w2"][:O].copy(), bias=args["bias"])

    def outputs(B, T):
        x = np.ascontiguousarray(rows[: B * T].reshape(B, T, K))
        y, y2 = np.zeros((B, T, O), "f4"), np.zeros((B, T, O + 9), "f4")
        backend.module.linears_forward(y=y, y2=y2, x=x, **args)
        act = backend.module.swiglu_linear_forward(x=x, norm=args["norm"], eps=0.1, **gated)
        return [a.reshape(B * T, -1) for a in (y, y2, act)]

    expected = outputs(7, 16)
    for B, T in ((1, 1), (112, 1), (37, 3), (1, 16), (5, 2), (2, 13), (11, 5)):
        for got, value in zip(outputs(B, T), expected):
            assert same(got, value[: B * T].copy()), f"B {B}, T {T}"


@sanitize
@pytest.mark.parametrize("M, V, C", [(600, 7, 5), (90, 4, 2100), (90, 4, 2104), (2100, 30, 8)])
def test_embedding_gradient_adds_in_order(backend, M, V, C):
    r = np.random.default_rng(1)
    ids, dw = r.integers(0, V, (1, M)).astype("i4"), r.standard_normal((V, C)).astype("f4")
    args = backend.prepare("embedding_backward", dict(dy=r.standard_normal((1, M, C)))) | dict(ids=ids, dw=dw)
    got = backend.call("embedding_backward", args)["dw"]
    for m in range(M):
        dw[ids[0, m]] += args["dy"][0, m]
    assert same(got, dw)


@pytest.mark.parametrize("op, sizes, by_row", [
    ("rmsnorm", dict(M=9, C=37), ("x",)), ("gated_rmsnorm", dict(M=9, H=3, P=21), ("x", "z")),
    ("swiglu", dict(M=9, F=37), ("gate", "up")), ("rope", dict(B=9, T=1, H=3, P=14), ("x", "position"))])
def test_pointwise_ops_are_row_invariant(backend, op, sizes, by_row):
    args, call = arguments(backend, op, sizes), getattr(backend.module, f"{op}_forward")
    expected = call(**args)
    for begin, end in ((0, 1), (4, 5), (2, 9), (3, 6)):
        part = args | {k: args[k][begin:end].copy() for k in by_row}
        assert same(call(**part), expected[begin:end].copy()), f"rows {begin}:{end}"


# ---- sampling ---------------------------------------------------------------------------------------------------------------


def philox_uniform(backend, n, use):
    index = np.arange(n, dtype=np.int32)
    return backend.module.uniform(index, *(np.full(n, v, np.int32) for v in (5, use, 7, 0)))


def each(B, **values):
    return {k: np.full(B, v, np.int32 if k == "top_k" else np.float32) for k, v in values.items()}


def fits(counts, p):
    """Chi-square at about 1 in 10,000, over the bins that expect something; the others must be empty."""
    counts, p = np.asarray(counts, np.float64), np.asarray(p)
    assert counts[p == 0].sum() == 0, "drawn where the probability is 0"
    n, counts, p = counts.sum(), counts[p > 0], p[p > 0]
    freedom = max(len(p) - 1, 1)
    chi = (np.square(counts - n * p) / (n * p)).sum()
    assert chi < freedom + 3.9 * np.sqrt(2 * freedom) + 10, f"chi-square {chi:.1f} with {freedom} degrees of freedom"


FILTERS = [dict(temperature=1, top_k=0, top_p=1, min_p=0), dict(temperature=0.6, top_k=5, top_p=1, min_p=0),
           dict(temperature=1.5, top_k=0, top_p=0.7, min_p=0), dict(temperature=1, top_k=0, top_p=1, min_p=0.15),
           dict(temperature=0.9, top_k=9, top_p=0.8, min_p=0.1), dict(temperature=0, top_k=3, top_p=0.5, min_p=0),
           dict(temperature=1, top_k=1, top_p=1, min_p=0), dict(temperature=1, top_k=0, top_p=0, min_p=0),
           dict(temperature=2, top_k=100, top_p=1, min_p=1)]


def test_uniform_is_philox(backend):
    r = np.random.default_rng(1)
    at = [r.integers(0, 2**30, 50).astype(np.int32) for _ in range(3)]
    at += list(np.array([0, 7, 2**32 + 5, 2**53 + 1, 2**63 - 1] * 10).view(np.int32).reshape(50, 2).T.copy())  # seeds, a word each
    u = backend.module.uniform(*at)
    assert (0 <= u).all() and (u < 1).all()
    assert np.abs(u - twin.uniform(*at)).max() <= 2**-23
    fits(np.bincount((philox_uniform(backend, 20000, 0) * 64).astype(int), minlength=64), np.full(64, 1 / 64))


def filtered(*shapes):
    """Every filter with every shape; all of them together on the first shape are sanitized."""
    cases = [(how, *shape) for how in FILTERS for shape in shapes]
    return [pytest.param(*case, id=str(case), marks=[sanitize] if case == (FILTERS[4], *shapes[0]) else []) for case in cases]


@pytest.mark.parametrize("how, V", filtered((12,), (1,), (1001,)))
def test_sample_equals_its_twin(backend, how, V):
    r = np.random.default_rng(V)
    args = dict(logits=r.standard_normal((200, V)).astype("f4") * 2, **each(200, **how), u=r.random(200).astype("f4"))
    assert same(backend.call("sample", args)["token"], twin.sample(**args))


@pytest.mark.parametrize("how", FILTERS, ids=str)
@pytest.mark.parametrize("B", [3, 33])  # alone and beside others: the same tokens, however many blocks share a row
@pytest.mark.parametrize("step", [0, 0.5], ids=["distinct", "many ties"])
def test_sample_of_a_large_vocabulary(backend, how, B, step):
    r = np.random.default_rng(1)
    logits, u = r.standard_normal((3, 9001)).astype("f4") * 2, r.random(3).astype("f4")
    if step:
        logits = (np.round(logits / step) * step).astype("f4")
    logits[1, 5000:] = -np.inf
    how = {k: v * 100 if k == "top_k" else v for k, v in how.items()}
    rows = np.arange(B) % 3
    token = backend.module.sample(logits=logits[rows], **each(B, **how), u=u[rows])
    assert same(token, twin.sample(logits, **each(3, **how), u=u)[rows])


def test_sample_ties_and_edges(backend):
    logits = np.array([[1, 3, 3, 3], [3, 3, 1, 3], [-np.inf, 0, -np.inf, 0], [0, 0, 0, 0]], np.float32)
    sample = lambda u, **how: backend.module.sample(logits=logits, **each(4, **how), u=np.full(4, u, "f4")).tolist()
    plain = dict(temperature=1, top_k=0, top_p=1, min_p=0)
    assert sample(0.5, **plain | {"temperature": 0}) == [1, 0, 1, 0], "the first largest"
    assert sample(0.999, **plain | {"top_k": 2}) == [2, 1, 3, 1], "the lower index first"
    assert sample(0.0, **plain) == [0, 0, 1, 0], "u = 0 never draws what has no mass"
    assert sample(np.nextafter(np.float32(1), np.float32(0)), **plain) == [3, 3, 3, 3]


@pytest.mark.parametrize("how", FILTERS, ids=str)
def test_sample_draws_its_distribution(backend, how):
    n, V = 8000, 17
    z = np.random.default_rng(1).standard_normal(V).astype("f4") * 2
    token = backend.module.sample(logits=np.tile(z, (n, 1)), **each(n, **how), u=philox_uniform(backend, n, 0))
    fits(np.bincount(token, minlength=V), twin.distribution(z, *how.values()))


def speculation(B, K, V, how, seed, mix=0.5):
    """Targets, drafts near them, and draft tokens drawn from the drafts' own distributions."""
    r = np.random.default_rng(seed)
    logits = 2 * r.standard_normal((B, K + 1, V)).astype("f4")
    draft_logits = (logits[:, :K] + mix * r.standard_normal((B, K, V))).astype("f4")
    draft = np.array([[twin.draw(twin.distribution(draft_logits[b, i], *how.values()), r.random()) for i in range(K)]
                      for b in range(B)], np.int32).reshape(B, K)
    return dict(logits=logits, draft=draft, draft_logits=draft_logits, **each(B, **how), u_accept=r.random((B, K)).astype("f4"),
                u_sample=r.random((B, K + 1)).astype("f4"))


@pytest.mark.parametrize("how, K, V", filtered((4, 12), (0, 5), (1, 30), (4, 1001), (1, 9001)))
def test_verify_equals_its_twin(backend, how, K, V):
    args = speculation(30, K, V, how, seed=K + V)
    r = np.random.default_rng(1)
    args["draft"][r.random((30, K)) < 0.2] = r.integers(0, V)  # tokens that the draft would not have drawn
    for count in (None, r.integers(0, K + 1, 30).astype(np.int32)):
        got = backend.call("verify", args | {"count": count})
        accepted, token = twin.verify(**args, count=count)
        assert same(got["accepted"], accepted) and same(got["token"], token)


def test_verify_with_the_draft_equal_to_the_target_accepts_all(backend):
    args = speculation(30, 4, 50, FILTERS[4], seed=1, mix=0)
    got = backend.call("verify", args)
    assert (got["accepted"] == 4).all()


@pytest.mark.parametrize("how", FILTERS[:6], ids=str)
def test_speculation_draws_the_targets_distribution(backend, how):
    n, K, V = 8000, 2, 9
    r = np.random.default_rng(2)
    target, near = 2 * r.standard_normal((K + 1, V)).astype("f4"), r.standard_normal((K, V)).astype("f4")
    draft_logits, how_all = (target[:K] + near).astype("f4"), each(n, **how)
    draft = np.stack([backend.module.sample(logits=np.tile(draft_logits[i], (n, 1)), **how_all, u=philox_uniform(backend, n, i))
                      for i in range(K)], 1)
    accepted, token = backend.module.verify(
        logits=np.tile(target, (n, 1, 1)), draft=draft, draft_logits=np.tile(draft_logits, (n, 1, 1)), **how_all,
        u_accept=np.stack([philox_uniform(backend, n, 10 + i) for i in range(K)], 1),
        u_sample=np.stack([philox_uniform(backend, n, 20 + i) for i in range(K + 1)], 1))
    p = [twin.distribution(z, *how.values()) for z in target]
    for i in range(K + 1):  # of the rows that reach position i, what stands there
        here = accepted >= i
        out = np.where(accepted > i, draft[:, min(i, K - 1)], token)[here]
        fits(np.bincount(out, minlength=V), p[i])
