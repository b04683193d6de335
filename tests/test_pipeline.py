"""A whole recipe: its parts in order, what a second call does not do again, what a dry run says, and the package's own recipes."""
import json
import subprocess
import sys

import pytest
from test_train import bits

import mambainllama as mil
from mambainllama import tasks
from mambainllama.demo import SIZES
from mambainllama.pipeline import RECIPES, load_plan, read_plan

SMALL = {"length": 64, "batch": 4, "checkpoint_every": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A teacher with a tokenizer, chats and pairs."""
    folder = tmp_path_factory.mktemp("recipe")
    tasks.write_tokenizer(folder / "tokenizer")
    teacher = mil.random(SIZES | {"vocab_size": len(tasks.VOCABULARY)}, seed=3)
    teacher.folder = folder / "tokenizer"
    teacher.tokenizer = mil.load(_saved(teacher, folder / "teacher")).tokenizer
    _saved(teacher, folder / "teacher")
    chats = tasks.rows(40, 5)
    pairs = [{"prompt": row["messages"][:-1], "chosen": [row["messages"][-1]], "rejected": [other["messages"][-1]]}
             for row, other in zip(chats, chats[1:])]
    for name, rows in (("chats", chats), ("pairs", pairs)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def _saved(model, folder):
    mil.save(model, folder)
    return folder


def recipe(folder):
    chats, pairs = str(folder / "chats.jsonl"), str(folder / "pairs.jsonl")
    return {"teacher": str(folder / "teacher"), "run": [
        {"answer": {"data": chats, "max_new_tokens": 8}},
        {"convert": {"attention": 0.5}},
        {"distill": {"stages": [{"steps": 2}, {"mamba_layers": [0, 1, 2], "steps": 2}], **SMALL}},
        {"sft": {"data": chats, "epochs": 0.2, **SMALL}},
        {"dpo": {"data": pairs, "steps": 2, "reference": "teacher", **SMALL}}]}


def test_parts_follow_each_other_and_are_not_run_twice(folder, tmp_path, monkeypatch):
    result = mil.run(recipe(folder), tmp_path)
    answers, conversion, distilled, tuned, aligned = result["parts"]
    assert answers is conversion is None and distilled["steps"] == 4 and aligned["margin"] and tuned["steps"] >= 1
    assert sum(1 for _ in open(tmp_path / "1-answer" / "answers.jsonl")) == 40
    model = mil.load(result["model"])
    assert model.layer_kinds == ["mamba2"] * 3 + ["attention"]
    page = open(result["html"]).read()
    assert "3 distill" in page and "Answers, greedy" in page and page.count("<img") == 1

    def fail(*_, **__):
        raise AssertionError("a finished part ran again")
    monkeypatch.setattr("mambainllama.pipeline._Run.work", fail)
    again = mil.run(recipe(folder), tmp_path)
    assert again["parts"] == result["parts"] and bits(mil.load(again["model"])) == bits(model)
    other = recipe(folder)
    other["run"][3]["sft"]["lr"] = 1e-3
    with pytest.raises(ValueError, match="4-sft holds a part that began with other settings"):
        mil.run(other, tmp_path)


def test_the_same_as_the_calls_one_by_one(folder, tmp_path):
    plan = recipe(folder)
    plan["run"] = [plan["run"][1], plan["run"][3]]
    ours = mil.load(mil.run(plan, tmp_path)["model"])
    student = mil.convert(mil.load(folder / "teacher"), attention=0.5)
    mil.sft(student, folder / "chats.jsonl", {"epochs": 0.2, **SMALL})
    assert bits(ours) == bits(student)


def test_a_part_learns_from_a_cache(folder, tmp_path):
    """Of all tokens, so that it learns what the teacher itself would have taught; the part after the next has the teacher again."""
    part = {"data": str(folder / "chats.jsonl"), "stages": [{"mamba_layers": [0], "steps": 2}], **SMALL}
    plan = {"teacher": str(folder / "teacher"), "run": [{"cache": {"k": len(tasks.VOCABULARY)}}, {"distill": part}, {"distill": {**part, "seed": 1}}]}
    text = mil.run({**plan, "config": None}, dry_run=True)
    assert f"{len(tasks.VOCABULARY)} likeliest" in text
    ours = mil.run(plan, tmp_path / "cached")
    assert ours["parts"][0] is None and (tmp_path / "cached" / "1-cache" / "cache.json").exists() and "cache" not in dict(enumerate(load_plan(plan)["run"]))[2][1]
    theirs = mil.run({**plan, "run": plan["run"][1:]}, tmp_path / "taught")
    for one, other in zip(ours["parts"][1:], theirs["parts"]):
        assert one["kl"] == pytest.approx(other["kl"], rel=1e-4)


def test_killed_between_steps_it_goes_on(folder, tmp_path):
    plan = recipe(folder) | {"out": str(tmp_path / "killed")}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    code = ("import sys, os, mambainllama as mil\nt = sys.modules['mambainllama.train']\n"
            "step, count = t._step, [0]\n"
            "def dies(*a):\n    count[0] += 1\n    return os._exit(9) if count[0] == 4 else step(*a)\n"
            "t._step = dies\nmil.run(sys.argv[1])")
    assert subprocess.run([sys.executable, "-P", "-c", code, tmp_path / "plan.json"]).returncode == 9
    assert (tmp_path / "killed" / "3-distill" / "checkpoint.npz").exists() and not (tmp_path / "killed" / "4-sft").exists()
    a, b = mil.run(tmp_path / "plan.json"), mil.run(recipe(folder), tmp_path / "whole")
    assert bits(mil.load(a["model"])) == bits(mil.load(b["model"]))


def test_a_dry_run_says_what_it_takes_and_writes_nothing(folder, tmp_path):
    text = mil.run(recipe(folder), tmp_path / "none", dry_run=True)
    assert "3 distill" in text and "2 mamba2, 2 attention" in text and "layers 1 are converted" in text and "512 tokens" in text and "MiB" in text
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("name", sorted(path.stem for path in RECIPES.glob("*.yaml")))
def test_own_recipes_describe_themselves(name):
    text = mil.run(name, dry_run=True)
    assert "billion parameters" in text and "hours" in text and "layers 0, " in text
    parts = dict(load_plan(name)["run"])
    assert parts["dpo"]["lr"] == 5e-7 and parts["dpo"]["batch"] * parts["dpo"]["accumulate"] == 32
    if "distill" in parts and "paper-llama3-8b" in name:
        assert parts["distill"]["stages"][0]["warmup"] == 1500 and parts["distill"]["clip"] == 0.1 and parts["distill"]["kl_kind"] == "paper"


@pytest.mark.parametrize("change, says", [
    (lambda r: r.update(techer="x"), "unknown key 'techer'; did you mean 'teacher'"),
    (lambda r: r["run"][2].update(sft={}), "run\\[2\\] must be a mapping of one name"),
    (lambda r: r["run"].append({"distil": {}}), "run\\[5\\]: unknown key 'distil'; did you mean 'distill'"),
    (lambda r: r["run"][3]["sft"].update(learning_rate=1), "run\\[3\\]: sft: unknown key 'learning_rate'"),
    (lambda r: r["run"][4]["dpo"].update(reference="x"), "'start' or 'teacher'"),
    (lambda r: r["run"][0]["answer"].update(top_q=1), "did you mean 'top_p'"),
    (lambda r: r["run"][3]["sft"].update(epochs=0), "epochs must be a number above 0, not 0"),
    (lambda r: r.update(run=[{"sft": {"steps": 1}}]), "sft names no data"),
    (lambda r: r["run"].append({"cache": {"k": 8}}), "run\\[5\\]: cache: no distill part comes after it"),
    (lambda r: r["run"].insert(0, {"cache": {"length": 8}}), "unknown key 'length'"),
    (lambda r: r["run"].insert(2, {"cache": {}}) or r["run"][3]["distill"]["stages"][0].update(align="hidden"), "run\\[2\\]: cache: .* has align"),
    (lambda r: r["run"].insert(0, {"cache": {"k": 0}}), "run\\[0\\]: cache: the distill part after it learns from answers that come after the cache"),
    (lambda r: r["run"].insert(1, {"cache": {"k": "8"}}), "run\\[1\\]: cache: k must be an integer from 1 up, not '8'"),
    (lambda r: (r["run"][2]["distill"]["stages"][1].update(temperature=2), r["run"].insert(1, {"cache": {}})), "temperatures \\[1.0, 2.0\\], and a cache is of one"),
    (lambda r: r["run"].__setitem__(slice(1, 1), [{"cache": {}}] * 2), "run\\[2\\]: cache: the distill part after it has a cache already"),
    (lambda r: r.pop("teacher"), "names no teacher"),
])
def test_a_bad_recipe_is_one_sentence(folder, tmp_path, change, says):
    plan = recipe(folder)
    change(plan)
    with pytest.raises(ValueError, match=says) as error:
        mil.run(plan, tmp_path / "out")
    assert "\n" not in str(error.value)


def test_an_unknown_name_lists_the_package_s_own():
    with pytest.raises(ValueError, match="paper-llama3-8b-mamba2-half"):
        read_plan("papr")


def test_the_command(folder):
    call = [sys.executable, "-P", "-m", "mambainllama", "run", "paper-llama3-8b-mamba2-half", "--dry-run", "--set", "distill.data=x.jsonl"]
    done = subprocess.run(call, capture_output=True, text=True)
    assert done.returncode == 0 and "x.jsonl" in done.stdout
    wrong = subprocess.run([*call, "--set", "distil.data=x"], capture_output=True, text=True)
    assert wrong.returncode == 2 and "no part 'distil'" in wrong.stderr and "Traceback" not in wrong.stderr
