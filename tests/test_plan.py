"""Plans: attention that comes back is the teacher's, the ranking finds what matters, and what a plan is said to cost is what it costs."""
import importlib
import json
from pathlib import Path

import numpy as np
import pytest

import mambainllama as mil
from mambainllama.cli import main
from mambainllama.convert import restore_layers
from mambainllama.info import describe
from test_recall import Oracle
from test_train import CONFIG, bits, rows

planning = importlib.import_module("mambainllama.plan")  # the module: mil.plan is the function
FOUR = CONFIG | {"num_hidden_layers": 4}
SHORT = {"steps": 30, "length": 24, "batch": 4, "lr": 3e-3}
DATA = Path(__file__).parent / "data"


def quick(teacher, **how):
    return mil.plan(teacher, rows(1, 80), **{"recipe": SHORT, "align_steps": 0, "probe_steps": 0, "context": 0, **how})


# -- restore_layers -----------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("mixer", ["mamba1", "mamba2"])
def test_restored_attention_is_the_teachers_and_the_rest_the_students(device, mixer):
    teacher = mil.random(CONFIG, seed=1, **device.how)
    student = mil.convert(teacher, mamba_layers=[0, 1, 2], mixer=mixer)
    for name in student.names:
        if name.endswith("layernorm.weight"):
            student.set(name, student.get(name) + 0.5)
    ids = np.arange(12, dtype=np.int32).reshape(1, 12)
    expected, before, state = mil.convert(teacher, mamba_layers=[0, 2], mixer=mixer), bits(teacher), mil.State(student, 1, 16)
    for name in expected.names:
        if name in student.names:
            expected.set(name, student.get(name))
    restore_layers(student, [1], teacher)
    assert student.layer_kinds == [mixer, "attention", mixer] and list(student.names) == list(expected.names)
    assert bits(student) == bits(expected) and np.array_equal(student.logits(ids), expected.logits(ids))
    with pytest.raises(ValueError, match="before a layer of this one was converted"):
        student.logits(ids, state)
    student.loss(ids, ids, backward=True)
    student.step(1e-2)
    name = "model.layers.1.self_attn.q_proj.weight"
    assert bits(teacher) == before and bits(student)[name] != before[name]


def test_a_conversion_that_is_undone_never_was():
    teacher = mil.load(DATA / "llama-bias-bf16")
    student = mil.convert(teacher, attention=0)
    assert bits(student) != bits(teacher)
    restore_layers(student, [0, 1], teacher)
    assert bits(student) == bits(teacher) and student.mamba_config is None


def test_mixers_are_shared_with_fitting_models_only():
    teacher = mil.random(CONFIG, seed=1)
    student = mil.convert(teacher, mamba_layers=[0])
    for other in (mil.random(FOUR), mil.random(CONFIG | {"intermediate_size": 48}), mil.random(CONFIG, dtype="bfloat16")):
        with pytest.raises(ValueError, match="one size and dtype"):
            restore_layers(student, [0], other)
    with pytest.raises(ValueError, match="from 0 to 2"):
        restore_layers(student, [3], teacher)
    assert student.layer_kinds[0] == "mamba2"


# -- the ranking ------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("important", [0, 2])
def test_the_only_layer_that_matters_is_kept(important):
    teacher = mil.random(FOUR, seed=1)
    for i in set(range(4)) - {important}:  # its attention adds nothing, nor does the mixer that takes its output projection
        teacher.set(f"model.layers.{i}.self_attn.o_proj.weight", np.zeros_like(teacher.get(f"model.layers.{i}.self_attn.o_proj.weight")))
    before = bits(teacher)
    result = quick(teacher, attention=0.25)
    assert bits(teacher) == before
    for row in result["layers"]:
        assert [row[key] for key in ("data", "recall", "score")] == pytest.approx([float(row["layer"] == important)] * 3, abs=1e-6)
    assert result["student"]["data"] > 1e-3
    uniform, measured = result["plans"]
    assert [p["placement"] for p in result["plans"]] == ["uniform", "measured"] and uniform["mamba_layers"] == [0, 1, 2]
    assert measured["mamba_layers"] == [i for i in range(4) if i != important] and measured["kl"] < 1e-6 < uniform["kl"]
    assert measured["chosen"] and not uniform["chosen"]
    assert result["stages"] == {"0.25": [{"mamba_layers": measured["mamba_layers"], "steps": 30}]}


