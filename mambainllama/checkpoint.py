"""Model folders in Hugging Face layout: load (teachers and hybrids, both spellings of the tensors' names) and save.

Layout and names: formats of huggingface/transformers (Llama, Mistral, Qwen2, Qwen3) and jxiw/MambaInLlama, whose training code
and inference code spell a layer's tensors differently. What is written is the training spelling; files are in weights.py."""
import json
import os
import re
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from .config import architecture, mamba_config, read_folder, show
from .hub import fetch
from .tokenizer import Tokenizer, stop_tokens
from .weights import Weights, open_weights, replacing, write_weights

__all__ = ["Weights", "open_weights", "write_weights", "training_names", "shapes", "load", "save"]

HEAD, EMBED = "lm_head.weight", "model.embed_tokens.weight"
BUFFERS = ".rotary_emb."  # computed, yet in older files
COPIED = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
          "generation_config.json", "tokenizer.model", "vocab.json", "merges.txt")


def shapes(arch):
    """{name in the training spelling: shape} of every tensor that a file of this architecture holds; lm_head not if tied."""
    C, D, F = arch["width"], arch["inner"], arch["mlp"]
    E = arch["kv_heads"] * arch["head_dim"]
    H, P, R, N, W = arch["heads"], arch["head_dim"], arch["dt_rank"], 16, arch["conv"]
    mlp = {"gate_proj": (F, C), "up_proj": (F, C), "down_proj": (C, F)}
    projections = {"q_proj": (D, C), "k_proj": (E, C), "v_proj": (E, C), "o_proj": (C, D)}
    every = {"input_layernorm.weight": (C,), "post_attention_layernorm.weight": (C,)}
    every |= {f"mlp.{key}.weight": shape for key, shape in mlp.items()}
    every |= {f"mlp.{key}.bias": shape[:1] for key, shape in mlp.items() if arch["mlp_bias"]}
    attention = {f"self_attn.{key}.weight": shape for key, shape in projections.items()}
    attention |= {f"self_attn.{key}.bias": shape[:1] for key, shape in projections.items()
                  if arch["o_bias" if key == "o_proj" else "qkv_bias"]}
    if arch["qk_norm"]:
        attention |= {"self_attn.q_norm.weight": (P,), "self_attn.k_norm.weight": (P,)}
    mamba1 = {"in_proj_x.weight": (E, C), "in_proj_z.weight": (D, C), "B_proj.weight": (E, C), "C_proj.weight": (D, C),
              "dt_proj_down.weight": (R, C), "dt_proj.weight": (D, R), "dt_proj.bias": (D,), "conv1d.weight": (D, 1, W),
              "conv1d.bias": (D,), "A_log": (D, N), "D": (D,), "out_proj.weight": (C, D)}
    mamba2 = {"in_proj.weight": (2 * D + 2 * E + H, C), "conv1d.weight": (D + 2 * E, 1, W), "conv1d.bias": (D + 2 * E,),
              "dt_bias": (H,), "A_log": (H,), "D": (H,), "norm.weight": (D,), "out_proj.weight": (C, D)}
    mixers = {"attention": attention, "mamba1": {f"mamba.{key}": shape for key, shape in mamba1.items()},
              "mamba2": {f"mamba.{key}": shape for key, shape in mamba2.items()}, "window": attention, "identity": {}}
    out = {EMBED: (arch["vocab"], C)}
    for i, kind in enumerate(arch["kinds"]):
        out |= {f"model.layers.{i}.{key}": shape for key, shape in (every | mixers[kind]).items()}
    out["model.norm.weight"] = (C,)
    if not arch["tied"]:
        out[HEAD] = (arch["vocab"], C)
    return out


def fused_rows(arch):
    """{kind of layer: {fused name: {training name: its rows, in order}}}: what inference trees keep in one matrix."""
    D, E = arch["inner"], arch["kv_heads"] * arch["head_dim"]
    attention = {"mha.in_proj": {"self_attn.q_proj": D, "self_attn.k_proj": E, "self_attn.v_proj": E},
                 "mha.out_proj": {"self_attn.o_proj": arch["width"]}}
    return {"attention": attention, "window": attention, "identity": {},
            "mamba1": {"mamba.in_proj": {"mamba.in_proj_z": D, "mamba.in_proj_x": E, "mamba.B_proj": E, "mamba.C_proj": D,
                                         "mamba.dt_proj_down": arch["dt_rank"]}},
            "mamba2": {}}


