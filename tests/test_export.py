"""Exports: what the original's layouts hold is read back to the same bits; FalconH1 gives transformers' logits; vLLM's plug-in finds all that
it looks for."""
import json
import math
import shutil
from pathlib import Path

import mambainllama as mil
import numpy as np
import pytest
from conftest import same
from mambainllama.cli import main
from mambainllama.config import architecture
from mambainllama.weights import open_weights

DATA = Path(__file__).parent / "data"
CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 3,
          "num_attention_heads": 6, "num_key_value_heads": 2, "vocab_size": 61, "rms_norm_eps": 1e-5, "initializer_range": 0.3,
          "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
IDS = np.random.default_rng(0).integers(0, 61, (2, 40))
# of the original's MambaConfig, which takes no others
KNOWN = {"d_model", "ssm_cfg", "rms_norm_eps", "vocab_size", "d_inner", "d_xb", "intermediate_size", "hidden_act", "n_layer", "attn_layers"}


def hybrid(mixer="mamba2", dtype="float32", mamba_layers=(0, 2), **changes):
    """A random hybrid whose norms, biases and skips are not their initial ones."""
    model = mil.convert(mil.random(CONFIG | changes, seed=1, dtype=dtype), mamba_layers=mamba_layers, mixer=mixer, init="random", seed=2)
    rng = np.random.default_rng(3)
    for name, shape in model.names.items():
        if "norm" in name or name.endswith(("bias", ".D")):
            model.set(name, model.get(name) + rng.normal(size=shape).astype("f4") * 0.3)
    return model


def read(folder, name="config.json"):
    return json.loads((folder / name).read_text())


@pytest.mark.parametrize("bin", [False, True])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", ["mamba1", "mamba2-fused-tied", "bf16"])
def test_original_is_read_to_the_same_bits(tmp_path, name, fused, bin):
    model = hybrid("mamba1", "bfloat16") if name == "bf16" else mil.load(DATA / name)
    mil.save(model, tmp_path)  # another format of weights there must not win
    mil.export(model, tmp_path, "original", fused, bin, base="org/teacher")
    again = mil.load(tmp_path)
    assert again.dtype == model.dtype and again.names == model.names and again.layer_kinds == model.layer_kinds
    assert all(same(again.raw(name), model.raw(name)) for name in model.names)
    assert same(again.logits(IDS), model.logits(IDS))
    names = set(open_weights(tmp_path))
    assert any(".mha.in_proj." in name for name in names) == fused and "lm_head.weight" in names
    assert (tmp_path / "pytorch_model.bin").exists() == bin != (tmp_path / "model.safetensors").exists()
    assert set(read(tmp_path, "mamba_config.json")) == KNOWN and read(tmp_path)["_name_or_path"] == "org/teacher"


def test_original_without_scaling_of_attention(tmp_path):
    model = hybrid(rope_scaling=LLAMA3)
    model._mamba_config = model.mamba_config | {"attn_rope": "plain"}
    mil.save(model, tmp_path / "a")
    mil.export(mil.load(tmp_path / "a"), tmp_path / "b", "original")
    assert same(mil.load(tmp_path / "a").logits(IDS), mil.load(tmp_path / "b").logits(IDS))
    assert not same(hybrid(rope_scaling=LLAMA3).logits(IDS), mil.load(tmp_path / "b").logits(IDS))


