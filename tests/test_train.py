"""The training loop: stages, what a step is, what is written, and that a run ends with the same bits however it was stopped."""
import importlib
import json
import math
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
import zipfile
from contextlib import contextmanager

import numpy as np
import pytest

import mambainllama as mil
from conftest import on
from mambainllama.data import Batches, read
from mambainllama.recipe import load_recipe

loop = importlib.import_module("mambainllama.train")  # the module: mil.train is the function
V, L = 40, 3
CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 32, "intermediate_size": 32,
          "num_hidden_layers": L, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": V, "rms_norm_eps": 1e-5,
          "max_position_embeddings": 64, "rope_theta": 10000.0, "hidden_act": "silu", "initializer_range": 0.2}
PLAN = {"stages": [{"mamba_layers": [1], "steps": 7}, {"mamba_layers": [0, 1], "steps": 6}], "length": 20, "batch": 2, "accumulate": 2,
        "lr": 3e-3, "clip": 0.5, "checkpoint_every": 4, "eval_every": 5, "weight_decay": 0.01}


def rows(seed, count=30):
    rng = np.random.default_rng(seed)
    return [{"ids": [int(rng.integers(V))] * 3 + rng.integers(V, size=rng.integers(1, 24)).tolist()} for _ in range(count)]


PLAN["eval_data"] = rows(2, 7)


def pair(dtype="float32", device="cpu"):
    """A student that shares its weights with the teacher, and the teacher."""
    teacher = mil.random(CONFIG, seed=1, dtype=dtype, device=device)
    return mil.convert(teacher, mamba_layers=[]), teacher


def distill(out=None, dtype="float32", device="cpu", **changes):
    """A whole run of PLAN from a fresh student; → the student and the report."""
    student, teacher = pair(dtype, device)
    return student, mil.distill(student, teacher, rows(1), {**PLAN, **changes}, out=out)


def bits(model):
    return {name: model.raw(name).tobytes() for name in model.names}


