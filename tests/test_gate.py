"""The parity gate: what it lets through, what it catches, and that it leaves the models alone."""
import importlib

import numpy as np
import pytest
from test_model import config, tokens

import mambainllama as mil

gate = importlib.import_module("mambainllama.convert")
SHAPES = [(heads, kv, head_dim) for heads, kv in ((4, 4), (4, 2), (4, 1), (8, 1), (6, 3)) for head_dim in (16, 32, 64)]
ODD = [(4, 2, 6), (3, 1, 20), (4, 2, 8)]


def teacher(heads=4, kv=2, head_dim=16, layers=3, seed=1, device="cpu", dtype=None, **changes):
    sizes = dict(num_attention_heads=heads, num_key_value_heads=kv, head_dim=head_dim)
    model = mil.random(config(None, None, layers, **sizes, **changes), seed, device, dtype)
    rng = np.random.default_rng(seed)
    for name in model.names:
        if "norm" in name or "bias" in name:
            model.set(name, model.get(name) + 0.2 * rng.standard_normal(model.names[name]).astype(np.float32))
    return model


def bits(model):
    return {name: model.raw(name).tobytes() for name in model.names}


@pytest.mark.parametrize("heads, kv, head_dim", SHAPES + ODD)
@pytest.mark.parametrize("mixer", ["mamba1", "mamba2"])
def test_a_conversion_passes(mixer, heads, kv, head_dim):
    source = teacher(heads, kv, head_dim)
    if mixer == "mamba1" and kv * head_dim % 16:
        with pytest.raises(ValueError, match="blocks of 16"):
            mil.convert(source, [0, 2], mixer)
        return
    student = mil.convert(source, [0, 2], mixer, check=False)
    before = bits(source), bits(student)
    report = mil.parity(student, source, tokens(2, 21))
    assert list(report) == [0, 2] and max(report.values()) < 1e-5
    assert (bits(source), bits(student)) == before


@pytest.mark.parametrize("changes", [
    dict(architectures=["Qwen2ForCausalLM"], model_type="qwen2"), dict(architectures=["Qwen3ForCausalLM"], model_type="qwen3"),
    dict(attention_bias=True, mlp_bias=True, tie_word_embeddings=True), dict(initializer_range=1e-3),
    dict(initializer_range=3.0)])
def test_biases_norms_and_scales_do_not_matter(changes):
    for mixer in ("mamba1", "mamba2"):
        source = teacher(**changes)
        assert max(mil.parity(mil.convert(source, [1], mixer, "identity"), source, tokens(1, 40)).values()) < 1e-5


def test_weights_in_bf16_on_each_device(device):
    source = teacher(**device.how | {"dtype": "bfloat16" if device.name != "cuda32" else "float32"})
    student = mil.convert(mil.convert(source, [1], "mamba1"), [0], "mamba2")
    report = mil.parity(student, source, tokens(2, 9))
    assert list(report) == [0, 1] and max(report.values()) < 1e-5


def test_a_swapped_pair_is_seen_in_a_head_of_128():
    source = teacher(4, 2, 128, 1, hidden_size=512, initializer_range=0.02)
    student = mil.convert(source, [0])
    assert mil.parity(student, source, tokens(1, 16))[0] < 1e-5
    swap(student, "model.layers.0.mamba.in_proj.weight", 512 + 2 * 256, 512 + 2 * 256 + 1)
    with pytest.raises(ValueError, match="layer 0 "):
        mil.parity(student, source, tokens(1, 16))


def swap(model, name, i, j, rows=1):
    """Exchanges rows i … and j … of a matrix (of the heads of out_proj: columns)."""
    w = model.get(name)
    view = w.T if "out_proj" in name else w
    view[i:i + rows], view[j:j + rows] = view[j:j + rows].copy(), view[i:i + rows].copy()
    model.set(name, w)


HARM = {  # of 4 heads of 16, all with K and V of their own: D = E = 64, Mamba-2's rows are z x B C dt
    "two rows of v": (("mamba2", "in_proj", 64, 65, 1), ("mamba1", "in_proj_x", 0, 1, 1)),
    "two rows of k": (("mamba2", "in_proj", 128, 191, 1), ("mamba1", "B_proj", 0, 63, 1)),
    "two rows of q": (("mamba2", "in_proj", 192, 193, 1), ("mamba1", "C_proj", 0, 1, 1)),
    "two columns of o": (("mamba2", "out_proj", 3, 40, 1), ("mamba1", "out_proj", 3, 40, 1)),
    "two heads of q": (("mamba2", "in_proj", 192, 208, 16), ("mamba1", "C_proj", 0, 16, 16)),
    "k and q": (("mamba2", "in_proj", 128, 192, 64),), "v and k": (("mamba2", "in_proj", 64, 128, 64),),
}


