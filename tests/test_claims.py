"""benchmarks/claims.py: what counts in its rows, its verdicts, equal time, and runs that go on where they ended."""
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

import mambainllama as mil

spec = importlib.util.spec_from_file_location("claims", Path(__file__).parents[1] / "benchmarks" / "claims.py")
claims = importlib.util.module_from_spec(spec)
spec.loader.exec_module(claims)


@pytest.mark.parametrize("length", [64, 256])
def test_answers_are_what_counts(length):
    for number in range(20):
        row = claims.document(np.random.default_rng(number), length)
        words = [claims.tasks.VOCABULARY[i] for i in row["ids"]]
        assert len(words) == len(row["mask"]) <= length
        answers = "".join(word if counts else " " for word, counts in zip([w + "_" for w in words], row["mask"])).split()
        assert len(answers) == len(row["tasks"]) and all(answer.endswith("<|end|>_") for answer in answers)
        facts = words[2:words.index("|")]
        key, value, _ = answers[-1].split("_")[:3]
        assert row["tasks"][-1] == "recall" and dict(zip(facts[::2], facts[1::2]))[key] == value
        assert not any(answer.startswith(f"{key}_{value}_<") for answer, task in zip(answers[:-1], row["tasks"]) if task == "asked before")


def test_measures_are_those_of_greedy_answers():
    """Of a random model, with the first tokens of some answers put right by what it says itself."""
    config = claims.CONFIG | claims.SIZES["small"]["model"] | {"vocab_size": len(claims.WORD)}
    model, rows = mil.random(config, seed=1), [claims.row(i, 1, 64, False) for i in range(6)]
    for row in rows[::2]:  # these end with what the model answers
        end = len(row["ids"]) - 3
        for t in range(end, end + 3):
            row["ids"][t] = int(model.logits([row["ids"][:t]], last=1)[0, 0].argmax())
    held_out = claims.HeldOut(rows, mil.random(config, seed=2))
    found = held_out.measure(model)
    assert found["recall"] == pytest.approx(0.5) and found["kl"] > 0
    log_probs = [model.logits([row["ids"]])[0] for row in rows]
    ce = [np.log(np.exp(of[t - 1]).sum()) - of[t - 1, row["ids"][t]] for row, of in zip(rows, log_probs) for t in np.flatnonzero(row["mask"])]
    assert found["ce"] == pytest.approx(np.mean(ce), rel=1e-5)
    assert claims.HeldOut(rows, model).measure(mil.convert(model, mamba_layers=[]))["kl"] == pytest.approx(0, abs=1e-6)


def test_verdicts():
    """Student's t at two degrees of freedom is 4.3027."""
    mean, (low, high), verdict = claims.compare([1.0, 1.1, 1.2], [2.0, 2.0, 2.0], "kl")
    assert (mean, high - mean, verdict) == (pytest.approx(-0.9), pytest.approx(4.3027 * 0.1 / 3**0.5, rel=1e-4), "better")
    assert claims.compare([1.0, 1.1, 1.2], [2.0, 2.0, 2.0], "answers")[2] == "worse"
    assert claims.compare([1.0, 3.0, 2.0], [2.0, 2.0, 2.0], "kl")[2] == "no difference shown"
    assert claims.compare([1.0], [2.0], "kl")[1:] == (None, "one seed: no verdict")


def test_a_run_that_the_limit_ended_goes_on(tmp_path, capsys, monkeypatch):
    small = claims.SIZES["small"] | {"held_out": 6, "rates": (1e-3,)}
    monkeypatch.setitem(claims.SIZES, "small", small | {"teacher": small["teacher"] | {"rows": 64}})
    monkeypatch.setattr(claims, "SEEDS", (11, 12))
    monkeypatch.setattr(claims, "CLAIMS", [("3", "kl", ("ce",), [("calibrated, mixer aligned, equal time", "calibrated")]),
                                           ("6", "preferences", ("kl",), [("SFT, DPO held to teacher", "SFT")])])
    call = ["--out", str(tmp_path), "--steps", "4", "--teacher-steps", "1"]

    def last():
        return json.loads(capsys.readouterr().out.splitlines()[-1])
    claims.main([*call, "--limit", "0.001"])
    first = last()
    assert not first["complete"] and not any(arm["values"] for claim in first["claims"] for arm in claim["arms"])
    claims.main([*call, "--claims", "6", "--limit", "100"])
    assert last()["complete"]
    known = json.loads((tmp_path / "results.json").read_text())["runs"]
    claims.main([*call, "--limit", "100"])
    whole, results = last(), json.loads((tmp_path / "results.json").read_text())
    assert whole["complete"] and results["runs"].items() > known.items()
    assert {run["steps"] for key, run in results["runs"].items() if key.startswith(("calibrated |", "SFT |"))} == {4, 2}
    for arm, times in results["times"].items():
        assert {run["steps"] for key, run in results["runs"].items() if key.startswith(f"{arm}, equal time")} == {max(1, round(4 * times))}
    assert all(len(run["errors"]) == 2 for key, run in results["runs"].items() if "aligned" in key)
    with pytest.raises(SystemExit):
        claims.main([*call[:2], "--steps", "5"])
    assert "of 4 steps, not of 5" in capsys.readouterr().err
