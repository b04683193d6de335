"""Four small tasks with checkable answers, written as chats: what the demo trains on and measures.

recall: pairs, then questions about some of them.  look-up: the same over a table of words, in sentences.  copy: a string back.
arithmetic: sums of two numbers below 20."""
import numpy as np

LETTERS = list("abcdefghijklmnopqrstuvwxyz")
NAMES = ["ann", "bob", "cid", "dora", "eve", "finn", "gus", "hal", "ida", "jon", "kim", "leo"]
CITIES = ["rome", "oslo", "bonn", "lima", "kyiv", "doha", "bern", "cork", "pisa", "nice", "lyon", "brno"]
WORDS = ["recall", "copy", "where", "in", "is", "?", "|", "+", "=", "."]
ROLES = ["<s>", "<|user|>", "<|assistant|>", "<|end|>", "<unk>"]
TEMPLATE = ("{% for m in messages %}{% if m['role'] == 'assistant' %}<|assistant|>{% generation %} {{ m['content'] }} <|end|>{% endgeneration %} "
            "{% else %}<|user|> {{ m['content'] }} <|end|> {% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}")


def write_tokenizer(folder):
    """tokenizer.json and tokenizer_config.json of the tasks' words into `folder`; returns how many tokens there are."""
    import json
    from pathlib import Path

    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    words = ROLES + WORDS + LETTERS + [str(n) for n in range(39)] + NAMES + CITIES
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.add_special_tokens([AddedToken(role, special=True) for role in ROLES[:4]])
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "<|end|>", "unk_token": "<unk>",
              "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1))
    return len(words)


def _turns(first, questions):
    """Chat rows: the first question stands behind the material, the others in turns of their own."""
    messages = []
    for i, (question, answer) in enumerate(questions):
        messages += [{"role": "user", "content": f"{first} {question}" if i == 0 else question}, {"role": "assistant", "content": answer}]
    return messages


def recall(rng, turns):
    n = int(rng.integers(3, 7))
    keys, values = rng.permutation(LETTERS)[:n], rng.integers(0, 10, n)
    first = "recall " + " ".join(f"{k} {v}" for k, v in zip(keys, values)) + " |"
    return _turns(first, [(f"{keys[i]} ?", f"{keys[i]} {values[i]}") for i in rng.integers(0, n, turns)])


def lookup(rng, turns):
    n = int(rng.integers(2, 5))
    names, cities = rng.permutation(NAMES)[:n], rng.permutation(CITIES)[:n]
    first = " ".join(f"{name} in {city} ." for name, city in zip(names, cities))
    return _turns(first, [(f"where is {names[i]} ?", f"{names[i]} in {cities[i]}") for i in rng.integers(0, n, turns)])


def copying(rng, turns):
    texts = [" ".join(rng.choice(LETTERS, int(rng.integers(4, 11)))) for _ in range((turns + 1) // 2)]
    return _turns("copy", [(text, text) for text in texts])


def arithmetic(rng, turns):
    pairs = rng.integers(0, 20, (turns, 2))
    return _turns("", [(f"{a} + {b} = ?", str(a + b)) for a, b in pairs])


TASKS = {"recall": recall, "look-up": lookup, "copy": copying, "arithmetic": arithmetic}


def rows(count, seed, turns=8, tasks=tuple(TASKS)):
    """`count` chat rows {"messages", "task"}, the tasks in turn, the same for the same seed."""
    rng = np.random.default_rng(seed)
    made = []
    for i in range(count):
        task = tasks[i % len(tasks)]
        made.append({"messages": [{**m, "content": m["content"].strip()} for m in TASKS[task](rng, turns)], "task": task})
    return made


def exact_match(model, rows, draft=None, lookahead=4):
    """Greedy answers to each row's first question: ({task: share answered exactly}, generate's stats)."""
    from .generate import generate

    out = generate(model, [row["messages"][:1] for row in rows], max_new_tokens=10, draft=draft, lookahead=lookahead)
    right = {}
    for row, completion in zip(rows, out):
        right.setdefault(row["task"], []).append(completion.text.strip() == row["messages"][1]["content"])
    return {task: float(np.mean(hits)) for task, hits in right.items()}, out.stats
