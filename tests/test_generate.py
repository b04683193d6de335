"""generate: with and without a draft, ragged batches, stops, streaming, and the distribution of what it samples."""
import itertools
import json
import sys

import numpy as np
import pytest
from scipy.stats import chisquare

import mambainllama as mil
from conftest import grown, on

V = 259  # the bytes, and three special tokens
KINDS = {"transformer": None, "hybrid1": ("mamba1", [1]), "hybrid2": ("mamba2", [1]), "pure2": ("mamba2", [])}
PROMPTS = [[1, 2, 3], [4], [5] * 40, list(range(9)), [200, 7, 8], [9, 9], [33, 11, 12, 13, 14], list(range(100, 117))]


def config(kind, vocabulary=V, layers=2):
    c = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 48,
         "num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": vocabulary,
         "rms_norm_eps": 1e-5, "max_position_embeddings": 512, "rope_theta": 10000.0, "hidden_act": "silu"}
    if KINDS[kind]:
        mixer, attention = KINDS[kind]
        c["mamba"] = {"d_model": 64, "d_inner": 64, "d_xb": 32, "n_layer": layers, "attn_layers": attention,
                      "intermediate_size": 48, "hidden_act": "silu", "rms_norm_eps": 1e-5, "vocab_size": None,
                      "ssm_cfg": {"expand": 1} if mixer == "mamba1" else {"expand": 1, "ngroups": 4, "d_state": 16}}
    return c


def near(kind, seed, noise=0.5, vocabulary=V, **how):
    """The model random(config, 0) with its output projection moved a little: a draft that is right some of the time."""
    model = mil.random(config(kind, vocabulary), seed=0, **how)
    head = model.get("lm_head.weight")
    move = noise * head.std() * np.random.default_rng(seed).normal(size=head.shape)
    model.set("lm_head.weight", head + move.astype(np.float32))
    return model


@pytest.fixture(scope="module")
def models():
    return {kind: mil.random(config(kind), seed=0) for kind in KINDS}


@pytest.fixture(scope="module")
def drafts():
    return {kind: near(kind, 1) for kind in KINDS}


