"""The server as its clients meet it: OpenAI's own, and sockets that vanish. What it says is what mil.generate says."""
import asyncio
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest

import mambainllama as mil
from conftest import grown, on
from test_generate import config, near, spoken  # noqa: F401 (a fixture)

openai = pytest.importorskip("openai")
serve = pytest.importorskip("mambainllama.serve")
from mambainllama.engine import Engine  # noqa: E402
from mambainllama.evaluate.lm import log_likelihoods  # noqa: E402

CHAT = [{"role": "user", "content": "größer?"}]
TEXTS = ["the key", "größe 日本語", "a", "what is " * 9, "copy: a b c d"]


@contextmanager
def serving(model, draft=None, api_key=None, **sizes):
    """(client, engine) of a server in this process."""
    listening = serve.listen("127.0.0.1", 0)
    engine = Engine(model, draft, **sizes)
    server = serve._Server(serve.Api(engine, "tiny", api_key).app, engine)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        yield openai.OpenAI(base_url=f"http://127.0.0.1:{listening.getsockname()[1]}/v1", api_key="none", max_retries=0), engine
    finally:
        server.should_exit = True
        thread.join()
        engine.stop()


@pytest.fixture(scope="module")
def draft(spoken):  # noqa: F811
    """spoken with its head moved a little: right some of the time."""
    model = mil.load(spoken.folder)
    head = model.get("lm_head.weight")
    model.set("lm_head.weight", head + 0.5 * head.std() * np.random.default_rng(1).normal(size=head.shape).astype(np.float32))
    return model


@pytest.fixture(scope="module", params=["plain", "drafted"])
def served(request, spoken, draft):  # noqa: F811
    with serving(spoken, draft if request.param == "drafted" else None, rows=8) as (client, engine):
        yield client, engine, spoken


def raw(client, method, path, body=None, headers=()):
    """(status, headers, text)"""
    connection = http.client.HTTPConnection(client.base_url.host, client.base_url.port, timeout=20)
    connection.request(method, path, body if body is None or isinstance(body, (str, bytes)) else json.dumps(body), dict(headers))
    response = connection.getresponse()
    text = response.read().decode()
    connection.close()
    return response.status, response.headers, text


def until(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def meter(client, name):
    lines = raw(client, "GET", "/metrics")[2].splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.split("{")[0].split()[0] == f"mambainllama_{name}")


@pytest.mark.parametrize("how", [dict(temperature=0), dict(temperature=0.9, seed=7, top_p=0.9), dict(temperature=1.2, seed=2**40 + 3)])
def test_answers_are_those_of_generate(served, how):
    client, engine, model = served
    whole = lambda prompts, **more: mil.generate(model, prompts, draft=engine.draft, **how | more)
    got = client.completions.create(model="any", prompt=TEXTS, max_tokens=11, **how)
    assert [c.text for c in got.choices] == [row.text for row in whole(TEXTS, max_new_tokens=11)]
    ids = [model.tokenizer.encode(text) for text in TEXTS]
    again = client.completions.create(model="any", prompt=ids, max_tokens=11, **how)
    assert [(c.index, c.text, c.finish_reason) for c in again.choices] == [(c.index, c.text, c.finish_reason) for c in got.choices]
    assert again.usage.prompt_tokens == sum(map(len, ids)) and again.model == "tiny"
    alone = client.completions.create(model="any", prompt=ids[1], max_tokens=11, n=3, extra_body={"top_k": 40, "min_p": 0.01}, **how)
    assert [c.text for c in alone.choices] == [row.text for row in whole([ids[1]] * 3, max_new_tokens=11, top_k=40, min_p=0.01)]
    chat = client.chat.completions.create(model="any", messages=CHAT, max_completion_tokens=9, n=2, **how)
    want = whole([CHAT, CHAT], max_new_tokens=9)
    assert [(c.message.content, c.finish_reason) for c in chat.choices] == [(row.text, row.finish) for row in want]
    assert chat.usage.completion_tokens == sum(len(row.tokens) for row in want)


def test_rows_with_seeds_of_their_own_side_by_side(served):
    client, engine, model = served
    async def ask():
        async with openai.AsyncOpenAI(base_url=client.base_url, api_key="none") as many:
            calls = [many.completions.create(model="any", prompt="seeds", seed=s, temperature=1, max_tokens=12) for s in range(8)]
            return [answer.choices[0].text for answer in await asyncio.gather(*calls)]
    texts = asyncio.run(ask())
    assert len(set(texts)) > 4
    assert texts == [mil.generate(model, "seeds", seed=s, temperature=1, max_new_tokens=12, draft=engine.draft)[0].text for s in range(8)]


