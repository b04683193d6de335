"""Time of each op: `python benchmarks/ops.py [--device cuda] [--repeat N] [--only NAME]`.

On the CPU the limits are measured in the same run: sgemm (SciPy's OpenBLAS, float32, 2048³, the same threads) for what multiplies,
a copy of 512 MiB (read + write) for what moves memory. A row's work is the least that the op must do: floating-point operations
of its GEMM form, or bytes with each input read and each output written once. Inputs stand on cache lines, as a model's do (NumPy's
own arrays start 16 bytes after one: up to 20 % slower). Medians; the last line is JSON.

On a GPU (bf16) the arguments lie on the device and calls are replayed from a recorded graph, so a time is the card's alone. The floor is
bytes over 4.25 TB/s (a large copy on an H200) or FLOPs over the rate of a large product, measured in the same run; for the selective scan
it is exponentials over 16 a clock and multiprocessor. Median of --repeat recordings.
"""
import argparse
import json
import statistics
import time

import numpy as np
from scipy.linalg.blas import sgemm

from mambainllama import backend

rng = np.random.default_rng(0)


def empty(*shape):
    n = 4 * int(np.prod(shape))
    raw = np.empty(n + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start:start + n].view(np.float32).reshape(shape)


def full(value, *shape):
    array = empty(*shape)
    array[...] = value
    return array


def randn(*shape):
    return rng.standard_normal(out=empty(*shape), dtype=np.float32)


def median_ms(call, repeat, seconds=0.5):
    """Median of at least `repeat` calls and at least `seconds` of them, after two to warm up."""
    call(), call()
    times, start = [], time.perf_counter()
    while len(times) < repeat or time.perf_counter() - start < seconds:
        t = time.perf_counter()
        call()
        times.append(time.perf_counter() - t)
    return 1e3 * statistics.median(times)


def limits():
    a, b = randn(2048, 2048), randn(2048, 2048)
    a, b, c = (np.asfortranarray(x) for x in (a, b, np.zeros_like(a)))
    flops = 2 * 2048**3 / median_ms(lambda: sgemm(1, a, b, c=c, overwrite_c=1), 5) / 1e6
    src, dst = np.ones(1 << 27, np.float32), np.empty(1 << 27, np.float32)
    return flops, 2 * src.nbytes / median_ms(lambda: np.copyto(dst, src), 5) / 1e6


def heads(B, T, H, G, P, N):
    return dict(x=randn(B, T, G, P), dt=randn(B, T, H), A_log=np.log(rng.uniform(1, 16, H)).astype(np.float32), B=randn(B, T, G, N),
                C=randn(B, T, H, N), D=randn(H), dt_bias=randn(H) - 4)


