"""config.json and mamba_config.json, read and checked: the architecture that the C model takes.

Sources: Hugging Face transformers (configuration_{llama,mistral,qwen2,qwen3}.py, modeling_rope_utils.py) for the teacher's
fields and their defaults, jxiw/MambaInLlama mamba/hybrid_mamba_config.py for the hybrid's. What would compute something
other than what the file says is refused in one sentence, never guessed."""
import importlib
import json
import math
import os
import stat
from reprlib import Repr

import numpy as np

FAMILIES = {"LlamaForCausalLM": "llama", "MistralForCausalLM": "mistral", "Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3"}
ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn")
MAMBAS = ("mamba1", "mamba2")
MIXERS = (*MAMBAS, "window", "identity")  # what a layer can have instead of attention
WINDOW, SINKS = 128, 4    # tokens that window layers see, unless somebody says otherwise
CONV, SCAN_STATE = 4, 16  # every conv's width; Mamba-1's N
LARGEST = 1 << 24         # of any one size: keeps products of three within 64 bits
MOST_LAYERS = 10_000
LONGEST = 1 << 40         # of a context
SETTINGS_BYTES = 256 << 20  # tokenizer.json of a large vocabulary is some 30 MB
_SHORT = Repr()
_SHORT.maxstring = 120
show = _SHORT.repr  # repr that cuts long values: what a file holds goes into messages


def said(error):
    """What an exception says, on one line; its kind where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__


def library(module, what, extra):
    """The module. ValueError, one sentence: it is missing, `what` needs it, and which extra brings it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise ValueError(f"{what} needs {module.partition('.')[0]}: pip install 'mambainllama[{extra}]'") from None


def read_file(path):
    """The bytes of a regular file. ValueError: unreadable, a pipe or a folder, larger than a file of settings can be."""
    try:
        with open(path, "rb", opener=regular) as file:
            content = file.read(SETTINGS_BYTES + 1)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    if len(content) > SETTINGS_BYTES:
        raise ValueError(f"{path} is larger than {SETTINGS_BYTES >> 20} MiB")
    return content


def read_json(path):
    """The JSON object in a file, as a dict. ValueError: unreadable, not JSON, not an object."""
    return parse_json(read_file(path), path)


def parse_json(text, where, unique=False, what=dict):
    """The JSON object in UTF-8 bytes, as a dict; what: list, the JSON list. ValueError, which names `where`: not UTF-8, not JSON, no such
    thing, and, with unique, a key that occurs twice."""
    try:
        value = json.loads(text.decode(), object_pairs_hook=_unique if unique else None)
    except (ValueError, RecursionError) as error:  # bad UTF-8, bad JSON, a number of 5,000 digits, nesting
        raise ValueError(f"{where} is not JSON: {error}") from None
    if not isinstance(value, what):
        raise ValueError(f"{where} holds a JSON {type(value).__name__}, expected {'an object' if what is dict else 'a list'}")
    return value


def _unique(pairs):
    out = dict(pairs)
    if len(out) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {show(next(key for key in keys if keys.count(key) > 1))} occurs twice")
    return out


def regular(path, flags):
    """Opener that does not wait for a pipe's other end. OSError: a folder, a pipe, a device."""
    handle = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(0, "not a regular file")
    return handle


def read_folder(folder):
    """(config.json, mamba_config.json or None) of a model folder, as dicts. ValueError: no such folder or file, bad JSON."""
    if not os.path.isdir(folder):
        raise ValueError(f"{folder} is not a folder, expected one with config.json and weights")
    if not os.path.exists(os.path.join(folder, "config.json")):
        raise ValueError(f"{folder} has no config.json, expected a model folder in Hugging Face layout")
    mamba = os.path.join(folder, "mamba_config.json")
    return read_json(os.path.join(folder, "config.json")), read_json(mamba) if os.path.lexists(mamba) else None


