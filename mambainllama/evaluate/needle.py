"""What a model finds again in long texts, and how it predicts there: recall.py's probes over depth and length, and perplexity by position."""
import re

import numpy as np

from ..recall import DEPTHS, FILLER, HEAD, NEEDLE, QUESTION, _has_digits, by_ids
from ..recall import needle as find
from .figures import heat_maps, lines, save
from .run import Records, Run, bar, digest, read_text

PASSKEY = (HEAD, NEEDLE, QUESTION)
MAGIC = ("A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you about the number afterwards.",
         " The special magic number for San Francisco is: {key}.",
         " What is the special magic number for San Francisco mentioned in the provided text? The special magic number for San Francisco mentioned in "
         "the provided text is")  # RULER's single needle (arXiv 2404.06654), always of one word
LENGTHS = (256, 512, 1024, 2048, 4096)


def needle(model, out, lengths=LENGTHS, depths=DEPTHS, items=8, text=None, seed=0, batch=8, name=None, progress=None):
    """Results, also in out/results.json with out/needle.svg and out/positions.svg:

    "passkey", "needle"      {length: {depth: share of `items` numbers that greedy generation names}}: a pass key in filler (Mohtashami & Jaggi), and
                             RULER's needle in `text` (a path; None: in the filler too). They need a tokenizer with digits.
    "associative", "copy"    {length: accuracy} of recall's probes: how they hold where the model was not trained for the length
    "perplexity"             {"position": upper ends, "value": …} of `text`, or of the filler's sentences in random order; without a tokenizer, None

    Each cell is kept as it is computed; the same call goes on. ValueError: a length without room for the question."""
    lengths, depths = [int(n) for n in lengths], [float(d) for d in depths]
    hay = read_text(text) if text else None
    settings = {"lengths": lengths, "depths": depths, "items": items, "text": hay and digest(hay), "seed": seed}
    run = Run(out, "needle", model, settings, name)
    spoken = model.tokenizer is not None and _has_digits(model.tokenizer)
    records = Records(run.out / "cells.jsonl", lambda row: (row["what"], row["length"], row["depth"]))
    cells = [("recall", n, None) for n in lengths] + ([("perplexity", max(lengths), None)] if spoken else [])
    cells += [(what, n, d) for what in ("passkey", "needle") for n in lengths for d in depths] if spoken else []
    with bar("cells", len(cells), sum(cell in records.rows for cell in cells), progress) as shown:
        for cell in cells:
            if cell not in records.rows:
                records.add({"what": cell[0], "length": cell[1], "depth": cell[2], "value": _cell(model, *cell, items, hay, seed, batch)})
                shown.update()
    value = {cell: records.rows[cell]["value"] for cell in cells}
    tables = {what: {n: {d: value[what, n, d] for d in depths} for n in lengths} for what in ("passkey", "needle")} if spoken else {}
    curves = {what: {n: value["recall", n, None][what] for n in lengths} for what in ("associative", "copy")}
    perplexity = value["perplexity", max(lengths), None] if spoken else None
    scores = {what: float(np.mean([share for row in table.values() for share in row.values()])) for what, table in tables.items()}
    scores |= {what: float(np.mean(list(curve.values()))) for what, curve in curves.items()}
    if perplexity:
        scores["perplexity"] = perplexity["mean"]
    kept = {what: {f"{n} tokens, depth {d:g}": share for n, row in table.items() for d, share in row.items()} for what, table in tables.items()}
    if tables:
        save(heat_maps(tables), run.out / "needle.svg")
    results = run.finish(scores, kept, **tables, **curves, perplexity=perplexity)
    save(lines(panels({run.about["model"]: results})), run.out / "positions.svg")
    return results


def panels(models):
    """What figures.lines takes, of {model: results}."""
    def curves(what):
        return {model: ([int(n) for n in found[what]], list(found[what].values())) for model, found in models.items()}
    shown = {"associative recall": ("length (tokens)", "accuracy", curves("associative")), "copying": ("length (tokens)", "accuracy", curves("copy"))}
    perplexity = {model: (found["perplexity"]["position"], found["perplexity"]["value"]) for model, found in models.items() if found["perplexity"]}
    return shown | ({"perplexity by position": ("position (tokens)", "perplexity", perplexity)} if perplexity else {})


def _cell(model, what, length, depth, items, text, seed, batch):
    if what == "recall":
        return by_ids(model, length, items, seed, batch=batch)
    if what == "perplexity":
        return perplexity_by_position(model, length, text, items, seed)
    words, filler = (PASSKEY, FILLER) if what == "passkey" else (MAGIC, text or FILLER)
    return find(model, [length], [depth], items, seed, filler, batch, words)[length][depth]


def perplexity_by_position(model, length, text=None, items=8, seed=0):
    """{"position": [64, 128, …, length], "value": perplexity of the tokens between an end and the one before, "mean": of all} over up to `items`
    rows of `length` tokens: of the text, one after the other, or of the filler's sentences in random order."""
    tokenizer = model.tokenizer
    if text is None:
        rng = np.random.RandomState([seed & 0xFFFFFFFF, length])
        sentences = re.split(r"(?<=[.!?])\s+", FILLER)
        rows = [tokenizer.encode(" ".join(rng.choice(sentences, length)))[:length + 1] for _ in range(items)]
    else:
        ids = tokenizer.encode(text)
        rows = [ids[at:at + length + 1] for at in range(0, len(ids), length + 1)][:items]
    rows = [row for row in rows if len(row) == length + 1]
    if not rows:
        raise ValueError(f"needle: the text has fewer than {length + 1} tokens")
    losses = np.concatenate([-model.log_probs(np.array([row[:-1]], np.int32), np.array([row[1:]], np.int32)) for row in rows]).mean(0, dtype=np.float64)
    ends = [64 << i for i in range(32) if 64 << i < length] + [length]
    means = [float(np.exp(losses[start:end].mean())) for start, end in zip([0, *ends], ends)]
    return {"position": ends, "value": means, "mean": float(np.exp(losses.mean())), "rows": len(rows)}