@pytest.mark.parametrize("harm", HARM)
def test_a_harmed_layer_is_named(harm):
    for mixer, name, i, j, rows in HARM[harm]:
        source = teacher(kv=4)
        student = mil.convert(source, [0, 1, 2], mixer)
        swap(student, f"model.layers.1.mamba.{name}.weight", i, j, rows)
        with pytest.raises(ValueError, match="layer 1 "):
            mil.parity(student, source, tokens(1, 12))
        assert list(mil.parity(student, source, tokens(1, 12), layers=[0, 2])) == [0, 2]


@pytest.mark.parametrize("a, b", [("B_proj", "C_proj"), ("in_proj_x", "B_proj")])
def test_exchanged_matrices_of_mamba1_are_seen(a, b):
    source = teacher(kv=4)
    student = mil.convert(source, [0, 1, 2], "mamba1")
    names = [f"model.layers.2.mamba.{name}.weight" for name in (a, b)]
    values = [student.get(name) for name in names]
    for name, value in zip(names, values[::-1]):
        student.set(name, value)
    with pytest.raises(ValueError, match="layer 2 "):
        mil.parity(student, source, tokens(1, 12))


@pytest.mark.parametrize("mixer, name, at", [("mamba2", "in_proj", 192), ("mamba1", "B_proj", 0)])
def test_exchanged_kv_heads_are_seen(mixer, name, at):
    """As if query heads read each other's group."""
    source = teacher(4, 2, 32)
    student = mil.convert(source, [0, 1], mixer)
    swap(student, f"model.layers.1.mamba.{name}.weight", at, at + 32, 32)
    with pytest.raises(ValueError, match="layer 1 "):
        mil.parity(student, source, tokens(1, 12))


def test_a_fresh_layer_does_not_pass_and_nan_does_not():
    source = teacher()
    with pytest.raises(ValueError, match="layer 1 "):
        mil.parity(mil.convert(source, [1], init="random"), source, tokens(1, 12))
    student, name = mil.convert(source, [1]), "model.layers.1.mamba.out_proj.weight"
    student.set(name, np.full(student.names[name], np.nan, np.float32))
    with pytest.raises(ValueError, match="layer 1 "):
        mil.parity(student, source, tokens(1, 12))


def test_every_conversion_runs_it(monkeypatch):
    source, seen = teacher(layers=4), []

    def spy(student, teacher, ids, layers):
        seen.append((teacher.layer_kinds, ids.shape, list(layers)))

    monkeypatch.setattr(gate, "parity", spy)
    for init in ("attention", "identity", "random"):
        mil.convert(source, [0, 2], init=init)
    mil.convert(source, [1], check=False)
    mil.convert(source, [])
    assert seen == [(["attention"] * 4, (1, gate.CHECKED_TOKENS), [0, 2])] * 2
    monkeypatch.setattr(gate, "CHECKED_WEIGHTS", 1)  # a large model: one layer
    mil.convert(source, [0, 1, 3])
    assert seen[-1][2] == [1]


def test_a_conversion_that_fails_it_leaves_the_student_alone(monkeypatch):
    student = mil.convert(teacher(), [])
    before = bits(student)

    def broken(model, prefix, ids, layers):
        raise ValueError("parity: layer 1")

    monkeypatch.setattr(gate, "parity", broken)
    with pytest.raises(ValueError, match="layer 1"):
        gate.convert_layers(student, [1])
    assert student.layer_kinds == ["attention"] * 3 and bits(student) == before


def test_what_cannot_be_compared_is_refused():
    source = teacher()
    student = mil.convert(source, [1])
    for ids in ([1, 2], [[0, 61]], [[0.5]], np.zeros((0, 2), int)):
        with pytest.raises(ValueError, match="ids"):
            mil.parity(student, source, ids)
    with pytest.raises(ValueError, match="layer 0 "):
        mil.parity(student, source, [[1, 2]], layers=[0])
    with pytest.raises(ValueError, match="head_dim is 16 in the student and 32"):
        mil.parity(student, teacher(head_dim=32), [[1, 2]])
    assert mil.parity(source, source, [[1, 2]]) == {}


def test_rows_of_a_parameter_as_stored():
    model, name = teacher(dtype="bfloat16"), "model.embed_tokens.weight"
    assert np.array_equal(model.c.raw(name, 3, 2), model.raw(name)[3:5]) and model.c.raw(name, 61).shape == (0, 24)
    for first, rows in ((-1, 1), (60, 2), (62, 0), (62, -1)):
        with pytest.raises(ValueError, match="61 rows"):
            model.c.raw(name, first, rows)
