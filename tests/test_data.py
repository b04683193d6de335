"""Rows, packing and batches: no target is lost, documents stay apart, a batch is a function of its number."""
import json

import numpy as np
import pytest

from mambainllama import data as module
from mambainllama.data import NONE, START, Batches, read
from mambainllama.recipe import DEFAULTS, load_recipe


class Letters:
    """A tokenizer: letters are tokens; a chat is its contents in a row."""

    def encode_batch(self, texts):
        return [[ord(c) for c in text] for text in texts]

    def encode_chats_with_mask(self, chats):
        return [([ord(c) for m in messages for c in m["content"]], [int(m["role"] == "assistant") for m in messages for _ in m["content"]])
                for messages in chats]


def documents(lengths, seed=0):
    """Documents of these lengths whose tokens are all different, about half of them counting."""
    rng, first = np.random.default_rng(seed), 1
    for n in lengths:
        yield np.arange(first, first + n, dtype=np.int32), rng.random(n) < 0.5
        first += n


def counted(docs):
    """The (token, next token) pairs that a model must be trained on."""
    return sorted((int(a), int(b)) for ids, mask in docs for a, b, m in zip(ids, ids[1:], mask[1:]) if m)


def trained(batches):
    return sorted((int(a), int(b)) for ids, targets, _ in batches for a, b in zip(ids.ravel(), targets.ravel()) if b != NONE)


@pytest.fixture(params=[4, module.WINDOW])
def window(request, monkeypatch):
    monkeypatch.setattr(module, "WINDOW", request.param)


@pytest.mark.parametrize("length", [1, 2, 7, 64, 1000])
@pytest.mark.parametrize("shuffle", [False, True])
def test_an_epoch_trains_every_target_once(window, length, shuffle):
    docs = list(documents([0, 5, 1, 0, 30, 7, 8, 64, 129, 2, 2, 3, 1] * 3))
    assert trained(Batches(docs, length, 4, seed=3, shuffle=shuffle).once()) == counted(docs)


def test_the_epochs_of_training_too(window):
    docs = list(documents([5, 9, 30, 7, 8]))
    batches = Batches(docs, 16, 1, seed=3)
    seen, step = [], 0
    while len(seen) < 3 * len(counted(docs)):
        seen += trained([batches.batch(step)])
        step += 1
    assert sorted(seen) == sorted(3 * counted(docs))


def test_documents_do_not_see_each_other():
    docs = list(documents([5, 9, 30, 7, 8, 3, 3, 3]))
    for ids, targets, prev in Batches(docs, 16, 2, seed=1).once():
        assert ids.dtype == targets.dtype == prev.dtype == np.int32 and ids.shape == targets.shape == prev.shape
        t = np.arange(16)
        assert ((prev == t - 1) | (prev == START)).all() and (prev[:, 0] == START).all()
        inside = prev[:, 1:] != START
        assert (ids[:, 1:] - ids[:, :-1] == 1)[inside & (ids[:, 1:] > 0)].all()        # tokens follow in their document
        assert ((targets == NONE) | (targets == ids + 1)).all()                        # so do targets
        padding = ids == 0
        assert (targets[padding] == NONE).all() and (np.sort(padding, 1) == padding).all()
        assert (prev[padding & ~np.roll(padding, 1, 1)] == START).all()


def test_a_batch_is_a_function_of_its_number(window):
    docs = list(documents([5, 9, 30, 7, 8] * 4))
    there, back = Batches(docs, 16, 3, seed=5), Batches(docs, 16, 3, seed=5)
    forward = [there.batch(step) for step in range(20)]
    for step in (19, 3, 11, 0, 12):
        assert all(np.array_equal(a, b) for a, b in zip(back.batch(step), forward[step]))
    assert not np.array_equal(Batches(docs, 16, 3, seed=6).batch(0)[0], forward[0][0])
    rows = np.concatenate([batch[0] for batch in forward])
    assert np.array_equal(rows, np.concatenate([Batches(docs, 16, 6, seed=5).batch(step)[0] for step in range(10)]))


def test_positions_are_where_the_tokens_are(window):
    docs = list(documents([5, 9, 30, 7, 8, 3, 3, 40]))
    batches = Batches(docs, 16, 3, seed=1)
    flat = np.concatenate([ids for ids, _ in docs])
    counts = np.concatenate([np.append(mask[1:], False) for _, mask in docs])  # what a token predicts
    pairs = [(batches.positions(step), batches.batch(step)) for step in (0, 5, 1)] + list(zip(batches.positions_once(), batches.once()))
    assert len(pairs) > 4
    for at, (ids, targets, _) in pairs:
        assert at.dtype == np.int64 and at.shape == ids.shape and np.array_equal(at == -1, ids == 0)
        assert np.array_equal(ids[at >= 0], flat[at[at >= 0]])
        assert np.array_equal((targets != NONE)[at >= 0], counts[at[at >= 0]])


