"""A model's answers to the rows of a file, written as training data: the first half of sequence-level distillation.

A row asks with one of KINDS. Each answer is one line of `out`, appended whole as soon as it is complete, so whatever ends
the process leaves whole lines and at most one torn at the end. A sampled answer's uniforms are numbered by the row's own index,
so a line is the same in any batch, shard and order, and after any number of restarts."""
import hashlib
import json
import os
import time

import numpy as np
from tqdm import tqdm

from . import data
from .generate import ROWS, encode_prompt, generate
from .weights import writing

KINDS = ("messages", "prompt", "text", "ids", "tokens")
CALL = 64  # batches that one call of generate gets: few of its rounds have empty seats, and only its prompts are held twice
BEGIN = b'{"index": '  # of every line


def answer(model, rows, out, max_new_tokens=64, temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, seed=0, batch=None,
           shard=(0, 1), progress=None):
    """Generates the answer to each row, longest prompts first, and writes it to `out`; -> {"rows", "answered", "new_tokens",
    "seconds", "tokens_per_second"}: the rows that this call is for, and of them those that were not yet in `out`.

    rows      data (data.py: a path, a list of dicts …), each with one of "messages" (a chat; an assistant's turn at its end is
              dropped and generated anew), "prompt" (text, a chat or token ids), "text", "ids", "tokens"
    out       a JSONL path. Called again with it and the same settings, the rows that it holds are skipped.
    max_new_tokens, temperature, top_k, top_p, min_p, seed, batch: as in generate
    shard     (i, n): only rows whose index modulo n is i, for n processes with a file each. Their lines together are those of
              one process, in another order.
    progress  True or False for the bar; None: only on a terminal

    A line: "index" of the row from 0 (blank lines do not count) and "hash" of what it asks; a row of training data; "answer",
    its text; "answer_ids"; "finish", "stop" or "length"; "settings". The training row is a chat's "messages" with the answer as
    its last turn where that came to its end; else "ids" and "mask" (1 on the answer and its stop token), since a template would
    give an answer that was cut off an end that it has not.

    ValueError: a row that cannot be used, by its line; `out` has answers to other rows or with other settings. OSError: `out`
    cannot be written. Ctrl-C: KeyboardInterrupt; the answers that are complete are in `out`."""
    how = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p,
           "seed": seed}
    generate(model, [], batch=batch, **how)  # refuses a bad value before any work
    settings = {**how, "model": model.folder and os.path.basename(model.folder)}
    if not 0 <= shard[0] < shard[1]:
        raise ValueError(f"answer: shard must be (i, n) with i from 0 to n - 1, not {shard!r}")
    have, end = _written(out, settings)
    count, asked = _asked(model, rows, out, have, shard)
    asked.sort(key=lambda row: -len(row["ids"]))  # a batch's rows are of similar length, and memory that lacks does so at once
    report = {"rows": count, "answered": 0, "new_tokens": 0, "seconds": 0.0, "tokens_per_second": 0.0}
    began = time.perf_counter()
    with writing(out), open(out, "ab") as file, tqdm(total=count, initial=count - len(asked), unit="row", dynamic_ncols=True,
                                                     disable=None if progress is None else not progress) as bar:
        file.truncate(end)
        for start in range(0, len(asked), CALL * (batch or ROWS)):
            part = asked[start:start + CALL * (batch or ROWS)]

            def write(place, answered):
                line = _line(part[place], answered) | {"settings": settings}
                file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
                file.flush()
                report["answered"] += 1
                report["new_tokens"] += len(answered.tokens)
                report["seconds"] = time.perf_counter() - began
                report["tokens_per_second"] = report["new_tokens"] / report["seconds"]
                bar.set_postfix({"tokens/s": f"{report['tokens_per_second']:.0f}"}, refresh=False)
                bar.update()
            try:
                generate(model, [row["ids"] for row in part], index=[row["index"] for row in part], batch=batch, finished=write,
                         **how)
            except KeyboardInterrupt:
                done = count - len(asked) + report["answered"]
                raise KeyboardInterrupt(f"{done} of {count} rows are answered; the same call goes on from {out}") from None
    return report


def _written(out, settings):
    """({index: hash} of the answers that `out` has, bytes of its whole lines)."""
    have, end = {}, 0
    if not os.path.exists(out):
        return have, end
    with open(out, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n") and BEGIN.startswith(line[:len(BEGIN)]):
                break  # torn: its row is asked again
            try:
                row = json.loads(line)
                have[row["index"]], theirs = row["hash"], dict(row["settings"])
            except (ValueError, TypeError, KeyError):
                raise ValueError(f"{out}:{number}: not an answer's line, so nothing is written to this file") from None
            if theirs != settings:
                differ = ", ".join(f"{key} {theirs.get(key)!r}" for key in settings if theirs.get(key) != settings[key])
                raise ValueError(f"{out}:{number}: answered with other settings ({differ}): give the same, or another file")
            end += len(line)
    return have, end


def _asked(model, rows, out, have, shard):
    """(number of the shard's rows, those of them that `have` lacks: [{"index", "hash", "prompt", "ids" (n) int32}])."""
    part, parts = shard
    asked, count, total = [], 0, 0
    for index, (where, row) in enumerate(data.rows(rows, "rows")):
        total += 1
        prompt = _prompt(where, row)
        digest = hashlib.sha256(json.dumps(prompt, sort_keys=True).encode()).hexdigest()[:16]
        if have.get(index, digest) != digest:
            raise ValueError(f"{out} has the answer to another row {index} than {where}: give another file")
        if index % parts != part:
            continue
        count += 1
        if index not in have:
            try:
                ids = encode_prompt(model, prompt, "the prompt")
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None
            asked.append({"index": index, "hash": digest, "prompt": prompt, "ids": np.array(ids, np.int32)})
    if not total:
        raise ValueError(f"rows: {rows if isinstance(rows, (str, os.PathLike)) else 'the list'} has no rows")
    if have and max(have) >= total:
        raise ValueError(f"{out} has an answer to row {max(have)}, and there are {total} rows: give another file")
    return count, asked


def _prompt(where, row):
    """What a row asks: text, a chat or token ids."""
    kinds = [key for key in KINDS if key in row]
    if len(kinds) != 1:
        raise ValueError(f"{where}: a row needs one of {', '.join(KINDS)}, and has {sorted(row)}")
    kind, prompt = kinds[0], row[kinds[0]]
    chat, text = data.is_chat(prompt), isinstance(prompt, str)
    ids = isinstance(prompt, list) and all(type(token) is int for token in prompt)
    fits = {"messages": (chat, data.CHAT), "text": (text, "a string"),
            "prompt": (text or chat or ids, f"a string, {data.CHAT}, or token ids")}
    good, form = fits.get(kind, (ids, "token ids"))
    if not good:
        raise ValueError(f"{where}: {kind} must be {form}")
    return prompt[:-1] if kind == "messages" and prompt[-1]["role"] == "assistant" else prompt


def _line(row, answered):
    """The line of an answer, without its settings."""
    end = [] if answered.end is None else [answered.end]
    if answered.finish == "stop" and data.is_chat(row["prompt"]):
        training = {"messages": [*row["prompt"], {"role": "assistant", "content": answered.text}]}
    else:
        training = {"ids": [*row["ids"].tolist(), *answered.tokens, *end],
                    "mask": [0] * len(row["ids"]) + [1] * len(answered.tokens + end)}
    return {"index": row["index"], "hash": row["hash"], **training, "answer": answered.text, "answer_ids": answered.tokens,
            "finish": answered.finish}
