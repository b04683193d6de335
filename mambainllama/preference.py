"""Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290): pairs of answers, and the objective over them.

A row is {"prompt": …, "chosen": …, "rejected": …}: prompt a list of messages, the answers lists of messages or a string; or all three
lists of token ids, for models without a tokenizer. What counts is the assistant's part of the answer. A prompt of more than
prompt_length tokens loses its beginning, an answer its end where a sequence would pass `length`; so an answer's start stays, and is
the same text for both models.

With r(y) = log p(y | prompt) - log p_reference(y | prompt), sums over the answer's tokens, and m = r(chosen) - r(rejected):
  sigmoid: -(1 - label_smoothing) log s(beta m) - label_smoothing log s(-beta m), s the logistic function
  ipo:     (m - 1 / (2 beta))^2   (Azar et al. 2023, arXiv 2310.12036)
The reference's log-probabilities are computed once, before the first step, and kept beside the run."""
import hashlib

import numpy as np

from .data import NONE, is_chat, rows, shuffled
from .weights import replacing


class Pairs:
    """Preference rows as batches of 2n sequences, the n chosen ones first; epoch after epoch in an order of its own.

    fingerprint: of the sequences, hexadecimal. ValueError says where a row is wrong."""

    def __init__(self, data, model, recipe, name="data", shuffle=True):
        self.size, self.seed, self.shuffle, self.length = recipe["batch"], recipe["seed"], shuffle, recipe["length"]
        prompt = recipe["prompt_length"] or self.length // 2
        if prompt >= self.length:
            raise ValueError(f"recipe: prompt_length is {prompt} and length {self.length}: nothing is left for an answer")
        self.pairs = [[_cut(ids, start, prompt, self.length) for ids, start in _pair(where, row, model)] for where, row in rows(data, name)]
        if not self.pairs:
            raise ValueError(f"{name}: no rows")
        digest = hashlib.sha256()
        for ids, start in (half for pair in self.pairs for half in pair):
            digest.update(np.array([len(ids), start], np.int64).tobytes() + ids.tobytes())
        self.fingerprint = digest.hexdigest()[:32]
        self.epoch = self.order = None  # the epoch whose order is at hand
        self.reference = None  # of each pair: the reference's log-probabilities of both answers' tokens

    def batch(self, step):
        """ids, targets, reference's log-probabilities of the step-th batch, counted from 0; each (2 batch, length)."""
        return self._stack([self._at(i) for i in range(step * self.size, (step + 1) * self.size)])

    def once(self):
        """Yields the batches of one pass in the rows' own order; the last may have fewer pairs."""
        for at in range(0, len(self.pairs), self.size):
            yield self._stack(range(at, min(at + self.size, len(self.pairs))))

    def __len__(self):
        return len(self.pairs)

    @property
    def fill(self):
        """Share of positions that hold tokens."""
        return sum(len(ids) for pair in self.pairs for ids, _ in pair) / (2 * len(self.pairs) * self.length)

    def _at(self, i):
        epoch, at = divmod(i, len(self.pairs))
        if epoch != self.epoch:
            self.epoch, self.order = epoch, shuffled(len(self.pairs), self.seed, epoch) if self.shuffle else range(len(self.pairs))
        return self.order[at]

    def _stack(self, chosen):
        order = [(i, half) for half in (0, 1) for i in chosen]
        ids = np.zeros((len(order), self.length), np.int32)
        targets, reference = np.full_like(ids, NONE), np.zeros(ids.shape, np.float32)
        for b, (i, half) in enumerate(order):
            row, start = self.pairs[i][half]
            ids[b, :len(row)] = row
            targets[b, start - 1:len(row) - 1] = row[start:]
            if self.reference is not None:
                reference[b, start - 1:len(row) - 1] = self.reference[i][half]
        return ids, targets, reference


def _pair(where, row, model):
    """[(ids, where the answer starts) of chosen, of rejected]; nothing is cut."""
    missing = [key for key in ("prompt", "chosen", "rejected") if key not in row]
    if missing:
        raise ValueError(f"{where}: a preference row has prompt, chosen and rejected, and this one lacks {missing[0]}")
    prompt, answers = row["prompt"], (row["chosen"], row["rejected"])
    if all(isinstance(value, list) and all(type(i) is int for i in value) for value in (prompt, *answers)):
        vocab = model.config["vocab_size"]
        if any(not 0 <= i < vocab for value in (prompt, *answers) for i in value):
            raise ValueError(f"{where}: ids must be from 0 to {vocab - 1}")
        encoded = [(prompt + answer, len(prompt)) for answer in answers]
    else:
        if model.tokenizer is None:
            raise ValueError(f"{where}: the model has no tokenizer, so prompt, chosen and rejected must be lists of token ids")
        encoded = [_encode(where, prompt, answer, model.tokenizer) for answer in answers]
    for name, (ids, start) in zip(("chosen", "rejected"), encoded):
        if not 0 < start < len(ids):
            raise ValueError(f"{where}: {'the prompt has no token' if start == 0 else f'{name} has no token that counts'}")
    return [(np.asarray(ids, np.int32), start) for ids, start in encoded]


