"""`mambainllama serve`: the engine behind OpenAI's HTTP interface. Starlette and uvicorn (extra `serve`) carry it; requests are read and
answers written here, and all else is engine.py.

A parameter that we have no way to obey, or do not know, is refused when it asks for something; those that do not change an answer (user,
store …) are ignored."""
import asyncio
import difflib
import hmac
import json
import math
import secrets
import signal
import socket
import sys
import time
from bisect import bisect_left
from contextlib import suppress
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, StreamingResponse
from starlette.routing import Route

from .config import said
from .engine import Draining, Engine, Full, Request
from .generate import encode_prompt

BODY_BYTES = 32 << 20
INLINE_BYTES = 1 << 16  # text that is encoded in no time
MOST_LOGPROBS = 100
SEEDS = 1 << 53
BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120, 300)  # seconds
# what we cannot do: the values of it that ask for nothing
UNSUPPORTED = {"tools": ([],), "functions": ([],), "tool_choice": ("none", "auto"), "response_format": ({"type": "text"},),
               "logit_bias": ({},), "presence_penalty": (0,), "frequency_penalty": (0,), "repetition_penalty": (1,), "suffix": ("",),
               "best_of": (1,), "modalities": (["text"],)}
# what changes no answer
IGNORED = ("model", "user", "store", "metadata", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
           "prediction", "parallel_tool_calls")


class Refused(Exception):
    """A request that gets an error of OpenAI's form: {"error": {"message", "type", "param", "code"}}."""

    def __init__(self, status, message, param=None, code=None, headers=None):
        super().__init__(message)
        kind = "invalid_request_error" if status < 429 else "rate_limit_error" if status == 429 else "server_error"
        text = lambda s: s and s.encode("utf-8", "replace").decode()  # a request may hold half a character
        self.error = {"error": {"message": text(message), "type": kind, "param": text(param), "code": code}}
        self.status, self.headers = status, headers

    def response(self):
        return JSONResponse(self.error, self.status, self.headers)


# ---- what a request asks for -------------------------------------------------------------------------------------------------------------


class _Body(dict):
    """A request's JSON object; null is absent.  known: the names that were asked for, and those that need not be."""

    def __init__(self, body):
        super().__init__(body)
        self.known = {*IGNORED, *UNSUPPORTED}

    def get(self, name):
        self.known.add(name)
        return super().get(name)

    def number(self, name, default, low, high, whole=False, above=False):
        value = self.get(name)
        if value is None:
            return default
        good = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
        if not good or not low <= value <= high or above and value == low:
            ends = f"above {low:g} and at most {high:g}" if above else f"{low} or more" if high == math.inf else f"from {low} to {high}"
            raise Refused(400, f"{name} must be {'an integer' if whole else 'a number'} {ends}, not {_show(value)}", name)
        return value

    def flag(self, name):
        value = self.get(name)
        if value is not None and not isinstance(value, bool):
            raise Refused(400, f"{name} must be true or false, not {_show(value)}", name)
        return bool(value)

    def stop(self):
        value = self.get("stop")
        stops = [] if value is None else [value] if isinstance(value, str) else value
        if not isinstance(stops, list) or not all(isinstance(s, str) and s for s in stops):
            raise Refused(400, f"stop must be a non-empty string or a list of these, not {_show(value)}", "stop")
        return stops

    def unknown(self):
        """Refuses the first name that nobody asked for and whose value asks for something."""
        for name, value in self.items():
            if value and name not in self.known:
                near = difflib.get_close_matches(name, self.known, 1, 0.8)
                raise Refused(400, f"{_show(name)} is no parameter here" + (f"; did you mean {near[0]!r}?" if near else ""), name)


def _show(value):
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."


