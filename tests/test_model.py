"""Model: logits and gradients against a float64 torch reference, and decoding against one forward."""
import math

import numpy as np
import pytest

import mambainllama as mil
from conftest import on
from mambainllama.config import architecture
from reference import bf16_to_float, float_to_bf16

BASE = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 61, "rms_norm_eps": 1e-5,
        "initializer_range": 0.15}


def config(mixer, attn_layers, layers=4, **changes):
    c = BASE | {"num_hidden_layers": layers} | changes
    heads, head_dim = c["num_attention_heads"], c["head_dim"]
    if mixer:
        c["mamba"] = {"d_model": c["hidden_size"], "n_layer": layers, "attn_layers": attn_layers, "d_inner": heads * head_dim,
                      "d_xb": c["num_key_value_heads"] * head_dim,
                      "ssm_cfg": {"expand": 1} | ({"ngroups": heads, "d_state": head_dim} if mixer == "mamba2" else {})}
    return c


HYBRIDS = {
    "transformer": config(None, None),
    "transformer with window 7": config(None, None, architectures=["MistralForCausalLM"], model_type="mistral", sliding_window=7),
    "mamba1 hybrid": config("mamba1", [1, 3]),
    "mamba2 hybrid": config("mamba2", [0, 2]),
    "mamba2 hybrid, tied, as many kv heads as heads": config("mamba2", [1], tie_word_embeddings=True, num_key_value_heads=4),
    "mamba1 hybrid, tied, one kv head": config("mamba1", [0], tie_word_embeddings=True, num_key_value_heads=1),
    "pure mamba1": config("mamba1", []),
    "pure mamba2, odd head_dim 6": config("mamba2", [], head_dim=6),
    "qwen3 layers with mamba2": config("mamba2", [0, 2], architectures=["Qwen3ForCausalLM"], model_type="qwen3"),
    "qwen2 biases with mamba2": config("mamba2", [0, 3], architectures=["Qwen2ForCausalLM"], model_type="qwen2"),
}


HYBRIDS["windows with sinks, identity"] = config("mamba2", [1], architectures=["MistralForCausalLM"], model_type="mistral", sliding_window=7)
HYBRIDS["windows with sinks, identity"]["mamba"] |= {"mixers": ["window", "attention", "identity", "window"], "window": [9, 0, 0, 13],
                                                     "sinks": 3}


# On a GPU a few of them, which together have everything: its kernels' cases are in test_ops.py.
ON_GPU = ["transformer with window 7", "mamba1 hybrid, tied, one kv head", "pure mamba2, odd head_dim 6", "qwen2 biases with mamba2",
          "windows with sinks, identity"]
everywhere = pytest.mark.parametrize("name, device", [pytest.param(name, *place.values, marks=place.marks) for place in on("cpu", "cuda32", "cuda")
                                                      for name in (HYBRIDS if place.values == ("cpu",) else ON_GPU)], indirect=["device"])


def build(name, seed=1, device="cpu", dtype=None):
    model, rng = mil.random(HYBRIDS[name], seed=seed, device=device, dtype=dtype), np.random.default_rng(0)
    for key in model.names:  # what starts at 0 or 1 would hide a wrong index
        if not key.endswith(("_proj.weight", "embed_tokens.weight", "lm_head.weight", "A_log", "dt_bias", "dt_proj.bias")):
            model.set(key, model.get(key) + 0.2 * rng.standard_normal(model.names[key]).astype(np.float32))
    return model


def tokens(batch, length, seed=0):
    return np.random.default_rng(seed).integers(0, 61, (batch, length)).astype(np.int32)