@pytest.mark.parametrize("stops", [None, ["e", "\n"]])
def test_streams(served, stops):
    client, engine, model = served
    how = dict(temperature=1.0, seed=5)
    want = mil.generate(model, [CHAT, CHAT], max_new_tokens=40, stop=stops, logprobs=2, draft=engine.draft, **how)
    told, likely, finish, usage = ["", ""], [[], []], {}, None
    for event in client.chat.completions.create(model="any", messages=CHAT, n=2, max_tokens=40, stop=stops, stream=True, logprobs=True,
                                                top_logprobs=2, stream_options={"include_usage": True}, **how):
        usage = event.usage
        for choice in event.choices:
            told[choice.index] += choice.delta.content or ""
            likely[choice.index] += choice.logprobs.content if choice.logprobs else []
            finish[choice.index] = choice.finish_reason
    assert told == [row.text for row in want] and finish == {i: row.finish for i, row in enumerate(want)}
    for entries, row in zip(likely, want):
        assert [e.logprob for e in entries[:len(row.tokens)]] == [found[t] for t, found in zip(row.tokens, row.logprobs)]
        tops = [[top.logprob for top in e.top_logprobs] for e in entries[:len(row.tokens)]]
        assert tops == [list(found.values())[:2] for found in row.logprobs]
        assert len(entries) == len(row.tokens) + (row.end is not None)
        said = b"".join(bytes(e.bytes) for e in entries[:len(row.tokens)])  # a token is a byte here, and the bytes make the text
        assert len(said) >= len(row.tokens) and (stops or said.decode("utf-8", "replace") == row.text)
    assert usage.completion_tokens == sum(len(row.tokens) for row in want)
    if engine.draft:
        assert 0 < usage.completion_tokens_details.accepted_prediction_tokens


def test_echo_tells_the_prompts_log_probabilities(served):
    client, _, model = served
    text = "größe 日本語: " * 21  # more than one part of a prompt
    ids = model.tokenizer.encode(text)
    assert len(ids) > 256
    z = model.logits(np.array([ids], np.int32))[0].astype(np.float64)
    z -= np.log(np.exp(z).sum(-1, keepdims=True))
    for limit in (0, 3):
        choice = client.completions.create(model="any", prompt=text, max_tokens=limit, echo=True, logprobs=1, temperature=0).choices[0]
        after = mil.generate(model, text, max_new_tokens=limit)[0]
        assert choice.text == text + after.text
        shown = choice.logprobs
        n = len(ids) + len(after.tokens) + (after.end is not None)
        assert len(shown.tokens) == len(shown.token_logprobs) == len(shown.top_logprobs) == len(shown.text_offset) == n
        assert shown.token_logprobs[0] is None
        np.testing.assert_allclose(shown.token_logprobs[1:len(ids)], z[np.arange(len(ids) - 1), ids[1:]], atol=1e-4)
        np.testing.assert_allclose([max(top.values()) for top in shown.top_logprobs[1:len(ids)]], z[:-1].max(-1), atol=1e-4)
        for k in (3, 200, len(ids) - 1):  # U+FFFD hides the parts of characters; the others read as they stand in the text
            if "\ufffd" not in shown.tokens[k]:
                assert text[shown.text_offset[k]:].startswith(shown.tokens[k])
    assert client.completions.create(model="any", prompt=text, max_tokens=2, echo=True).choices[0].text.startswith(text)
    for stream in (False, True):
        assert json.loads(raw(client, "POST", "/v1/completions", {"prompt": "abc", "max_tokens": 0, "echo": True, "stream": stream})[2]
                          .removeprefix("data: ").split("\n\n")[0])["choices"][0]["text"] == "abc"


@pytest.mark.parametrize("as_ids", [False, True])
def test_offsets_are_those_of_a_text_with_special_tokens(served, as_ids):
    client, _, model = served
    text = "<s>a<end> größe<end>"
    ids = model.tokenizer.encode(text)
    prompt = ids if as_ids else text
    choice = client.completions.create(model="any", prompt=prompt, max_tokens=3, echo=True, logprobs=0, temperature=0).choices[0]
    offsets, tokens = choice.logprobs.text_offset, choice.logprobs.tokens
    assert choice.text.startswith(text) and offsets[:4] == [0, 3, 4, 9] and offsets[len(ids)] == len(text)
    assert all(text[offset:].startswith(token) or token == "\ufffd" for offset, token in zip(offsets, tokens[:len(ids)]))


