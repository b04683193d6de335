"""Training data: rows of chats, text or token ids, packed into rows of equal length that a step can ask for by number.

A row is {"messages": [{"role", "content"}, …]} (only assistant tokens count), {"text": …} (every token counts) or
{"ids": […], "mask": […]} (tokens whose mask is 1 count; no mask: every token), the last for models without a tokenizer."""
import hashlib
import json
import os

import numpy as np

NONE = -100  # a target that counts for nothing
START = -2   # prev of a document's first token: nothing precedes it
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
    """Documents [(ids (n) int32, mask (n) bool)] of data's rows, in their order. tokenizer: encode(text) → ids and
    encode_chat_with_mask(messages) → (ids, mask); needed unless rows carry ids. vocab: ids must be below it.
    ValueError says where a row is wrong and what is wrong with it."""
    documents = [_document(where, row, tokenizer, vocab) for where, row in rows(data, name)]
    if not documents:
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


def shuffled(n, seed, epoch):
    """0 … n-1 in the order of an epoch. RandomState: NumPy never changes its streams."""
    return np.random.RandomState([seed & 0xFFFFFFFF, seed >> 32, epoch]).permutation(n).tolist()


class Batches:
    """Documents packed into rows of `length` tokens, `batch` rows at a time, epoch after epoch.

    Every epoch shuffles the documents (by seed and epoch; shuffle=False: their own order) and packs them in that order, each
    into the open row if it fits, else into a new one. What is left of a row is padding, a document of its own that counts for
    nothing. The target of a token is the next token of its document where that counts, so the token before an answer is
    trained. A document longer than a row is cut into pieces of `length`, which are packed like documents: a piece does not
    see the one before, but its last token still predicts the next piece's first, so no target is lost. Pieces in which
    nothing counts are left out. batch(step) depends on the documents, length, batch, seed and step alone.

    fingerprint: of the documents, hexadecimal. ValueError: no token that counts."""

    def __init__(self, documents, length, batch, seed=0, shuffle=True, name="data"):
        self.length, self.size, self.seed, self.shuffle = length, batch, seed, shuffle
        lengths = np.array([len(ids) for ids, _ in documents], np.int64)
        self.ids = np.concatenate([np.zeros(0, np.int32), *(ids for ids, _ in documents)])
        counts = np.concatenate([np.zeros(0, bool), *(mask for _, mask in documents)])
        counts[(np.cumsum(lengths) - lengths)[lengths > 0]] = False  # nothing predicts a document's first token
        self.targets = np.append(np.where(counts, self.ids, NONE)[1:], NONE).astype(np.int32)[: len(self.ids)]
        digest = hashlib.sha256()
        for array in (lengths, self.ids, self.targets):
            digest.update(array.tobytes())
        self.fingerprint = digest.hexdigest()[:32]
        first = np.cumsum(lengths) - lengths
        pieces = [(at, min(at + length, begin + n)) for begin, n in zip(first.tolist(), lengths.tolist())
                  for at in range(begin, begin + n, length)]
        self.pieces = [(a, b) for a, b in pieces if (self.targets[a:b] >= 0).any()]
        if not self.pieces:
            raise ValueError(f"{name}: no token counts, so there is nothing to learn: rows need an answer, or two tokens")
        self._open(0, 0)
        self.rows = len(self.packed)

    def __len__(self):
        """Rows of the first epoch."""
        return self.rows

    def batch(self, step):
        """ids, targets, prev of the step-th batch, counted from 0; each (batch, length) int32."""
        return self._stack([self._row(r) for r in range(step * self.size, (step + 1) * self.size)])

    def once(self):
        """Yields the batches of the first epoch, every document once; the last may have fewer rows."""
        self._open(0, 0)
        packed = self.packed
        for at in range(0, len(packed), self.size):
            yield self._stack(packed[at:at + self.size])

    def _open(self, epoch, first):
        """Packs an epoch: self.packed is its rows, each a list of pieces; its first row is the first-th of all."""
        self.epoch, self.first, self.packed = epoch, first, []
        order = shuffled(len(self.pieces), self.seed, epoch) if self.shuffle else range(len(self.pieces))
        room = 0
        for i in order:
            piece = self.pieces[i]
            if piece[1] - piece[0] > room:
                self.packed.append([])
                room = self.length
            self.packed[-1].append(piece)
            room -= piece[1] - piece[0]

    def _row(self, r):
        if r < self.first:
            self._open(0, 0)
        while r >= self.first + len(self.packed):
            self._open(self.epoch + 1, self.first + len(self.packed))
        return self.packed[r - self.first]

    def _stack(self, packed):
        ids = np.zeros((len(packed), self.length), np.int32)
        targets = np.full_like(ids, NONE)
        prev = np.tile(np.arange(-1, self.length - 1, dtype=np.int32), (len(packed), 1))
        for b, pieces in enumerate(packed):
            t = 0
            for start, stop in pieces:
                prev[b, t] = START
                ids[b, t:t + stop - start] = self.ids[start:stop]
                targets[b, t:t + stop - start] = self.targets[start:stop]
                t += stop - start
            if t < self.length:
                prev[b, t] = START
        return ids, targets, prev