def test_packing_fills_rows():
    rows = list(Batches(list(documents([4] * 64)), 16, 4).once())
    assert len(rows) == 4 and all((ids > 0).all() for ids, _, _ in rows)
    lengths = np.random.default_rng(0).lognormal(4, 1, 3000).astype(int) % 255 + 2
    batches = Batches([(np.ones(n), np.ones(n)) for n in lengths], 256, 8, seed=1)
    room = rows = 0
    for n in lengths:  # next-fit: into the last row if there is room, else into a new one
        rows, room = (rows, room - n) if n <= room else (rows + 1, 256 - n)
    assert rows * 256 * 0.85 > lengths.sum() and batches.fill > 0.99
    tokens = [(at >= 0).sum(axis=1) for at in batches.positions_once()]
    assert batches.fill == pytest.approx(lengths.sum() / (256 * sum(map(len, tokens)))) and len(batches) == sum(map(len, tokens))
    longest = [at[:, 0] for at in batches.positions_once()]
    first = lengths[np.searchsorted(np.cumsum(lengths), np.concatenate(longest), "right")]
    assert abs(np.corrcoef(first, np.arange(len(first)))[0, 1]) < 0.1  # steps are not sorted by length


def test_fingerprint():
    docs = list(documents([5, 9]))
    one = Batches(docs, 16, 3).fingerprint
    assert one == Batches(docs, 32, 1, seed=2).fingerprint
    others = [docs[::-1], docs[:1], [docs[0], (docs[1][0], ~docs[1][1])], [docs[0], (docs[1][0] + 1, docs[1][1])]]
    assert one not in {Batches(other, 16, 3).fingerprint for other in others}


def test_rows_of_every_form(tmp_path):
    path = tmp_path / "rows.jsonl"
    chat = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "cd"}]
    rows = [{"messages": chat}, {"text": "ab"}, {"ids": [3, 4, 5], "mask": [0, 1, 1]}, {"ids": [7, 8]}]
    path.write_text("\n\n".join(map(json.dumps, rows)) + "\n")
    expected = [([97, 98, 99, 100], [0, 0, 1, 1]), ([97, 98], [0, 1]), ([3, 4, 5], [0, 1, 1]), ([7, 8], [0, 1])]
    for data in (path, str(path), rows):
        assert [(ids.tolist(), mask.tolist()) for ids, mask in read(data, Letters())] == expected
    ids, targets, _ = Batches(read([{"messages": chat}], Letters()), 4, 1).batch(0)
    assert ids.tolist() == [[97, 98, 99, 100]] and targets.tolist() == [[NONE, 99, 100, NONE]]  # b predicts c


@pytest.mark.parametrize("line, says", [
    ('{"text": "a"', "not JSON"), ('["text"]', "object"), ("{}", "messages, text and ids"), ('{"text": 3}', "string"),
    ('{"text": "a", "ids": [1]}', "messages, text and ids"), ('{"messages": []}', "messages"),
    ('{"messages": [{"role": "user"}]}', "content"), ('{"ids": [1.5]}', "integers"), ('{"ids": [[1], [2]]}', "integers"),
    ('{"ids": [[1], 2]}', "ids"), ('{"ids": 7}', "ids"), ('{"ids": [1, 2], "mask": [1]}', "mask"),
    ('{"ids": [1, 2], "mask": [1, 2]}', "mask"), ('{"ids": [1, 100]}', "0 to 99, and one is 100"), ('{"ids": [-1]}', "is -1"),
    ('{"ids": [99999999999999999999]}', "integers"),
])
def test_a_bad_row_is_named(tmp_path, line, says):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"ids": [1, 2]}\n\n' + line)
    with pytest.raises(ValueError, match=says) as error:
        read(path, Letters(), vocab=100)
    assert str(error.value).startswith(f"{path}:3: ") and "\n" not in str(error.value)


def test_other_sentences(tmp_path):
    for data, says in [(tmp_path / "none", "No such file"), ([], "no rows"), (7, "list of rows"), (["a"], "data row 0"),
                       ([{"text": "a"}], "no tokenizer"), (tmp_path, "cannot be read")]:
        with pytest.raises(ValueError, match=says):
            read(data)
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "latin").write_bytes(b'{"text": "\xe9"}')
    for name, says in (("empty", "no rows"), ("latin", ":1: not UTF-8")):
        with pytest.raises(ValueError, match=says):
            read(tmp_path / name, Letters())
    for rows in ([{"ids": []}], [{"ids": [1]}, {"ids": [2]}], [{"ids": [1, 2], "mask": [1, 0]}]):
        with pytest.raises(ValueError, match="no token counts"):
            Batches(read(rows), 8, 1)


