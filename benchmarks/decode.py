"""Prefill and decode of Llama-3-shaped random models in bf16: `python benchmarks/decode.py [--device cuda] [--attention 1 0.5 0]`.

On the CPU a 1B shape.
The limits are measured in the same run: sgemm (SciPy's OpenBLAS) on the model's own matrix shapes at 512 rows, for
prefill; the sum of 2 GiB of float32 on the same threads, for decode, whose floor is one read of the weights. Medians; the last line is JSON.

On a GPU (--shape 8B 3B 1B, --batch, --context): milliseconds a token of whole decoding rounds as generate makes them (greedy choice
included), prefill of 2048 tokens, and memory a sequence. The floor of a step is one read of weights, K/V and states at 4.25 TB/s.
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
from mambainllama.config import architecture
from mambainllama.info import memory

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


SHAPES = {"8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "head_dim": 128, "tie_word_embeddings": False},
          "3B": {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24, "head_dim": 128},
          "1B": {}}
BANDWIDTH = 4.25e12


def decode_ms(model, state, batch, steps):
    slots, zero = np.arange(batch, dtype=np.int32), np.zeros(batch, np.int32)
    none = np.zeros(batch, np.float32)
    choices = (none, zero, none + 1, none)
    rounds = (slots, zero + 1, zero, zero, zero, zero[:, None].copy(), zero)

    def step():
        model.c.round(state.c, None, None, rounds, choices, 0, False)

    for _ in range(4):  # the first are issued plainly, then recorded
        step()
    return 1e3 * seconds(step, steps)


def gpu(args):
    rows = []
    print(f"{'model':34s} {'batch':>5s} {'context':>7s} {'prefill 2048 ms':>16s} {'ms/token':>9s} {'floor':>6s} {'tokens/s':>9s} {'MiB a sequence':>15s}")
    for shape in args.shape:
        teacher = mil.random(CONFIG | SHAPES[shape], dtype="bfloat16", device="cuda")
        for share in args.attention:
            model = teacher if share == 1 else mil.convert(teacher, attention=share)
            sizes = memory(architecture(model.config, model.mamba_config))  # of float32
            weights = 2 * sum(np.prod(size) for name, size in model.names.items() if len(size) == 2 and not ("embed" in name and "lm_head.weight" in model.names))
            for context in args.context:
                each = sizes["kv_bytes_per_token"] / 2 * (context + 64) + sizes["state_bytes_per_sequence"]
                for batch in args.batch:
                    if batch * each > args.memory * 2**30:
                        continue
                    before = model.module.memory()[0]
                    state = mil.State(model, batch, context + 64)
                    held = (model.module.memory()[0] - before) / batch
                    ids = np.random.default_rng(0).integers(0, CONFIG["vocab_size"], (1, context))
                    for start in range(0, context, 2048):
                        model.logits(ids[:, start:start + 2048], state, slot=[0], last=1)
                    for row in range(1, batch):
                        state.copy(row, 0)
                    ms = decode_ms(model, state, batch, 24)
                    floor = 1e3 * (weights + batch * held) / BANDWIDTH
                    prefill = float("nan")
                    if context >= 2048:
                        def first():
                            state.reset([0])
                            model.logits(ids[:, :2048], state, slot=[0], last=1)
                        prefill = 1e3 * seconds(first, 5)
                        for start in range(2048, context, 2048):
                            model.logits(ids[:, start:start + 2048], state, slot=[0], last=1)
                    name = f"{shape} " + ("Transformer" if share == 1 else f"{share:g} attention, Mamba-2")
                    rows.append({"model": name, "batch": batch, "context": context, "prefill_2048_ms": prefill, "ms_per_token": ms, "floor_ms": floor,
                                 "tokens_per_second": 1e3 * batch / ms, "bytes_per_sequence": int(held)})
                    print(f"{name:34s} {batch:5d} {context:7d} {prefill:16.1f} {ms:9.3f} {floor:6.2f} {1e3 * batch / ms:9.0f} {held / 2**20:15.1f}", flush=True)
                    del state
            del model
        del teacher
    print(json.dumps({"rows": rows}))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--attention", type=float, nargs="*", default=[1, 0.5, 0], help="shares of layers that keep attention")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--shape", nargs="*", default=["8B"], choices=list(SHAPES), help="on a GPU")
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 8, 64], help="on a GPU")
    parser.add_argument("--context", type=int, nargs="*", default=[512, 8192, 32768], help="on a GPU")
    parser.add_argument("--memory", type=float, default=60, help="GiB of states to try at most, on a GPU")
    args = parser.parse_args()
    if args.device == "cuda":
        return gpu(args)
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
