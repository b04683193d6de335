"""Training data: rows of chats, text or token ids, encoded once, packed into rows of equal length that a step can ask for by number.

A row is {"messages": [{"role", "content"}, …]} (only assistant tokens count), {"text": …} (every token counts) or
{"ids": […], "mask": […]} (tokens whose mask is 1 count; no mask: every token), the last for models without a tokenizer.

Data is a list of rows; or a source, or a list of sources, one after the other:
  a path            JSONL, a row a line; or Parquet, by its name *.parquet, a column a key, nulls being absent
  a folder          of *.parquet, by name
  "hub:NAME"        a data set of the Hugging Face hub or a local folder, by `datasets`: its split "train"; or "hub:NAME:SPLIT",
                    "hub:NAME:CONFIG:SPLIT"
Parquet and the hub need the libraries of `pip install 'mambainllama[data]'`.

The tokens of sources of KEPT_BYTES and more are kept in the folder $MIL_CACHE (default ~/.cache/mambainllama/tokens; empty: nowhere), 5
bytes a token and 8 a row, which stderr is told, and memory-mapped in every run after. An entry is found by the sources' bytes, the
tokenizer, its chat template (which may write the day's date: an entry keeps that of its day), and RULES. Nothing removes entries: the
folder may be emptied at any time."""
import hashlib
import importlib
import io
import json
import mmap
import os
import re
import sys
import tempfile
import uuid
import warnings
from bisect import bisect_left, bisect_right, insort
from collections import defaultdict
from contextlib import nullcontext
from functools import lru_cache
from itertools import chain, islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

from .config import library, said
from .weights import read_safetensors, write_safetensors, writing

NONE = -100  # a target that counts for nothing
START = -2   # prev of a document's first token: nothing precedes it
WINDOW = 1 << 16  # pieces that are packed together: some 25 ms
CHUNK = 256       # rows that are encoded together
KEPT_BYTES = 4 << 20  # of a source's files: some seconds of encoding
RULES = 1  # counts up when rows are encoded otherwise than before
CHAT = "a list of objects with a role and a content, both strings"
PATH = (str, os.PathLike)


# ---- rows --------------------------------------------------------------------------------------------------------------------


def rows(data, name="data"):
    """Yields (where, row): where is "file:line" ("file:row" of Parquet, from 1) or "data row 3", row a dict. Blank lines are skipped.
    ValueError names the place of what cannot be read."""
    return chain.from_iterable(part for _, _, part in _parts(data, name))


def _parts(data, name):
    """[(what it is, files whose bytes it depends on, its rows as `rows` yields them)] of each source; no files: a list, or a pipe."""
    if isinstance(data, (list, tuple)):
        if any(isinstance(item, PATH) for item in data):
            return [part for item in data for part in _parts(item, name)]
        return [("rows", [], _listed(data, name))]
    if not isinstance(data, PATH):
        raise ValueError(f"{name}: expected a path, a list of paths or a list of rows, not {type(data).__name__}")
    if str(data).startswith("hub:"):
        return [_hub(str(data), name)]
    if os.path.isdir(data):
        files = sorted(Path(data).glob("*.parquet"))
        if not files:
            raise ValueError(f"{name}: {data} is a folder without a file *.parquet")
        return [part for file in files for part in _parts(file, name)]
    what, read_rows = ("parquet", _parquet) if str(data).endswith(".parquet") else ("jsonl", _lines)
    return [(what, [data] if os.path.isfile(data) else [], read_rows(data, name))]


def _listed(data, name):
    for i, row in enumerate(data):
        yield f"{name} row {i}", _mapping(f"{name} row {i}", row)


def _lines(path, name):
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                where = f"{path}:{number}"
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(f"{where}: not JSON: {error.msg}") from None
                except UnicodeDecodeError:
                    raise ValueError(f"{where}: not UTF-8") from None
                yield where, _mapping(where, row)
    except OSError as error:
        raise ValueError(f"{name}: {path} cannot be read: {error.strerror}") from None


def _parquet(path, name):
    parquet = library("pyarrow.parquet", path, "data")
    try:
        with parquet.ParquetFile(path) as file:
            for number, row in enumerate((row for batch in file.iter_batches(CHUNK) for row in batch.to_pylist()), 1):
                yield f"{path}:{number}", _present(row)
    except (OSError, importlib.import_module("pyarrow").ArrowException) as error:
        raise ValueError(f"{name}: {path} cannot be read: {said(error)}") from None