def training_names(weights, arch):
    """The tensors of `weights` under their training names, exactly those of shapes(arch), as Weights of row slices; none is read.

    The fused spelling of inference trees is split: mha.in_proj rows [q; k; v], Mamba-1's mamba.in_proj rows [z; x; B; C; dt].
    ValueError, one sentence with names: tensors missing, unexpected or of another shape, a tied lm_head that differs."""
    rows, out, unexpected, expected = fused_rows(arch), Weights(weights.where), [], shapes(arch)
    for name in weights:
        layer, key, form = _split(name)
        parts = rows[arch["kinds"][layer]].get(key) if layer is not None and layer < arch["layers"] else None
        array, dtype = weights[name], weights.dtype(name)
        if parts is not None:
            if array.ndim == 0 or array.shape[0] != sum(parts.values()):
                raise ValueError(f"{weights.where}: {name} has the shape {array.shape}, expected {sum(parts.values())} rows")
            begin = 0
            for part, n in parts.items():
                full = f"model.layers.{layer}.{part}.{form}"
                if full in weights:
                    raise ValueError(f"{weights.where}: {full} is there twice, by itself and within {name}")
                if full in expected:
                    out.add(full, dtype, array[begin : begin + n])
                begin += n
            if f"model.layers.{layer}.{part}.{form}" not in expected:
                unexpected.append(name)
        elif name in expected:
            out.add(name, dtype, array)
        elif BUFFERS not in name and not (name == HEAD and arch["tied"]):
            unexpected.append(name)
    missing = [name for name in expected if name not in out]
    if missing or unexpected:
        lists = [f"{word} {_list(names)}" for word, names in (("lacks", missing), ("has the unexpected", unexpected)) if names]
        raise ValueError(f"{weights.where} does not fit its config.json: it {' and '.join(lists)}")
    wrong = [f"{name} {out[name].shape} instead of {shape}" for name, shape in expected.items() if out[name].shape != shape]
    if wrong:
        raise ValueError(f"{weights.where} does not fit its config.json: it has {_list(wrong, str)}")
    if arch["tied"] and HEAD in weights and not _same(weights, HEAD, EMBED):
        raise ValueError(f"{weights.where}: {HEAD} differs from {EMBED}, although config.json ties them (tie_word_embeddings)")
    return out


def _split(name):
    """model.layers.3.mha.in_proj.weight -> (3, "mha.in_proj", "weight"); (None, …) outside the layers."""
    found = re.fullmatch(r"model\.layers\.(0|[1-9][0-9]{0,8})\.(.+)\.(weight|bias)", name)
    return (int(found[1]), found[2], found[3]) if found else (None, None, None)


def _list(names, form=show):
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(form(name) for name in names[:5]) + more


def _same(weights, a, b):
    x, y = weights[a], weights[b]
    if weights.dtype(a) != weights.dtype(b) or x.shape != y.shape:
        return False
    return all(x[i : i + 1024].tobytes() == y[i : i + 1024].tobytes() for i in range(0, len(x), 1024))


def _mixers(weights, kinds):
    """kinds with each Mamba layer's mixer as its tensors' names show it."""
    signs = {"mamba2": "dt_bias", "mamba1": "dt_proj.weight"}
    found = [[mixer for mixer, sign in signs.items() if f"model.layers.{i}.mamba.{sign}" in weights] for i in range(len(kinds))]
    return [kind if kind == "attention" or not mixers else mixers[0] for kind, mixers in zip(kinds, found)]


