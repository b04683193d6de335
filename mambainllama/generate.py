"""Text from a model: batches of prompts of any lengths, greedy or sampled, plain or with a draft model.

There is one loop. A round proposes K tokens for every live row with the draft model, runs the model over the row's last
token and these K in one call, accepts the first n of them and draws one more (Leviathan et al. 2023; for Mamba models the
multi-step scheme of arXiv 2408.15237, section 4). Plain decoding is the round with K = 0.

Nothing is undone when a proposal is rejected: the calls of a round leave their tokens pending in the State, `commit` accepts
the first n + 1 of them, and the next call drops the rest.

A call of few tokens gives a row the same bits whatever runs beside it, every prompt is prefilled in calls of its own, and a
uniform is a function of (seed, prompt index, position, use). So a row depends on nothing but its own prompt and index, and
greedy output is the same with and without a draft.
"""
from collections import deque
from dataclasses import dataclass, field
from time import perf_counter

import numpy as np

from .model import Model, State, need_model

PART = {"cpu": 256, "cuda": 1024}  # part_size, by device
MAX_LOOKAHEAD = 15  # last token + lookahead <= 16 tokens, the calls in which a row's bits are its own (FEW in ops.h)
ROWS = 32  # rows decoded side by side unless `batch` says otherwise
CHOICES = {"temperature": np.float32, "top_k": np.int32, "top_p": np.float32, "min_p": np.float32, "index": np.int32}  # one a row


@dataclass
class Completion:
    """What one prompt became.

    text      the new text, up to a stop string; "" where the model has no tokenizer
    tokens    the new token ids; a stop token is not among them, the tokens that spell a stop string are
    finish    "stop" (a stop token or a stop string) | "length" (max_new_tokens)
    end       the stop token that ended it, None without
    logprobs  None, or a dict for each of `tokens`: {id: log probability} of the chosen token and the k likeliest, by the
              model itself (before temperature and the filters)
    """
    text: str = ""
    tokens: list = field(default_factory=list)
    finish: str = "length"
    end: int | None = None
    logprobs: list | None = None


class Output(list):
    """A list of Completion, one a prompt; `stats` is a dict:

    seconds                    of the whole call
    prompt_tokens, prefill_tokens_per_second, prefill_seconds
    new_tokens, tokens_per_second, decode_seconds
    rounds                     calls of the model after the prefill
    drafted, accepted          tokens proposed by the draft model, and how many the model agreed to (0 without a draft)
    acceptance                 accepted / drafted
    tokens_per_verify          tokens that a row gains from one call of the model, on average: 1 without a draft
    """

    def __init__(self, rows, stats):
        super().__init__(rows)
        self.stats = stats