def _hub(data, name):
    parts = re.split(r":(?![^[]*\])", data)[1:]  # a split may be train[:1000]
    if len(parts) > 3 or not all(parts):
        raise ValueError(f"{name}: {data} should be hub:NAME, hub:NAME:SPLIT or hub:NAME:CONFIG:SPLIT")
    datasets = library("datasets", data, "data")
    try:
        table = datasets.load_dataset(parts[0], parts[1] if len(parts) == 3 else None, split=parts[-1] if len(parts) > 1 else "train")
    except Exception as error:  # of the network, the hub, the library, whatever reads the files …
        raise ValueError(f"{name}: {data} cannot be loaded: {said(error.__cause__ or error)}") from None
    return data, [file["filename"] for file in table.cache_files], ((f"{data}:{n}", _present(row)) for n, row in enumerate(table, 1))


def _present(value):
    """value without the keys of dicts that have nothing: Arrow's rows have every key of their table."""
    if isinstance(value, dict):
        return {key: _present(item) for key, item in value.items() if item is not None}
    return [_present(item) for item in value] if isinstance(value, list) and value and isinstance(value[0], (dict, list)) else value


def _mapping(where, row):
    if not isinstance(row, dict):
        raise ValueError(f"{where}: a row is an object, not {type(row).__name__}")
    return row


# ---- documents ---------------------------------------------------------------------------------------------------------------


def read(data, tokenizer=None, vocab=None, name="data", answers=False, progress=None):
    """The Documents of data's rows, in their order. tokenizer: encode_batch(texts) → [ids], encode_chats_with_mask(chats) → [(ids,
    mask)] and, for its tokens to be kept, fingerprint; needed unless rows carry ids. vocab: ids must be below it. answers: every row
    must be a chat or have a mask. progress: True or False for a bar over what takes more than two seconds; None: only on a terminal.
    ValueError says where a row is wrong and what is wrong with it; OSError: the tokens could not be kept."""
    parts = _parts(data, name)
    path = _place(parts, tokenizer, vocab, answers)
    documents = path and _kept(path)
    if documents:
        return documents
    path = path if path and _writable(path.parent) else None
    encoded = tqdm(_encode(chain.from_iterable(part for _, _, part in parts), tokenizer, vocab, answers), f"encoding {name}", unit=" rows",
                   delay=2, leave=False, dynamic_ncols=True, disable=None if progress is None else not progress)
    with writing(path.parent) if path else nullcontext():
        documents = Documents.of(encoded, path and path.parent)
    if not len(documents):
        raise ValueError(f"{name}: {data if isinstance(data, PATH) else 'the list'} has no rows")
    return _keep(path, documents, data) if path else documents


class Documents:
    """Encoded rows, end to end; iterating gives the (ids, mask) of each.

    ids (n) int32; mask (n) bool: which tokens count, False at a document's first, which nothing predicts; lengths (d) int64: the
    documents'; fingerprint: of all three, hexadecimal."""

    def __init__(self, ids, mask, lengths):
        self.ids, self.mask, self.lengths = ids, mask, lengths
        digest = hashlib.sha256()
        for array in (lengths, ids, mask):
            digest.update(array)
        self.fingerprint = digest.hexdigest()[:32]

    @classmethod
    def of(cls, pairs, folder=None):
        """Documents of (ids, mask) pairs. folder: where to collect them in a nameless file instead of in memory."""
        with _file(folder) as ids_file, _file(folder) as mask_file:
            lengths = []
            for ids, mask in pairs:
                mask = np.array(mask, bool)
                mask[:1] = False
                ids_file.write(np.ascontiguousarray(ids, np.int32))
                mask_file.write(mask)
                lengths.append(len(ids))
            return cls(_array(ids_file, np.int32), _array(mask_file, bool), np.array(lengths, np.int64))

    def __len__(self):
        return len(self.lengths)

    def __iter__(self):
        stop = 0
        for n in self.lengths.tolist():
            start, stop = stop, stop + n
            yield self.ids[start:stop], self.mask[start:stop]


def _file(folder):
    return tempfile.TemporaryFile(dir=folder) if folder else io.BytesIO()


