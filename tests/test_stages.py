"""Stages that differ in what they learn: alignment, on-policy with its rollback, settings of their own; and calibrated starts."""
import numpy as np
import pytest
from conftest import on
from test_train import CONFIG, PLAN, Stop, bits, distill, history, pair, rows, stop, stop_after

import mambainllama as mil
from mambainllama.calibrate import _attention
from mambainllama.config import architecture
from mambainllama.data import Batches, read
from mambainllama.objectives import LanguageModelling, evaluate
from mambainllama.recipe import load_recipe

ALIGN = [{"mamba_layers": [0, 1], "align": "mixer", "steps": 5, "train": ["*mamba*"], "lr": 1e-2},
         {"align": "hidden", "on_policy": True, "steps": 4, "train": ["*mamba*", "!*.D"], "schedule": "constant"}, {"steps": 4}]


@pytest.mark.parametrize("step", [3, 6, 8, 10])
def test_alignment_resumes_to_the_same_bits(tmp_path, monkeypatch, step):
    """Killed within a stage of alignment, within an on-policy one, whose weights from before it are in a file, and after it."""
    plan = {"stages": ALIGN, "checkpoint_every": 2}
    whole, report = distill(tmp_path / "whole", **plan)
    assert [("error" in end, "kl" in end, "rolled_back" in end) for end in report["stages"]] == [(True, False, False), (True, False, True), (False, True, False)]
    with monkeypatch.context() as patch, pytest.raises(Stop):
        stop_after(patch, step, stop)
        distill(tmp_path / "killed", **plan)
    student, _ = distill(tmp_path / "killed", **plan)
    assert bits(student) == bits(whole) and history(tmp_path / "killed") == history(tmp_path / "whole")


def test_alignment_moves_the_layers_to_the_teacher_s(tmp_path):
    student, teacher = pair()
    before = bits(student)
    report = mil.distill(student, teacher, rows(1), {**PLAN, "accumulate": 1, "stages": [{**ALIGN[0], "steps": 60}]}, out=tmp_path)
    errors = [line["error"] for line in history(tmp_path)]
    assert np.mean(errors[-5:]) < 0.8 * np.mean(errors[:5]) and report["error"] == errors[-1] and "kl" not in report
    after = bits(student)
    assert all(after[name] == before[name] for name in after if name in before), "a parameter that is not of a mixer moved"


def test_a_layer_of_the_teacher_s_that_adds_nothing():
    """Its variance is 0, and the error of the others still counts."""
    student, teacher = pair()
    name = "model.layers.0.self_attn.o_proj.weight"
    teacher.set(name, np.zeros(teacher.names[name], np.float32))
    report = mil.distill(student, teacher, rows(1), {**PLAN, "stages": ALIGN[:1]})
    assert np.isfinite(report["error"])


def test_accumulated_alignment_equals_one_batch():
    ends = []
    for batch, accumulate in ((4, 1), (1, 4)):
        student, teacher = pair()
        mil.distill(student, teacher, rows(1), {**PLAN, "stages": ALIGN[:1], "batch": batch, "accumulate": accumulate})
        ends.append(student.get("model.layers.1.mamba.in_proj.weight"))
    assert np.linalg.norm(ends[0] - ends[1]) < 1e-4 * np.linalg.norm(ends[0])


def test_a_stage_has_its_own_settings(tmp_path):
    stages = [{"steps": 2, "train": ["*mlp*"], "lr": 1e-3, "schedule": "constant", "warmup": 2}, {"steps": 2, "train": ["*norm*"], "kl": 0.0, "ce": 1.0}]
    student, teacher = pair()
    before = bits(student)
    mil.distill(student, teacher, rows(1), {**PLAN, "stages": stages}, out=tmp_path)
    after = bits(student)
    assert all((after[name] != before[name]) == ("mlp" in name or "norm" in name) for name in before)
    lines = history(tmp_path)
    assert [line["lr"] for line in lines] == [5e-4, 1e-3, lines[2]["lr"], lines[3]["lr"]] and lines[3]["loss"] == pytest.approx(lines[3]["ce"])


def test_weights_of_an_earlier_stage_s_patterns_are_in_the_checkpoint(tmp_path, monkeypatch):
    plan = {"stages": [{"steps": 4, "train": ["*mlp*"]}, {"steps": 5, "train": ["*norm*"]}], "checkpoint_every": 3}
    with monkeypatch.context() as patch, pytest.raises(Stop):
        stop_after(patch, 7, stop)
        distill(tmp_path, **plan)
    assert bits(distill(tmp_path, **plan)[0]) == bits(distill(**plan)[0])


def test_epochs_count_the_rows():
    data = rows(1)
    batches = Batches(read(data), PLAN["length"], 2, 0)
    _, report = distill(stages=[{"mamba_layers": [0], "epochs": 1.5}], batch=2, accumulate=2)
    assert report["steps"] == int(np.ceil(1.5 * len(batches) / 4))


@pytest.mark.parametrize("stage, says", [
    ({"align": "mixer", "steps": 1}, "no layer of the student differs in kind"),
    ({"align": "output", "steps": 1}, "null or 'mixer' or 'hidden'"),
])
def test_bad_stages(stage, says):
    student, teacher = pair()
    with pytest.raises(ValueError, match=says):
        mil.distill(student, teacher, rows(1), {**PLAN, "stages": [stage]})
    with pytest.raises(ValueError, match="align is mixer and there is no teacher"):
        mil.train(teacher, rows(1), {"stages": [{"align": "mixer", "steps": 1}]})


