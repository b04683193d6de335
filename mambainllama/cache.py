"""What a teacher predicts after every token of some data, computed once: the k likeliest next tokens, their log-probabilities, and the log
of what all others have together. mil.distill learns from the folder in the teacher's place.

cache.json says of what the cache is, how far it is, and what k leaves out. The rest is an entry for each token of the data's documents
end to end (Batches.ids): ids.npy (N,k) int32, log_probs.npy (N,k) float32, tail.npy (N) float32; 8 k + 4 bytes a token, 260 for k = 32,
read by memory map. Documents are cut into pieces of at most `length` tokens as training cuts them, and a piece sees nothing before it,
so a run on the same data with the same length finds what the teacher predicts after each of its tokens, in whatever row they are.

The KL to a cache is over k+1 outcomes, the k tokens and any other, so it is at most the KL to the teacher. How much it lacks depends on
the student: cache.json has it for one, "bias". Padding, which kl_kind "paper" counts with a teacher, has no entry and counts as 0."""
import json
import os
import time
from itertools import islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

from .config import read_json, said
from .convert import convert
from .data import Batches, read
from .parallel import lost, ranks
from .recipe import load_recipe, settings
from .weights import replacing, writing

EVERY = 16  # batches, or some more on several ranks, after which a cache marks how far it is
SAMPLE = 4  # batches that its bias is measured on
SAME = ("data", "tokens", "length", "batch", "k", "temperature", "vocab", "teacher")  # what a cache is of


def cache(teacher, data, out, length=2048, k=32, temperature=1.0, batch=8, student=None, progress=None):
    """Writes the folder `out`; → cache.json's dict. Called again with the same, it goes on from its last mark; what is finished stays as it is.

    data: as for distill; length, batch, temperature: as in a recipe, length and temperature those of the runs to come. student: whose bias
    is measured, on the teacher's backend (default: the teacher, half of its attention freshly converted). progress: True or False for
    the bar; None: only on a terminal. On several ranks (parallel.py) each computes a share of the batches.

    cache.json: "data", "teacher" (fingerprints), "tokens", "length", "batch", "k", "temperature", "vocab", "bytes_per_token", "batches",
    "done" (of them). When all are: "tail_mass", the mean mass of all but the k tokens, and, of the first batches, "full_kl",
    temperature² · KL(teacher || student), "cached_kl", the same over k+1 outcomes, and "bias" = cached_kl - full_kl, at most 0 but for
    rounding. ValueError: bad data or settings, `out` holds another cache or a damaged one. OSError: no room for the files, which take
    their whole size at the start, or no right to write. Ctrl-C: KeyboardInterrupt; what is done is kept."""
    recipe = load_recipe({"steps": 1, "length": length, "batch": batch, "temperature": temperature})
    length, batch, temperature = (recipe[key] for key in ("length", "batch", "temperature"))
    vocab = teacher.config["vocab_size"]
    if isinstance(k, bool) or not isinstance(k, (int, np.integer)) or not 1 <= k <= vocab:
        raise ValueError(f"cache: k must be an integer from 1 to the vocabulary's {vocab}, not {k!r}")
    if student and (student.module is not teacher.module or student.config["vocab_size"] != vocab):
        raise ValueError("cache: teacher and student must be on one backend and have one vocabulary")
    with ranks().job(lost(out)):
        return _cache(teacher, data, Path(out), length, int(k), temperature, batch, student, progress if ranks().first else False)