def test_a_students_own_layers_are_measured():
    teacher = mil.random(CONFIG, seed=1)
    student = mil.convert(teacher, attention=0)
    mil.distill(student, teacher, rows(1), {**SHORT, "train": ["*mamba*"]})
    before = bits(student)
    result = quick(teacher, student=student, attention=[0])
    assert bits(student) == before
    seen = planning._split(teacher, rows(1, 80), planning.load_plan_recipe(SHORT), 16, 0)[1]
    sums = sum(loss["tokens"] * np.array([loss["ce"], loss["kl"], 1]) for loss in (
        student.loss(ids, targets, teacher=teacher, kl=1.0, prev=prev) for ids, targets, prev in seen))
    (plan,) = result["plans"]
    assert [plan["ce"], plan["kl"]] == pytest.approx(sums[:2] / sums[2]) and result["student"]["data"] == pytest.approx(plan["kl"])
    assert plan["placement"] == "uniform, measured" and plan["mamba_layers"] == [0, 1, 2] and plan["kv_bytes_per_token"] == 0


@pytest.mark.parametrize("init", ["attention", "calibrated"])
def test_what_is_converted_is_aligned_first(init):
    teacher, data = mil.random(CONFIG, seed=1), rows(1, 80)
    recipe = SHORT | {"init": init, "seed": 3}
    result = quick(teacher, recipe=recipe, align_steps=4)
    learn = [row for i, row in enumerate(data) if i % 8]
    student = mil.convert(teacher, attention=0, init=init, seed=3, data=learn if init == "calibrated" else None)
    unaligned = quick(teacher, recipe=recipe, student=student)
    mil.distill(student, teacher, learn, {**recipe, "steps": 4, "align": "mixer", "lr": 1e-3, "train": ["*mamba*"]})
    aligned = quick(teacher, recipe=recipe, student=student)
    assert result["layers"] == aligned["layers"] != unaligned["layers"] and result["student"]["data"] < unaligned["student"]["data"]
    first, second = result["stages"]["0.5"]
    assert first.pop("mamba_layers") == second["mamba_layers"] and [second] == aligned["stages"]["0.5"]
    assert first == {"steps": 4, "align": "mixer", "lr": 1e-3, "train": ["*mamba*"]}


def test_a_folder_that_cannot_be_written_is_refused_before_the_work(monkeypatch):
    monkeypatch.setattr(planning, "_split", lambda *_: pytest.fail("work began"))
    with pytest.raises(OSError, match="cannot write /proc/plan"):
        quick(mil.random(CONFIG, seed=1), out="/proc/plan")


def test_the_probe_weighs_what_the_teacher_answers(monkeypatch):
    teacher = mil.random(CONFIG, seed=1)
    for able in (0.0, 0.5, 1.0):
        monkeypatch.setattr(planning, "_right", lambda *_: able)
        result = quick(teacher)
        assert [row["score"] for row in result["layers"]] == pytest.approx(
            [(row["data"] + able * row["recall"]) / (1 + able) for row in result["layers"]]) and result["teacher_recall"] == able


def test_how_often_the_teacher_is_right():
    probe = planning._probe(mil.random(CONFIG), 0)
    assert planning._right(Oracle(40), probe) == 1 and planning._right(Oracle(40, strays=1), probe) < 0.3


# -- what a plan costs ------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, mixer", [("llama-linear-tied-f16", "mamba1"), ("llama-bias-bf16", "mamba2")])
def test_bytes_are_those_of_the_arrays_and_of_the_files(tmp_path, name, mixer):
    teacher = mil.load(DATA / name)
    for plan in quick(teacher, recipe=SHORT | {"mixer": mixer}, attention=[0.5, 0])["plans"]:
        model = mil.convert(teacher, plan["mamba_layers"], mixer)
        assert plan["weight_bytes"] == sum(model.raw(name).nbytes for name in model.names)
        mil.save(model, tmp_path / "model")
        found = describe(tmp_path / "model")
        assert plan["weight_bytes"] == sum(found["bytes"].values())
        assert [plan[key] for key in ("kv_bytes_per_token", "state_bytes_per_sequence")] == [
            found[key] for key in ("kv_bytes_per_token", "state_bytes_per_sequence")]


def test_the_forecasts_runs_are_distillations_by_the_recipe():
    teacher, data = mil.random(CONFIG, seed=1), rows(1, 80)
    recipe = SHORT | {"train": ["*"], "seed": 3}
    (plan,) = mil.plan(teacher, data, 0.33, recipe, align_steps=0, probe_steps=3, context=9)["plans"][:1]
    assert [run["steps"] for run in plan["probes"]] == [3, 6, 12] and plan["tokens_per_second"] > 0
    student = mil.convert(teacher, plan["mamba_layers"], seed=3)
    learn, seen = [row for i, row in enumerate(data) if i % 8], data[::8]
    report = mil.distill(student, teacher, learn, recipe | {"steps": 6, "eval_data": seen})
    assert [plan["probes"][1][key] for key in ("ce", "kl")] == pytest.approx([report["eval"][key] for key in ("ce", "kl")], rel=1e-5)
    for name in ("ce", "kl"):
        forecast = plan["forecast"][name]
        assert forecast["low"] <= forecast["at"] <= forecast["high"] and forecast["low"] < forecast["high"]


