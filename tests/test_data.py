"""Rows, kept tokens, packing and batches: no target is lost, documents stay apart, a batch is a function of its number."""
import importlib
import json
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from mambainllama import data as module
from mambainllama import tasks, weights
from mambainllama.data import NONE, START, Batches, read
from mambainllama.recipe import DEFAULTS, load_recipe
from mambainllama.tokenizer import Tokenizer


class Letters:
    """A tokenizer: letters are tokens; a chat is its contents in a row."""

    fingerprint = "letters"

    def encode_batch(self, texts):
        return [[ord(c) for c in text] for text in texts]

    def encode_chats_with_mask(self, chats):
        return [([ord(c) for m in messages for c in m["content"]], [int(m["role"] == "assistant") for m in messages for _ in m["content"]])
                for messages in chats]


class Small(Letters):
    """All tokens are 0 or 1, so that ids alone pass a small vocabulary."""

    fingerprint = "small"

    def encode_batch(self, texts):
        return [[0, 1] for _ in texts]

    def encode_chats_with_mask(self, chats):
        return [([0, 1], [0, 1]) for _ in chats]


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
    for data, says in [(tmp_path / "none", "No such file"), ([], "no rows"), (7, "list of rows"), ([7], "data row 0"),
                       ([{"text": "a"}], "no tokenizer"), (tmp_path, r"folder without a file \*.parquet"), ("hub:", "hub:NAME"),
                       ([tmp_path / "none", {"text": "a"}], "a list of paths or a list of rows, not dict")]:
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


ROWS = [{"messages": [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "cd"}]}, {"text": "ab"},
        {"ids": [3, 4, 5], "mask": [0, 1, 1]}, {"ids": [7, 8]}] * 100


def equal(a, b):
    return a.fingerprint == b.fingerprint and all(np.array_equal(*pair) for pair in zip((a.ids, a.mask, a.lengths), (b.ids, b.mask, b.lengths)))


