"""What a model folder holds, from its files alone: nothing is computed and no weights are read."""
import os
from collections import Counter
from math import prod

from .checkpoint import open_weights, shapes, training_names
from .config import architecture, read_folder
from .hub import fetch
from .model import fits
from .tokenizer import Tokenizer, stop_tokens


def describe(folder):
    """A dict of plain values, as `mambainllama info --json` prints it:

    architecture              config.json's model_type
    layers                    {"attention" | "mamba1" | "mamba2" | "window" | "identity": layer numbers}
    parameters                how many numbers the weights hold, a tied lm_head once
    bytes                     {"F32" | "BF16" | "F16": bytes of the tensors stored so}
    kv_bytes_per_token        K and V rows of all attention layers, float32
    window                    None, or the tokens that an attention layer keeps K and V of where that is bounded
    state_bytes_per_sequence  SSM states and conv windows of all Mamba layers, K and V of all window layers (of a window and the sinks
                              each), float32, whatever the length
    windows, sinks            tokens that window layers see: the last so many, one number a window layer, and the first so many
    vocab_size, stop_tokens
    chat_template             None: no tokenizer; else whether it has a template
    files                     {name: bytes}

    ValueError in one sentence for what `load` refuses too: no such folder, another architecture, tensors that do not fit."""
    folder = fetch(folder)
    config, mamba = read_folder(folder)
    weights = open_weights(folder)
    mixer = "mamba2" if mamba is not None and any(name.endswith(".mamba.dt_bias") for name in weights) else None
    arch = architecture(config, mamba, mixer)
    tensors = training_names(weights, arch)
    tokenizer = Tokenizer.from_folder(folder)
    stored, layers = {}, {}
    for name, array in tensors.items():
        stored[tensors.dtype(name)] = stored.get(tensors.dtype(name), 0) + array.nbytes
    for i, kind in enumerate(arch["kinds"]):
        layers.setdefault(kind, []).append(i)
    return {
        "architecture": config.get("model_type", config.get("architectures")), "layers": layers,
        "parameters": sum(prod(array.shape) for array in tensors.values()), "bytes": stored, **memory(arch),
        "windows": [arch["window"][i] for i in layers.get("window", [])], "sinks": arch["sinks"],
        "vocab_size": arch["vocab"], "stop_tokens": stop_tokens(folder),
        "chat_template": tokenizer and tokenizer._template is not None,
        "files": {name: size for name, size in sorted((e.name, e.stat().st_size) for e in os.scandir(folder) if e.is_file())},
    }


def count_kinds(kinds):
    """Such as "16 mamba2, 16 attention", of a model's layer_kinds."""
    return ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))


def memory(arch, real=4):
    """What decoding keeps of one sequence: {"kv_bytes_per_token", "window", "state_bytes_per_sequence"}.
    arch: config.architecture's dict; real: bytes of an activation, 4 on the CPU. SSM states are float32 everywhere."""
    D, P, E = arch["inner"], arch["head_dim"], arch["kv_heads"] * arch["head_dim"]
    before = arch["conv"] - 1  # inputs that the conv looks back at
    layers = list(zip(arch["kinds"], arch["window"]))

    def state(kind, window):
        return {"attention": 0, "mamba1": 4 * D * 16 + real * before * E, "mamba2": 4 * D * P + real * before * (D + 2 * E),
                "window": 2 * E * real * (arch["sinks"] + window), "identity": 0}[kind]
    return {
        "kv_bytes_per_token": 2 * E * real * arch["kinds"].count("attention"),
        "window": max((window for kind, window in layers if kind == "attention"), default=0) or None,
        "state_bytes_per_sequence": sum(state(*layer) for layer in layers),
    }


def training_memory(arch, teacher, train, batch, length, real, moments="float32", recompute=False, shared=True, gradients="float32"):
    """About how many bytes a training step takes: {"weights", "gradients", "optimiser", "activations", "total"}.

    arch, teacher: architectures of what learns and of what it is compared with (None: nothing); shared: of the teacher's tensors the student
    has a copy of its own only where it learns; train: patterns of what learns; real: bytes of an activation and of a matrix' element.
    bf16 weights that learn have a float32 master in the optimiser; of bf16 gradients those of the layer at work, or of the embedding, are
    float32 too. Activations are those that layers keep for their backward, with recompute their inputs and those of one layer. The chunks
    of the loss and the libraries' workspaces are left out: at Llama-3-8B's shape, where 29 to 57 GiB were measured on an H200, what is
    counted is 1.3 to 1.6 GiB less."""
    own, other = shapes(arch), shapes(teacher) if teacher else {}
    learns = [name for name in own if fits(name, train)]
    trained = sum(prod(own[name]) for name in learns)
    borrowed = {*other} - {*learns} if shared else ()
    weights = real * (sum(prod(shape) for name, shape in own.items() if name not in borrowed) + sum(map(prod, other.values())))
    C, F, D, P = arch["width"], arch["mlp"], arch["inner"], arch["head_dim"]
    E, H, R = arch["kv_heads"] * P, arch["heads"], -(-C // 16)
    kept = {"attention": 2 * D + 2 * E, "window": 2 * D + 2 * E, "identity": 0, "mamba1": 5 * D + 2 * E + R, "mamba2": 5 * D + 4 * E + H}
    layers = [2 * C + 2 * F + kept[kind] for kind in arch["kinds"]]
    backward = max(layers) + 2 * C + 2 * F  # of the layer at work
    activations = real * batch * length * (sum(layers) + backward if not recompute else len(layers) * C + max(layers) + backward)
    whole = 4 * trained
    if gradients == "bfloat16" and real == 2:
        at_once = Counter()  # matrices of a layer, or one by itself
        for name in learns:
            if len(own[name]) == 2 and not name.endswith("A_log"):
                at_once[name.split(".")[2] if ".layers." in name else name] += prod(own[name])
        whole += 4 * max(at_once.values(), default=0) - 2 * at_once.total()
    parts = {"weights": weights, "gradients": whole,
             "optimiser": trained * ((8 if moments == "float32" else 4) + (4 if real == 2 else 0)), "activations": activations}
    return {**parts, "total": sum(parts.values())}


def held(model):
    """What a model takes on its device: {"weight_bytes"} and memory's of one sequence. A tied lm_head counts once."""
    weights = sum(prod(shape) * model.c.raw(name, 0, 0).itemsize for name, shape in model.names.items())
    real = 2 if (model.device, model.dtype) == ("cuda", "bfloat16") else 4
    return {"weight_bytes": weights, **memory(architecture(model.config, model.mamba_config), real)}


def readable(n):
    for unit in ("bytes", "KiB", "MiB"):
        if n < 1024:
            return f"{n:.4g} {unit}"
        n /= 1024
    return f"{n:.4g} GiB"
