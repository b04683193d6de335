"""Training over MPI: two ranks are one process to rounding, on any number of ranks a run goes on, a killed rank leaves a whole checkpoint.

mpirun runs this file: its arguments are a folder and the names of RUNS or OTHERS, which it does there, one after the other."""
import functools
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, os.path.dirname(__file__))
import mambainllama as mil
import test_cache
import test_pipeline
import test_preference
from conftest import on
from mambainllama.parallel import ranks
from test_pipeline import folder as recipe_folder  # noqa: F401 (a fixture)
from test_train import Stop, bits, distill, history, pair, rows, stop, stop_after

loop, CACHE = importlib.import_module("mambainllama.train"), importlib.import_module("mambainllama.cache")
# ||ranks - one process|| / ||one process|| of each parameter after 13 steps: the same sums in another order; of bf16 weights, some of which
# then round the other way; of bf16 gradients, which one process rounds more often; of a calibrated layer, whose D starts at 0. Metrics: ten
# times that.
FLOATS, HALVES, ROUNDED, ZEROS = 1e-5, 2e-3, 1e-2, 1e-4


def again(out):
    """Stopped after step 6 on all ranks; the checkpoint is of step 4, and the run goes on from it."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        stop_after(patch, 6, stop)
        RUNS["bfloat16"](out)
    return RUNS["bfloat16"](out)


def few_rows(out):
    """Steps of one row: one rank has none."""
    return distill(out, batch=1, accumulate=1)[0]


def dpo(out):
    model = test_preference.hybrid()
    mil.dpo(model, test_preference.rows(), {**test_preference.PLAN, "eval_data": test_preference.rows(5, 5), "accumulate": 2}, test_preference.hybrid(2), out=out)
    return model


def align(out):
    stages = [{"mamba_layers": [1], "steps": 3, "align": "hidden", "on_policy": True, "init": "calibrated"}, {"mamba_layers": [0, 1], "steps": 3}]
    return distill(out, stages=stages)[0]


def gpu(out, device):
    distill(out, "float32" if device == "cuda32" else "bfloat16", "cuda", gradients="bfloat16", stages=[{"mamba_layers": [1], "steps": 2}, {"mamba_layers": [0, 1], "steps": 3}])


def killed(out):
    """Rank 1 is killed after step 6 of 13; the checkpoint is of step 4."""
    record = loop.Folder.record

    def kill(self, values):
        record(self, values)
        if values["step"] == 6 and ranks().rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
    loop.Folder.record = kill
    distill(out)


RUNS = {"float32": lambda out: distill(out)[0], "bfloat16": lambda out: distill(out, "bfloat16", moments="bfloat16")[0], "halves": lambda out: distill(out, "bfloat16", gradients="bfloat16")[0], "few rows": few_rows,
        "dpo": dpo, "align": align, "again": again}
def cached(out):
    """A cache, stopped after some batches and taken up again."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        predicted, calls = CACHE._predicted, []
        patch.setattr(CACHE, "_predicted", lambda *args: stop() if len(calls) > 3 else calls.append(1) or predicted(*args))
        test_cache.cache(out)
    test_cache.cache(out)


OTHERS = {"cached": cached, "killed": killed, "cuda32": lambda out: gpu(out, "cuda32"), "cuda": lambda out: gpu(out, "cuda")}


