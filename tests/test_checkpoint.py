"""Folders: the architecture that a config describes, both spellings of names, weights files read and written, hostile files."""
import json
import os
import pickle
import shutil
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
from mambainllama.checkpoint import load, open_weights, save, shapes, training_names, write_weights
from mambainllama.config import architecture, is_dynamic, mamba_config, read_folder, rope
from mambainllama.generate import generate
from mambainllama.tokenizer import stop_tokens
from mambainllama.weights import replacing

DATA = Path(__file__).parent / "data"
FOLDERS = sorted(path.name for path in DATA.iterdir() if (path / "config.json").exists())
CONFIG = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
          "num_key_value_heads": 2, "vocab_size": 61}


def arch_of(folder):
    return architecture(*read_folder(folder))


def copy(name, tmp_path):
    return Path(shutil.copytree(DATA / name, tmp_path / name))


def edit(folder, file="config.json", **changes):
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refused(match, function, *args):
    """function refuses in one sentence: a ValueError that matches, without line breaks or endless values."""
    with pytest.raises(ValueError, match=match) as caught:
        function(*args)
    text = str(caught.value)
    assert "\n" not in text and 10 < len(text) < 2000
    return text


# ---- architecture ------------------------------------------------------------------------------------------------------------


def test_architecture_of_each_family():
    arch = architecture(CONFIG)
    assert (arch["width"], arch["heads"], arch["kv_heads"], arch["head_dim"], arch["inner"], arch["mlp"]) == (32, 4, 2, 8, 32, 48)
    assert arch["kinds"] == ["attention"] * 3 and arch["window"] == [0] * 3 and arch["tied"] == 0
    bias = ("qkv_bias", "o_bias", "mlp_bias", "qk_norm")
    for family, changes, expected in [
        ("llama", {"attention_bias": True}, (1, 1, 0, 0)), ("llama", {"mlp_bias": True}, (0, 0, 1, 0)),
        ("mistral", {"attention_bias": True}, (0, 0, 0, 0)),  # which transformers does not read
        ("qwen2", {}, (1, 0, 0, 0)), ("qwen3", {"head_dim": 8}, (0, 0, 0, 1)), ("qwen3", {"attention_bias": True}, (1, 1, 0, 1)),
    ]:
        arch = architecture(CONFIG | {"model_type": family} | changes)
        assert tuple(arch[key] for key in bias) == expected, (family, changes)
    assert architecture(CONFIG | {"model_type": "qwen3"})["head_dim"] == 128  # Qwen3Config's default
    named = {k: v for k, v in CONFIG.items() if k != "model_type"} | {"architectures": ["Qwen2ForCausalLM"]}
    assert architecture(named)["qkv_bias"] == 1
    assert architecture({k: v for k, v in CONFIG.items() if k != "num_key_value_heads"})["kv_heads"] == 4


