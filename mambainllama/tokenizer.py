"""Text to token ids and back: tokenizer.json through the `tokenizers` package, chat templates rendered as transformers does.

Template source: transformers utils/chat_template_utils.py. A template is a program from a checkpoint, so it runs in Jinja's
immutable sandbox and sees plain data only."""
import hashlib
import json
import os
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import jinja2
import jinja2.ext
import numpy as np
import tokenizers
from jinja2.sandbox import ImmutableSandboxedEnvironment

from .config import read_file, read_json, said, show, stop_ids

SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token", "additional_special_tokens")
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes that byte-level BPE writes as themselves, others from 256 on
BYTES = {chr(byte): byte for byte in PRINTABLE} | {chr(256 + i): byte for i, byte in enumerate(sorted({*range(256)} - {*PRINTABLE}))}
MARKS = "generation_marks"  # the template variable that holds what to put before and after an answer


def stop_tokens(folder):
    """Ids that end an answer: eos_token_id of generation_config.json, else of config.json; [] without.
    ValueError: a file that cannot be read, or something else stands there."""
    for name in ("generation_config.json", "config.json"):
        path = Path(folder) / name
        settings = read_json(path) if path.exists() else {}
        if settings.get("eos_token_id") is not None:
            return stop_ids(settings, path)
    return []