def architecture(config, mamba=None, mixer=None):
    """The architecture of a teacher (mamba None) or hybrid, checked: a dict of

    vocab width layers heads kv_heads head_dim mlp inner (= heads·head_dim): ints; eps norm_eps rope_scale: floats
    tied qkv_bias o_bias mlp_bias qk_norm dt_bias_twice: 0 or 1
    kinds: "attention" or one of MIXERS a layer; window: the last so many tokens a layer attends to, 0: all
    sinks: the first so many, which "window" layers attend to as well, 0 without such a layer
    d_state conv dt_rank: of the first Mamba kind that the model has (0 without any); inv_freq: float32 (head_dim/2,)

    config, mamba: the dicts of config.json and mamba_config.json. mixer: "mamba1" or "mamba2" where mamba_config.json does not
    say ("mixers", else `ngroups` in ssm_cfg: Mamba-2, else Mamba-1). Its "window" is a number a layer and its "sinks" one number,
    both only where "mixers" has "window". ValueError, one sentence, for what is missing, of the
    wrong type, contradictory or not supported."""
    for name, value in (("config.json", config), ('mamba_config.json (in a dict of both, "mamba")', mamba)):
        if not isinstance(value, dict) and (value is not None or name == "config.json"):
            raise ValueError(f"{name} must be a dict, not {show(value)}")
    if mixer not in (None, *MAMBAS):
        raise ValueError(f"the mixer {show(mixer)} is unknown, expected one of {', '.join(MAMBAS)}")
    family = _family(config)
    layers = _integer(config, "num_hidden_layers", high=MOST_LAYERS)
    width, heads = _integer(config, "hidden_size"), _integer(config, "num_attention_heads")
    kv_heads = _integer(config, "num_key_value_heads", heads)
    head_dim = _head_dim(config)
    if heads % kv_heads:
        raise ValueError(f"config.json: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")
    if heads * head_dim > LARGEST:
        raise ValueError(f"config.json: {heads} heads of {head_dim} are more than {LARGEST} channels")
    if (act := config.get("hidden_act", "silu")) != "silu":
        raise ValueError(f"config.json: hidden_act is {show(act)}, expected 'silu'")
    bias = family in ("llama", "qwen3") and _flag(config, "attention_bias", False)
    kinds = _kinds(mamba, layers, mixer)
    windows, (own, sinks) = _windows(config, family, layers), _own_windows(mamba, kinds)
    arch = {
        "vocab": _integer(config, "vocab_size"), "width": width, "layers": layers, "heads": heads, "kv_heads": kv_heads,
        "head_dim": head_dim, "mlp": _integer(config, "intermediate_size"), "inner": heads * head_dim,
        "eps": _number(config, "rms_norm_eps", 1e-6, high=1.0), "tied": int(_flag(config, "tie_word_embeddings", False)),
        "qkv_bias": int(bias or family == "qwen2"), "o_bias": int(bias), "qk_norm": int(family == "qwen3"),
        "mlp_bias": int(family == "llama" and _flag(config, "mlp_bias", False)),
        "kinds": kinds, "window": [w if kind == "attention" else o for w, o, kind in zip(windows, own, kinds)], "sinks": sinks,
    }
    first = next((kind for kind in kinds if kind in MAMBAS), None)
    arch["d_state"] = {None: 0, "mamba1": SCAN_STATE, "mamba2": head_dim}[first]
    arch["conv"] = CONV if first else 0
    arch["dt_rank"] = -(-width // 16) if "mamba1" in kinds else 0
    if mamba is not None:
        _check_mamba(mamba, config, arch)
    flags = mamba or {}
    arch["dt_bias_twice"] = int(_flag(flags, "dt_bias_twice", True, "mamba_config.json"))
    arch["norm_eps"] = _number(flags, "norm_eps", 1e-5, high=1.0, where="mamba_config.json")
    arch["inv_freq"], arch["rope_scale"] = rope(config, mamba=mamba)
    return arch


def mamba_config(config, kinds, mamba=None):
    """What mamba_config.json says of a model whose layers are `kinds`: the fields that the original reads, those of mamba's flags
    (attn_rope, dt_bias_twice, norm_eps) that are not the defaults; "mixers" only if one Mamba mixer is not all that there is, and with a
    window layer "window" and "sinks", mamba's or WINDOW and SINKS."""
    arch = architecture(config)
    mixers = sorted({kind for kind in kinds if kind != "attention"})
    mambas = [kind for kind in mixers if kind in MAMBAS]
    second = {"ngroups": arch["heads"], "d_state": arch["head_dim"]} if mambas == ["mamba2"] else {}
    out = {
        "d_model": arch["width"], "ssm_cfg": {"expand": 1, **second}, "rms_norm_eps": arch["eps"], "vocab_size": None,
        "d_inner": arch["inner"], "d_xb": arch["kv_heads"] * arch["head_dim"], "intermediate_size": arch["mlp"],
        "hidden_act": "silu", "n_layer": arch["layers"],
        "attn_layers": [i for i, kind in enumerate(kinds) if kind == "attention"],
    }
    if len(mixers) > 1 or mixers != mambas:
        out["mixers"] = list(kinds)
    if "window" in kinds:
        usual = {"window": [WINDOW if kind == "window" else 0 for kind in kinds], "sinks": SINKS}
        out |= {key: (mamba or {}).get(key, value) for key, value in usual.items()}
    defaults = {"attn_rope": "hf", "dt_bias_twice": True, "norm_eps": 1e-5}
    return out | {key: mamba[key] for key, value in defaults.items() if mamba and mamba.get(key, value) != value}


def stop_ids(settings, where="config.json"):
    """eos_token_id, the id or ids that end an answer, as a list; [] where it is missing or null. ValueError: something else."""
    ids = settings.get("eos_token_id")
    ids = ids if isinstance(ids, list) else [] if ids is None else [ids]
    if not all(type(i) is int and i >= 0 for i in ids):
        raise ValueError(f"{where}: eos_token_id is {show(ids)}, expected a token id or a list of them")
    return ids


def initializer_range(config):
    """The standard deviation of fresh matrices."""
    return _number(config, "initializer_range", 0.02)


def is_dynamic(config, mamba=None):
    """Whether the rotation depends on the sequence's length (rope type "dynamic"): then rope is asked again for each length."""
    return _rope_settings(config, mamba)[0] == "dynamic"


def rope(config, sequence=None, mamba=None):
    """(inv_freq float32 (head_dim/2,), scale): rotation per position of each pair of channels, and the factor of cos and sin.

    sequence: tokens of the longest row; matters to "dynamic" alone, and there only above max_position_embeddings. mamba:
    mamba_config.json's dict; its "attn_rope": "plain" leaves out the scaling, as the original's inference code does.
    In float32, as transformers' modeling_rope_utils.py computes it. ValueError: unknown type, missing or impossible settings."""
    kind, settings = _rope_settings(config, mamba)
    where = "config.json's RoPE settings"
    theta = _number(settings, "rope_theta", _number(config, "rope_theta", 10000.0), where=where)
    dim = _head_dim(config)
    factor = 1.0
    if kind == "yarn" and settings.get("factor") is None:  # it alone can do without
        factor = _integer(config, "max_position_embeddings", high=LONGEST) / _original(config, settings)
    elif kind != "default":
        factor = _number(settings, "factor", where=where)
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    scale = 1.0
    with np.errstate(all="ignore"):  # what overflows is reported below
        base = np.float32(theta)
        if kind == "dynamic":
            longest = _integer(config, "max_position_embeddings", high=LONGEST)
            if sequence is not None and sequence > longest:
                if dim == 2:
                    raise ValueError("config.json: dynamic RoPE needs a head_dim above 2")
                grown = np.float32(factor * sequence) / np.float32(longest) - np.float32(factor - 1)
                base = base * grown ** np.float32(dim / (dim - 2))
        powers = base**exponents
        inv = np.float32(1) / powers
        if kind == "linear":
            inv = inv / np.float32(factor)
        elif kind == "llama3":
            inv = _llama3(inv, factor, settings, _original(config, settings), where)
        elif kind == "yarn":
            inv, scale = _yarn(powers, theta, dim, factor, settings, _original(config, settings), where)
    if not np.isfinite(inv).all() or not (0 < scale < math.inf):
        raise ValueError(f"{where} give frequencies that are not finite numbers")
    return np.ascontiguousarray(inv, np.float32), float(scale)


def _llama3(inv, factor, settings, original, where):
    low, high = (_number(settings, key, where=where) for key in ("low_freq_factor", "high_freq_factor"))
    if high <= low:
        raise ValueError(f"{where}: high_freq_factor {high} is not above low_freq_factor {low}")
    wavelength = np.float32(2 * math.pi) / inv
    smooth = (original / wavelength - np.float32(low)) / np.float32(high - low)
    middle = (1 - smooth) * inv / np.float32(factor) + smooth * inv
    return np.where(wavelength > original / low, inv / np.float32(factor), np.where(wavelength < original / high, inv, middle))


def _yarn(powers, theta, dim, factor, settings, original, where):
    if theta <= 1:
        raise ValueError(f"{where}: yarn needs a rope_theta above 1, not {theta}")
    fast, slow = (_number(settings, key, default, where=where) for key, default in (("beta_fast", 32), ("beta_slow", 1)))
    # channels that turn `fast` times or more within the original context stay, those that turn less than `slow` are stretched
    start, end = (dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta)) for turns in (fast, slow))
    if _flag(settings, "truncate", True, where):
        start, end = math.floor(start), math.ceil(end)
    start, end = max(start, 0), min(end, dim - 1)
    if start == end:
        end += 0.001
    ramp = np.clip((np.arange(dim // 2, dtype=np.float32) - np.float32(start)) / np.float32(end - start), 0, 1)
    keep = 1 - ramp
    inv = 1 / (np.float32(factor) * powers) * (1 - keep) + 1 / powers * keep

    def attention(weight):
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if settings.get("attention_factor") is not None:
        return inv, _number(settings, "attention_factor", where=where)
    if settings.get("mscale") and settings.get("mscale_all_dim"):
        over, under = (attention(_number(settings, key, where=where)) for key in ("mscale", "mscale_all_dim"))
        return inv, over / under
    return inv, attention(1.0)


def _original(config, settings):
    """Tokens that the model was pretrained on: config.json's own field goes before the RoPE settings' (as for Phi-3)."""
    for place in (config, settings):
        if place.get("original_max_position_embeddings") is not None:
            return _integer(place, "original_max_position_embeddings", high=LONGEST)
    return _integer(config, "max_position_embeddings", high=LONGEST)


def _rope_settings(config, mamba):
    settings = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(settings, dict) or any(isinstance(value, dict) for value in settings.values()):
        raise ValueError(f"config.json: the RoPE settings are {show(settings)}, expected one object of numbers or null")
    kind = settings.get("rope_type", settings.get("type", "default"))
    if not isinstance(kind, str) or kind not in ROPE_TYPES:
        raise ValueError(f"config.json: the RoPE type {show(kind)} is not supported, expected one of {', '.join(ROPE_TYPES)}")
    for place in (settings, config):
        if place.get("partial_rotary_factor") not in (None, 1, 1.0):
            raise ValueError(f"config.json: partial_rotary_factor is {show(place['partial_rotary_factor'])}, expected 1")
    if mamba is not None and (name := mamba.get("attn_rope", "hf")) != "hf":
        if name != "plain":
            raise ValueError(f"mamba_config.json: attn_rope is {show(name)}, expected 'hf' or 'plain'")
        return "default", {"rope_theta": settings.get("rope_theta")}
    return kind, settings


def _family(config):
    names = config.get("architectures") or []
    kind = config.get("model_type")
    if not isinstance(names, list) or (kind is None and not names):
        raise ValueError("config.json: model_type and architectures are missing, expected one of " + ", ".join(FAMILIES.values()))
    for name in names:
        if not isinstance(name, str) or name not in FAMILIES:
            raise ValueError(f"config.json: the architecture {show(name)} is not supported, expected one of {', '.join(FAMILIES)}")
    kind = FAMILIES[names[0]] if kind is None else kind
    if not isinstance(kind, str) or kind not in FAMILIES.values():
        raise ValueError(f"config.json: the model_type {show(kind)} is not supported, "
                         f"expected one of {', '.join(FAMILIES.values())}")
    return kind


def _head_dim(config):
    width, heads = _integer(config, "hidden_size"), _integer(config, "num_attention_heads")
    derived = 128 if "head_dim" not in config and _family(config) == "qwen3" else width // heads  # Qwen3Config's own default
    if config.get("head_dim") is None and derived * heads != width and derived != 128:
        raise ValueError(f"config.json: hidden_size {width} is not a multiple of num_attention_heads {heads} "
                         "and there is no head_dim")
    head_dim = _integer(config, "head_dim", derived)
    if head_dim % 2:
        raise ValueError(f"config.json: head_dim is {head_dim}, expected an even number (RoPE turns pairs of channels)")
    return head_dim


def _windows(config, family, layers):
    """Window per layer as transformers' models take it: Llama none, Mistral on all layers, Qwen on the layers that say so."""
    if family == "mistral":
        window = config.get("sliding_window", 4096)  # MistralConfig's default
        return [0 if window is None else _integer(config, "sliding_window", 4096, high=LONGEST)] * layers
    if family == "llama":
        return [0] * layers
    window = 0
    if _flag(config, "use_sliding_window", False) and config.get("sliding_window", 4096) is not None:
        window = _integer(config, "sliding_window", 4096, high=LONGEST)
    types = config.get("layer_types")
    if types is None:
        first = _integer(config, "max_window_layers", 28, low=0)
        return [window if i >= first else 0 for i in range(layers)]
    if not isinstance(types, list) or len(types) != layers:
        raise ValueError(f"config.json: layer_types is {show(types)}, expected a list of {layers} names")
    for name in types:
        if name not in ("full_attention", "sliding_attention"):
            raise ValueError(f"config.json: the layer type {show(name)} is not supported, "
                             "expected full_attention or sliding_attention")
    if "sliding_attention" in types and not window:
        raise ValueError("config.json: layer_types has sliding_attention, but use_sliding_window or sliding_window is not set")
    return [window if name == "sliding_attention" else 0 for name in types]


def _kinds(mamba, layers, mixer):
    if mamba is None:
        return ["attention"] * layers
    where = "mamba_config.json"
    attention = mamba.get("attn_layers")
    if not isinstance(attention, list) or not all(type(i) is int and 0 <= i < layers for i in attention):
        raise ValueError(f"{where}: attn_layers is {show(attention)}, expected a list of layer numbers from 0 to {layers - 1}")
    named = mamba.get("mixers")
    if named is None:
        cfg = _ssm_cfg(mamba)
        other = mixer or ("mamba2" if cfg.get("ngroups") is not None else "mamba1")
        return ["attention" if i in set(attention) else other for i in range(layers)]
    if not isinstance(named, list) or len(named) != layers or any(
            (kind != "attention" if i in attention else kind not in MIXERS) for i, kind in enumerate(named)):
        raise ValueError(f"{where}: mixers is {show(named)}, expected one of attention, {', '.join(MIXERS)} for each of {layers} layers, "
                         f"attention where attn_layers {show(attention)} has it")
    return list(named)


def _own_windows(mamba, kinds):
    """(window of each "window" layer, 0 for the others; sinks)"""
    if "window" not in kinds:
        return [0] * len(kinds), 0
    windows, where = mamba.get("window"), "mamba_config.json"
    if not isinstance(windows, list) or len(windows) != len(kinds) or not all(
            type(w) is int and (0 < w <= LARGEST if kind == "window" else w == 0) for w, kind in zip(windows, kinds)):
        raise ValueError(f"{where}: window is {show(windows)}, expected the tokens that each of {len(kinds)} layers sees, "
                         "0 where mixers does not have window")
    return windows, _integer(mamba, "sinks", low=0, where=where)


def _ssm_cfg(mamba):
    cfg = mamba.get("ssm_cfg")
    if cfg is not None and not isinstance(cfg, dict):
        raise ValueError(f"mamba_config.json: ssm_cfg is {show(cfg)}, expected an object")
    return cfg or {}


def _check_mamba(mamba, config, arch):
    """mamba_config.json repeats sizes of config.json and names settings of the layers: each is what we compute or is refused."""
    cfg, where = _ssm_cfg(mamba), "mamba_config.json"
    inner = mamba.get("d_inner")
    if inner is None:
        inner = _integer(cfg, "expand", 2, where=where) * arch["width"]  # the original's default
    sizes = {"d_inner": arch["inner"], "d_xb": arch["kv_heads"] * arch["head_dim"], "d_model": arch["width"],
             "n_layer": arch["layers"], "intermediate_size": arch["mlp"], "vocab_size": arch["vocab"],
             "rms_norm_eps": arch["eps"], "hidden_act": "silu"}
    for key, expected in sizes.items():
        found = inner if key == "d_inner" else mamba.get(key)
        if found is not None and (isinstance(found, bool) or found != expected):
            raise ValueError(f"{where}: {key} is {show(found)}, and config.json makes it {expected}")
    kinds = set(arch["kinds"])
    settings = {"d_conv": CONV, "bias": False, "conv_bias": True}
    if "mamba1" in kinds:
        settings |= {"dt_rank": (arch["dt_rank"], "auto"), "d_state": SCAN_STATE}
        if arch["kv_heads"] * arch["head_dim"] % SCAN_STATE:
            raise ValueError(f"config.json: {arch['kv_heads']} kv heads of {arch['head_dim']} are not a multiple of {SCAN_STATE} "
                             "channels, which Mamba-1 needs")
    if "mamba2" in kinds:
        settings |= {"ngroups": arch["heads"], "d_state": arch["head_dim"], "headdim": arch["head_dim"], "rmsnorm": True,
                     "norm_before_gate": False, "D_has_hdim": False}
    if kinds.issuperset(MAMBAS):
        settings.pop("d_state")  # each has its own
    for key, expected in settings.items():
        allowed = expected if isinstance(expected, tuple) else (expected,)
        if cfg.get(key) is not None and cfg[key] not in allowed:
            raise ValueError(f"{where}: ssm_cfg's {key} is {show(cfg[key])}, expected {allowed[0]}")


def _integer(place, key, default=None, low=1, high=LARGEST, where="config.json"):
    value = place.get(key)
    value = default if value is None else value
    if type(value) is not int or not low <= value <= high:
        found = "missing" if value is None else show(value)
        raise ValueError(f"{where}: {key} is {found}, expected an integer from {low} to {high}")
    return value


def _number(place, key, default=None, high=1e30, where="config.json"):
    value = place.get(key)
    value = default if value is None else value
    if type(value) not in (int, float) or not 0 < value <= high:  # NaN compares false
        found = "missing" if value is None else show(value)
        raise ValueError(f"{where}: {key} is {found}, expected a number above 0, at most {high:g}")
    return float(value)


def _flag(place, key, default, where="config.json"):
    value = place.get(key)
    value = default if value is None else value
    if type(value) is not bool:
        raise ValueError(f"{where}: {key} is {show(value)}, expected true or false")
    return value
