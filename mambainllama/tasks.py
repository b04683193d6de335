"""Four small tasks with checkable answers, written as chats: what the demo trains on and measures.

recall: letters with their numbers, then questions about some of them.  look-up: the same over names and cities.  copy: a string back.
arithmetic: sums of two numbers below 12; there are 144 of them, so they can be known by heart.

A small teacher learns copying and sums first, guesses among the values at hand for a thousand steps, and then learns within some hundred
to find the right one. Meant to help: a value that follows its key at once, few facts, and questions drawn with replacement, so that
leaving out what was answered already is no use."""
import json
from pathlib import Path

import numpy as np

from .generate import generate

LETTERS = list("abcdefghijklmnop")
NAMES = ["ann", "bob", "cid", "dora", "eve", "finn", "gus", "hal"]
CITIES = ["rome", "oslo", "bonn", "lima", "kyiv", "doha", "bern", "cork"]
NUMBERS = [str(n) for n in range(24)]
SIGNS = ["recall", "copy", "where", "is", "?", "|", "+", "=", "."]
ROLES = ["<s>", "<|user|>", "<|assistant|>", "<|end|>", "<unk>"]
WORDS = LETTERS + NUMBERS + NAMES + CITIES
VOCABULARY = ROLES + SIGNS + WORDS
TEMPLATE = ("{% for m in messages %}{{ '<|' + m['role'] + '|> ' + m['content'] }} <|end|> {% endfor %}"
            "{% if add_generation_prompt %}<|assistant|>{% endif %}")


def write_tokenizer(folder):
    """Writes tokenizer.json and tokenizer_config.json into `folder`: one token for each of VOCABULARY's words."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    tokenizer.add_special_tokens([AddedToken(role, special=True) for role in ROLES[:4]])
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "<|end|>", "unk_token": "<unk>",
              "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1))


def _chat(material, questions):
    """A chat in which the first question stands behind the material, and the others in turns of their own."""
    messages = []
    for question, answer in questions:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    messages[0]["content"] = f"{material} {messages[0]['content']}".strip()
    return messages


def _facts(rng, keys, values):
    """Two to five pairs, and the indices of three that are asked for, each drawn from all."""
    n = int(rng.integers(2, 6))
    return rng.permutation(keys)[:n], rng.permutation(values)[:n], rng.integers(0, n, 3)


def recall(rng):
    keys, values, asked = _facts(rng, LETTERS, NUMBERS)
    return _chat(f"recall {' '.join(f'{k} {v}' for k, v in zip(keys, values))} |", [(f"{keys[i]} ?", f"{keys[i]} {values[i]}") for i in asked])


def lookup(rng):
    names, cities, asked = _facts(rng, NAMES, CITIES)
    facts = " ".join(f"{name} {city} ." for name, city in zip(names, cities))
    return _chat(facts, [(f"where is {names[i]} ?", f"{names[i]} {cities[i]}") for i in asked])


def copying(rng):
    texts = [" ".join(rng.permutation(WORDS)[:rng.integers(4, 9)]) for _ in range(3)]
    return _chat("", [(f"copy {text}", text) for text in texts])


def arithmetic(rng):
    return _chat("", [(f"{a} + {b} = ?", str(a + b)) for a, b in rng.integers(0, 12, (5, 2))])


TASKS = {"recall": recall, "look-up": lookup, "copy": copying, "arithmetic": arithmetic}


def rows(count, seed):
    """`count` chat rows {"messages", "task"} of three to five questions, the tasks in turn, the same for the same seed."""
    rng, tasks = np.random.default_rng(seed), list(TASKS)
    return [{"messages": TASKS[task](rng), "task": task} for task in (tasks[i % len(tasks)] for i in range(count))]


def exact_match(model, rows, draft=None, lookahead=4, batch=None):
    """Greedy answers to each row's first question: ({task: share answered exactly}, generate's output)."""
    out = generate(model, [row["messages"][:1] for row in rows], max_new_tokens=10, draft=draft, lookahead=lookahead, batch=batch)
    right = {}
    for row, completion in zip(rows, out):
        right.setdefault(row["task"], []).append(completion.text.strip() == row["messages"][1]["content"])
    return {task: float(np.mean(hits)) for task, hits in right.items()}, out
