"""The same multiple-choice items by likelihood and by generation. A model can rank the right letter first and never say it, or name one letter
whatever is asked: an accuracy hides both, the letters that it chooses show them."""
import re
from collections import Counter

import numpy as np

from ..data import rows as read_rows
from .figures import histograms, save
from .lm import log_likelihoods
from .run import Records, Run, complete, digest, question

LETTERS = "ABCDEFGHIJ"
NONE = "none"  # of a generation that names no letter
ASK = "{question}\n{choices}\nAnswer with the letter of the right choice.\nAnswer:"


def gap(model, out, items=None, count=100, max_new_tokens=32, seed=0, batch=None, name=None, progress=None):
    """Results, also in out/results.json with out/letters.svg. Scores: "likelihood" and "generation", the accuracies; "gap", their difference;
    "agreement", the share of items where both choose the same; "unread", of generations that name no letter; "likelihood_text", the accuracy
    by the likelihood a byte of the whole choice. "letters": {way: {letter: count}}, "right" among the ways.

    items   JSONL of {"question", "choices": [2 to 10 strings], "answer": a letter or a number from 0}; None: `count` made from seed,
            each letter right equally often
    Generation is greedy, after the chat template where there is one; likelihood compares the letters after "Answer:".
    ValueError: an item of another form, a model without a tokenizer."""
    if model.tokenizer is None:
        raise ValueError("gap: the model has no tokenizer, and items are text")
    asked = read_items(items) if items is not None else make_items(count, seed)
    run = Run(out, "gap", model, {"items": digest(asked), "count": len(asked), "max_new_tokens": max_new_tokens}, name)
    prompts = [ASK.format(question=item["question"], choices="\n".join(f"{letter}. {text}" for letter, text in zip(LETTERS, item["choices"])))
               for item in asked]
    said = complete(run, model, [{"key": i, "prompt": question(model, prompt), "index": i, "temperature": 0.0} for i, prompt in enumerate(prompts)],
                    max_new_tokens, batch, progress, file="generations.jsonl")
    chosen = {"likelihood": _by_likelihood(run, model, asked, prompts, batch or 8, progress, "letters"),
              "likelihood_text": _by_likelihood(run, model, asked, prompts, batch or 8, progress, "text"),
              "generation": [named(said[i]["text"], item["choices"]) for i, item in enumerate(asked)],
              "right": [LETTERS[item["answer"]] for item in asked]}
    right = {way: {str(i): float(a == b) for i, (a, b) in enumerate(zip(letters, chosen["right"]))} for way, letters in chosen.items() if way != "right"}
    letters = {way: {letter: count for letter, count in sorted(Counter(chosen[way]).items(), key=lambda pair: (pair[0] == NONE, pair[0]))}
               for way in ("right", "likelihood", "generation")}
    scores = {way: float(np.mean(list(values.values()))) for way, values in right.items()}
    scores |= {"gap": scores["likelihood"] - scores["generation"], "unread": chosen["generation"].count(NONE) / len(asked),
               "agreement": float(np.mean([a == b for a, b in zip(chosen["likelihood"], chosen["generation"])]))}
    save(histograms({run.about["model"]: letters}), run.out / "letters.svg")
    return run.finish(scores, right, letters=letters)


def read_items(source):
    found = []
    for where, row in read_rows(source, "items"):
        choices, answer = row.get("choices"), row.get("answer")
        if not isinstance(row.get("question"), str) or not isinstance(choices, list) or not 2 <= len(choices) <= len(LETTERS) or not all(
                isinstance(choice, str) and choice for choice in choices):
            raise ValueError(f"{where}: an item needs a question and choices, 2 to {len(LETTERS)} strings")
        if isinstance(answer, str) and len(answer) == 1 and answer.upper() in LETTERS:
            answer = LETTERS.index(answer.upper())
        if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
            raise ValueError(f"{where}: answer must be a letter or a number of one of the {len(choices)} choices, not {row.get('answer')!r}")
        found.append({"question": row["question"], "choices": choices, "answer": answer})
    if not found:
        raise ValueError(f"items: {source} has none")
    return found


def make_items(count, seed=0):
    """Sums, the largest of four numbers, words of a list and letters of a word, four choices each; item i's right letter is the (i mod 4)-th."""
    rng = np.random.RandomState(seed)
    words = "apple river stone cloud chair bread horse paper glass music tiger ocean".split()
    made = []
    for i in range(count):
        kind = (i // 4) % 4
        if kind == 0:
            a, b = rng.randint(2, 50, 2)
            right, ask = a + b, f"What is {a} + {b}?"
            others = [right + d for d in rng.permutation([-10, -2, -1, 1, 2, 10])[:3]]
        elif kind == 1:
            right, *others = sorted(rng.permutation(np.arange(10, 100))[:4], reverse=True)
            ask = "Which number is the largest?"
        elif kind == 2:
            some = rng.permutation(words)[:4]
            place = rng.randint(4)
            right, others = some[place], [word for word in some if word != some[place]]
            ask = f"Which word is the {('first', 'second', 'third', 'fourth')[place]} of this list: {', '.join(some)}?"
        else:
            right, *others = rng.permutation(words)[:4]
            ask = f"Which word is spelled {'-'.join(right)}?"
        choices = [str(other) for other in others]
        choices.insert(i % 4, str(right))
        made.append({"question": ask, "choices": choices, "answer": i % 4})
    return made


def _by_likelihood(run, model, items, prompts, batch, progress, what):
    """The letter of the likeliest continuation of each prompt: of " A" …, or of the choice's text, a byte."""
    records = Records(run.out / f"likelihoods-{what}.jsonl", lambda row: row["key"])
    todo, pairs, owners = [i for i in range(len(items)) if i not in records.rows], [], []
    for i in todo:
        context = model.tokenizer.encode(prompts[i])
        for n, choice in enumerate(items[i]["choices"]):
            text = " " + (LETTERS[n] if what == "letters" else choice)
            whole = model.tokenizer.encode(prompts[i] + text)
            pairs.append((context, whole[len(context):]))
            owners.append((i, n, 1 if what == "letters" else len(text.encode())))
    values = {i: [None] * len(items[i]["choices"]) for i in todo}

    def done(place, found):
        i, n, size = owners[place]
        values[i][n] = found[0] / size
        if None not in values[i]:
            records.add({"key": i, "log_p": values[i]})
    log_likelihoods(model, pairs, batch, done, progress)
    return [LETTERS[int(np.argmax(records.rows[i]["log_p"]))] for i in range(len(items))]


def named(text, choices):
    """The letter that a generation names: after "answer is" or at its beginning, else the only choice whose text it has, else the first letter by
    itself; NONE without."""
    letters = LETTERS[:len(choices)]
    for pattern in (rf"(?i:answer)(?:\s+(?i:is))?\W{{0,4}}\s*\(?([{letters}])\b", rf"^\W*([{letters}])(?:\W|$)"):
        found = re.search(pattern, text)
        if found:
            return found[1]
    held = [letter for letter, choice in zip(letters, choices) if re.search(rf"(?<!\w){re.escape(choice)}(?!\w)", text)]
    if len(held) == 1:
        return held[0]
    found = re.search(rf"(?<!\w)([{letters.replace('A', '')}])(?!\w)", text)  # "A" is also an article
    return found[1] if found else NONE
