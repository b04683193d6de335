"""Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290): pairs of answers, and the objective over them.

A row is {"prompt": …, "chosen": …, "rejected": …}: prompt a list of messages, or a string, a user's message; the answers lists of messages,
or strings, the assistant's; or all three lists of token ids, for models without a tokenizer. Answers may be whole chats, as in
UltraFeedback: their prompt is the messages that both begin with, and "prompt" may be left out. What counts is the assistant's messages in
the answer, with the end that the template gives them.
Where the longer sequence of a pair would pass `length`, both lose the same beginning of their prompt, no more than is needed, and
prompt_length tokens of it stay; then an answer loses its end. So an answer's start stays, and is the same text for both models.

With r(y) = log p(y | prompt) - log p_reference(y | prompt), sums over the answer's tokens, and m = r(chosen) - r(rejected):
  sigmoid: -(1 - label_smoothing) log s(beta m) - label_smoothing log s(-beta m), s the logistic function
  ipo:     (r(chosen) / |chosen| - r(rejected) / |rejected| - 1 / (2 beta))^2, |y| the answer's tokens (Azar et al. 2023, arXiv 2310.12036;
           means, by its authors' word in huggingface/trl pull request 1265, or beta would depend on lengths)
The reference's log-probabilities are computed once, before the first step, and kept beside the run.

Loss and metrics are those of TRL 1.16's DPOTrainer on rows of messages (metrics are of sums under ipo, too), except that TRL
- takes label_smoothing for other losses only; sigmoid had ours up to TRL 0.28;
- counts whatever follows the prompt: a user's message within an answer, what a template leaves outside its {% generation %} block;
- takes strings as they are, with EOS after them; here a string is a message, since that is what the model will be asked with;
- cuts a long sequence at its end, however long the prompt; up to 0.28 the prompt lost all but max_prompt_length tokens, as here, yet also
  where all would have fitted;
- added EOS after the template's own end of an answer up to 0.27. BOS and EOS are the template's here, never twice."""
import hashlib

import numpy as np

from .data import NONE, is_chat, rows, shuffled
from .parallel import ranks
from .weights import replacing

WIDTH = 64