def test_the_curve_is_found():
    steps = [20, 40, 80]
    for a, b, c in ((1.0, 3.0, 0.5), (0.0, 2.0, 0.9), (0.4, 5.0, 0.3)):
        assert planning.extrapolate(steps, [a + b * n**-c for n in steps], 1000) == pytest.approx(a + b * 1000**-c, rel=1e-3)
    assert planning.extrapolate(steps, [1, 1.2, 1.1], 1000) == pytest.approx(1.1)  # a loss that does not fall stays at its mean
    assert 0 <= planning.extrapolate(steps, [3, 1, 0.01], 10**6) < 0.01  # and none falls below 0
    losses = np.stack([[[a + 2 / n, a + 1 / n, 1] for a in (0.5, 1.0, 1.5, 3.0)] for n in steps])
    found = planning._forecast(steps, losses, 1000)
    assert found["ce"]["at"] == pytest.approx(1.502, abs=1e-3) and found["kl"]["at"] == pytest.approx(1.501, abs=1e-3)
    assert found["ce"]["low"] < 1.1 and 1.9 < found["ce"]["high"] < 3


# -- the command ------------------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan")
    mil.save(mil.random(FOUR, seed=1), folder / "teacher")
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows(1, 80))))
    return folder


def test_the_command_writes_what_a_recipe_takes(folder, capsys):
    words = [word for key, value in SHORT.items() for word in ("--set", f"{key}={value}")]
    code = main(["plan", str(folder / "teacher"), "--data", str(folder / "data.jsonl"), "--attention", "0.5", "0.25", "--probe-steps", "2",
                 "--align-steps", "2", "--context", "8", "--out", str(folder / "out"), *words])
    out, err = capsys.readouterr()
    assert code == 0, err
    result = json.loads((folder / "out" / "plan.json").read_text())
    assert (folder / "out" / "plan.png").read_bytes().startswith(b"\x89PNG")
    lines = out.splitlines()
    assert len(lines) == 4 + len(result["plans"]) and "KL recovered" in lines[0] and "placement" in lines[3] and " *" in out
    teacher = mil.load(folder / "teacher")
    for share, stages in result["stages"].items():
        student = mil.convert(teacher, mamba_layers=[])
        mil.distill(student, teacher, rows(1), {"length": 24, "batch": 4, "stages": stages})
        assert student.layer_kinds.count("attention") == round(4 * float(share)) and [stage["steps"] for stage in stages] == [2, 30]


@pytest.mark.parametrize("how, says", [
    (dict(attention=1.0), "below 1"), (dict(attention=[]), "needs a share"), (dict(attention=[0.5, "x"]), "'x'"),
    (dict(attention=0.9), "keeps all of the teacher's 4 attention layers"), (dict(recipe={"stages": [{"steps": 5}]}), "recipe has stages"),
    (dict(recipe={"epochs": 2}), "recipe has epochs"), (dict(recipe={"step": 5}), "did you mean 'steps'"), (dict(rows=0), "rows must be"),
    (dict(probe_steps=-1), "probe_steps must be"), (dict(student=3), r"layers \[3\] of the student are attention"),
    (dict(student=None, teacher=True), "no attention layer"), (dict(student=CONFIG), "3 layers and the teacher 4"),
])
def test_bad_arguments_are_one_sentence(how, says):
    teacher = mil.random(FOUR, seed=1)
    if how.pop("teacher", False):
        teacher = mil.convert(teacher, attention=0)
    if how.get("student") == 3:
        how["student"] = mil.convert(teacher, mamba_layers=[0, 1, 2])
    elif how.get("student"):
        how["student"] = mil.convert(mil.random(how["student"]), attention=0)
    with pytest.raises(ValueError, match=says):
        quick(teacher, **how)


def test_one_row_of_data_can_be_measured_but_not_learned_from():
    teacher, row = mil.random(FOUR, seed=1), rows(1, 1)
    assert mil.plan(teacher, row, recipe=SHORT, align_steps=1, probe_steps=0, context=0)["plans"][0]["kl"] > 0
    with pytest.raises(ValueError, match="needs two"):
        mil.plan(teacher, row, recipe=SHORT)


def test_the_command_refuses_stages_before_it_looks_for_a_model(capsys):
    code = main(["plan", "/nowhere", "--data", "x", "--set", 'stages=[{"steps": 5}]'])
    out, err = capsys.readouterr()
    assert code == 2 and out == "" and "the recipe has stages" in err and err.count("\n") == 1