def test_scores_as_lm_evaluation_harness_reads_them(served):
    """Its local-completions: the tokens of context and continuation, one more generated, echo; against log_likelihoods in process."""
    client, _, model = served
    rng = np.random.default_rng(4)
    pairs = [(rng.integers(0, 256, n).tolist(), rng.integers(0, 256, m).tolist()) for n, m in ((1, 1), (5, 3), (300, 2), (7, 40))]
    pairs += [(c, mil.generate(model, c, max_new_tokens=4)[0].tokens) for c, _ in pairs]  # what greedy decoding gives
    for limit in (1, 3):  # lists in one request
        some = pairs[:limit] + pairs[4:]
        got = client.completions.create(model="x", prompt=[c + a for c, a in some], max_tokens=1, temperature=0, logprobs=1, seed=1234, echo=True)
        for (context, answer), choice, (score, greedy) in zip(some, got.choices, log_likelihoods(model, some), strict=True):
            told, tops = (getattr(choice.logprobs, name)[len(context):-1] for name in ("token_logprobs", "top_logprobs"))
            assert len(told) == len(answer) and abs(sum(told) - score) < 1e-4
            assert all(one == max(top.values()) for one, top in zip(told, tops)) == greedy


def test_two_hundred_clients_of_whom_some_vanish(served):
    client, engine, model = served
    rng = np.random.default_rng(0)
    asked = [(rng.integers(0, 256, rng.integers(1, 300 if i % 9 == 0 else 30)).tolist(), int(rng.integers(1, 30)), i % 2) for i in range(200)]

    async def one(many, i):
        prompt, limit, sampled = asked[i]
        how = dict(model="any", prompt=prompt, temperature=float(sampled), seed=i)
        if i % 5 == 0:  # goes away, before or after its first words
            with suppress(openai.APITimeoutError):
                stream = await many.with_options(timeout=0.02 + i % 3).completions.create(max_tokens=200, stream=True, **how)
                await anext(aiter(stream))
                await stream.close()
            return None
        return (await many.completions.create(max_tokens=limit, **how)).choices[0].text

    async def all_():
        async with openai.AsyncOpenAI(base_url=client.base_url, api_key="none", max_retries=0) as many:
            return await asyncio.gather(*(one(many, i) for i in range(200)))

    answers = asyncio.run(all_())
    stay = [i for i in range(200) if i % 5]
    for i, (prompt, limit, sampled) in enumerate(asked):
        if i in stay and sampled:
            assert answers[i] == mil.generate(model, prompt, max_new_tokens=limit, temperature=1, seed=i, draft=engine.draft)[0].text
    greedy = [i for i in stay if not asked[i][2]]
    out = mil.generate(model, [asked[i][0] for i in greedy], max_new_tokens=[asked[i][1] for i in greedy])
    assert [answers[i] for i in greedy] == [row.text for row in out]
    until(lambda: engine.idle)
    assert meter(client, "rows_in_use") == meter(client, "queue_rows") == 0 and meter(client, "rows_cancelled_total") > 0


def test_a_client_that_goes_away_frees_its_row(spoken, monkeypatch):  # noqa: F811
    with serving(spoken, rows=1, queue=4) as (client, engine):
        original = engine.table.round
        monkeypatch.setattr(engine.table, "round", lambda: (time.sleep(0.01), original())[1])
        for stream in (True, False):
            connection = http.client.HTTPConnection("127.0.0.1", client.base_url.port)
            before = engine.counts["cancelled"]
            body = {"prompt": [[1, 2], [3]], "max_tokens": 400, "stream": stream, "temperature": 0}
            connection.request("POST", "/v1/completions", json.dumps(body))
            until(lambda: engine.rows_in_use and engine.waiting)
            connection.sock.close()
            connection.close()
            until(lambda: engine.idle, 3)
            assert engine.counts["cancelled"] == before + 2