def history(folder):
    """metrics.jsonl without what depends on the clock."""
    clock = ("seconds", "tokens_per_second")
    return [{k: v for k, v in json.loads(line).items() if k not in clock} for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Uninterrupted runs by dtype and how moments, and in bf16 gradients too, are kept: (folder, student)."""
    done = {}

    def run(*kind):
        dtype, moments = kind or ("float32", "float32")
        if kind not in done:
            folder = tmp_path_factory.mktemp("whole")
            done[kind] = folder, distill(folder, dtype, moments=moments, gradients=moments)[0]
        return done[kind]
    return run


def same_end(folder, student, whole, *kind):
    assert bits(student) == bits(whole(*kind)[1])
    assert history(folder) == history(whole(*kind)[0])
    assert bits(mil.load(folder / "model")) == bits(student)
    assert not list(folder.glob("*.tmp"))


def stop_after(monkeypatch, step, how):
    """how() is called when the step's metrics have been written, before its checkpoint."""
    record = loop.Folder.record

    def stopping(self, values):
        record(self, values)
        if values["step"] == step:
            how()
    monkeypatch.setattr(loop.Folder, "record", stopping)


class Stop(Exception):
    pass


def stop():
    raise Stop


# -- the plan -----------------------------------------------------------------------------------------------------------


def test_stages_convert_and_the_report_tells(whole):
    folder, student = whole()
    assert student.layer_kinds == ["mamba2", "mamba2", "attention"]
    report, lines = json.loads((folder / "report.json").read_text()), history(folder)
    assert [line["step"] for line in lines] == list(range(1, 14)) and [line["stage"] for line in lines] == [0] * 7 + [1] * 6
    assert [line["step"] for line in lines if "eval_loss" in line] == [5, 7, 10, 13]
    assert report["fill"] == Batches(read(rows(1)), 20, 2).fill
    assert report["steps"] == 13 and report["tokens"] == 13 * 80 and len(report["stages"]) == 2
    assert [report[k] for k in ("loss", "ce", "kl")] == [lines[-1][k] for k in ("loss", "ce", "kl")]
    assert report["eval"] == {k: lines[-1][f"eval_{k}"] for k in ("loss", "ce", "kl")}
    assert report["history"] == str(folder / "metrics.jsonl") and report["model"] == str(folder / "model")
    assert lines[-1]["loss"] == pytest.approx(0.1 * lines[-1]["ce"] + lines[-1]["kl"])


def test_distillation_teaches():
    _, report = distill(stages=[{"mamba_layers": [1], "steps": 40}], ce=0.0, lr=1e-2, accumulate=1, eval_every=99, eval_data=rows(1))
    student, teacher = pair()
    before = mil.convert(teacher, mamba_layers=[1])
    ids, targets, prev = next(Batches(read(rows(1)), 20, 99, shuffle=False).once())
    assert report["eval"]["kl"] < 0.5 * before.loss(ids, targets, teacher=teacher, kl=1.0, prev=prev)["kl"]


def test_training_learns_and_leaves_frozen_weights_alone():
    model, (_, untouched) = mil.random(CONFIG, seed=1), pair()
    report = mil.train(model, rows(1), {"steps": 60, "length": 32, "batch": 4, "lr": 2e-2, "train": ["*self_attn*", "lm_head*"]})
    assert report["ce"] < 0.7 * math.log(V) and report["loss"] == report["ce"] and report["kl"] == 0 and report["history"] is None
    moved = {name for name in model.names if bits(model)[name] != bits(untouched)[name]}
    assert moved == {name for name in model.names if "self_attn" in name or "lm_head" in name}


def test_accumulation_equals_a_larger_batch():
    ends = [mil.train(m, rows(1), {"steps": 3, "length": 20, "batch": b, "accumulate": 6 // b, "lr": 1e-3}) and m
            for b in (6, 2, 1) for m in [mil.random(CONFIG, seed=1)]]
    for name in ends[0].names:
        for other in ends[1:]:
            assert np.abs(other.get(name) - ends[0].get(name)).max() < 2e-5


def test_evaluation_is_one_mean():
    student, teacher = pair()
    student = mil.convert(teacher, mamba_layers=[0])
    for kind in ("forward", "reverse", "paper"):
        recipe = load_recipe({"steps": 1, "ce": 0.3, "kl": 0.7, "kl_kind": kind})
        goal = loop.LanguageModelling(student, teacher, recipe)
        parts, one = (loop.evaluate(goal, Batches(read(rows(2)), 20, b, shuffle=False).once) for b in (3, 99))
        assert one == pytest.approx(parts, rel=1e-5) and one["loss"] == pytest.approx(0.3 * one["ce"] + 0.7 * one["kl"])


def test_rate():
    recipe = load_recipe({"steps": 10, "lr": 2.0, "warmup": 0.2})
    cosine = [loop.rate(recipe, k, 10) for k in range(10)]
    assert cosine[:3] == [1.0, 2.0, 2.0] and cosine[6] == pytest.approx(1.0) and all(np.diff(cosine[2:]) < 0) and cosine[-1] > 0
    assert [loop.rate({**recipe, "schedule": "linear"}, k, 10) for k in (2, 6, 9)] == [2.0, 1.0, 0.25]
    assert {loop.rate({**recipe, "schedule": "constant", "warmup": 0.0}, k, 10) for k in range(10)} == {2.0}
    assert [loop.rate({**recipe, "warmup": 1.0}, k, 4) for k in range(4)] == [0.5, 1.0, 1.5, 2.0]


def test_a_stage_starts_afresh(tmp_path):
    """The second stage of a plan has the bits of a run of its own on what the first one saved."""
    data = rows(1, 1)  # every batch is this row
    stages = [{"mamba_layers": [1], "steps": 3}, {"mamba_layers": [0, 1], "steps": 3}]
    (both, teacher), (one, _) = pair(), pair()
    mil.distill(both, teacher, data, {**PLAN, "stages": stages})
    mil.distill(one, teacher, data, {**PLAN, "stages": stages[:1]}, out=tmp_path)
    two = mil.load(tmp_path / "model")
    mil.distill(two, teacher, data, {**PLAN, "stages": stages[1:]})
    assert bits(two) == bits(both)


def test_clipping(monkeypatch):
    model, scales, step = mil.random(CONFIG, seed=1), [], mil.Model.step

    def watched(self, *args, scale, **kwargs):
        scales.append((scale, self.grad_norm()))
        return step(self, *args, scale=scale, **kwargs)
    monkeypatch.setattr(mil.Model, "step", watched)
    for clip in (1e-3, 1e9, None):
        mil.train(model, rows(1), {"steps": 1, "length": 20, "clip": clip})
    assert scales[0][0] * scales[0][1] == pytest.approx(1e-3) and [scale for scale, _ in scales[1:]] == [1.0, 1.0]


@pytest.mark.parametrize("stage, kinds", [({"mixer": "mamba1"}, ["mamba1", "mamba2", "attention"]),
                                          ({}, ["mamba2", "mamba2", "attention"])])
def test_mixers(stage, kinds):
    assert distill(stages=[{"mamba_layers": [1], "steps": 1}, {"mamba_layers": [0, 1], "steps": 1, **stage}])[0].layer_kinds == kinds


def test_new_layers_take_the_student_s_mixer():
    student, teacher = pair()
    student = mil.convert(teacher, mamba_layers=[1], mixer="mamba1")
    mil.distill(student, teacher, rows(1), {**PLAN, "stages": [{"mamba_layers": [0, 1], "steps": 1}]})
    assert student.layer_kinds == ["mamba1", "mamba1", "attention"]


# -- stopped and started again ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step, dtype, moments", [
    *((step, "float32", "float32") for step in (1, 5, 7, 8, 9, 13)), *((step, "bfloat16", "float32") for step in (5, 9, 12)),
    (5, "float32", "bfloat16"), (6, "bfloat16", "bfloat16"), (9, "bfloat16", "bfloat16")])
def test_resumed_at_any_step(tmp_path, monkeypatch, whole, step, dtype, moments):
    with monkeypatch.context() as patch, pytest.raises(Stop):
        stop_after(patch, step, stop)
        distill(tmp_path, dtype, moments=moments, gradients=moments)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 9')  # a line cut short
    (tmp_path / "checkpoint.npz.tmp").write_bytes(b"cut short too")
    student, _ = distill(tmp_path, dtype, moments=moments, gradients=moments)
    same_end(tmp_path, student, whole, dtype, moments)


@pytest.mark.parametrize("device, moments", [pytest.param(*p.values, moments, marks=p.marks) for p in on("cuda32", "cuda")
                                             for moments in ("float32", "bfloat16")], indirect=["device"])
def test_resumed_on_a_gpu(tmp_path, monkeypatch, device, moments):
    """Two runs, one of them killed between two checkpoints of a stage: the same bits."""
    plan = {"stages": [{"mamba_layers": [1], "steps": 2}, {"mamba_layers": [0, 1], "steps": 4}], "checkpoint_every": 2, "accumulate": 1,
            "moments": moments, "gradients": moments, "recompute": moments == "bfloat16"}
    whole, _ = distill(tmp_path / "whole", **device.how, **plan)
    with monkeypatch.context() as patch, pytest.raises(Stop):
        stop_after(patch, 5, stop)
        distill(tmp_path / "killed", **device.how, **plan)
    student, report = distill(tmp_path / "killed", **device.how, **plan)
    assert bits(student) == bits(whole) and report["steps"] == 6
    assert history(tmp_path / "killed") == history(tmp_path / "whole")


def test_bf16_moments_learn_and_are_kept_as_such():
    """A student with float32 moments takes up a run of the other kind; loss and weights end near those of float32 moments."""
    ends = {}
    for moments in ("float32", "bfloat16"):
        model = mil.random(CONFIG, seed=1)
        mil.train(model, rows(1), {"steps": 1, "length": 20})
        report = mil.train(model, rows(1), {"steps": 60, "length": 32, "batch": 4, "lr": 2e-2, "moments": moments})
        dtypes = {tuple(a.dtype for a in (m, v)) for m, v, _ in model.moments().values()}
        assert dtypes == {(np.dtype("u2" if moments == "bfloat16" else "f4"),) * 2}
        ends[moments] = report["loss"]
    assert ends["bfloat16"] == pytest.approx(ends["float32"], rel=0.05)
    with pytest.raises(ValueError, match="the moments are bfloat16, and this step is to keep float32 ones"):
        model.step(1e-3)


def test_resumed_with_frozen_mamba_layers(tmp_path, monkeypatch):
    """Converted weights that do not learn come out of the checkpoint too."""
    plan = {"train": ["*mlp*"]}
    with monkeypatch.context() as patch, pytest.raises(Stop):
        stop_after(patch, 10, stop)
        distill(tmp_path, **plan)
    assert bits(distill(tmp_path, **plan)[0]) == bits(distill(**plan)[0])


def test_killed_at_random_moments(tmp_path, whole):
    whole()
    start = time.perf_counter()
    distill(tmp_path / "timed", checkpoint_every=1)
    length = time.perf_counter() - start
    folder, rng, killed = tmp_path / "run", random.Random(0), 0
    for _ in range(12):
        child = os.fork()
        if not child:
            try:
                loop.tqdm.set_lock(threading.RLock())  # tqdm's own is shared with us, and would stay locked
                distill(folder, checkpoint_every=1)
            finally:
                os._exit(0)
        time.sleep(rng.uniform(0, 0.5 * length))
        os.kill(child, signal.SIGKILL)
        if os.waitpid(child, 0)[1] != signal.SIGKILL:
            break
        killed += 1
    assert killed
    code = (f"import sys; sys.path.insert(0, {os.path.dirname(__file__)!r}); "
            f"import test_train; test_train.distill({str(folder)!r}, checkpoint_every=1)")
    subprocess.run([sys.executable, "-P", "-c", code], check=True, timeout=60)
    assert bits(mil.load(folder / "model")) == bits(whole()[1])
    assert history(folder) == history(whole()[0])


def test_a_finished_run_gives_its_report_and_weights(whole):
    folder, student = whole()
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("model/*")}
    again, report = distill(folder)
    assert report == json.loads((folder / "report.json").read_text()) and bits(again) == bits(student)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("model/*")} == before