class Tokenizer:
    """The tokenizer and chat template of a model folder. ValueError: no tokenizer.json, or files that cannot be read.

    fingerprint: of what decides its ids, hexadecimal."""

    def __init__(self, folder):
        self.folder = os.path.abspath(folder)
        path = Path(folder) / "tokenizer.json"
        if not path.exists():
            raise ValueError(f"{folder} has no tokenizer.json")
        content = read_file(path)
        with _refusing(f"{path} is not a tokenizer"):
            self._tokenizer = tokenizers.Tokenizer.from_buffer(content)
        self._tokenizer.no_truncation()  # settings of a training run, which transformers leaves out too
        self._tokenizer.no_padding()
        self._settings, self._template = _chat_settings(Path(folder))
        self._compiled = None
        decides = json.dumps([tokenizers.__version__, jinja2.__version__, self._settings, self._template])
        self.fingerprint = hashlib.sha256(content + decides.encode()).hexdigest()[:32]

    @classmethod
    def from_folder(cls, folder):
        """The folder's Tokenizer; None if it has no tokenizer.json."""
        return cls(folder) if os.path.lexists(Path(folder) / "tokenizer.json") else None

    chat_template = property(lambda self: self._template, doc="the template's text, None without")

    def special_id(self, name):
        """The id of a special token by its name, such as "bos_token"; None where the folder names none."""
        token = self._settings.get(name)
        return self._tokenizer.token_to_id(token) if isinstance(token, str) else None

    def encode(self, text, add_special_tokens=True):
        """Token ids of a string, with what the tokenizer puts around a text (such as BOS) unless told not to."""
        return self._encode([text], add_special_tokens)[0].ids

    def encode_batch(self, texts):
        """encode of each string, on all CPUs."""
        return [encoding.ids for encoding in self._encode(texts, True)]

    def _encode(self, texts, add_special_tokens):
        for text in texts:
            if not isinstance(text, str):
                raise ValueError(f"encode takes a string, not {type(text).__name__}")
        with _refusing("the text cannot be encoded"):  # a lone surrogate, a model without a token for unknown text
            if len(texts) == 1:  # without threads
                return [self._tokenizer.encode(texts[0], add_special_tokens=add_special_tokens)]
            return self._tokenizer.encode_batch(texts, add_special_tokens=add_special_tokens)

    def decode(self, ids, skip_special_tokens=True):
        """The string of token ids; ids that the tokenizer does not know give nothing."""
        with _refusing("decode takes a list of token ids"):
            return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)

    def piece(self, id):
        """(text, bytes) of one token as it stands inside a text: U+FFFD for parts of characters; bytes None where they are not known."""
        one = self.decode([id], skip_special_tokens=False)
        text = self.decode([id, id], skip_special_tokens=False)[len(one):] or one  # decoders trim what begins a text
        if "\ufffd" not in text:
            return text, text.encode()
        name = self._tokenizer.id_to_token(id) or ""
        if name.startswith("<0x") and len(name) == 6:
            return text, bytes([int(name[3:5], 16)])
        return text, bytes(map(BYTES.get, name)) if all(letter in BYTES for letter in name) else None

    def stream(self, skip_special_tokens=True):
        """A Stream: text of ids that come one at a time."""
        return Stream(self, skip_special_tokens)

    def render(self, messages, add_generation_prompt=True, **kwargs):
        """The text of a chat [{"role", "content"}, …] by the folder's template; kwargs are variables of the template (tools …).
        ValueError, one sentence: no template, messages of another form, or what the template raises."""
        if not isinstance(messages, list) or not messages or not all(
                isinstance(message, dict) and isinstance(message.get("role"), str) for message in messages):
            raise ValueError(f"a chat is a list of {{'role': …, 'content': …}}, not {show(messages)}")
        return self._render(messages, add_generation_prompt, **kwargs)

    def _render(self, messages, add_generation_prompt, **kwargs):
        if self._template is None:
            raise ValueError(f"{self.folder} has no chat template (chat_template.jinja, or chat_template in tokenizer_config.json)")
        try:
            if self._compiled is None:
                self._compiled = _environment().from_string(self._template)
            variables = {"tools": None, "documents": None, **self._settings, **kwargs, "messages": messages}
            return self._compiled.render(_plain(variables | {"add_generation_prompt": add_generation_prompt}))
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"{self.folder}: the chat template has an error in line {error.lineno}: {error.message}") from None
        except Exception as error:  # whatever the template's own operations raise
            raise ValueError(f"{self.folder}: the chat template refuses these messages: {said(error)}") from None

    def encode_chat(self, messages, add_generation_prompt=True, **kwargs):
        """Token ids of the rendered chat; the template writes the special tokens, none are added."""
        return self.encode(self.render(messages, add_generation_prompt, **kwargs), add_special_tokens=False)

    def encode_chat_with_mask(self, messages, first=0):
        """(ids, mask) of a whole chat: mask[i] is 1 where ids[i] belongs to an assistant's answer, its end marker included, and to
        messages[first:].

        Answers are the template's {% generation %} spans or, without any, what a turn adds to the chat before it rendered with
        the generation prompt. ValueError: a template whose earlier turns change with what follows, so that this is unknown."""
        return self.encode_chats_with_mask([messages], first)[0]

    def encode_chats_with_mask(self, chats, first=0):
        """encode_chat_with_mask of each chat, encoded on all CPUs."""
        texts = [self.render(messages, add_generation_prompt=False) for messages in chats]
        spans = [self._spans(messages, text, first) for messages, text in zip(chats, texts)]
        encodings = self._encode(texts, add_special_tokens=False)
        return [(encoding.ids, _inside(spans, text, encoding.offsets)) for encoding, spans, text in zip(encodings, spans, texts)]

    def _spans(self, messages, text, first):
        """Character spans of text, of the answers in messages[first:]."""
        spans = self._generation_spans(messages, text)
        if spans and first:
            spans = spans[len(self._generation_spans(messages[:first], self._render(messages[:first], False))):]
        return spans or self._prefix_spans(messages, text, first)

    def _generation_spans(self, messages, text):
        """Character spans of text within {% generation %} blocks: rendered again with marks, which occur nowhere else."""
        before, after = [c for c in map(chr, range(0xFDD0, 0xFDF0)) if c not in text][:2]  # not characters, by Unicode
        pieces = self._render(messages, False, **{MARKS: (before, after)}).split(before)
        if len(pieces) == 1:
            return []
        spans, plain = [], pieces[0]
        for piece in pieces[1:]:
            answer, mark, rest = piece.partition(after)
            spans.append((len(plain), len(plain) + len(answer)))
            plain += answer + rest
            if not mark or after in rest:
                raise ValueError(f"{self.folder}: the chat template nests or cuts its generation blocks")
        if plain != text:
            raise ValueError(f"{self.folder}: the chat template renders differently around its generation blocks")
        return spans

    def _prefix_spans(self, messages, text, first):
        spans = []
        for i, message in enumerate(messages):
            if i < first or message["role"] != "assistant":
                continue
            asked, before, after = self._render(messages[:i], False), self._render(messages[:i], True), self._render(messages[:i + 1], False)
            begin = len(os.path.commonprefix([before, after]))  # a prompt may end in what an answer does not begin with, such as <think>
            if not text.startswith(after) or begin < min(len(asked), len(before)):
                raise ValueError(f"{self.folder}: the chat template renders message {i} differently once others follow, so its "
                                 "answer cannot be located; a template with {% generation %} blocks would say where it is")
            spans.append((begin, len(after)))
        return spans


