"""Float64 twins of the ops in csrc/ops.h: forward only, same names, same argument names, plain loops over time.

What is written here follows the formulas of ops.h and nothing else; speed does not matter. Every twin takes NumPy arrays
(bf16 as uint16 bits) and computes in float64. Where an op changes an argument in place, its twin returns the new array after
the outputs.
The style is that of state-spaces/mamba: selective_scan_ref (selective_scan_interface.py) and ssd_minimal.py.

Dims: B batch, T time, C width, H heads, G kv groups, P head dim, N state size, W conv width, V vocabulary, S slots, M rows.
"""
import numpy as np


def bf16_to_float(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32)


def float_to_bf16(x):
    """Round to nearest, ties to even."""
    u = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((u + 0x7FFF + ((u >> 16) & 1)) >> 16).astype(np.uint16)


def f64(a):
    """An array, or bf16 bits, in float64; None stays None."""
    if a is None:
        return None
    a = np.asarray(a)
    return (bf16_to_float(a) if a.dtype == np.uint16 else a).astype(np.float64)


def sigmoid(x):
    return np.exp(-np.logaddexp(0, -x))


def silu(x):
    return x * sigmoid(x)


def softplus(x):
    return np.logaddexp(0, x)


def log_softmax(z):
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


# ---- what precedes a token -------------------------------------------------------------------------------------------------


def rows(B, T, slot=None, keep=None, prev=None, pos=None):
    """The defaults of `Rows`: slot b, keep T, prev t-1, pos 0."""
    slot = list(range(B)) if slot is None else slot
    keep = np.full(B, T) if keep is None else keep
    prev = np.tile(np.arange(T) - 1, (B, 1)) if prev is None else prev
    pos = np.zeros(max(slot, default=0) + 1, int) if pos is None else pos
    return slot, keep, prev, pos


def path(prev, t):
    """Token t and those before it along prev, oldest first; and whether they continue the incoming state."""
    steps = []
    while t >= 0:
        steps.append(t)
        t = prev[t]
    return steps[::-1], t == -1


def entry(cache, position, sinks=0):
    """Where a token stands: the first `sinks` positions have entries of their own, the others take turns in those behind."""
    return position if position < sinks else sinks + (position - sinks) % (cache.shape[1] - sinks)


def kept(cache, pos, sinks=0):
    """The positions before pos that have an entry: the first `sinks`, and the last of the others."""
    return [i for i in range(pos) if i < sinks or i >= pos - (cache.shape[1] - sinks)]


def past(cache, slot, pos, sinks=0):
    """The entries of these positions, oldest first."""
    return cache[slot, [entry(cache, i, sinks) for i in kept(cache, pos, sinks)]]


def write(cache, slot, pos, values, sinks=0):
    for t, value in enumerate(values):
        cache[slot, entry(cache, pos + t, sinks)] = value


# ---- linear ----------------------------------------------------------------------------------------------------------------


def linear(x, w, bias=None):
    """y[m,o] = sum_k x[m,k] w[o,k] + bias[o]"""
    return f64(x) @ f64(w).T + (0 if bias is None else f64(bias))


def embedding(w, ids):
    """y[m] = w[ids[m]]"""
    return f64(w)[ids]


# ---- norms and activation --------------------------------------------------------------------------------------------------


def rmsnorm(x, w, eps):
    """y = x / sqrt(mean(x^2) + eps) * w, mean over the last axis"""
    x = f64(x)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * f64(w)


def gated_rmsnorm(x, z, w, eps):
    """y = w * rmsnorm(x * silu(z)), per head.   x, z (M,H,P)  w (H,P)"""
    return rmsnorm(f64(x) * silu(f64(z)), w, eps)


def swiglu(gate, up):
    """y = silu(gate) * up"""
    return silu(f64(gate)) * f64(up)


def accumulate(y, x):
    """y + x"""
    return f64(y) + f64(x)


# ---- attention -------------------------------------------------------------------------------------------------------------


