"""A teacher's cached predictions: what they are, that a killed cache ends with the same bits, what k leaves out, and distillation from them."""
import importlib
import json
import os
import signal

import numpy as np
import pytest

import mambainllama as mil
from mambainllama.data import Batches, read
from test_train import CONFIG, V, bits, full_disk, history, pair, rows

module = importlib.import_module("mambainllama.cache")  # mil.cache is the function
LENGTH = 20  # some of the documents are longer
RECIPE = {"stages": [{"mamba_layers": [1], "steps": 3}, {"mamba_layers": [0, 1], "steps": 2, "init": "calibrated"}], "length": LENGTH,
          "batch": 2, "lr": 3e-3}


def cache(out, teacher=None, data=rows(1), **changes):
    return mil.cache(teacher or pair()[1], data, out, **{"length": LENGTH, "k": 5, "batch": 2, **changes})


def arrays(folder):
    return [np.load(folder / f"{name}.npy") for name in ("ids", "log_probs", "tail")]


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(folder, report) of a cache that nothing interrupted."""
    folder = tmp_path_factory.mktemp("cache") / "whole"
    return folder, cache(folder)


def test_every_token_has_what_the_teacher_predicts(whole):
    """Of its own piece alone: what else was in the row, and the piece before, do not count."""
    folder, report = whole
    teacher, (ids, log_probs, tail) = pair()[1], arrays(folder)
    at = 0
    for document, _ in read(rows(1)):
        for start in range(0, len(document), LENGTH):
            piece = document[None, start:start + LENGTH]
            n = piece.shape[1]
            if start + n < len(document) or n > 1:  # something counts
                expected = teacher.top_log_probs(piece, 5)
                assert np.array_equal(ids[at:at + n], expected[0][0])
                assert np.abs(log_probs[at:at + n] - expected[1][0]).max() < 1e-5 and np.abs(tail[at:at + n] - expected[2][0]).max() < 1e-5
            at += n
    assert at == len(ids) == report["tokens"] and report["bytes_per_token"] == 44 == sum(a[:1].nbytes for a in (ids, log_probs, tail))
    assert json.loads((folder / "cache.json").read_text()) == report and report["done"] == report["batches"]


@pytest.mark.parametrize("after", [1, 4, 5, 99])  # of 15 batches; 99: while the bias is measured
def test_killed_and_resumed(tmp_path, monkeypatch, whole, after):
    calls = []

    def killed(model, *args):
        calls.append(0)
        if len(calls) > after:
            raise SystemError
        return compute(model, *args)
    compute = mil.Model.top_log_probs
    monkeypatch.setattr(module, "EVERY", 2)
    with monkeypatch.context() as patch, pytest.raises(SystemError):
        patch.setattr(mil.Model, "top_log_probs", killed)
        if after == 99:
            patch.setattr(module, "_bias", lambda *_: (_ for _ in ()).throw(SystemError))
        cache(tmp_path)
    done = json.loads((tmp_path / "cache.json").read_text())["done"]
    assert done == (whole[1]["batches"] if after == 99 else after // 2 * 2)
    with pytest.raises(ValueError, match=f"is not finished: {done} of {whole[1]['batches']} batches"):
        mil.distill(pair()[0], tmp_path, rows(1), RECIPE)
    after, calls[:] = 99, []
    monkeypatch.setattr(mil.Model, "top_log_probs", killed)
    cache(tmp_path)
    assert len(calls) == whole[1]["batches"] - done and content(tmp_path) == content(whole[0])
    cache(tmp_path)
    assert len(calls) == whole[1]["batches"] - done, "a finished cache is left alone"


def test_ctrl_c_keeps_what_is_done(tmp_path, monkeypatch, whole):
    def pressed(model, *args):
        calls.append(0)
        if len(calls) == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return compute(model, *args)
    compute, calls = mil.Model.top_log_probs, []
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt, match="^3 of .* batches are done; the same call goes on"):
        patch.setattr(mil.Model, "top_log_probs", pressed)
        cache(tmp_path)
    cache(tmp_path)
    assert content(tmp_path) == content(whole[0])


def test_a_full_disk_is_known_at_the_start(tmp_path, whole):
    with full_disk(20 * whole[1]["tokens"]), pytest.raises(OSError, match=f"cannot write {tmp_path}"):
        cache(tmp_path)
    cache(tmp_path)
    assert content(tmp_path) == content(whole[0])


def test_the_bias_is_the_kl_that_k_leaves_out(tmp_path, whole):
    folder, report = whole
    teacher = pair()[1]
    student, found = mil.convert(teacher, attention=0.5), {}
    batches = Batches(read(rows(1)), LENGTH, 2, shuffle=False)
    saved = dict(zip(("ids", "log_probs", "tail"), arrays(folder)))
    for name in ("full_kl", "cached_kl"):
        sums = tokens = 0
        for (ids, targets, prev), at in list(zip(batches.once(), batches.positions_once()))[:module.SAMPLE]:
            how = teacher
            if name == "cached_kl":
                how = tuple(saved[key][at] for key in ("ids", "log_probs", "tail"))
                how[0][at < 0] = -1
            values = student.loss(ids, targets, teacher=how, kl=1.0, prev=prev)
            sums, tokens = sums + values["kl"] * values["tokens"], tokens + values["tokens"]
        found[name] = sums / tokens
        assert report[name] == pytest.approx(found[name], abs=1e-6)
    assert report["bias"] == pytest.approx(found["cached_kl"] - found["full_kl"], abs=2e-6) and report["bias"] < -0.01
    everywhere = np.concatenate([at[at >= 0] for at in batches.positions_once()])
    assert report["tail_mass"] == pytest.approx(np.exp(saved["tail"][everywhere]).mean(), rel=1e-5) and report["tail_mass"] > 0.1
    all_of_it = cache(tmp_path, k=V, student=mil.convert(teacher, mamba_layers=[0]))
    assert abs(all_of_it["bias"]) < 1e-6 and all_of_it["tail_mass"] == 0 and all_of_it["full_kl"] != report["full_kl"]


@pytest.mark.parametrize("kind, temperature", [("forward", 1.0), ("reverse", 2.0), ("jensen-shannon", 1.0), ("paper", 1.0)])
def test_a_cache_of_all_tokens_teaches_as_the_teacher(tmp_path, kind, temperature):
    """The whole loss curve, over two stages and shuffled epochs; but that "paper" counts padding, of which a cache has nothing."""
    data = [{"ids": row["ids"][:10] * 2} for row in rows(1) if len(row["ids"]) >= 10] if kind == "paper" else rows(1)
    recipe = RECIPE | {"kl_kind": kind, "temperature": temperature}
    cache(tmp_path / "cache", data=data, k=V, temperature=temperature)
    runs = {}
    for name in ("live", "cached"):
        student, teacher = pair()
        mil.distill(student, teacher if name == "live" else tmp_path / "cache", data, recipe, out=tmp_path / name)
        runs[name] = history(tmp_path / name)
    for live, cached in zip(runs["live"], runs["cached"]):
        for key in ("loss", "ce", "kl"):
            assert cached[key] == pytest.approx(live[key], rel=1e-5), (live["step"], key)
    assert len(runs["cached"]) == 5 and live["kl"] != runs["live"][0]["kl"]


def test_a_run_goes_on_with_its_cache_and_with_no_other_teacher(tmp_path, whole):
    recipe = RECIPE | {"eval_data": rows(2, 3), "kl_kind": "paper"}
    report = mil.distill(pair()[0], str(whole[0]), rows(1), recipe, out=tmp_path)
    assert report["kl"] > 0 and set(report["eval"]) == {"loss", "ce"}, "the cache has nothing of eval_data"
    assert report["eval"]["loss"] == pytest.approx(0.1 * report["eval"]["ce"])
    student, teacher = pair()
    mil.distill(student, whole[0], rows(1), recipe, out=tmp_path)
    assert bits(student) == bits(mil.load(tmp_path / "model"))
    with pytest.raises(ValueError, match="began with another teacher"):
        mil.distill(pair()[0], teacher, rows(1), recipe, out=tmp_path)


OTHER = CONFIG | {"vocab_size": V + 1}


@pytest.mark.parametrize("changes, data, student, says", [
    ({"length": 21}, 1, CONFIG, "pieces of 20 tokens, and the recipe's length is 21"), ({}, 2, CONFIG, "other data"),
    ({"temperature": 2.0}, 1, CONFIG, "at temperature 1, and the recipe's is 2"), ({}, 1, OTHER, "with 40 tokens, and the student has 41"),
    ({"stages": [{"steps": 1}, {"steps": 1, "temperature": 0.5}]}, 1, CONFIG, "the recipe's is 0.5"),
    ({"stages": [{"steps": 1, "align": "mixer"}]}, 1, CONFIG, "align needs the teacher's layers")])
def test_what_does_not_fit_is_named(whole, changes, data, student, says):
    with pytest.raises(ValueError, match=says) as error:
        mil.distill(mil.random(student, seed=1), whole[0], rows(data), {**RECIPE, **changes})
    assert "\n" not in str(error.value)
    if "temperature" in changes:  # without KL there is no temperature
        mil.distill(mil.random(student, seed=1), whole[0], rows(data), {"steps": 1, "length": LENGTH, "kl": 0.0, **changes})


@pytest.mark.parametrize("changes, says", [
    ({"k": 6}, "holds a cache of k 5, not 6"), ({"length": 19}, "length 20, not 19"), ({"temperature": 2}, "temperature 1.0, not 2.0"),
    ({"batch": 3}, "batch 2, not 3"), ({"data": rows(2)}, "another data"), ({"teacher": mil.random(CONFIG, seed=2)}, "another teacher"),
    ({"k": 0}, "from 1 to the vocabulary's 40, not 0"), ({"k": 41}, "not 41"), ({"k": 2.5}, "not 2.5"), ({"temperature": 0}, "temperature"),
    ({"length": 0}, "length"), ({"data": []}, "no rows"), ({"student": mil.random(OTHER)}, "one vocabulary")])
def test_a_folder_holds_one_cache(whole, changes, says):
    before = content(whole[0])
    with pytest.raises(ValueError, match=says) as error:
        cache(whole[0], **changes)
    assert "\n" not in str(error.value) and content(whole[0]) == before


@pytest.mark.parametrize("name, damage, says", [
    ("cache.json", None, "no cache of a teacher's predictions"), ("cache.json", b"{}", "lacks data"), ("cache.json", b"[", "not JSON"),
    ("ids.npy", None, "ids.npy is missing or damaged"), ("tail.npy", b"", "tail.npy is missing or damaged"),
    ("log_probs.npy", b"\x93NUMPY\x01\x00", "log_probs.npy is missing or damaged")])
def test_damage_is_named(tmp_path, whole, name, damage, says):
    for path in whole[0].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / name).unlink() if damage is None else (tmp_path / name).write_bytes(damage)
    with pytest.raises(ValueError, match=says) as error:
        mil.distill(pair()[0], tmp_path, rows(1), RECIPE)
    assert "\n" not in str(error.value)


def test_damaged_numbers_are_named(tmp_path, whole):
    for path in whole[0].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    for name, says in (("tail", "add up to"), ("ids", "different tokens")):
        path = tmp_path / f"{name}.npy"
        path.write_bytes(path.read_bytes()[:128] + bytes(path.stat().st_size - 128))
        with pytest.raises(ValueError, match=says):
            mil.distill(pair()[0], tmp_path, rows(1), RECIPE)
        path.write_bytes((whole[0] / f"{name}.npy").read_bytes())