def _inside(spans, text, offsets):
    """For each token, from offsets[i][0] to offsets[i][1] of text, whether it shares a character with a span: a list of 0 and 1."""
    inside = np.zeros(len(text) + 1, np.int64)  # [k + 1]: character k is part of a span
    for begin, end in spans:
        inside[begin + 1 : end + 1] = 1
    count = np.cumsum(inside)
    begin, end = np.array(offsets, np.int64).reshape(-1, 2).T
    mask = (count[end] > count[begin]) | (begin == end) & (inside[end] > 0)  # empty: spaces that the tokenizer trims off
    return mask.astype(int).tolist()


class Stream:
    """Decodes ids one by one: the pieces joined are the text of all. A piece never ends within a character."""

    def __init__(self, tokenizer, skip_special_tokens=True):
        self.tokenizer, self.skip = tokenizer, skip_special_tokens
        self.ids, self.given = [], 0  # the ids of the last piece, which show how the next one reads, and those since

    def push(self, id):
        """The text that this id completes, "" while a character is incomplete."""
        self.ids.append(id)
        return self._piece(last=False)

    def flush(self):
        """What is left at the end: bytes that never became a character, as the decoder shows them."""
        return self._piece(last=True)

    def _piece(self, last):
        before, text = (self.tokenizer.decode(ids, self.skip) for ids in (self.ids[: self.given], self.ids))
        if len(text) <= len(before) or text.endswith("\ufffd") and not last:
            return ""
        del self.ids[: self.given]
        self.given = len(self.ids)
        return text[len(before) :]


@contextmanager
def _refusing(sentence):
    """ValueError for whatever the package raises: bare Exceptions, and panics of its Rust, which are not even those."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:
        raise ValueError(f"{sentence}: {said(error)}") from None


def _chat_settings(folder):
    """(special tokens by name, template or None) of tokenizer_config.json, special_tokens_map.json and chat_template.jinja."""
    config, named = ({} if not (folder / name).exists() else read_json(folder / name)
                     for name in ("tokenizer_config.json", "special_tokens_map.json"))
    special = {}
    for key in SPECIAL:
        value = config.get(key, named.get(key))
        values = [v.get("content") if isinstance(v, dict) else v for v in (value if isinstance(value, list) else [value])]
        if all(isinstance(v, str) for v in values):
            special[key] = values if isinstance(value, list) else values[0]
    template = config.get("chat_template")
    if (folder / "chat_template.jinja").exists():
        try:
            template = read_file(folder / "chat_template.jinja").decode()
        except UnicodeDecodeError:
            raise ValueError(f"{folder / 'chat_template.jinja'} is not UTF-8") from None
    if isinstance(template, list):
        templates = {t.get("name"): t.get("template") for t in template if isinstance(t, dict) and isinstance(t.get("name"), str)}
        template = templates.get("default")
    if template is not None and not isinstance(template, str):
        raise ValueError(f"{folder / 'tokenizer_config.json'}: chat_template is {show(template)}, expected a string")
    return special, template


def _environment():
    extensions = [_Generation, jinja2.ext.loopcontrols]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    # Jinja's own filter escapes HTML
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message):
    raise jinja2.TemplateError(message)


class _Generation(jinja2.ext.Extension):
    """{% generation %} … {% endgeneration %}: its body, between MARKS where they are given."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        call = self.call_method("_mark", [jinja2.nodes.ContextReference()])
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _mark(self, context, caller):
        before, after = context.get(MARKS, ("", ""))
        return before + caller() + after


def _plain(value):
    """The same of plain types: a template must not reach the methods of what a caller puts into a message."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, dict):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(_plain, value)) if type(value) in (list, tuple) else list(map(_plain, value))
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind(value)
    raise ValueError(f"a {type(value).__name__} is in the chat, expected text, numbers, lists and dicts")