def generate(model, prompts, max_new_tokens=64, temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, seed=0, stop=None,
             stop_tokens=None, draft=None, lookahead=4, callback=None, logprobs=None, batch=None, index=None, finished=None):
    """Continue each prompt; -> Output, a list of Completion with `.stats`, in the order of the prompts.

    prompts         str | chat (a list of {"role", "content"}) | a list of token ids, or a list of these. One prompt alone
                    gives a list of one.
    max_new_tokens, temperature, top_k, top_p, min_p
                    one value, or one a prompt. temperature 0: the likeliest token. Filters in the order of ops.h: top_k
                    likeliest (0: all), the smallest set of mass top_p, those of at least min_p times the largest.
    seed            of the uniforms; a sampled row depends on it, on its prompt and on its index, not on the others
    stop            a string or a list of them: generation ends where one has appeared, `.text` ends before it
    stop_tokens     ids that end a row; None: the model's own, model.stop_tokens, []: none
    draft           a model of the same vocabulary and any kind of layers that proposes `lookahead` (0 to 15) tokens a round
    callback        called as callback(index, token, text) for each of a row's tokens, `text` being what became certain with
                    it ("" or whole characters, never part of a stop string), and once as callback(index, None, rest) when
                    the row is finished. The texts of a row join to its `.text`.
    logprobs        k: also the log probabilities of each token and of the k likeliest
    batch           rows decoded side by side (None: at most 32); as one finishes the next prompt takes its place. The
                    outcome does not depend on it. Memory is batch * (longest prompt + max_new_tokens) of K/V.
    index           one a prompt: the number that it takes its uniforms by (None: its place in `prompts`)
    finished        called as finished(place, completion) as soon as the prompt at that place is done

    ValueError, in one sentence: an empty prompt, an id outside the vocabulary, text for a model without a tokenizer, a value
    out of range or not one a prompt, a draft of another vocabulary."""
    began = perf_counter()
    need_model(model, "generate: model")
    prompts = encode_prompts(model, prompts)
    n = len(prompts)
    limit = _each("max_new_tokens", max_new_tokens, n, np.int32, lambda v: v >= 0, "0 or more")
    choose = {
        "temperature": _each("temperature", temperature, n, np.float32, lambda v: (v >= 0) & np.isfinite(v), "0 or more"),
        "top_k": _each("top_k", top_k, n, np.int32, lambda v: v >= 0, "0 (all) or more"),
        "top_p": _each("top_p", top_p, n, np.float32, lambda v: (v > 0) & (v <= 1), "in (0, 1]"),
        "min_p": _each("min_p", min_p, n, np.float32, lambda v: (v >= 0) & (v <= 1), "in [0, 1]"),
        "index": _each("index", range(n) if index is None else index, n, np.int32, lambda v: v >= 0, "0 or more"),
    }
    stops = _stop_strings(model, stop)
    ends = _stop_ids(model, stop_tokens)
    lookahead = lookahead_of(model, draft, lookahead)
    V = model.config["vocab_size"]
    if logprobs is not None and not (isinstance(logprobs, (int, np.integer)) and 0 <= logprobs <= V):
        raise ValueError(f"generate: logprobs must be None or 0 to {V} tokens, not {logprobs!r}")
    if not isinstance(seed, (int, np.integer)) or not 0 <= seed < 1 << 53:
        raise ValueError(f"generate: seed must be an integer from 0 to 2**53 - 1, not {seed!r}")
    if batch is not None and not (isinstance(batch, (int, np.integer)) and batch >= 1):
        raise ValueError(f"generate: batch must be None or 1 or more rows, not {batch!r}")
    for name, value, of in (("callback", callback, "index, token, text"), ("finished", finished, "place, completion")):
        if value is not None and not callable(value):
            raise ValueError(f"generate: {name} must be None or a function of ({of}), not {value!r}")

    rows = [Row(i, ids, int(limit[i]), model.tokenizer, stops, ends, logprobs, callback, finished,
                {name: values[i] for name, values in choose.items()}, int(seed)) for i, ids in enumerate(prompts)]
    waiting = deque(row for row in rows if not row.finished)
    slots = min(len(waiting), batch or ROWS)
    room = max((len(row.ids) + row.limit for row in waiting), default=0)
    table = Table(model, draft, lookahead, slots, room)
    prefill_seconds = 0
    while waiting or any(table.seats):
        start = perf_counter()
        for slot in range(slots):
            if table.seats[slot] is None and waiting:
                table.seat(slot, waiting.popleft())
                while not table.read(slot):
                    pass
        prefill_seconds += perf_counter() - start
        table.round()
    return Output([row.out for row in rows], _summary(table.stats, rows, prompts, prefill_seconds, perf_counter() - began))


