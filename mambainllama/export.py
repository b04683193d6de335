"""Models in the layouts of other programs: vLLM's plug-in, transformers' FalconH1, the original code of the paper.

Each holds the function that mil computes, tensors only split, joined, repeated or zero; what a target cannot say is refused by name.
Read from: qwerky-vllm-models 0.2.71 (modeling/model.py, load_weights; modeling/layers.py), huggingface/transformers
models/falcon_h1/modeling_falcon_h1.py, jxiw/MambaInLlama {mamba,mamba2}{,_inference}/hybrid_wrapper.py."""
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np

from .checkpoint import EMBED, HEAD, fused_rows, shapes, write_folder
from .config import CONV, MAMBAS, SCAN_STATE, architecture, show
from .weights import write_torch, write_weights

TARGETS = ("vllm", "falcon-h1", "original")


def export(model, folder, to, fused=False, bin=False, base=None):
    """Writes `model`, a hybrid, to a folder that another program loads; the tokenizer's files come along.

    to "vllm": what `vllm serve` reads with the plug-in qwerky-vllm-models: fused names, a Mamba-2 layer's x and B repeated to as many heads
    as C has.  "falcon-h1": transformers' FalconH1ForCausalLM, for Mamba-2: each of its layers runs attention and Mamba-2 side by side, and the
    one that this model lacks is zero.  "original": jxiw/MambaInLlama, which load reads to the same bits; fused: as its inference code spells
    the names; bin: pytorch_model.bin, which it wants of models on the hub; base: the model that it loads first (default: config.json's
    _name_or_path, else the folder itself).
    ValueError in one sentence, nothing written: a layout that cannot say what this model computes, which it names.
    """
    if to not in TARGETS:
        raise ValueError(f"to is {show(to)}, expected one of {', '.join(map(repr, TARGETS))}")
    for name, value in (("fused", fused), ("bin", bin), ("base", base)):
        if value and to != "original":
            raise ValueError(f"{name} is for to='original' alone")
    arch = architecture(model.config, model.mamba_config)
    mixers = {kind for kind in arch["kinds"] if kind != "attention"}
    if len(mixers) != 1 or not mixers <= set(MAMBAS):
        raise ValueError(f"{to} takes models with one kind of Mamba layers beside attention, and this one has {' and '.join(sorted(mixers)) or 'none'}")
    mixer = mixers.pop()
    if to == "vllm":
        config, mamba, tensors = _vllm(model, arch, mixer)
    elif to == "falcon-h1":
        config, mamba, tensors = _falcon(model, arch, mixer)
    else:
        config, mamba, tensors = _original(model, arch, fused, base or model.config.get("_name_or_path") or str(folder))
    if bin:
        return write_folder(model, folder, config, mamba, _Made(tensors), write_torch, "pytorch_model.bin")
    write_folder(model, folder, config, mamba, _Made(tensors), write_weights)
    (Path(folder) / "pytorch_model.bin").unlink(missing_ok=True)  # which the original prefers


class _Made(Mapping):
    """Tensors that are made when they are asked for: name -> function."""

    def __init__(self, made):
        self.made = made

    def __getitem__(self, name):
        return self.made[name]()

    def __iter__(self):
        return iter(self.made)

    def __len__(self):
        return len(self.made)


def _refuse(where, **reasons):
    found = [f"{name.replace('_', ' ')}: {reason}" for name, reason in reasons.items() if reason]
    if found:
        raise ValueError(f"{where} cannot hold this model ({'; '.join(found)})")


def _one_eps(arch, mixer):
    if mixer == "mamba2" and arch["eps"] != arch["norm_eps"]:
        return f"it is {arch['eps']:g}, and the target has one for all norms, which must be the {arch['norm_eps']:g} of Mamba-2's gated norm"


def _rope(config, arch_rope):
    """rope_theta and rope_scaling, the spelling that every version of transformers reads."""
    settings = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    theta = settings.pop("rope_theta", None) or config.get("rope_theta") or 10000.0
    kind = settings.setdefault("rope_type", settings.pop("type", "default"))
    original = config.get("original_max_position_embeddings")
    if original is not None:
        settings["original_max_position_embeddings"] = original
    return {"rope_theta": theta, "rope_scaling": None if kind == "default" or arch_rope == "plain" else settings}