@pytest.mark.parametrize("family, changes, window", [
    ("mistral", {}, [4096] * 3), ("mistral", {"sliding_window": None}, [0] * 3), ("mistral", {"sliding_window": 7}, [7] * 3),
    ("llama", {"sliding_window": 7}, [0] * 3),
    ("qwen2", {"sliding_window": 7}, [0] * 3), ("qwen2", {"sliding_window": 7, "use_sliding_window": True}, [0] * 3),
    ("qwen2", {"sliding_window": 7, "use_sliding_window": True, "max_window_layers": 1}, [0, 7, 7]),
    ("qwen3", {"sliding_window": 7, "use_sliding_window": True, "head_dim": 8,
               "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}, [7, 0, 7]),
])
def test_windows(family, changes, window):
    assert architecture(CONFIG | {"model_type": family} | changes)["window"] == window
    hybrid = architecture(CONFIG | {"model_type": family} | changes, {"attn_layers": [1], "ssm_cfg": {"expand": 1}})
    assert hybrid["window"] == [0, window[1], 0]


def test_hybrid_architecture():
    mamba = {"attn_layers": [1], "ssm_cfg": {"expand": 1}, "d_xb": 16}
    first = architecture(CONFIG, mamba)
    assert first["kinds"] == ["mamba1", "attention", "mamba1"] and (first["d_state"], first["conv"], first["dt_rank"]) == (16, 4, 2)
    assert (first["dt_bias_twice"], first["norm_eps"]) == (1, 1e-5)
    second = architecture(CONFIG, mamba | {"ssm_cfg": {"ngroups": 4, "d_state": 8, "expand": 1}, "dt_bias_twice": False, "norm_eps": 1e-6})
    assert second["kinds"] == ["mamba2", "attention", "mamba2"] and (second["d_state"], second["conv"], second["dt_rank"]) == (8, 4, 0)
    assert (second["dt_bias_twice"], second["norm_eps"]) == (0, 1e-6)
    assert architecture(CONFIG, mamba, "mamba2")["kinds"] == second["kinds"]
    for kinds in (first["kinds"], second["kinds"], ["mamba2", "attention", "mamba1"], ["attention"] * 3):
        written = mamba_config(CONFIG, kinds, {"attn_rope": "plain", "dt_bias_twice": True})
        assert architecture(CONFIG, written)["kinds"] == kinds
        assert ("mixers" in written) == (len(set(kinds)) == 3) and written["attn_rope"] == "plain" and "dt_bias_twice" not in written


@pytest.mark.parametrize("changes, match", [
    ({"model_type": "gemma"}, "gemma"), ({"architectures": ["GemmaForCausalLM"]}, "GemmaForCausalLM"), ({"model_type": []}, "model_type"),
    ({"hidden_act": "gelu"}, "hidden_act"), ({"hidden_size": None}, "hidden_size is missing"), ({"hidden_size": "32"}, "hidden_size"),
    ({"vocab_size": 0}, "vocab_size"), ({"vocab_size": -5}, "vocab_size"), ({"vocab_size": 1 << 60}, "vocab_size"),
    ({"num_hidden_layers": 2.0}, "num_hidden_layers"), ({"num_hidden_layers": True}, "num_hidden_layers"),
    ({"num_hidden_layers": 10**9}, "num_hidden_layers"), ({"intermediate_size": [48]}, "intermediate_size"),
    ({"num_key_value_heads": 3}, "num_key_value_heads"), ({"head_dim": 7}, "head_dim"), ({"num_attention_heads": 6}, "multiple"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps"), ({"rms_norm_eps": "1e-6"}, "rms_norm_eps"), ({"rms_norm_eps": 0}, "rms_norm_eps"),
    ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"), ({"attention_bias": 1}, "attention_bias"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"), ({"rope_theta": -1}, "rope_theta"), ({"rope_theta": 1e300}, "rope_theta"),
    ({"rope_scaling": {"rope_type": "longrope"}}, "longrope"), ({"rope_scaling": {"type": "su"}}, "su"), ({"rope_scaling": [1]}, "RoPE"),
    ({"rope_scaling": {"rope_type": "linear"}}, "factor is missing"), ({"rope_scaling": {"rope_type": "linear", "factor": "2"}}, "factor"),
    ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "RoPE"),
    ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "max_position_embeddings"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "max_position_embeddings"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 4, "high_freq_factor": 4,
                       "original_max_position_embeddings": 64}}, "high_freq_factor"),
    ({"model_type": "mistral", "sliding_window": 0}, "sliding_window"), ({"model_type": "qwen2", "layer_types": ["x"] * 3}, "layer type"),
    ({"model_type": "qwen2", "layer_types": ["sliding_attention"] * 3}, "sliding_window"),
    ({"model_type": "qwen2", "layer_types": []}, "layer_types"),
])
def test_configs_are_refused(changes, match):
    refused(match, architecture, CONFIG | changes)


WINDOWS = {"mixers": ["window", "attention", "identity"], "window": [9, 0, 0], "sinks": 2}


def test_windows_and_identity_in_mamba_config():
    mamba = {"attn_layers": [1], "ssm_cfg": {"expand": 1}} | WINDOWS
    arch = architecture(CONFIG, mamba)
    assert (arch["kinds"], arch["window"], arch["sinks"], arch["conv"]) == (WINDOWS["mixers"], [9, 0, 0], 2, 0)
    assert architecture(CONFIG | {"model_type": "mistral", "sliding_window": 5}, mamba)["window"] == [9, 5, 0]
    written = mamba_config(CONFIG, arch["kinds"], mamba)
    assert {key: written[key] for key in WINDOWS} == WINDOWS and written["attn_layers"] == [1]
    assert mamba_config(CONFIG, ["identity"] * 3)["mixers"] == ["identity"] * 3


