"""Tokenizer: encode and decode, streaming, chat templates as transformers renders them, masks of answers, stop tokens."""
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from mambainllama.tokenizer import Tokenizer, stop_tokens

FOLDER = Path(__file__).parent / "data" / "llama3"
CHAT = [{"role": "system", "content": " Be brief. "}, {"role": "user", "content": "What is the key of the blue door?"},
        {"role": "assistant", "content": "The key is <seven> & 🙂."}, {"role": "user", "content": "Copy: Größe 東京\n\n"},
        {"role": "assistant", "content": "Größe 東京"}]

# In the manner of the families' own templates.
LLAMA3 = """{%- if not date_string is defined %}
    {%- set date_string = "26 Jul 2024" %}
{%- endif %}
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start|>system\\n\\nToday Date: " + date_string + "\\n\\n" + system_message + "<|end|>" }}
{%- if tools is not none %}
    {%- for tool in tools %}
        {{- tool | tojson(indent=4) }}
    {%- endfor %}
{%- endif %}
{%- for message in messages %}
    {{- '<|start|>' + message['role'] + '\\n\\n' + message['content'] | trim + '<|end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start|>assistant\\n\\n' }}
{%- endif %}
"""
ZEPHYR = """{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\n'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""
QWEN = """{%- if tools %}{{- '<tools>' }}{% for tool in tools %}{{- "\\n" }}{{- tool | tojson }}{%- endfor %}{{- '</tools>' }}{%- endif %}
{%- if messages[0]['role'] != 'system' %}
    {{- '<|start|>system\\nYou are a helpful assistant.<|end|>\\n' }}
{%- endif %}
{%- set ns = namespace(turns=0) %}
{%- for message in messages %}
    {%- if message.role == "skipped" %}{%- continue %}{%- endif %}
    {%- set ns.turns = ns.turns + 1 %}
    {{- '<|start|>' + message.role + '\\n' + message.content + '<|end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start|>assistant\\n' }}
{%- endif %}
"""
MARKED = """{% for message in messages %}
{% if message.role == 'assistant' %}
<|start|>assistant
{% generation %}{{ message.content | trim }}<|end|>{% endgeneration %}

