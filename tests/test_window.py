"""Window and identity layers: what a conversion makes of a teacher, what files and the command line know of them, what they keep."""
import importlib
import json

import numpy as np
import pytest
from test_model import HYBRIDS, config, tokens
from test_train import CONFIG, bits, rows

import mambainllama as mil
from mambainllama.cli import main

TEACHERS = {"llama": config(None, None), "biases": config(None, None, attention_bias=True, tie_word_embeddings=True),
            "qwen3": config(None, None, architectures=["Qwen3ForCausalLM"], model_type="qwen3")}


@pytest.mark.parametrize("name", TEACHERS)
@pytest.mark.parametrize("init", ["calibrated", "random"])
def test_a_window_starts_as_the_attention(name, init, device):
    """Every bit of every parameter, and of the logits as far as the window and the sinks reach: one forward, and decoding."""
    teacher = mil.random(TEACHERS[name], seed=1, **device.how)
    student = mil.convert(teacher, [0, 2], "window", window=20, sinks=3, init=init)  # init is Mamba's
    assert student.layer_kinds == ["window", "attention"] * 2 and bits(student) == bits(teacher)
    ids = tokens(2, 40)
    ours, theirs = student.logits(ids), teacher.logits(ids)
    assert np.array_equal(student.logits(ids[:, :20]), teacher.logits(ids[:, :20])) and np.isfinite(ours).all()
    if device.name == "cpu":
        assert np.array_equal(ours[:, :23], theirs[:, :23])
    assert not np.allclose(ours[:, 24], theirs[:, 24], rtol=1e-3)
    states = [mil.State(model, 2, 40) for model in (student, teacher)]
    for T in (10, 1, 1, 5, 1, 2):
        at = states[0].pos[0]
        got = [model.logits(ids[:, at : at + T], state) for model, state in zip((student, teacher), states)]
        assert np.array_equal(*got), f"{T} tokens from {at} on"


def test_what_is_trained_is_the_students_own():
    teacher = mil.random(TEACHERS["llama"], seed=1)
    before, student = bits(teacher), mil.convert(teacher, [1], "window")
    student.trainable(["*layers.1.self_attn*"])
    student.loss(tokens(2, 30), tokens(2, 30, 1), backward=True)
    student.step(1e-2)
    assert bits(teacher) == before
    assert {name for name, value in bits(student).items() if value != before[name]} == {name for name in before if "layers.1.self_attn" in name}


def test_an_identity_is_attention_that_is_switched_off(device):
    teacher = mil.random(TEACHERS["biases"], seed=1, **device.how)
    student = mil.convert(teacher, [1, 2], "identity")
    assert student.layer_kinds == ["attention", "identity", "identity", "attention"] and not any("layers.1.self_attn" in name for name in student.names)
    for layer in (1, 2):
        for part in ("weight", "bias"):
            name = f"model.layers.{layer}.self_attn.o_proj.{part}"
            teacher.set(name, np.zeros(teacher.names[name], np.float32))
    ids = tokens(2, 40)
    assert np.array_equal(student.logits(ids), teacher.logits(ids))
    states = [mil.State(model, 2, 40) for model in (student, teacher)]
    for T in (33, 1, 4):
        at = states[0].pos[0]
        assert np.array_equal(*(model.logits(ids[:, at : at + T], state) for model, state in zip((student, teacher), states)))


@pytest.mark.parametrize("start", [0, 43])
def test_a_branch_is_accepted(start, device):
    """What is accepted of a tree in an empty state are the sinks of all that follows; later the cache has come round (38 entries)."""
    model = mil.convert(mil.random(TEACHERS["llama"], seed=1, **device.how), [0, 2], "window", window=4, sinks=2)
    tree, prev = np.array([[3, 9, 4, 8, 5, 2]], np.int32), np.array([[-1, -1, 0, 1, 2, 3]], np.int32)
    state, line, ids = mil.State(model, 1, 120), mil.State(model, 1, 120), tokens(1, 50)
    for s in (state, line) if start else ():
        model.logits(ids[:, :start], s, last=0)
    z = model.logits(tree, state, keep=0, prev=prev)
    assert np.array_equal(z[:, 1::2], model.logits(tree[:, 1::2], line))
    state.commit([3], path=[[1, 3, 5]])
    assert np.array_equal(*(np.concatenate([model.logits(part, s) for part in (ids[:, :3], ids)], 1) for s in (state, line)))


