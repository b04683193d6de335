"""Training of a half-Mamba student: `python benchmarks/train.py [--device cuda] [--shape 8B] [--batch 1 4] [--objective distill sft dpo]`.

A step of distillation is forward of the teacher, forward and backward of the student (KL, one forward more of it with recompute), the gradient
norm and AdamW on what --train names; everything else is frozen and shared. sft has no teacher; dpo has batch pairs of half the length, twice
as many rows, the reference's log-probabilities at hand, and one forward more (its losses come before its weights). Random weights and tokens.
The floor counts 2 FLOPs a weight and token for each forward, 2 for the gradient of the activations and 2 for that of the trained weights, at
704 TFLOP/s. Peak: the most device memory in use at once during the row's steps, teacher and student and everything else together.

--fits computes nothing: it prints how many rows of --length tokens fit on cards of several sizes, with recompute and without, by
mambainllama.info.training_memory and 3 GiB for what that leaves out. The last line is JSON.

`mpirun -n 2 python benchmarks/train.py`: every rank has --batch rows, the tokens are those of all, the peak is the first rank's.
"""
import argparse
import json
import math
import os
import sys
import time

import numpy as np
from decode import CONFIG, SHAPES

import mambainllama as mil
from mambainllama.config import architecture, mamba_config
from mambainllama.convert import kept_attention
from mambainllama.info import training_memory
from mambainllama.model import fits
from mambainllama.parallel import ranks
from mambainllama.preference import Preference
from mambainllama.recipe import load_recipe


def measure(source, objective, args, batch, recompute):
    """A row: a fresh student (and teacher) over source's weights."""
    teacher = mil.convert(source, mamba_layers=[]) if objective == "distill" else None
    student = mil.convert(source, attention=args.attention, mixer=args.mixer, check=False)
    student.trainable(args.train, args.gradients)
    ranks().share(student)
    rows, length = (2 * batch, args.length // 2) if objective == "dpo" else (batch, args.length)
    ids = np.random.default_rng(ranks().rank).integers(0, CONFIG["vocab_size"], (rows, length + 1)).astype(np.int32)
    x, y = ids[:, :-1].copy(), ids[:, 1:].copy()
    goal = Preference(student, "start", load_recipe({"steps": 1, "beta": 1e-3, "recompute": recompute}))
    student.module.memory(True)
    times = []
    for step in range(args.steps):
        start = time.perf_counter()
        if objective == "dpo":
            goal.loss((x, y, np.full(x.shape, -10, np.float32)), {"margin": 1.0}, backward=True)
        else:
            student.loss(x, y, teacher=teacher, ce=0.1 if teacher else 1.0, kl=1.0 if teacher else 0.0, backward=True, recompute=recompute)
        ranks().reduce(student)
        norm = math.hypot(*ranks().every(student.grad_norm()))
        student.step(1e-5, scale=min(1.0, 1.0 / max(norm, 1e-30)), step=step + 1, moments=args.moments)
        ranks().gather(student)
        student.zero_grad()
        times.append(time.perf_counter() - start)
    body = sum(int(np.prod(size)) for name, size in source.names.items() if len(size) == 2 and "embed" not in name)
    trained = sum(int(np.prod(size)) for name, size in student.names.items() if fits(name, args.train) and len(size) == 2 and "embed" not in name)
    flops = 2 * body * (2 + recompute + (objective != "sft")) + 2 * trained
    seconds = min(times[1:])
    return {"objective": objective, "batch": batch, "recompute": recompute, "seconds": seconds,
            "tokens_per_second": ranks().size * rows * length / seconds, "floor_tokens_per_second": ranks().size * 704e12 / flops,
            "peak_gib": student.module.memory()[1] / 2**30}


CARDS, BESIDE = (24, 48, 80, 141), 3 * 2**30  # GB of memory; bytes for workspaces, the loss's chunks, the driver


def fits_table(args):
    """Rows that fit, for each shape, what learns, and card."""
    table = []
    print(f"rows of {args.length} tokens that fit, recompute on / off; ½ {args.mixer}, bf16, {args.moments} moments, {args.gradients} gradients\n")
    print(f"{'shape':6s} {'objective':9s} {'learns':8s} " + " ".join(f"{card:>9d} GB" for card in CARDS))
    for shape in SHAPES:
        config = CONFIG | SHAPES[shape]
        teacher = architecture(config)
        kept = kept_attention(teacher["layers"], args.attention)
        student = architecture(config, mamba_config(config, ["attention" if i in kept else args.mixer for i in range(teacher["layers"])]))
        for objective, other in (("distill", teacher), ("sft", None)):
            for train in ("*mamba*", "*"):
                cells = []
                for card in CARDS:
                    held = [[training_memory(student, other, [train], rows, args.length, 2, args.moments, recompute,
                                             gradients=args.gradients)["total"] for rows in (1, 2)]
                            for recompute in (True, False)]
                    cells.append([max(0, int((card * 1e9 - BESIDE - 2 * one + two) // (two - one))) for one, two in held])
                table.append({"shape": shape, "objective": objective, "train": train, "rows": dict(zip(map(str, CARDS), cells))})
                print(f"{shape:6s} {objective:9s} {train:8s} " + " ".join(f"{on or '-':>6} / {off or '-':<3}" for on, off in cells))
    print(json.dumps({"length": args.length, "moments": args.moments, "gradients": args.gradients, "fits": table}))


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
    parser.add_argument("--gradients", default="float32", choices=["float32", "bfloat16"], help="how those of bf16 matrices are kept")
    parser.add_argument("--recompute", nargs="*", default=["on", "off"], choices=["on", "off"])
    parser.add_argument("--objective", nargs="*", default=["distill"], choices=["distill", "sft", "dpo"])
    parser.add_argument("--train", nargs="*", default=["*mamba*"], metavar="PATTERN", help="what learns (default: *mamba*)")
    parser.add_argument("--fits", action="store_true", help="what fits on which card, computed and not measured")
    args = parser.parse_args()
    if args.fits:
        return fits_table(args)
    if not ranks().first:
        sys.stdout = open(os.devnull, "w")
    source = mil.random(CONFIG | SHAPES[args.shape], dtype="bfloat16", device=args.device)
    print(f"{source.module.__name__}: {ranks().size} rank{'s'[:ranks().size - 1]}, {args.shape}, {args.attention:g} attention, {args.mixer}, "
          f"{args.moments} moments, {args.gradients} gradients, {args.length} tokens a row\n")
    print(f"{'objective':9s} {'batch':>5s} {'recompute':>9s} {'ms/step':>9s} {'tokens/s':>9s} {'floor tokens/s':>15s} {'peak GiB':>9s}")
    rows = []
    for objective in args.objective:
        for recompute in args.recompute:
            for batch in args.batch:
                row = measure(source, objective, args, batch, recompute == "on")
                rows.append(row)
                print(f"{objective:9s} {batch:5d} {recompute:>9s} {1e3 * row['seconds']:9.1f} {row['tokens_per_second']:9.0f} "
                      f"{row['floor_tokens_per_second']:15.0f} {row['peak_gib']:9.1f}", flush=True)
    print(json.dumps({"shape": args.shape, "attention": args.attention, "mixer": args.mixer, "moments": args.moments, "gradients": args.gradients,
                      "length": args.length,
                      "ranks": ranks().size, "train": args.train, "rows": rows}))


if __name__ == "__main__":
    main()