def test_a_remembered_beginning_changes_nothing(spoken, draft):  # noqa: F811
    rng = np.random.default_rng(3)
    first, other = rng.integers(0, 256, (2, 256)).tolist()
    prompts = [first + rng.integers(0, 256, n).tolist() for n in (1, 30, 30, 140)] + [other + [5, 6]]
    for helper in (None, draft):
        with serving(spoken, helper, rows=2, cache=0) as (client, engine):
            size = engine.row_bytes
        with serving(spoken, helper, rows=2, cache=4 * size + 1) as (client, engine):
            assert len(engine.prefixes.free) == 4
            cached = []
            for prompt in [*prompts, prompts[1], prompts[4]]:
                for how in (dict(temperature=0), dict(temperature=1, seed=3)):
                    got = client.completions.create(model="any", prompt=prompt, max_tokens=12, extra_body={"return_token_ids": True}, **how)
                    assert got.choices[0].token_ids == mil.generate(spoken, prompt, max_new_tokens=12, draft=helper, **how)[0].tokens
                    cached.append(got.usage.prompt_tokens_details.cached_tokens)
            assert cached[:10] == [0, 256, 256, 285, 256, 285, 256, 395, 0, 257]
            assert len(engine.prefixes.kept) == 4 and not engine.prefixes.free  # the oldest made room
            many = client.completions.create(model="any", prompt=other[:99], n=5, max_tokens=4, temperature=1, seed=1)
            want = mil.generate(spoken, [other[:99]] * 5, max_new_tokens=4, temperature=1, seed=1, draft=helper)
            assert [c.text for c in many.choices] == [row.text for row in want]
            assert engine.counts["cached_tokens"] >= sum(cached) + 4 * 98
            longer = client.completions.create(model="any", prompt=other[:140], max_tokens=1)  # which does not pass through 98 tokens
            assert longer.usage.prompt_tokens_details.cached_tokens == 0


BAD = [
    ({"prompt": []}, "prompt"), ({}, "prompt"), ({"prompt": [1, 999]}, "prompt"), ({"prompt": "\ud800"}, "prompt"),
    ({"prompt": [1] * 513}, "prompt"), ({"prompt": [1], "max_tokens": 600}, "prompt"),
    *(({"prompt": [1], name: value}, name) for name, value in [
        ("n", 0), ("n", 5000), ("temperature", -1), ("temperature", "hot"), ("top_p", 0), ("stop", [""]), ("logprobs", -1), ("stream", "yes"),
        ("seed", 1.5), ("presence_penalty", 1), ("logit_bias", {"5": 1}),
        ("stream", 1), ("echo", 1), ("temprature", 0.1), ("ignore_eos", True), ("top_logprobs", 2)]),
    ({"prompt": [1], "max_tokens": 10**400}, "prompt"), ({"prompt": [1], "\ud800": 1}, "?"),
]


@pytest.mark.parametrize("body, param", BAD)
def test_what_is_refused(served, body, param):
    status, _, text = raw(served[0], "POST", "/v1/completions", body)
    error = json.loads(text)["error"]
    assert (status, error["param"], error["type"]) == (400, param, "invalid_request_error") and "\n" not in error["message"]


def test_what_asks_for_nothing(served):
    body = {"prompt": [1], "max_tokens": 1, "user": "me", "store": True, "ignore_eos": False, "min_tokens": 0, "best_of": 1, "tools": None}
    assert raw(served[0], "POST", "/v1/completions", body)[0] == 200


def test_requests_that_are_none(served):
    for body in ("{", "[1]", "\xff", "[" * 100000):
        status, _, text = raw(served[0], "POST", "/v1/chat/completions", body.encode("latin-1"))
        assert status == 400 and json.loads(text)["error"]["message"]
    for messages in ([], "hi", [{"content": "x"}], [{"role": "user", "content": [{"type": "image_url"}]}]):
        assert raw(served[0], "POST", "/v1/chat/completions", {"messages": messages})[0] == 400
    assert raw(served[0], "GET", "/v1/nowhere")[0] == 404
    status, headers, _ = raw(served[0], "GET", "/v1/completions")
    assert status == 405 and headers["allow"] == "POST"
    with pytest.raises(openai.NotFoundError):
        served[0].models.retrieve("gpt-5")


