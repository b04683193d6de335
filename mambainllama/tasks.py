"""Four small tasks with checkable answers, written as chats: what the demo trains on and measures.

recall: letters with their numbers, then questions about some of them.  look-up: the same over names and cities, in sentences.
copy: a string back.  arithmetic: sums of two numbers below 12; there are 144 of them, so they can be known by heart."""
import json
from pathlib import Path

import numpy as np

from .generate import generate

LETTERS = list("abcdefghijklmnopqrstuvwxyz")
NAMES = ["ann", "bob", "cid", "dora", "eve", "finn", "gus", "hal", "ida", "jon", "kim", "leo"]
CITIES = ["rome", "oslo", "bonn", "lima", "kyiv", "doha", "bern", "cork", "pisa", "nice", "lyon", "brno"]
NUMBERS = [str(n) for n in range(24)]
WORDS = ["recall", "copy", "where", "lives", "in", "is", "?", "|", "+", "=", "."]
ROLES = ["<s>", "<|user|>", "<|assistant|>", "<|end|>", "<unk>"]
VOCABULARY = ROLES + WORDS + LETTERS + NUMBERS + NAMES + CITIES
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


def recall(rng, turns):
    n = int(rng.integers(3, 7))
    keys, values = rng.permutation(LETTERS)[:n], rng.permutation(NUMBERS)[:n]
    pairs = [f"{k} {v}" for k, v in zip(keys, values)]
    asked = [rng.permutation(n)[:3] for _ in range(turns)]
    return _chat(f"recall {' '.join(pairs)} |", [(" ".join(keys[which]), " ".join(pairs[i] for i in which)) for which in asked])


def lookup(rng, turns):
    n = int(rng.integers(3, 6))
    names, cities = rng.permutation(NAMES)[:n], rng.permutation(CITIES)[:n]
    facts = [f"{name} in {city} ." for name, city in zip(names, cities)]
    asked = [rng.permutation(n)[:2] for _ in range(turns)]
    return _chat(" ".join(facts), [(f"where is {' . '.join(names[which])} ?", " ".join(facts[i] for i in which)) for which in asked])


def copying(rng, turns):
    texts = [" ".join(rng.permutation(LETTERS)[:rng.integers(4, 9)]) for _ in range(max(1, turns // 2))]
    return _chat("", [(f"copy {text}", text) for text in texts])


def arithmetic(rng, turns):
    return _chat("", [(f"{a} + {b} = ?", str(a + b)) for a, b in rng.integers(0, 12, (max(1, turns // 3), 2))])


TASKS = {"recall": recall, "look-up": lookup, "copy": copying, "arithmetic": arithmetic}


def rows(count, seed, turns=6):
    """`count` chat rows {"messages", "task"} of about `turns` questions, the tasks in turn, the same for the same seed."""
    rng, tasks = np.random.default_rng(seed), list(TASKS)
    return [{"messages": TASKS[task](rng, turns), "task": task} for task in (tasks[i % len(tasks)] for i in range(count))]


def exact_match(model, rows, draft=None, lookahead=4, batch=None):
    """Greedy answers to each row's first question: ({task: share answered exactly}, generate's output)."""
    out = generate(model, [row["messages"][:1] for row in rows], max_new_tokens=12, draft=draft, lookahead=lookahead, batch=batch)
    right = {}
    for row, completion in zip(rows, out):
        right.setdefault(row["task"], []).append(completion.text.strip() == row["messages"][1]["content"])
    return {task: float(np.mean(hits)) for task, hits in right.items()}, out