class _Asked:
    """A request as the engine takes it: its rows are added to `request`.

    chat       whether it came to /chat/completions
    logprobs   None, or how many of the likeliest tokens are shown beside the chosen one
    prompts    a list of (text or None, ids)"""

    def __init__(self, body, chat, engine, request):
        body, tokenizer = _Body(body), engine.model.tokenizer
        self.chat, self.request, self.tokenizer = chat, request, tokenizer
        for name, nothing in UNSUPPORTED.items():
            if body.get(name) is not None and body[name] not in nothing:
                raise Refused(400, f"{name} is not supported here, and {_show(body[name])} asks for it", name)
        self.prompts = _chat_prompts(body, engine) if chat else _prompts(body, engine)
        n = body.number("n", 1, 1, 1 << 16, whole=True)
        self.stream, self.echo = body.flag("stream"), not chat and body.flag("echo")
        options = body.get("stream_options") or {}
        if not isinstance(options, dict):
            raise Refused(400, f"stream_options must be an object, not {_show(options)}", "stream_options")
        self.include_usage = self.stream and _Body(options).flag("include_usage")
        self.token_ids = body.flag("return_token_ids") or tokenizer is None
        if chat:
            top = body.number("top_logprobs", 0, 0, MOST_LOGPROBS, whole=True)
            self.logprobs = top if body.flag("logprobs") else None
            if top and self.logprobs is None:
                raise Refused(400, "top_logprobs goes with logprobs: true", "top_logprobs")
        else:
            self.logprobs = body.number("logprobs", None, 0, MOST_LOGPROBS, whole=True)
        vocabulary = engine.model.config["vocab_size"]
        if self.logprobs is not None:
            self.logprobs = min(self.logprobs, vocabulary)
        stops = body.stop()
        if stops and tokenizer is None:
            raise Refused(400, "stop strings need a tokenizer, and the model has none", "stop")
        top_k = body.number("top_k", 0, -1, (1 << 31) - 1, whole=True)
        choice = {"temperature": body.number("temperature", 1.0, 0, 1e6), "top_p": body.number("top_p", 1.0, 0, 1, above=True),
                  "top_k": max(top_k, 0), "min_p": body.number("min_p", 0.0, 0, 1)}
        seed = body.number("seed", None, -(1 << 63), (1 << 64) - 1, whole=True)
        seed = secrets.randbelow(SEEDS) if seed is None else seed % SEEDS
        limit = body.number("max_tokens", None if chat else 16, 0, math.inf, whole=True)
        limit = body.number("max_completion_tokens", limit, 0, math.inf, whole=True)
        body.unknown()
        if len(self.prompts) * n > engine.queue:
            raise Refused(400, f"{len(self.prompts) * n} continuations in one request are more than the {engine.queue} that may wait", "n")
        for text, ids in self.prompts:
            room = engine.context - len(ids)
            if room < (1 if limit is None else limit):
                asked = "" if limit is None else f" and {_show(limit)} new ones"
                raise Refused(400, f"the prompt's {len(ids)} tokens{asked} are more than the context of {engine.context} tokens: "
                              "Please try again with a different prompt.",  # at these words alpaca_eval goes on with the next
                              "messages" if chat else "prompt", "context_length_exceeded")
            for _ in range(n):
                request.row(engine, ids, room if limit is None else limit, stops, self.logprobs, self.echo,
                            choice | {"index": len(request.rows)}, seed)
        self.of = [j for j in range(len(self.prompts)) for _ in range(n)]  # the prompt of each row

    # -- what its answer says -----------------------------------------------------------------------------------------------------------

    def usage(self):
        rows, n = self.request.rows, len(self.request.rows) // len(self.prompts)
        prompt, new = sum(len(ids) for _, ids in self.prompts), sum(len(row.out.tokens) for row in rows)
        accepted, drafted = sum(row.accepted for row in rows), sum(row.drafted for row in rows)
        return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new,
                "prompt_tokens_details": {"cached_tokens": sum(row.cached for row in rows[::n])},
                "completion_tokens_details": {"accepted_prediction_tokens": accepted, "rejected_prediction_tokens": drafted - accepted}}


def _encode(engine, prompt, name, param):
    try:
        return encode_prompt(engine.model, prompt, name)
    except ValueError as error:
        raise Refused(400, said(error), param) from None


