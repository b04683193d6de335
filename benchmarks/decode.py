"""Prefill and decode of Llama-3-shaped random models in bf16: `python benchmarks/decode.py [--device cuda] [--draft]`.

On the CPU a 1B shape.
The limits are measured in the same run: sgemm (SciPy's OpenBLAS) on the model's own matrix shapes at 512 rows, for
prefill; the sum of 2 GiB of float32 on the same threads, for decode, whose floor is one read of the weights. Medians; the last line is JSON.

On a GPU the grid of --shape, --attention, --context and --batch, all of it by default: milliseconds a token of whole decoding rounds as
generate makes them (greedy choice included), behind a context that one row has read and the others copy, and memory a sequence; and
prefill of 2048 tokens. What does not fit the card's memory is left out and says so. The floor of a round is one read of weights, K/V and
states at 4.25 TB/s, that of a prefill the products of the weights at 704 TFLOP/s.

With --draft, on either device, speculative decoding of one row behind 512 tokens: milliseconds of a plain round, and of one in which a small
draft proposes K tokens and the model verifies them. Only these times are measured. Random weights say nothing about how often a trained
model agrees with its draft: that is taken from arXiv 2408.15237, which reports tokens a round, the verifier's own included, at K = 4: a
draft of 2 layers 2.48 (1/2 attention) and 2.64 (1/4), of 4 layers 3 (both) for Zephyr, and 3.6 (1/2) for Llama-3, whose 2.7 at K = 3 is the
acceptance of 3 at K = 4 (table 5); for pure Mamba 7B a draft of 1B, here of Llama-3.2-1B's shape, 3.56 and 3.6 (table 1). The least and the
most of each are turned into the acceptance a of one proposal by tokens = 1 + a + ... + a^K, and this is used at every K and every share of
attention. Speed-up is tokens a round x plain ms / round ms; beside it is the acceptance that 2.2 would need.
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


SHAPES = {"8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "head_dim": 128, "tie_word_embeddings": False},
          "3B": {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24, "head_dim": 128},
          "1B": {}}
BANDWIDTH, FLOPS = 4.25e12, 704e12
STEPS = 28  # rounds of one measurement


def decode_ms(model, state, batch, draft=(None, None), K=0):
    """Milliseconds of a round, plain or with K proposals of draft: (model, State) in C. It reads one token before it proposes; the two
    that it reads where all was accepted take as long."""
    slots, zero = np.arange(batch, dtype=np.int32), np.zeros(batch, np.int32)
    none = np.zeros(batch, np.float32)
    choices = (none, zero, none + 1, none, np.zeros((batch, 2), np.int32))
    rounds = (slots, zero + 1, zero, zero, zero + K, zero[:, None].copy(), zero + 1)

    def step():
        model.c.round(state.c, *draft, rounds, choices, False)

    for _ in range(4):  # the first are issued plainly, then recorded
        step()
    return 1e3 * seconds(step, STEPS - 4)


def full_state(model, batch, context, rounds):
    """A State of `batch` rows behind one random context, with room for `rounds` measurements; and its bytes a row."""
    before = model.module.memory()[0]
    state = mil.State(model, batch, context + rounds * STEPS)
    held = (model.module.memory()[0] - before) / batch
    ids = np.random.default_rng(0).integers(0, CONFIG["vocab_size"], (1, context))
    for start in range(0, context, 2048):
        model.logits(ids[:, start:start + 2048], state, slot=[0], last=1)
    for row in range(1, batch):
        state.copy(row, 0)
    return state, held


def prefill_rows(model, name, weights):
    for batch in (1, 4):
        state, ids = mil.State(model, batch, 2048), np.random.default_rng(0).integers(0, CONFIG["vocab_size"], (batch, 2048))

        def prefill():
            state.reset()
            model.logits(ids, state, last=1)
        prefill()
        yield {"model": name, "batch": batch, "prefill": 2048, "ms": 1e3 * seconds(prefill, 5), "floor_ms": 2e3 * weights * batch * 2048 / FLOPS,
               "bytes_per_sequence": None}


def decode_rows(model, name, weights, contexts, batches):
    """Of each context: one State of the largest batch that fits serves the smaller ones too."""
    for context in contexts:
        state = None
        for batch in sorted(batches, reverse=True):
            try:
                state, held = state and (state, held) or full_state(model, batch, context, len(batches))
            except MemoryError:
                yield {"model": name, "batch": batch, "context": context, "ms": None}
                continue
            yield {"model": name, "batch": batch, "context": context, "ms": decode_ms(model, state, batch),
                   "floor_ms": 1e3 * (2 * weights + batch * held) / BANDWIDTH, "bytes_per_sequence": int(held)}


def students(shape, args):
    """Of each share of attention a name and a model; they share what conversion does not change."""
    teacher = mil.random(CONFIG | SHAPES[shape], dtype="bfloat16", device=args.device)
    for share in args.attention:
        name = f"{shape} " + ("Transformer" if share == 1 else f"{share:g} attention, {args.mixer}")
        yield name, teacher if share == 1 else mil.convert(teacher, attention=share, mixer=args.mixer)


def gpu(args):
    rows, start = [], time.perf_counter()
    print(f"{'model':34s} {'batch':>5s} {'context':>12s} {'ms':>9s} {'floor':>7s} {'tokens/s':>9s} {'MiB a sequence':>15s}")
    for shape in args.shape:
        for name, model in students(shape, args):
            tied = "lm_head.weight" not in model.names
            weights = sum(int(np.prod(size)) for key, size in model.names.items() if len(size) == 2 and (tied or "embed" not in key))
            body = weights - int(np.prod(model.names["model.embed_tokens.weight"]))  # a prefill has logits of one token
            for row in (*prefill_rows(model, name, body), *decode_rows(model, name, weights, args.context, args.batch)):
                rows.append(row)
                where = f"{name:34s} {row['batch']:5d} " + (f"{'prefill 2048':>12s}" if "prefill" in row else f"{row['context']:12d}")
                if row["ms"] is None:
                    print(f"{where}   does not fit the memory", flush=True)
                    continue
                row["tokens_per_second"] = 1e3 * row["batch"] * row.get("prefill", 1) / row["ms"]
                held = f"{row['bytes_per_sequence'] / 2**20:15.1f}" if row["bytes_per_sequence"] else ""
                print(f"{where} {row['ms']:9.3f} {row['floor_ms']:7.2f} {row['tokens_per_second']:9.0f} {held}", flush=True)
            del model
    print(json.dumps({"module": "mambainllama._cuda", "mixer": args.mixer, "seconds": time.perf_counter() - start, "rows": rows}))


DRAFTS = {"2 layers": (2, (2.48, 2.64)), "4 layers": (4, (3, 3.6)), "1B": (None, (3.56, 3.6))}  # layers; tokens a round at K = 4
LOOKAHEADS, WANTED = (3, 4, 5), 2.2


def tokens(a, K):
    """What a round of K proposals gains, on average, if each is accepted with probability a where those before it are."""
    return sum(a ** i for i in range(K + 1))


def acceptance(gain, K):
    """The a of tokens(a, K) = gain; None: even K + 1 tokens are fewer."""
    grid = np.linspace(0, 1, 10001)
    return float(np.interp(gain, tokens(grid, K), grid)) if gain <= K + 1 else None


def draft_states(shape, device):
    """{name: (draft, State)}; here and below row 1 of a State keeps the context, from which row 0 begins each measurement."""
    drafts = {}
    for name, (layers, _) in DRAFTS.items():
        if name != shape:
            config = CONFIG | (SHAPES[shape] | {"num_hidden_layers": layers} if layers else SHAPES[name])
            draft = mil.random(config, seed=1, dtype="bfloat16", device=device)
            drafts[name] = draft, full_state(draft, 2, 512, LOOKAHEADS[-1] + 1)[0]
    return drafts


def speculative_rows(model, name, drafts):
    state = full_state(model, 2, 512, LOOKAHEADS[-1] + 1)[0]
    plain = decode_ms(model, state, 1)
    for kind, (draft, draft_state) in drafts.items():
        paper = [acceptance(gain, 4) for gain in DRAFTS[kind][1]]
        for K in LOOKAHEADS:
            state.copy(0, 1)
            draft_state.copy(0, 1)
            ms = decode_ms(model, state, 1, (draft.c, draft_state.c), K)
            yield {"model": name, "draft": kind, "K": K, "plain_ms": plain, "round_ms": ms, "paper_acceptance": paper,
                   "speedup": [tokens(a, K) * plain / ms for a in paper], "needed": acceptance(WANTED * ms / plain, K)}


def speculative(args):
    rows, start = [], time.perf_counter()
    print("The times are measured, with random weights; the acceptances are those of arXiv 2408.15237, not of these drafts.\n")
    print(f"{'model':34s} {'draft':>8s} {'K':>2s} {'plain ms':>9s} {'round ms':>9s} {'acceptance':>12s} {'speed-up':>11s} "
          f"{f'{WANTED} needs':>9s}")
    for shape in args.shape:
        drafts = draft_states(shape, args.device)
        for name, model in students(shape, args):
            for row in speculative_rows(model, name, drafts):
                rows.append(row)
                accepts = "-".join(f"{a:.1%}" for a in row["paper_acceptance"])
                gains = "-".join(f"{gain:.2f}" for gain in row["speedup"])
                needs = "> 100%" if row["needed"] is None else f"{row['needed']:.1%}"
                print(f"{name:34s} {row['draft']:>8s} {row['K']:2d} {row['plain_ms']:9.3f} {row['round_ms']:9.3f} {accepts:>12s} {gains:>11s} "
                      f"{needs:>9s}", flush=True)
            del model
    print(json.dumps({"module": backend.module(args.device).__name__, "mixer": args.mixer, "seconds": time.perf_counter() - start, "rows": rows}))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--attention", type=float, nargs="*",
                        help="shares of layers that keep attention (default 1 0.5 0, on a GPU and with --draft 1 0.5 0.25 0)")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--shape", nargs="*", choices=list(SHAPES), help="on a GPU, and with --draft (default all, on the CPU 1B)")
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 8, 64], help="on a GPU")
    parser.add_argument("--context", type=int, nargs="*", default=[512, 8192, 32768], help="on a GPU")
    parser.add_argument("--mixer", default="mamba2", choices=["mamba1", "mamba2"], help="on a GPU, and with --draft")
    parser.add_argument("--draft", action="store_true", help="times of speculative rounds instead, batch 1, context 512")
    args = parser.parse_args()
    args.shape = args.shape or (list(SHAPES) if args.device == "cuda" else ["1B"])
    args.attention = args.attention or ([1, 0.5, 0.25, 0] if args.device == "cuda" or args.draft else [1, 0.5, 0])
    if args.draft:
        return speculative(args)
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