def channels(B, T, D, N, J):
    return dict(x=randn(B, T, D), dt=randn(B, T, D), A_log=np.log(np.tile(np.arange(1, N + 1), (D, 1))).astype(np.float32),
                B=randn(B, T, J, N), C=randn(B, T, D // N, N), D=randn(D), dt_bias=randn(D) - 4, z=randn(B, T, D))


def ring(module, args, S, width, count, state, ring_x, ring_dt, ring_B):
    """The state of a decode that stands `at` tokens after the last fold; time is averaged over the ring by cycling pos."""
    R = count + module.PENDING
    return args | dict(state=full(0, S, *state), ring_x=randn(S, R, *ring_x), ring_dt=full(0.01, S, R, *ring_dt),
                       ring_B=randn(S, R, *ring_B))


def decode(op, args, count):
    """One token a call, as generate makes them: pos moves by one, the checkpoint folds every `count` tokens."""
    at = [count]

    def call():
        pos = at[0]
        at[0] += 1
        op(**args, pos=np.array([pos], np.int32), committed=np.array([pos], np.int32), seen=np.array([pos - 1], np.int32))

    return call


def overhead(module):
    """What a call costs through Python with nothing to do."""
    x, w = randn(1, 16), np.ones(16, np.float32)
    return median_ms(lambda: module.rmsnorm_forward(x, w, eps=1e-5), 1000)


def cases(m):
    """(name, call, GFLOP or None, GB or None)"""
    H, G, P, N, T = 48, 48, 64, 128, 512
    ssd = heads(1, T, H, G, P, N)
    flops = 4 * P * N * H * T / 1e9  # the state in and out; chunks add T·Q·(N+P)·H
    yield "ssd forward T 512, 48 heads x 64, N 128", lambda: m.ssd_forward(**ssd), flops, None
    dy = randn(1, T, H, P)
    yield "ssd backward, same", lambda: m.ssd_backward(dy=dy, **ssd), 3 * flops, None
    one = ring(m, heads(1, 1, H, G, P, N), 1, None, m.SSD_RING, (H, P, N), (G, P), (H,), (G, N))
    yield "ssd T 1, same heads", decode(m.ssd_forward, one, m.SSD_RING), None, 4 * H * P * N / 1e9
    scan = channels(1, 512, 2048, 16, 128)
    exps = 512 * 2048 * 16 * 7 / 1e9
    yield "scan forward T 512, D 2048, N 16", lambda: m.selective_scan_forward(**scan), exps, None
    dy1 = randn(1, 512, 2048)
    yield "scan backward, same", lambda: m.selective_scan_backward(dy=dy1, **scan), 3 * exps, None
    token = ring(m, channels(1, 1, 4096, 16, 256), 1, None, m.SCAN_RING, (4096, 16), (4096,), (4096,), (256, 16))
    yield "scan T 1, D 4096", decode(m.selective_scan_forward, token, m.SCAN_RING), None, 3 * 4 * 4096 * 16 / 1e9
    q, k, v = randn(1, 512, 32, 64), randn(1, 512, 8, 64), randn(1, 512, 8, 64)
    yield "attention forward T 512, 32 heads x 64", lambda: m.attention_forward(q=q, k=k, v=v), 2 * 32 * 512 * 512 * 64 / 1e9, None
    o, lse = m.attention_forward(q=q, k=k, v=v)
    yield "attention backward, same", lambda: m.attention_backward(do=q, q=q, k=k, v=v, o=o, lse=lse), 5 * 32 * 512 * 512 * 64 / 1e9, None
    cache = randn(1, 8192, 8, 64)
    q1, k1 = randn(1, 1, 32, 64), randn(1, 1, 8, 64)
    pos = np.array([8190], np.int32)
    yield ("attention T 1, context 8192, 8 kv heads x 64", lambda: m.attention_forward(q=q1, k=k1, v=k1, kcache=cache, vcache=cache, pos=pos),
           None, 2 * cache.nbytes / 1e9)
    x, w = randn(1, 512, 6144), randn(6144, 4)
    yield "conv1d + SiLU forward T 512, 6144 channels", lambda: m.conv1d_forward(x=x, w=w), None, 2 * x.nbytes / 1e9
    yield "conv1d backward, same", lambda: m.conv1d_backward(dy=x, x=x, w=w), None, 3 * x.nbytes / 1e9
    a, b = randn(1, 512, 2048), randn(8192, 2048)
    half = (b.view(np.uint32) >> 16).astype(np.uint16)
    flops = 2 * 512 * 2048 * 8192 / 1e9
    yield "linear 512 x 2048 -> 8192, float32", lambda: m.linear_forward(x=a, w=b), flops, None
    yield "linear, same, bf16 weights", lambda: m.linear_forward(x=a, w=half), flops, None
    dlin = randn(1, 512, 8192)
    dw = np.zeros_like(b)
    yield "linear backward, same, float32", lambda: m.linear_backward(dy=dlin, x=a, w=b, dw=dw), 2 * flops, None
    for rows in (1, 5):
        xr = randn(1, rows, 2048)
        big = np.zeros((65536, 2048), np.uint16)
        big[:] = half[:1]
        yield f"linear {rows} x 2048 -> 65536, bf16 weights", lambda xr=xr, big=big: m.linear_forward(x=xr, w=big), None, big.nbytes / 1e9
    r = randn(512, 2048)
    scale = randn(2048)
    yield "rmsnorm forward 512 x 2048", lambda: m.rmsnorm_forward(x=r, w=scale, eps=1e-5), None, 2 * r.nbytes / 1e9
    gate = randn(512, 8192)
    yield "swiglu forward 512 x 8192", lambda: m.swiglu_forward(gate=gate, up=gate), None, 3 * gate.nbytes / 1e9
    h, table, target = randn(256, 512), randn(32000, 512), rng.integers(0, 32000, 256).astype(np.int32)
    yield ("lm_loss backward 256 rows, C 512, V 32000, with teacher", lambda: m.lm_loss_backward(h=h, w=table, target=target, th=h, tw=table),
           6 * 256 * 512 * 32000 / 1e9, None)
    n = 1 << 24
    p, g, mom, var = randn(n), randn(n), np.zeros(n, np.float32), np.zeros(n, np.float32)
    yield ("adamw 16 Mi parameters", lambda: m.adamw(w=p, m=mom, v=var, grad=g, lr=1e-3, b1=0.9, b2=0.99, eps=1e-8, decay=0.0, step=1),
           None, 7 * p.nbytes / 1e9)
    logits = randn(8, 128256)
    ones, zero = np.ones(8, np.float32), np.zeros(8, np.int32)
    yield ("sample 8 rows, V 128256, top-k 50, top-p 0.9",
           lambda: m.sample(logits=logits, temperature=ones, top_k=zero + 50, top_p=ones * np.float32(0.9), min_p=ones * 0, u=ones / 2),
           None, logits.nbytes / 1e9)


def few_rows(B, T):
    """State cursors of B rows that stand in the middle of a ring."""
    at = np.full(B, 8, np.int32)
    return dict(pos=at, committed=at, seen=at)


def zero_state(S, *width):
    return np.zeros((S, *width), np.float32)


def gpu_cases(m):
    """(name, op, arguments, GB, TFLOP or exponentials of 10^12): Llama-3-8B's shapes."""
    B, T, H, G, P, N, W = 8, 2048, 32, 8, 128, 128, 4

    def ssd(B, T):
        tflop = 1e-12 * B * T * H * (2 * 128 * (N + P) / 2 + 4 * P * N)  # chunks of 128: causal halves of C B^T and of its product with x; states in and out
        return heads(B, T, H, G, P, N), 2e-9 * B * T * (H * P + H * N + G * (P + N) + H), tflop

    for b, t in ((8, 2048), (1, 2048), (1, 65536)):
        args, gb, tflop = ssd(b, t)
        yield f"ssd forward B {b} T {t}", "ssd_forward", args, gb, tflop
    args, gb, tflop = ssd(8, 2048)
    yield "ssd backward B 8 T 2048", "ssd_backward", args | dict(dy=randn(8, T, H, P)), 2.5 * gb, 3 * tflop
    D, J = H * P, G * P // 16
    for b, t in ((8, 2048), (1, 2048), (1, 65536)):
        yield f"scan forward B {b} T {t}", "selective_scan_forward", channels(b, t, D, 16, J), 2e-9 * b * t * (5 * D + G * P), 1e-12 * b * t * D * 16
    yield ("scan backward B 8 T 2048", "selective_scan_backward", channels(8, T, D, 16, J) | dict(dy=randn(8, T, D)), 2e-9 * B * T * (10 * D + 2 * G * P),
           2e-12 * B * T * D * 16)
    x, w = randn(8, T, 6144), randn(6144, W)
    yield "conv1d + SiLU forward B 8 T 2048, 6144 channels", "conv1d_forward", dict(x=x, w=w), 4e-9 * x.size, None
    yield "conv1d backward, same", "conv1d_backward", dict(dy=x, x=x, w=w), 6e-9 * x.size, None
    for b, t in ((1, 2048), (4, 2048)):
        q, k = randn(b, t, H, P), randn(b, t, G, P)
        yield f"attention forward B {b} T {t}", "attention_forward", dict(q=q, k=k, v=k), None, 2e-12 * b * H * t * t * P
    lse = np.full((4, H, T), 8, np.float32)
    yield "attention backward B 4 T 2048", "attention_backward", dict(do=q, q=q, k=k, v=k, o=q, lse=lse), None, 5e-12 * 4 * H * T * T * P
    for b, context in ((1, 512), (1, 32768), (64, 2048)):
        cache = np.zeros((b, context + 64, G, P), np.float32)
        yield (f"attention T 1, B {b}, context {context}", "attention_forward",
               dict(q=randn(b, 1, H, P), k=randn(b, 1, G, P), v=randn(b, 1, G, P), kcache=cache, vcache=cache.copy(), pos=np.full(b, context, np.int32)),
               4e-9 * b * context * G * P, None)
    half = (randn(1 << 22).view(np.uint32) >> 16).astype(np.uint16)  # some weights, repeated
    for rows, K, O in ((1, 4096, 14336), (5, 4096, 14336), (16, 4096, 14336), (1, 14336, 4096), (1, 4096, 4096), (1, 4096, 1024), (1, 4096, 128256)):
        copies = max(1, -(-(1 << 28) // (K * O)))  # enough weights that the cache does not hold them; the time is that of one
        big = np.resize(half, (O * copies, K))
        yield f"linear {rows} x {K} -> {O}", "linear_forward", dict(x=randn(1, rows, K), w=big, copies=copies), 2e-9 * K * O, None
    for rows in (64, 320):
        yield f"linear {rows} decode rows x 4096 -> 14336", "linear_forward", dict(x=randn(rows // 5 or 1, 5, 4096)[:rows], w=big[:14336, :4096].copy()), 2e-9 * 4096 * 14336, 2e-12 * rows * 4096 * 14336
    a = randn(1, 8192, 4096)
    yield "linear 8192 x 4096 -> 14336", "linear_forward", dict(x=a, w=big[:14336].copy()), None, 2e-12 * 8192 * 4096 * 14336
    for b in (1, 64, 256):
        for t in (1, 5):
            base = heads(b, t, H, G, P, N)
            R = m.SSD_RING + m.PENDING
            state = dict(state=zero_state(b, H, P, N), ring_x=randn(b, R, G, P), ring_dt=np.full((b, R, H), 0.01, np.float32), ring_B=randn(b, R, G, N))
            yield f"ssd T {t}, B {b}", "ssd_forward", base | state | few_rows(b, t), 4e-9 * b * H * P * N, None
            at = np.full(b, m.SSD_RING, np.int32)
            flush = dict(pos=at, committed=at, seen=at - 1)
            yield f"ssd T {t}, B {b}, with a fold", "ssd_forward", base | state | flush, 8e-9 * b * H * P * N, None
    for b, t in ((1, 1), (256, 1), (1, 5), (64, 5)):
        R = m.SCAN_RING + m.PENDING
        state = dict(state=zero_state(b, D, 16), ring_x=randn(b, R, D), ring_dt=np.full((b, R, D), 0.01, np.float32), ring_B=randn(b, R, J, 16))
        yield f"scan T {t}, B {b}", "selective_scan_forward", channels(b, t, D, 16, J) | state | few_rows(b, t), 4e-9 * b * D * 16, None
    r = randn(8192, 4096)
    yield "rmsnorm forward 8192 x 4096", "rmsnorm_forward", dict(x=r, w=randn(4096), eps=1e-5), 4e-9 * r.size, None
    yield "rmsnorm forward 1 x 4096", "rmsnorm_forward", dict(x=r[:1].copy(), w=randn(4096), eps=1e-5), 4e-9 * 4096, None
    gate = randn(8192, 14336)
    yield "swiglu forward 8192 x 14336", "swiglu_forward", dict(gate=gate, up=gate), 6e-9 * gate.size, None
    n = 1 << 26
    p = randn(n)
    yield "adamw 64 Mi parameters", "adamw", dict(w=p, m=p * 0, v=p * 0, grad=p, lr=1e-3, b1=0.9, b2=0.99, eps=1e-8, decay=0.0, step=1), 28e-9 * n, None
    half = np.zeros(n, np.uint16)
    yield ("adamw 64 Mi parameters, bf16 moments", "adamw", dict(w=p, m=half, v=half.copy(), grad=p, lr=1e-3, b1=0.9, b2=0.99, eps=1e-8, decay=0.0, step=1),
           20e-9 * n, None)
    h, table, target = randn(2048, 4096), big[:128256], rng.integers(0, 128256, 2048).astype(np.int32)
    yield "lm_loss backward 2048 rows, V 128256, teacher", "lm_loss_backward", dict(h=h, w=table, target=target, th=h, tw=table), None, 6e-12 * 2048 * 4096 * 128256
    ids = np.tile(np.arange(32, dtype=np.int32), (2048, 1))
    known = dict(ids=ids, log_probs=np.full(ids.shape, -np.log(33), np.float32), tail=np.full(2048, -np.log(33), np.float32))
    yield ("lm_loss backward, the same with 32 tokens of a cache", "lm_loss_backward", dict(h=h, w=table, target=target, **known), None,
           4e-12 * 2048 * 4096 * 128256)
    yield "top_log_probs 2048 rows, V 128256, 32 tokens", "top_log_probs", dict(known, h=h, w=table), None, 2e-12 * 2048 * 4096 * 128256
    logits = randn(8, 128256)
    ones, zero = np.ones(8, np.float32), np.zeros(8, np.int32)
    yield "sample 8 rows, greedy", "sample", dict(logits=logits, temperature=ones * 0, top_k=zero, top_p=ones, min_p=ones * 0, u=ones / 2), 4e-9 * logits.size, None
    yield ("sample 8 rows, top-k 50, top-p 0.9", "sample", dict(logits=logits, temperature=ones, top_k=zero + 50, top_p=ones * np.float32(0.9), min_p=ones * 0, u=ones / 2),
           4e-9 * logits.size, None)


def gpu(args):
    m = backend.module("cuda")
    a, w = randn(1, 8192, 4096), (randn(14336, 4096).view(np.uint32) >> 16).astype(np.uint16)
    tflops = 2e-12 * 8192 * 4096 * 14336 / m.time_op("linear_forward", 10, x=a, w=w)
    tbs = 4.25  # a large copy on an H200, read and write
    exps = 16 * 132 * 1.75e-3  # 10^12 a second
    print(f"{m.__name__}: bytes at {tbs} TB/s, bf16 product {tflops:.0f} TFLOP/s\n")
    print(f"{'op':52s} {'us':>10s} {'floor us':>9s} {'of floor':>9s} {'TB/s':>7s} {'TFLOP/s':>8s}")
    rows = []
    for name, op, arguments, gb, work in gpu_cases(m):
        if args.only not in name:
            continue
        copies = arguments.pop("copies", 1)
        ns = 1e9 * statistics.median(m.time_op(op, 20, **arguments) for _ in range(args.repeat)) / copies
        scan = op.startswith("selective_scan") and work
        floor = max(1e6 * (gb or 0) / tbs, 1e9 * (work or 0) / (exps if scan else tflops))
        rows.append({"op": name, "us": ns / 1e3, "floor_us": floor / 1e3, "gb": gb, "tflop": None if scan else work})
        print(f"{name:52s} {ns / 1e3:10.2f} {floor / 1e3:9.2f} {floor / ns:9.0%} {1e6 * gb / ns if gb else 0:7.2f} {1e9 * work / ns if work and not scan else 0:8.0f}", flush=True)
    print(json.dumps({"module": m.__name__, "copy_tbs": tbs, "product_tflops": tflops, "rows": rows}))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--only", default="", help="only the rows whose name holds this text")
    args = parser.parse_args()
    if args.device == "cuda":
        return gpu(args)
    module = backend.module("cpu")
    gemm, copy = limits()
    print(f"{module.__name__}, {module.workers()} threads; sgemm {gemm:.0f} GFLOP/s, copy {copy:.1f} GB/s, "
          f"empty call {1e3 * overhead(module):.1f} us (included in every row)\n")
    print(f"{'op':58s} {'ms':>9s} {'GFLOP/s':>9s} {'GB/s':>8s} {'of limit':>9s}")
    rows = []
    for name, call, gflop, gb in cases(module):
        if args.only not in name:
            continue
        ms = median_ms(call, args.repeat)
        rate, limit = (gflop, gemm) if gflop else (gb, copy)
        rate = rate / ms * 1e3
        rows.append({"op": name, "ms": ms, "gflops": rate if gflop else None, "gbs": None if gflop else rate, "share": rate / limit})
        print(f"{name:58s} {ms:9.4f} {rate if gflop else float('nan'):9.1f} {float('nan') if gflop else rate:8.1f} {rate / limit:9.0%}".replace("nan", "  -"))
    print(json.dumps({"module": module.__name__, "threads": module.workers(), "sgemm_gflops": gemm, "copy_gbs": copy, "rows": rows}))


if __name__ == "__main__":
    main()