class Table:
    """`slots` rows of up to `room` tokens side by side on one State a model; rows come and go, each at its own time.

    seats   the Row in each slot, None where it is free. A row is seated, then read, a part of its prompt a call, then takes part in rounds;
            it leaves when it is finished, or when its seat is set to None. `spare` slots behind these are the caller's own.
    stats   counts: rounds, drafted, accepted, verified (rows of all rounds), decided (tokens of all rows)"""

    def __init__(self, model, draft, lookahead, slots, room, spare=0):
        self.models = [model, draft] if lookahead else [model]
        self.lookahead, self.seats = lookahead, [None] * slots
        self.states = [State(m, slots + spare, room + lookahead + 1) for m in self.models] if slots else []
        self.stats = dict.fromkeys(("rounds", "drafted", "accepted", "verified", "decided"), 0)
        self.choices = {name: np.zeros(slots, dtype) for name, dtype in CHOICES.items()}  # of the rows in seats, and their seeds
        self.seeds = np.zeros(slots, np.int64)

    def seat(self, slot, row, source=None, n=0):
        """Gives the row a free slot, empty or with the row's first n tokens, which slot `source` has read."""
        for state in self.states:
            state.reset([slot]) if source is None else state.copy(slot, source)
        for name, values in self.choices.items():
            values[slot] = row.choice[name]
        self.seeds[slot] = row.seed
        self.seats[slot], row.read = row, n

    def read(self, slot):
        """Puts the next part of the row's prompt (all but its last token, which the first round reads) into its slot; -> whether all is.

        A part is a call of its own and ends at a multiple of part_size, so that a row's bits are a function of its ids alone."""
        row = self.seats[slot]
        part = row.ids[row.read:min(row.read + part_size(self.models[0]), row.prompt - 1)]
        if part:
            ids, at = np.array([part], np.int32), np.array([slot], np.int32)
            logits = self.models[0].logits(ids, self.states[0], slot=at, last=None if row.echo else 0)
            for m, state in zip(self.models[1:], self.states[1:]):
                m.logits(ids, state, slot=at, last=0)
            if row.echo:
                follow = row.ids[row.read + 1:row.read + 1 + len(part)]
                row.echoed += [log_probabilities(z, token, row.likeliest) for z, token in zip(logits[0], follow)]
            row.read += len(part)
        return row.read >= row.prompt - 1

    def round(self):
        """One round for all rows that are read; -> those that have finished in it, whose seats are free again."""
        live = np.array([slot for slot, row in enumerate(self.seats) if row and row.read >= row.prompt - 1], np.int32)
        done = []
        if not len(live):
            return done
        rows = [self.seats[slot] for slot in live]
        choices = {name: values[live] for name, values in self.choices.items()}
        gains = _round(self.models, self.states, live, rows, choices, self.seeds[live], self.lookahead, self.stats)
        for slot, row, (tokens, logits) in zip(live, rows, gains):
            for token, row_logits in zip(tokens, logits):
                self.stats["decided"] += 1
                if row.push(token, row_logits):
                    done.append(row)
                    self.seats[slot] = None
                    break
        return done


def part_size(model):
    """Tokens of one prefill call: few enough to decode between them, many enough for full speed."""
    return PART[model.device]


def _round(models, states, slots, rows, choices, seeds, lookahead, stats):
    """One round for `rows` in `slots`, whose choices and seeds are arrays: -> for each row its new tokens (accepted proposals and one more) and
    their logits.

    The model's State stands before the row's last token, the draft's at most one token before that."""
    at = np.array([len(row.ids) for row in rows], np.int32)  # where the first token of the round will stand
    count = np.array([min(lookahead, row.room - 1) for row in rows], np.int32)
    K, B = int(count.max()), len(rows)
    unread, keep = np.zeros((len(rows), 1), np.int32), np.zeros(len(rows), np.int32)
    if K:  # what the draft has not read yet: two tokens after a round in which all was accepted, else one
        behind = [row.ids[p:] for row, p in zip(rows, states[1].pos[slots])]
        keep = np.array([len(ids) for ids in behind], np.int32)
        unread = np.zeros((len(rows), keep.max()), np.int32)
        for b, tokens in enumerate(behind):
            unread[b, :len(tokens)] = tokens
    last = np.array([row.ids[-1] for row in rows], np.int32)
    draft = (models[1].c, states[1].c) if K else (None, None)
    proposed, accepted, token, logits = models[0].c.round(
        states[0].c, *draft, (slots, last, choices.pop("index"), at, count, unread, keep),
        (*choices.values(), seeds.view(np.int32)),  # low word, high word
        any(row.likeliest is not None for row in rows))
    for row, offered, agreed in zip(rows, count.tolist(), accepted.tolist()) if K else ():
        row.drafted += offered
        row.accepted += agreed
    stats["rounds"] += 1
    stats["verified"] += B
    stats["drafted"] += int(count.sum())
    stats["accepted"] += int(accepted.sum())
    tokens = [[*drawn[:n], one] for drawn, n, one in zip(proposed.tolist(), accepted.tolist(), token.tolist())]
    return list(zip(tokens, logits if logits is not None else ([None] * len(one) for one in tokens)))