def _array(file, kind):
    """What was written to _file, read-only."""
    if file.tell() == 0:
        return np.zeros(0, kind)
    file.flush()
    return np.frombuffer(file.getvalue() if isinstance(file, io.BytesIO) else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), kind)


def is_chat(value):
    """Whether it is CHAT, and not empty."""
    return isinstance(value, list) and bool(value) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in value)


def _encode(source, tokenizer, vocab, answers):
    """Yields the (ids, mask) of each of source's (where, row)."""
    while chunk := list(islice(source, CHUNK)):
        kinds = [_kind(where, row, tokenizer, answers) for where, row in chunk]
        pairs = [(row["ids"], row.get("mask", [1] * len(row["ids"]))) if kind == "ids" else None for kind, (_, row) in zip(kinds, chunk)]
        for kind in sorted({*kinds} - {"ids"}):
            places = [i for i in range(len(chunk)) if kinds[i] == kind]
            try:
                found = _encoded(tokenizer, kind, [chunk[i][1] for i in places])
            except ValueError:  # one by one, to know where
                found = [pair for i in places for pair in _encoded(tokenizer, kind, [chunk[i][1]], chunk[i][0])]
            for i, pair in zip(places, found):
                pairs[i] = pair
        for (where, _), pair in zip(chunk, pairs):
            yield _checked(where, *pair, vocab)


def _kind(where, row, tokenizer, answers):
    """Which of messages, text and ids a row has, whose form is right."""
    kinds = [key for key in ("messages", "text", "ids") if key in row]
    if len(kinds) != 1:
        raise ValueError(f"{where}: a row needs one of messages, text and ids, and has {sorted(row)}")
    kind, value = kinds[0], row[kinds[0]]
    if kind != "ids" and tokenizer is None:
        raise ValueError(f"{where}: the model has no tokenizer, so a row needs ids, not {kind}")
    if kind == "text" and not isinstance(value, str):
        raise ValueError(f"{where}: text must be a string, not {type(value).__name__}")
    if kind == "messages" and not is_chat(value):
        raise ValueError(f"{where}: messages must be {CHAT}")
    if kind == "ids" and not isinstance(value, (list, tuple, np.ndarray)):
        raise ValueError(f"{where}: ids must be a list of integers")
    if answers and kind != "messages" and "mask" not in row:
        raise ValueError(f"{where}: a row for fine-tuning has messages, or ids and a mask; mil.train learns from plain text")
    return kind


def _encoded(tokenizer, kind, some, where=None):
    """[(ids, mask)] of some rows of one kind. ValueError: one of them cannot be used; where: the only row's place."""
    try:
        if kind == "messages":
            return tokenizer.encode_chats_with_mask([row["messages"] for row in some])
        return [(ids, [1] * len(ids)) for ids in tokenizer.encode_batch([row["text"] for row in some])]
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: {kind} cannot be used: {error}") from None


def _checked(where, ids, mask, vocab):
    try:
        ids, mask = np.asarray(ids), np.asarray(mask)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: ids cannot be used: {error}") from None
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
        raise ValueError(f"{where}: ids must be a list of integers")
    if mask.shape != ids.shape or not ((mask == 0) | (mask == 1)).all():
        raise ValueError(f"{where}: mask must have a 0 or 1 for each of the {ids.size} ids")
    high = min(vocab or 2**31, 2**31)
    if ids.size and not (0 <= ids.min() and ids.max() < high):
        raise ValueError(f"{where}: ids must be from 0 to {high - 1}, and one is {ids.min() if ids.min() < 0 else ids.max()}")
    return ids, mask


def _place(parts, tokenizer, vocab, answers):
    """The file in which the tokens of the parts belong; None: nowhere."""
    folder = os.environ.get("MIL_CACHE", os.path.expanduser("~/.cache/mambainllama/tokens"))
    if not folder or not all(files for _, files, _ in parts) or not (tokenizer is None or hasattr(tokenizer, "fingerprint")):
        return None
    if sum(os.path.getsize(file) for _, files, _ in parts for file in files) < KEPT_BYTES:
        return None
    key = [RULES, tokenizer and tokenizer.fingerprint, vocab, answers, [[what, *map(_digest, files)] for what, files, _ in parts]]
    return Path(folder, hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32] + ".safetensors")


def _writable(folder):
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
        return True
    except OSError as error:
        warnings.warn(f"{folder} cannot be written ({error.strerror}), so tokens are not kept for the next run; MIL_CACHE names another")
        return False


