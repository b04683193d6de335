"""Distillation of a half-Mamba student from its teacher: `python benchmarks/train.py [--device cuda] [--shape 8B] [--batch 1 4]`.

A step is forward of the teacher, forward and backward of the student (KL, one forward more of it with recompute), the gradient norm and AdamW
on `*mamba*`; everything else is frozen and shared. Random weights and tokens. The floor counts 2 FLOPs a weight and token for each
forward, 2 for the gradient of the activations and 2 for that of the trained weights, at 704 TFLOP/s. The last line is JSON.
"""
import argparse
import json
import time

import numpy as np
from decode import CONFIG, SHAPES

import mambainllama as mil


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument("--shape", default="8B", choices=list(SHAPES))
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 4])
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--mixer", default="mamba2", choices=["mamba1", "mamba2"])
    args = parser.parse_args()
    teacher = mil.random(CONFIG | SHAPES[args.shape], dtype="bfloat16", device=args.device)
    matrices = {name: int(np.prod(size)) for name, size in teacher.names.items() if len(size) == 2 and "embed" not in name}
    rows = []
    print(f"{'batch':>5s} {'recompute':>9s} {'ms/step':>9s} {'tokens/s':>9s} {'floor tokens/s':>15s} {'peak GiB':>9s}")
    for recompute in (True, False):
        for batch in args.batch:
            student = mil.convert(teacher, attention=0.5, mixer=args.mixer)
            student.trainable(["*mamba*"])
            trained = sum(int(np.prod(size)) for name, size in student.names.items() if "mamba" in name and len(size) == 2)
            ids = np.random.default_rng(0).integers(0, CONFIG["vocab_size"], (batch, args.length + 1)).astype(np.int32)
            x, y = ids[:, :-1].copy(), ids[:, 1:].copy()
            times = []
            for step in range(args.steps):
                start = time.perf_counter()
                student.loss(x, y, teacher=teacher, ce=0.1, kl=1.0, backward=True, recompute=recompute)
                norm = student.grad_norm()
                student.step(1e-5, scale=min(1.0, 1.0 / norm), step=step + 1)
                student.zero_grad()
                times.append(time.perf_counter() - start)
            seconds = min(times[1:])
            body = sum(matrices.values())
            flops = 2 * body * (2 + recompute) + 2 * body + 2 * trained
            peak = student.module.memory()[1] / 2**30
            rows.append({"batch": batch, "recompute": recompute, "seconds": seconds, "tokens_per_second": batch * args.length / seconds, "peak_gib": peak})
            print(f"{batch:5d} {str(recompute):>9s} {1e3 * seconds:9.1f} {batch * args.length / seconds:9.0f} {704e12 / flops:15.0f} {peak:9.1f}", flush=True)
            del student
    print(json.dumps({"shape": args.shape, "mixer": args.mixer, "length": args.length, "rows": rows}))


if __name__ == "__main__":
    main()
