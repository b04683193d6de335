"""DPO: pairs and what is cut of them, the losses and their gradient, the reference kept beside the run, resuming."""
import importlib

import numpy as np
import pytest

import mambainllama as mil
from conftest import on
from mambainllama.preference import Pairs, Preference
from mambainllama.recipe import load_recipe
from test_tokenizer import FOLDER, MARKED
from test_train import CONFIG, V, Stop, bits, history, stop, stop_after

PLAN = {"steps": 8, "length": 16, "batch": 3, "lr": 3e-3, "beta": 0.5, "checkpoint_every": 3, "warmup": 0.0, "schedule": "constant"}


def rows(seed=0, count=7):
    r = np.random.default_rng(seed)
    return [{key: r.integers(V, size=r.integers(2, 7)).tolist() for key in ("prompt", "chosen", "rejected")} for _ in range(count)]


def hybrid(seed=1, **how):
    return mil.convert(mil.random(CONFIG, seed=seed, **how), mamba_layers=[1], seed=seed)


def recipe(**changes):
    return load_recipe({**PLAN, **changes}, kl=0.0, ce=1.0)


def objective(model, reference, data, **changes):
    goal = Preference(model, reference, recipe(**changes))
    pairs = goal.read(data, "data")
    goal.prepare(pairs, None)
    return goal, pairs


def log_prob(model, prompt, answer):
    logits = model.logits(np.array([prompt + answer], np.int32))[0].astype(np.float64)
    logits -= np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True)) + logits.max(-1, keepdims=True)
    return sum(logits[len(prompt) - 1 + i, token] for i, token in enumerate(answer))


@pytest.mark.parametrize("kind, smooth", [("sigmoid", 0.0), ("sigmoid", 0.2), ("ipo", 0.0)])
def test_loss_and_metrics_equal_their_formula(kind, smooth):
    model, reference, data = hybrid(), hybrid(2), rows()
    goal, pairs = objective(model, reference, data, preference=kind, label_smoothing=smooth, batch=7)
    batch = pairs.batch(0)
    got = goal.loss(batch, {"margin": 1.0})
    gains = np.array([[log_prob(model, row["prompt"], row[key]) - log_prob(reference, row["prompt"], row[key]) for key in ("chosen", "rejected")]
                      for row in data])
    margin, tokens = gains[:, 0] - gains[:, 1], np.array([[len(row[key]) for key in ("chosen", "rejected")] for row in data])
    good, bad = (-np.log(1 / (1 + np.exp(sign * 0.5 * margin))) for sign in (-1, 1))
    loss = (1 - smooth) * good + smooth * bad if kind == "sigmoid" else ((gains / tokens) @ [1, -1] - 1) ** 2
    assert got["loss"] == pytest.approx(loss.mean(), rel=1e-4)
    assert got["margin"] == pytest.approx(0.5 * margin.mean(), rel=1e-4) and got["accuracy"] == (margin > 0).mean()
    for key in ("chosen", "rejected"):
        assert got[key] == pytest.approx(np.mean([log_prob(model, row["prompt"], row[key]) for row in data]), rel=1e-4)
    assert got["kl"] > 0 and objective(model, model, data)[0].loss(objective(model, model, data)[1].batch(0), {"margin": 1.0})["kl"] < 1e-9


@pytest.mark.parametrize("kind", ["sigmoid", "ipo"])
def test_gradient_is_that_of_the_loss(kind):
    model = hybrid()
    goal, pairs = objective(model, hybrid(2), rows(), preference=kind)
    batch, share = pairs.batch(0), {"margin": 0.7}
    model.zero_grad()
    goal.loss(batch, share, backward=True)
    r = np.random.default_rng(0)
    for name in ("model.layers.0.mlp.up_proj.weight", "model.layers.1.mamba.in_proj.weight", "model.layers.2.self_attn.q_proj.weight"):
        gradient, weight = model.grad(name).astype(np.float64), model.get(name)
        way = gradient / np.abs(gradient).max() + 0.1 * r.standard_normal(weight.shape)
        values = []
        for step in (2e-3, -2e-3):
            model.set(name, (weight + step * way).astype(np.float32))
            values.append(goal.loss(batch, share)["loss"])
        model.set(name, weight)
        assert (values[0] - values[1]) / 4e-3 == pytest.approx((gradient * way).sum(), rel=2e-2), name