def _shared(model, arch):
    """What config.json says in each layout."""
    config = model.config
    return {
        "vocab_size": arch["vocab"], "hidden_size": arch["width"], "intermediate_size": arch["mlp"], "num_hidden_layers": arch["layers"],
        "num_attention_heads": arch["heads"], "num_key_value_heads": arch["kv_heads"], "head_dim": arch["head_dim"], "hidden_act": "silu",
        "rms_norm_eps": arch["eps"], "max_position_embeddings": config.get("max_position_embeddings", 2048),
        **_rope(config, model.mamba_config.get("attn_rope")), "torch_dtype": str(model.dtype),
        **{key: config.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")},
    }


def _joined(model, arch, kinds):
    """{name: function} of the tensors, those of the layers in `kinds` in the fused spelling; lm_head always."""
    names, parts = list(shapes(arch)), fused_rows(arch)
    out = {name: partial(model.raw, name) for name in names}
    for i, kind in enumerate(arch["kinds"]):
        for fused, rows in parts[kind].items() if kind in kinds else ():
            of = [f"model.layers.{i}.{part}.weight" for part in rows]
            for name in of:
                del out[name]
            out[f"model.layers.{i}.{fused}.weight"] = lambda of=of: np.concatenate([model.raw(name) for name in of])
    out.setdefault(HEAD, partial(model.raw, EMBED))
    return out


def _whole(model, name, arch):
    """A Mamba-2 tensor whose rows [(z) x; B; C (dt)] have x and B repeated to a head each."""
    array, E, P = model.raw(name), arch["kv_heads"] * arch["head_dim"], arch["head_dim"]
    first = arch["inner"] if name.endswith("in_proj.weight") else 0
    groups = array[first : first + 2 * E].reshape(2 * arch["kv_heads"], P, *array.shape[1:])
    groups = np.repeat(groups, arch["heads"] // arch["kv_heads"], axis=0)
    return np.concatenate([array[:first], groups.reshape(-1, *array.shape[1:]), array[first + 2 * E :]])


def _spread(model, arch, tensors):
    """Replaces what _whole changes."""
    for name in tensors:
        if ".mamba." in name and name.split(".mamba.")[1] in ("in_proj.weight", "conv1d.weight", "conv1d.bias"):
            tensors[name] = partial(_whole, model, name, arch)


def _vllm(model, arch, mixer):
    mamba = model.mamba_config
    attention = "attention" in arch["kinds"]
    _refuse("the layout of vLLM's plug-in",
            qkv_biases=arch["qkv_bias"] and attention and "it does not load them", MLP_biases=arch["mlp_bias"] and "it does not load them",
            q_and_k_norms=arch["qk_norm"] and attention and "it has none", sliding_window=any(arch["window"]) and "it has none",
            head_dim=arch["inner"] != arch["width"] and f"it is {arch['head_dim']}, and the plug-in takes hidden_size / num_attention_heads",
            dynamic_RoPE="vLLM fixes the length" if (_rope(model.config, mamba.get("attn_rope"))["rope_scaling"] or {}).get(
                "rope_type") == "dynamic" else None,
            rms_norm_eps=_one_eps(arch, mixer))
    tensors = _joined(model, arch, ("attention", "mamba1"))
    sizes = {key: mamba[key] for key in ("attn_layers", "d_model", "d_inner", "d_xb")}
    cfg = mamba["ssm_cfg"] | {"d_conv": CONV, "d_state": arch["head_dim"] if mixer == "mamba2" else SCAN_STATE}
    version = {"mamba_version": "Mamba2" if mixer == "mamba2" else "Mamba1", "ssm_cfg": cfg, "ssm_config": cfg}
    config, second = {}, {}
    if mixer == "mamba2":
        second = {"d_conv": CONV, "ssm_state_size": arch["head_dim"], "mamba_intermediate_size": arch["inner"]}
        heads = {"n_groups": arch["heads"], "num_heads": arch["heads"], "head_dim": arch["head_dim"]}
        config, second = second | {f"mamba_{key}": value for key, value in heads.items()}, second | heads
        _spread(model, arch, tensors)
    elif not arch["dt_bias_twice"]:  # the plug-in adds it twice
        for name in tensors:
            if name.endswith("dt_proj.bias"):
                tensors[name] = lambda name=name: model.raw(name) / 2
    config |= _shared(model, arch) | sizes | version
    config |= {"architectures": ["QwerkyMamba2HybridForCausalLM" if second else "MambaInLlamaMambaForCausalLM"],
               "model_type": "mambainllama_mamba", "tie_word_embeddings": False}
    return config, mamba | version | second, tensors


def _falcon(model, arch, mixer):
    E, D, C, H = arch["kv_heads"] * arch["head_dim"], arch["inner"], arch["width"], arch["heads"]
    _refuse("FalconH1", Mamba_1="its layers are Mamba-2" if mixer == "mamba1" else None,
            q_and_k_norms=arch["qk_norm"] and "it has none", sliding_window=any(arch["window"]) and "it has none",
            rms_norm_eps=_one_eps(arch, mixer))
    tensors = _joined(model, arch, ())
    if arch["tied"]:
        del tensors[HEAD]
    _spread(model, arch, tensors)
    bias = arch["qkv_bias"] or arch["o_bias"]
    projections = {"q_proj": (D, C), "k_proj": (E, C), "v_proj": (E, C), "o_proj": (C, D)}
    every = {f"self_attn.{key}.weight": shape for key, shape in projections.items()}
    every |= {f"self_attn.{key}.bias": shape[:1] for key, shape in projections.items() if bias}
    every |= {"mamba.in_proj.weight": (4 * D + H, C), "mamba.conv1d.weight": (3 * D, 1, CONV), "mamba.conv1d.bias": (3 * D,),
              "mamba.dt_bias": (H,), "mamba.A_log": (H,), "mamba.D": (H,), "mamba.norm.weight": (D,), "mamba.out_proj.weight": (C, D)}
    stored = np.uint16 if model.dtype == "bfloat16" else np.float32
    for i in range(arch["layers"]):
        for key, shape in every.items():
            tensors.setdefault(f"model.layers.{i}.{key}", partial(np.zeros, shape, stored if len(shape) == 2 else np.float32))
    renamed = {"post_attention_layernorm": "pre_ff_layernorm", ".mlp.": ".feed_forward.", "model.norm.": "model.final_layernorm."}
    for old, new in renamed.items():
        tensors = {name.replace(old, new): made for name, made in tensors.items()}
    return _shared(model, arch) | {
        "architectures": ["FalconH1ForCausalLM"], "model_type": "falcon_h1", "tie_word_embeddings": bool(arch["tied"]),
        "attention_bias": bool(bias), "mlp_bias": bool(arch["mlp_bias"]), "projectors_bias": False,
        "mamba_d_ssm": D, "mamba_n_heads": H, "mamba_d_head": arch["head_dim"], "mamba_n_groups": H, "mamba_d_state": arch["head_dim"],
        "mamba_d_conv": CONV, "mamba_expand": 1, "mamba_conv_bias": True, "mamba_proj_bias": False, "mamba_rms_norm": True,
        "mamba_norm_before_gate": False,
    }, None, tensors


def _original(model, arch, fused, base):
    mamba = model.mamba_config
    known = {"dt_bias_twice": "the original adds it twice", "norm_eps": "the original has 1e-05"}
    _refuse("the original's layout", **{key: reason for key, reason in known.items() if key in mamba},
            biases_of_attention=fused and arch["qkv_bias"] and "the fused spelling has none")
    config = model.config | {"_name_or_path": base}
    if (plain := mamba.pop("attn_rope", None)) == "plain":
        config |= {"rope_parameters": None, **_rope(config, plain)}
    return config, mamba, _joined(model, arch, ("attention", "mamba1") if fused else ())