@pytest.mark.parametrize("changes, match", [
    ({"attn_layers": None}, "attn_layers"), ({"attn_layers": [3]}, "attn_layers"), ({"attn_layers": ["1"]}, "attn_layers"),
    ({"d_inner": 64}, "d_inner"), ({"d_xb": 32}, "d_xb"), ({"d_model": 64}, "d_model"), ({"n_layer": 4}, "n_layer"),
    ({"ssm_cfg": 1}, "ssm_cfg"), ({"ssm_cfg": {}}, "d_inner"), ({"ssm_cfg": {"expand": 1, "d_state": 32}}, "d_state"),
    ({"ssm_cfg": {"expand": 1, "d_conv": 3}}, "d_conv"), ({"ssm_cfg": {"expand": 1, "ngroups": 2}}, "ngroups"),
    ({"ssm_cfg": {"expand": 1, "ngroups": 4, "norm_before_gate": True}}, "norm_before_gate"), ({"rms_norm_eps": 0.5}, "rms_norm_eps"),
    ({"attn_rope": "none"}, "attn_rope"), ({"norm_eps": "x"}, "norm_eps"), ({"dt_bias_twice": 1}, "dt_bias_twice"),
    ({"mixers": ["mamba1"]}, "mixers"), ({"mixers": ["mamba1"] * 3}, "mixers"), ({"mixers": ["mamba1", "attention", "mamba3"]}, "mixers"),
    *((WINDOWS | change, word) for change, word in (
        ({"window": None}, "window"), ({"window": 9}, "window"), ({"window": [9, 0]}, "window"), ({"window": [0, 0, 0]}, "window"),
        ({"window": [9, 9, 0]}, "window"), ({"window": [True, 0, 0]}, "window"), ({"window": [1 << 40, 0, 0]}, "window"),
        ({"sinks": None}, "sinks is missing"), ({"sinks": -1}, "sinks"), ({"mixers": ["window", "attention", "none"]}, "mixers"))),
])
def test_mamba_configs_are_refused(changes, match):
    refused(match, architecture, CONFIG, {"attn_layers": [1], "ssm_cfg": {"expand": 1}} | changes)


# ---- rope --------------------------------------------------------------------------------------------------------------------

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
SCALINGS = [{"type": "linear", "factor": 2.5}, {"rope_type": "dynamic", "factor": 3.0}, LLAMA3, YARN, YARN | {"truncate": False},
            YARN | {"mscale": 1.0, "mscale_all_dim": 0.5}, YARN | {"attention_factor": 1.3, "beta_fast": 16.0, "beta_slow": 2.0}]