@pytest.fixture(scope="module")
def spoken(tmp_path_factory):
    """A model with a tokenizer whose tokens are the bytes, so that characters span tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models as kinds, pre_tokenizers
    folder = tmp_path_factory.mktemp("spoken")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(kinds.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in ("<s>", "</s>", "<end>")])
    model = mil.random(config("hybrid2"), seed=3)
    mil.save(model, str(folder))
    tokenizer.save(str(folder / "tokenizer.json"))
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    (folder / "generation_config.json").write_text('{"eos_token_id": [257, 258]}')
    return mil.load(str(folder))


def tokens(out):
    return [row.tokens for row in out]


def stepwise(model, prompt, n):
    """Greedy decoding without a State: one whole forward a token."""
    ids = list(prompt)
    for _ in range(n):
        ids.append(int(model.logits(np.array([ids], np.int32))[0, -1].argmax()))
    return ids[len(prompt):]


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_is_the_argmax_of_whole_forwards(models, kind):
    out = mil.generate(models[kind], PROMPTS, max_new_tokens=12)
    assert tokens(out) == [stepwise(models[kind], p, 12) for p in PROMPTS]
    assert all(row.finish == "length" for row in out)


@pytest.mark.parametrize("device", on("cuda32", "cuda"), indirect=True)
@pytest.mark.parametrize("kind", ["hybrid1", "hybrid2"])
def test_generation_on_a_gpu(device, kind):
    """With a draft to the bit what it is without, greedy or sampled, in whatever batches; the seed alone decides."""
    model, draft = mil.random(config(kind), seed=0, **device.how), near(kind, 7, 0.2, **device.how)
    how = dict(max_new_tokens=8, logprobs=1)
    plain = mil.generate(model, PROMPTS[:4], **how)
    out = mil.generate(model, PROMPTS[:4], draft=draft, lookahead=3, batch=2, **how)
    assert tokens(out) == tokens(plain) and [row.logprobs for row in out] == [row.logprobs for row in plain]
    assert 0 < out.stats["accepted"] < out.stats["drafted"]
    how = dict(max_new_tokens=4, temperature=0.9, top_p=0.95, top_k=40, draft=draft, lookahead=2)
    seeds = [tokens(mil.generate(model, PROMPTS[:2], seed=seed, batch=batch, **how)) for seed, batch in ((5, None), (5, 1), (6, None))]
    assert seeds[0] == seeds[1] != seeds[2]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 4, 8])
def test_speculative_greedy_is_greedy_to_the_bit(models, drafts, kind, rows):
    how = dict(max_new_tokens=20, logprobs=1)
    plain = mil.generate(models[kind], PROMPTS, **how)
    for draft, lookahead in zip([*drafts.values(), near(kind, 7, 0.2)], (4, 1, 15, 2, 5)):
        out = mil.generate(models[kind], PROMPTS, draft=draft, lookahead=lookahead, batch=rows, **how)
        assert tokens(out) == tokens(plain)
        assert [row.logprobs for row in out] == [row.logprobs for row in plain]
    assert 0 < out.stats["accepted"] < out.stats["drafted"]  # the last draft is a near one: both ways were taken


def test_speculative_greedy_is_greedy_in_bf16_and_with_a_window():
    for changes, dtype in (({}, "bfloat16"), ({"model_type": "mistral", "architectures": ["MistralForCausalLM"],
                                               "sliding_window": 8}, "float32")):
        model, draft = (mil.random(config("hybrid2") | changes, seed=s, dtype=dtype) for s in (0, 0))
        draft.set("model.norm.weight", 1 + 0.3 * np.random.default_rng(0).normal(size=64).astype(np.float32))
        plain = mil.generate(model, PROMPTS, max_new_tokens=24, logprobs=1)
        out = mil.generate(model, PROMPTS, max_new_tokens=24, logprobs=1, draft=draft)
        assert tokens(out) == tokens(plain) and [row.logprobs for row in out] == [row.logprobs for row in plain]
        assert 0 < out.stats["accepted"] < out.stats["drafted"]


def test_a_perfect_draft_is_always_right(models):
    stats = mil.generate(models["hybrid2"], PROMPTS, max_new_tokens=20, draft=models["hybrid2"], lookahead=4).stats
    assert stats["acceptance"] == 1 and stats["tokens_per_verify"] == 5 and stats["rounds"] == 4


def test_limits_differ_and_rows_leave(models, drafts):
    plain = tokens(mil.generate(models["hybrid1"], PROMPTS, max_new_tokens=24))
    limits = [24, 1, 7, 0, 3, 24, 2, 12]
    for draft in (None, drafts["pure2"]):
        for batch in (None, 3):
            out = mil.generate(models["hybrid1"], PROMPTS, max_new_tokens=limits, draft=draft, batch=batch)
            assert tokens(out) == [row[:n] for row, n in zip(plain, limits)]


@pytest.mark.parametrize("lookahead", [0, 3])
def test_a_sampled_row_does_not_depend_on_the_others(models, drafts, lookahead):
    how = dict(max_new_tokens=16, top_p=0.95, seed=5, draft=drafts["hybrid1"], lookahead=lookahead)
    for kind in KINDS:
        all_ = mil.generate(models[kind], PROMPTS, temperature=0.9, **how)
        others = list(PROMPTS)
        others[2], others[5] = [3], [1] * 21
        mixed = mil.generate(models[kind], others, temperature=[0.9] * 3 + [0.0] + [0.9] * 4, batch=3, **how)
        assert [tokens(all_)[i] == tokens(mixed)[i] for i in range(8)] == [True, True, False, False, True, False, True, True]


def test_a_sampled_row_goes_by_its_index(models, drafts):
    for how in (dict(), dict(draft=drafts["transformer"], lookahead=3)):
        how |= dict(max_new_tokens=9, temperature=1.0, seed=5)
        all_ = tokens(mil.generate(models["hybrid1"], PROMPTS, **how))
        picked = [6, 0, 3, 7]
        assert tokens(mil.generate(models["hybrid1"], [PROMPTS[i] for i in picked], index=picked, **how)) == [all_[i] for i in picked]
        assert tokens(mil.generate(models["hybrid1"], PROMPTS[1], index=1 << 20, **how)) != [all_[1]]


def test_a_row_is_told_as_soon_as_it_is_finished(models):
    seen, limits = [], [5, 0, 9, 2]
    out = mil.generate(models["pure2"], PROMPTS[:4], max_new_tokens=limits, index=[9, 8, 7, 6], batch=3,
                       finished=lambda place, row: seen.append((place, row)))
    assert [place for place, _ in seen] == [1, 3, 0, 2] and all(row is out[place] for place, row in seen)


def test_seeds_differ_and_repeat(models):
    one, two, again = (tokens(mil.generate(models["pure2"], PROMPTS, temperature=1.0, seed=s)) for s in (1, 2, 1))
    assert one == again and all(a != b for a, b in zip(one, two))
    same = tokens(mil.generate(models["pure2"], [PROMPTS[0]] * 2, temperature=1.0))
    assert same[0] != same[1]


def filtered(logits, temperature, top_k, top_p, min_p):
    """The distribution of ops.h in float64.   logits (..., V)"""
    p = np.exp((logits - logits.max(-1, keepdims=True)).astype(np.float64) / temperature)
    p /= p.sum(-1, keepdims=True)
    order = np.argsort(-p, axis=-1, kind="stable")
    s = np.take_along_axis(p, order, -1)
    s[..., top_k:] = 0
    s /= s.sum(-1, keepdims=True)
    s[np.cumsum(s, -1) - s >= top_p] = 0
    s[s < min_p * s[..., :1]] = 0
    np.put_along_axis(p, order, s / s.sum(-1, keepdims=True), -1)
    return p


@pytest.mark.parametrize("target, draft", [("transformer", "hybrid1"), ("hybrid2", "pure2")])
def test_sampled_speculation_has_the_model_s_distribution(target, draft):
    v, prompt, how = 7, [1, 2], dict(temperature=0.8, top_k=6, top_p=0.97, min_p=0.02)
    model, guess = (mil.random(config(kind, v, 2), seed=1) for kind in (target, draft))
    for m in (model, guess):  # far enough from uniform for acceptance to be a matter of chance
        m.set("lm_head.weight", m.get("lm_head.weight") * (1.0 / m.logits(np.array([[1, 2, 3]], np.int32)).std()))
    paths = np.array(list(itertools.product(range(v), repeat=3)), np.int32)
    ids = np.concatenate([np.tile(np.array(prompt, np.int32), (len(paths), 1)), paths], 1)
    p = filtered(model.logits(ids)[:, 1:4], **how)  # what each of the path's three tokens is drawn from
    exact = np.take_along_axis(p, paths[:, :, None], -1)[..., 0].prod(1).reshape(v, v, v)
    for seed in (1, 2, 3):
        out = mil.generate(model, [prompt] * 2000, max_new_tokens=3, seed=seed, draft=guess, lookahead=2, batch=500, **how)
        assert 0.2 < out.stats["acceptance"] < 0.98
        seen = np.array(tokens(out))
        for first, second, rest in ((0, 1, 2), (1, 2, 0)):
            expected = len(seen) * exact.sum(rest).ravel()
            counts = np.bincount(seen[:, first] * v + seen[:, second], minlength=v * v)
            likely = expected > 5
            assert not counts[expected == 0].any()
            pooled = lambda x: np.append(x[likely], x[~likely].sum()) if expected[~likely].sum() > 1 else x[likely]
            o, e = pooled(counts).astype(float), pooled(expected)
            assert chisquare(o, e * (o.sum() / e.sum())).pvalue > 0.001


def test_stop_tokens_end_rows_and_are_left_out(models, drafts):
    plain = tokens(mil.generate(models["hybrid2"], PROMPTS, max_new_tokens=24))
    ends = [plain[0][3], plain[2][10], plain[5][0]]
    want = [next((row[:i] for i, t in enumerate(row) if t in ends), row) for row in plain]
    for draft in (None, drafts["transformer"], models["hybrid2"]):
        out = mil.generate(models["hybrid2"], PROMPTS, max_new_tokens=24, stop_tokens=ends, draft=draft)
        assert tokens(out) == want
        assert [row.finish for row in out] == ["stop" if len(row) < 24 else "length" for row in want]
        assert [row.end for row in out] == [whole[len(row)] if len(row) < 24 else None for row, whole in zip(want, plain)]
    one = mil.generate(models["hybrid2"], PROMPTS[0], max_new_tokens=24, stop_tokens=ends[0])
    assert one[0].tokens == plain[0][:plain[0].index(ends[0])]


def test_the_folder_s_stop_tokens_are_the_default(spoken):
    prompt = spoken.tokenizer.encode("hello")
    free = mil.generate(spoken, prompt, max_new_tokens=1200, temperature=1.5, stop_tokens=[])[0]
    first = min(free.tokens.index(t) for t in (257, 258) if t in free.tokens)
    default = mil.generate(spoken, prompt, max_new_tokens=1200, temperature=1.5)[0]
    assert default.tokens == free.tokens[:first] and default.finish == "stop"
    made = mil.random(config("hybrid2") | {"eos_token_id": [257, 258]}, seed=3)  # the same model, without a folder
    assert mil.generate(made, prompt, max_new_tokens=1200, temperature=1.5)[0].tokens == default.tokens


@pytest.mark.parametrize("lookahead", [0, 4])
def test_stop_strings_and_streaming(spoken, lookahead):
    how = dict(max_new_tokens=60, temperature=0.8, stop_tokens=[], seed=11, draft=near("hybrid2", 2), lookahead=lookahead)
    prompts = ["hello", "größe", "x", "日本"]
    free = mil.generate(spoken, prompts, **how)
    stops = [free[0].text[7:10], free[1].text[4:6], free[2].text[20:26] + "never", free[3].text[9:10]]
    pieces = [[] for _ in prompts]
    out = mil.generate(spoken, prompts, stop=stops, callback=lambda i, token, text: pieces[i].append((token, text)), **how)
    for row, whole, streamed in zip(out, free, pieces):
        cut = min(((whole.text.index(s) + len(s), whole.text.index(s)) for s in stops if s in whole.text), default=None)
        assert row.text == (whole.text if cut is None else whole.text[:cut[1]])
        assert row.finish == ("length" if cut is None else "stop")
        assert row.tokens == whole.tokens[:len(row.tokens)]
        assert [token for token, _ in streamed] == row.tokens + [None]
        assert "".join(text for _, text in streamed) == row.text
        shown = ""
        for _, text in streamed[:-1]:
            shown += text
            assert row.text.startswith(shown)
    assert sum(row.finish == "stop" for row in out) >= 3


@pytest.mark.parametrize("call, name", [(lambda: mil.generate("folder", "x"), "generate: model"), (lambda: mil.convert("folder", attention=0.5), "convert: teacher"),
                                        (lambda: mil.distill("folder", "x", [], {"steps": 1}), "distill: student"),
                                        (lambda: mil.sft("folder", [], {"steps": 1}), "train: model"), (lambda: mil.dpo("folder", [], {"steps": 1}), "dpo: model")])
def test_a_folder_s_name_is_no_model(call, name):
    with pytest.raises(ValueError, match=f"{name} must be a model, as mil.load\\(folder\\) gives one, not 'folder'"):
        call()


def says(monkeypatch, model, text):
    """From here on `model` answers a prompt of one token with the bytes of `text`, whatever it is."""
    answer = [*model.tokenizer.encode(text), 0]
    module = sys.modules["mambainllama.generate"]
    original = module._round

    def scripted(models, states, slots, rows, *rest):
        gains = original(models, states, slots, rows, *rest)
        starts = [len(row.out.tokens) for row in rows]
        return [([answer[min(start + i, len(answer) - 1)] for i in range(len(tokens))], logits) for start, (tokens, logits) in zip(starts, gains)]

    monkeypatch.setattr(module, "_round", scripted)


@pytest.mark.parametrize("text, stops, want", [
    ("abcabd.", ["abd"], "abc"),          # a false start inside the stop string
    ("aaab.", ["aab"], "a"),              # overlapping false starts
    ("one\n\nUser: two", ["\n\nUser:"], "one"),
    ("xabcy", ["b", "abc"], "xa"),        # the one that is complete first
    ("xabcy", ["abc", "c"], "x"),         # both complete at once: the longer
    ("größe 日本語", ["語"], "größe 日本"),  # the stop string is one character of three tokens
    ("plain", ["nothing"], None),
])
def test_exact_stop_strings(spoken, monkeypatch, text, stops, want):
    says(monkeypatch, spoken, text)
    pieces = []
    n = len(spoken.tokenizer.encode(text))
    out = mil.generate(spoken, [5], max_new_tokens=n, stop=stops, stop_tokens=[], callback=lambda i, t, s: pieces.append(s))[0]
    assert out.text == (text if want is None else want) == "".join(pieces)
    assert out.finish == ("length" if want is None else "stop")
    assert all("\ufffd" not in p for p in pieces)


def test_a_stop_string_that_the_end_completes(spoken, monkeypatch):
    """Half a character becomes text only when nothing can follow it."""
    says(monkeypatch, spoken, "größe 日")
    n, pieces = len(spoken.tokenizer.encode("größe 日")) - 1, []
    out = mil.generate(spoken, [5], max_new_tokens=n, stop=["e \ufffd"], stop_tokens=[], callback=lambda i, t, s: pieces.append((t, s)))[0]
    assert out.text == "größ" == "".join(s for _, s in pieces) and out.finish == "stop"
    assert len(out.tokens) == n and [t for t, _ in pieces] == [*out.tokens, None]


def test_logprobs(models, drafts):
    model = models["hybrid1"]
    for draft in (None, drafts["transformer"]):
        out = mil.generate(model, PROMPTS, max_new_tokens=6, temperature=1.0, logprobs=3, draft=draft)
        for prompt, row in zip(PROMPTS, out):
            ids = np.array([prompt + row.tokens], np.int32)
            z = model.logits(ids)[0, len(prompt) - 1:-1].astype(np.float64)
            z -= np.log(np.exp(z - z.max()).sum(-1, keepdims=True)) + z.max()
            for token, given, true in zip(row.tokens, row.logprobs, z, strict=True):
                assert token in given and 3 <= len(given) <= 4
                assert set(np.argsort(-true)[:3]) <= set(given)
                np.testing.assert_allclose([true[i] for i in given], list(given.values()), atol=1e-3)
    assert all(list(lp) == [t] for lp, t in zip(mil.generate(model, [1], max_new_tokens=3, logprobs=0)[0].logprobs,
                                                mil.generate(model, [1], max_new_tokens=3)[0].tokens))


def test_forms_of_prompts(spoken):
    chat = [{"role": "user", "content": "hi"}]
    ids = spoken.tokenizer.encode("hi")
    alone = [mil.generate(spoken, p, max_new_tokens=5)[0].tokens for p in ("hi", chat, list(ids), np.array(ids))]
    together = tokens(mil.generate(spoken, ["hi", chat, list(ids), np.array(ids)], max_new_tokens=5))
    assert alone == together and alone[0] == alone[2] == alone[3] != alone[1]
    assert mil.generate(spoken, []) == []
    text = mil.generate(spoken, "hi", max_new_tokens=5)
    assert len(text) == 1 and isinstance(text[0].text, str)


def test_a_model_without_a_tokenizer(models):
    seen = []
    out = mil.generate(models["pure2"], [1, 2], max_new_tokens=3, callback=lambda *a: seen.append(a))
    assert out[0].text == "" and seen == [(0, t, "") for t in out[0].tokens] + [(0, None, "")]


def test_a_long_prompt_is_prefilled_in_parts(models):
    prompt = np.random.default_rng(0).integers(0, V, 2100).tolist()
    out = mil.generate(models["hybrid2"], prompt, max_new_tokens=2)
    assert out[0].tokens == stepwise(models["hybrid2"], prompt, 2)
    assert out.stats["prompt_tokens"] == 2100 and out.stats["prefill_tokens_per_second"] > 0


@pytest.mark.parametrize("how, sentence", [
    (dict(prompts=[[1], []]), "prompt 1 is empty"),
    (dict(prompts=[[1, V]]), f"no id of a vocabulary of {V}"),
    (dict(prompts=[[1, -1]]), "no id"),
    (dict(prompts="text"), "no tokenizer"),
    (dict(prompts=7), "prompts must be"),
    (dict(prompts=[None]), "prompt 0 must be"),
    (dict(temperature=-1), "temperature"),
    (dict(index=-1), "index must be 0 or more"),
    (dict(index=[1, 2]), r"has shape \(2,\)"),
    (dict(finished=3), "finished must be None"),
    (dict(temperature=[1, 1]), r"has shape \(2,\)"),
    (dict(temperature=float("nan")), "temperature"),
    (dict(top_k=1.5), "top_k"),
    (dict(top_p=0), "top_p"),
    (dict(min_p="x"), "min_p"),
    (dict(max_new_tokens=-1), "max_new_tokens"),
    (dict(lookahead=16), "lookahead"),
    (dict(stop=["x"]), "stop strings need a tokenizer"),
    (dict(stop_tokens=["x"]), "stop_tokens"),
    (dict(stop_tokens=1.5), "stop_tokens"),
    (dict(stop=3), "stop must be"),
    (dict(draft="x"), "draft must be"),
    (dict(callback=3), "callback must be"),
    (dict(logprobs=-1), "logprobs"),
    (dict(seed=-1), "seed"),
    (dict(batch=0), "batch"),
])
def test_wrong_input_is_one_sentence(models, how, sentence):
    with pytest.raises(ValueError, match=sentence) as e:
        mil.generate(models["transformer"], **{"prompts": [1], **how})
    assert "\n" not in str(e.value)


def test_a_draft_of_another_vocabulary_is_refused(models):
    with pytest.raises(ValueError, match="vocabulary of 11 tokens"):
        mil.generate(models["transformer"], [1], draft=mil.random(config("pure2", 11), seed=0))


def test_memory_stays_flat(models, drafts):
    run = lambda: mil.generate(models["hybrid1"], PROMPTS * 4, max_new_tokens=8, draft=drafts["transformer"])
    assert grown(run, 3, 10) < 4 << 20
