"""Live parity with transformers: folders that it writes, its float32 logits, its greedy tokens. Skips where it is not installed."""
import copy

import numpy as np
import pytest

import mambainllama as mil

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SIZES = dict(hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, vocab_size=97,
             max_position_embeddings=256, initializer_range=0.3, bos_token_id=1, eos_token_id=None, pad_token_id=None)
LLAMA3 = dict(rope_type="llama3", rope_theta=10000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
FAMILIES = {
    "llama, llama3 scaling, untied": ("Llama", dict(rope_parameters=LLAMA3), torch.float32),
    "llama, tied, 1 kv head, bf16 file": ("Llama", dict(tie_word_embeddings=True, num_key_value_heads=1), torch.bfloat16),
    "llama, linear scaling, f16 file": ("Llama", dict(rope_parameters=dict(rope_type="linear", rope_theta=1e4, factor=2.0)), torch.float16),
    "llama, yarn": ("Llama", dict(rope_parameters=dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=32)), torch.float32),
    "llama, dynamic": ("Llama", dict(rope_parameters=dict(rope_type="dynamic", rope_theta=1e4, factor=2.0), max_position_embeddings=16), torch.float32),
    "llama, biases": ("Llama", dict(attention_bias=True, mlp_bias=True), torch.float32),
    "mistral, window 9": ("Mistral", dict(sliding_window=9), torch.float32),
    "qwen2": ("Qwen2", dict(), torch.float32),
    "qwen3, head_dim 20": ("Qwen3", dict(head_dim=20), torch.float32),
}


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, tmp_path_factory):
    family, changes, dtype = FAMILIES[request.param]
    torch.manual_seed(len(request.param))
    config = getattr(transformers, f"{family}Config")(**SIZES | changes)
    config._attn_implementation = "eager"
    theirs = getattr(transformers, f"{family}ForCausalLM")(config)
    for name, value in theirs.named_parameters():
        if "norm" in name or "bias" in name:
            value.data += 0.3 * torch.randn_like(value)
        value.data = value.data.to(dtype).float()
    folder = tmp_path_factory.mktemp("teacher")
    copy.deepcopy(theirs).to(dtype).save_pretrained(folder)
    return theirs.eval(), mil.load(folder, dtype="float32"), mil.load(folder), request.param


def theirs_logits(theirs, ids):
    with torch.no_grad():
        return theirs(torch.tensor(ids), use_cache=False).logits.numpy()


def error(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def test_logits(pair):
    theirs, ours, stored, name = pair
    ids = np.random.default_rng(0).integers(0, 97, (3, 61))
    expected = theirs_logits(theirs, ids)
    for model in (ours, stored):
        assert error(model.logits(ids), expected) < 1e-5, name


def test_greedy_single_and_batched(pair):
    theirs, ours, _, name = pair
    if "dynamic" in name:
        pytest.skip("dynamic RoPE depends on the length: one forward only")
    prompts = [np.random.default_rng(i).integers(0, 97, n).tolist() for i, n in enumerate((1, 7, 40))]
    expected = []
    for prompt in prompts:
        row = list(prompt)
        for _ in range(64):
            row.append(int(theirs_logits(theirs, [row])[0, -1].argmax()))
        expected.append(row[len(prompt):])
    together = mil.generate(ours, prompts, max_new_tokens=64, stop_tokens=[])
    for prompt, tokens, output in zip(prompts, expected, together):
        assert output.tokens == tokens, name
        assert mil.generate(ours, [prompt], max_new_tokens=64, stop_tokens=[])[0].tokens == tokens, name


def test_saved_folder_is_read_by_transformers(pair, tmp_path):
    theirs, ours, _, name = pair
    mil.save(ours, tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ids = np.random.default_rng(0).integers(0, 97, (3, 61))  # as long as before: dynamic RoPE remembers
    assert error(theirs_logits(again, ids), theirs_logits(theirs, ids)) < 1e-5, name