def _prompts(body, engine):
    value = body.get("prompt")
    if value is None:
        raise Refused(400, "prompt is missing: a string, token ids, or a list of these", "prompt")
    whole = lambda p: isinstance(p, list) and p and all(isinstance(t, int) and not isinstance(t, bool) for t in p)
    prompts = [value] if isinstance(value, str) or whole(value) else value
    if not isinstance(prompts, list) or not prompts or not all(isinstance(p, str) or whole(p) for p in prompts):
        raise Refused(400, "prompt must be a string, token ids, or a list of these, and not empty", "prompt")
    names = ["the prompt"] if len(prompts) == 1 else [f"prompt {i}" for i in range(len(prompts))]
    return [(p if isinstance(p, str) else None, _encode(engine, p, name, "prompt")) for p, name in zip(prompts, names)]


def _chat_prompts(body, engine):
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
        raise Refused(400, "messages must be a list of {\"role\", \"content\"}, and not empty", "messages")
    messages = [m | {"content": _content(m.get("content"))} for m in messages]
    return [(None, _encode(engine, messages, "messages", "messages"))]


def _content(content):
    """A message's text; OpenAI's clients may give it in parts."""
    if content is None or isinstance(content, str):
        return content or ""
    plain = lambda part: isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
    if isinstance(content, list) and all(map(plain, content)):
        return "".join(part["text"] for part in content)
    raise Refused(400, "a message's content must be text, or a list of parts of text", "messages")


# ---- tokens as text ----------------------------------------------------------------------------------------------------------------------


def _piece_of(tokenizer, id):
    return tokenizer.piece(id) if tokenizer else (f"token_id:{id}", None)


def _token(tokenizer, id, logprob):
    text, content = _piece_of(tokenizer, id)
    return {"token": text, "logprob": logprob, "bytes": None if content is None else list(content)}


class _Choice:
    """A row as it is told: how much of it has been said."""

    def __init__(self, asked, row):
        self.asked, self.row, self.said, self.offset = asked, row, 0, 0
        self.likely = row.likeliest is not None
        self.stream = asked.tokenizer.stream() if self.likely and asked.tokenizer else None

    def head(self):
        """(text, logprobs) of the echoed prompt."""
        text, ids = self.asked.prompts[self.asked.of[self.row.place]]
        if text is None and self.asked.tokenizer:
            text = self.asked.tokenizer.decode(ids, skip_special_tokens=False)
        logprobs = self._completion_logprobs(ids, [None, *self.row.echoed], text or "") if self.likely else None
        if self.stream:  # the answer's text is made of its own tokens
            self.stream, self.offset = self.asked.tokenizer.stream(), len(text)
        return text or "", logprobs

    def news(self, last):
        """(token ids, logprobs) since it was asked before."""
        out, begin = self.row.out, self.said
        end = len(out.logprobs if self.likely else out.tokens)  # the engine goes on meanwhile: first a token, then its logprobs
        tokens, likely = out.tokens[begin:end], out.logprobs[begin:end] if self.likely else None
        if last and self.row.ended is not None:
            tokens, likely = tokens + [out.end], likely + [self.row.ended]
        self.said += len(tokens)
        if not self.likely:
            return tokens, None
        return tokens, (self._chat_logprobs if self.asked.chat else self._completion_logprobs)(tokens, likely)

    def _chat_logprobs(self, tokens, likely):
        tell, k = self.asked.tokenizer, self.asked.logprobs
        return {"content": [{**_token(tell, token, found[token]), "top_logprobs": [_token(tell, *pair) for pair in list(found.items())[:k]]}
                            for token, found in zip(tokens, likely)], "refusal": None}

    def _completion_logprobs(self, tokens, likely, text=None):
        """text: the one that the tokens are of, which may show special tokens, and may not: one that begins a prompt was added to it."""
        shown = self.asked.tokenizer.stream(skip_special_tokens=False) if text and self.stream else None
        parts = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token, found in zip(tokens, likely):
            parts["tokens"].append(_piece_of(self.asked.tokenizer, token)[0])
            parts["token_logprobs"].append(found and found[token])
            top = found and {}
            for id, value in (found or {}).items():
                top.setdefault(_piece_of(self.asked.tokenizer, id)[0], value)  # of tokens that read the same, the likeliest
            parts["top_logprobs"].append(top)
            parts["text_offset"].append(self.offset)
            piece = self.stream.push(token) if self.stream else ""
            if shown and text.startswith(whole := shown.push(token), self.offset):
                piece = whole
            self.offset += len(piece)
        return parts


# ---- the application ---------------------------------------------------------------------------------------------------------------------


