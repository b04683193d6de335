"""Distillation of a half-Mamba student from its teacher: `python benchmarks/train.py [--device cuda] [--shape 8B] [--batch 1 4]`.

A step is forward of the teacher, forward and backward of the student (KL, one forward more of it with recompute), the gradient norm and AdamW
on `*mamba*`; everything else is frozen and shared. Random weights and tokens. The floor counts 2 FLOPs a weight and token for each
forward, 2 for the gradient of the activations and 2 for that of the trained weights, at 704 TFLOP/s. Peak: the most device memory in use
at once during the row's steps, teacher and student and everything else together. The last line is JSON.
"""
import argparse
import json
import time

import numpy as np
from decode import CONFIG, SHAPES

import mambainllama as mil


def measure(source, args, batch, recompute):
    """A row: a fresh student and teacher over source's weights."""
    teacher = mil.convert(source, mamba_layers=[])
    student = mil.convert(teacher, attention=args.attention, mixer=args.mixer)
    student.trainable(["*mamba*"])
    ids = np.random.default_rng(0).integers(0, CONFIG["vocab_size"], (batch, args.length + 1)).astype(np.int32)
    x, y = ids[:, :-1].copy(), ids[:, 1:].copy()
    student.module.memory(True)
    times = []
    for step in range(args.steps):
        start = time.perf_counter()
        student.loss(x, y, teacher=teacher, ce=0.1, kl=1.0, backward=True, recompute=recompute)
        norm = student.grad_norm()
        student.step(1e-5, scale=min(1.0, 1.0 / norm), step=step + 1, moments=args.moments)
        student.zero_grad()
        times.append(time.perf_counter() - start)
    body = sum(int(np.prod(size)) for name, size in source.names.items() if len(size) == 2 and "embed" not in name)
    trained = sum(int(np.prod(size)) for name, size in student.names.items() if "mamba" in name and len(size) == 2)
    flops = 2 * body * (2 + recompute) + 2 * body + 2 * trained
    seconds = min(times[1:])
    return {"batch": batch, "recompute": recompute, "seconds": seconds, "tokens_per_second": batch * args.length / seconds,
            "floor_tokens_per_second": 704e12 / flops, "peak_gib": student.module.memory()[1] / 2**30}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument("--shape", default="8B", choices=list(SHAPES))
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 4])
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--attention", type=float, default=0.5, help="the share of layers that keep attention")
    parser.add_argument("--mixer", default="mamba2", choices=["mamba1", "mamba2"])
    parser.add_argument("--moments", default="bfloat16", choices=["float32", "bfloat16"], help="AdamW's")
    parser.add_argument("--recompute", nargs="*", default=["on", "off"], choices=["on", "off"])
    args = parser.parse_args()
    source = mil.random(CONFIG | SHAPES[args.shape], dtype="bfloat16", device=args.device)
    print(f"{source.module.__name__}: {args.shape}, {args.attention:g} attention, {args.mixer}, {args.moments} moments, {args.length} tokens a row\n")
    print(f"{'batch':>5s} {'recompute':>9s} {'ms/step':>9s} {'tokens/s':>9s} {'floor tokens/s':>15s} {'peak GiB':>9s}")
    rows = []
    for recompute in args.recompute:
        for batch in args.batch:
            row = measure(source, args, batch, recompute == "on")
            rows.append(row)
            print(f"{batch:5d} {recompute:>9s} {1e3 * row['seconds']:9.1f} {row['tokens_per_second']:9.0f} "
                  f"{row['floor_tokens_per_second']:15.0f} {row['peak_gib']:9.1f}", flush=True)
    print(json.dumps({"shape": args.shape, "attention": args.attention, "mixer": args.mixer, "moments": args.moments, "length": args.length,
                      "rows": rows}))


if __name__ == "__main__":
    main()