@pytest.mark.parametrize("mixer", ["mamba1", "mamba2"])
def test_vllm_folder_has_what_the_plug_in_reads(tmp_path, mixer):
    model = hybrid(mixer, tie_word_embeddings=True, rope_parameters=LLAMA3 | {"rope_theta": 5e4})
    mil.export(model, tmp_path, "vllm")
    config, mamba, weights = read(tmp_path), read(tmp_path, "mamba_config.json"), open_weights(tmp_path)
    assert config["rope_theta"] == 5e4 and config["rope_scaling"] == LLAMA3 and config["tie_word_embeddings"] is False
    assert config["model_type"] == "mambainllama_mamba" and config["mamba_version"] == mamba["mamba_version"] == mixer.title()
    assert mamba["attn_layers"] == [1] and config["ssm_cfg"] == mamba["ssm_config"] == mamba["ssm_cfg"]
    assert same(weights["lm_head.weight"], weights["model.embed_tokens.weight"])
    if mixer == "mamba2":
        sizes = [mamba["mamba_intermediate_size"]] * 2 + [mamba["n_groups"] * mamba["ssm_state_size"]] * 2 + [mamba["num_heads"]]
        assert config["mamba_n_groups"] == mamba["n_groups"] and config["mamba_head_dim"] == mamba["head_dim"]
    else:
        sizes = [mamba["d_inner"], mamba["d_xb"], mamba["d_xb"], mamba["d_inner"], math.ceil(mamba["d_model"] / 16)]
    for i in (0, 2):
        rows = np.split(weights[f"model.layers.{i}.mamba.in_proj.weight"], np.cumsum(sizes))
        assert [len(part) for part in rows] == [*sizes, 0]
        if mixer == "mamba1":
            parts = ["in_proj_z", "in_proj_x", "B_proj", "C_proj", "dt_proj_down"]
            assert all(same(part, model.raw(f"model.layers.{i}.mamba.{name}.weight")) for part, name in zip(rows, parts))
        else:  # head h of x is that of kv head h // 3
            ours = model.raw(f"model.layers.{i}.mamba.in_proj.weight")
            assert all(same(rows[1][8 * h : 8 * h + 8], ours[48 + 8 * (h // 3) :][:8]) for h in range(6))
            assert all(same(rows[2][8 * h : 8 * h + 8], ours[64 + 8 * (h // 3) :][:8]) for h in range(6))
            assert len(weights[f"model.layers.{i}.mamba.conv1d.bias"]) == sum(sizes[1:4])
    if mixer == "mamba2":  # what FalconH1, whose logits transformers confirms, has of these layers
        mil.export(model, tmp_path / "falcon", "falcon-h1")
        falcon, names = open_weights(tmp_path / "falcon"), [name for name in weights if ".mamba." in name]
        assert len(names) == 16 and all(same(weights[name], falcon[name]) for name in names)


def test_vllm_adds_the_bias_of_dt_twice(tmp_path):
    model = hybrid("mamba1")
    model._mamba_config = model.mamba_config | {"dt_bias_twice": False}
    mil.export(model, tmp_path, "vllm")
    name = "model.layers.0.mamba.dt_proj.bias"
    assert same(open_weights(tmp_path)[name] * 2, model.raw(name))


def test_what_a_layout_cannot_hold_is_named(tmp_path, capsys):
    out = tmp_path / "out"
    cases = [
        ("falcon-h1", hybrid(rms_norm_eps=1e-6), "rms norm eps: it is 1e-06"), ("vllm", hybrid(rms_norm_eps=1e-6), "rms norm eps"),
        ("falcon-h1", hybrid("mamba1"), "Mamba 1"), ("vllm", hybrid(mamba_layers=[]), "none"),
        ("vllm", hybrid("window", sliding_window=None), "has window"),
        ("falcon-h1", hybrid(architectures=None, model_type="qwen3", head_dim=8), "q and k norms"),
        ("falcon-h1", hybrid(architectures=None, model_type="mistral", sliding_window=9), "sliding window"),
        ("vllm", hybrid(attention_bias=True), "qkv biases"), ("vllm", hybrid(head_dim=16), "head dim: it is 16"),
        ("vllm", hybrid(rope_scaling={"type": "dynamic", "factor": 2.0}), "dynamic RoPE"), ("gguf", hybrid(), "expected one of 'vllm'"),
    ]
    for to, model, match in cases:
        with pytest.raises(ValueError, match=match):
            mil.export(model, out, to)
        assert not out.exists()
    with pytest.raises(ValueError, match="original"):
        mil.export(hybrid(), out, "vllm", fused=True)
    shutil.copytree(DATA / "mamba2-fused-tied", tmp_path / "model")
    assert main(["export", str(tmp_path / "model"), str(out), "--to", "falcon-h1"]) == 2
    assert "1e-05 of Mamba-2's gated norm" in capsys.readouterr().err and not out.exists()
    assert main(["export", str(tmp_path / "model"), str(out), "--to", "original", "--fused", "--bin"]) == 0
    assert mil.load(out).layer_kinds == mil.load(tmp_path / "model").layer_kinds


# ---- where they are meant to go ------------------------------------------------------------------------------------------------

FALCONS = {
    "llama, llama3 scaling, untied": dict(rope_scaling=LLAMA3), "llama, tied, biases": dict(tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
    "qwen2, biases of q, k and v alone": dict(architectures=["Qwen2ForCausalLM"], model_type="qwen2"),
    "head_dim 16, yarn": dict(head_dim=16, rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}),
    "no attention": dict(mamba_layers=(0, 1, 2)),
}


@pytest.mark.parity
@pytest.mark.parametrize("name", FALCONS)
def test_falcon_h1_in_transformers(tmp_path, name):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    model = hybrid(**FALCONS[name])
    mil.export(model, tmp_path, "falcon-h1")
    theirs, found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, output_loading_info=True)
    assert type(theirs).__name__ == "FalconH1ForCausalLM" and not any(found.values())
    theirs.eval()
    with torch.no_grad():
        expected = theirs(torch.tensor(IDS), use_cache=False).logits.numpy()
    got = model.logits(IDS)
    assert np.linalg.norm(got - expected) < 1e-5 * np.linalg.norm(expected) and np.abs(got - expected).max() < 1e-4
    tokens = theirs.generate(torch.tensor(IDS[:1, :9]), max_new_tokens=12, do_sample=False, eos_token_id=None)[0, 9:].tolist()  # its cached path
    assert mil.generate(model, [IDS[0, :9].tolist()], max_new_tokens=12, stop_tokens=[])[0].tokens == tokens


@pytest.mark.parity
@pytest.mark.parametrize("fused", [False, True])
def test_bin_is_read_by_torch(tmp_path, fused):
    torch = pytest.importorskip("torch")
    model = hybrid("mamba1", "bfloat16")
    mil.export(model, tmp_path, "original", fused, bin=True)
    theirs, ours = torch.load(tmp_path / "pytorch_model.bin", weights_only=True), open_weights(tmp_path)
    assert set(theirs) == set(ours)
    for name, tensor in theirs.items():
        bits = tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor
        assert same(bits.numpy(), ours[name])


@pytest.mark.parity
@pytest.mark.parametrize("mixer", ["mamba1", "mamba2"])
def test_what_vllm_plug_in_loads_computes_the_same(tmp_path, mixer, monkeypatch):
    """The plug-in's own load_weights, with parameters that note what they are given, and float64 layers on these: MambaMixer2 with n_groups =
    num_heads, the plug-in's Mamba-1. vLLM itself, which needs a GPU, is not there (pip install --no-deps qwerky-vllm-models einops)."""
    torch = pytest.importorskip("torch")
    plug_in = pytest.importorskip("qwerky_vllm_models.modeling.model")
    import torch_hybrid
    from qwerky_vllm_models.configuration import MambaInLlamaMambaConfig
    model = hybrid(mixer, tie_word_embeddings=True)
    mil.export(model, tmp_path, "vllm")
    config, weights = MambaInLlamaMambaConfig.from_pretrained(tmp_path), open_weights(tmp_path)
    D, C, E, F = config.d_inner, config.d_model, config.d_xb, config.intermediate_size
    shapes = {"lm_head.weight": (61, C), "model.embed_tokens.weight": (61, C), "model.norm.weight": (C,)}
    for i in range(3):
        layer = {"input_layernorm.weight": (C,), "post_attention_layernorm.weight": (C,), "mlp.gate_up_proj.weight": (2 * F, C), "mlp.down_proj.weight": (C, F)}
        if i in config.attn_layers:
            layer |= {"self_attn.qkv_proj.weight": (D + 2 * E, C), "self_attn.o_proj.weight": (C, D)}
        else:
            layer |= {"mamba.in_proj.weight": (2 * D + 2 * E + C // 16, C), "mamba.conv1d.weight": (D, 1, 4), "mamba.conv1d.bias": (D,), "mamba.A": (D, 16),
                      "mamba.D": (D,), "mamba.dt_proj.weight": (D, C // 16), "mamba.dt_proj.bias": (D,), "mamba.out_proj.weight": (C, D)}
            if mixer == "mamba2":
                H, X = config.mamba_num_heads, D + 2 * config.mamba_n_groups * config.ssm_state_size
                layer |= {"mamba.in_proj.weight": (D + X + H, C), "mamba.conv1d.weight": (X, 1, 4), "mamba.conv1d.bias": (X,), "mamba.A": (H,), "mamba.D": (H,),
                          "mamba.dt_bias": (H,), "mamba.norm.weight": (D,)}
                del layer["mamba.dt_proj.weight"], layer["mamba.dt_proj.bias"]
        shapes |= {f"model.layers.{i}.{key}": shape for key, shape in layer.items()}
    parameters, given = {name: torch.nn.Parameter(torch.empty(shape)) for name, shape in shapes.items()}, {}
    for name, parameter in parameters.items():
        given[name] = []
        parameter.weight_loader = lambda parameter, tensor, part=None, name=name: given[name].append((part, tensor))
    monkeypatch.setattr(plug_in, "default_weight_loader", None, raising=False)

    class Holder:
        def named_parameters(self):
            return parameters.items()

    Holder.config = config
    tensors = ((name, torch.from_numpy(np.array(weights[name]))) for name in weights)
    assert plug_in.MambaInLlamaMambaForCausalLMNative.load_weights(Holder(), tensors) == set(shapes)
    for name, parts in given.items():
        assert sum(len(tensor) for _, tensor in parts) == shapes[name][0] and all(t.shape[1:] == shapes[name][1:] for _, t in parts), name
    places, loaded = {"gate_up_proj": ["gate_proj", "up_proj"], "in_proj": ["in_proj_z", "in_proj_x", "B_proj", "C_proj", "dt_proj_down"]}, {}
    for name, parts in given.items():
        for part, tensor in parts:
            group = name.split(".")[-2]
            to = name if part is None else name.replace(group, f"{part}_proj" if group == "qkv_proj" else places[group][part])
            loaded[to + "_log" if to.endswith(".A") else to] = tensor.double()
    kinds = ["attention" if i in config.attn_layers else mixer for i in range(3)]
    arch = architecture(model.config) | {"kinds": kinds, "norm_eps": config.rms_norm_eps, "eps": config.rms_norm_eps, "heads": config.num_attention_heads}
    second = torch_hybrid.mamba2
    monkeypatch.setitem(torch_hybrid.MIXERS, "mamba2", lambda p, u, c: second(p, u, c | {"kv_heads": config.mamba_n_groups, "heads": config.mamba_num_heads}))
    arch["inv_freq"] = torch.tensor(arch["inv_freq"])
    expected, got = torch_hybrid.logits(loaded, torch.tensor(IDS), arch).numpy(), model.logits(IDS)
    assert np.linalg.norm(got - expected) < 1e-5 * np.linalg.norm(expected)
