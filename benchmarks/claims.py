"""The paper's claims, small: `python benchmarks/claims.py [--size small | gpu] [--limit SECONDS] --out FOLDER`.

A teacher is trained in place, then students of it are distilled, arm by arm, and compared. small: 4 layers of 48 channels, made for three
minutes on two quiet cores; gpu: 8 layers of 512, 30 million parameters, bf16, nine minutes on an H200. What is finished is in FOLDER/results.json
and is not computed again: the same call goes on where the limit ended the one before. The last line is JSON.

What is fixed here, before the runs on SEEDS, which no pilot has seen. It is not blind: pilots on the CPU, with seeds 0 to 3 and other
teachers, chose the small teacher's recipe (others left it guessing in recall), two trainings of the gpu one its rate, the grids of rates,
the measures, and the start of claims 4 to 8: calibrated, as the student that did best in them; from the paper's start 120 steps leave too
little to compare. What they showed for claim 1 (calibrated far ahead, attention no better than random) was known, so the new seeds confirm
it or do not.
- Data. Chats that begin with two to five facts; then, as many as fit the length, questions about all facts but one, texts to copy and sums; last
  the question about that one. gpu: every second row is text instead, the standard library's Python files, a token a byte, of which
  every tenth file is only measured on. One row is one document; no student sees one twice. Answers, and every byte of text, count.
- Teacher. One, for all seeds. What a seed varies: the rows that are learned, their order, the rows that measure, what starts fresh. So
  an interval says what other data and draws would have given with this teacher, and nothing of other teachers or larger ones.
- Arms. 1/2 attention, Mamba-2, init "calibrated", everything learns, KL 1 + CE 0.1, except for what an arm names. All of a claim have the same
  rows and tokens, SFT and DPO half of them more (DPO and its control pairs). "equal time" arms have more or fewer steps by what a
  step of theirs and one of the calibrated arm's take when measured in turn, the fastest of three. Calibration reads at most 8192 tokens of
  the arm's own rows once more, which is in no arm's steps.
- Learning rate. For every arm the best of the size's three (SFT: 0.3 of them; on pairs 0.05), on seed SWEEP, which is not reported, by the arm's
  own measure on rows of that seed: KL to the teacher; CE alone and SFT: CE; on pairs: preferences. * marks a best at the grid's edge.
  Equal time arms take the rate of the arm that they are like. Each stage of an arm has a warm-up and a cosine to 0.
- Steps. As many as fit the limit by a measurement of a step, from the size's least to its most; at most a third of the limit is the teacher's.
- Measures, on rows of their own: kl, of the teacher from the student, and ce, per token that counts; the share of answers of which every
  token is the likeliest after the true ones before it (which is what greedy decoding gets right): recall (the last question),
  copy, sums, and answers, the mean of these; preferences, the share of pairs whose right answer has more log-probability than one
  with another fact's value; recall2, ce2, recall4, ce4: in chats of two and four times the length; far: ce of text beyond the length.
- Verdict. Of each claim one measure decides, named in its title: the difference to the baseline on the same seed, its mean over the
  seeds, and the 95 % interval of Student's t. Without 0 in it: "better" or "worse"; else "no difference shown". There are some
  forty comparisons, uncorrected: two such words are expected by chance alone.
"""
import argparse
import json
import sysconfig
import time
from functools import cache
from pathlib import Path

import numpy as np
from scipy.special import stdtrit

import mambainllama as mil
from mambainllama import tasks
from mambainllama.calibrate import TOKENS
from mambainllama.config import architecture
from mambainllama.convert import kept_attention
from mambainllama.data import NONE
from mambainllama.info import memory

CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "rms_norm_eps": 1e-5, "tie_word_embeddings": True}
SIZES = {
    "small": {"model": {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 3, "head_dim": 16,
                        "initializer_range": 0.08},
              "text": False, "length": 64, "held_out": 128, "limit": 180, "batch": 8, "steps": (20, 150),
              "rates": (2e-3, 5e-3, 1.25e-2), "teacher": {"batch": 64, "lr": 6e-3, "decay": 0.5, "rows": 20000, "steps": 900}},
    "gpu": {"model": {"hidden_size": 512, "intermediate_size": 1792, "num_hidden_layers": 8, "num_attention_heads": 8, "head_dim": 64},
            "text": True, "length": 256, "held_out": 96, "limit": 525, "batch": 32, "steps": (40, 400),
            "rates": (3e-4, 1e-3, 3e-3), "teacher": {"batch": 64, "lr": 3e-3, "decay": 0.3, "rows": 40000, "steps": 2500}},
}
SWEEP, SEEDS = 10, (11, 12, 13)
SINKS = 4  # of the window: its document's first tokens

