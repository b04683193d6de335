"""Training data: rows of chats, text or token ids, packed into rows of equal length that a step can ask for by number.

A row is {"messages": [{"role", "content"}, …]} (only assistant tokens count), {"text": …} (every token counts) or
{"ids": […], "mask": […]} (tokens whose mask is 1 count; no mask: every token), the last for models without a tokenizer."""
import hashlib
import json
import os
from bisect import bisect_left, bisect_right, insort
from collections import defaultdict
from functools import lru_cache

import numpy as np

NONE = -100  # a target that counts for nothing
START = -2   # prev of a document's first token: nothing precedes it
WINDOW = 1 << 16  # pieces that are packed together: some 25 ms
CHAT = "a list of objects with a role and a content, both strings"


def rows(data, name="data"):
    """Yields (where, row): where is "file:line" or "data row 3", row a dict. data: a JSONL path or a list of dicts; blank
    lines are skipped. ValueError names the place of what cannot be read."""
    if not isinstance(data, (str, os.PathLike)):
        if not isinstance(data, (list, tuple)):
            raise ValueError(f"{name}: expected a JSONL path or a list of rows, not {type(data).__name__}")
        for i, row in enumerate(data):
            yield f"{name} row {i}", _mapping(f"{name} row {i}", row)
        return
    try:
        file = open(data, "rb")
    except OSError as error:
        raise ValueError(f"{name}: {data} cannot be read: {error.strerror}") from None
    with file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{data}:{number}"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{where}: not JSON: {error.msg}") from None
            except UnicodeDecodeError:
                raise ValueError(f"{where}: not UTF-8") from None
            yield where, _mapping(where, row)


def _mapping(where, row):
    if not isinstance(row, dict):
        raise ValueError(f"{where}: a row is an object, not {type(row).__name__}")
    return row


def read(data, tokenizer=None, vocab=None, name="data"):
    """The Documents of data's rows, in their order. tokenizer: encode(text) → ids and
    encode_chat_with_mask(messages) → (ids, mask); needed unless rows carry ids. vocab: ids must be below it.
    ValueError says where a row is wrong and what is wrong with it."""
    documents = Documents.of(_document(where, row, tokenizer, vocab) for where, row in rows(data, name))
    if not len(documents):
        raise ValueError(f"{name}: {data if isinstance(data, (str, os.PathLike)) else 'the list'} has no rows")
    return documents


def is_chat(value):
    """Whether it is CHAT, and not empty."""
    return isinstance(value, list) and bool(value) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in value)


def _document(where, row, tokenizer, vocab):
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
    try:
        if kind == "messages":
            ids, mask = tokenizer.encode_chat_with_mask(value)
        else:
            ids = tokenizer.encode(value) if kind == "text" else value
            mask = row.get("mask", [1] * len(ids)) if kind == "ids" else [1] * len(ids)
        ids, mask = np.asarray(ids), np.asarray(mask)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: {kind} cannot be used: {error}") from None
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
        raise ValueError(f"{where}: ids must be a list of integers")
    if mask.shape != ids.shape or not np.isin(mask, (0, 1)).all():
        raise ValueError(f"{where}: mask must have a 0 or 1 for each of the {ids.size} ids")
    high = min(vocab or 2**31, 2**31)
    if ids.size and not (0 <= ids.min() and ids.max() < high):
        raise ValueError(f"{where}: ids must be from 0 to {high - 1}, and one is {ids.min() if ids.min() < 0 else ids.max()}")
    return ids.astype(np.int32), mask.astype(bool)


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
    def of(cls, pairs):
        """Documents of (ids, mask) pairs."""
        pairs = list(pairs)
        lengths = np.array([len(ids) for ids, _ in pairs], np.int64)
        ids, mask = (np.concatenate([np.zeros(0, kind), *parts]).astype(kind) for kind, parts in
                     ((np.int32, (ids for ids, _ in pairs)), (bool, (mask for _, mask in pairs))))
        mask[(np.cumsum(lengths) - lengths)[lengths > 0]] = False
        return cls(ids, mask, lengths)

    def __len__(self):
        return len(self.lengths)

    def __iter__(self):
        stop = 0
        for n in self.lengths.tolist():
            start, stop = stop, stop + n
            yield self.ids[start:stop], self.mask[start:stop]


class Batches:
    """Documents packed into rows of `length` tokens, `batch` rows at a time, epoch after epoch.

    Every epoch shuffles the documents (by seed and epoch; shuffle=False: their own order), packs them best-fit-decreasing (best_fit) in
    windows of WINDOW, and shuffles the rows of each window, which would else be sorted by length. What is left of a row is padding, a
    document of its own that counts for nothing. The target of a token is the next token of its document where that counts, so the token
    before an answer is trained. A document longer than a row is cut into pieces of `length`, which are packed like documents: a piece
    does not see the one before, but its last token still predicts the next piece's first, so no target is lost. Pieces in which nothing
    counts are left out. batch(step) depends on the documents, length, batch, seed and step alone.

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
        return self._batch(*self._layout(self._step(step)))

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
        if self.shuffle:
            row = shuffled(row.max() + 1, self.seed, epoch, window)[row]
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