def error(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert np.isfinite(a).all()
    return np.linalg.norm(a - b) / (np.linalg.norm(b) or 1)  # an identity's norm has no gradient


def reference(model):
    torch = pytest.importorskip("torch")
    import torch_hybrid

    params = {name: torch.tensor(model.get(name), dtype=torch.float64, requires_grad=True) for name in model.names}
    arch = architecture(model.config, model.mamba_config)
    arch["inv_freq"] = torch.tensor(arch["inv_freq"])
    return torch, torch_hybrid, params, arch


LOSSES = [("forward", 1.0, 0.0), ("forward", 0.3, 1.0), ("reverse", 0.0, 1.0), ("jensen-shannon", 0.2, 1.0), ("paper", 0.1, 0.5)]


@pytest.mark.parity
@pytest.mark.parametrize("name, kind, ce, kl", [(name, *LOSSES[i % len(LOSSES)]) for i, name in enumerate(HYBRIDS)])
def test_loss_and_gradients_equal_torch(name, kind, ce, kl):
    model, ids, targets = build(name), tokens(2, 37), tokens(2, 37, 1)
    targets[:, ::3] = -100
    torch, ref, params, arch = reference(model)
    teacher = build("transformer", seed=2) if kl else None
    u = None
    if kl:
        _, _, teacher_params, teacher_arch = reference(teacher)
        u = ref.logits(teacher_params, torch.tensor(ids).long(), teacher_arch).detach()
    z = ref.logits(params, torch.tensor(ids).long(), arch)
    assert error(model.logits(ids), z.detach()) < 1e-5
    loss = ref.loss(z, torch.tensor(targets).long(), u, ce, kl, 1.5, kind)
    loss.backward()
    got = model.loss(ids, targets, teacher, ce, kl, 1.5, kind, backward=True)
    assert abs(got["loss"] - loss.item()) < 1e-5 * abs(loss.item())
    evaluated = model.loss(ids, targets, teacher, ce, kl, 1.5, kind)
    assert evaluated == pytest.approx(got, rel=1e-6)
    errors = {key: error(model.grad(key), params[key].grad) for key in model.names}
    assert max(errors.values()) < 1e-4, max(errors, key=errors.get)
    recomputed = {key: model.grad(key) for key in model.names}
    model.zero_grad()
    model.loss(ids, targets, teacher, ce, kl, 1.5, kind, backward=True, recompute=True)
    for key in model.names:
        assert np.array_equal(model.grad(key), recomputed[key]), key


@pytest.mark.parametrize("kind", ["forward", "reverse", "jensen-shannon", "paper"])
def test_loss_to_a_cached_teacher_equals_torch(kind):
    model, teacher, ids, targets = build("mamba2 hybrid"), build("transformer", seed=2), tokens(2, 37), tokens(2, 37, 1)
    targets[:, ::3] = -100
    torch, ref, params, arch = reference(model)
    _, _, teacher_params, teacher_arch = reference(teacher)
    cached = teacher.top_log_probs(ids, 7, 1.5)
    u = ref.logits(teacher_params, torch.tensor(ids).long(), teacher_arch).detach()
    top, _ = torch.log_softmax(u / 1.5, -1).topk(7)
    assert error(cached[1], top) < 1e-5 and error(np.exp(cached[2]), 1 - top.exp().sum(-1)) < 1e-5
    z = ref.logits(params, torch.tensor(ids).long(), arch)
    loss = ref.loss(z, torch.tensor(targets).long(), u, 0.2, 1.0, 1.5, kind, torch.tensor(cached[0]).long())
    loss.backward()
    got = model.loss(ids, targets, cached, 0.2, 1.0, 1.5, kind, backward=True)
    assert abs(got["loss"] - loss.item()) < 1e-5 * abs(loss.item())
    errors = {key: error(model.grad(key), params[key].grad) for key in model.names}
    assert max(errors.values()) < 1e-4, max(errors, key=errors.get)


@pytest.mark.parametrize("kind, device", [pytest.param(kind, *place.values, marks=place.marks) for place in on("cpu", "cuda32", "cuda")
                                          for kind in (("forward", "reverse", "jensen-shannon", "paper") if place.values == ("cpu",) else ("forward",))],
                         indirect=["device"])
def test_a_cache_s_kl_grows_with_k_up_to_the_teacher_s(kind, device):
    model, teacher = build("mamba2 hybrid", **device.how), build("transformer", seed=2, **device.how)
    ids, targets = tokens(2, 19), tokens(2, 19, 1)
    targets[:, ::3] = -100
    prev = np.tile(np.arange(-1, 18, dtype=np.int32), (2, 1))
    prev[:, 11] = -2
    full = model.loss(ids, targets, teacher, 0.2, 1.0, 1.5, kind, prev, backward=True)
    expected = np.concatenate([model.grad(key).ravel() for key in model.names])
    model.zero_grad()
    kls = []
    for k in (1, 7, 30, 61):
        cached = teacher.top_log_probs(ids, k, 1.5, prev)
        kls.append(model.loss(ids, targets, cached, 0.2, 1.0, 1.5, kind, prev, backward=k == 61)["kl"])
    assert kls == sorted(kls) and kls[2] < 0.999 * full["kl"]
    assert kls[-1] == pytest.approx(full["kl"], abs=1e-6 * max(1, full["kl"]))
    assert error(np.concatenate([model.grad(key).ravel() for key in model.names]), expected) < device.gradients
    cached[0][0, 5] = -1  # nothing is known there
    without, there = (model.loss(ids, targets, cached, 0.2, 1.0, 1.5, kind, prev) for cached in (cached, teacher))
    assert without["ce"] == there["ce"] and without["kl"] < there["kl"]


@everywhere
def test_packed_documents_do_not_see_each_other(name, device):
    model, ids, targets = build(name, **device.how), tokens(2, 53), tokens(2, 53, 1)
    starts = [[0, 20, 21], [0, 37]]
    prev = np.tile(np.arange(-1, 52, dtype=np.int32), (2, 1))
    for b, row in enumerate(starts):
        prev[b, row] = -2
    packed = model.logits(ids, prev=prev)
    model.loss(ids, targets, prev=prev, backward=True)
    gradients = {key: model.grad(key) for key in model.names}
    model.zero_grad()
    for b, row in enumerate(starts):
        for begin, end in zip(row, [*row[1:], 53]):
            alone = model.logits(ids[b : b + 1, begin:end])
            assert error(packed[b, begin:end], alone[0]) < device.logits
            part = np.full((1, end - begin), -100, np.int32)
            part[:] = targets[b, begin:end]
            model.loss(ids[b : b + 1, begin:end], part, ce=(end - begin) / 106, backward=True)
    for key in model.names:
        assert error(gradients[key], model.grad(key)) < 1.7 * device.gradients, key  # both are rounded


@pytest.mark.parametrize("name", HYBRIDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_prefill_and_steps_equal_one_forward(name, dtype):
    model, ids = build(name, dtype=dtype), tokens(3, 120)
    whole = model.logits(ids)
    lengths = [40, 33, 56]
    state = mil.State(model, 4, 160)
    slot = np.array([2, 0, 3], np.int32)
    padded = model.logits(ids[:, :56], state, keep=lengths, slot=slot)
    for b, n in enumerate(lengths):
        assert error(padded[b, :n], whole[b, :n]) < 1e-4
    for step in range(64):
        at = [min(n + step, 119) for n in lengths]
        one = model.logits(np.stack([ids[b, t : t + 1] for b, t in enumerate(at)]), state, slot=slot)
        for b, n in enumerate(lengths):
            assert error(one[b, 0], whole[b, n + step]) < 1e-4 if n + step < 120 else True
    assert state.pos.tolist() == [33 + 64, 0, 40 + 64, 56 + 64]


@everywhere
def test_rejected_tokens_never_happened(name, device):
    """Any grouping of accepted tokens into calls, with wrong drafts in between, gives the bits of one token a call, and these are near
    one forward over all."""
    end = 100 if device.name == "cpu" else 62
    model, ids = build(name, **device.how), tokens(2, end)
    plain, drafted = mil.State(model, 2, 160), mil.State(model, 2, 160)
    model.logits(ids[:, :40], plain, last=1)
    model.logits(ids[:, :40], drafted, last=1)
    steps = np.concatenate([model.logits(ids[:, t : t + 1], plain) for t in range(40, end)], 1)
    assert error(steps, model.logits(ids)[:, 40:]) < device.logits
    rng, at, got = np.random.default_rng(5), np.array([40, 40]), [[], []]
    while (at < end).all():
        n = rng.integers(0, 6, 2)
        call = np.stack([np.concatenate([ids[b, at[b] : at[b] + n[b]], rng.integers(0, 61, 6 - min(n[b], end - at[b]))])[:6] for b in range(2)])
        n = np.minimum(n, end - at)
        z = model.logits(call, drafted, keep=0)
        drafted.commit(n)
        for b in range(2):
            got[b].append(z[b, : n[b]])
        at = at + n
    for b in range(2):
        assert np.array_equal(np.concatenate(got[b]), steps[b, : at[b] - 40])


@everywhere
def test_trees_extension_and_paths(name, device):
    model, ids = build(name, **device.how), tokens(1, 60)
    state, line = mil.State(model, 1, 120), mil.State(model, 1, 120)
    for s in (state, line):
        model.logits(ids[:, :37], s, last=0)
    tree, prev = np.array([[3, 9, 4, 8, 5, 2]], np.int32), np.array([[-1, -1, 0, 1, 2, 3]], np.int32)
    z = model.logits(tree, state, keep=0, prev=prev)
    chain = model.logits(tree[:, 1::2], line, keep=0)
    assert np.array_equal(z[:, 1::2], chain)
    more = model.logits([[7]], line, keep=0, extend=True)  # 9 8 2 and then 7, all pending
    state.commit([3], path=[[1, 3, 5]])
    assert state.pos[0] == 40
    assert np.array_equal(model.logits([[7]], state), more)
    line.commit([4])
    a, b = model.logits(ids[:, 50:58], state), model.logits(ids[:, 50:58], line)
    assert np.array_equal(a, b)


@everywhere
def test_rows_do_not_depend_on_companions(name, device):
    model, ids = build(name, **device.how), tokens(5, 50)
    alone, together = mil.State(model, 1, 80), mil.State(model, 5, 80)
    for b in range(5):
        model.logits(ids[b : b + 1, :40], together, slot=[b], last=0)
    model.logits(ids[3:4, :40], alone, last=0)
    assert np.array_equal(model.logits(ids[3:4, 40:45], alone)[0], model.logits(ids[:, 40:45], together)[3])


@pytest.mark.parametrize("name", ["mamba2 hybrid", "windows with sinks, identity"])
def test_state_copy_save_load_reset(name, tmp_path, device):
    model, ids = build(name, **device.how), tokens(2, 60)
    state = mil.State(model, 2, 100)
    model.logits(ids[:, :37], state, last=0)
    model.logits(ids[:, 37:42], state, keep=0)
    state.save(tmp_path / "state.npz")
    other = mil.State(model, 2, 100)
    model.logits(tokens(2, 90, 3), other, last=0)
    other.reset()
    other.save(tmp_path / "empty.npz")
    with np.load(tmp_path / "empty.npz") as file:  # nothing of the sequences before
        assert not any(file[key].any() for key in file.files)
    other.load(tmp_path / "state.npz")
    state.commit([2, 3])
    other.commit([2, 3])
    assert np.array_equal(model.logits(ids[:, 50:53], state, keep=0), model.logits(ids[:, 50:53], other, keep=0))
    other.copy(0, 1)
    z = model.logits(ids[:1, 50:53].repeat(2, 0), other, keep=0)
    assert np.array_equal(z[0], z[1])
    other.reset()
    assert other.pos.tolist() == [0, 0]
    assert np.array_equal(model.logits(ids[:, :37], other), model.logits(ids[:, :37], mil.State(model, 2, 100)))
    (tmp_path / "state.npz").write_bytes((tmp_path / "state.npz").read_bytes()[:200])
    for target in (state, mil.State(model, 3, 100)):
        with pytest.raises(ValueError):
            target.load(tmp_path / "state.npz")


@pytest.mark.parametrize("name", ["mamba1 hybrid", "mamba2 hybrid", "transformer"])
def test_cursors_that_no_state_has_are_not_loaded(name, tmp_path):
    """The ring holds 32 tokens behind the checkpoint's, pending ones included, and no token stands beyond the capacity."""
    model = build(name)
    state = mil.State(model, 1, 64)
    good = [(0, 0, 0), (32, 0, 0), (40, 20, 28), (64, 0, 32), (32, 32, 32)]
    bad = [(32, 1, 0), (31, 32, 0), (40, 20, 27), (33, 0, 0), (5, 0, 6), (64, 1, 64), (33, 32, 33), (65, 0, 65)]
    for cursors in good + bad:
        arrays = state.c.dump()[:-3] + [np.array([value], np.int32) for value in cursors]
        np.savez(tmp_path / "state.npz", *arrays)
        if cursors in bad:
            with pytest.raises(ValueError, match="does not fit"):
                state.load(tmp_path / "state.npz")
        else:
            state.load(tmp_path / "state.npz")
            assert (state.pos[0], state.pending[0]) == cursors[:2]


def test_a_state_larger_than_memory_addresses():
    """2^64 bytes a cache: a product that wraps to 0 would give an empty buffer."""
    model = mil.random(BASE | {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 512})
    with pytest.raises(MemoryError, match="out of memory"):
        mil.State(model, 1 << 20, 1 << 30)


@pytest.mark.parametrize("call,sentence", [
    (lambda m, s: m.logits([[61]]), "ids"),
    (lambda m, s: m.logits([[-1]]), "ids"),
    (lambda m, s: m.logits([1, 2]), "shape"),
    (lambda m, s: m.logits([[1.5]]), "integers"),
    (lambda m, s: m.logits(np.zeros((2, 41), int), s), "capacity"),
    (lambda m, s: m.logits(np.zeros((2, 3), int), s, slot=[1, 1]), "twice"),
    (lambda m, s: m.logits(np.zeros((2, 3), int), s, slot=[0, 2]), "slot"),
    (lambda m, s: m.logits(np.zeros((2, 3), int), s, keep=4), "keep"),
    (lambda m, s: m.logits(np.zeros((2, 33), int), s, keep=0), "uncommitted"),
    (lambda m, s: m.logits(np.zeros((1, 3), int), s, prev=[[-1, 1, 1]]), "prev"),
    (lambda m, s: m.logits(np.zeros((1, 3), int), prev=[[-1, -1, 1]]), "prev"),
    (lambda m, s: m.logits(np.zeros((3, 3), int), s), "slots"),
    (lambda m, s: m.logits(np.zeros((1, 3), int), mil.State(mil.random(BASE), 1, 9)), "another model"),
    (lambda m, s: s.commit([1, 1]), "pending"),
    (lambda m, s: s.commit([0]), "n"),
    (lambda m, s: s.copy(0, 2), "rows"),
    (lambda m, s: m.loss([[1, 2]], [[1, 61]]), "targets"),
    (lambda m, s: m.loss([[1, 2]], [[1]]), "shape"),
    (lambda m, s: m.loss([[1]], [[1]], kl=1.0), "teacher"),
    (lambda m, s: m.loss([[1]], [[1]], teacher=m), "teacher"),
    (lambda m, s: m.loss([[1]], [[1]], kind="sideways"), "kind"),
    (lambda m, s: m.loss([[1]], [[1]], teacher=(1, 2)), "ids, log_probs, tail"),
    (lambda m, s: m.loss([[1]], [[1]], teacher=([[[1]]], [[0.0]], [[-np.inf]])), "shape"),
    (lambda m, s: m.loss([[1]], [[1]], teacher=([[[1]]], [[[-1.0]]], [[-1.0]])), r"at \(0, 0\) add up to 0.7358"),
    (lambda m, s: m.loss([[1]], [[1]], teacher=([[[1]]], [[[np.nan]]], [[-1.0]])), "add up to nan"),
    (lambda m, s: m.loss([[1]], [[1]], teacher=([[[61]]], [[[0.0]]], [[-np.inf]])), "ids.*61"),
    (lambda m, s: m.loss([[1]], [[1]], teacher=([[[5, 5]]], [[[0.0, -99]]], [[-np.inf]])), "different"),
    (lambda m, s: m.top_log_probs([[1]], 0), "k is 0"),
    (lambda m, s: m.top_log_probs([[1]], 62), "k is 62"),
    (lambda m, s: m.top_log_probs([[1]], 5, temperature=0), "temperature"),
    (lambda m, s: m.top_log_probs([1], 5), "shape"),
    (lambda m, s: m.loss([[1]], [[1]], temperature=0.0), "temperature"),
    (lambda m, s: m.get("model.norm"), "model.norm"),
    (lambda m, s: m.set("model.norm.weight", np.zeros(5, np.float32)), "shape"),
    (lambda m, s: m.set("model.norm.weight", np.zeros(24, np.int64)), "float32"),
    (lambda m, s: m.grad("model.norm.weight"), "gradient"),
    (lambda m, s: m.step(1e-3), "gradients"),
    (lambda m, s: m.trainable(["*nothing*"]), "pattern"),
    (lambda m, s: mil.State(m, 0, 5), "batch from 1 to 1048576"),
    (lambda m, s: mil.State(m, 1, 2**30 + 1), "capacity from 1 to 1073741824"),
    (lambda m, s: m.c.set_moments("model.norm.weight", None, np.zeros(24, np.float32), None), "model.norm.weight: expected"),
    (lambda m, s: m.set_moments("model.norm.weight", np.zeros(24, np.float32), None), "model.norm.weight: expected"),
    (lambda m, s: m.logits([[1, 2]], prev=[[-2, 0, 1]]), r"'prev' must have the shape of ids \(1, 2\), got \(1, 3\)"),
    (lambda m, s: m.logits([[1, 2], [3, 4]], prev=[[-2, 0], [-2]]), "'prev' must be an array .* differ in length"),
    (lambda m, s: m.loss([[1, 2]], [[1, 2]], prev=[[[-2, 0]], [[-2, 0]]]), "'prev' must have the shape"),
])
def test_bad_input_is_a_sentence(call, sentence):
    model = mil.random(HYBRIDS["mamba2 hybrid"])
    state = mil.State(model, 2, 40)
    with pytest.raises(ValueError, match=sentence):
        call(model, state)
    assert state.pos.tolist() == [0, 0]


@pytest.mark.parametrize("changes, key", [
    *(({"initializer_range": value}, "initializer_range") for value in (10**400, "x", float("nan"), -0.1, [1])),
    ({"mamba": 3}, '"mamba"'), ({"eos_token_id": {"a": 1}}, "eos_token_id")])
def test_a_bad_config_of_random_weights_names_the_key(changes, key):
    with pytest.raises(ValueError, match=key) as error:
        mil.random(BASE | changes)
    assert "\n" not in str(error.value)
    assert mil.random(BASE | {"initializer_range": None}).get("lm_head.weight").std() == pytest.approx(0.02, rel=0.1)  # null: the default


def test_freeze_mask_and_copy_on_write(device):
    teacher = build("transformer", **device.how)
    student = mil.convert(teacher, [1, 2], seed=3)
    chosen = student.trainable(["*mamba*"])
    assert chosen and all("mamba" in name for name in chosen)
    before = {name: student.raw(name) for name in student.names}
    original = {name: teacher.raw(name) for name in teacher.names}
    ids = tokens(2, 40)
    student.loss(ids[:, :-1], ids[:, 1:], teacher, 0.1, 1.0, backward=True)
    with pytest.raises(ValueError, match="frozen"):
        student.grad("model.norm.weight")
    student.step(1e-2)
    for name in student.names:
        assert np.array_equal(student.raw(name), before[name]) != (name in chosen), name
    assert all(np.array_equal(teacher.raw(name), original[name]) for name in original)


@pytest.mark.parametrize("mixer", ["mamba1", "mamba2"])
def test_identity_init_is_the_attention_init_with_convolutions_that_pass_on(mixer):
    teacher = build("transformer")
    a, b = (mil.convert(teacher, [1], mixer, init) for init in ("attention", "identity"))
    assert [name for name in a.names if not np.array_equal(a.raw(name), b.raw(name))] == [name for name in a.names if "conv1d" in name]
    weight = b.get("model.layers.1.mamba.conv1d.weight")
    assert (weight[..., -1] == 1).all() and not weight[..., :-1].any() and not b.get("model.layers.1.mamba.conv1d.bias").any()


@pytest.mark.parametrize("name", ["mamba1 hybrid, tied, one kv head", "qwen2 biases with mamba2"])
@pytest.mark.parametrize("device", on("cpu", "cuda"), indirect=True)
def test_bf16_gradients_are_the_float_ones_rounded(name, device):
    """Of each backward the sum, in the matrices alone; the norm and a step are those of what is kept."""
    model, ids, targets = build(name, dtype="bfloat16", device=device.how["device"]), tokens(2, 40), tokens(2, 40, 1)
    halves = [key for key in model.names if model.raw(key).dtype == np.uint16]

    def backward(step):
        model.loss(ids, np.roll(targets, step, 1), backward=True, recompute=step == 1)
        return {key: model.grad(key) for key in model.names}
    exact = []
    for step in range(2):
        model.zero_grad()
        exact.append(backward(step))
    model.trainable(gradients="bfloat16")
    kept, rounded = [backward(step) for step in range(2)], [bf16_to_float(float_to_bf16(exact[0][key])) for key in halves]
    for key, first in zip(halves, rounded):
        tied = key == "model.embed_tokens.weight" and "lm_head.weight" not in model.names  # rounded for its use above, and for that below
        assert error(kept[0][key], first) < 4e-3 if tied else np.array_equal(kept[0][key], first), key
        second = bf16_to_float(float_to_bf16(first + exact[1][key]))
        assert error(kept[1][key], second) < 4e-3 and (tied or np.mean(kept[1][key] != second) < 0.02), key
    for key in set(model.names) - set(halves):
        assert error(kept[1][key], exact[0][key] + exact[1][key]) < 1e-5, key
    assert model.grad_norm() == pytest.approx(math.hypot(*(np.linalg.norm(g.astype(np.float64)) for g in kept[1].values())), rel=1e-6)
    model.step(1e-2, scale=0.5)
    for key, (m, v, _) in model.moments().items():
        assert error(m, 0.05 * kept[1][key]) < 1e-6 and error(v, 0.25e-3 * kept[1][key] ** 2) < 1e-4
    model.zero_grad()
    assert not model.grad_norm()


def test_frozen_gradients_do_not_change_the_others():
    model, ids = build("mamba2 hybrid"), tokens(2, 40)
    model.loss(ids[:, :-1], ids[:, 1:], backward=True)
    full = {name: model.grad(name) for name in model.names}
    for name in model.trainable(["*layers.2*", "lm_head*"]):
        model.zero_grad()
        model.loss(ids[:, :-1], ids[:, 1:], backward=True)
        assert np.array_equal(model.grad(name), full[name]), name