def test_rope_settings():
    plain, scale = rope(CONFIG)
    assert plain.dtype == np.float32 and plain.shape == (4,) and scale == 1.0
    np.testing.assert_allclose(plain, 10000.0 ** -(np.arange(0, 8, 2) / 8), rtol=1e-6)
    np.testing.assert_array_equal(rope(CONFIG | {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}})[0],
                                  rope(CONFIG | {"rope_theta": 5e5})[0])
    np.testing.assert_array_equal(rope(CONFIG | {"rope_scaling": {"type": "linear", "factor": 2.0}})[0], plain / 2)
    yarn = CONFIG | {"rope_scaling": YARN}
    assert rope(yarn)[1] == pytest.approx(0.1 * np.log(4) + 1)
    flat, scale = rope(yarn, mamba={"attn_rope": "plain"})
    assert scale == 1.0 and (flat == plain).all() and not (rope(yarn, mamba={"attn_rope": "hf"})[0] == plain).all()
    dynamic = CONFIG | {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings": 16}
    assert is_dynamic(dynamic) and not is_dynamic(yarn) and not is_dynamic(dynamic, {"attn_rope": "plain"})
    assert (rope(dynamic)[0] == plain).all() and (rope(dynamic, 16)[0] == plain).all()
    grown = 10000 * (2 * 40 / 16 - 1) ** (8 / 6)
    np.testing.assert_allclose(rope(dynamic, 40)[0], grown ** -(np.arange(0, 8, 2) / 8), rtol=1e-6)


@pytest.mark.parity
@pytest.mark.parametrize("scaling", SCALINGS, ids=str)
def test_rope_is_that_of_transformers(scaling):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    for head_dim, theta in ((8, 1e4), (64, 5e5), (128, 1e4)):
        config = CONFIG | {"head_dim": head_dim, "rope_theta": theta, "rope_scaling": scaling, "max_position_embeddings": 256}
        theirs = transformers.LlamaConfig(**{k: dict(v) if isinstance(v, dict) else v for k, v in config.items() if k != "model_type"})
        for length in (None, 100, 256, 300, 5000):
            inv_freq, factor = ROPE_INIT_FUNCTIONS[scaling.get("rope_type", "linear")](theirs, "cpu", length and torch.tensor(length))
            ours, scale = rope(config, length)
            np.testing.assert_allclose(ours, inv_freq.numpy(), rtol=3e-7)
            assert scale == pytest.approx(factor, rel=1e-7)


# ---- names -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FOLDERS)
def test_every_tensor_has_its_training_name(name):
    arch = arch_of(DATA / name)
    tensors = training_names(open_weights(DATA / name), arch)
    assert {key: tensors[key].shape for key in tensors} == shapes(arch)
    assert all(np.isfinite(tensors[key].astype(np.float32)).all() for key in tensors)


def test_dtypes_are_as_stored():
    bf16, f16 = open_weights(DATA / "llama-bias-bf16"), open_weights(DATA / "llama-linear-tied-f16")
    assert {bf16.dtype(name) for name in bf16} == {"BF16"} and {bf16[name].dtype for name in bf16} == {np.dtype("uint16")}
    assert {f16.dtype(name) for name in f16} == {"F16"} and {f16[name].dtype for name in f16} == {np.dtype("float16")}


def fuse(tensors, arch):
    """The inference trees' spelling of a Mamba-1 hybrid in training spelling."""
    out = dict(tensors)
    for i, kind in enumerate(arch["kinds"]):
        p = f"model.layers.{i}."
        if kind == "attention":
            out[p + "mha.in_proj.weight"] = np.concatenate([out.pop(f"{p}self_attn.{x}_proj.weight") for x in "qkv"])
            out[p + "mha.out_proj.weight"] = out.pop(p + "self_attn.o_proj.weight")
        else:
            parts = ("in_proj_z", "in_proj_x", "B_proj", "C_proj", "dt_proj_down")
            out[p + "mamba.in_proj.weight"] = np.concatenate([out.pop(f"{p}mamba.{x}.weight") for x in parts])
    return out


def test_fused_mamba1_is_split(tmp_path):
    arch = arch_of(DATA / "mamba1")
    tensors = {name: np.array(array) for name, array in open_weights(DATA / "mamba1").items()}
    write_weights(tmp_path / "model.safetensors", fuse(tensors, arch) | {"model.layers.1.self_attn.rotary_emb.inv_freq": np.ones(4, "f4")})
    found = training_names(open_weights(tmp_path), arch)
    assert set(found) == set(tensors)
    assert all((found[name] == tensors[name]).all() for name in tensors)


def test_torch_file_holds_what_the_safetensors_file_does():
    arch = arch_of(DATA / "mamba2-bin")
    ours, theirs = (training_names(open_weights(DATA / name), arch) for name in ("mamba2-bin", "mamba2-fused-tied"))
    assert set(ours) == set(theirs) and all((ours[name] == theirs[name]).all() for name in ours)


def test_names_and_shapes_that_do_not_fit_are_listed(tmp_path):
    arch = arch_of(DATA / "qwen3")
    tensors = {name: np.array(array) for name, array in open_weights(DATA / "qwen3").items()}

    def names(changed, arch=arch):
        write_weights(tmp_path / "model.safetensors", changed)
        return training_names(open_weights(tmp_path), arch)

    gone = {name: array for name, array in tensors.items() if "layers.1." not in name} | {"model.more": np.ones(3, "f4")}
    text = refused("lacks", names, gone)
    assert text.count("model.layers.1.") == 5 and "6 more" in text and "unexpected 'model.more'" in text
    refused(r"norm.weight \(31,\) instead of \(32,\)", names, tensors | {"model.norm.weight": np.ones(31, "f4")})
    refused("lm_head.weight'", names, tensors, arch | {"tied": 0})  # absent and not tied
    names(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]})
    refused("ties", names, tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1})
    both = "model.layers.0.mha.in_proj.weight"
    refused("twice", names, tensors | {both: np.concatenate([tensors[f"model.layers.0.self_attn.{x}_proj.weight"] for x in "qkv"])})
    refused("rows", names, tensors | {both: np.ones((3, 32), "f4")})
    refused("unexpected", names, tensors | {"model.layers.7.mha.in_proj.weight": np.ones((3, 32), "f4")})


# ---- writing -----------------------------------------------------------------------------------------------------------------

SOME = {"a": np.arange(12, dtype="f4").reshape(3, 4), "b": np.arange(5, dtype="u2"), "c": np.float32(3), "d": np.zeros((0, 2), "f4"),
        "e": np.arange(12, dtype="f4").reshape(3, 4).T}


def bits(weights):
    return {name: (array.shape, str(array.dtype), array.tobytes()) for name, array in weights.items()}


def test_write_and_read(tmp_path):
    write_weights(tmp_path / "model.safetensors", SOME)
    found = open_weights(tmp_path)
    assert bits(found) == bits({k: np.asarray(v) for k, v in SOME.items()}) and found.dtype("b") == "BF16"
    assert all(not array.flags.writeable and array.flags.aligned for array in found.values() if array.size)
    safetensors = pytest.importorskip("safetensors")
    with safetensors.safe_open(tmp_path / "model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"} and set(file.keys()) == set(SOME)
        np.testing.assert_array_equal(file.get_tensor("e"), SOME["e"])
    refused("float64", write_weights, tmp_path / "model.safetensors", {"x": np.ones(3)})