def test_a_long_pair_s_prompt_loses_its_start_and_an_answer_its_end():
    model, data = hybrid(), [{"prompt": list(range(1, 11)), "chosen": list(range(11, 31)), "rejected": [39]}]
    ids, targets, _ = Pairs(data, model, recipe(prompt_length=4)).batch(0)
    assert ids[0].tolist() == list(range(7, 23)) and targets[0].tolist() == [-100] * 3 + list(range(11, 23)) + [-100]
    assert ids[3].tolist() == [7, 8, 9, 10, 39] + [0] * 11 and targets[3].tolist() == [-100] * 3 + [39] + [-100] * 12
    for chosen, kept in ((6, 10), (7, 9), (9, 7)):  # as much of the prompt as leaves room for the longer answer
        data[0]["chosen"] = list(range(11, 11 + chosen))
        ids, targets, _ = Pairs(data, model, recipe(prompt_length=4)).batch(0)
        assert ids[0].tolist() == list(range(11 - kept, 11 + chosen)) and ids[3].tolist() == [*range(11 - kept, 11), 39] + [0] * (15 - kept)
        assert targets[0, kept - 1:-1].tolist() == list(range(11, 11 + chosen))


def said(role, content):
    return {"role": role, "content": content}


CHAT = [said("user", "Twelve and thirty?"), said("assistant", "Forty-two"), said("user", "And one more?")]


def read(rows, model=None):
    return Preference(model or mil.load(FOLDER), "start", recipe(length=200)).read(rows, "data").pairs


def counted(model, targets):
    return model.tokenizer.decode(targets[targets >= 0], skip_special_tokens=False)


@pytest.mark.parametrize("template", [None, MARKED])
def test_the_assistant_s_part_of_the_answer_counts(template):
    """Neither what the prompt's assistant says, nor a user within the answer."""
    model = mil.load(FOLDER)
    model.tokenizer._template = template or model.tokenizer._template
    more = [said("assistant", "Forty-three"), said("user", "Sure?"), said("assistant", "Yes.")]
    (chosen, rejected), = read([{"prompt": CHAT, "chosen": more, "rejected": "Größe"}], model)
    assert counted(model, chosen[1]) == "Forty-three<|end|>Yes.<|end|>" and counted(model, rejected[1]) == "Größe<|end|>"
    start = len(model.tokenizer.encode_chat(CHAT))  # what generation is given
    assert chosen[0][:start].tolist() == rejected[0][:start].tolist() == model.tokenizer.encode_chat(CHAT)
    assert (chosen[1][:start - 1] < 0).all() and chosen[1][start - 1] == chosen[0][start]


def test_prompts_may_be_within_whole_chats():
    """UltraFeedback's rows, which say the prompt once more, and rows without any."""
    answers = {key: [said("assistant", text)] for key, text in (("chosen", "Forty-three"), ("rejected", "Many"))}
    whole = {key: CHAT + answer for key, answer in answers.items()}
    expected = [[a.tolist() for a in half] for half in read([{"prompt": CHAT, **answers}])[0]]
    for row in (whole, {"prompt": "And one more?", **whole}, {"prompt": CHAT, **whole}, {"prompt": CHAT[:1], **whole}):
        assert [[a.tolist() for a in half] for half in read([row])[0]] == expected
    plain = read([{"prompt": "And one more?", "chosen": "Forty-three", "rejected": "Many"}])
    assert [a.tolist() for a in plain[0][0]] == [a.tolist() for a in read([{"prompt": CHAT[2:], **answers}])[0][0]]
    for row, says in (({"prompt": CHAT[1:], **whole}, "do not begin with the messages of prompt"), (answers, "lacks prompt"),
                      ({"prompt": CHAT, **answers, "chosen": whole["chosen"]}, "chats that begin alike"),
                      ({"chosen": CHAT, "rejected": whole["rejected"]}, "chosen has no token that counts")):
        with pytest.raises(ValueError, match=f"data row 0: .*{says}"):
            read([row])


