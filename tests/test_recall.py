"""Recall probes: their questions can be answered, and only by looking; the guard's sentence."""
import importlib
import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import mambainllama as mil
from mambainllama.recall import associative, copying, means, needle, recall_guard
from mambainllama.cli import main
from test_train import CONFIG, bits, rows

loop = importlib.import_module("mambainllama.train")  # these are the modules: mil.train and mil.recall are the functions
probes = importlib.import_module("mambainllama.recall")
LLAMA = Path(__file__).parent / "data" / "llama3"


class Oracle:
    """Predicts what followed the token when it stood here last; strays: how many tokens further it looks."""
    tokenizer = None

    def __init__(self, vocab, stop_tokens=(), strays=0):
        self.config, self.stop_tokens, self.strays = {"vocab_size": vocab}, list(stop_tokens), strays

    def logits(self, ids, last):
        out = np.zeros((len(ids), last, self.config["vocab_size"]), np.float32)
        for b, row in enumerate(ids):
            for i in range(last):
                t = len(row) - last + i
                before = np.flatnonzero(row[:t] == row[t])
                if len(before):
                    out[b, i, row[min(before[-1] + 1 + self.strays, t)]] = 30
        return out


@pytest.mark.parametrize("vocab, stops, pairs, lengths", [(40, [3], 4, (9, 50)), (1000, [], 8, (17, 129)), (17, [], 8, (40,))])
def test_who_looks_back_is_right_and_who_looks_elsewhere_is_not(vocab, stops, pairs, lengths):
    right = mil.recall(Oracle(vocab, stops), lengths=lengths, items=5, pairs=pairs)
    assert right["associative"] == right["copy"] == dict.fromkeys(lengths, 1.0) and right["score"] == 1
    assert right["needle"] is None and right["text_copy"] is None
    assert max(abs(v) for v in right["log_prob"].values()) < 1e-6
    wrong = mil.recall(Oracle(vocab, stops, strays=1), lengths=lengths, items=5, pairs=pairs)
    assert wrong["score"] < 0.3 and max(wrong["log_prob"].values()) < -1


def test_a_model_that_knows_nothing_is_at_chance():
    got = mil.recall(mil.random(CONFIG, seed=1), lengths=(64,), items=64, pairs=4)
    assert got["score"] < 0.2 and -2.2 < got["log_prob"][64] < -1.2  # -log 4 = -1.39, and less for noise


def test_questions_have_one_answer_and_no_stop_token():
    model = Oracle(60, [5, 6])
    for seed in range(5):
        ids, targets, values = associative(model, 33, 6, seed, 7)
        for row, target, value in zip(ids, targets, values):
            assert (target[:-1] == -100).all() and (row == row[-1]).sum() == 2 and (row == target[-1]).sum() == 1
            assert value[0] == target[-1] and len(set(value)) == 7
        copied, ends = copying(model, 50, 6, seed)
        assert (copied[:, :25] == copied[:, -25:]).all() and (ends[:, -25:-1] == copied[:, -24:]).all() and (ends >= 0).sum() == 6 * 24
        assert not np.isin([*ids.flat, *copied.flat], [5, 6]).any()
        assert np.array_equal(ids, associative(model, 33, 6, seed, 7)[0])
        assert not np.array_equal(ids, associative(model, 33, 6, seed + 9, 7)[0])


def test_the_device_changes_nothing(device):
    model, twin = mil.random(CONFIG, seed=1, **device.how), mil.random(CONFIG, seed=1)
    how = dict(lengths=(20, 33), items=5, pairs=4)
    got, expected = mil.recall(model, batch=2, **how), mil.recall(twin, **how)
    assert mil.recall(model, batch=2, **how) == got
    assert list(got["log_prob"].values()) == pytest.approx(list(expected["log_prob"].values()), abs=device.logits * 10)


def answering(monkeypatch, model, answer):
    """What generate was asked, as text, when it answers answer(text)."""
    asked = []

    def generate(_, prompts, max_new_tokens, batch):
        asked.extend((len(ids), model.tokenizer.decode(ids)) for ids in prompts)
        return [SimpleNamespace(text=answer(model.tokenizer.decode(ids))) for ids in prompts]
    monkeypatch.setattr(probes, "generate", generate)
    return asked


def key_in(text):
    return re.search(r"pass key is (\d{5})\. Remember", text)