class Row:
    """One prompt on its way: its tokens so far, and the text that is certain.

    choice, seed  what it is sampled by: a value for each of CHOICES; of the uniforms
    echo          also log probabilities of its prompt, in echoed: those of ids[1:], a dict each as in Completion.logprobs
    ended         the same of the stop token that ended it, None without
    drafted, accepted  tokens proposed for it, and how many the model agreed to"""

    def __init__(self, place, ids, limit, tokenizer, stops, ends, logprobs, callback, done, choice, seed, echo=False):
        self.place, self.ids, self.limit, self.stops, self.ends = place, list(ids), limit, stops, ends
        self.callback, self.done, self.choice, self.seed, self.echo = callback, done, choice, seed, echo
        self.prompt, self.read = len(ids), 0
        self.drafted = self.accepted = 0
        self.echoed, self.ended = [], None
        self.out = Completion(logprobs=None if logprobs is None else [])
        self.likeliest = logprobs
        self.tokenizer = tokenizer
        self.stream = tokenizer.stream() if tokenizer and (stops or callback) else None  # else the text is made of all tokens at the end
        self.held = ""  # text that may turn out to begin a stop string
        self.finished = False
        if limit == 0 and not echo:
            self.finish("length")

    @property
    def room(self):
        return self.limit - len(self.out.tokens)

    def push(self, token, logits):
        """Takes the next token and the logits (V) it was drawn from; -> whether the row is finished."""
        likely = None if self.likeliest is None else log_probabilities(logits, token, self.likeliest)
        if token in self.ends:
            self.out.end, self.ended = token, likely
            return self.finish("stop")
        self.ids.append(token)
        self.out.tokens.append(token)
        if likely is not None:
            self.out.logprobs.append(likely)
        if self.stream and self._stops(self.stream.push(token)):
            self._emit(token, len(self.held))
            return self.finish("stop")
        if self.stream or self.callback:
            self._emit(token, len(self.held) - _overlap(self.held, self.stops))
        return self.finish("length") if self.room == 0 else False

    def _stops(self, text):
        """Holds `text` too; -> whether that completes a stop string: then only what is before it is held, and no text follows."""
        self.held += text
        found = [(self.held.index(s) + len(s), self.held.index(s)) for s in self.stops if s in self.held]
        if found:  # the one that is complete first
            self.held, self.stream = self.held[:min(found)[1]], None
        return bool(found)

    def _emit(self, token, n):
        """The first n characters of what is held are certain."""
        text, self.held = self.held[:n], self.held[n:]
        self.out.text += text
        if self.callback:
            self.callback(self.place, token, text)

    def finish(self, why):
        """Ends it; -> True."""
        if self._stops(self.stream.flush() if self.stream else ""):
            why = "stop"
        if self.tokenizer and not (self.stops or self.callback):
            self.held = self.tokenizer.decode(self.out.tokens)
        self._emit(None, len(self.held))
        self.out.finish, self.finished = why, True
        if self.done:
            self.done(self.place, self.out)
        return True


def _overlap(text, stops):
    """The length of the longest end of `text` that begins one of `stops`."""
    return max((n for s in stops for n in range(1, min(len(s), len(text) + 1)) if text.endswith(s[:n])), default=0)


def log_probabilities(logits, token, k):
    """{id: log softmax(logits)[id]} of `token` and the k likeliest (lower id first among equals), likeliest first.
    logits (V) float."""
    z = logits.astype(np.float64) - logits.max()
    z -= np.log(np.exp(z).sum())
    least = np.partition(z, -k)[-k] if 0 < k < len(z) else -np.inf  # then only these need an order
    near = np.flatnonzero(z >= least) if k else np.zeros(0, int)
    top = near[np.argsort(-z[near], kind="stable")][:k]
    ids = [int(i) for i in top] + ([] if token in top else [token])
    return {i: float(z[i]) for i in ids}


def encode_prompts(model, prompts):
    """One prompt (str | chat | token ids) or a list of these -> a list of lists of token ids."""
    if _is_prompt(prompts):
        prompts = [prompts]
    elif not isinstance(prompts, (list, tuple, np.ndarray)):
        raise ValueError(f"generate: prompts must be text, a chat, token ids or a list of these, not {type(prompts).__name__}")
    return [encode_prompt(model, prompt, f"generate: prompt {i}") for i, prompt in enumerate(prompts)]