def _digest(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _kept(path):
    """The Documents in an entry, memory-mapped; None: there is none, or it is damaged."""
    try:
        arrays = read_safetensors(path)
        documents = Documents(arrays["ids"], arrays["mask"], arrays["lengths"])
        return documents if bytes(arrays["fingerprint"]).hex() == documents.fingerprint else None
    except (ValueError, KeyError):
        return None


def _keep(path, documents, data):
    """Makes an entry of documents, and says so; → them, memory-mapped. Who else does so at the same time writes the same."""
    fingerprint = np.frombuffer(bytes.fromhex(documents.fingerprint), np.uint8)
    arrays = {"lengths": documents.lengths, "ids": documents.ids, "mask": documents.mask, "fingerprint": fingerprint}
    sizes = {name: (kind, arrays[name].shape, arrays[name].nbytes) for name, kind in zip(arrays, ("I64", "I32", "BOOL", "U8"))}
    write_safetensors(path, arrays, sizes, arrays, mark="." + uuid.uuid4().hex)
    total = sum(file.stat().st_size for file in path.parent.glob("*.safetensors"))
    print(f"mambainllama: the tokens of {data if isinstance(data, PATH) else f'{len(data)} sources'} are kept for the next run in {path}, "
          f"{path.stat().st_size / 1e6:.0f} MB; that folder has {total / 1e6:.0f} MB now", file=sys.stderr, flush=True)
    return _kept(path) or documents


# ---- batches -----------------------------------------------------------------------------------------------------------------


def shuffled(n, seed, *numbers):
    """0 … n-1 in an order that seed and numbers (of the epoch …) decide. RandomState: NumPy never changes its streams."""
    return np.random.RandomState([seed & 0xFFFFFFFF, seed >> 32, *numbers]).permutation(n)


def best_fit(sizes, length):
    """The row, counted from 0, of each of n pieces, sizes (n) from 1 to length: best-fit-decreasing. From the largest piece down, each goes
    into the fullest row that has room for it, else into a new one. O(n log length). Source: Ding et al. 2024, arXiv 2404.10830."""
    order = np.argsort(-sizes, kind="stable")
    rooms, rows, count, found = [], defaultdict(list), 0, []  # rooms: what some row has left, sorted; rows[room]: those rows
    for size in sizes[order].tolist():
        at = bisect_left(rooms, size)
        if at == len(rooms):
            row, room = count, length
            count += 1
        else:
            room = rooms[at]
            row = rows[room].pop()
            if not rows[room]:
                del rooms[at]
        found.append(row)
        room -= size
        if room:
            if not rows[room]:
                insort(rooms, room)
            rows[room].append(row)
    out = np.empty(len(sizes), np.int64)
    out[order] = found
    return out


class Batches:
    """Documents packed into rows of `length` tokens, `batch` rows at a time, epoch after epoch.

    Every epoch shuffles the documents (by seed and epoch; shuffle=False: their own order), packs them best-fit-decreasing (best_fit) in
    windows of WINDOW, and shuffles the rows of each window, which would else be sorted by length (shuffle=False: in the order of their
    first documents). What is left of a row is padding, a document of its own that counts for nothing. The target of a token is the next
    token of its document where that counts, so the token before an answer is trained. A document longer than a row is cut into pieces of
    `length`, which are packed like documents: a piece does not see the one before, but its last token still predicts the next piece's
    first, so no target is lost. Pieces in which nothing counts are left out. batch(step) depends on the documents, length, batch, seed
    and step alone.

    documents: Documents, or (ids, mask) pairs. ids, fingerprint: theirs. ValueError: no token that counts."""

    def __init__(self, documents, length, batch, seed=0, shuffle=True, name="data"):
        if not isinstance(documents, Documents):
            documents = Documents.of(documents)
        self.length, self.size, self.seed, self.shuffle = length, batch, seed, shuffle
        self.ids, self.mask, self.fingerprint = documents.ids, documents.mask, documents.fingerprint
        self.start, self.sizes = _pieces(documents.lengths, self.mask, length)
        if not len(self.start):
            raise ValueError(f"{name}: no token counts, so there is nothing to learn: rows need an answer, or two tokens")
        self.windows = -(-len(self.start) // WINDOW)  # of an epoch
        self.begins = [0]  # the first row of each window packed so far and, last, of the next one; epochs follow one another
        self._order, self._window = lru_cache(1)(self._order), lru_cache(2)(self._window)  # a batch may lie in two windows

    def __len__(self):
        """Rows of the first epoch."""
        self._pack(self.windows)
        return self.begins[self.windows]

    @property
    def fill(self):
        """Share of the first epoch's row positions that hold tokens."""
        return float(self.sizes.sum() / (len(self) * self.length))

    def batch(self, step):
        """ids, targets, prev of the step-th batch, counted from 0; each (batch, length) int32."""
        return self.take(self._step(step))

    def take(self, rows):
        """A batch of these rows, counted from 0 through all epochs."""
        return self._batch(*self._layout(rows))

    def positions(self, step):
        """Where the tokens of that batch are in self.ids: (batch, length) int64, -1 where there is padding."""
        return self._layout(self._step(step))[0]

    def once(self):
        """Yields the batches of the first epoch, every document once; the last may have fewer rows."""
        return (self._batch(*self._layout(rows)) for rows in self._epoch())

    def positions_once(self):
        """Yields the positions of once()'s batches."""
        return (self._layout(rows)[0] for rows in self._epoch())

    def _step(self, step):
        return range(step * self.size, (step + 1) * self.size)

    def _epoch(self):
        return (range(at, min(at + self.size, len(self))) for at in range(0, len(self), self.size))

    def _batch(self, at, first):
        after = (at + 1) % len(self.ids)  # the token after the last is the first, which does not count; nor does padding's
        ids = np.where(at < 0, 0, self.ids[at])
        targets = np.where(self.mask[after], self.ids[after], NONE)
        return ids, targets, np.where(first, START, np.arange(-1, self.length - 1, dtype=np.int32))

    def _layout(self, rows):
        """at: positions of the rows' tokens, -1 for padding; first: where a piece begins, or padding. Both (rows, length)."""
        at = np.full((len(rows), self.length), -1, np.int64)
        first = np.zeros(at.shape, bool)
        for b, row in enumerate(rows):
            t = 0
            for piece in self._row(row):
                start, n = self.start[piece], self.sizes[piece]
                at[b, t:t + n] = np.arange(start, start + n)
                first[b, t] = True
                t += n
            first[b, t:t + 1] = True
        return at, first

    def _row(self, row):
        """The pieces in a row, counted from the first epoch's first."""
        while row >= self.begins[-1]:
            self._pack(len(self.begins))
        window = bisect_right(self.begins, row) - 1
        pieces, ends = self._window(window)
        place = row - self.begins[window]
        return pieces[ends[place]:ends[place + 1]]

    def _pack(self, windows):
        """Makes known where the first `windows` windows begin and end."""
        while len(self.begins) <= windows:
            self.begins.append(self.begins[-1] + len(self._window(len(self.begins) - 1)[1]) - 1)

    def _window(self, number):
        """(pieces, row after row; where each row begins among them, and the end) of a window, counted from the first epoch's first."""
        epoch, window = divmod(number, self.windows)
        pieces = self._order(epoch)[window * WINDOW:(window + 1) * WINDOW]
        row = best_fit(self.sizes[pieces], self.length)
        named = (shuffled(row.max() + 1, self.seed, epoch, window) if self.shuffle else
                 np.argsort(np.argsort(np.unique(row, return_index=True)[1])))  # as they begin
        row = named[row]
        return pieces[np.argsort(row, kind="stable")], np.append(0, np.cumsum(np.bincount(row)))

    def _order(self, epoch):
        return shuffled(len(self.start), self.seed, epoch) if self.shuffle else np.arange(len(self.start))


def _pieces(lengths, mask, length):
    """(start, size) of the pieces of at most length tokens in which something counts: (pieces) int64 each."""
    counts = -(-lengths // length)
    before = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)  # pieces of the same document before a piece
    start = np.repeat(np.cumsum(lengths) - lengths, counts) + before * length
    size = np.minimum(np.repeat(lengths, counts) - before * length, length)
    inside = start + 1 < len(mask)  # all but a last piece of one token
    learns = np.zeros(len(start), bool)
    if inside.any():
        learns[inside] = np.logical_or.reduceat(mask, start[inside] + 1)  # pieces follow one another: up to the next one's first token
    return start[learns], size[learns]