@pytest.mark.parametrize("answer, expected", [
    (lambda text: f" {key_in(text)[1]}. And", [1, 1, 1]), (lambda text: key_in(text)[1], [1, 1, 1]),
    (lambda text: key_in(text)[1] + "0", [0, 0, 0]), (lambda text: "it is " + key_in(text)[1], [0, 0, 0]),
    (lambda text: key_in(text)[1] if key_in(text).start() < len(text) / 3 else "", [1, 0, 0]),
])
def test_needle(monkeypatch, answer, expected):
    model = mil.load(LLAMA)
    asked = answering(monkeypatch, model, answer)
    filler = "A mill grinds corn. Is it old? It is!"
    table = needle(model, (600, 900), depths=(0, 0.5, 1), items=3, filler=filler)
    assert table == {length: dict(zip((0.0, 0.5, 1.0), expected)) for length in (600, 900)}
    assert sorted({n for n, _ in asked}) == [600, 900]
    assert all(text.count("Is it old?") > 3 and text.endswith("key is") for _, text in asked)
    begins = [key_in(text).start() / len(text) for _, text in asked]
    assert max(begins[:3]) < 0.3 and all(0.3 < b < 0.7 for b in begins[3:6]) and min(begins[6:9]) > 0.6
    assert len({key_in(text)[1] for _, text in asked}) == 18


def test_text_probes_are_left_out_of_no_score(monkeypatch):
    model = mil.load(LLAMA)
    answering(monkeypatch, model, lambda text: key_in(text)[1] if key_in(text) else text.split("Line: ")[2].split("\n")[0])
    got = mil.recall(model, lengths=(300,), depths=(0.5,), items=2)
    assert got["needle"] == {300: {0.5: 1.0}} and got["text_copy"] == 1
    assert got["score"] == pytest.approx((2 + got["associative"][300] + got["copy"][300]) / 4)
    answering(monkeypatch, model, lambda text: "0")
    assert mil.recall(model, lengths=(300,), depths=(0.5,), items=2)["text_copy"] == 0


def test_generation_answers_in_batches_of_any_size():
    model = mil.load(LLAMA)
    got = [mil.recall(model, lengths=(256,), depths=(0, 1), items=3, batch=batch) for batch in (1, 4)]
    assert got[0]["needle"] == got[1]["needle"] and got[0]["text_copy"] == got[1]["text_copy"] == 0


@pytest.mark.parametrize("how, says", [
    (dict(lengths=(16,)), "16 tokens have no room for 8 pairs"), (dict(pairs=200, lengths=500), "vocabulary of 401"),
    (dict(lengths=()), "lengths"), (dict(lengths=(64.0,)), "lengths"), (dict(items=0), "items"), (dict(seed=-1), "seed"),
    (dict(lengths=64), "no room for a needle"), (dict(depths=(2,)), "depths"), (dict(filler="  "), "filler"),
])
def test_bad_arguments_are_one_sentence(how, says):
    with pytest.raises(ValueError, match=says):
        mil.recall(mil.load(LLAMA), **{"lengths": (256,), **how})
    with pytest.raises(ValueError, match="needs a tokenizer"):
        needle(mil.random(CONFIG), (256,))


def test_the_guard_says_what_fell():
    before = {"needle": {256: {0.0: 1.0, 1.0: 0.8}}, "text_copy": None, "associative": {256: 0.5}, "copy": {256: 1.0}}
    assert means(before) == {"needle": 0.9, "associative": 0.5, "copy": 1.0}
    after = before | {"needle": {"256": {"0.0": 0.5, "1.0": 0.5}}, "associative": {"256": 0.4}}
    assert recall_guard(before, after, 0.2) == "recall fell by more than 0.2: needle from 0.90 to 0.50"
    assert recall_guard(before, after, 0.05) == "recall fell by more than 0.05: needle from 0.90 to 0.50, associative from 0.50 to 0.40"
    assert recall_guard(before, after, 0.5) is None and recall_guard(after, before, 0) is None


GUARDED = {"steps": 8, "length": 20, "batch": 2, "lr": 1e-3, "eval_every": 3, "checkpoint_every": 2, "guard": {"limit": 0.2, "items": 3}}


def scripted(monkeypatch, *scores):
    """Stands in for recall: returns the scores one after the other; → what it was called with."""
    calls, left = [], list(scores)

    def stand_in(model, **how):
        calls.append(how)
        return {"needle": None, "text_copy": None, "associative": {8: left[0]}, "copy": {8: 0.5}, "score": left.pop(0)}
    monkeypatch.setattr(loop, "recall", stand_in)
    return calls


def guarded(out=None, **changes):
    model = mil.random(CONFIG, seed=1)
    return model, mil.train(model, rows(1), {**GUARDED, **changes}, out=out)