class Api:
    """The routes. name: what the model is called in answers; requests may call it anything."""

    def __init__(self, engine, name, api_key=None):
        self.engine, self.name, self.key, self.began = engine, name, api_key, int(time.time())
        self.statuses, self.seconds, self.first = {}, _Histogram(), _Histogram()
        route = lambda path, call, *methods: Route(path, self._guarded(call), methods=methods)
        self.app = Starlette(
            routes=[Route("/", self.page, methods=["GET"]), Route("/health", self.health, methods=["GET"]),
                    Route("/metrics", self.metrics, methods=["GET"]), route("/v1/models", self.models, "GET"),
                    route("/v1/models/{name:path}", self.model, "GET"), route("/v1/completions", self.completions, "POST"),
                    route("/v1/chat/completions", self.chat, "POST")],
            exception_handlers={
                HTTPException: lambda request, e: Refused(
                    e.status_code, f"{request.method} {request.url.path}: {e.detail}", headers=e.headers).response(),
                Exception: lambda request, e: Refused(500, f"the server failed: {said(e)}").response()})

    def _guarded(self, call):
        async def guarded(request):
            given = request.headers.get("authorization", "").removeprefix("Bearer ").encode("latin-1")  # as it came
            try:
                if self.key and not hmac.compare_digest(given, self.key.encode()):
                    raise Refused(401, "this server needs its API key: Authorization: Bearer KEY", code="invalid_api_key")
                response = await call(request)
            except Refused as refused:
                response = refused.response()
            except ClientDisconnect:
                response = PlainTextResponse("", 499)
            self.statuses[response.status_code] = self.statuses.get(response.status_code, 0) + 1
            return response
        return guarded

    async def page(self, request):
        return HTMLResponse((Path(__file__).parent / "chat.html").read_text(encoding="utf-8"))

    async def health(self, request):
        draining = self.engine.draining
        return JSONResponse({"status": "draining" if draining else "ok", "model": self.name}, 503 if draining else 200)

    def _described(self):
        return {"id": self.name, "object": "model", "created": self.began, "owned_by": "mambainllama", "max_model_len": self.engine.context}

    async def models(self, request):
        return JSONResponse({"object": "list", "data": [self._described()]})

    async def model(self, request):
        if request.path_params["name"] != self.name:
            raise Refused(404, f"the model here is {self.name!r}, not {request.path_params['name']!r}", "model", "model_not_found")
        return JSONResponse(self._described())

    async def completions(self, request):
        return await self._answer(request, chat=False)

    async def chat(self, request):
        return await self._answer(request, chat=True)

    async def _answer(self, http, chat):
        began = time.perf_counter()
        body, size = await _read_json(http)
        queue, loop = asyncio.Queue(), asyncio.get_running_loop()

        def notify(news):  # from the engine's thread
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(queue.put_nowait, news)

        request = Request(notify, live=body.get("stream") is True)
        if size > INLINE_BYTES:
            asked = await run_in_threadpool(_Asked, body, chat, self.engine, request)
        else:
            asked = _Asked(body, chat, self.engine, request)
        try:
            self.engine.submit(request)
        except Draining:
            raise Refused(503, "the server is shutting down") from None
        except Full as full:
            raise Refused(429, str(full), headers={"Retry-After": str(full.seconds)}) from None
        gone = asyncio.ensure_future(_gone(http, request, queue))
        news = self._news(queue, request, began, gone)
        head = {"id": ("chatcmpl-" if chat else "cmpl-") + secrets.token_hex(12), "created": int(time.time()), "model": self.name}
        if asked.stream:
            return StreamingResponse(self._stream(asked, news, head), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        try:
            async for _ in news:
                pass
        except ClientDisconnect:
            raise
        except Exception as error:
            raise Refused(503 if isinstance(error, Draining) else 500, f"the model failed: {said(error)}") from None
        return JSONResponse({**head, "object": "chat.completion" if chat else "text_completion",
                             "choices": [_whole(asked, row) for row in request.rows], "usage": asked.usage()})

    async def _news(self, queue, request, began, gone):
        """Lists of (row, text), each of all that is there, until every row has ended; raises what the engine met, and ClientDisconnect."""
        first, rows = request.live, len(request.rows)
        try:
            while rows:
                news = await queue.get()
                if isinstance(news, Exception):
                    raise news
                while not queue.empty():  # so that the loop sees between two writes whether the client is still there
                    more = queue.get_nowait()
                    if isinstance(more, Exception):
                        queue.put_nowait(more)
                        break
                    news += more
                if first:
                    self.first.add(time.perf_counter() - began)
                    first = False
                rows -= sum(text is None for _, text in news)
                yield news
            self.seconds.add(time.perf_counter() - began)
        finally:
            gone.cancel()

    async def _stream(self, asked, news, head):
        """Server-sent events."""
        head = {**head, "object": "chat.completion.chunk" if asked.chat else "text_completion"}
        if asked.include_usage:
            head["usage"] = None
        event = lambda content: f"data: {json.dumps(content, ensure_ascii=False)}\n\n".encode("utf-8", "replace")
        told = [_Choice(asked, row) for row in asked.request.rows]
        begun = set()

        def events(row, text):
            choice = told[row.place]
            if row.place not in begun:
                begun.add(row.place)
                if asked.chat:
                    yield _piece(asked, row, {"role": "assistant", "content": ""})
                elif asked.echo:
                    yield _piece(asked, row, *choice.head())
            tokens, logprobs = choice.news(last=text is None)
            shown = {"token_ids": tokens} if asked.token_ids else {}
            finish = row.out.finish if text is None else None
            delta = {"content": text} if asked.chat and text else {} if asked.chat else text or ""
            yield _piece(asked, row, delta, logprobs if tokens else None, finish) | shown

        try:
            async for found in news:
                yield b"".join(event({**head, "choices": [piece]}) for row, text in found for piece in events(row, text))
        except ClientDisconnect:
            return
        except Exception as error:
            yield event(Refused(500, f"the model failed: {said(error)}").error)
            return
        if asked.include_usage:
            yield event({**head, "choices": [], "usage": asked.usage()})
        yield b"data: [DONE]\n\n"

    async def metrics(self, request):
        engine, stats = self.engine, self.engine.table.stats
        c = engine.counts
        values = {
            "requests_total": ("counter", {f'{{code="{code}"}}': n for code, n in sorted(self.statuses.items())}),
            "queue_rows": ("gauge", len(engine.waiting)), "rows_in_use": ("gauge", engine.rows_in_use),
            "rows": ("gauge", len(engine.table.seats)),
            "rows_finished_total": ("counter", c["rows"]), "rows_cancelled_total": ("counter", c["cancelled"]),
            "prompt_tokens_total": ("counter", c["prompt_tokens"]), "generated_tokens_total": ("counter", stats["decided"]),
            "rounds_total": ("counter", stats["rounds"]), "drafted_tokens_total": ("counter", stats["drafted"]),
            "accepted_tokens_total": ("counter", stats["accepted"]),
            "acceptance": ("gauge", stats["accepted"] / stats["drafted"] if stats["drafted"] else 0.0),
            "prefix_cache_hits_total": ("counter", c["cache_hits"]), "prefix_cache_misses_total": ("counter", c["cache_misses"]),
            "prefix_cache_tokens_total": ("counter", c["cached_tokens"]), "prefix_cache_states": ("gauge", len(engine.prefixes.kept)),
            "prefix_cache_bytes": ("gauge", len(engine.prefixes.kept) * engine.row_bytes),
        }
        lines = []
        for name, (kind, value) in values.items():
            lines.append(f"# TYPE mambainllama_{name} {kind}")
            lines += [f"mambainllama_{name}{label} {n}" for label, n in (value.items() if isinstance(value, dict) else [("", value)])]
        lines += self.seconds.lines("mambainllama_request_seconds") + self.first.lines("mambainllama_time_to_first_token_seconds")
        return PlainTextResponse("\n".join(lines) + "\n", media_type="text/plain; version=0.0.4")


def _piece(asked, row, delta, logprobs=None, finish=None):
    """A choice of a streamed event."""
    return {"index": row.place, "delta" if asked.chat else "text": delta, "logprobs": logprobs, "finish_reason": finish}


def _whole(asked, row):
    """A choice of an answer."""
    choice, text = _Choice(asked, row), row.out.text
    echoed, before = choice.head() if asked.echo else ("", None)
    tokens, logprobs = choice.news(last=True)
    if before:
        logprobs = {name: before[name] + logprobs[name] for name in before}
    content = {"message": {"role": "assistant", "content": text, "refusal": None}} if asked.chat else {"text": echoed + text}
    return {"index": row.place, **content, "logprobs": logprobs, "finish_reason": row.out.finish} | (
        {"token_ids": row.out.tokens} if asked.token_ids else {})


async def _read_json(http):
    content = bytearray()
    async for part in http.stream():
        content += part
        if len(content) > BODY_BYTES:
            raise Refused(413, f"a request has at most {BODY_BYTES >> 20} MiB")
    try:
        body = json.loads(bytes(content))
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"the request is not JSON: {said(error)}") from None
    if not isinstance(body, dict):
        raise Refused(400, "the request must be a JSON object")
    return body, len(content)


