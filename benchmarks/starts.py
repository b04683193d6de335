"""Starts and alignment in the demo's setting: `python benchmarks/starts.py [--teacher demo/teacher] [--init …] [--seeds 0 1 2] [--steps 400]`.

The demo's teacher (`mambainllama demo` leaves it in demo/teacher), half of its attention made Mamba-2, every start and every plan with the same
rows, steps and learning rate (the demo's), everything learning but where a layer is aligned (`*mamba*`). Plans: KD for all steps; the
first quarter of them alignment of mixers ("mixer") or of layers ("hidden"), then KD. Numbers: KL to the teacher per token that counts on 400
rows of another seed, one a seed (order of the data, what starts fresh). The last line is JSON.
"""
import argparse
import json

import mambainllama as mil
from mambainllama import tasks
from mambainllama.convert import INITS, kept_attention
from mambainllama.data import Batches, read
from mambainllama.demo import HELD_OUT, STUDENT
from mambainllama.objectives import LanguageModelling, evaluate
from mambainllama.recipe import load_recipe


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--teacher", default="demo/teacher")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--init", nargs="*", default=list(INITS), choices=INITS)
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=400)
    args = parser.parse_args()
    teacher = mil.load(args.teacher, device=args.device)
    data, count = tasks.rows(8000, 1), len(teacher.layer_kinds)
    mamba = [i for i in range(count) if i not in kept_attention(count, 0.5)]
    held_out = Batches(read(tasks.rows(HELD_OUT, 1_000_003), teacher.tokenizer), STUDENT["length"], STUDENT["batch"], shuffle=False)
    quarter, rows = args.steps // 4, []
    plans = {"KD": [{"steps": args.steps}]} | {f"{what}, KD": [{"steps": quarter, "align": what, "train": ["*mamba*"]}, {"steps": args.steps - quarter}]
                                               for what in ("mixer", "hidden")}
    print(f"KL after {args.steps} steps\n\n{'start':12s} {'plan':12s} " + " ".join(f"{f'seed {seed}':>8s}" for seed in args.seeds))
    for init in args.init:
        for name, stages in plans.items():
            found = []
            for seed in args.seeds:
                student = mil.convert(teacher, mamba_layers=[])
                recipe = STUDENT | {"seed": seed, "init": init, "stages": [stages[0] | {"mamba_layers": mamba}, *stages[1:]]}
                mil.distill(student, teacher, data, recipe, progress=False)
                found.append(evaluate(LanguageModelling(student, teacher, load_recipe({"steps": 1})), held_out.once)["kl"])
            rows.append({"init": init, "plan": name, "kl": found})
            print(f"{init:12s} {name:12s} " + " ".join(f"{kl:8.4f}" for kl in found), flush=True)
    print(json.dumps({"steps": args.steps, "seeds": args.seeds, "rows": rows}))


if __name__ == "__main__":
    main()
