"""What an evaluation leaves: a folder that names its model and settings, rows that are appended whole, results at the end.

run.json       what is evaluated: kind, model, fingerprint of its parameters, layers, settings, versions. Written first; the same call goes on
               in the same folder, and another model or setting is refused.
*.jsonl        a row a line, appended as soon as it is complete. What ends the process leaves whole lines and at most one torn at the end,
               which is dropped and made again.
results.json   run.json's content, "scores" ({name: number or null}) and whatever else the kind says (judge, failures …)
items.json     {metric: {item: number}}: what comparisons pair"""
import hashlib
import json
import os
import platform
import time
from importlib import import_module, metadata
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ..config import parse_json, said
from ..generate import ROWS, encode_prompt, generate
from ..weights import replacing, writing

CALL = 8  # batches of one call of generate


class Run:
    """The folder of one evaluation. ValueError: it has another one."""

    def __init__(self, out, kind, model, settings, name=None):
        from .. import __version__
        self.out = Path(out)
        with writing(self.out):
            self.out.mkdir(parents=True, exist_ok=True)
        layers = model.layer_kinds
        fingerprint = model.fingerprint()
        name = name or (_named(Path(os.path.abspath(model.folder))) if model.folder else f"model-{fingerprint}")
        self.about = {"kind": kind, "model": name.replace("/", "_"), "fingerprint": fingerprint,
                      "layers": {what: layers.count(what) for what in dict.fromkeys(layers)}, "device": model.device, "dtype": model.dtype,
                      "settings": settings, "versions": {"mambainllama": __version__, "python": platform.python_version()}}
        self.began = time.time()
        path = self.out / "run.json"
        if path.exists():
            theirs = read_object(path)
            differ = [key for key in ("kind", "model", "fingerprint", "dtype") if theirs.get(key) != self.about[key]]
            old, new = theirs.get("settings") or {}, json.loads(json.dumps(settings))
            differ += [key for key in {**old, **new} if old.get(key) != new.get(key)]
            if differ:
                raise ValueError(f"{out} holds an evaluation that differs in {', '.join(differ)}: give the same, or another folder")
        write_json(path, self.about)

    def version(self, *libraries):
        """Notes the versions of libraries that take part."""
        for library in libraries:
            self.about["versions"][library] = metadata.version(library)

    def finish(self, scores, items, **more):
        """Writes results.json and items.json; -> the results."""
        scores = {name: value if value is None or np.isfinite(value) else None for name, value in scores.items()}
        results = {**self.about, **more, "scores": scores, "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                   "seconds": round(time.time() - self.began, 3)}
        write_json(self.out / "items.json", items)
        write_json(self.out / "results.json", results)
        return results


class Records:
    """A JSONL file that grows by whole lines. rows: {key(row): row}, of a key that occurs twice the last. ValueError: a line that is no
    such row, unless it is the last and torn."""

    def __init__(self, path, key):
        self.path, self.key, self.rows = Path(path), key, {}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = self.path.read_bytes().splitlines(keepends=True) if self.path.exists() else []
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                self.rows[key(row)] = row
            except (ValueError, TypeError, KeyError, IndexError):
                if number == len(lines) and not line.endswith(b"\n"):
                    with open(self.path, "r+b") as file:
                        file.truncate(sum(map(len, lines[:-1])))
                    lines.pop()
                    break
                raise ValueError(f"{path}:{number}: not a line of this evaluation, so nothing is written to this file") from None
        if lines and not lines[-1].endswith(b"\n"):
            self._append(b"\n")

    def add(self, row):
        self._append(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        self.rows[self.key(row)] = row

    def _append(self, line):
        with writing(self.path), open(self.path, "ab") as file:
            file.write(line)


def _named(folder):
    """What a model's folder is called; of RUN/model, as training leaves it, the run."""
    return folder.parent.name if folder.name == "model" else folder.name


def complete(run, model, asked, max_new_tokens, batch=None, progress=None, file="answers.jsonl", **how):
    """The model's text for each of `asked`, {"key", "prompt", "index" of its uniforms, "temperature"}: {key: {"key", "text", "finish"}}. Longest
    prompts first; what `file` in the run's folder holds is not made again. how: of generate. KeyboardInterrupt says how much is done."""
    records = Records(run.out / file, lambda row: row["key"])
    todo = [row for row in asked if row["key"] not in records.rows]
    prompts = {row["key"]: encode_prompt(model, row["prompt"], f"item {row['key']}") for row in todo}
    todo.sort(key=lambda row: -len(prompts[row["key"]]))
    size = CALL * (batch or ROWS)
    with bar("answers", len(asked), len(asked) - len(todo), progress) as shown:
        for start in range(0, len(todo), size):
            part = todo[start:start + size]

            def write(place, answered):
                records.add({"key": part[place]["key"], "text": answered.text, "finish": answered.finish, "tokens": len(answered.tokens)})
                shown.update()
            try:
                generate(model, [prompts[row["key"]] for row in part], max_new_tokens, temperature=[row["temperature"] for row in part],
                         index=[row["index"] for row in part], batch=batch, finished=write, **how)
            except KeyboardInterrupt:
                raise KeyboardInterrupt(f"{len(records.rows)} answers are in {records.path}; the same call goes on") from None
    return {row["key"]: records.rows[row["key"]] for row in asked}


def question(model, text):
    """What a user asks, as a chat where the model has a template, else as text."""
    chat = model.tokenizer is not None and model.tokenizer.chat_template is not None
    return [{"role": "user", "content": text}] if chat else text


def digest(value):
    """Of a JSON value, hexadecimal: what settings say of data."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def bar(what, total, done=0, progress=None):
    return tqdm(desc=what, total=total, initial=done, dynamic_ncols=True, leave=False, disable=None if progress is None else not progress)


def library(name, extra="evaluate"):
    """The module. ValueError, one sentence, where it is missing or broken."""
    try:
        return import_module(name)
    except ImportError as error:
        raise ValueError(f"this needs {name.partition('.')[0]}: pip install 'mambainllama[{extra}]' ({said(error)})") from None


def read_object(path, what=dict):
    """A file's JSON, of the kind `what`. ValueError: no such thing."""
    try:
        text = Path(path).read_bytes()  # of any size
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    return parse_json(text, path, what=what)


def read_text(path):
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None


def write_json(path, value):
    with replacing(path) as file:
        file.write(json.dumps(value, ensure_ascii=False, indent=1, default=_plain).encode() + b"\n")


def _plain(value):
    if isinstance(value, (np.integer, np.floating, np.bool_)):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    return str(value)


def write_lines(path, rows):
    with replacing(path) as file:
        file.writelines(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)