{% else %}
{{ '<|start|>' + message.role + '\n' + message.content + '<|end|>' }}
{% endif %}
{% endfor %}{% if add_generation_prompt %}<|start|>assistant
{% endif %}"""
LLAMA2 = """{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}\
{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}{% else %}\
{{ message['content'] + eos_token}}{% endif %}{% endfor %}"""
TEMPLATES = {"llama3": LLAMA3, "zephyr": ZEPHYR, "qwen": QWEN, "marked": MARKED}


@pytest.fixture
def tokenizer():
    return Tokenizer.from_folder(FOLDER)


def with_template(tmp_path, template, **changes):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(FOLDER / name, tmp_path / name)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text()) | {"chat_template": template} | changes
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    return Tokenizer(tmp_path)


def test_encode_and_decode(tokenizer):
    assert Tokenizer.from_folder(FOLDER.parent / "mamba1") is None
    with pytest.raises(ValueError, match="no tokenizer.json"):
        Tokenizer(FOLDER.parent / "mamba1")
    for text in ("", "hello", " Größe 東京 🙂\n\n\t x", "<|end|> within"):
        ids = tokenizer.encode(text)
        assert ids[0] == 1 and ids[1:] == tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.decode(ids, skip_special_tokens=False) == "<s>" + text
        assert tokenizer.decode(np.array(ids)) == text.replace("<|end|>", "")
    assert tokenizer.decode([10**6]) == ""
    for bad in (["x"], [-1], None, [2**70]):
        with pytest.raises(ValueError, match="token ids"):
            tokenizer.decode(bad)
    for bad in (3, None, ["x"], "\ud800"):
        with pytest.raises(ValueError, match="encode"):
            tokenizer.encode(bad)


def test_truncation_and_padding_of_a_training_run_are_left_out(tmp_path, tokenizer):
    data = json.loads((FOLDER / "tokenizer.json").read_text())
    data["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    data["padding"] = {"strategy": {"Fixed": 8}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
                       "pad_token": "<pad>"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    for text in ("a", "a longer text than three tokens"):
        assert Tokenizer(tmp_path).encode(text) == tokenizer.encode(text)


def test_stream_never_shows_half_a_character(tokenizer):
    text = "naïve Größe 東京 🙂🙂 <|end|>plain, x\n"
    stream, ids = tokenizer.stream(), tokenizer.encode(text)
    assert len(ids) > len(text)  # characters do come in pieces
    pieces = [stream.push(i) for i in ids]
    assert all("\ufffd" not in piece for piece in pieces) and "".join(pieces) + stream.flush() == tokenizer.decode(ids)
    assert sum(piece != "" for piece in pieces) > 10
    broken = tokenizer.encode("a🙂", add_special_tokens=False)[:-1]  # a character that is never finished
    stream = tokenizer.stream()
    assert [stream.push(i) for i in broken][0] == "a" and stream.flush() == tokenizer.decode(broken)[1:] != ""
    assert stream.flush() == ""


def test_stream_of_a_decoder_that_looks_at_the_token_before(tmp_path):
    """Llama-2's: spaces are ▁, the first of a text is dropped, unknown characters are bytes."""
    from tokenizers import Tokenizer as Package, decoders, models

    vocab = {"<unk>": 0, "<s>": 1, "▁Hello": 2, "▁wor": 3, "ld": 4, "▁": 5} | {f"<0x{b:02X}>": 6 + b for b in range(256)}
    package = Package(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    package.add_special_tokens(["<s>"])
    package.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    package.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(tmp_path)
    ids = [1, 2, 3, 4, 1, *(6 + b for b in "é東".encode()), 3, 5, 2]
    stream = tokenizer.stream()
    pieces = [stream.push(i) for i in ids]
    assert pieces[:6] == ["", "Hello", " wor", "ld", "", ""] and "".join(pieces) + stream.flush() == tokenizer.decode(ids)
    assert tokenizer.decode(ids) == "Hello worldé東 wor  Hello"


@pytest.mark.parity
@pytest.mark.parametrize("name", TEMPLATES)
def test_rendering_is_that_of_transformers(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    ours = with_template(tmp_path, TEMPLATES[name])
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    tools = [{"type": "function", "function": {"name": "f", "description": "<é> & 'x'"}}]
    for chat in (CHAT, CHAT[1:], CHAT[1:2], CHAT[:4]):
        for prompt in (True, False):
            for extra in ({}, {"tools": tools}, {"date_string": "today"}):
                text = theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompt, **extra)
                assert ours.render(chat, add_generation_prompt=prompt, **extra) == text
            ids = theirs.apply_chat_template(chat, add_generation_prompt=prompt, return_dict=False)
            assert ours.encode_chat(chat, add_generation_prompt=prompt) == ids
    if name == "marked":
        expected = theirs.apply_chat_template(CHAT, return_dict=True, return_assistant_tokens_mask=True)
        ids, mask = ours.encode_chat_with_mask(CHAT)
        assert ids == expected["input_ids"] and mask == expected["assistant_masks"]


@pytest.mark.parametrize("name, answer", [
    ("llama3", "The key is <seven> & 🙂.<|end|>Größe 東京<|end|>"),
    ("marked", "The key is <seven> & 🙂.<|end|>Größe 東京<|end|>"),
    ("qwen", "The key is <seven> & 🙂.<|end|>\nGröße 東京<|end|>\n"),
    ("zephyr", "The key is <seven> & 🙂.<|end|>\nGröße 東京<|end|>\n"),
])
def test_mask_covers_the_answers(name, answer, tmp_path):
    tokenizer = with_template(tmp_path, TEMPLATES[name])
    ids, mask = tokenizer.encode_chat_with_mask(CHAT)
    assert ids == tokenizer.encode_chat(CHAT, add_generation_prompt=False) and len(mask) == len(ids) and set(mask) == {0, 1}
    assert tokenizer.decode([i for i, m in zip(ids, mask) if m], skip_special_tokens=False) == answer
    assert sum(tokenizer.encode_chat_with_mask(CHAT[:2])[1]) == 0
    last = tokenizer.encode_chat_with_mask(CHAT, 3)[1]
    assert sum(last) and last == [m and i > len(tokenizer.encode_chat(CHAT[:3])) for i, m in enumerate(mask)]
    first = tokenizer.encode_chat(CHAT[:2])  # what generation is given is what stands before the first answer
    assert ids[: len(first)] == first and mask[len(first) - 1 : len(first) + 1] == [0, 1]


def test_marks_survive_macros_and_look_alikes(tmp_path):
    template = "{% macro turn(m) %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}{% else %}" \
               "{{ m.content }}{% endif %}<|end|>{% endmacro %}{% for m in messages %}{{ turn(m) }}{% endfor %}"
    tokenizer = with_template(tmp_path, template)
    chat = [{"role": "user", "content": "a\ufdd0\ufdd1b"}, {"role": "assistant", "content": " \n\n "}, {"role": "user", "content": "c"}]
    ids, mask = tokenizer.encode_chat_with_mask(chat)
    assert tokenizer.decode(ids) == "a\ufdd0\ufdd1b \n\n c" and sum(mask) < len(mask) / 2
    assert tokenizer.decode([i for i, m in zip(ids, mask) if m]) == " \n\n "


def test_a_prompt_may_end_in_what_an_answer_does_not_begin_with(tmp_path):
    """As DeepSeek-R1's templates do, which drop an answer's thoughts."""
    template = "{% for m in messages %}<|start|>{{ m.role }}|{{ m.content.split('</think>')[-1] }}<|end|>{% endfor %}" \
               "{% if add_generation_prompt %}<|start|>assistant|<think>\n{% endif %}"
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "<think>b</think>cd"}, {"role": "user", "content": "e"},
            {"role": "assistant", "content": "fg"}]
    tokenizer = with_template(tmp_path, template)
    ids, mask = tokenizer.encode_chat_with_mask(chat)
    assert tokenizer.decode([i for i, m in zip(ids, mask) if m], skip_special_tokens=False) == "cd<|end|>fg<|end|>"


