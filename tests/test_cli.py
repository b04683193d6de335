"""The command line, as a person meets it: what it prints, what it refuses, and with which exit code."""
import json
import math
import os
import signal
import subprocess
import sys
import types

import pytest

import mambainllama as mil
from mambainllama.cli import main
from test_generate import config, spoken  # noqa: F401 (a fixture)

COMMANDS = ["demo", "convert", "plan", "distill", "train", "generate", "chat", "serve", "info"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, spoken):  # noqa: F811
    """A small transformer folder with the bytes as its tokenizer."""
    folder = tmp_path_factory.mktemp("teacher")
    model = mil.random(config("transformer"), seed=1)
    mil.save(model, str(folder))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes(open(os.path.join(spoken.folder, name), "rb").read())
    return str(folder)


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "chats.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"the {n} of {n + 1}"}) for n in range(20)))
    return str(path)


def run(capsys, *args):
    """(exit code, stdout, stderr) of one command."""
    code = main([str(a) for a in args])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples(capsys, command):
    code, out, _ = run(capsys, command, "--help")
    assert code == 0 and "examples:" in out and f"mambainllama {command}" in out.split("examples:")[1]


def test_help_lists_the_commands(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0 and all(command in out for command in COMMANDS)


@pytest.mark.parametrize("args", [
    [], ["fly"], ["generate"], ["generate", "/nowhere", "hello"], ["info", "/nowhere"], ["convert", "/nowhere", "out"],
    ["convert", "/nowhere", "out", "--attention", "0.5"], ["convert", "x", "y", "--mamba-layers", "0,a"],
    ["convert", "x", "y", "--attention", "0.5", "--mamba-layers", "1"], ["distill", "x", "y", "--out", "z", "--set", "stepz=1"],
    ["distill", "x", "y", "--out", "z", "--set", "steps"], ["train", "/nowhere.json", "y", "--out", "z", "--set", "steps=1"],
    ["distill", "x", "y", "--out", "z", "--recipe", "/nowhere.yaml"], ["chat", "/nowhere"], ["info", "/etc", "--device", "tpu"],
    ["generate", "x", "--top", "1"], ["generate", "x", "--nonsense", "1"], ["info", "x", "y"],
    ["generate", "x", "a", "--file", "b"], ["generate", "x", "--ids", "a"], ["generate", "x", "--file", "/nowhere"],
    ["demo", "--out", os.devnull], ["demo", "--out", "/proc/demo"],
])
def test_bad_input_is_one_sentence_and_exit_code_2(capsys, args):
    code, out, err = run(capsys, *args)
    assert code == 2 and out == "" and err.startswith("mambainllama") and err.count("\n") == 1 and len(err) > 30


@pytest.mark.parametrize("args, says", [
    (["--set", "stepz=1"], "steps"), (["--top-p", "2"], "top_p"), (["--lookahead", "99"], "lookahead"),
    (["--set", "steps=1"], "--student"), (["--set", "run=[]"], "mambainllama run"), (["--bogus"], "mambainllama generate: unrecognized arguments: --bogus ("),
])
def test_the_sentence_names_the_culprit(capsys, teacher, chats, args, says):
    command = ["distill", teacher, chats, "--out", "/tmp/never"] if args[0] == "--set" else ["generate", teacher, "x"]
    code, _, err = run(capsys, *command, *args)
    assert code == 2 and says in err


@pytest.mark.parametrize("args, says", [
    (["generate", "x", "--file", "/etc"], "--file /etc cannot be read: Is a directory"), (["info", "x", "--dtype", "float32"], "--dtype"),
    (["convert", "x", "", "--attention", "0.5"], "no folder to write to"), (["train", "x", "y", "--out", ""], "no folder to write to"),
])
def test_refused_before_a_model_is_looked_for(capsys, args, says):
    code, _, err = run(capsys, *args)
    assert code == 2 and says in err


@pytest.mark.parametrize("content, says", [(b"", "there is no prompt"), (b"a\nb\xff", "utf-8")])
def test_a_file_without_prompts_is_named(capsys, tmp_path, content, says):
    (tmp_path / "prompts").write_bytes(content)
    code, _, err = run(capsys, "generate", "/nowhere", "--file", tmp_path / "prompts")
    assert code == 2 and f"--file {tmp_path}/prompts" in err and says in err


def test_generate(capsys, teacher):
    code, out, err = run(capsys, "generate", teacher, "hello", "--max-new-tokens", 8)
    expected = mil.generate(mil.load(teacher), "hello", max_new_tokens=8)[0]
    assert code == 0 and out == expected.text + "\n" and "8 tokens" in err and "tokens/s" in err
    code, out, err = run(capsys, "generate", teacher, "hello", "--max-new-tokens", 8, "--draft", teacher)
    assert out == expected.text + "\n" and "100% of drafts accepted" in err


def test_generate_as_json_from_a_file(capsys, teacher, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one\ntwo\n")
    how = ["--max-new-tokens", 5, "--temperature", 1, "--seed", 4, "--top-k", 50, "--json"]
    code, out, _ = run(capsys, "generate", teacher, "--file", prompts, *how)
    expected = mil.generate(mil.load(teacher), ["one", "two"], max_new_tokens=5, temperature=1, seed=4, top_k=50)
    assert [json.loads(line) for line in out.splitlines()] == [
        {"text": row.text, "tokens": row.tokens, "finish": row.finish} for row in expected]
    _, chat, _ = run(capsys, "generate", teacher, "one", "--chat", *how)
    message = [{"role": "user", "content": "one"}]
    assert json.loads(chat)["tokens"] == mil.generate(mil.load(teacher), message, max_new_tokens=5, temperature=1, seed=4,
                                                      top_k=50)[0].tokens
    _, ids, _ = run(capsys, "generate", teacher, "--ids", "3 1 2", *how)
    assert json.loads(ids)["tokens"] == mil.generate(mil.load(teacher), [3, 1, 2], max_new_tokens=5, temperature=1, seed=4,
                                                     top_k=50)[0].tokens


def test_convert_then_info(capsys, teacher, tmp_path):
    hybrid = str(tmp_path / "hybrid")
    code, _, err = run(capsys, "convert", teacher, hybrid, "--mamba-layers", "0", "--mixer", "mamba1")
    assert code == 0 and "1 mamba1" in err
    assert mil.load(hybrid).layer_kinds == ["mamba1", "attention"]
    code, out, _ = run(capsys, "info", hybrid, "--json")
    report = json.loads(out)
    model = mil.load(hybrid)
    assert report["layers"] == {"mamba1": [0], "attention": [1]}
    assert report["parameters"] == sum(math.prod(shape) for shape in model.names.values())
    assert report["kv_bytes_per_token"] == 2 * 32 * 4
    assert sum(report["bytes"].values()) == 4 * report["parameters"] and list(report["bytes"]) == ["F32"]
    code, out, _ = run(capsys, "info", hybrid)
    assert code == 0 and "mamba1" in out and "tokenizer" in out


def test_distill_and_train(capsys, teacher, chats, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("stages:\n  - {mamba_layers: [1], steps: 2}\nlength: 16\nbatch: 2\nlr: 1.0e-3\n")
    out = tmp_path / "run"
    code, _, err = run(capsys, "distill", teacher, chats, "--out", out, "--recipe", recipe, "--set", "batch=1",
                       "--set", "mixer=mamba1")
    assert code == 0, err
    student = mil.load(str(out / "model"))
    assert student.layer_kinds == ["attention", "mamba1"] and student.tokenizer is not None
    config_file = tmp_path / "config.json"
    config_file.write_text(json.dumps(config("pure2")))
    code, _, err = run(capsys, "train", config_file, chats, "--tokenizer", teacher, "--out", tmp_path / "train",
                       "--set", "steps=2", "--set", "length=16", "--set", "batch=2")
    assert code == 0, err
    assert mil.load(str(tmp_path / "train" / "model")).layer_kinds == ["mamba2", "mamba2"]


def test_cache_and_distill_from_it(capsys, teacher, chats, tmp_path):
    answers, out = tmp_path / "answers", tmp_path / "run"
    code, _, err = run(capsys, "cache", teacher, "--data", chats, "--out", answers, "--k", 4, "--length", 16, "--batch", 2)
    assert code == 0 and "36 bytes" in err and "bias" in err and (answers / "ids.npy").exists()
    how = ["--out", out, "--cache", answers, "--set", "steps=2", "--set", "length=16", "--set", "batch=2", "--set", "mixer=mamba2"]
    code, _, err = run(capsys, "distill", teacher, chats, *how)
    assert code == 0 and "after 2 steps" in err
    for more, says in ((["--set", "length=8"], "length is 8"), (["--student", teacher], "--student")):
        code, _, err = run(capsys, "distill", teacher, chats, *how, *more)
        assert code == 2 and says in err and err.count("\n") == 1


def command(*args, **how):
    return subprocess.Popen([sys.executable, "-P", "-m", "mambainllama", *map(str, args)], text=True, stdin=subprocess.PIPE,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **how)


def test_chat(teacher):
    with command("chat", teacher, "--max-new-tokens", 6, "--draft", teacher) as process:
        out, err = process.communicate("hello\n\n/new\nagain\n", timeout=60)
    assert process.returncode == 0 and out.count("> ") >= 4
    assert err.count("tokens/s") == 2 and "accepted" in err and "Traceback" not in err


def test_interrupt_is_130_and_a_reader_that_leaves_is_no_error(teacher):
    with command("chat", teacher) as process:
        process.stdout.read(2)  # the prompt is up
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err
    with command("generate", teacher, "x", "--json", "--max-new-tokens", 2) as process:
        process.stdout.close()
        err = process.stderr.read()
        assert process.wait(60) == 0 and "Traceback" not in err


def test_ctrl_c_at_the_start(capsys, monkeypatch):
    def press():
        raise KeyboardInterrupt
    monkeypatch.setattr("mambainllama.cli._parser", press)
    assert run(capsys, "--help") == (130, "", "mambainllama: interrupted\n")


def test_the_demo_without_its_device_leaves_no_folder(capsys, monkeypatch, tmp_path):
    def missing(device, dtype=None):
        raise ValueError(f"device {device!r} needs the extension module _cuda, which is not here")
    monkeypatch.setattr("mambainllama.backend.module", missing)
    code, out, err = run(capsys, "demo", "--device", "cuda", "--out", tmp_path / "demo")
    assert code == 2 and "'cuda'" in err and out == "" and not (tmp_path / "demo").exists()


def test_demo_calls_the_demo(capsys, monkeypatch):
    seen = {}
    stand_in = types.ModuleType("mambainllama.demo")
    stand_in.demo = lambda **how: seen.update(how)
    monkeypatch.setitem(sys.modules, stand_in.__name__, stand_in)
    assert run(capsys, "demo", "--out", "x", "--seed", 3)[0] == 0
    assert seen == {"out": "x", "device": "cpu", "seed": 3}