def test_a_batch_is_as_wide_as_its_pairs():
    """In steps of 64 positions, whatever length is: it changes nothing but the room."""
    data = [*rows(count=3), {"prompt": [1] * 60, "chosen": [2] * 10, "rejected": [3]}]
    (goal, pairs), (other, wide) = (objective(hybrid(), hybrid(2), data, length=length, batch=3) for length in (300, 64))
    assert [ids.shape for ids, *_ in pairs.once()] == [(6, 64), (2, 128)] and [ids.shape for ids, *_ in wide.once()] == [(6, 64), (2, 64)]
    same = [goal.loss(next(batches.once()), {"margin": 1.0}) for batches in (pairs, wide)]
    assert same[0] == same[1] and pairs.fill == pytest.approx(sum(len(ids) for pair in pairs.pairs for ids, _ in pair) / (6 * 64 + 2 * 128))


def test_it_learns_to_prefer(tmp_path):
    model = hybrid()
    report = mil.dpo(model, rows(), {**PLAN, "steps": 60}, out=tmp_path)
    assert report["accuracy"] == 1 and report["margin"] > 1 and report["loss"] < 0.4 and report["kl"] > 0
    assert set(report) >= {"chosen", "rejected", "history"} and (tmp_path / "reference.npz").exists()


@pytest.mark.parametrize("reference", ["start", "teacher"])
def test_resumed_to_the_same_bits_without_the_reference_again(tmp_path, monkeypatch, reference):
    def go(folder):
        model = hybrid()
        mil.dpo(model, rows(), {**PLAN, "eval_data": rows(5, 4)}, reference if reference == "start" else hybrid(2), out=folder)
        return model
    whole = go(tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(Stop):
        stop_after(patch, 5, stop)
        go(tmp_path / "killed")
    with monkeypatch.context() as patch:
        patch.setattr(importlib.import_module("mambainllama.preference"), "_log_probs", None)  # would raise
        resumed = go(tmp_path / "killed")
    assert bits(resumed) == bits(whole) and history(tmp_path / "killed") == history(tmp_path / "whole")


def test_another_reference_is_another_run(tmp_path):
    mil.dpo(hybrid(), rows(), {**PLAN, "steps": 2}, hybrid(2), out=tmp_path)
    with pytest.raises(ValueError, match="began with another reference"):
        mil.dpo(hybrid(), rows(), {**PLAN, "steps": 2}, hybrid(3), out=tmp_path)


@pytest.mark.parametrize("device", on("cuda32", "cuda"), indirect=True)
def test_on_a_gpu_as_on_a_cpu(device):
    values = []
    for how in (dict(dtype=device.how["dtype"]), device.how):
        goal, pairs = objective(hybrid(**how), hybrid(2, **how), rows())
        values.append(goal.loss(pairs.batch(0), {"margin": 1.0}, backward=False))
    for key, value in values[0].items():
        assert values[1][key] == pytest.approx(value, rel=10 * device.logits, abs=device.logits), key


@pytest.mark.parametrize("row, says", [
    ({"prompt": [1], "chosen": [2]}, "lacks rejected"), ({"prompt": [], "chosen": [2], "rejected": [3]}, "no token"),
    ({"prompt": [1], "chosen": [], "rejected": [3]}, "chosen has no token"), ({"prompt": [1], "chosen": [V], "rejected": [3]}, "from 0 to 39"),
    ({"prompt": "hi", "chosen": "a", "rejected": "b"}, "no tokenizer")])
def test_a_bad_row_is_named(row, says):
    with pytest.raises(ValueError, match=f"data row 1: .*{says}"):
        mil.dpo(hybrid(), [*rows(count=1), row], PLAN)


@pytest.mark.parametrize("changes, says", [(dict(prompt_length=16), "nothing is left"), (dict(kl=1.0), "kl"),
                                           (dict(label_smoothing=0.5), "label_smoothing"),
                                           (dict(label_smoothing=0.1, preference="ipo"), "not ipo")])
def test_a_bad_recipe_is_one_sentence(changes, says):
    with pytest.raises(ValueError, match=says):
        mil.dpo(hybrid(), rows(), {**PLAN, **changes})


def test_fine_tuning_wants_answers():
    model = mil.random(CONFIG)
    with pytest.raises(ValueError, match="data row 0: .*mil.train"):
        mil.sft(model, [{"ids": [1, 2, 3]}], {"steps": 1})
    report = mil.sft(model, [{"ids": [1, 2, 3, 4], "mask": [0, 0, 1, 1]}], {"steps": 30, "length": 8, "batch": 1, "lr": 1e-2})
    assert report["ce"] < 0.1