async def _gone(http, request, queue):
    """Waits for the client to go away, then frees its rows."""
    while (await http.receive())["type"] != "http.disconnect":
        pass
    request.cancel()
    queue.put_nowait(ClientDisconnect())


class _Histogram:
    """Of seconds, in Prometheus' form."""

    def __init__(self):
        self.counts, self.sum = [0] * (len(BUCKETS) + 1), 0.0

    def add(self, seconds):
        self.counts[bisect_left(BUCKETS, seconds)] += 1
        self.sum += seconds

    def lines(self, name):
        below = [sum(self.counts[:i + 1]) for i in range(len(self.counts))]
        return [f"# TYPE {name} histogram", *(f'{name}_bucket{{le="{edge}"}} {n}' for edge, n in zip([*BUCKETS, "+Inf"], below)),
                f"{name}_sum {self.sum}", f"{name}_count {below[-1]}"]


# ---- the process -------------------------------------------------------------------------------------------------------------------------


class _Server(uvicorn.Server):
    """SIGTERM or Ctrl-C: finishes what runs and refuses what comes; Ctrl-C again: stops now."""

    def __init__(self, app, engine):
        super().__init__(uvicorn.Config(app, log_level="warning", access_log=False, lifespan="off", timeout_graceful_shutdown=10))
        self.engine = engine

    def handle_exit(self, sig, frame):
        self.force_exit = self.force_exit or sig == signal.SIGINT and self.engine.draining
        self.engine.draining = True

    async def on_tick(self, counter):
        if self.force_exit:
            await run_in_threadpool(self.engine.stop)  # what runs is told so
        if self.force_exit or self.engine.draining and self.engine.idle:
            self.should_exit = True
        return await super().on_tick(counter)