def test_shards_replace_a_file_and_a_file_shards(tmp_path):
    path = tmp_path / "model.safetensors"
    write_weights(path, {"old": np.ones(3, "f4")})
    for count in (4, 4, 5):  # the second time under other names, so that no shard in use is overwritten
        write_weights(path, SOME, max_shard_bytes=48 if count == 4 else 4)
        files = sorted(file.name for file in tmp_path.iterdir())
        assert files[-1] == "model.safetensors.index.json" and not path.exists()
        index = json.loads((tmp_path / files[-1]).read_text())
        assert sorted(set(index["weight_map"].values())) == files[:-1] and index["metadata"]["total_size"] == 4 * 25 + 10
        assert bits(open_weights(tmp_path)) == bits({k: np.asarray(v) for k, v in SOME.items()})
    write_weights(path, {"new": np.ones(3, "f4")})
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_failed_write_leaves_the_old_files(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    write_weights(path, SOME)
    old = path.read_bytes()

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    for limit in (1 << 30, 48):
        with pytest.raises(OSError, match="cannot write .*safetensors: No space left on device"):
            write_weights(path, {"a": np.ones(3, "f4"), "b": np.ones(30, "f4")}, max_shard_bytes=limit)
        assert path.read_bytes() == old and [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]
    monkeypatch.undo()
    with pytest.raises(OSError, match="cannot write .*absent/x.safetensors: No such file"):
        write_weights(tmp_path / "absent" / "x.safetensors", SOME)
    with pytest.raises(RuntimeError), replacing(path) as file:
        file.write(b"half")
        raise RuntimeError
    assert path.read_bytes() == old and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("before, after", [(1 << 30, 1 << 30), (48, 48), (1 << 30, 48), (48, 1 << 30)])
def test_killed_at_any_moment_the_old_or_the_new_weights_are_whole(tmp_path, before, after):
    new = {name: np.asarray(array) + np.asarray(1).astype(np.asarray(array).dtype) for name, array in SOME.items()}
    wholes = [bits({name: np.asarray(array) for name, array in tensors.items()}) for tensors in (SOME, new)]
    seen = []
    for moment in range(40):
        folder = tmp_path / str(moment)
        folder.mkdir()
        write_weights(folder / "model.safetensors", SOME, before)
        child = os.fork()
        if child == 0:  # dies, without cleaning up, at its moment-th system call on files
            calls = [0]
            for name in ("fsync", "replace", "unlink"):
                def killed(*args, call=getattr(os, name), **kwargs):
                    calls[0] += 1
                    return os._exit(9) if calls[0] > moment else call(*args, **kwargs)
                setattr(os, name, killed)
            write_weights(folder / "model.safetensors", new, after)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        seen.append(wholes.index(bits(open_weights(folder))))
        if status == 0:
            break
    assert status == 0 and seen == sorted(seen) and seen[0] == 0 and seen[-1] == 1 and len(seen) > 4


# ---- hostile files -----------------------------------------------------------------------------------------------------------


def safetensors_file(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(begin, end, dtype="F32", shape=None):
    return {"dtype": dtype, "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize("content, match", [
    (b"", "empty"), (b"1234", "too few"), (safetensors_file({}, length=1 << 60), "1152921504606846976 bytes"),
    (safetensors_file({}, length=3), "has 2|has 10"), (safetensors_file(b"{"), "not JSON"), (safetensors_file(b"[]"), "an object"),
    (safetensors_file(b"\xff\xfe"), "not JSON"), (safetensors_file(b"[" * 100_000), "not JSON"),
    (safetensors_file(b'{"a":' + b"9" * 5000 + b"}"), "not JSON"), (safetensors_file({"a": 3}), "dtype"),
    (safetensors_file(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
                      b"1234"), "twice"),
    (safetensors_file({"a": tensor(0, 8), "b": tensor(4, 12)}, bytes(12)), "overlap"),
    (safetensors_file({"a": tensor(0, 4), "b": tensor(8, 12)}, bytes(12)), "holes"),
    (safetensors_file({"a": tensor(4, 8)}, bytes(8)), "begins"), (safetensors_file({"a": tensor(0, 8)}, bytes(4)), "describes"),
    (safetensors_file({"a": tensor(0, 4)}, bytes(8)), "describes"), (safetensors_file({"a": tensor(0, 8, shape=[1])}, bytes(8)), "needs 4"),
    (safetensors_file({"a": tensor(8, 0, shape=[2])}, bytes(8)), "offsets"), (safetensors_file({"a": tensor(-4, 0)}), "offsets"),
    (safetensors_file({"a": tensor(0, 4, shape=[-1])}, bytes(4)), "shape"), (safetensors_file({"a": tensor(0, 4, shape=[1.0])}), "shape"),
    (safetensors_file({"a": tensor(0, 0, shape=[1 << 62, 4])}), "shape"),
    (safetensors_file({"a": tensor(0, 0, shape=[0, 1 << 61, 8])}), "shape"),
    (safetensors_file({"a": tensor(0, 4, shape=[1] * 100)}, bytes(4)), "shape"),
    (safetensors_file({"a": tensor(0, 4, shape="1")}), "shape"),
    (safetensors_file({"a": tensor(0, 4, "F31")}, bytes(4)), "F31"), (safetensors_file({"a": tensor(0, 4, ["F32"])}, bytes(4)), "dtype"),
    (safetensors_file({"x" * 100_000: tensor(0, 4, "F31")}, bytes(4)), "dtype"),
])
def test_hostile_safetensors(tmp_path, content, match):
    (tmp_path / "model.safetensors").write_bytes(content)
    assert "model.safetensors" in refused(match, open_weights, tmp_path)


@pytest.mark.parametrize("index, match", [
    ("{", "not JSON"), ("{}", "weight_map"), ('{"weight_map": {"a": 3}}', "weight_map"), ('{"weight_map": {"a": "../x"}}', "same folder"),
    ('{"weight_map": {"a": "/etc/passwd"}}', "same folder"), ('{"weight_map": {"a": "gone"}}', "gone"),
    ('{"weight_map": {"a": "\\u0000"}}', "same folder"),
    ('{"weight_map": {"zzz": "one.safetensors"}}', "lacks the tensor 'zzz'"),
])
def test_hostile_index(tmp_path, index, match):
    write_weights(tmp_path / "one.safetensors", SOME)
    (tmp_path / "model.safetensors.index.json").write_text(index)
    refused(match, open_weights, tmp_path)


def test_what_is_no_file_is_refused_without_waiting(tmp_path):
    refused("no weights", open_weights, tmp_path)
    os.mkfifo(tmp_path / "model.safetensors")
    refused("regular", open_weights, tmp_path)
    os.unlink(tmp_path / "model.safetensors")
    os.mkdir(tmp_path / "model.safetensors")
    refused("regular", open_weights, tmp_path)
    os.rmdir(tmp_path / "model.safetensors")
    os.symlink("nowhere", tmp_path / "model.safetensors")
    refused("No such file", open_weights, tmp_path)


def torch_zip(path, data, storages=(), compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", data)
        for key, content in dict(storages).items():
            archive.writestr(f"archive/data/{key}", content)


def torch_pickle(numel=4, offset=0, shape=(4,), strides=(1,), key="0", kind="FloatStorage", function="torch._utils\n_rebuild_tensor_v2\n"):
    """{"a": a tensor}, as torch.save pickles it, by hand."""
    def text(s):
        return b"X" + struct.pack("<I", len(s)) + s.encode()

    def number(n):
        return b"\x8a\x09" + n.to_bytes(9, "little", signed=True)

    storage = b"(" + text("storage") + b"ctorch\n" + kind.encode() + b"\n" + text(key) + text("cpu") + number(numel) + b"tQ"
    numbers = b"".join(b"(" + b"".join(map(number, values)) + b"t" for values in (shape, strides))
    return (b"\x80\x02}" + text("a") + b"c" + function.encode() + b"(" + storage + number(offset) + numbers + b"\x89ccollections\n"
            b"OrderedDict\n)RtRs.")


class Bomb:
    def __reduce__(self):
        return os.system, ("touch executed",)


DEEP = b"\x80\x02}" + b")" + b"\x85" * 100_000 + b"K\x01s."  # a key whose hash would recurse a hundred thousand times
HOSTILE_PICKLES = [
    (pickle.dumps({"a": Bomb()}, 2), "posix.system"), (pickle.dumps({"a": Bomb()}, 4), "posix.system"),
    (b"cos\nsystem\n(S'touch executed'\ntR.", "os.system"), (b"cbuiltins\neval\n.", "builtins.eval"), (b"(ios\nsystem\n.", "INST"),
    (torch_pickle(function="torch\nload\n"), "torch.load"), (torch_pickle(kind="FileStorage"), "FileStorage"),
    (torch_pickle(function="collections\nOrderedDict\n"), "OrderedDict"), (torch_pickle(function="torch\nFloatStorage\n"), "FloatStorage"),
    (torch_pickle(shape=(5,)), "within its storage"), (torch_pickle(offset=1), "within"), (torch_pickle(offset=-1), "within"),
    (torch_pickle(strides=(2,)), "within"), (torch_pickle(strides=(-1,)), "within"), (torch_pickle(strides=(1, 1)), "within"),
    (torch_pickle(shape=(1 << 60,), strides=(0,)), "within"), (torch_pickle(shape=(-4,)), "within"),
    (torch_pickle(strides=(1 << 61,)), "within"),
    (torch_pickle(numel=5), "too short"), (torch_pickle(numel=-1), "too short"), (torch_pickle(numel=1 << 62), "too short"),
    (torch_pickle(key="1"), "missing"), (torch_pickle(key="../../x"), "missing"), (torch_pickle(kind="HalfStorage", numel=9), "too short"),
    (DEEP, "keys"), (b"\x80\x02)" + b"\x85" * (1 << 18) + b".", "more than 262144 opcodes"), (b"", "damaged"), (b".", "damaged"), (b"\x80\x02]q\x00h\x00a.", "list"), (b"}(K\x01K\x02u.", "keys"), (b"N.", "None"),
    (b"}r\xff\xff\xff\x7f.", "no tensors"), (b"\x80\x04\x8d" + b"\xff" * 8, "damaged"), (b"\x8e" + b"\xff" * 7 + b"\x0f.", "damaged"),
    (b"\x96" + b"\xff" * 7 + b"\x0f.", "damaged"), (b"h\x05.", "damaged"), (b"t.", "damaged"), (b"R.", "damaged"),
    (b"I" + b"9" * 9999 + b"\n.", "damaged"), (b"}X\x01\x00\x00\x00aK\x01s.", "not a tensor"),
]


@pytest.mark.parametrize("data, match", HOSTILE_PICKLES, ids=range(len(HOSTILE_PICKLES)))
def test_hostile_pickles(tmp_path, monkeypatch, data, match):
    monkeypatch.chdir(tmp_path)
    torch_zip(tmp_path / "pytorch_model.bin", data, {"0": bytes(16)})
    if match == "no tensors":  # a memo index of 2³¹ is a dict's key here, not a table's size
        assert len(open_weights(tmp_path)) == 0
    else:
        refused(match, open_weights, tmp_path)
    assert not (tmp_path / "executed").exists()


def test_pickles_that_are_sound(tmp_path):
    values = np.arange(4, dtype="f4")
    for arguments, expected in [
        ({}, values), ({"offset": 1, "shape": (3,)}, values[1:]), ({"shape": (2, 2), "strides": (1, 2)}, values.reshape(2, 2).T),
        ({"shape": (2, 1), "strides": (2, 1 << 61)}, values[::2, None]), ({"shape": (), "strides": ()}, values[0]),
        ({"shape": (0, 3), "strides": (3, 1), "offset": 4}, np.zeros((0, 3))),
    ]:
        torch_zip(tmp_path / "pytorch_model.bin", torch_pickle(**arguments), {"0": values.tobytes()})
        np.testing.assert_array_equal(open_weights(tmp_path)["a"], expected)
    torch_zip(tmp_path / "pytorch_model.bin", torch_pickle(), {"0": values.tobytes(), "../byteorder": b""}, zipfile.ZIP_DEFLATED)
    refused("compressed", open_weights, tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.")
    refused("zip", open_weights, tmp_path)


@pytest.mark.filterwarnings("ignore:invalid escape sequence")  # in a text opcode, from pickletools
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_damaged_files_are_refused_or_read(tmp_path, kind):
    """Truncated anywhere, any byte of what is not data changed: a ValueError or tensors that lie within the file."""
    path = tmp_path / {"safetensors": "model.safetensors", "bin": "pytorch_model.bin"}[kind]
    if kind == "safetensors":
        write_weights(path, SOME)
    else:
        torch_zip(path, torch_pickle(), {"0": bytes(16)})
    whole = path.read_bytes()
    random = np.random.default_rng(0)
    cases = [whole[:n] for n in range(len(whole))]
    for i in range(min(len(whole), 500)):  # the header, or the pickle; the rest is data or the archive's directory
        for value in {whole[i] ^ 1, int(random.integers(256))} - {whole[i]}:
            cases.append(whole[:i] + bytes([value]) + whole[i + 1 :])
    refusals = 0
    for content in cases:
        path.write_bytes(content)
        try:
            for array in open_weights(tmp_path).values():
                assert array.size <= len(whole) and array.tobytes() is not None
        except ValueError as error:
            refusals += 1
            assert "\n" not in str(error)
    assert refusals > len(whole)  # every truncation, at least


# ---- load and save -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FOLDERS)
def test_save_and_load_give_the_same_bits(name, tmp_path):
    model = load(DATA / name)
    assert model.dtype == ("bfloat16" if "bf16" in name else "float32") and model.folder == str(DATA / name)
    save(model, tmp_path / "new" / "folder")
    again = load(tmp_path / "new" / "folder")
    assert again.layer_kinds == model.layer_kinds and again.dtype == model.dtype and again.mamba_config == model.mamba_config
    for key in model.names:
        a, b = model.raw(key), again.raw(key)
        assert a.dtype == b.dtype and a.tobytes() == b.tobytes(), key
    source = {file.name for file in DATA.joinpath(name).iterdir()}
    copied = {file.name for file in (tmp_path / "new" / "folder").iterdir()}
    assert copied >= source & {"mamba_config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    assert not [file for file in copied if file.endswith(".tmp")]
    config = json.loads((tmp_path / "new" / "folder" / "config.json").read_text())
    key = "dtype" if "dtype" in config else "torch_dtype"
    assert config[key] == model.dtype and config | {key: 0} == json.loads((DATA / name / "config.json").read_text()) | {key: 0}


@pytest.mark.parametrize("name", ["qwen2-sharded", "mamba2-bin", "llama3"])
def test_saving_over_the_folder_that_was_loaded(name, tmp_path):
    folder = copy(name, tmp_path)
    model = load(folder)
    norm = model.get("model.norm.weight") + 1
    model.set("model.norm.weight", norm)
    before = {key: model.raw(key) for key in model.names}
    for _ in range(2):
        save(model, folder)
        again = load(folder)
        assert all(again.raw(key).tobytes() == before[key].tobytes() for key in before)
    assert (again.get("model.norm.weight") == norm).all() and not (folder / "model.safetensors.index.json").exists()


def test_both_mixers_in_one_model(tmp_path):
    folder = copy("mamba1", tmp_path)
    arch = arch_of(folder)
    tensors = {name: np.array(array) for name, array in open_weights(folder).items() if "layers.0.mamba" not in name}
    kinds = ["mamba2", *arch["kinds"][1:]]
    mixed = architecture(json.loads((folder / "config.json").read_text()), mamba_config(CONFIG | {"num_hidden_layers": 4}, kinds) | {
        "d_inner": 128, "d_xb": 64, "rms_norm_eps": None})
    new = {name: np.ones(shape, "f4") for name, shape in shapes(mixed).items() if name not in tensors}
    write_weights(folder / "model.safetensors", tensors | new)
    model = load(folder)  # whose mamba_config.json says nothing of Mamba-2
    assert model.layer_kinds == kinds
    save(model, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "mamba_config.json").read_text())
    assert written["mixers"] == kinds and load(tmp_path / "out").layer_kinds == kinds


def test_a_failed_save_leaves_the_old_folder(tmp_path, monkeypatch):
    folder = copy("mamba2-fused-tied", tmp_path)
    model = load(folder)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="^cannot write [^ ]*: No space left on device$"):
        save(model, folder)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot make the folder"):
        save(model, tmp_path / "file" / "folder")


def test_a_loaded_model_needs_its_folder_no_more(tmp_path, monkeypatch):
    copy("llama3", tmp_path)
    monkeypatch.chdir(tmp_path)
    model = load("llama3")
    before = generate(model, [1, 2], max_new_tokens=4)
    assert model.stop_tokens == stop_tokens("llama3") != []
    (tmp_path / "else").mkdir()
    monkeypatch.chdir(tmp_path / "else")
    save(model, "new")  # the tokenizer's files are found from here too
    assert (tmp_path / "else" / "new" / "tokenizer.json").exists()
    shutil.rmtree(tmp_path / "llama3")
    assert [row.tokens for row in generate(model, [1, 2], max_new_tokens=4)] == [row.tokens for row in before]


@pytest.mark.parametrize("content, match", [("{", "not JSON"), ("[]", "an object"), ('{"eos_token_id": "x"}', "eos_token_id"),
                                            ('{"eos_token_id": [2, -1]}', "eos_token_id")])
def test_a_broken_generation_config_is_refused(tmp_path, content, match):
    folder = copy("llama3", tmp_path)
    (folder / "generation_config.json").write_text(content)
    assert "generation_config.json" in refused(match, load, folder)
    (folder / "generation_config.json").unlink()
    edit(folder, eos_token_id={"a": 1})
    assert "config.json" in refused("eos_token_id", load, folder)


def test_folders_that_cannot_be_loaded(tmp_path):
    refused("not a folder", load, tmp_path / "absent")
    refused("no config.json", load, tmp_path)
    folder = copy("mamba1", tmp_path)
    edit(folder, vocab_size=62)
    refused("embed_tokens.weight", load, folder)
    edit(folder, vocab_size=1 << 24, num_hidden_layers=10_000)  # nothing of that size is made
    edit(folder, "mamba_config.json", n_layer=10_000)
    refused("lacks 'model.layers.4.* and 1[0-9]{5} more", load, folder)
    edit(folder, vocab_size=61, num_hidden_layers=4)
    edit(folder, "mamba_config.json", n_layer=4)
    edit(folder, "mamba_config.json", attn_layers=[1])
    refused("self_attn", load, folder)
    (folder / "mamba_config.json").unlink()
    refused("unexpected .*mamba", load, folder)
    (folder / "config.json").write_text("{" + '"a":[' * 100_000)
    refused("not JSON", load, folder)