def test_pages_and_models(served):
    client, engine, _ = served
    assert [m.id for m in client.models.list()] == ["tiny"] == [client.models.retrieve("tiny").id]
    status, headers, text = raw(client, "GET", "/")
    assert status == 200 and headers["content-type"].startswith("text/html") and "v1/chat/completions" in text and "viewport" in text
    assert re.findall(r"(?:src|href)=\"([^\"]*)\"", text) == ["data:,"] and "http" not in text  # all that it needs is in it
    assert json.loads(raw(client, "GET", "/health")[2]) == {"status": "ok", "model": "tiny"}
    parts = [{"role": "user", "content": [{"type": "text", "text": "grö"}, {"type": "text", "text": "ßer?"}]}]
    one, two = (client.chat.completions.create(model="x", messages=m, max_tokens=5, temperature=0).choices[0] for m in (parts, CHAT))
    assert one.message.content == two.message.content
    assert meter(client, "request_seconds_count") > 0 and meter(client, "rounds_total") == engine.table.stats["rounds"]


def test_a_key_and_a_full_queue(spoken, monkeypatch):  # noqa: F811
    with serving(spoken, api_key="secret", rows=1, queue=1) as (client, engine):
        assert raw(client, "GET", "/v1/models")[0] == 401 and raw(client, "GET", "/health")[0] == 200
        with pytest.raises(openai.AuthenticationError):
            client.models.list()
        client = client.with_options(api_key="secret")
        hold, original = threading.Event(), engine.table.round
        monkeypatch.setattr(engine.table, "round", lambda: (hold.wait(10), original())[1])
        streams = [threading.Thread(target=client.completions.create, kwargs=dict(model="x", prompt=[1], max_tokens=3)) for _ in range(2)]
        for stream, full in zip(streams, (lambda: engine.rows_in_use, lambda: engine.waiting)):
            stream.start()
            until(full)
        with pytest.raises(openai.RateLimitError) as refused:
            client.completions.create(model="x", prompt=[1], max_tokens=3)
        assert int(refused.value.response.headers["retry-after"]) >= 1
        assert "rate limit" in str(refused.value)  # by these words, and those below, alpaca_eval knows that it may wait or must go on
        with pytest.raises(openai.BadRequestError, match="more than the context of .* Please try again with a different prompt."):
            client.completions.create(model="x", prompt=[1], max_tokens=1 << 20)
        hold.set()
        for stream in streams:
            stream.join()
        assert client.completions.create(model="x", prompt=[1], max_tokens=3).choices[0].finish_reason


def test_a_key_in_any_script(spoken):  # noqa: F811
    with serving(spoken, api_key="ключ", rows=1) as (client, _):
        for key, status in (("ключ", 200), ("Ключ", 401)):
            assert raw(client, "GET", "/v1/models", headers={"Authorization": f"Bearer {key}".encode()})[0] == status


def test_what_came_meanwhile_is_told_at_once(served):
    """A write an event would not let the loop see, between them, that the client is gone."""
    _, engine, model = served
    async def heard(*news):
        request, queue, found = serve.Request(print), asyncio.Queue(), []
        request.rows = [row := object()]
        for text in news:
            queue.put_nowait(text if isinstance(text, Exception) else [(row, text)])
        with suppress(ZeroDivisionError):
            async for some in serve.Api(engine, "x")._news(queue, request, 0, asyncio.get_running_loop().create_future()):
                found.append([text for _, text in some])
        return found
    assert asyncio.run(heard("a", "b", None)) == [["a", "b", None]]
    assert asyncio.run(heard("a", "b", ZeroDivisionError())) == [["a", "b"]]


def test_a_model_that_fails_fails_what_it_had_alone(spoken, monkeypatch):  # noqa: F811
    def failing():
        raise RuntimeError("the device is lost")
    with serving(spoken, rows=2) as (client, engine):
        want = client.completions.create(model="x", prompt="abc", temperature=0).choices[0].text
        with monkeypatch.context() as m:
            m.setattr(engine.table, "round", failing)
            with pytest.raises(openai.InternalServerError, match="the device is lost"):
                client.completions.create(model="x", prompt="abc")
            with pytest.raises(openai.APIError, match="the device is lost"):
                list(client.completions.create(model="x", prompt="abc", stream=True))
        assert client.completions.create(model="x", prompt="abc", temperature=0).choices[0].text == want and engine.rows_in_use == 0