BASE, PAPER, FROZEN = "calibrated", "attention", ["*mamba*"]
INITS = ("random", PAPER, "identity", BASE)
KD = [(1, {})]  # an arm's stages: (share of its steps, what the recipe's stage says)
ARMS = {
    "teacher": {"attention": 1, "stages": []},
    **{init: {"init": init} for init in INITS},
    **{f"{init}, frozen": {"init": init, "recipe": {"train": FROZEN}} for init in INITS},
    f"{BASE}, frozen, equal time": {"like": f"{BASE}, frozen"},
    **{f"{init}, stepwise": {"init": init, "attention": 0.75, "stages": [(0.5, {}), (0.5, {"attention": 0.5, "init": init})]}
       for init in (PAPER, BASE)},
    "1/4 attention": {"attention": 0.25},
    "1/4 attention, stepwise": {"stages": [(0.5, {}), (0.5, {"attention": 0.25, "init": BASE})]},
    **{f"{init}, {what} aligned": {"init": init, "stages": [(0.4, {"align": what, "train": FROZEN}), (0.6, {})]}
       for init in (PAPER, BASE) for what in ("mixer", "hidden")},
    **{f"{init}, mixer aligned, equal time": {"like": f"{init}, mixer aligned"} for init in (PAPER, BASE)},
    "1/8 attention": {"attention": 0.125},
    "no attention": {"attention": 0},
    "reverse KL": {"recipe": {"kl_kind": "reverse"}},
    "Jensen-Shannon": {"recipe": {"kl_kind": "jensen-shannon"}},
    "CE alone": {"recipe": {"kl": 0.0, "ce": 1.0}, "select": "ce"},
    "CE alone, equal time": {"like": "CE alone"},
    "SFT": {"after": BASE, "objective": "sft", "rate": 0.3, "select": "ce", "stages": [(0.5, {})]},
    "SFT, SFT on right answers": {"after": "SFT", "objective": "sft", "pairs": True, "rate": 0.05, "select": "preferences", "stages": [(0.5, {})]},
    **{f"SFT, DPO held to {who}": {"after": "SFT", "objective": "dpo", "pairs": True, "reference": who, "rate": 0.05, "select": "preferences",
                                   "stages": [(0.5, {})]} for who in ("start", "teacher")},
    "window": {"mixer": "window"},
    "window, untrained": {"mixer": "window", "stages": []},
    "identity mixer": {"mixer": "identity"},
}
CLAIMS = [  # (title, the measure that decides, others that are shown, [(arm, its baseline)])
    ("1  init, everything learns", "kl", ("ce", "answers"),
     [("random", None), *((init, "random") for init in INITS[1:]), (BASE, PAPER)]),
    ("1  init, the Mamba layers alone learn (frozen)", "kl", ("ce", "answers"),
     [("random, frozen", None), *((f"{init}, frozen", "random, frozen") for init in INITS[1:]), (f"{BASE}, frozen", f"{PAPER}, frozen")]),
    ("1  frozen against everything", "kl", ("ce", "answers"),
     [*((f"{init}, frozen", init) for init in INITS), (f"{BASE}, frozen, equal time", BASE)]),
    ("2  stepwise: first fewer layers, for half of the steps", "kl", ("ce", "answers"),
     [*((f"{init}, stepwise", init) for init in (PAPER, BASE)), ("1/4 attention", None), ("1/4 attention, stepwise", "1/4 attention")]),
    ("3  alignment for 0.4 of the steps, then KD, against KD alone", "kl", ("ce", "answers"),
     [(f"{init}, {arm}", init) for init in (PAPER, BASE) for arm in ("mixer aligned", "mixer aligned, equal time", "hidden aligned")]),
    ("4  how much attention stays", "kl", ("ce", "answers", "recall"),
     [(BASE, None), ("1/4 attention", BASE), ("1/8 attention", "1/4 attention"), ("no attention", "1/4 attention")]),
    ("5  KD against CE", "ce", ("kl", "answers"),
     [("CE alone", None), *((arm, "CE alone") for arm in (BASE, "reverse KL", "Jensen-Shannon")), (BASE, "CE alone, equal time")]),
    ("6  SFT, then DPO", "preferences", ("kl", "recall", "answers"),
     [(BASE, None), ("SFT", BASE), ("SFT, SFT on right answers", "SFT"),
      *((f"SFT, DPO held to {who}", "SFT, SFT on right answers") for who in ("start", "teacher"))]),
    ("7  other mixers in place of Mamba", "kl", ("ce", "answers", "recall"),
     [(BASE, None), ("window", BASE), ("window, untrained", BASE), ("identity mixer", BASE)]),
    ("8  beyond the length, against the teacher", "ce4", ("ce2", "ce", "recall", "recall2", "recall4", "far"),
     [("teacher", None), *((arm, "teacher") for arm in (BASE, "1/4 attention", "no attention", "window"))]),
]
LONG = {arm for title, *_, pairs in CLAIMS if title[0] == "8" for arm, _ in pairs}
FROM = {arm["after"] for arm in ARMS.values() if "after" in arm}
SHOWN = ("recall", "copy", "arithmetic")  # "answers" is their mean
HIGHER = {"answers", "recall", "recall2", "recall4", "preferences"}  # is better