def _is_prompt(p):
    many = isinstance(p, (list, tuple, np.ndarray)) and len(p) > 0
    return isinstance(p, str) or many and isinstance(p[0], (dict, int, np.integer))


def encode_prompt(model, prompt, name):
    """One prompt -> a list of token ids; name begins the sentence of a ValueError."""
    if isinstance(prompt, (list, tuple, np.ndarray)) and not len(prompt):
        raise ValueError(f"{name} is empty: there is nothing to continue")
    if not _is_prompt(prompt):
        raise ValueError(f"{name} must be text, a chat or token ids, not {type(prompt).__name__}")
    if isinstance(prompt, str) or isinstance(prompt[0], dict):
        if model.tokenizer is None:
            raise ValueError(f"{name} is text, but the model has no tokenizer: give token ids")
        encode = model.tokenizer.encode if isinstance(prompt, str) else model.tokenizer.encode_chat
        ids = list(encode(prompt))
        if not ids:
            raise ValueError(f"{name} has no tokens: there is nothing to continue")
        return ids
    V = model.config["vocab_size"]
    for t in prompt:
        if not isinstance(t, (int, np.integer)) or not 0 <= t < V:
            raise ValueError(f"{name} holds {t!r}, which is no id of a vocabulary of {V}")
    return [int(t) for t in prompt]


def _each(name, value, n, dtype, valid, range_):
    """One value or one a prompt -> (n) array."""
    try:
        values = np.asarray(value)
        exact = values.astype(dtype)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"generate: {name} must be a number or one a prompt, not {value!r}") from None
    if values.ndim > 1 or values.ndim == 1 and len(values) != n:
        raise ValueError(f"generate: {name} must be one value or one a prompt ({n}), but it has shape {values.shape}")
    if dtype == np.int32 and (exact != values).any() or not valid(exact).all():
        raise ValueError(f"generate: {name} must be {range_}, not {value!r}")
    return np.ascontiguousarray(np.broadcast_to(exact, n))


def _list(value):
    """The items of a list, set or array; what is none of these as the only item."""
    try:
        return [value] if isinstance(value, str) else list(value)
    except TypeError:
        return [value]


def _stop_strings(model, stop):
    stops = [] if stop is None else _list(stop)
    if not all(isinstance(s, str) and s for s in stops):
        raise ValueError(f"generate: stop must be a non-empty string or a list of these, not {stop!r}")
    if stops and model.tokenizer is None:
        raise ValueError("generate: stop strings need a tokenizer, and the model has none: use stop_tokens")
    return stops


def _stop_ids(model, stop_tokens):
    ids = model.stop_tokens if stop_tokens is None else _list(stop_tokens)
    if not all(isinstance(t, (int, np.integer)) for t in ids):
        raise ValueError(f"generate: stop_tokens must be token ids, not {stop_tokens!r}")
    return frozenset(int(t) for t in ids)


def lookahead_of(model, draft, lookahead):
    if not isinstance(lookahead, (int, np.integer)) or not 0 <= lookahead <= MAX_LOOKAHEAD:
        raise ValueError(f"generate: lookahead must be 0 to {MAX_LOOKAHEAD} tokens, not {lookahead!r}")
    if draft is None:
        return 0
    if not isinstance(draft, Model):
        raise ValueError(f"generate: draft must be None or a model, not {draft!r}")
    ours, theirs = model.config["vocab_size"], draft.config["vocab_size"]
    if ours != theirs:
        raise ValueError(f"generate: the draft model has a vocabulary of {theirs} tokens, the model one of {ours}")
    return int(lookahead)


def _summary(stats, rows, prompts, prefill, seconds):
    new, prompt = sum(len(row.out.tokens) for row in rows), sum(map(len, prompts))
    rate = lambda n, s: n / s if s else 0.0
    return {
        "seconds": seconds, "prompt_tokens": prompt, "prefill_seconds": prefill,
        "prefill_tokens_per_second": rate(prompt, prefill), "new_tokens": new, "decode_seconds": seconds - prefill,
        "tokens_per_second": rate(new, seconds - prefill), "rounds": stats["rounds"], "drafted": stats["drafted"],
        "accepted": stats["accepted"], "acceptance": rate(stats["accepted"], stats["drafted"]),
        "tokens_per_verify": rate(stats["decided"], stats["verified"]),
    }
