"""Does a model find again what stood before? Probes that need no data: by token ids alone, and in text where there is a tokenizer.

associative  pairs of random tokens, a key and its value, among random others; the last token is one of the keys, and the value is
             what should follow: multi-query associative recall (Arora et al., arXiv 2312.04927) with one query
copy         a row's first tokens stand once more at its end: each has to predict the next
needle       a pass key somewhere in filler text, asked for at the end (Mohtashami & Jaggi, arXiv 2305.16300); greedy, exact
text_copy    a line of numbers, to be written again after one example; greedy, exact

A hybrid loses this first: a state of fixed size cannot hold all that attention can look up, and training on data that never asks
for it (or on too little) lets it fade without the loss telling. The same arguments give the same items on every model and device."""
import re

import numpy as np

from .generate import generate

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
COPIED = 32  # tokens of a row that are copied, at most
PROBES = ("needle", "text_copy", "associative", "copy")
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
HEAD = "There is important information hidden in a lot of irrelevant text. Find it and remember it."
NEEDLE = " The pass key is {key}. Remember it. {key} is the pass key."
QUESTION = " What is the pass key? The pass key is"
LINE = "Copy the line.\nLine: {example}\nCopy: {example}\nLine: {line}\nCopy:"


def recall(model, lengths=(256, 1024), depths=DEPTHS, items=8, seed=0, pairs=8, filler=FILLER, batch=8):
    """What share of `items` questions a length (and a depth) the model answers:

    "associative", "copy"   {length: accuracy} of the likeliest token
    "log_prob"              {length: mean log-probability of the right value among the values of the pairs}; by chance, -log(pairs)
    "needle"                {length: {depth: accuracy}}; depth 0: the needle comes first; None where the tokenizer has no digits, or
    "text_copy"             accuracy; None                                              there is none
    "score"                 mean of the accuracies, each probe weighing the same

    lengths: tokens of a question. pairs: of a row of "associative". filler: the text around a needle, repeated as needed. batch: rows
    of one call, which changes no item. ValueError: a length that has no room for its question, a vocabulary too small for the pairs."""
    lengths, seed = _check(lengths, items, seed, pairs, batch)
    found = {"associative": {}, "log_prob": {}, "copy": {}, "needle": None, "text_copy": None}
    for length in lengths:
        for probe, value in by_ids(model, length, items, seed, pairs, batch).items():
            found[probe][length] = value
    if model.tokenizer is not None and _has_digits(model.tokenizer):
        found["needle"] = needle(model, lengths, depths, items, seed, filler, batch)
        found["text_copy"] = _text_copy(model, items, seed, batch)
    return found | {"score": float(np.mean(list(means(found).values())))}


def by_ids(model, length, items=8, seed=0, pairs=8, batch=8):
    """{"associative", "log_prob", "copy"} of recall at one length."""
    ids, targets, values = associative(model, length, items, seed, pairs)
    logits = _last(model, ids, 1, batch)[:, 0]
    among = np.take_along_axis(logits, values, 1).astype(np.float64)  # the right one is the first
    ids, copied = copying(model, length, items, seed)
    n = int((copied[0] >= 0).sum())
    right = _last(model, ids, n + 1, batch)[:, :n].argmax(-1) == copied[:, -n - 1:-1]
    return {"associative": float((logits.argmax(-1) == targets[:, -1]).mean()),
            "log_prob": float((among[:, 0] - np.logaddexp.reduce(among, 1)).mean()), "copy": float(right.mean())}


def means(found):
    """{probe: mean accuracy} of what recall returned, for the probes that ran."""
    def mean(table):
        return float(np.mean([mean(value) for value in table.values()])) if isinstance(table, dict) else table
    return {probe: mean(found[probe]) for probe in PROBES if found[probe] is not None}


def recall_guard(before, after, limit):
    """None, or one sentence that names each probe whose mean accuracy fell by more than limit. before, after: what recall returned
    (also from JSON), with the same arguments."""
    was, now = means(before), means(after)
    fell = [f"{probe} from {was[probe]:.2f} to {now[probe]:.2f}" for probe in was if probe in now and was[probe] - now[probe] > limit]
    return f"recall fell by more than {limit:g}: {', '.join(fell)}" if fell else None


def associative(model, length, items, seed=0, pairs=8):
    """Rows of `pairs` keys and values at random places and a key at the end: (ids, targets (items,length), values (items,pairs)).

    The target is the key's value, at the last position alone (elsewhere -100); values begin with it."""
    tokens = _tokens(model)
    if length < 2 * pairs + 1:
        raise ValueError(f"recall: {length} tokens have no room for {pairs} pairs and a question")
    if len(tokens) < 2 * pairs + 1:
        raise ValueError(f"recall: {pairs} pairs need a vocabulary of {2 * pairs + 1} tokens, and the model has {len(tokens)}")
    rng = _rng(seed, 0, length)
    ids, targets, values = (np.full((items, n), -100, np.int32) for n in (length, length, pairs))
    for row in range(items):
        chosen = rng.permutation(tokens)[:2 * pairs]
        ids[row] = rng.choice(np.setdiff1d(tokens, chosen), length)
        at = np.sort(rng.permutation(length - 1 - pairs)[:pairs]) + np.arange(pairs)  # a pair is one of length - 1 - pairs things
        ids[row, at], ids[row, at + 1] = chosen[:pairs], chosen[pairs:]
        asked = rng.randint(pairs)
        ids[row, -1], targets[row, -1] = chosen[asked], chosen[pairs + asked]
        values[row] = np.roll(chosen[pairs:], -asked)
    return ids, targets, values