# ---- data --------------------------------------------------------------------------------------------------------------------


WORD = {word: i for i, word in enumerate(tasks.VOCABULARY)}


def _ids(text):
    return [WORD[word] for word in text.split()]


def _turns(chat):
    """[(ids up to the answer, the answer's ids)] of a chat, in the form of tasks.TEMPLATE."""
    return [(_ids(f"<|user|> {question['content']} <|end|> <|assistant|>"), _ids(f"{answer['content']} <|end|>"))
            for question, answer in zip(chat[::2], chat[1::2])]


def document(rng, length):
    """A row of at most `length` tokens, about all of them; "tasks": of each answer what it shows."""
    (question, answer), *_ = _turns(tasks.recall(rng))
    bar = question.index(WORD["|"])
    facts, form, end = np.reshape(question[2:bar], (-1, 2)).tolist(), question[bar + 1:], answer[2:]  # <|user|> recall key value … | key ? …
    kept, *others = rng.permutation(facts).tolist()

    def ask(fact):
        return [question[0], fact[0], *form[1:]], [*fact, *end]
    turns, last = [], ("recall", *ask(kept))
    room, ready = length - bar - len(last[1]) - len(last[2]), {"asked before": [], "copy": [], "arithmetic": []}
    while True:
        name = ("asked before", "asked before", "copy", "arithmetic")[rng.integers(4)]
        if not ready[name]:
            ready[name] = [ask(fact) for fact in rng.permutation(others).tolist()] if name == "asked before" else _turns(tasks.TASKS[name](rng))
        turn = (name, *ready[name].pop())
        room -= len(turn[1]) + len(turn[2])
        if room < 0:
            break
        turns.append(turn)
    turns.append(last)
    return {"ids": question[:bar + 1] + [i for _, q, a in turns for i in q + a][1:],
            "mask": [0] * bar + [i for _, q, a in turns for i in [0] * len(q) + [1] * len(a)],
            "tasks": [name for name, *_ in turns]}


def pair(rng):
    """A preference row: a question about facts, its answer, and the same with another fact's value."""
    (question, right), *_ = _turns(tasks.recall(rng))
    facts = question[2:question.index(WORD["|"])]  # <|user|> recall key value …
    others = [value for value in facts[1::2] if value != right[1]]
    return {"prompt": question, "chosen": right, "rejected": [right[0], others[rng.integers(len(others))], right[2]]}