def _cache(teacher, data, folder, length, k, temperature, batch, student, progress):
    def packed():
        return Batches(read(data, teacher.tokenizer, teacher.config["vocab_size"], progress=progress), length, batch, shuffle=False)
    batches = ranks().in_turn(packed)
    about = {"data": batches.fingerprint, "tokens": len(batches.ids), "length": length, "batch": batch, "k": k,
             "temperature": temperature, "vocab": teacher.config["vocab_size"], "teacher": teacher.fingerprint(), "bytes_per_token": 8 * k + 4,
             "batches": -(-len(batches) // batch), "done": 0}
    report = ranks().in_turn(lambda: _begin(folder, about))
    if "bias" in report:
        return report
    files = _files(folder, report, "r+" if ranks().first else "r")

    def mark():
        if not ranks().first:
            return
        with writing(folder):
            for file in files:
                file.flush()
        _write(folder, report)
    with tqdm(total=report["batches"], initial=report["done"], unit="batch", dynamic_ncols=True,
              disable=None if progress is None else not progress) as bar:
        try:
            mine = ranks().part(islice(zip(batches.once(), batches.positions_once()), report["done"], None))
            while report["done"] < report["batches"]:  # each rank computes a batch, the first one writes them all
                tick, before = time.perf_counter(), report["done"]
                found = [one for one in ranks().every(next((_predicted(teacher, k, temperature, *one) for one in mine), None)) if one]
                for at, values in found if ranks().first else ():
                    for file, array in zip(files, values):
                        file[at] = array
                report["done"] += len(found)
                if report["done"] // EVERY != before // EVERY:
                    mark()
                bar.set_postfix({"tokens/s": f"{sum(len(at) for at, _ in found) / (time.perf_counter() - tick):.0f}"}, refresh=False)
                bar.update(len(found))
        except KeyboardInterrupt:
            mark()
            raise KeyboardInterrupt(f"{report['done']} of {report['batches']} batches are done; the same call goes on from {folder}") from None
    mark()
    if ranks().first:
        cached, student = Cache(folder, report), student or convert(teacher, attention=0.5, check=False)
        report |= {"tail_mass": cached.tail_mass(batches), **_bias(cached, teacher, student, batches)}
        _write(folder, report)
    return ranks().every(report)[0]


def _predicted(teacher, k, temperature, batch, at):
    """(positions, what the cache has there), of a batch."""
    (ids, _, prev), known = batch, at >= 0
    return at[known], [values[known] for values in teacher.top_log_probs(ids, k, temperature, prev)]


def _begin(folder, about):
    """cache.json of a cache that was begun before, or of one that begins now."""
    if (folder / "cache.json").exists():
        report = _read(folder)
        for key in SAME:
            if report[key] != about[key]:
                what = f"another {key}" if key in ("data", "teacher") else f"{key} {report[key]!r}, not {about[key]!r}"
                raise ValueError(f"{folder} holds a cache of {what}; go on with the same, or name another folder")
        return report
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name, kind, shape in _arrays(about):
            np.lib.format.open_memmap(folder / f"{name}.npy", "w+", kind, shape)
            with open(folder / f"{name}.npy", "r+b") as file:  # a full disk is an error now and not a signal later
                os.posix_fallocate(file.fileno(), 0, os.path.getsize(folder / f"{name}.npy"))
    _write(folder, about)
    return about


def _read(folder):
    report = read_json(folder / "cache.json")
    lacks = [key for key in (*SAME, "batches", "done") if key not in report]
    if lacks:
        raise ValueError(f"{folder / 'cache.json'} lacks {lacks[0]}")
    return report


def _arrays(about):
    """(name, dtype, shape) of the files."""
    n, k = about["tokens"], about["k"]
    return ("ids", np.int32, (n, k)), ("log_probs", np.float32, (n, k)), ("tail", np.float32, (n,))


def _files(folder, about, mode):
    """The files, memory-mapped."""
    found = []
    for name, kind, shape in _arrays(about):
        path = folder / f"{name}.npy"
        try:
            array = np.load(path, mmap_mode=mode)
            if array.dtype != kind or array.shape != shape:
                raise ValueError(f"it holds {array.dtype} {array.shape}, expected {np.dtype(kind)} {shape}")
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(f"{path} is missing or damaged ({said(error)}); without {folder} the cache begins again") from None
        found.append(array)
    return found


def _write(folder, report):
    with replacing(folder / "cache.json") as file:
        file.write(json.dumps(report, indent=1).encode())


def _bias(cached, teacher, student, batches):
    """{"full_kl", "cached_kl", "bias"} of the first batches."""
    sums, tokens = np.zeros(2), 0
    for (ids, targets, prev), at in islice(zip(batches.once(), batches.positions_once()), SAMPLE):
        found = [student.loss(ids, targets, teacher=how, ce=0.0, kl=1.0, temperature=cached.about["temperature"], prev=prev)
                 for how in (teacher, cached.at(at))]
        sums += [values["kl"] * values["tokens"] for values in found]
        tokens += found[0]["tokens"]
    full, less = (sums / tokens).tolist()
    return {"full_kl": full, "cached_kl": less, "bias": less - full}


class Cache:
    """A folder that `cache` has finished: in a run, the teacher."""

    def __init__(self, folder, about=None):
        """ValueError: no cache, one that is not finished, a damaged one."""
        self.folder, self.about = Path(folder), about
        if about is None:
            if not (self.folder / "cache.json").exists():
                raise ValueError(f"{folder} is no cache of a teacher's predictions: it has no cache.json")
            self.about = about = _read(self.folder)
            if "bias" not in about:
                raise ValueError(f"{folder} is not finished: {about['done']} of {about['batches']} batches are done; "
                                 "`mambainllama cache` with the same arguments goes on with it")
        self.files = _files(self.folder, about, "r")

    def fingerprint(self):
        return f"{self.about['teacher']}, the {self.about['k']} likeliest"

    def check(self, student, recipe):
        """ValueError: not a teacher for this student and recipe."""
        what, about, vocab = f"{self.folder} is a cache", self.about, student.config["vocab_size"]
        if about["vocab"] != vocab:
            raise ValueError(f"{what} of a teacher with {about['vocab']} tokens, and the student has {vocab}")
        if about["length"] != recipe["length"]:
            raise ValueError(f"{what} of pieces of {about['length']} tokens, and the recipe's length is {recipe['length']}")
        for stage in (settings(recipe, stage) for stage in recipe["stages"]):
            if stage["align"]:
                raise ValueError(f"recipe: align needs the teacher's layers, and {self.folder} has its predictions alone")
            if stage["kl"] and stage["temperature"] != about["temperature"]:
                raise ValueError(f"{what} at temperature {about['temperature']:g}, and the recipe's is {stage['temperature']:g}")

    def at(self, positions):
        """What Model.loss takes for a teacher at positions (B,T) of the data's tokens; -1: nothing."""
        ids, log_probs, tail = (file[np.maximum(positions, 0)] for file in self.files)
        ids[positions < 0] = -1
        return ids, log_probs, tail

    def tail_mass(self, batches):
        """The mean over batches' tokens."""
        mass = tokens = 0
        for at in batches.positions_once():
            mass += float(np.exp(self.files[2][at[at >= 0]], dtype=np.float64).sum())
            tokens += int((at >= 0).sum())
        return mass / tokens


class CachedBatches(Batches):
    """Batches of which take(rows) has a fourth part: what the cache has of it."""

    def __init__(self, cached, *args, **options):
        super().__init__(*args, **options)
        self.cached = cached
        if cached.about["data"] != self.fingerprint:
            raise ValueError(f"{cached.folder} is a cache of other data than this run's: rows, tokenizer and chat template must be the same")

    def take(self, rows):
        layout = self._layout(rows)
        return *self._batch(*layout), self.cached.at(layout[0])