# ---- calibrated starts -----------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def learned():
    """A teacher that has learned something: tokens that stand earlier in the row come again."""
    rng = np.random.default_rng(0)
    data = [{"ids": (ids := rng.integers(V, size=8).tolist()) + ids + ids} for V in [20] for _ in range(300)]
    teacher = mil.random(CONFIG | {"num_attention_heads": 4, "num_key_value_heads": 2}, seed=1)
    report = mil.train(teacher, data, {"steps": 250, "length": 24, "batch": 8, "lr": 1e-2})
    assert report["loss"] < 2.2
    return teacher, data


@pytest.mark.parametrize("mixer", ["mamba1", "mamba2"])
def test_calibrated_starts_nearer(learned, mixer):
    teacher, data = learned
    recipe = load_recipe({"steps": 1})

    def kl(init, **how):
        student = mil.convert(teacher, attention=0, mixer=mixer, init=init, **how)
        held = Batches(read(data), 24, 8, shuffle=False)
        return evaluate(LanguageModelling(student, teacher, recipe), held.once)["kl"], student
    calibrated, student = kl("calibrated", data=data)
    assert calibrated < 0.9 * kl("identity")[0] and calibrated < 0.9 * kl("random")[0]
    again = mil.convert(teacher, attention=0, mixer=mixer, init="calibrated", data=data)
    assert bits(again) == bits(student)
    mil.parity(student, teacher, np.arange(8)[None])  # what was copied is as it was


@pytest.mark.parametrize("family", [{}, {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 5},
                                    {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 16},
                                    {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}])
def test_the_attention_that_calibration_sees_is_the_teacher_s(family):
    """Its output, put through o_proj, is what the teacher's layer adds; and the distance of uniform attention is the mean of what is seen."""
    teacher = mil.random(CONFIG | {"num_attention_heads": 4, "num_key_value_heads": 2} | family, seed=3)
    for name in teacher.names:
        if "bias" in name or "norm" in name:
            teacher.set(name, teacher.get(name) + 0.3 * np.random.default_rng(len(name)).standard_normal(teacher.names[name]).astype(np.float32))
    ids, _, prev = Batches(read(rows(4)), 20, 3, 0).batch(0)
    h, mid = teacher.hidden(ids, [1], prev=prev)[0], teacher.hidden(ids, [1], prev=prev, mid=True)[0]
    sizes = architecture(teacher.config)
    _, o, distance = _attention(teacher, 1, sizes, h, prev)
    added = o @ teacher.get("model.layers.1.self_attn.o_proj.weight").T
    assert np.linalg.norm(added - (mid - h)) < 1e-4 * np.linalg.norm(added)
    teacher.set("model.layers.1.self_attn.q_proj.weight", np.zeros(teacher.names["model.layers.1.self_attn.q_proj.weight"], np.float32))
    if family.get("model_type") != "qwen2":  # whose q has a bias
        depth = np.array([[t - max(s for s in range(t + 1) if row[s] == -2) for t in range(20)] for row in prev])
        seen = np.minimum(depth, sizes["window"][1] - 1 if sizes["window"][1] else 99)
        assert _attention(teacher, 1, sizes, h, prev)[2] == pytest.approx(np.full(4, seen.mean() / 2), rel=1e-4)


def test_a_layer_that_gets_worse_is_rolled_back(learned):
    """One step so large that it ruins every layer, and one that changes nothing."""
    teacher, data = learned
    for lr, worse in ((3.0, [0, 1]), (0.0, [])):
        student = mil.convert(teacher, mamba_layers=[0, 1], init="calibrated", data=data)
        before = bits(student)
        stage = {"align": "mixer", "on_policy": True, "steps": 1, "train": ["*mamba*"], "lr": lr}
        report = mil.distill(student, teacher, data, {**PLAN, "warmup": 0, "stages": [stage], "eval_data": data[:9]})
        assert report["stages"][0]["rolled_back"] == worse
        assert bits(student) == before


def test_calibration_in_a_stage_resumes_to_the_same_bits(tmp_path, monkeypatch):
    plan = {"stages": [{"mamba_layers": [1], "steps": 3, "init": "calibrated"}, {"mamba_layers": [0, 1], "steps": 4, "init": "calibrated"}],
            "checkpoint_every": 2}
    with monkeypatch.context() as patch, pytest.raises(Stop):
        stop_after(patch, 5, stop)
        distill(tmp_path, **plan)
    assert bits(distill(tmp_path, **plan)[0]) == bits(distill(**plan)[0])


@pytest.mark.parametrize("device", on("cuda32", "cuda"), indirect=True)
def test_a_run_of_all_stages_on_a_gpu(device):
    """The same recipe as on the CPU, within the rounding of the activations."""
    plan = {"stages": [{**ALIGN[0], "init": "calibrated"}, ALIGN[1], {"steps": 3}], "eval_data": None}
    _, ours = distill(**device.how, **plan)
    _, cpu = distill(**plan)
    for a, b in zip(ours["stages"], cpu["stages"]):
        assert a["loss"] == pytest.approx(b["loss"], rel=0.1 if device.how["dtype"] == "bfloat16" else 1e-2)


def test_bad_calibrations():
    _, teacher = pair()
    with pytest.raises(ValueError, match="needs data to calibrate on"):
        mil.convert(teacher, attention=0.5, init="calibrated")
    with pytest.raises(ValueError, match="needs data to calibrate on"):
        mil.dpo(teacher, [{"prompt": [1], "chosen": [2], "rejected": [3]}], {"stages": [{"mamba_layers": [0], "steps": 1, "init": "calibrated"}], "length": 8})
