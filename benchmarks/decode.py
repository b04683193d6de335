"""Prefill and decode of a Llama-3.2-1B-shaped random model in bf16: `python benchmarks/decode.py [--attention 1 0.5 0]`.

The limits are measured in the same run: sgemm (SciPy's OpenBLAS) on the model's own matrix shapes at 512 rows, for prefill; the sum of
2 GiB of float32 on the same threads, for decode, whose floor is one read of the weights. Medians; the last line is JSON.
"""
import argparse
import json
import statistics
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from scipy.linalg.blas import sgemm

import mambainllama as mil
from mambainllama import backend

CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192,
          "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256,
          "rms_norm_eps": 1e-5, "hidden_act": "silu", "max_position_embeddings": 131072, "tie_word_embeddings": True,
          "rope_theta": 500000.0}


def seconds(call, repeat):
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def sgemm_rate(rows, repeat):
    """GFLOP/s over the products of one layer, float32, at `rows` rows."""
    C, F, E = CONFIG["hidden_size"], CONFIG["intermediate_size"], CONFIG["num_key_value_heads"] * CONFIG["head_dim"]
    flops = spent = 0
    for out, inner in ((C, C), (E, C), (E, C), (C, C), (F, C), (F, C), (C, F)):
        w, x = np.asfortranarray(np.ones((out, inner), np.float32)), np.asfortranarray(np.ones((inner, rows), np.float32))
        y = np.zeros((out, rows), np.float32, order="F")
        sgemm(1, w, x, c=y, overwrite_c=1)
        spent += seconds(lambda: sgemm(1, w, x, c=y, overwrite_c=1), repeat)
        flops += 2 * out * inner * rows
    return flops / spent / 1e9


def read_rate(threads, repeat):
    """GB/s of summing 2 GiB of float32, an equal part a thread."""
    parts = np.array_split(np.ones(1 << 29, np.float32), threads)
    with ThreadPoolExecutor(threads) as pool:
        return (4 << 29) / seconds(lambda: list(pool.map(np.sum, parts)), repeat) / 1e9


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--attention", type=float, nargs="*", default=[1, 0.5, 0], help="shares of layers that keep attention")
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    threads = backend.workers()
    gemm, read = sgemm_rate(512, args.repeat), read_rate(threads, args.repeat)
    print(f"{backend.module().__name__}, {threads} threads; sgemm {gemm:.0f} GFLOP/s on the model's shapes, read {read:.1f} GB/s\n")
    print(f"{'model':24s} {'prefill 512 ms':>15s} {'GFLOP/s':>9s} {'of sgemm':>9s} {'ms/token':>9s} {'GB/s':>7s} {'of read':>8s}")
    teacher = mil.random(CONFIG, dtype="bfloat16")
    ids = np.random.default_rng(0).integers(0, CONFIG["vocab_size"], (1, 512))
    rows = []
    for share in args.attention:
        model = teacher if share == 1 else mil.convert(teacher, attention=share)
        matrices = {name: np.prod(shape) for name, shape in model.names.items() if name.endswith("weight") and len(shape) == 2}
        body = sum(n for name, n in matrices.items() if "embed" not in name)
        state = mil.State(model, 1, 1024)

        def prefill():
            state.reset()
            model.logits(ids, state, last=1)

        prefill()
        prefill_s = seconds(prefill, args.repeat)
        decode_s = seconds(lambda: model.logits([[1]], state, last=1), 16 * args.repeat)
        flops, moved = 2 * body * 512 / prefill_s / 1e9, 2 * sum(matrices.values()) / decode_s / 1e9
        name = "Transformer" if share == 1 else f"{share:g} attention, Mamba-2"
        print(f"{name:24s} {1e3 * prefill_s:15.0f} {flops:9.0f} {flops / gemm:9.0%} {1e3 * decode_s:9.1f} {moved:7.1f} {moved / read:8.0%}")
        rows.append({"model": name, "prefill_ms": 1e3 * prefill_s, "prefill_share": flops / gemm, "decode_ms": 1e3 * decode_s, "decode_share": moved / read})
    print(json.dumps({"module": backend.module().__name__, "threads": threads, "sgemm_gflops": gemm, "read_gbs": read, "rows": rows}))


if __name__ == "__main__":
    main()