def listen(host, port):
    """A listening socket. OSError, one sentence: an address that cannot be had."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listening = socket.create_server((host, port), family=family, backlog=1024)
    except (OSError, OverflowError) as error:
        raise OSError(f"cannot serve at {host}:{port}: {getattr(error, 'strerror', None) or said(error)}") from None
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # inherited: head and body of an answer are two writes
    return listening


def serve(model, draft=None, lookahead=4, host="127.0.0.1", port=8000, name=None, api_key=None, ready=print, **sizes):
    """Serves until SIGTERM or Ctrl-C. port 0: a free one. ready is called with the line that says where, once connections are accepted.
    sizes: rows, context, cache and queue of Engine."""
    name = name or (Path(model.folder).resolve().name if model.folder else "mambainllama")
    with listen(host, port) as listening:
        engine = Engine(model, draft, lookahead, **sizes)
        server = _Server(Api(engine, name, api_key).app, engine)
        where = f"[{host}]" if ":" in host else host
        ready(f"{name} at http://{where}:{listening.getsockname()[1]} ({len(engine.table.seats)} rows of {engine.context} tokens, "
              f"{len(engine.prefixes.free)} kept prefixes of {engine.row_bytes / 2**20:.1f} MiB)")
        sys.setswitchinterval(5e-4)  # a round takes about as long, and the engine's thread should not wait ten for its turn
        try:
            server.run(sockets=[listening])
        finally:
            engine.stop()
    if server.force_exit:
        raise KeyboardInterrupt