def jsonl(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_several_sources(tmp_path):
    a, b = jsonl(tmp_path / "a.jsonl", ROWS[:3]), jsonl(tmp_path / "b.jsonl", [*ROWS[3:6], {"ids": [-1]}])
    with pytest.raises(ValueError, match=f"{b}:4: ids must be from 0"):
        read([a, str(b)], Letters())
    jsonl(b, ROWS[3:7])
    assert equal(read([a, str(b)], Letters()), read(ROWS[:7], Letters())) and len(list(module.rows([b, a, b]))) == 11


def test_answers_only():
    assert len(read([ROWS[0], ROWS[2]], Letters(), answers=True)) == 2
    for row in (ROWS[1], ROWS[3]):
        with pytest.raises(ValueError, match="data row 1: a row for fine-tuning has messages, or ids and a mask"):
            read([ROWS[0], row], Letters(), answers=True)


def test_the_bad_row_of_a_batch_is_named(tmp_path):
    tasks.write_tokenizer(tmp_path)
    chat = tasks.rows(1, 0)[0]
    for bad in ({"text": "\ud800"}, {"messages": [{"role": "user", "content": "\ud800"}]}):
        with pytest.raises(ValueError, match="data row 2: (text|messages) cannot be used") as error:
            read([{"text": chat["messages"][0]["content"]}, chat, bad, chat], Tokenizer(tmp_path))
        assert "\n" not in str(error.value)


def test_parquet_is_what_jsonl_is(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    text = pyarrow.string()
    schema = pyarrow.schema({"messages": pyarrow.list_(pyarrow.struct({"role": text, "content": text, "name": text})), "text": text,
                             "ids": pyarrow.list_(pyarrow.int64()), "mask": pyarrow.list_(pyarrow.int8())})  # what a row lacks is null
    for name, rows in (("b", ROWS[150:]), ("a", ROWS[:150])):
        parquet.write_table(pyarrow.Table.from_pylist(rows, schema), tmp_path / f"{name}.parquet", row_group_size=40)
    assert [row for _, row in module.rows(tmp_path)] == ROWS
    for source in (tmp_path, [f"{tmp_path}/a.parquet", tmp_path / "b.parquet"]):
        assert equal(read(source, Letters()), read(ROWS, Letters()))
    with pytest.raises(ValueError, match=r"a\.parquet:3: ids must be from 0 to 4, and one is 5"):
        read(tmp_path / "a.parquet", Small(), vocab=5)
    (tmp_path / "c.parquet").write_bytes(b"PAR1 is not enough")
    for name in ("c.parquet", "none.parquet"):
        with pytest.raises(ValueError, match=f"{name} cannot be read: ") as error:
            read(tmp_path / name)
        assert "\n" not in str(error.value)


def test_the_hub(tmp_path, monkeypatch, keep):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(importlib.import_module("huggingface_hub").constants, "HF_HUB_OFFLINE", True)
    folder = tmp_path / "folder"
    folder.mkdir()
    jsonl(folder / "train.jsonl", ROWS[:4])
    jsonl(folder / "test.jsonl", ROWS[:4][::-1])
    assert equal(read(f"hub:{folder}", Letters()), read(ROWS[:4], Letters()))
    before = len(keep)
    assert len(read(f"hub:{folder}", Letters())) == 4 and len(keep) == before
    assert equal(read([f"hub:{folder}:default:test", f"hub:{folder}:train"], Letters()), read(ROWS[:4][::-1] + ROWS[:4], Letters()))
    for split, rows in (("train[:3]", ROWS[:3]), ("train[1:]", ROWS[1:4])):  # of the same files
        assert equal(read(f"hub:{folder}:{split}", Letters()), read(rows, Letters()))
    for source, says in ((f"hub:{folder}:dev", "dev"), (f"hub:{folder}:test", ":test:1: ids must be"), ("hub:nobody/nothing", "reach"),
                         (f"hub:{tmp_path}/nowhere", "cannot be loaded")):
        with pytest.raises(ValueError, match=says) as error:
            read(source, Small(), vocab=5)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("source, module", [("a.parquet", "pyarrow"), ("hub:nobody/nothing", "datasets")])
def test_a_missing_library_is_named(monkeypatch, source, module):
    for name in ("pyarrow", "pyarrow.parquet", "datasets"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=rf"needs {module}: pip install 'mambainllama\[data\]'$"):
        read(source, Letters())


@pytest.fixture
def keep(tmp_path, monkeypatch):
    """Keeps whatever is read in tmp_path/tokens; a list with an item for each time that something was encoded."""
    encoded, encode = [], module._encode
    monkeypatch.setattr(module, "_encode", lambda *args: encoded.append(args) or encode(*args))
    monkeypatch.setattr(module, "KEPT_BYTES", 1)
    monkeypatch.setenv("MIL_CACHE", str(tmp_path / "tokens"))
    return encoded


def test_tokens_are_kept(tmp_path, keep, capsys):
    source, folder = jsonl(tmp_path / "rows.jsonl", ROWS), tmp_path / "tokens"
    first = read(source, Letters())
    entry, = folder.iterdir()
    said = capsys.readouterr().err
    assert f"{source} are kept for the next run in {entry}" in said and said.count("\n") == 1 and len(keep) == 1
    again = read(source, Letters())
    assert len(keep) == 1 and equal(first, again) and equal(again, read(ROWS, Letters())) and capsys.readouterr().err == ""
    assert not any(array.flags.owndata or array.flags.writeable for array in (again.ids, again.mask, again.lengths))  # in the file
    assert all(np.array_equal(*pair) for pair in zip(Batches(again, 8, 2).batch(3), Batches(read(ROWS, Letters()), 8, 2).batch(3)))
    content, before = entry.read_bytes(), len(keep)
    for damaged in (content[:-5], content[:600] + bytes([content[600] ^ 1]) + content[601:], b"", b"another's file, long enough"):
        entry.write_bytes(damaged)
        assert equal(read(source, Letters()), first) and entry.read_bytes() == content
    assert len(keep) == before + 4 and [*folder.iterdir()] == [entry]


def test_what_decides_the_tokens_decides_the_entry(tmp_path, keep):
    source = jsonl(tmp_path / "rows.jsonl", tasks.rows(9, 0))
    tasks.write_tokenizer(tmp_path / "model")
    times, changed = os.stat(source), []

    def kept(**options):
        """Whether the tokens were there."""
        count = len(keep)
        assert len(read(source, Tokenizer(tmp_path / "model"), **options)) == 9
        return len(keep) == count
    assert not kept(vocab=999) and kept(vocab=999)
    assert not kept(vocab=998) and not kept(vocab=999, answers=True)
    text = source.read_text()
    source.write_text(text.replace("?", "!", 1) if "?" in text else text[::-1])
    os.utime(source, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert os.stat(source).st_size == times.st_size and not kept(vocab=999)
    settings = tmp_path / "model" / "tokenizer_config.json"
    for path, change in ((settings, lambda text: text), (tmp_path / "model" / "tokenizer.json", lambda text: text + " ")):
        path.write_text(change(path.read_text()))
    assert not kept(vocab=999) and kept(vocab=999)
    template = json.loads(settings.read_text())
    settings.write_text(json.dumps(template | {"chat_template": template["chat_template"] + "{# changed #}"}))
    assert not kept(vocab=999) and kept(vocab=999)


def test_what_is_not_kept(tmp_path, keep, monkeypatch):
    source, pipe, folder = jsonl(tmp_path / "rows.jsonl", ROWS), tmp_path / "pipe", tmp_path / "tokens"
    os.mkfifo(pipe)

    class Unknown(Letters):
        fingerprint = property()  # hasattr is False
    for data, tokenizer, least, where in ((ROWS, Letters(), 1, folder), (source, Letters(), 1 << 20, folder), (source, Unknown(), 1, folder),
                                          (source, Letters(), 1, ""), ([source, pipe], Letters(), 1, folder)):
        monkeypatch.setattr(module, "KEPT_BYTES", least)
        monkeypatch.setenv("MIL_CACHE", str(where))
        with ThreadPoolExecutor(1) as pool:
            if data == [source, pipe]:
                pool.submit(pipe.write_text, '{"text": "a"}')
            assert len(read(data, tokenizer)) in (400, 401) and not folder.exists()
    monkeypatch.setattr(module, "KEPT_BYTES", 1)
    monkeypatch.setenv("MIL_CACHE", str(source / "below"))
    with pytest.warns(UserWarning, match="cannot be written .*MIL_CACHE"):
        assert len(read(source, Letters())) == 400


def test_who_keeps_the_same_at_the_same_time(tmp_path, keep, monkeypatch):
    source, barrier, replace = jsonl(tmp_path / "rows.jsonl", ROWS), threading.Barrier(3, timeout=60), os.replace

    def together(*paths):
        barrier.wait()  # all have written, none has renamed
        replace(*paths)
    monkeypatch.setattr(weights.os, "replace", together)
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda _: read(source, Letters()), range(3)))
    assert len(keep) == 3 and all(equal(documents, read(ROWS, Letters())) for documents in found)
    before = len(keep)
    assert len([*(tmp_path / "tokens").iterdir()]) == 1 and equal(read(source, Letters()), found[0]) and len(keep) == before


def test_recipe_files_and_defaults(tmp_path):
    recipe = load_recipe({"steps": 10})
    assert {key: recipe[key] for key in DEFAULTS} == DEFAULTS
    assert recipe["stages"] == [{"mamba_layers": None, "steps": 10, "epochs": None, "mixer": None, "init": "attention"}]
    assert load_recipe(recipe) == recipe and load_recipe({"steps": 10, "ce": 0.5}, kl=0.0, ce=1.0)["ce"] == 0.5
    assert load_recipe({"steps": 1, "eval_data": [tmp_path, "b.parquet"]})["eval_data"] == [str(tmp_path), "b.parquet"]
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
    ({"steps": 5, "mixer": "mamba1", "window": 8}, "go with mixer 'window', not with 'mamba1'"), ({"steps": 5, "sinks": -1}, "null or an integer from 0"),
    ({"stages": [{"steps": 5, "kl": 0, "ce": 0}]}, "nothing to learn"), ({"stages": [{"steps": 5, "length": 9}]}, "unknown key 'length'"),
    ({"steps": 5, "guard": {"limits": 1}}, "guard must be null or a mapping"), ({"steps": 5, "guard": {"limit": 2}}, "from 0 to 1"),
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