@cache
def text(held_out):
    """The bytes of the standard library's files, (n) uint8: every tenth, or the others."""
    files = sorted(path for path in Path(sysconfig.get_path("stdlib")).rglob("*.py") if "site-packages" not in path.parts)
    return np.frombuffer(b"\n".join(path.read_bytes() for i, path in enumerate(files) if (i % 10 == 0) == held_out), np.uint8)


def row(number, seed, length, with_text, held_out=False):
    """Row `number` of a seed; held_out: of those that measure."""
    rng = np.random.default_rng([seed, held_out, number])
    if not with_text or number % 2 == 0:
        return document(rng, length)
    source = text(held_out)
    start = rng.integers(len(source) - length)
    return {"ids": len(WORD) + source[start:start + length].astype(np.int32)}


class HeldOut:
    """Rows that measure a model by its teacher; skip: their first tokens that do not count."""

    def __init__(self, rows, teacher, skip=1):
        rows = sorted(rows, key=lambda row: "tasks" not in row)
        self.teacher, self.ids = teacher, np.zeros((len(rows), max(len(row["ids"]) for row in rows)), np.int32)
        self.exists = np.zeros(self.ids.shape, bool)
        self.targets, self.answers = np.full_like(self.ids, NONE), {}  # {task: [(row, slice of positions) of its answers]}
        for b, row in enumerate(rows):
            n = len(row["ids"])
            self.ids[b, :n], self.exists[b, :n] = row["ids"], True
            counts = np.array(row.get("mask", [1] * n)) == 1
            counts[:skip] = False
            self.targets[b, :n - 1][counts[1:]] = self.ids[b, 1:n][counts[1:]]
            edges = np.flatnonzero(np.diff(counts, prepend=False, append=False)) - 1
            for name, *edge in zip(row.get("tasks", []), edges[::2], edges[1::2]):
                self.answers.setdefault(name, []).append((b, slice(*edge)))

    def measure(self, model):
        out, right = {"ce": 0.0, "kl": 0.0}, np.zeros(self.ids.shape, bool)
        for b in range(0, len(self.ids), 32):
            part = slice(b, b + 32)
            found = model.loss(self.ids[part], self.targets[part], teacher=self.teacher, kl=1.0)
            out = {key: out[key] + found[key] * found["tokens"] / np.count_nonzero(self.targets >= 0) for key in out}
            if any(b <= where < b + 32 for places in self.answers.values() for where, _ in places):
                right[part] = model.logits(self.ids[part]).argmax(axis=-1) == self.targets[part]
        out |= {name: float(np.mean([right[place].all() for place in places])) for name, places in self.answers.items()}
        if self.answers:
            out["answers"] = float(np.mean([out[name] for name in SHOWN if name in out]))
        return out

    def errors(self, model, what):
        """Of each converted layer the mean squared error to the teacher's on the same input."""
        found = np.concatenate([model.align(self.ids[b:b + 32], self.teacher, what, mask=self.exists[b:b + 32])
                                for b in range(0, len(self.ids), 32)], axis=1)
        return [float(value) for value in found.sum(axis=(1, 2), dtype=np.float64) / self.exists.sum()]


# ---- runs --------------------------------------------------------------------------------------------------------------------


class OutOfTime(Exception):
    """The next run would end after the limit."""