def test_templates_that_hide_their_answers_are_refused(tmp_path):
    last_only = "{% for m in messages %}{{ m.content if loop.last else m.content | upper }}{% endfor %}"
    with pytest.raises(ValueError, match="message 2 differently once others follow"):
        with_template(tmp_path, last_only).encode_chat_with_mask(CHAT)
    earlier = "{% for m in messages %}{{ m.content | upper if m.role == 'assistant' and not loop.last else m.content }}{% endfor %}"
    tokenizer = with_template(tmp_path, earlier)
    with pytest.raises(ValueError, match="message 2 differently"):
        tokenizer.encode_chat_with_mask(CHAT)
    ids, mask = tokenizer.encode_chat_with_mask(CHAT, 3)  # the one answer that is wanted is where it was
    assert tokenizer.decode([i for i, m in zip(ids, mask) if m]) == CHAT[4]["content"]


def test_where_templates_come_from(tmp_path, tokenizer):
    tokenizer.folder = "here"
    tokenizer._template = None
    with pytest.raises(ValueError, match="here has no chat template"):
        tokenizer.render(CHAT)
    assert with_template(tmp_path, "one{{ eos_token }}").render(CHAT) == "one<|end|>"
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    assert with_template(tmp_path, named).render(CHAT) == "yes"
    (tmp_path / "chat_template.jinja").write_text("file {{ bos_token }}{{ pad_token }}{{ unk_token }}{{ user_key }}")
    (tmp_path / "special_tokens_map.json").write_text('{"unk_token": {"content": "<u>"}, "bos_token": "<no>"}')
    assert with_template(tmp_path, "one", pad_token=None).render(CHAT, user_key=3) == "file <s><u>3"


@pytest.mark.parametrize("template, match", [
    (LLAMA2, "roles must alternate"), ("{% for %}", "error in line 1"), ("{% generation %}", "error in line"),
    ("{{ messages[9].content }}", "refuses"), ("{{ raise_exception('') }}", "refuses these messages: TemplateError"),
    ("{{ raise_exception('a\\nb') }}", "a b"),
    ("{{ 1 / 0 }}", "refuses"), ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "refuses"), ("{{ messages.append(1) }}", "refuses"),
    ("{% for i in range(10**9) %}{% endfor %}", "refuses"), (3, "chat_template"), ({"a": 1}, "chat_template"),
])
def test_bad_and_hostile_templates(tmp_path, template, match):
    with pytest.raises(ValueError, match=match) as caught:
        with_template(tmp_path, template).render(CHAT)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("messages", [[], "hello", [1], [{"content": "x"}], None, [{"role": "user", "content": open}]])
def test_bad_messages(tokenizer, messages):
    with pytest.raises(ValueError):
        tokenizer.render(messages)


@pytest.mark.parametrize("content", [
    "", "{}", "[]", '{"model": {}}', "\x00" * 99, '{"version": "1.0", "model": {"type": "BPE", "vocab": 3, "merges": []}}'])
def test_broken_tokenizer_files(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match="tokenizer.json is not a tokenizer"):
        Tokenizer(tmp_path)


def test_damaged_tokenizer_files_are_refused_or_read(tmp_path):
    whole = (FOLDER / "tokenizer.json").read_bytes()
    path, refusals = tmp_path / "tokenizer.json", 0
    random = np.random.default_rng(0)
    for i in random.integers(len(whole), size=60):
        for content in (whole[:i], whole[:i] + bytes([random.integers(256)]) + whole[i + 1 :]):
            path.write_bytes(content)
            try:
                tokenizer = Tokenizer(tmp_path)
                tokenizer.decode(tokenizer.encode("hello 🙂"))
            except ValueError:
                refusals += 1
    assert refusals >= 60


def test_stop_tokens(tmp_path):
    assert stop_tokens(tmp_path) == []
    (tmp_path / "config.json").write_text('{"eos_token_id": 2}')
    assert stop_tokens(tmp_path) == [2]
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": null}')
    assert stop_tokens(tmp_path) == [2]
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 8]}')
    assert stop_tokens(tmp_path) == [7, 8]
    for bad in ('"x"', "[1.5]", "-3", "true"):
        (tmp_path / "generation_config.json").write_text(f'{{"eos_token_id": {bad}}}')
        with pytest.raises(ValueError, match="eos_token_id"):
            stop_tokens(tmp_path)