def steps(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_that_forgets_is_stopped_and_goes_on_when_it_may(monkeypatch, tmp_path):
    whole = bits(guarded(guard=None)[0])
    calls = scripted(monkeypatch, 0.9, 0.8, 0.6)
    for _ in range(2):  # the second call neither measures nor learns
        with pytest.raises(ValueError, match="^step 6: recall fell by more than 0.2: associative from 0.90 to 0.60; a larger limit"):
            guarded(tmp_path)
        assert calls == [{"items": 3}] * 3 and len(steps(tmp_path)) == 6 and not (tmp_path / "model").exists()
    assert [line.get("recall") for line in steps(tmp_path)] == [None, None, 0.8, None, None, 0.6]
    with pytest.raises(ValueError, match="began with guard"):
        guarded(tmp_path, guard={"limit": 1, "items": 4})
    calls = scripted(monkeypatch, 0.3)
    model, report = guarded(tmp_path, guard={"limit": 0.7, "items": 3})
    assert len(calls) == 1 and bits(model) == whole and len(steps(tmp_path)) == 8
    assert report["guard"] == {part: {"needle": None, "text_copy": None, "associative": {"8": score}, "copy": {"8": 0.5}, "score": score}
                               for part, score in (("before", 0.9), ("after", 0.3))}


def test_a_drop_at_the_last_step_leaves_no_model(monkeypatch, tmp_path):
    scripted(monkeypatch, 0.9, 0.9, 0.9, 0.1)
    with pytest.raises(ValueError, match="^step 8: "):
        guarded(tmp_path)
    assert not (tmp_path / "model").exists() and not (tmp_path / "report.json").exists()
    assert guarded(tmp_path, guard={"limit": 1, "items": 3})[1]["guard"]["after"]["score"] == 0.1 and (tmp_path / "model").exists()


def test_the_guard_measures_the_model_before_and_after():
    how = {"lengths": [12, 20], "items": 3, "pairs": 3}
    model, report = guarded(guard=how)
    before, after = (json.loads(json.dumps(mil.recall(m, **how))) for m in (mil.random(CONFIG, seed=1), model))
    assert report["guard"] == {"before": before, "after": after} and before["log_prob"] != after["log_prob"]
    assert guarded(guard=None)[1]["guard"] is None
    with pytest.raises(ValueError, match="no room for 9 pairs"):
        guarded(guard={"pairs": 9, "lengths": [18]})
    with pytest.raises(ValueError, match="guard belongs to train"):
        mil.distill(model, mil.random(CONFIG), rows(1), GUARDED)


def test_a_stopped_run_is_exit_code_2(monkeypatch, tmp_path, capsys):
    scripted(monkeypatch, 0.9, 0.1)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows(1))))
    recipe = [word for key, value in GUARDED.items() for word in ("--set", f"{key}={json.dumps(value)}")]
    code = main(["train", str(tmp_path / "config.json"), str(tmp_path / "data.jsonl"), "--out", str(tmp_path / "run"), *recipe])
    err = capsys.readouterr().err
    assert code == 2 and "mambainllama: step 3: recall fell by more than 0.2" in err and "Traceback" not in err


def test_a_whole_recipe_goes_on_with_a_larger_limit(monkeypatch, tmp_path):
    mil.save(mil.random(CONFIG, seed=1), tmp_path / "model")
    data = [{"ids": row["ids"], "mask": [0] + [1] * (len(row["ids"]) - 1)} for row in rows(1)]
    plan = {"teacher": str(tmp_path / "model"), "run": [{"sft": {**GUARDED, "data": data}}]}
    scripted(monkeypatch, 0.9, 0.1, 0.2, 0.3)
    with pytest.raises(ValueError, match="step 3: recall fell"):
        mil.run(plan, tmp_path / "out")
    plan["run"][0]["sft"]["guard"] = {"limit": 1.0, "items": 3}
    assert mil.run(plan, tmp_path / "out")["parts"][0]["guard"]["after"]["score"] == 0.3


def test_what_is_excluded_does_not_learn():
    model = mil.random(CONFIG, seed=1)
    kept = ["!*self_attn.q_proj*", "!*self_attn.k_proj*"]
    assert model.trainable(kept) == [name for name in model.names if "q_proj" not in name and "k_proj" not in name]
    assert model.trainable(["*.0.self_attn*", *kept]) == [f"model.layers.0.self_attn.{part}_proj.weight" for part in "vo"]
    with pytest.raises(ValueError, match="'!\\*r_proj' fits no parameter"):
        model.trainable(["*", "!*r_proj"])
    before = bits(model)
    mil.train(model, rows(1), {**GUARDED, "guard": None, "steps": 2, "lr": 1e-2, "train": ["*", *kept]})
    after = bits(model)
    assert [name for name in model.names if after[name] == before[name]] == [n for n in model.names if "q_proj" in n or "k_proj" in n]