class Claims:
    """What the runs share; results.json holds {"of": size …, "teacher", "steps", "runs": {"arm | seed | rate": measures},
    "times": {arm: how many of its steps take as long as one of the base's}}."""

    def __init__(self, args):
        self.args, self.size, self.began = args, SIZES[args.size], time.perf_counter()
        self.limit = args.limit or self.size["limit"]
        self.longest = 0.0  # a run so far, seconds
        self.students = {}  # those that others go on from, by (arm, seed, rate)
        self.out = Path(args.out)
        self.out.mkdir(parents=True, exist_ok=True)
        self.path = self.out / "results.json"
        of = json.loads(json.dumps({"size": args.size, "device": args.device, "dtype": args.dtype, "seeds": SEEDS, "settings": self.size}))
        self.results = json.loads(self.path.read_text()) if self.path.exists() else {"of": of, "times": {}, "runs": {}}
        if self.results["of"] != of:
            raise ValueError(f"{self.path} is of another size, device, dtype or version of this file: name another folder")
        if args.steps and args.steps != self.results.get("steps", args.steps):
            raise ValueError(f"{self.path} is of {self.results['steps']} steps, not of {args.steps}: name another folder")
        self.rows, self.held_out, self.model = cache(self.rows), cache(self.held_out), cache(self.model)
        self.pairs, self.calibrated = cache(self.pairs), cache(self.calibrated)
        self.teacher = self._teacher()
        self.arms = {name: arm for name, arm in ARMS.items() if len(self.teacher.layer_kinds) >= 8 or arm.get("attention") != 0.125}
        self.steps = args.steps or self.results.get("steps") or self._plan()
        self._keep(steps=self.steps)

    def spent(self):
        return time.perf_counter() - self.began

    def _keep(self, **more):
        self.results |= more
        mark = self.path.with_suffix(".tmp")
        mark.write_text(json.dumps(self.results, indent=1))
        mark.replace(self.path)

    def _teacher(self):
        folder, size, given = self.out / "teacher", self.size, self.size["teacher"]
        if not (folder / "config.json").exists():
            config = CONFIG | size["model"] | {"vocab_size": len(WORD) + 256 * size["text"]}
            recipe = {"length": size["length"], "batch": given["batch"], "lr": given["lr"], "betas": [0.9, 0.98], "weight_decay": given["decay"]}
            rows = [row(i, 1_000_003, size["length"], size["text"]) for i in range(given["rows"])]
            steps = self.args.teacher_steps
            if not steps:
                trial = mil.random(config, device=self.args.device, dtype=self.args.dtype)
                mil.train(trial, rows[:20 * given["batch"]], recipe | {"steps": 5}, progress=False)
                step = mil.train(trial, rows[:20 * given["batch"]], recipe | {"steps": 20}, progress=False)["seconds"] / 20
                steps = max(1, min(given["steps"], int((self.limit / 3 - self.spent()) / step)))
            teacher = mil.random(config, seed=SWEEP, device=self.args.device, dtype=self.args.dtype)
            report = mil.train(teacher, rows, recipe | {"steps": steps})
            mil.save(teacher, folder)
            self._keep(teacher={"steps": steps, "tokens": report["tokens"], "seconds": report["seconds"]})
        return mil.load(folder, device=self.args.device)

    def _plan(self):
        """Steps of a run by the time of one, and of what goes with it."""
        least, most = self.size["steps"]
        for _ in range(2):  # the first is slow
            start = time.perf_counter()
            student, done = self._learn(BASE, SWEEP, self.size["rates"][0], 10)
            self.held_out(SWEEP).measure(student)
            around, step = time.perf_counter() - start - done["seconds"], done["seconds"] / 10
        runs = sum(len(SEEDS) + (len(self.size["rates"]) if arm.get("stages", KD) and "like" not in arm else 0) for arm in self.arms.values())
        return int(np.clip((0.9 * (self.limit - self.spent()) / runs - around) / step, least, most))

    # -- of a seed

    def rows(self, seed):
        """What an arm learns from, as long a list as has been needed."""
        return []

    def some(self, seed, begin, end):
        rows = self.rows(seed)
        rows += [row(i, seed, self.size["length"], self.size["text"]) for i in range(len(rows), end)]
        return rows[begin:end]

    def pairs(self, seed, held_out=False):
        rng = np.random.default_rng([seed, held_out, 1_000_003])
        return [pair(rng) for _ in range(256 if held_out else 2048)]

    def held_out(self, seed, times=1, text=None):
        """Rows of `times` the length; text: these of text alone, of which what is beyond the length counts."""
        size, count = self.size, self.size["held_out"] // (1 if times == 1 else 3)
        if text:
            return HeldOut([row(2 * i + 1, seed, times * size["length"], True, True) for i in range(count)], self.teacher, size["length"])
        rows = [row(i, seed, times * size["length"], size["text"] and times == 1, True) for i in range(count)]
        return HeldOut(rows, self.teacher)

    # -- of an arm

    def calibrated(self, share, seed):
        return mil.convert(self.teacher, attention=share, init="calibrated", seed=seed, data=self.some(seed, 0, TOKENS // self.size["length"]))

    def start(self, arm, seed):
        """The arm's student before it learns, sharing with the teacher what it has of it."""
        share, mixer = arm.get("attention", 0.5), arm.get("mixer", "mamba2")
        init = arm.get("init", BASE) if mixer == "mamba2" and share < 1 else "attention"
        if init == "calibrated":
            return mil.convert(self.calibrated(share, seed), mamba_layers=[])
        window = {"window": self.window(), "sinks": SINKS} if mixer == "window" else {}
        return mil.convert(self.teacher, attention=share, init=init, mixer=mixer, seed=seed, **window)

    def window(self):
        """How many tokens a window has besides the sinks, so that K and V take as many bytes as Mamba-2's state."""
        arch, real = architecture(self.teacher.config), 2 if self.teacher.dtype == "bfloat16" else 4
        one = memory(arch | {"kinds": ["attention"]}, real)["kv_bytes_per_token"]
        return memory(arch | {"kinds": ["mamba2"], "conv": 4}, real)["state_bytes_per_sequence"] // one - SINKS

    def _learn(self, name, seed, rate, steps):
        """(the student, {"steps", "tokens", "seconds"} and what stages tell) of an arm at a learning rate."""
        arm = self.arms[self.arms[name].get("like", name)]
        student = mil.convert(self.model(arm["after"], seed), mamba_layers=[]) if "after" in arm else self.start(arm, seed)
        kinds, done = len(student.layer_kinds), {"steps": 0, "tokens": 0, "seconds": 0.0}
        for share, stage in arm.get("stages", KD):
            n = max(1, round(share * steps))
            stage = {**stage, "steps": n}
            if "attention" in stage:
                kept = kept_attention(kinds, stage.pop("attention"))
                stage["mamba_layers"] = [i for i in range(kinds) if i not in kept]
            recipe = {"length": self.size["length"], "batch": self.size["batch"], "lr": rate * arm.get("rate", 1), "seed": seed,
                      **arm.get("recipe", {}), "stages": [stage]}
            begin = done["steps"] * self.size["batch"]
            rows = self.some(seed, begin, begin + n * self.size["batch"])
            if arm.get("pairs"):
                rows = self.pairs(seed)
                recipe |= {"length": 32, "batch": self.size["batch"] // 2}
            before = self.held_out(seed).errors(student, stage["align"]) if "align" in stage else None
            if arm.get("objective") == "dpo":
                report = mil.dpo(student, rows, recipe, self.teacher if arm["reference"] == "teacher" else "start", progress=False)
            elif arm.get("objective") == "sft":
                if arm.get("pairs"):
                    rows = [{"ids": r["prompt"] + r["chosen"], "mask": [0] * len(r["prompt"]) + [1] * len(r["chosen"])} for r in rows]
                report = mil.sft(student, [{"mask": [1] * len(r["ids"]), **r} for r in rows], recipe, progress=False)
            else:
                report = mil.distill(student, self.teacher, rows, recipe, progress=False)
            done |= {"steps": done["steps"] + n, "tokens": done["tokens"] + report["tokens"], "seconds": done["seconds"] + report["seconds"]}
            if before:
                done["errors"] = [before, self.held_out(seed).errors(student, stage["align"])]
        return student, done

    def model(self, name, seed):
        """The student of an arm at its best rate."""
        rate = self.rate(name)
        self.run(name, seed, rate)
        return self.students.get((name, seed, rate)) or self._learn(name, seed, rate, self.steps)[0]

    def run(self, name, seed, rate):
        """The measures of an arm on a seed, computed unless they are known."""
        key = f"{name} | {seed} | {rate:g}"
        if key not in self.results["runs"]:
            if self.spent() + self.longest > self.limit:
                raise OutOfTime
            start, arm, steps = time.perf_counter(), self.arms[name], self.steps
            if "like" in arm:
                steps = max(1, round(steps * self.times(arm["like"])))
            student, done = self._learn(name, seed, rate, steps)
            found = done | self.held_out(seed).measure(student)
            pairs = self.pairs(seed, True)
            right, wrong = (self._log_probs(student, pairs, which) for which in ("chosen", "rejected"))
            found["preferences"] = float((right > wrong).mean())
            if name in LONG and seed != SWEEP:
                for times in (2, 4):
                    far = self.held_out(seed, times).measure(student)
                    found |= {f"{key}{times}": far[key] for key in ("recall", "ce")}
                if self.size["text"]:
                    found["far"] = self.held_out(seed, 4, True).measure(student)["ce"]
            if name in FROM:
                self.students[name, seed, rate] = student
            self.results["runs"][key] = found
            self._keep()
            self.longest = max(self.longest, time.perf_counter() - start)
            print(f"{self.spent():6.1f} s  {key:60s} steps {done['steps']:4d}  kl {found['kl']:.4f}  answers {found['answers']:.2f}", flush=True)
        return self.results["runs"][key]

    def _log_probs(self, model, pairs, which):
        """Of the answers, (pairs)."""
        ids = np.zeros((len(pairs), max(len(p["prompt"] + p[which]) for p in pairs)), np.int32)
        targets = np.full_like(ids, NONE)
        for b, p in enumerate(pairs):
            start, both = len(p["prompt"]), p["prompt"] + p[which]
            ids[b, :len(both)] = both
            targets[b, start - 1:len(both) - 1] = p[which]
        return model.log_probs(ids, targets).sum(axis=1, dtype=np.float64)

    def sweep(self, name):
        """{rate: measures on the seed that is not reported}."""
        return {rate: self.run(name, SWEEP, rate) for rate in self.size["rates"]}

    def times(self, name):
        """How many steps of an arm take as long as one of the base's: both in turn, so that what else the machine does is in both."""
        if name not in self.results["times"]:
            found = {BASE: [], name: []}
            for _ in range(4):
                for which, seconds in found.items():
                    done = self._learn(which, SWEEP, self.size["rates"][0], 20)[1]
                    seconds.append(done["seconds"] / done["steps"])
            self.results["times"][name] = min(found[BASE][1:]) / min(found[name][1:])
        return self.results["times"][name]

    def rate(self, name):
        """The best of the sweep; 0 for what does not learn."""
        arm = self.arms[name]
        if not arm.get("stages", KD):
            return 0
        by, sign = arm.get("select", "kl"), -1 if arm.get("select") == "preferences" else 1
        found = self.sweep(arm.get("like", name))
        return min(found, key=lambda rate: (sign * found[rate][by], found[rate]["kl"]))

    def reported(self, name):
        """(rate, [measures]) of an arm's seeds, as far as time allows."""
        rate, found = None, []
        try:
            rate = self.rate(name)
            for seed in SEEDS:
                found.append(self.run(name, seed, rate))
        except OutOfTime:
            pass
        return rate, found


# ---- tables ------------------------------------------------------------------------------------------------------------------


def compare(values, baseline, metric):
    """(mean difference, [low, high], verdict): paired, 95 % of Student's t; fewer than two of both: no interval."""
    difference = np.array(values) - np.array(baseline)
    mean, n = float(difference.mean()), len(difference)
    if n < 2:
        return mean, None, "one seed: no verdict"
    half = float(stdtrit(n - 1, 0.975) * difference.std(ddof=1) / n**0.5)
    low, high = mean - half, mean + half
    if low <= 0 <= high:
        return mean, [low, high], "no difference shown"
    return mean, [low, high], "better" if (mean > 0) == (metric in HIGHER) else "worse"


def table(claims, title, metric, others, pairs):
    """Computes what a claim needs, prints it and returns it for JSON."""
    arms = dict.fromkeys([baseline for _, baseline in pairs if baseline] + [name for name, _ in pairs])
    found = {name: claims.reported(name) for name in arms if name in claims.arms}
    wide, rates = max(map(len, arms)), claims.size["rates"]
    print(f"\n{title}: {metric}\n{'':{wide}s} {'lr':>7s} {'steps':>5s} {'s':>6s} " + " ".join(f"{f'seed {s}':>8s}" for s in SEEDS) +
          f" {'mean':>8s}  " + " ".join(f"{other:>8s}" for other in others if other != "far" or claims.size["text"]) + "  difference to the baseline")
    out = []
    for name, baseline in pairs:
        if name not in found:
            print(f"{name:{wide}s} left out: it needs 8 layers")
            continue
        rate, runs = found[name]
        values, against = [run[metric] for run in runs], [run[metric] for run in found[baseline][1]] if baseline else []
        both = min(len(values), len(against))
        entry = {"arm": name, "baseline": baseline, "rate": rate, "values": values}
        text = ""
        if both:
            mean, interval, verdict = compare(values[:both], against[:both], metric)
            entry |= {"difference": mean, "interval": interval, "verdict": verdict}
            text = f"{mean:+.4f} " + (f"[{interval[0]:+.4f}, {interval[1]:+.4f}] " if interval else "")
            text += f"{verdict} {'than' if verdict in ('better', 'worse') else 'from'} {baseline}"
        out.append(entry)
        cells = [f"{value:8.4f}" for value in values] + [f"{'-':>8s}"] * (len(SEEDS) - len(values))
        if runs:
            arm = claims.arms[name]
            multiple = arm.get("rate", claims.arms.get(arm.get("like"), {}).get("rate", 1))
            edge = "*" if len(rates) > 2 and rate in (rates[0], rates[-1]) else " "
            shown = [f"{np.mean([run[other] for run in runs]):8.4f}" for other in others if other in runs[0]]
            print(f"{name:{wide}s} {rate * multiple:6.0e}{edge} {runs[0]['steps']:5d} {np.mean([run['seconds'] for run in runs]):6.2f} " +
                  " ".join([*cells, f"{np.mean(values):8.4f} ", *shown, "", text]))
        else:
            print(f"{name:{wide}s} no time was left")
        for seed, run in zip(SEEDS, runs):
            if "errors" in run:
                print(f"{'':{wide}s} seed {seed}: error of each layer after the alignment, as a share of before: " +
                      " ".join(f"{after / before:.3f}" for before, after in zip(*run["errors"])))
    if "window" in found:
        print(f"window: {claims.window()} tokens and {SINKS} sinks, as many bytes as Mamba-2's state")
    return {"claim": title, "metric": metric, "arms": out}


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="small", choices=list(SIZES))
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cpu for small, cuda for gpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="of the matrices, default: float32 on cpu, bfloat16 on cuda")
    parser.add_argument("--limit", type=float, help="seconds after which no run is started (default: 180 for small, 525 for gpu)")
    parser.add_argument("--claims", nargs="*", help="numbers of the claims (default: all, in order)")
    parser.add_argument("--steps", type=int, help="of an arm (default: what fits the limit)")
    parser.add_argument("--teacher-steps", type=int, help="default: what fits a third of the limit")
    parser.add_argument("--out", required=True, help="folder of the teacher and results.json")
    args = parser.parse_args(arguments)
    args.device = args.device or {"small": "cpu", "gpu": "cuda"}[args.size]
    args.dtype = args.dtype or {"cpu": "float32", "cuda": "bfloat16"}[args.device]
    try:
        claims = Claims(args)
    except ValueError as error:
        parser.error(str(error))
    teacher = claims.held_out(SWEEP).measure(claims.start(ARMS["teacher"], SWEEP))
    print(f"{claims.spent():6.1f} s  teacher: " + ", ".join(f"{key} {value:.3f}" for key, value in teacher.items() if key != "kl") +
          f"; {claims.steps} steps of {claims.size['batch']} x {claims.size['length']} tokens an arm\n")
    chosen = [claim for claim in CLAIMS if not args.claims or claim[0][0] in args.claims]
    tables = [table(claims, *claim) for claim in chosen]
    if len(claims.size["rates"]) > 2:
        print("\n* the best rate is the first or last of the grid")
    if teacher["answers"] < 0.9:
        print(f"The teacher answers {teacher['answers']:.0%} right: what follows from it is of a poor teacher")
    complete = all(len(arm["values"]) == len(SEEDS) for found in tables for arm in found["arms"])
    if not complete:
        print(f"The limit of {claims.limit:g} s ended it; the same call goes on with what is missing")
    print(json.dumps({**claims.results["of"], "times": claims.results["times"], "steps": claims.steps, "seconds": claims.spent(),
                      "complete": complete, "teacher": teacher, "claims": tables}))


if __name__ == "__main__":
    main()
