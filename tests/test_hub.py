"""The hub, played by a folder: models by name, and what is uploaded."""
import json
import shutil
import sys
import types
from fnmatch import fnmatch
from pathlib import Path

import mambainllama as mil
import numpy as np
import pytest
import yaml
from mambainllama.cli import main
from mambainllama.hub import fetch

DATA = Path(__file__).parent / "data"


class Hub(types.ModuleType):
    """What huggingface_hub is asked for; repositories are folders, and each call is noted."""

    def __init__(self, place):
        super().__init__("huggingface_hub")
        self.place, self.calls, self.HfApi = place, [], lambda: self

    def snapshot_download(self, repo, revision=None, allow_patterns=None, ignore_patterns=None):
        self.calls.append((repo, revision, tuple(allow_patterns)))
        source, to = self.place / "remote" / repo, self.place / "cache" / repo
        if not source.is_dir():
            raise RuntimeError(f"404 Client Error.\n\nRepository Not Found for {repo}.")
        for file in source.rglob("*"):
            name = str(file.relative_to(source))
            if file.is_file() and any(fnmatch(name, p) for p in allow_patterns) and not any(fnmatch(name, p) for p in ignore_patterns):
                to.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, to / name)
        return str(to)

    def create_repo(self, repo, private, exist_ok):
        if repo.startswith("other/"):
            raise PermissionError("403 Forbidden:\nYou don't have the rights to create a model under the namespace \"other\".")
        (self.place / "remote" / repo).mkdir(parents=True, exist_ok=exist_ok)
        self.calls.append((repo, private))
        return f"https://huggingface.co/{repo}"

    def upload_folder(self, repo_id, folder_path, ignore_patterns, commit_message):
        shutil.copytree(folder_path, self.place / "remote" / repo_id, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*ignore_patterns))

    def upload_file(self, path_or_fileobj, path_in_repo, repo_id, commit_message):
        (self.place / "remote" / repo_id / path_in_repo).write_bytes(path_or_fileobj)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    made = Hub(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", made)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "remote/org").mkdir(parents=True)
    return made


def test_models_by_name(hub, capsys):
    shutil.copytree(DATA / "llama3", hub.place / "remote/org/llama")
    (hub.place / "remote/org/llama/onnx").mkdir()
    for name in ("onnx/model.safetensors", "consolidated.00.pth", "pytorch_model.bin"):
        (hub.place / "remote/org/llama" / name).write_bytes(b"not to be downloaded")
    ids = np.arange(12)[None]
    assert np.array_equal(mil.load("org/llama").logits(ids), mil.load(DATA / "llama3").logits(ids))
    names = {path.name for path in (hub.place / "cache/org/llama").rglob("*")}
    assert names >= {"config.json", "model.safetensors"} and not names & {"onnx", "consolidated.00.pth", "pytorch_model.bin"}
    assert fetch("org/llama@v2", weights=False) and hub.calls[-1][:2] == ("org/llama", "v2") and "*.safetensors" not in hub.calls[-1][2]
    assert main(["convert", "org/llama", "hybrid", "--attention", "0.5"]) == 0 and mil.load("hybrid").layer_kinds.count("mamba2") == 1
    assert main(["info", "org/llama"]) == 0 and "llama" in capsys.readouterr().out
    shutil.copytree(DATA / "mamba2-bin", hub.place / "remote/org/bin")
    assert mil.load("org/bin").layer_kinds == mil.load(DATA / "mamba2-bin").layer_kinds  # no safetensors there
    (hub.place / "org").mkdir()
    shutil.copytree(DATA / "qwen3", "org/llama")  # a folder here goes first
    calls = len(hub.calls)
    assert mil.load("org/llama").config["model_type"] == "qwen3" and len(hub.calls) == calls


def test_what_cannot_be_fetched_is_one_sentence(hub, monkeypatch, capsys):
    with pytest.raises(ValueError, match="org/none is no folder, and the hub's model .* Repository Not Found for org/none") as caught:
        mil.load("org/none")
    assert "\n" not in str(caught.value)
    for name in ("nowhere", "./a/b", "a/b/c", "/a/b", "../a"):
        with pytest.raises(ValueError, match="is not a folder"):
            mil.load(name)
    assert hub.calls == [("org/none", None, hub.calls[0][2])]
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert main(["info", "org/none"]) == 2 and main(["push", str(DATA / "llama3"), "org/a"]) == 2
    assert capsys.readouterr().err.count(r"pip install 'mambainllama[hub]'") == 2


def card_of(hub, repo):
    text = (hub.place / "remote" / repo / "README.md").read_text()
    head = text.split("---\n")[1]
    return yaml.safe_load(head), text


def test_push_of_a_run(hub, capsys):
    shutil.copytree(DATA / "llama3", "remote/org/teacher")
    rows = [{"ids": list(range(3, 40))} for _ in range(4)]
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    plan = {"teacher": "org/teacher", "run": [{"convert": {"attention": 0.5}},
                                              {"distill": {"data": "rows.jsonl", "steps": 2, "length": 16, "batch": 2}},
                                              {"train": {"data": "rows.jsonl", "steps": 1, "length": 16, "batch": 2}}]}
    mil.run(plan, "run")
    for place, kind, scores in [("run/3-train/alpaca", "alpaca", {"win_rate": 12.5, "average": None}), ("needle", "needle", {"needle": 0.5})]:
        Path(place).mkdir()
        Path(place, "results.json").write_text(json.dumps({"kind": kind, "model": "student", "judge": "a judge", "scores": scores}))
    with pytest.raises(ValueError, match="rows.jsonl"):
        mil.push("run", "org/student", evaluations=["rows.jsonl"])
    assert main(["push", "run", "org/student", "--evaluation", "needle"]) == 0 and capsys.readouterr().out.strip().endswith("https://huggingface.co/org/student")
    head, text = card_of(hub, "org/student")
    assert head["base_model"] == "org/teacher" and head["library_name"] == "mambainllama"
    for part in ("1 attention (1)", "| 2-distill | 1 | 2 |", "| 3-train | 1 | 1 |", "kl ", "| alpaca | student | win_rate | 12.5 | a judge |", "| needle | student | needle | 0.5 |", 'mil.load("org/student")', "steps: 2"):
        assert part in text, part
    ids = np.arange(12)[None]
    assert np.array_equal(mil.load("org/student").logits(ids), mil.load("run/3-train/model").logits(ids))
    assert mil.push("run/2-distill/model", "org/first", private=True) and hub.calls[-1] == ("org/first", True)
    assert "2-distill" in card_of(hub, "org/first")[1] and "3-train" not in card_of(hub, "org/first")[1]
    mil.export(mil.convert(mil.load(DATA / "llama-linear-tied-f16"), attention=0.5), "served", "vllm")
    assert mil.push("served", "org/served") and "vllm serve org/served" in card_of(hub, "org/served")[1]
    Path("served/README.md").write_text("mine")
    mil.push("served", "org/served")
    assert (hub.place / "remote/org/served/README.md").read_text() == "mine"


def test_push_refuses_in_one_sentence(hub):
    for folder, repo, match in [("nothing", "org/a", "nothing has no config.json"), (DATA / "llama3", "name", "'name' is no name"),
                                (DATA / "llama3", "other/a", "cannot be uploaded to other/a: 403 Forbidden: You don't have")]:
        with pytest.raises(ValueError, match=match) as caught:
            mil.push(folder, repo)
        assert "\n" not in str(caught.value)
    assert not hub.calls