def rope(x, position, inv_freq, scale=1.0):
    """Half-rotation layout; the angle is rounded to float32.   x (B,T,H,P)  position (B,T)  inv_freq (P/2)"""
    x = f64(x)
    a = f64(position.astype(np.float32)[..., None] * inv_freq.astype(np.float32))[..., None, :]
    first, second = np.split(x, 2, -1)
    return scale * np.concatenate([first * np.cos(a) - second * np.sin(a), second * np.cos(a) + first * np.sin(a)], -1)


def attention(q, k, v, kcache=None, vcache=None, window=0, sinks=0, scale=None, slot=None, keep=None, prev=None, pos=None):
    """o[t] = softmax(scale q[t] . k[j]) v[j] over j on t's path, window > 0: the first `sinks` and the last `window` of it.

    q (B,T,H,P)  k, v (B,T,G,P)  kcache, vcache (S,K,G,P)  ->  o (B,T,H,P), lse (B,H,T), kcache, vcache
    """
    q, k, v = f64(q), f64(k), f64(v)
    (B, T, H, P), G = q.shape, k.shape[2]
    kcache, vcache = f64(kcache), f64(vcache)
    slot, keep, prev, pos = rows(B, T, slot, keep, prev, pos)
    scale, sinks = P**-0.5 if scale is None else scale, sinks if window > 0 else 0
    o, lse = np.zeros((B, T, H, P)), np.zeros((B, H, T))
    for b in range(B):
        s = slot[b]
        for t in range(T):
            steps, incoming = path(prev[b], t)
            keys, values = k[b, steps], v[b, steps]
            if incoming and kcache is not None:
                keys = np.concatenate([past(kcache, s, pos[s], sinks), keys])
                values = np.concatenate([past(vcache, s, pos[s], sinks), values])
            if window > 0:
                seen = [i for i in range(len(keys)) if i < sinks or i >= len(keys) - window]
                keys, values = keys[seen], values[seen]
            for g in range(G):
                heads = slice(g * H // G, (g + 1) * H // G)
                score = scale * q[b, t, heads] @ keys[:, g].T
                lse[b, heads, t] = np.logaddexp.reduce(score, -1)
                o[b, t, heads] = np.exp(score - lse[b, heads, t, None]) @ values[:, g]
        if kcache is not None:
            write(kcache, s, pos[s], k[b], sinks)
            write(vcache, s, pos[s], v[b], sinks)
    return o, lse, kcache, vcache


# ---- causal convolution ----------------------------------------------------------------------------------------------------


def conv1d(x, w, bias=None, cache=None, silu=1, block=1, slot=None, keep=None, prev=None, pos=None):
    """y[t,c] = f(bias[c] + sum_i w[c,i] x[t-(W-1-i), map(c)]), steps back along prev, zeros before a document's start.

    x (B,T,X)  w (D,W)  cache (S,K,X)  ->  y (B,T,D), cache.   map repeats blocks of `block` channels D/X times each.
    """
    x, w, cache = f64(x), f64(w), f64(cache)
    (B, T, X), (D, W) = x.shape, w.shape
    slot, keep, prev, pos = rows(B, T, slot, keep, prev, pos)
    c = np.arange(D)
    source = c // block // (D // X) * block + c % block if D != X else c
    y = np.zeros((B, T, D)) + (0 if bias is None else f64(bias))
    for b in range(B):
        s = slot[b]
        for t in range(T):
            steps, incoming = path(prev[b], t)
            inputs = x[b, steps]
            if incoming and cache is not None:
                inputs = np.concatenate([past(cache, s, pos[s]), inputs])
            for i, value in enumerate(inputs[::-1][:W]):
                y[b, t] += w[:, W - 1 - i] * value[source]
        if cache is not None:
            write(cache, s, pos[s], x[b])
    return (y * sigmoid(y) if silu else y), cache


# ---- recurrences -----------------------------------------------------------------------------------------------------------


def recurrence(B, T, shape, step, state, slot, keep, prev):
    """Runs S[t] = step(b, t, S[before t]) along prev -> every token's S (B,T,...) and `state` after keep tokens."""
    state = f64(state)
    slot, keep, prev, _ = rows(B, T, slot, keep, prev)
    every = np.zeros((B, T, *shape))
    for b in range(B):
        initial = np.zeros(shape) if state is None else state[slot[b]].copy()
        for t in range(T):
            p = prev[b, t]
            every[b, t] = step(b, t, every[b, p] if p >= 0 else initial if p == -1 else np.zeros(shape))
        if state is not None and keep[b] > 0:
            state[slot[b]] = every[b, keep[b] - 1]
    return every, state


def selective_scan(x, dt, A_log, B, C, D=None, dt_bias=None, z=None, state=None, slot=None, keep=None, prev=None):
    """Mamba-1.   d = softplus(dt + dt_bias);  S[c,n] = exp(-d[c] exp(A_log[c,n])) S[c,n] + d[c] B[j(c),n] x[c];
    y[c] = (sum_n C[c/N,n] S[c,n] + D[c] x[c]) silu(z[c]),  j(c) = (c/N) / (D/N/J).

    x, dt, z (B,T,D)  A_log (D,N)  B (B,T,J,N)  C (B,T,D/N,N)  state (S,D,N)  ->  y (B,T,D), state
    """
    x, dt, A, B, C = f64(x), f64(dt), -np.exp(f64(A_log)), f64(B), f64(C)
    (batch, T, width), (_, N), J = x.shape, A.shape, B.shape[2]
    d = softplus(dt + (0 if dt_bias is None else f64(dt_bias)))
    B = B.repeat(width // N // J, 2).repeat(N, 2)  # (B,T,D,N): channel c reads block j(c)
    C = C.repeat(N, 2)

    def step(b, t, S):
        return np.exp(d[b, t, :, None] * A) * S + (d[b, t] * x[b, t])[:, None] * B[b, t]

    S, state = recurrence(batch, T, (width, N), step, state, slot, keep, prev)
    y = (C * S).sum(-1) + (0 if D is None else f64(D) * x)
    return (y if z is None else y * silu(f64(z))), state


def ssd(x, dt, A_log, B, C, D=None, dt_bias=None, state=None, slot=None, keep=None, prev=None):
    """Mamba-2.   d = softplus(dt + dt_bias);  S[h] = exp(-d[h] exp(A_log[h])) S[h] + d[h] x[g] B[g]^T;
    y[h] = S[h] C[h] + D[h] x[g],  g = h / (H/G).

    x (B,T,G,P)  dt (B,T,H)  A_log, D, dt_bias (H)  B (B,T,G,N)  C (B,T,H,N)  state (S,H,P,N)  ->  y (B,T,H,P), state
    """
    dt, A, C = f64(dt), -np.exp(f64(A_log)), f64(C)
    batch, T, H = dt.shape
    x, B = f64(x).repeat(H // x.shape[2], 2), f64(B).repeat(H // B.shape[2], 2)  # head h reads group g
    d = softplus(dt + (0 if dt_bias is None else f64(dt_bias)))

    def step(b, t, S):
        return np.exp(d[b, t] * A)[:, None, None] * S + (d[b, t, :, None] * x[b, t])[:, :, None] * B[b, t][:, None, :]

    S, state = recurrence(batch, T, (H, x.shape[3], B.shape[3]), step, state, slot, keep, prev)
    y = (S * C[:, :, :, None, :]).sum(-1) + (0 if D is None else f64(D)[:, None] * x)
    return y, state


# ---- loss and optimiser ----------------------------------------------------------------------------------------------------


def loss_weights(target, teacher, wce, wkl):
    """The defaults of lm_loss: 1 where target >= 0, no KL without a teacher."""
    counts = (target >= 0).astype(np.float64)
    wce = counts if wce is None else f64(wce)
    return wce, counts * 0 if teacher is None else counts if wkl is None else f64(wkl)


def outcomes(log_p, ids):
    """log_p (M,V) of the tokens ids (M,J) and, last, of any other: (M,J+1); where J is V: (M,J)"""
    M, V = log_p.shape
    others = np.array([np.delete(row, at) for row, at in zip(log_p, ids)]).reshape(M, V - ids.shape[1])
    rest = np.logaddexp.reduce(others, 1)[:, None] if others.size else np.zeros((M, 0))
    return np.concatenate([np.take_along_axis(log_p, ids.astype(int), 1), rest], 1)


def top_log_probs(h, w, j, temperature=1.0):
    """The j largest of log softmax(h w^T / tau), and the log of what the rest has  ->  ids (M,j), log_probs (M,j), tail (M)"""
    log_p = log_softmax(f64(h) @ f64(w).T / temperature)
    ids = np.argsort(-log_p, 1, kind="stable")[:, :j]
    p = outcomes(log_p, ids)
    return ids.astype(np.int32), p[:, :j], p[:, j] if j < len(w) else np.full(len(h), -np.inf)


def lm_loss(h, w, target, th=None, tw=None, ids=None, log_probs=None, tail=None, wce=None, wkl=None, temperature=1.0, kind=0):
    """ce = -log softmax(z)[target], 0 where target < 0;  kl = tau^2 KL of softmax(./tau): (u || z) for kind 0, (z || u) for 1, Jensen-Shannon for 2;
    z = h w^T, u = th tw^T, or, for the outcomes ids and any other, what log_probs and tail say. A row whose weights are both 0 reads 0.
    h (M,C)  w (V,C)  th (M,K)  tw (V,K)  ids, log_probs (M,J)  tail (M)  ->  ce, kl (M)"""
    z = f64(h) @ f64(w).T
    ce = np.where(target >= 0, -np.take_along_axis(log_softmax(z), np.maximum(target, 0)[:, None], 1)[:, 0], 0)
    kl = np.zeros(len(z))
    if th is not None or ids is not None:
        b = log_softmax(z / temperature)
        if ids is None:
            a = log_softmax(f64(th) @ f64(tw).T / temperature)
        else:
            b = outcomes(b, ids)
            a = np.maximum(np.concatenate([f64(log_probs), f64(tail)[:, None]], 1)[:, : b.shape[1]], -1e4)
        if kind == 1:
            a, b = b, a
        if kind == 2:
            mean = np.logaddexp(a, b) - np.log(2)
            kl = temperature**2 * (np.exp(a) * (a - mean) + np.exp(b) * (b - mean)).sum(-1) / 2
        else:
            kl = temperature**2 * (np.exp(a) * (a - b)).sum(-1)
    wce, wkl = loss_weights(target, th if ids is None else ids, wce, wkl)
    skipped = (wce == 0) & (wkl == 0)
    return np.where(skipped, 0, ce), np.where(skipped, 0, kl)


def squared_error(a, b):
    """y[m] = sum_c (a[m,c] - b[m,c])^2.   a, b (M,C)  ->  y (M)"""
    return ((f64(a) - f64(b)) ** 2).sum(-1)


def adamw(w, m, v, grad, lr, b1, b2, eps, decay, step, gscale=1.0, key=0, first=0):
    """AdamW (Loshchilov & Hutter 2019), decoupled decay  ->  w, m, v; given m and v as bf16 bits, such bits, rounded at random"""
    half = np.asarray(m).dtype == np.uint16
    w, m, v, g = f64(w), f64(m), f64(v), gscale * f64(grad)
    m = b1 * m + (1 - b1) * g
    v = b2 * v + (1 - b2) * g * g
    mhat, vhat = m / (1 - b1**step), v / (1 - b2**step)
    w = w - lr * (mhat / (np.sqrt(vhat) + eps) + decay * w)
    if half:
        words = [philox((first // 4 + i, 0, step, 2), (key, 0)) for i in range((m.size + 3) // 4)]
        words = np.array(words, np.uint32).ravel()[: m.size]
        m, v = (((x.astype(np.float32).view(np.uint32) + random) >> 16).astype(np.uint16) for x, random in
                ((m, words & 0xFFFF), (v, words >> 16)))
    return w, m, v


def sum_squares(g):
    return (f64(g) ** 2).sum()


# ---- sampling --------------------------------------------------------------------------------------------------------------


def distribution(logits, temperature, top_k, top_p, min_p):
    """The distribution of one row of logits (V): temperature, then top_k, then top_p of what is left, then min_p, renormalised.
    Ties: the lower index first. temperature 0: all mass on the first largest."""
    z = f64(logits)
    order = np.argsort(-z, kind="stable")
    if temperature == 0:
        order = order[:1]
        temperature = 1
    if top_k > 0:
        order = order[:top_k]
    p = np.exp((z[order] - z[order[0]]) / temperature)
    p /= p.sum()
    if top_p < 1:
        n = int((np.cumsum(p) < top_p).sum()) + 1  # the smallest set of mass >= top_p
        order, p = order[:n], p[:n]
    large = p >= min_p * p[0]
    order, p = order[large], p[large]
    out = np.zeros(len(z))
    out[order] = p / p.sum()
    return out


def draw(p, u):
    """Inverse CDF in index order."""
    i = int((np.cumsum(p) <= u * p.sum()).sum())
    return min(i, int(np.flatnonzero(p)[-1]))


def sample(logits, temperature, top_k, top_p, min_p, u):
    rows = zip(logits, temperature, top_k, top_p, min_p, u)
    return np.array([draw(distribution(*row), x) for *row, x in rows], np.int32)


def verify(logits, draft, draft_logits, temperature, top_k, top_p, min_p, u_accept, u_sample, count=None):
    """Speculative acceptance (Leviathan et al. 2023)  ->  accepted (B), token (B)"""
    B, K = draft.shape
    accepted, token = np.zeros(B, np.int32), np.zeros(B, np.int32)
    for b in range(B):
        how = temperature[b], top_k[b], top_p[b], min_p[b]
        n = K if count is None else count[b]
        i = 0
        while i < n:
            p, q = distribution(logits[b, i], *how), distribution(draft_logits[b, i], *how)
            d = draft[b, i]
            if not (d == p.argmax() if temperature[b] == 0 else u_accept[b, i] * q[d] < p[d]):
                break
            i += 1
        p = distribution(logits[b, i], *how)
        if i < n:
            rest = np.maximum(p - q, 0)
            p = rest if rest.sum() > 0 else p
        accepted[b], token[b] = i, draw(p, u_sample[b, i])
    return accepted, token


def philox(counter, key):
    """Philox4x32-10 (Salmon et al. 2011): four words from a counter of four and a key of two."""
    c, k = [int(x) for x in counter], [int(x) for x in key]
    for _ in range(10):
        a, b = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(b >> 32) ^ c[1] ^ k[0], b & 0xFFFFFFFF, (a >> 32) ^ c[3] ^ k[1], a & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def uniform(index, position, use, low, high):
    """The first word of Philox(key = (low, high), counter = (index, position, use, 0)) over 2^32."""
    words = zip(*(np.asarray(v).astype(np.int64) & 0xFFFFFFFF for v in (index, position, use, low, high)))
    return np.array([philox((i, p, s, 0), (a, b))[0] * 2.0**-32 for i, p, s, a, b in words])


# ---- transfer --------------------------------------------------------------------------------------------------------------


def transfer(dst, src, to, from_, count):
    """dst[to .. to+count] = src[from_ .. from_+count], byte-exact, converted where the types differ"""
    dst, block = dst.copy(), src[from_ : from_ + count]
    if src.dtype != dst.dtype:
        block = bf16_to_float(block) if src.dtype == np.uint16 else float_to_bf16(block)
    dst[to : to + count] = block
    return dst