def load(folder, device="cpu", dtype=None):
    """The Model in a folder: config.json, mamba_config.json for a hybrid, weights in safetensors or pytorch_model.bin. "org/name" that is no
    folder, and "org/name@revision", is the hub's model of that name, downloaded once (hub.fetch).

    dtype: "float32", "bfloat16" or None, as stored: bfloat16 if every matrix is BF16, else float32 (F16 becomes float32).
    ValueError in one sentence: no such folder, an unsupported architecture, tensors missing, unexpected or misshapen, files
    that are broken or hostile. Everything is checked before the model is made."""
    from .model import Model  # here: reading files needs no extension module

    folder = Path(fetch(folder))
    config, mamba = read_folder(folder)
    weights = open_weights(folder)
    mixer = None
    if mamba is not None and mamba.get("mixers") is None:
        mixer = "mamba2" if any(name.endswith(".mamba.dt_bias") for name in weights) else None
    arch = architecture(config, mamba, mixer)
    if mamba is not None:
        mamba = mamba_config(config, _mixers(weights, arch["kinds"]), mamba)
        arch = architecture(config, mamba)
    tensors = training_names(weights, arch)
    for name in tensors:
        if tensors.dtype(name) not in ("F32", "BF16", "F16"):
            raise ValueError(f"{weights.where}: {name} is stored as {tensors.dtype(name)}, expected F32, BF16 or F16")
    if dtype is None:
        matrices = [name for name in tensors if name.endswith(".weight") and tensors[name].ndim == 2]
        dtype = "bfloat16" if all(tensors.dtype(name) == "BF16" for name in matrices) else "float32"
    tokenizer, stops = Tokenizer.from_folder(folder), stop_tokens(folder)
    model = Model(config, mamba, device=device, dtype=dtype)
    for name in model.names:
        if name in tensors:  # not a tied lm_head
            array = tensors[name].astype(np.float32) if tensors.dtype(name) == "F16" else tensors[name]
            model.set(name, np.require(array, requirements=["C", "ALIGNED"]))
    model.folder, model.tokenizer, model.stop_tokens = os.path.abspath(folder), tokenizer, stops
    return model


class _Stored(Mapping):
    """A model's tensors as they are stored, fetched one at a time; a tied lm_head is embed_tokens and not among them."""

    def __init__(self, model):
        self.model = model
        tied = model.config.get("tie_word_embeddings")
        self.names = [name for name in model.names if not (tied and name == HEAD)]

    def __getitem__(self, name):
        return self.model.raw(name)

    def __iter__(self):
        return iter(self.names)

    def __len__(self):
        return len(self.names)


def save(model, folder):
    """Writes a folder that load reads back to the same bits: config.json, mamba_config.json for a hybrid, safetensors, and the
    tokenizer's and generation's files of the folder that the model came from, which may be this one.

    All is written under temporary names and renamed at the end, the weights just before the configs: killed before that, the old
    model is whole. OSError in one sentence: it cannot be written (the old files stay)."""
    write_folder(model, folder, model.config, model.mamba_config, _Stored(model))


def write_folder(model, folder, config, mamba, tensors, write=write_weights, file="model.safetensors"):
    """As save, with these contents of config.json, of mamba_config.json (None: no such file) and of the weights' file."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"cannot make the folder {folder}: {error.strerror}") from None
    config = dict(config)
    for key in ("dtype", "torch_dtype"):
        if key in config or key == "torch_dtype" and "dtype" not in config:
            config[key] = str(model.dtype)
    with ExitStack() as stack:  # closed in reverse: config.json, without which there is no model, comes last
        for name, content in (("config.json", config), ("mamba_config.json", mamba)):
            if content:
                handle = stack.enter_context(replacing(folder / name))
                handle.write(json.dumps(content, indent=2).encode())
                handle.flush()
        _copy([model.tokenizer and model.tokenizer.folder, model.folder], folder)
        write(folder / file, tensors)
        if not mamba:
            (folder / "mamba_config.json").unlink(missing_ok=True)


def _copy(sources, folder):
    for name in COPIED:
        path = next((Path(source) / name for source in sources if source and (Path(source) / name).is_file()), None)
        if path is not None and os.path.realpath(path) != os.path.realpath(folder / name):
            with replacing(folder / name) as file, open(path, "rb") as old:
                shutil.copyfileobj(old, file)