def _encode(where, prompt, answer, tokenizer):
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(answer, str):
        answer = [{"role": "assistant", "content": answer}]
    if not (is_chat(prompt) and is_chat(answer)):
        raise ValueError(f"{where}: prompt, chosen and rejected must be lists of objects with a role and a content, or strings")
    try:
        ids, mask = tokenizer.encode_chat_with_mask(prompt + answer)
        earlier = sum(tokenizer.encode_chat_with_mask(prompt)[1])  # answers that the prompt itself holds
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: the chat cannot be used: {error}") from None
    counting = np.flatnonzero(mask)[earlier:]
    return ids, int(counting[0]) if len(counting) else len(ids)


def _cut(ids, start, prompt, length):
    skip = max(start - prompt, 0)
    return ids[skip:skip + length], start - skip


class Preference:
    """The objective of the trainer (train.py) over Pairs. reference: a model, or "start": the model as it came."""

    def __init__(self, model, reference, recipe):
        self.model, self.recipe = model, recipe
        self.reference = model if reference == "start" else reference

    def stage(self, recipe):
        return Preference(self.model, self.reference, recipe)

    def start(self, data, path=None, fresh=True):
        pass

    def finish(self, data):
        return {}

    def read(self, data, name, progress=None, **options):
        return Pairs(data, self.model, self.recipe, name, **options)

    def prepare(self, pairs, path=None, reference=None):
        """The reference's log-probabilities of pairs: from path, if they are there, else computed, and kept there (None: nowhere)."""
        key = f"{pairs.fingerprint}-{reference}"
        flat = None
        if path is not None and path.exists():
            with np.load(path) as file:
                if str(file["key"]) == key:
                    flat = file["log_probs"]
        if flat is None:
            flat = np.concatenate([part for pair in _log_probs(self.reference, pairs) for part in pair])
            if path is not None:
                with replacing(path) as file:
                    np.savez(file, key=key, log_probs=flat)
        ends = np.cumsum([len(ids) - start for pair in pairs.pairs for ids, start in pair])
        parts = np.split(flat, ends[:-1])
        pairs.reference = list(zip(parts[::2], parts[1::2]))

    def counts(self, batch):
        n = len(batch[0]) // 2
        return {"margin": n, "accuracy": n, "chosen": n, "rejected": n, "kl": int(np.count_nonzero(batch[1] >= 0))}

    def loss(self, batch, share, backward=False):
        """Means over the pairs: the margin beta m, how often it is positive, log-probabilities of both answers; and over tokens an
        estimate of KL(model || reference) that is exact where the answers are the model's (exp(x) - 1 - x, x = log p_ref - log p)."""
        ids, targets, reference = batch
        n, beta, smooth = len(ids) // 2, self.recipe["beta"], self.recipe["label_smoothing"]
        log_probs = self.model.log_probs(ids, targets)
        sums, gains = (array.sum(axis=1, dtype=np.float64) for array in (log_probs, log_probs - reference))
        margin = gains[:n] - gains[n:]
        if self.recipe["preference"] == "ipo":
            loss, slope = (margin - 0.5 / beta) ** 2, 2 * (margin - 0.5 / beta)
        else:
            loss = (1 - smooth) * np.logaddexp(0, -beta * margin) + smooth * np.logaddexp(0, beta * margin)
            right = np.exp(-np.logaddexp(0, -beta * margin))  # s(beta m)
            slope = beta * (smooth * right - (1 - smooth) * (1 - right))
        if backward:
            weight = -np.concatenate([slope, -slope]) * (share["margin"] / n)  # of each answer's log-probability
            self.model.log_probs(ids, targets, weights=np.broadcast_to(weight[:, None], ids.shape), recompute=self.recipe["recompute"])
        less = (reference - log_probs).astype(np.float64)[targets >= 0]
        return {"loss": share["margin"] * float(loss.mean()), "margin": float(beta * margin.mean()), "accuracy": float((margin > 0).mean()),
                "chosen": float(sums[:n].mean()), "rejected": float(sums[n:].mean()), "kl": float((np.expm1(less) - less).mean())}


def _log_probs(model, pairs):
    """Yields of each pair the log-probabilities (chosen's tokens), (rejected's tokens)."""
    at = 0
    for ids, targets, _ in pairs.once():
        found, n = model.log_probs(ids, targets), len(ids) // 2
        for i in range(n):
            yield tuple(found[half * n + i, start - 1:len(row) - 1] for half, (row, start) in enumerate(pairs.pairs[at + i]))
        at += n