def copying(model, length, items, seed=0):
    """Rows whose last n tokens are their first n, different ones, and are none of those between: (ids, targets (items,length)).

    n = COPIED, or as many as row and vocabulary have room for; the targets are all of them but the first, elsewhere -100."""
    tokens = _tokens(model)
    n = min(COPIED, length // 2, len(tokens) // 2)
    if n < 2:
        raise ValueError(f"recall: {length} tokens of a vocabulary of {len(tokens)} have no room for a copy")
    rng = _rng(seed, 1, length)
    ids, targets = (np.full((items, length), -100, np.int32) for _ in range(2))
    for row in range(items):
        chosen = rng.permutation(tokens)[:n]
        ids[row] = rng.choice(np.setdiff1d(tokens, chosen), length)
        ids[row, :n] = ids[row, -n:] = chosen
        targets[row, -n:-1] = chosen[1:]
    return ids, targets


def needle(model, lengths, depths=DEPTHS, items=8, seed=0, filler=FILLER, batch=8, words=(HEAD, NEEDLE, QUESTION)):
    """{length: {depth: share of `items` pass keys that greedy generation names}}; arguments as for recall. words: what the text begins with,
    the needle around {key}, and the question. ValueError: no tokenizer."""
    if model.tokenizer is None:
        raise ValueError("recall: a needle in text needs a tokenizer, and the model has none")
    lengths, seed = _check(lengths, items, seed, 1, batch)
    if not isinstance(depths, (list, tuple)) or not depths or not all(isinstance(d, (int, float)) and 0 <= d <= 1 for d in depths):
        raise ValueError(f"recall: depths must be a list of numbers from 0 to 1, not {depths!r}")
    if not isinstance(filler, str) or not filler.strip():
        raise ValueError(f"recall: filler must be some text, not {filler!r}")

    def encode(text):
        return model.tokenizer.encode(text, add_special_tokens=False)
    head, question = model.tokenizer.encode(words[0]), encode(words[2])
    sentences = [encode(" " + text) for text in re.split(r"(?<=[.!?])\s+", filler.strip()) if text]
    table = {}
    for length in lengths:
        rng, table[length] = _rng(seed, 2, length), {}
        for depth in depths:
            keys, prompts = [str(rng.randint(10000, 100000)) for _ in range(items)], []
            for key in keys:
                hidden = encode(words[1].format(key=key))
                room = length - len(head) - len(hidden) - len(question)
                if room < 0:
                    raise ValueError(f"recall: {length} tokens have no room for a needle and its question, which take {length - room}")
                text, begins = _text(sentences, rng.randint(len(sentences)), room)
                at = min(begins, key=lambda place: abs(place - depth * room))
                prompts.append([*head, *text[:at], *hidden, *text[at:], *question])
            table[length][float(depth)] = _exact(model, prompts, keys, batch)
    return table


def _text_copy(model, items=8, seed=0, batch=8):
    """Share of `items` lines of six numbers that greedy generation copies."""
    rng = _rng(seed, 3, 0)
    lines = [[" ".join(map(str, rng.randint(10, 100, 6))) for _ in range(2)] for _ in range(items)]
    return _exact(model, [model.tokenizer.encode(LINE.format(example=a, line=b)) for a, b in lines], [b for _, b in lines], batch)


def _exact(model, prompts, answers, batch):
    """Share of the prompts that are continued by their answers, numbers."""
    longest = max(len(model.tokenizer.encode(" " + answer, add_special_tokens=False)) for answer in answers)
    out = generate(model, prompts, max_new_tokens=longest + 2, batch=batch)
    return float(np.mean([re.match(re.escape(answer) + r"(?!\d)", row.text.strip()) is not None for row, answer in zip(out, answers)]))


def _text(sentences, first, n):
    """n tokens of the sentences, over and over from the first-th on, and where sentences begin (and the text ends)."""
    text, begins = [], []
    while len(text) < n:
        begins.append(len(text))
        text += sentences[(first + len(begins) - 1) % len(sentences)]
    return text[:n], [*begins, n]


def _has_digits(tokenizer):
    return "31415" in tokenizer.decode(tokenizer.encode("31415")).replace(" ", "")


def _tokens(model):
    """The ids that questions are made of: all but what ends an answer."""
    return np.setdiff1d(np.arange(model.config["vocab_size"], dtype=np.int32), model.stop_tokens)


def _last(model, ids, n, batch):
    """Logits of the last n positions (rows,n,V)."""
    return np.concatenate([model.logits(ids[at:at + batch], last=n) for at in range(0, len(ids), batch)])


def _rng(seed, *more):
    return np.random.RandomState([seed & 0xFFFFFFFF, seed >> 32, *more])  # NumPy never changes its streams


def _check(lengths, items, seed, pairs, batch):
    lengths = list(lengths) if isinstance(lengths, (list, tuple, range, np.ndarray)) else [lengths]
    given = {"lengths": (lengths, 2), "items": ([items], 1), "seed": ([seed], 0), "pairs": ([pairs], 1), "batch": ([batch], 1)}
    for name, (values, low) in given.items():
        if not values or not all(isinstance(v, (int, np.integer)) and not isinstance(v, bool) and low <= v < 2**63 for v in values):
            raise ValueError(f"recall: {name} must be {'integers' if name == 'lengths' else 'an integer'} from {low} up, not {values!r}")
    return [int(length) for length in lengths], int(seed)