def test_memory_is_bounded_and_told(tmp_path):
    """The capacity does not matter once it holds sinks, window and pending tokens; a smaller one than the sinks is enough for itself."""
    model = mil.convert(mil.convert(mil.random(TEACHERS["llama"]), [0, 3], "window", window=9, sinks=3), [1], "identity")
    sizes = [[a.nbytes for a in mil.State(model, 1, capacity).c.dump()[:-3]] for capacity in (44, 1000)]
    row = 2 * 16 * 4
    assert sizes == [[44 * row] * 6, [44 * row] * 2 + [1000 * row] * 2 + [44 * row] * 2]
    tiny, ids = mil.State(model, 1, 2), tokens(1, 2)
    steps = np.concatenate([model.logits(ids[:, t : t + 1], tiny) for t in range(2)], 1)
    np.testing.assert_allclose(steps, model.logits(ids), rtol=1e-4, atol=1e-5)
    mil.save(model, tmp_path)
    report = importlib.import_module("mambainllama.info").describe(tmp_path)
    assert report["layers"] == {"window": [0, 3], "identity": [1], "attention": [2]} and (report["windows"], report["sinks"]) == ([9, 9], 3)
    assert (report["kv_bytes_per_token"], report["state_bytes_per_sequence"], report["window"]) == (2 * row, 2 * 2 * 12 * row, None)


@pytest.mark.parametrize("source", ["random", "converted"])
def test_files(source, tmp_path):
    model = mil.random(HYBRIDS["windows with sinks, identity"], seed=1)
    if source == "converted":
        model = mil.random({key: value for key, value in HYBRIDS["windows with sinks, identity"].items() if key != "mamba"}, seed=1)
        model = mil.convert(mil.convert(model, [0], "window", window=9, sinks=3), [2], "identity")
        model = mil.convert(model, [3], "window", window=13)  # of a model with sinks: as many
    mil.save(model, tmp_path)
    again = mil.load(tmp_path)
    assert again.layer_kinds == model.layer_kinds == ["window", "attention", "identity", "window"]
    assert again.c.windows() == model.c.windows() == ([9, 0, 0, 13], 3) and bits(again) == bits(model)
    assert again.mamba_config == model.mamba_config == json.loads((tmp_path / "mamba_config.json").read_text())
    assert np.array_equal(again.logits(tokens(2, 50)), model.logits(tokens(2, 50)))
    with pytest.raises(ValueError, match="sinks is 4, and the model has window layers with 3"):
        mil.convert(again, [1], "window", sinks=4)


@pytest.mark.parametrize("how, sentence", [
    (dict(mixer="windows"), "expected one of 'mamba1', 'mamba2', 'window', 'identity'"), (dict(mixer="window", window=0), "window is 0"),
    (dict(mixer="window", window=2.5), "window is 2.5"), (dict(mixer="window", window=True), "window is True"), (dict(mixer="window", sinks=-1), "sinks is -1"),
    (dict(mixer="window", sinks=1 << 40), "sinks"), (dict(window=5), "go with mixer 'window', not with 'mamba2'"), (dict(mixer="identity", sinks=0), "go with")])
def test_bad_input_is_a_sentence(how, sentence):
    with pytest.raises(ValueError, match=sentence):
        mil.convert(mil.random(TEACHERS["llama"]), [0], **how)


def test_the_gate_and_ablation_know_them():
    model = mil.convert(mil.convert(mil.random(CONFIG, seed=1), [0], "window", window=5, sinks=1), [2], "identity")
    got = mil.ablate(model, rows(3), length=24, batch=4)
    assert got["without_mamba"] is None and got["without_attention"] == got["layers"][1] and got["without_window"] == got["layers"][0]
    assert got["layers"][2] == got["whole"] and len({got["whole"], *got["layers"][:2]}) == 3
    assert mil.parity(model, mil.random(CONFIG, seed=1), tokens(1, 9) % 40) == {}


@pytest.mark.parametrize("mixer", ["window", "identity"])
def test_a_recipe_converts_to_them(mixer, tmp_path):
    """A run that went on has the bits of one that did not stop."""
    teacher = mil.random(CONFIG, seed=1)
    seen = {"window": 9, "sinks": 2} if mixer == "window" else {}
    recipe = {"stages": [{"mamba_layers": [0], "steps": 2, "mixer": mixer, **seen}, {"mamba_layers": [0, 1], "steps": 2}], "length": 24, "batch": 2,
              "checkpoint_every": 3, "lr": 1e-3}
    student = mil.convert(teacher, mamba_layers=[])
    mil.distill(student, teacher, rows(1), recipe, out=tmp_path / "run")
    assert student.layer_kinds == [mixer, mixer, "attention"] and student.c.windows() == (([9, 9, 0], 2) if seen else ([0, 0, 0], 0))
    (tmp_path / "run" / "report.json").unlink()
    again = mil.convert(teacher, mamba_layers=[])
    mil.distill(again, teacher, rows(1), recipe, out=tmp_path / "run")
    assert again.layer_kinds == student.layer_kinds and bits(again) == bits(student) and again.c.windows() == student.c.windows()


