"""Makes tests/data/<teacher>/ again: tiny folders that transformers wrote, with what transformers computes from them.

    python tests/make_teachers.py        # needs torch and transformers; the tests read the files without either

expected.npz of a folder: ids (2,23) int32 and the float32 logits (2,23,V) of transformers in float32; prompt (1,7) and greedy (16),
the ids that follow it by the highest logit (not for dynamic RoPE, whose frequencies change while one generates). Weights are
random, larger than an initialisation's, so that attention is far from uniform and each setting moves the logits.
tests/data/mamba1 and mamba2-fused-tied are not made here: their logits are those of the original Mamba layers. mamba2-bin is the
second one as a pytorch_model.bin in the training spelling."""
import json
import shutil
from pathlib import Path

import numpy as np

DATA = Path(__file__).parent / "data"
SIZES = dict(vocab_size=83, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             max_position_embeddings=128, rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=2, pad_token_id=0)
TWO = dict(num_attention_heads=2, num_key_value_heads=1)  # heads of 16: more frequencies
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}
# folder: model class, config, dtype on disk, save_pretrained's arguments
TEACHERS = {
    "llama3": ("Llama", dict(vocab_size=300, hidden_size=24, head_dim=8, rope_theta=5e4, rope_scaling=LLAMA3), "float32", {}),
    "llama-linear-tied-f16": ("Llama", dict(rope_scaling={"rope_type": "linear", "factor": 2.5}, tie_word_embeddings=True),
                              "float16", {}),
    "llama-bias-bf16": ("Llama", dict(attention_bias=True, mlp_bias=True, num_key_value_heads=1), "bfloat16", {}),
    "llama-yarn": ("Llama", TWO | dict(rope_scaling={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}),
                   "float32", {}),
    "llama-dynamic": ("Llama", TWO | dict(rope_scaling={"rope_type": "dynamic", "factor": 4.0}, max_position_embeddings=10),
                      "float32", {}),
    "mistral-window": ("Mistral", dict(sliding_window=8), "float32", {}),
    "qwen2-sharded": ("Qwen2", dict(use_sliding_window=True, sliding_window=5, max_window_layers=1), "float32",
                      dict(max_shard_size="30kB")),
    "qwen3": ("Qwen3", dict(head_dim=12, tie_word_embeddings=True), "float32", {}),
}
TEMPLATE = """{{- bos_token }}
{%- for message in messages %}
    {{- '<|start|>' + message['role'] + '\\n' + message['content'] | trim + '<|end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start|>assistant\\n' }}
{%- endif %}
"""
TEXT = """A student learns from its teacher what comes next. The teacher reads every word that stands before; the student keeps a
state of fixed size and folds each word into it. What is the key of the blue door? The key of the blue door is seven. Copy: a b c d.
Twelve and thirty are forty-two. Größe, naïve, 東京, 🙂: text is bytes, and a character may take four of them.
"""


def randomise(model, seed):
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.ndim == 2:
                p.copy_(noise * (0.7 if "embed" in name else 1.6 / p.shape[1] ** 0.5))
            else:
                p.copy_(noise * 0.2 + (0.0 if name.endswith("bias") else 1.0))


def teacher(name, seed):
    """Writes a folder; then reads it as a user would, in float32, and computes what is expected of it."""
    import torch
    import transformers

    kind, changes, dtype, arguments = TEACHERS[name]
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **changes})
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    randomise(model, seed)
    folder = DATA / name
    shutil.rmtree(folder, ignore_errors=True)
    model.to(getattr(torch, dtype)).save_pretrained(folder, **arguments)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, config.vocab_size, (2, 23), generator=generator)
    expected = {"ids": ids.numpy().astype(np.int32)}
    with torch.no_grad():
        expected["logits"] = model(ids, use_cache=False).logits.numpy()
        if "dynamic" not in name:
            prompt = text = ids[:1, :7]
            gaps = []
            for _ in range(16):
                logits = model(text, use_cache=False).logits[0, -1]
                best = logits.topk(2)
                gaps.append(float(best.values[0] - best.values[1]))
                text = torch.cat([text, best.indices[None, :1]], 1)
            assert min(gaps) > 2e-3, f"{name}: the two best logits differ by {min(gaps)}; choose another seed"
            expected |= {"prompt": prompt.numpy().astype(np.int32), "greedy": text[0, 7:].numpy().astype(np.int32)}
    np.savez_compressed(folder / "expected.npz", **expected)


def tokenizer(folder):
    """A byte-level BPE of 300 tokens with a chat template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    special = ["<pad>", "<s>", "<|end|>", "<|start|>"]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = [AddedToken(text, special=True) for text in special]
    bpe.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet,
                                                        show_progress=False))
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    bpe.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "pad_token": "<pad>",
                "eos_token": {"__type": "AddedToken", "content": "<|end|>", "lstrip": False, "rstrip": False, "normalized": False,
                              "single_word": False, "special": True},
                "clean_up_tokenization_spaces": False, "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))


def torch_file(source, folder):
    """The hybrid in `source` as torch.save writes it: training names, tensors that are transposed or begin within a storage, an
    lm_head that shares embed_tokens' storage."""
    import torch
    from safetensors.torch import load_file

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    state = {}
    for name, value in load_file(source / "model.safetensors").items():
        if name.endswith("mha.in_proj.weight"):
            q, k, v = value.split([32, 16, 16])  # views of one storage, at offsets
            state |= {name.replace("mha.in_proj", f"self_attn.{part}_proj"): x for part, x in (("q", q), ("k", k), ("v", v))}
        elif name.endswith("mlp.down_proj.weight"):
            state[name] = value.t().contiguous().t()
        else:
            state[name.replace("mha.out_proj", "self_attn.o_proj")] = value
    state["lm_head.weight"] = torch.nn.Parameter(state["model.embed_tokens.weight"])
    torch.save(state, folder / "pytorch_model.bin")
    for name in ("config.json", "mamba_config.json"):
        shutil.copyfile(source / name, folder / name)


if __name__ == "__main__":
    for i, name in enumerate(TEACHERS):
        teacher(name, seed=i)
    tokenizer(DATA / "llama3")
    torch_file(DATA / "mamba2-fused-tied", DATA / "mamba2-bin")