def test_a_model_without_a_tokenizer(spoken):  # noqa: F811
    bare = mil.load(spoken.folder)
    bare.tokenizer = None
    with serving(bare, rows=2) as (client, _):
        want = mil.generate(bare, [1, 2], max_new_tokens=6)[0].tokens
        assert client.completions.create(model="x", prompt=[1, 2], max_tokens=6, temperature=0).choices[0].token_ids == want
        events = client.completions.create(model="x", prompt=[1, 2], max_tokens=6, temperature=0, stream=True)
        assert [id for event in events for choice in event.choices for id in choice.token_ids] == want
        with pytest.raises(openai.BadRequestError, match="no tokenizer"):
            client.completions.create(model="x", prompt="text")


def test_memory_stays_flat(served):
    client, _, _ = served
    def run():
        for i in range(20):
            client.completions.create(model="x", prompt=["abc" * (i + 1)] * 4, max_tokens=4, logprobs=2, seed=i)
    assert grown(run, 3, 5) < 4 << 20


def test_the_command_drains(spoken):  # noqa: F811
    """SIGTERM: what runs is finished, what comes is refused, the exit code is 0."""
    command = [sys.executable, "-P", "-m", "mambainllama", "serve", spoken.folder, "--port", "0", "--rows", "2"]
    how = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"MIL_NUM_THREADS": "1"})
    with subprocess.Popen(command, **how) as process:
        port = int(process.stdout.readline().split("http://127.0.0.1:")[1].split()[0])
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
        client.models.list()  # and the connection stays
        stream = client.completions.create(model="x", prompt="go", n=12, max_tokens=500, stream=True, temperature=1, seed=1, logprobs=0)
        events = [next(stream)]
        process.send_signal(signal.SIGTERM)
        refused = []
        for event in stream:
            if not refused:
                with pytest.raises(openai.APIStatusError) as e:
                    client.completions.create(model="x", prompt="more")
                refused.append(e.value.status_code)
            events.append(event)
        want = mil.generate(spoken, ["go"] * 12, max_new_tokens=500, temperature=1, seed=1)
        assert ["".join(e.choices[0].text for e in events if e.choices[0].index == i) for i in range(12)] == [row.text for row in want]
        client.close()
        assert process.wait(20) == 0 and process.stderr.read() == "" and refused == [503]


def test_frequencies_that_depend_on_the_length():
    """Dynamic RoPE is the rows' longest, so rows are decoded alone."""
    model = mil.load(str(Path(__file__).parent / "data" / "llama-dynamic"))
    prompts = np.random.default_rng(0).integers(3, 83, (3, 14)).tolist()
    with serving(model, context=60) as (client, engine):
        got = client.completions.create(model="x", prompt=prompts, max_tokens=8, temperature=0)
        assert len(engine.table.seats) == 1
        assert [c.token_ids for c in got.choices] == [mil.generate(model, p, max_new_tokens=8)[0].tokens for p in prompts]


@pytest.mark.parametrize("sizes, sentence", [
    (dict(rows=0), "rows must be"), (dict(context=0), "context must be"), (dict(queue=0), "queue must be"), (dict(cache=-1), "cache must be"),
    (dict(lookahead=16), "lookahead")])
def test_an_engine_of_impossible_sizes(spoken, sizes, sentence):  # noqa: F811
    with pytest.raises(ValueError, match=sentence):
        Engine(spoken, **sizes)


def test_an_address_that_is_taken(spoken):  # noqa: F811
    with serve.listen("127.0.0.1", 0) as taken, pytest.raises(OSError, match="cannot serve at 127.0.0.1:"):
        serve.serve(spoken, port=taken.getsockname()[1])


@pytest.mark.parametrize("device", on("cuda32", "cuda"), indirect=True)
def test_on_a_gpu(device):
    model, helper = mil.random(config("hybrid2"), seed=0, **device.how), near("transformer", 1, **device.how)
    prompts = [[1, 2, 3], list(range(40)), [9]]
    for draft in (None, helper):
        with serving(model, draft, rows=2) as (client, engine):
            for how in (dict(temperature=0), dict(temperature=1, seed=5)):
                for _ in range(2):  # the second time from what was kept
                    got = client.completions.create(model="x", prompt=prompts, max_tokens=5, n=2, **how).choices
                    want = mil.generate(model, [p for p in prompts for _ in range(2)], max_new_tokens=5, draft=draft, **how)
                    assert [c.token_ids for c in got] == [row.tokens for row in want]
            assert engine.counts["cache_hits"] > 0