def mpirun(*command, count=2):
    """The finished process of `count` ranks of a Python command; all that they print is in stdout."""
    beside = shutil.which("mpirun", path=os.path.dirname(sys.executable)) or shutil.which("mpirun")
    if not beside or not importlib.util.find_spec("mpi4py"):
        pytest.skip("no mpirun" if not beside else "no mpi4py")
    root = Path(mil.__file__).parents[1]
    open_mpi = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe"}
    return subprocess.run([beside, "-n", str(count), sys.executable, "-P", *map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          text=True, timeout=120, env={**os.environ, **open_mpi, "MIL_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))})


def together(folder, *names, count=2):
    done = mpirun(__file__, folder, *names, count=count)
    assert done.returncode == 0, done.stdout
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """(folder of the runs of two ranks, {name: the elements of the first moment that each rank held at the end})"""
    folder = tmp_path_factory.mktemp("both")
    return folder, together(folder, *RUNS)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The runs of one process by name: (folder, model)."""
    folder = tmp_path_factory.mktemp("alone")
    return functools.cache(lambda name: (folder / name, RUNS[name](folder / name)))


@pytest.fixture(scope="module")
def lost(tmp_path_factory):
    """(folder of a run whose rank 1 was killed after step 6, what the job printed)"""
    folder = tmp_path_factory.mktemp("lost")
    done = mpirun(__file__, folder, "killed")
    assert done.returncode != 0
    return folder / "killed", done.stdout


def same(a, b, limit=FLOATS):
    """Two finished runs are one to rounding: models, metrics, what is in the checkpoints."""
    x, y = mil.load(a / "model"), mil.load(b / "model")
    for name in x.names:
        assert np.linalg.norm(x.get(name) - y.get(name)) <= limit * np.linalg.norm(x.get(name)), name
    for one, other in zip(history(a), history(b), strict=True):
        assert one.pop("rolled_back", None) == other.pop("rolled_back", None) and one == pytest.approx(other, rel=10 * limit)
    with np.load(a / "checkpoint.npz") as f, np.load(b / "checkpoint.npz") as g:
        assert f.files == g.files and all((f[key].shape, f[key].dtype) == (g[key].shape, g[key].dtype) for key in f.files if key != "run.json")


@pytest.mark.parametrize("device", on("cuda32", "cuda"), indirect=True)
def test_on_gpus(device, tmp_path):
    """Over NCCL, where each rank has a GPU and there is nccl4py; else through host memory."""
    gpu(tmp_path / "one" / device.name, device.name)
    done = mpirun(__file__, tmp_path / "two", device.name)
    assert done.returncode == 0, done.stdout
    if importlib.util.find_spec("nccl") and len(list(Path("/dev").glob("nvidia[0-9]*"))) > 1:
        assert "without NCCL" not in done.stdout
    same(tmp_path / "two" / device.name, tmp_path / "one" / device.name, ROUNDED if device.name == "cuda" else 10 * FLOATS)


@pytest.mark.parametrize("name", ["float32", "bfloat16", "halves", "few rows", "dpo", "align"])
def test_two_ranks_are_one_process(both, alone, name):
    same(both[0] / name, alone(name)[0], {"bfloat16": HALVES, "halves": ROUNDED, "align": ZEROS}.get(name, FLOATS))


def test_a_rank_keeps_half_of_the_moments(both, alone):
    for name in ("float32", "bfloat16"):
        whole = sum(m.size for m, _, _ in alone(name)[1].moments().values())
        assert sum(both[1][name]) == whole and max(both[1][name]) < 0.51 * whole


def test_on_as_many_ranks_a_run_goes_on_to_the_same_bits(both):
    folder = both[0]
    assert bits(mil.load(folder / "again" / "model")) == bits(mil.load(folder / "bfloat16" / "model"))
    assert history(folder / "again") == history(folder / "bfloat16")


def test_a_lost_rank_ends_the_job_and_the_run_goes_on_on_any_number(lost, both, alone, tmp_path):
    folder, said = lost
    assert said.count("mambainllama: ") == 1 and f"the job ended early, a rank lost or killed; the same command goes on from {folder}" in said
    with np.load(folder / "checkpoint.npz") as file:
        assert json.loads(file["run.json"])["status"]["step"] == 4 and all(file[key].size for key in file.files if key != "run.json")
    shutil.copytree(folder, tmp_path / "one")
    with pytest.warns(UserWarning, match="of ranks 2 and this is 1"):
        distill(tmp_path / "one")
    same(tmp_path / "one", alone("float32")[0])
    shutil.copytree(folder, tmp_path / "two" / "float32")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        stop_after(patch, 10, stop)
        RUNS["bfloat16"](tmp_path / "two" / "bfloat16")
    together(tmp_path / "two", "float32", "bfloat16")
    assert bits(mil.load(tmp_path / "two" / "float32" / "model")) == bits(mil.load(both[0] / "float32" / "model"))
    same(tmp_path / "two" / "bfloat16", alone("bfloat16")[0], HALVES)


def test_a_cache_is_one_process_s(tmp_path):
    together(tmp_path, "cached")
    report = test_cache.cache(tmp_path / "one")
    other = json.loads((tmp_path / "cached" / "cache.json").read_text())
    assert report["done"] == other["done"] == report["batches"] and report["full_kl"] == pytest.approx(other["full_kl"], rel=1e-5)
    for ours, theirs in zip(test_cache.arrays(tmp_path / "cached"), test_cache.arrays(tmp_path / "one")):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_the_command(tmp_path):
    plan = {"stages": [{"mamba_layers": [1], "steps": 2}], "length": 20, "batch": 2, "accumulate": 2}
    student, teacher = pair()
    mil.save(teacher, tmp_path / "teacher")
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows(1))))
    (tmp_path / "recipe.json").write_text(json.dumps(plan))
    command = ["-m", "mambainllama", "distill", tmp_path / "teacher", tmp_path / "data.jsonl", "--recipe", tmp_path / "recipe.json", "--out", tmp_path / "out"]
    done = mpirun(*command, count=3)
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 1 and "loss" in done.stdout, done.stdout
    mil.distill(student, teacher, rows(1), plan, out=tmp_path / "alone")
    same(tmp_path / "out", tmp_path / "alone")
    wrong = mpirun(*command, "--set", "length=21")
    ours = [line for line in wrong.stdout.splitlines() if "mambainllama" in line]
    assert wrong.returncode and len(ours) == 1 and "began with length 20, not 21" in ours[0], wrong.stdout
    done = mpirun("-m", "mambainllama", "cache", tmp_path / "teacher", "--data", tmp_path / "data.jsonl", "--k", "4", "--length", "20", "--out", tmp_path / "cached")
    ours = [line for line in done.stdout.splitlines() if "likeliest" in line]
    assert done.returncode == 0 and len(ours) == 1 and (tmp_path / "cached" / "tail.npy").exists(), done.stdout


def test_a_whole_recipe(recipe_folder, tmp_path):  # noqa: F811
    plan = test_pipeline.recipe(recipe_folder)
    plan["run"] = plan["run"][:3]
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    done = mpirun("-m", "mambainllama", "run", tmp_path / "plan.json", "--out", tmp_path / "out")
    assert done.returncode == 0 and (tmp_path / "out" / "report.html").exists(), done.stdout
    assert mil.load(tmp_path / "out" / "3-distill" / "model").layer_kinds == ["mamba2"] * 3 + ["attention"]
    mil.answer(mil.load(recipe_folder / "teacher"), recipe_folder / "chats.jsonl", tmp_path / "answers.jsonl", max_new_tokens=8)
    ours, theirs = (sorted(open(path)) for path in (tmp_path / "out" / "1-answer" / "answers.jsonl", tmp_path / "answers.jsonl"))
    assert ours == theirs


def test_an_error_of_one_rank_is_every_rank_s(tmp_path):
    done = mpirun("-c", "import sys, mambainllama.parallel as p\nr = p.ranks()\ntry:\n  with r.job():\n    if r.rank: raise OSError('full')\n    r.every(1)\n"
                        "except OSError as e: print(f'{e}; ', end='')")
    assert sorted(done.stdout.split("; ")) == ["", "full", "rank 1: full"] and done.returncode == 0


def test_without_mpi4py_it_is_named(tmp_path):
    code = "import sys; sys.modules['mpi4py'] = None; from mambainllama.cli import main; sys.exit(main(['info', 'x']))"
    for rank in ("0", "1"):
        env = {**os.environ, "PMI_RANK": rank, "PMI_SIZE": "2", "PYTHONPATH": str(Path(mil.__file__).parents[1])}
        done = subprocess.run([sys.executable, "-P", "-c", code], env=env, capture_output=True, text=True)
        assert done.returncode == 2 and ("pip install 'mambainllama[mpi]'" in done.stderr) == (rank == "0") and "Traceback" not in done.stderr


if __name__ == "__main__":
    held = {}
    for name in sys.argv[2:]:
        model = (RUNS | OTHERS)[name](Path(sys.argv[1]) / name)
        held[name] = ranks().every(model and sum(m.size for m, _, _ in model.moments().values()))
    if ranks().first:
        print(json.dumps(held))