def test_alignment_sees_what_an_identity_lacks(device):
    """Its error is all that the teacher's mixer adds; behind it the MLP learns, and with its norm frozen nothing is asked of the mixer."""
    teacher, ids = mil.random(TEACHERS["llama"], seed=1, **device.how), tokens(2, 20)
    student = mil.convert(teacher, [1], "identity")
    added = teacher.hidden(ids, [1], mid=True) - teacher.hidden(ids, [1])
    np.testing.assert_allclose(student.align(ids, teacher, layers=[1]), np.square(added).sum(-1), rtol=1e-3 if device.name != "cuda" else 0.1)
    student.trainable(["*layers.1.mlp*"])
    student.align(ids, teacher, "hidden", layers=[1], weights=np.ones(1, np.float32), backward=True)
    assert np.linalg.norm(student.grad("model.layers.1.mlp.down_proj.weight")) > 0


def test_a_run_converts_to_a_window():
    config = {**TEACHERS["llama"], "architectures": ["LlamaForCausalLM"]}
    plan = {"teacher": "nowhere", "config": config, "run": [{"convert": {"attention": 0.5, "mixer": "window", "window": 5, "sinks": 1}},
                                                            {"distill": {"data": "x.jsonl", "steps": 3}}]}
    assert mil.run(plan, dry_run=True).count("2 window") == 2


def test_the_command_line(tmp_path, capsys):
    mil.save(mil.random(TEACHERS["llama"], seed=1), tmp_path / "teacher")
    folder = str(tmp_path / "hybrid")
    convert = ["convert", str(tmp_path / "teacher"), folder, "--attention", "0.5", "--mixer"]
    assert main([*convert, "window", "--window", "7", "--sinks", "2"]) == 0 and "2 window" in capsys.readouterr().err
    assert mil.load(folder).c.windows() == ([7, 0, 7, 0], 2)
    assert main(["info", folder]) == 0 and "2 window (0, 2); 2 attention (1, 3); windows of 7 tokens and 2 sinks" in capsys.readouterr().out
    assert main([*convert, "identity"]) == 0 and mil.load(folder).layer_kinds == ["identity", "attention"] * 2
    for wrong in (["window", "--window", "0"], ["mamba2", "--sinks", "3"]):
        capsys.readouterr()
        assert main([*convert, *wrong]) == 2 and capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("stages, says", [
    ([{"mamba_layers": [0], "steps": 1}, {"mamba_layers": [0, 1], "steps": 1, "window": 5}], "stages\\[1\\]: window and sinks go with mixer 'window', not with 'mamba2'"),
    ([{"mamba_layers": [0], "steps": 1, "mixer": "window"}, {"mamba_layers": [0, 1], "steps": 1, "sinks": 3}], "stages\\[1\\]: sinks is 3, and the window layers before it have 4"),
])
def test_a_stage_to_come_is_refused_at_the_start(stages, says):
    teacher = mil.random(CONFIG, seed=1)
    student = mil.convert(teacher, [])
    with pytest.raises(ValueError, match=says):
        mil.distill(student, teacher, rows(1, 4), {"stages": stages, "length": 16, "batch": 2})
    assert student.layer_kinds == teacher.layer_kinds


def test_what_is_over_leaves_nothing_behind_even_nan(device):
    """A sequence before a reset, and tokens that were rejected when the window's entries had taken turns."""
    model = mil.random(HYBRIDS["windows with sinks, identity"], seed=1, **device.how)
    bad, embeddings = 60, model.get("model.embed_tokens.weight")
    embeddings[bad] = np.inf
    model.set("model.embed_tokens.weight", embeddings)
    used, fresh, ids = mil.State(model, 2, 70), mil.State(model, 2, 70), tokens(2, 70) % bad
    assert np.isnan(model.logits(np.full((2, 70), bad), used, last=1)).all()
    used.copy(1, 0)
    used.reset()
    for at in range(0, 64, 8):
        model.logits(np.full((2, 5), bad), used, keep=0)
        got, want = (model.logits(ids[:, at : at + 8], state) for state in (used, fresh))
        assert np.isfinite(want).all() and np.array_equal(got, want), at