def test_recipe_files_and_defaults(tmp_path):
    recipe = load_recipe({"steps": 10})
    assert {key: recipe[key] for key in DEFAULTS} == DEFAULTS
    assert recipe["stages"] == [{"mamba_layers": None, "steps": 10, "epochs": None, "mixer": None, "init": "attention"}]
    assert load_recipe(recipe) == recipe and load_recipe({"steps": 10, "ce": 0.5}, kl=0.0, ce=1.0)["ce"] == 0.5
    (tmp_path / "r.yaml").write_text("stages:\n- {mamba_layers: [2, 0], steps: 5, mixer: mamba1}\n- {steps: 7}\nlr: 1e-4\ntrain: '*mamba*'\n")
    (tmp_path / "r.json").write_text(json.dumps({"stages": [{"mamba_layers": [0, 2], "steps": 5, "mixer": "mamba1"}, {"steps": 7}],
                                                 "lr": 0.0001, "train": ["*mamba*"]}))
    recipe = load_recipe(tmp_path / "r.yaml")
    assert recipe == load_recipe(str(tmp_path / "r.json")) and recipe["lr"] == 1e-4
    assert [s["mamba_layers"] for s in recipe["stages"]] == [[0, 2], None]


@pytest.mark.parametrize("recipe, says", [
    ({"steps": 5, "learning_rate": 1}, "unknown key 'learning_rate'"), ({"steps": 5, "betass": [0, 0]}, "did you mean 'betas'"),
    ({"step": 5}, "did you mean 'steps'"), ({"steps": 5, "warm_up": 0}, "'warmup'"), ({}, "one of steps, epochs and stages"),
    ({"stages": [{"steps": 1, "mamba_layer": [1]}]}, "stages\\[0\\]: unknown key 'mamba_layer'; did you mean 'mamba_layers'"),
    ({"steps": 5, "stages": []}, "not steps and stages"), ({"stages": []}, "at least one"), ({"stages": [5]}, "stages\\[0\\]"),
    ({"stages": [{"mamba_layers": [0]}]}, "steps is missing"), ({"steps": 0}, "steps must be an integer from 1 up, not 0"),
    ({"steps": 5, "batch": 10**12}, "batch must be an integer from 1 to 1048576"), ({"steps": 5, "accumulate": 10**12}, "accumulate"),
    ({"steps": 5, "length": 10**12, "batch": 1}, "batch \\* length must be at most 2147483647 tokens, not 1 \\* 1000000000000"),
    ({"steps": True}, "not True"), ({"steps": 2.0}, "not 2.0"), ({"steps": 5, "lr": -1}, "lr must be a number from 0 up"),
    ({"steps": 5, "lr": float("nan")}, "not nan"), ({"steps": 5, "lr": "fast"}, "'fast'"), ({"steps": 5, "betas": [0.9, 1]}, "below 1"),
    ({"steps": 5, "betas": 0.9}, "two numbers"), ({"steps": 5, "warmup": 1.1}, "a share of the steps from 0 to 1, or a whole number"), ({"steps": 5, "clip": 0}, "null or"),
    ({"steps": 5, "schedule": "cos"}, "'cosine' or 'linear'"), ({"steps": 5, "kl": 0, "ce": 0}, "nothing to learn"),
    ({"steps": 5, "temperature": 0}, "above 0"), ({"steps": 5, "train": []}, "patterns"), ({"steps": 5, "recompute": 1}, "true or false"),
    ({"steps": 5, "seed": -1}, "seed"), ({"steps": 5, "mixer": "mamba"}, "null or 'mamba1' or 'mamba2'"), ({"steps": 5, "eval_data": 3}, "path"),
    ({"stages": [{"mamba_layers": [0, 0], "steps": 1}]}, "different layer numbers"),
    ({"stages": [{"mamba_layers": [0, 2], "steps": 1}, {"mamba_layers": [2], "steps": 1}]}, "stages\\[1\\]: mamba_layers lacks layers \\[0\\]"),
    ({"stages": [{"mamba_layers": [1], "steps": 1}, {"mamba_layers": [], "steps": 1}]}, "lacks"),
    ({"stages": [{"steps": 5, "epochs": 1}]}, "not both"), ({"epochs": 0}, "above 0"), ({"steps": 5, "on_policy": True}, "belongs to align"),
    ({"stages": [{"steps": 5, "kl": 0, "ce": 0}]}, "nothing to learn"), ({"stages": [{"steps": 5, "length": 9}]}, "unknown key 'length'"),
    (7, "dict or a path"), ("/nowhere.yaml", "No such file"),
])
def test_a_bad_recipe_is_one_sentence(recipe, says):
    with pytest.raises(ValueError, match=says) as error:
        load_recipe(recipe)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name, text, says", [("r.yaml", "a: b: c", "r.yaml:1: not YAML"), ("r.json", "{\n,}", "r.json:2: not JSON"),
                                              ("r.yaml", "- steps", "mapping"), ("r.yaml", "", "mapping"), ("r.yaml", "lr: 1e-3", "steps")])
def test_a_bad_recipe_file(tmp_path, name, text, says):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=says):
        load_recipe(tmp_path / name)