@pytest.mark.parametrize("step", [3, 7, 8])
def test_ctrl_c(tmp_path, monkeypatch, whole, step):
    with monkeypatch.context() as patch:
        stop_after(patch, step, lambda: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(KeyboardInterrupt, match=f"after step {step} of 13"):
            distill(tmp_path)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with np.load(tmp_path / "checkpoint.npz") as file:
        assert json.loads(file["run.json"])["status"]["step"] == step
    student, _ = distill(tmp_path)
    same_end(tmp_path, student, whole)


def test_ctrl_c_twice_does_not_wait(tmp_path, monkeypatch):
    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise Stop
    stop_after(monkeypatch, 3, twice)
    with pytest.raises(KeyboardInterrupt):
        distill(tmp_path)
    assert not (tmp_path / "checkpoint.npz").exists() and len(history(tmp_path)) == 3


@contextmanager
def full_disk(size):
    """No file can grow beyond size bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk(tmp_path, monkeypatch, whole):
    with monkeypatch.context() as patch, pytest.raises(Stop):
        stop_after(patch, 5, stop)
        distill(tmp_path)
    before = (tmp_path / "checkpoint.npz").read_bytes()
    with full_disk(len(before) // 2), pytest.raises(OSError, match=r"cannot write .*/checkpoint\.npz: ") as error:
        distill(tmp_path)
    assert "\n" not in str(error.value) and (tmp_path / "checkpoint.npz").read_bytes() == before
    student, _ = distill(tmp_path)
    same_end(tmp_path, student, whole)


def test_an_unwritable_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot write .*/file/run: "):
        distill(tmp_path / "file" / "run")


def test_another_run_is_refused(whole):
    folder, _ = whole()
    student, teacher = pair()
    for change, says in [({"lr": 1e-3}, "lr 0.003, not 0.001"), ({"eval_data": rows(3)}, "another eval_data"), ({"seed": 4}, "seed 0, not 4"),
                         ({"moments": "bfloat16"}, "moments 'float32', not 'bfloat16'"),
                         ({"stages": PLAN["stages"][:1]}, "stages")]:
        with pytest.raises(ValueError, match=says):
            mil.distill(student, teacher, rows(1), {**PLAN, **change}, out=folder)
    with pytest.raises(ValueError, match="another data"):
        mil.distill(student, teacher, rows(9), PLAN, out=folder)
    with pytest.raises(ValueError, match="another teacher"):
        mil.distill(student, mil.random(CONFIG, seed=5), rows(1), PLAN, out=folder)
    assert bits(student) == bits(pair()[0])


def test_another_student_is_refused(tmp_path):
    student, teacher = pair()
    plan = {**PLAN, "train": ["*lm_head*", "*mamba*"]}
    mil.distill(student, teacher, rows(1), plan, out=tmp_path)
    mil.distill(student, teacher, rows(1), plan, out=tmp_path)  # the trained student itself is the same one
    other = mil.convert(mil.random(CONFIG, seed=5), mamba_layers=[])
    with pytest.raises(ValueError, match="another student"):
        mil.distill(other, teacher, rows(1), plan, out=tmp_path)
    with pytest.raises(ValueError, match="checkpoint's"):
        mil.distill(mil.convert(teacher, mamba_layers=[0, 1], mixer="mamba1"), teacher, rows(1), plan, out=tmp_path)


def test_another_thread_count_warns(whole, monkeypatch):
    folder, _ = whole()
    machine = loop._machine
    monkeypatch.setattr(loop, "_machine", lambda model: {**machine(model), "threads": 99})
    with pytest.warns(UserWarning, match="threads .* and this is 99"):
        distill(folder)


@pytest.mark.parametrize("damage", [lambda b: b[:len(b) // 2], lambda b: b[:9000] + b"?" + b[9001:], lambda b: b"", lambda b: b"hello"])
def test_a_damaged_checkpoint_is_named(tmp_path, monkeypatch, damage):
    with monkeypatch.context() as patch, pytest.raises(Stop):
        stop_after(patch, 5, stop)
        distill(tmp_path)
    path = tmp_path / "checkpoint.npz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"checkpoint\.npz is damaged"):
        distill(tmp_path)


def rewritten(path, change):
    """The zip at path again, its members {name: bytes} as change leaves them: sound by all checksums."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    change(members)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)


NORM = "model.norm.weight.npy"


@pytest.mark.parametrize("change, says", [
    (lambda m: m.pop("v/" + NORM), "the array v/model.norm.weight is missing"),
    (lambda m: m.update({"n/" + NORM: m.pop("m/" + NORM)}), "the array m/model.norm.weight is missing"),
    (lambda m: [m.pop(part + NORM) for part in ("weight/", "m/", "v/")], "the array m/model.norm.weight is missing"),
    (lambda m: m.update({"weight/more.npy": m["weight/" + NORM]}), "the array weight/more"),
    (lambda m: m.update({"m/" + NORM: m["m/model.embed_tokens.weight.npy"]}), "shape"),
    (lambda m: m.update({"v/" + NORM: m["v/" + NORM][:100]}), r"checkpoint\.npz is damaged"),
    (lambda m: m.update({"v/" + NORM: b"\x93NUMPY\x01\x00\x06\x00{'a':\n"}), "multi-line"),
    (lambda m: m.update({"run.json": b"[]"}), "is damaged"),
    (lambda m: m.update({"run.json": b"\xff"}), "is damaged"),
])
def test_a_checkpoint_of_other_members_is_damaged(tmp_path, monkeypatch, change, says):
    with monkeypatch.context() as patch, pytest.raises(Stop):
        stop_after(patch, 5, stop)
        distill(tmp_path)
    rewritten(tmp_path / "checkpoint.npz", change)
    with pytest.raises(ValueError, match=says) as error:
        distill(tmp_path)
    assert str(error.value).startswith(f"{tmp_path}/checkpoint.npz is damaged (") and "\n" not in str(error.value)


# -- sentences --------------------------------------------------------------------------------------------------------------------


def test_sentences():
    student, teacher = pair()
    hybrid = mil.convert(teacher, mamba_layers=[2])
    cases = [
        (lambda: mil.distill(teacher, teacher, rows(1), PLAN), "one model"),
        (lambda: mil.train(student, rows(1), {"steps": 1, "kl": 1.0}), "there is no teacher"),
        (lambda: mil.train(student, rows(1), {"steps": 1, "lrr": 1.0}), "did you mean 'lr'"),
        (lambda: mil.train(student, [], {"steps": 1}), "no rows"),
        (lambda: mil.train(student, [{"ids": [1, V]}], {"steps": 1}), f"data row 0: ids must be from 0 to {V - 1}"),
        (lambda: mil.train(student, [{"text": "a"}], {"steps": 1}), "no tokenizer"),
        (lambda: mil.train(student, rows(1), {"steps": 1, "length": 20, "train": ["*nothing*"]}), "nothing"),
        (lambda: mil.distill(student, teacher, rows(1), {**PLAN, "stages": [{"mamba_layers": [3], "steps": 1}]}), "layers 0 to 2"),
        (lambda: mil.distill(hybrid, teacher, rows(1), PLAN), r"layers \[2\] are Mamba already"),
        (lambda: mil.train(student, rows(1), {"steps": 9, "length": 20, "lr": 1e30, "warmup": 0.0}), "smaller lr"),
    ]
    for call, says in cases:
        with pytest.raises(ValueError, match=says) as error:
            call()
        assert "\n" not in str(error.value)