class Pairs:
    """Preference rows as batches of 2n sequences, the n chosen ones first; epoch after epoch in an order of its own.

    fingerprint: of the sequences, hexadecimal. ValueError says where a row is wrong."""

    def __init__(self, data, model, recipe, name="data", shuffle=True):
        self.size, self.seed, self.shuffle, self.length = recipe["batch"], recipe["seed"], shuffle, recipe["length"]
        prompt = recipe["prompt_length"] or self.length // 2
        if prompt >= self.length:
            raise ValueError(f"recipe: prompt_length is {prompt} and length {self.length}: nothing is left for an answer")
        self.pairs = [_cut(where, _pair(where, row, model), prompt, self.length) for where, row in rows(data, name)]
        if not self.pairs:
            raise ValueError(f"{name}: no rows")
        digest = hashlib.sha256()
        for ids, targets in (half for pair in self.pairs for half in pair):
            digest.update(len(ids).to_bytes(8, "little") + ids.tobytes() + targets.tobytes())
        self.fingerprint = digest.hexdigest()[:32]
        self.epoch = self.order = None  # the epoch whose order is at hand
        self.reference = None  # of each pair: the reference's log-probabilities of both answers' tokens

    def batch(self, step):
        """ids, targets, reference's log-probabilities of the step-th batch, counted from 0; each (2 batch, T), T as _width says."""
        return self.take(range(step * self.size, (step + 1) * self.size))

    def take(self, numbers):
        """A batch of these pairs, counted from 0 through all epochs; they rise."""
        return self._stack([self._at(i) for i in numbers])

    def once(self):
        """Yields the batches of one pass in the rows' own order; the last may have fewer pairs."""
        for at in range(0, len(self.pairs), self.size):
            yield self._stack(range(at, min(at + self.size, len(self.pairs))))

    def __len__(self):
        return len(self.pairs)

    @property
    def fill(self):
        """Share of positions that hold tokens, in the rows' own order."""
        parts = [self.pairs[at:at + self.size] for at in range(0, len(self.pairs), self.size)]
        return sum(len(ids) for pair in self.pairs for ids, _ in pair) / sum(2 * len(part) * self._width(part) for part in parts)

    def _width(self, pairs):
        """Positions of a batch of these pairs: the longest sequence, in whole steps of WIDTH, at most length."""
        return min(self.length, -(-max(len(ids) for pair in pairs for ids, _ in pair) // WIDTH) * WIDTH)

    def _at(self, i):
        epoch, at = divmod(i, len(self.pairs))
        if epoch != self.epoch:
            self.epoch, self.order = epoch, shuffled(len(self.pairs), self.seed, epoch) if self.shuffle else range(len(self.pairs))
        return self.order[at]

    def _stack(self, chosen):
        order = [(i, half) for half in (0, 1) for i in chosen]
        ids = np.zeros((len(order), self._width([self.pairs[i] for i in chosen])), np.int32)
        targets, reference = np.full_like(ids, NONE), np.zeros(ids.shape, np.float32)
        for b, (i, half) in enumerate(order):
            row, target = self.pairs[i][half]
            ids[b, :len(row)], targets[b, :len(row)] = row, target
            if self.reference is not None:
                reference[b, :len(row)][target >= 0] = self.reference[i][half]
        return ids, targets, reference


def _pair(where, row, model):
    """[(ids, which of them count) of chosen, of rejected]; nothing is cut."""
    for key in ("chosen", "rejected"):
        if key not in row:
            raise ValueError(f"{where}: a preference row has prompt, chosen and rejected, and this one lacks {key}")
    prompt, answers = row.get("prompt"), [row["chosen"], row["rejected"]]
    if all(isinstance(value, list) and all(type(i) is int for i in value) for value in (prompt, *answers)):
        vocab = model.config["vocab_size"]
        if any(not 0 <= i < vocab for value in (prompt, *answers) for i in value):
            raise ValueError(f"{where}: ids must be from 0 to {vocab - 1}")
        encoded = [(prompt + answer, [False] * len(prompt) + [True] * len(answer)) for answer in answers]
    elif model.tokenizer is None:
        raise ValueError(f"{where}: the model has no tokenizer, so prompt, chosen and rejected must be lists of token ids")
    else:
        prompt, answers = _chats(where, prompt, answers)
        try:
            encoded = model.tokenizer.encode_chats_with_mask([prompt + answer for answer in answers], len(prompt))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{where}: the chat cannot be used: {error}") from None
    for name, (_, counts) in zip(("chosen", "rejected"), encoded):
        if not any(counts) or counts[0]:
            raise ValueError(f"{where}: {f'{name} has no token that counts' if not any(counts) else 'the prompt has no token'}")
    return [(np.asarray(ids, np.int32), np.asarray(counts, bool)) for ids, counts in encoded]


def _chats(where, prompt, answers):
    """The prompt's messages, and those of both answers."""
    answers = [[{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer for answer in answers]
    given = prompt if isinstance(prompt, list) else []
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if not (all(map(is_chat, answers)) and (prompt is None or is_chat(prompt))):
        raise ValueError(f"{where}: prompt, chosen and rejected must be lists of objects with a role and a content, or strings")
    if prompt is not None and all(answer[0]["role"] not in ("system", "user") for answer in answers):
        return prompt, answers
    differ = [a != b for a, b in zip(*answers)]  # whole chats
    same = differ.index(True) if any(differ) else len(differ)
    if answers[0][:len(given)] != given:
        raise ValueError(f"{where}: chosen and rejected are whole chats, and do not begin with the messages of prompt")
    if not same:
        lacks, unlike = "this preference row lacks prompt", "chosen and rejected must be answers to the prompt, or whole chats that begin alike"
        raise ValueError(f"{where}: {lacks if prompt is None else unlike}")
    return answers[0][:same], [answer[same:] for answer in answers]


def _cut(where, pair, prompt, length):
    """The pair's (ids, targets), as the page at the top says."""
    start = min(int(counts.argmax()) for _, counts in pair)
    skip = max(min(start - prompt, max(len(ids) for ids, _ in pair) - length), 0)
    cut = []
    for name, (ids, counts) in zip(("chosen", "rejected"), pair):
        targets = np.append(np.where(counts, ids, NONE)[1:], NONE).astype(np.int32)[skip:]
        targets[length - 1:] = NONE
        if (targets < 0).all():
            raise ValueError(f"{where}: {name} has no token that counts within the recipe's length, {length}")
        cut.append((ids[skip:skip + length], targets[:length]))
    return cut


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
        if not all(ranks().every(flat is not None)):
            flat = np.concatenate([part for pair in _log_probs(self.reference, pairs) for part in pair])
            if path is not None and ranks().first:
                with replacing(path) as file:
                    np.savez(file, key=key, log_probs=flat)
        ends = np.cumsum([(targets >= 0).sum() for pair in pairs.pairs for _, targets in pair])
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
        margin, tokens = gains[:n] - gains[n:], 1
        if self.recipe["preference"] == "ipo":
            tokens = (targets >= 0).sum(axis=1)
            off = np.subtract(*np.split(gains / tokens, 2)) - 0.5 / beta
            loss, slope = off ** 2, 2 * off
        else:
            loss = (1 - smooth) * np.logaddexp(0, -beta * margin) + smooth * np.logaddexp(0, beta * margin)
            right = np.exp(-np.logaddexp(0, -beta * margin))  # s(beta m)
            slope = beta * (smooth * right - (1 - smooth) * (1 - right))
        if backward:
            weight = -np.concatenate([slope, -slope]) / tokens * (share["margin"] / n)  # of each answer's log-probability
            self.model.log_probs(ids, targets, weights=np.broadcast_to(weight[:, None], ids.shape), recompute=self.recipe["recompute"])
        less = (reference - log_probs).astype(np.float64)[targets >= 0]
        return {"loss": share["margin"] * float(loss.mean()), "margin": float(beta * margin.mean()), "accuracy": float((margin > 0).mean()),
                "chosen": float(sums[:n].mean()), "rejected": float(sums[n:].mean()), "kl": float((np.expm1(less) - less).mean())}


def _log_probs(model, pairs):
    """Of each pair the log-probabilities (chosen's tokens), (rejected's tokens); the ranks of a job share the work."""
    found = []
    for at, (ids, targets, _) in ranks().part(zip(range(0, len(pairs), pairs.size), pairs.once())):
        log_probs, n = model.log_probs(ids, targets), len(ids) // 2
        found.append([tuple(log_probs[half * n + i, :len(row)][target >= 0] for half, (row, target) in enumerate(pairs.pairs[at + i]))
                      for i in range(n)])
    return [pair for batch in ranks().whole(found) for pair in batch]
