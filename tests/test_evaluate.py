"""Evaluations: their files are FastChat's and AlpacaEval's, their numbers those of whole forwards, and nothing is lost or asked twice, whatever
ends a call."""
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import numpy as np
import pytest

import mambainllama as mil
from mambainllama import evaluate
from mambainllama.cli import main
from mambainllama.evaluate.alpaca import wins
from mambainllama.evaluate.gap import make_items, named, read_items
from mambainllama.evaluate.judge import Judge, JudgeError
from mambainllama.evaluate.lm import text_log_likelihoods
from mambainllama.evaluate.mtbench import rating
from mambainllama.evaluate.needle import perplexity_by_position
from test_generate import models, spoken  # noqa: F401 (fixtures)


@pytest.fixture
def judge(monkeypatch):
    """A server of the OpenAI protocol; .say(messages) -> text, or (status, headers[, text]) of a refusal. .asked: the messages of each call."""
    state = SimpleNamespace(asked=[], say=lambda messages: "Rating: [[7]]")

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            state.asked.append(body["messages"])
            said, status, headers = state.say(body["messages"]), 200, {}
            if isinstance(said, tuple):
                status, headers, said = (*said, "busy")[:3]
            content = json.dumps({"id": "x", "object": "chat.completion", "created": 0, "model": body["model"],
                                  "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}, "choices": [
                                      {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": said}}]}).encode()
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), "Content-Type": "application/json", **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args):
            pass
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{server.server_port}/v1"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr("mambainllama.evaluate.judge.WAIT", 0.01)
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    yield state
    server.shutdown()
    server.server_close()


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def state_of(folder):
    """What a folder says that does not depend on when and how fast."""
    results = json.loads((folder / "results.json").read_text())
    return {k: v for k, v in results.items() if k not in ("finished", "seconds")}, json.loads((folder / "items.json").read_text())


# ---- the judge ---------------------------------------------------------------------------------------------------------------------


def test_a_busy_judge_is_asked_again(judge, monkeypatch):
    refusals, waits = [(429, {"Retry-After": "0"}), (503, {}), (429, {"Retry-After": "soon"}), (429, {"Retry-After": "3"})], []
    judge.say = lambda messages: refusals.pop() if refusals else "yes"
    monkeypatch.setattr("mambainllama.evaluate.judge.time.sleep", waits.append)
    assert Judge("j", judge.url, wait=1).ask([{"role": "user", "content": "?"}]) == "yes" and len(judge.asked) == 5
    assert waits == [3, 2, 4, 8]  # as long as it asks for, and longer each time


@pytest.mark.parametrize("say, says, calls", [((401, {}), "401", 1), ((404, {}), "404", 1), ((429, {}), "429", 6)])
def test_a_judge_that_refuses(judge, say, says, calls):
    judge.say = lambda messages: say
    with pytest.raises(JudgeError, match=f"{judge.url} refuses: {says}"):
        Judge("j", judge.url, wait=0.001).ask([])
    assert len(judge.asked) == calls


def test_a_question_that_is_too_long_for_the_judge(judge):
    judge.say = lambda messages: (400, {}, "the prompt's 99 tokens are more than the context of 64 tokens")
    assert rating(Judge("j", judge.url).ask([])) == -1 and len(judge.asked) == 1


def test_a_judge_that_is_down():
    with pytest.raises(JudgeError, match="http://127.0.0.1:9/v1 cannot be asked.*refused"):
        Judge("j", "http://127.0.0.1:9/v1").ask([])


# ---- MT-Bench ----------------------------------------------------------------------------------------------------------------------

QUESTIONS = [{"question_id": 81 + i, "category": c, "turns": [f"First {c} {{?}}", f"Then {c}"]} for i, c in enumerate(["writing", "math", "stem", "new"])]
PROMPTS = [{"name": name, "type": "single", "system_prompt": f"system {name}", "output_format": "[[rating]]", "prompt_template": template} for name, template in {
    "single-v1": "Q {question} A {answer}", "single-math-v1": "Q {question} R {ref_answer_1} A {answer}",
    "single-v1-multi-turn": "Q {question_1} A {answer_1} Q {question_2} A {answer_2}",
    "single-math-v1-multi-turn": "R {ref_answer_1} R {ref_answer_2} Q {question_1} A {answer_1} Q {question_2} A {answer_2}"}.items()]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_lines(folder / "mt_bench" / "question.jsonl", QUESTIONS)
    write_lines(folder / "judge_prompts.jsonl", PROMPTS)
    write_lines(folder / "mt_bench" / "reference_answer" / "gpt-4.jsonl", [{"question_id": 82, "choices": [{"index": 0, "turns": ["one", "two"]}]}])
    return folder


def test_mtbench(spoken, data, tmp_path, judge):  # noqa: F811
    ratings = {"single-v1": "Rating: [[8]]", "single-math-v1": "[[3.5]]", "single-v1-multi-turn": "[6]", "single-math-v1-multi-turn": "no idea"}
    judge.say = lambda messages: ratings[messages[0]["content"].removeprefix("system ")]
    out, how = tmp_path / "out", dict(judge="own/judge", judge_url=judge.url, max_new_tokens=20, seed=3, name="half")
    results = evaluate.mtbench(spoken, data, out, **how)
    answers = {row["question_id"]: row for row in lines(out / "model_answer" / "half.jsonl")}
    assert list(answers) == [81, 82, 83, 84] and all(set(row) == {"question_id", "answer_id", "model_id", "choices", "tstamp"} for row in answers.values())
    for i, (q, temperature) in enumerate(zip(QUESTIONS, [0.7, 0.0, 0.1, 0.7])):
        chat, turns = [], []
        for turn, text in enumerate(q["turns"]):
            chat += [{"role": "user", "content": text}]
            alone = mil.generate(spoken, chat, 20, temperature=temperature, seed=3, index=[2 * i + turn])[0]
            turns.append(alone.text.strip())
            chat += [{"role": "assistant", "content": turns[-1]}]
        assert answers[q["question_id"]]["choices"] == [{"index": 0, "turns": turns}] and answers[q["question_id"]]["model_id"] == "half"
    path = out / "model_judgment" / "own_judge_single.jsonl"
    judged = {(row["question_id"], row["turn"]): row for row in lines(path)}
    math = answers[82]["choices"][0]["turns"]
    assert judged[82, 2]["user_prompt"] == f"R one R two Q First math {{?}} A {math[0]} Q Then math A {math[1]}"
    assert judged[82, 1]["user_prompt"] == f"Q First math {{?}} R one A {math[0]}" and judged[82, 1]["judge"] == ["own/judge", "single-math-v1"]
    assert {key: row["score"] for key, row in judged.items()} == {(q, t): {(82, 1): 3.5, (82, 2): -1}.get((q, t), 8 if t == 1 else 6)
                                                                  for q in range(81, 85) for t in (1, 2)}
    # what show_result.py prints: means of the rows that are not -1
    rows = [row for row in lines(path) if row["score"] != -1]
    for name, keep in {"first_turn": (1,), "second_turn": (2,), "average": (1, 2)}.items():
        assert results["scores"][name] == pytest.approx(np.mean([row["score"] for row in rows if row["turn"] in keep]))
    assert results["failures"] == 1 and "1 of 8" in results["notes"][0] and results["categories"]["math"] == {
        "average": 3.5, "first_turn": 3.5, "second_turn": None} and (out / "radar.svg").stat().st_size > 1000
    # a first look at fewer questions changes no file; only what failed is asked again
    evaluate.mtbench(spoken, data, out, **how | {"limit": 1, "judge": None})
    ratings["single-math-v1-multi-turn"], before = "[[10]]", len(judge.asked)
    again = evaluate.mtbench(spoken, data, out, **how)
    assert len(judge.asked) == before + 1 and again["failures"] == 0 and again["scores"]["math"] == 6.75
    assert {row["question_id"]: row for row in lines(out / "model_answer" / "half.jsonl")} == answers


def test_a_judge_that_goes_down_loses_nothing(spoken, data, tmp_path, judge, capsys):  # noqa: F811
    judge.say = lambda messages: "[[5]]" if len(judge.asked) <= 3 else (401, {})
    args = ["evaluate", "mtbench", spoken.folder, "--data", str(data), "--out", str(tmp_path), "--judge", "j", "--judge-url", judge.url, "--parallel", "1",
            "--max-new-tokens", "5"]
    assert main(args) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "refuses: 401" in err and "the same call goes on" in err
    path = tmp_path / "model_judgment" / "j_single.jsonl"
    assert len(lines(path)) == 3
    with open(path, "a") as file:
        file.write('{"question_id": 8')  # and a torn line
    judge.say, before = lambda messages: "[[5]]", len(judge.asked)
    assert main(args) == 0 and len(judge.asked) == before + 5 and len(lines(path)) == 8
    assert "average" in capsys.readouterr().out


@pytest.mark.parametrize("text, score", [("[[7]]", 7), ("a [1] b [[2.5]]", 2.5), ("[4]", 4), ("[[0]]", -1), ("[[11]]", -1), ("[[x]]", -1), ("", -1)])
def test_ratings(text, score):
    assert rating(text) == score


def test_mtbench_s_data_is_checked(spoken, models, data, tmp_path):  # noqa: F811
    with pytest.raises(ValueError, match="no chat template"):
        evaluate.mtbench(models["transformer"], data, tmp_path / "a")
    with pytest.raises(ValueError, match="question.jsonl cannot be read"):
        evaluate.mtbench(spoken, tmp_path, tmp_path / "a")
    write_lines(tmp_path / "mt_bench" / "question.jsonl", QUESTIONS)
    write_lines(tmp_path / "judge_prompts.jsonl", PROMPTS)
    write_lines(tmp_path / "mt_bench" / "reference_answer" / "gpt-4.jsonl", [{"question_id": 1, "choices": [{"turns": []}]}])
    with pytest.raises(ValueError, match="no reference answer to question 82"):
        evaluate.mtbench(spoken, tmp_path, tmp_path / "a")
    assert not (tmp_path / "a").exists()


# ---- AlpacaEval --------------------------------------------------------------------------------------------------------------------

ASKED = [{"instruction": text, "dataset": "helpful_base"} for text in ("why?", "größe", "why?", "count " * 9)]
ALPACA = dict(judge=None, max_new_tokens=25, temperature=0.9, seed=5, name="half")


def test_alpaca_s_outputs(spoken, tmp_path):  # noqa: F811
    results = evaluate.alpaca(spoken, tmp_path / "a", instructions=ASKED, **ALPACA)
    outputs = json.loads((tmp_path / "a" / "model_outputs.json").read_text())
    alone = mil.generate(spoken, [[{"role": "user", "content": text}] for text in ("why?", "größe", "count " * 9)], 25, temperature=0.9, seed=5)
    assert outputs == [{"dataset": "helpful_base", "instruction": text, "output": row.text.strip(), "generator": "half"}
                       for text, row in zip(("why?", "größe", "count " * 9), alone)]
    assert "1 instructions occur more than once" in results["notes"][0] and results["fingerprint"] == spoken.fingerprint()
    few = evaluate.alpaca(spoken, tmp_path / "b", instructions=ASKED, limit=1, **ALPACA)
    assert evaluate.alpaca(spoken, tmp_path / "b", instructions=ASKED, **ALPACA)["scores"] == results["scores"] != few["scores"]
    # a half-written file: what it has is kept, what is torn is made again
    path = tmp_path / "a" / "answers.jsonl"
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    kept = json.loads(whole[:first])
    path.write_bytes(json.dumps(kept | {"text": " ke\0pt "}).encode() + b"\n" + whole[first:first + 20])
    evaluate.alpaca(spoken, tmp_path / "a", instructions=ASKED, **ALPACA)
    again = {row["instruction"]: row["output"] for row in json.loads((tmp_path / "a" / "model_outputs.json").read_text())}
    assert again == {row["instruction"]: row["output"] for row in outputs} | {kept["key"]: "ke\ufffdpt"}  # pandas takes texts that differ after NUL for the same


def test_another_evaluation_s_folder_is_left_alone(spoken, models, tmp_path):  # noqa: F811
    evaluate.alpaca(spoken, tmp_path, instructions=ASKED, **ALPACA)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="differs in temperature, seed: give the same, or another folder"):
        evaluate.alpaca(spoken, tmp_path, instructions=ASKED, **ALPACA | {"temperature": 0.5, "seed": 6})
    with pytest.raises(ValueError, match="differs in kind"):
        evaluate.gap(spoken, tmp_path, count=4)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    (tmp_path / "answers.jsonl").write_text("not ours\n")
    with pytest.raises(ValueError, match="answers.jsonl:1: not a line"):
        evaluate.alpaca(spoken, tmp_path, instructions=ASKED, **ALPACA)
    assert (tmp_path / "answers.jsonl").read_text() == "not ours\n"


@pytest.mark.parametrize("content, says", [("[1]", "row 0 needs instruction"), ("{}", "expected a list"), ("[{", "is not JSON"), ("[]", "no instructions")])
def test_bad_instructions(spoken, tmp_path, content, says):  # noqa: F811
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(ValueError, match=says):
        evaluate.alpaca(spoken, tmp_path / "out", instructions=str(tmp_path / "x.json"), judge=None)


@pytest.mark.filterwarnings("ignore")
def test_alpaca_eval_judges(spoken, tmp_path, judge, monkeypatch, caplog):  # noqa: F811
    pytest.importorskip("alpaca_eval")
    monkeypatch.setenv("OPENAI_BASE_URL", judge.url)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def say(messages):  # the longer output is better; of the first instruction nothing is said that can be read
        text = messages[-1]["content"]
        if "größe" in text:
            return "[]" if len(judge.asked) < 20 else "[{'model': 'model_1', 'rank': 1}, {'model': 'model_2', 'rank': 2}]"
        return "[{'model': 'model_1', 'rank': 1}, {'model': 'model_2', 'rank': 2}]"
    judge.say = say
    reference = [{"instruction": row["instruction"], "output": f"the reference's {i}", "generator": "ref"} for i, row in enumerate(ASKED[:2] + ASKED[3:])]
    how = dict(instructions=ASKED, reference=reference, **ALPACA) | {"judge": "alpaca_eval_gpt4", "judge_model": "own-judge"}
    for wrong, says in (({"judge": "nobody"}, "no judge 'nobody'"), ({"reference": str(tmp_path / "none")}, "cannot read")):
        with pytest.raises(ValueError, match=says):
            evaluate.alpaca(spoken, tmp_path, **how | wrong)
    assert not (tmp_path / "answers.jsonl").exists()  # it is said before the answers
    results = evaluate.alpaca(spoken, tmp_path, **how)
    assert results["failures"] == 1 and results["judged"] == 2 and any("no length-controlled" in note for note in results["notes"])
    assert 0 <= results["scores"]["win_rate"] <= 100 and results["versions"]["alpaca_eval"].startswith("0.6") and results["judge"].endswith("(own-judge)")
    asked = len(judge.asked)
    judge.asked += [None] * 20
    again = evaluate.alpaca(spoken, tmp_path, **how)
    assert again["failures"] == 0 and len(judge.asked) == asked + 21  # the one without a judgment
    cache, = tmp_path.glob("*.cache.json")  # the library writes it in place: torn, its whole rows are kept
    text = cache.read_text()
    cache.write_text(text[:text.rindex('"output_1"')])
    assert evaluate.alpaca(spoken, tmp_path, **how)["scores"] == again["scores"] and len(judge.asked) == asked + 22
    rows = json.loads((tmp_path / "annotations.json").read_text())
    assert len(rows) == 3 and again["scores"]["win_rate"] == pytest.approx(np.mean(list(wins(rows)["win_rate"].values())))
    from alpaca_eval.metrics import get_winrate
    numbers = evaluate.report([tmp_path / "annotations.json"], tmp_path / "page.html")["alpaca"]["models"]["half"]["win_rate"]
    theirs = get_winrate(rows)
    assert (numbers["value"], numbers["error"]) == pytest.approx((theirs["win_rate"], theirs["standard_error"]))
    judge.say = lambda messages: "nonsense"
    nothing = evaluate.alpaca(spoken, tmp_path, **how | {"judge_model": "mute"})
    assert nothing["failures"] == 3 and nothing["scores"]["win_rate"] is None
    evaluate.report([tmp_path], tmp_path / "page.html")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    caplog.clear()
    with pytest.raises(ValueError, match="127.0.0.1:9/v1 cannot be asked: Connection error.*the same call goes on"):
        evaluate.alpaca(spoken, tmp_path, **how | {"judge_model": "another"})
    assert not caplog.records  # the library's tracebacks


# ---- likelihoods -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["transformer", "hybrid1", "hybrid2"])
def test_log_likelihoods_are_those_of_whole_forwards(models, kind):  # noqa: F811
    model, rng = models[kind], np.random.default_rng(1)
    contexts = [rng.integers(0, 259, n).tolist() for n in (1, 40, 7, 90, 33)]
    pairs = [(contexts[i], rng.integers(0, 259, n).tolist()) for i, n in ((0, 1), (1, 3), (1, 1), (1, 32), (1, 33), (2, 70), (3, 2), (2, 5), (1, 3), (4, 64))]
    following = mil.generate(model, [contexts[1], contexts[2]], 40, stop_tokens=[])
    pairs += [(contexts[1], following[0].tokens), (contexts[2], following[1].tokens[:4]), (contexts[2], [*following[1].tokens[:3], 0])]
    seen = {}
    found = evaluate.log_likelihoods(model, pairs, batch=3, done=lambda i, value: seen.update({i: value}))
    for i, (context, continuation) in enumerate(pairs):
        z = model.logits([context + continuation[:-1]])[0, len(context) - 1:].astype(np.float64)
        z -= np.logaddexp.reduce(z, -1, keepdims=True)
        assert found[i][0] == pytest.approx(z[np.arange(len(continuation)), continuation].sum(), abs=1e-4)
        assert found[i][1] == bool((z.argmax(-1) == continuation).all()) and seen[i] == found[i]
    assert found[-3][1] and found[-2][1] and not found[-1][1]
    assert text_log_likelihoods(model, pairs, batch=4) == pytest.approx([value for value, _ in found], abs=1e-4)


TASK = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{text}"
doc_to_target: "{target}"
metric_list:
  - metric: {metric}
{more}"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder of three tasks of lm_eval: a choice, a text, a generation."""
    folder = tmp_path_factory.mktemp("tasks")
    items = make_items(8)
    write_lines(folder / "items.jsonl", [item | {"text": item["question"] * 9, "right": item["choices"][item["answer"]]} for item in items])
    for name, kind, text, target, metric, more in (
            ("own_choice", "multiple_choice", "{{question}}", "{{answer}}", "acc", 'doc_to_choice: "{{choices}}"\n'),
            ("own_text", "loglikelihood_rolling", "", "{{text}}", "word_perplexity", ""),
            ("own_words", "generate_until", "{{question}}", "{{right}}", "exact_match", 'generation_kwargs: {until: ["e"], max_gen_toks: 12}\n'
             "filter_list: [{name: whole, filter: [{function: take_first}]}, {name: lower, filter: [{function: lowercase}, {function: take_first}]}]\n")):
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, kind=kind, text=text, target=target, metric=metric, more=more, path=folder / "items.jsonl"))
    (folder / "scripted").mkdir()
    (folder / "scripted" / "scripted.py").write_text("")
    (folder / "own_script.yaml").write_text((folder / "own_choice.yaml").read_text().replace("own_choice", "own_script").replace(
        "dataset_path: json", f"dataset_path: {folder / 'scripted'}").replace("dataset_kwargs", "metadata"))
    return folder


@pytest.mark.filterwarnings("ignore")
def test_lm_eval(spoken, tasks, tmp_path, monkeypatch):  # noqa: F811
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    names = ["own_script", "own_choice", "own_text", "own_words"]
    results = evaluate.lm(spoken, tmp_path / "a", names, include=str(tasks), shots=0)
    items = json.loads((tmp_path / "a" / "items.json").read_text())["own_choice 0-shot acc"]
    right = []
    for item in make_items(8):
        ids = spoken.tokenizer.encode(item["question"])
        pairs = [(ids, spoken.tokenizer.encode(" " + choice)) for choice in item["choices"]]
        right.append(float(np.argmax([value for value, _ in evaluate.log_likelihoods(spoken, pairs)]) == item["answer"]))
    assert list(items.values()) == right and results["scores"]["own_choice 0-shot acc"] == pytest.approx(np.mean(right))
    assert "own_text 0-shot word_perplexity" in results["scores"] and results["versions"]["lm_eval"]
    assert {f"own_words 0-shot exact_match ({name})" for name in ("whole", "lower")} < set(results["scores"])
    assert len(results["notes"]) == 1 and "own_script is left out" in results["notes"][0]  # a data set that is a script, as pubmedqa's
    with monkeypatch.context() as patch:  # again: from what is kept
        patch.setattr(type(spoken), "logits", None)
        evaluate.lm(spoken, tmp_path / "a", names, include=str(tasks), shots=0)
    with pytest.raises(ValueError, match="own_script is left out"):
        evaluate.lm(spoken, tmp_path / "c", names[:1], include=str(tasks), shots=0)
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="no task nothing"):
        patch.setattr("lm_eval.tasks.TaskManager", lambda **how: SimpleNamespace(all_tasks=[]))  # its own takes some ten seconds
        evaluate.lm(spoken, tmp_path / "b", ["nothing"])


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
def test_lm_eval_s_hugging_face_backend(tmp_path, spoken):  # noqa: F811
    pytest.importorskip("lm_eval.models.huggingface", exc_type=ImportError)
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from test_generate import config
    model = mil.random(config("transformer") | {"bos_token_id": 256, "eos_token_id": 257}, seed=2)
    mil.save(model, tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes(open(f"{spoken.folder}/{name}", "rb").read())
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}))
    ours, theirs = evaluate.harness_model(mil.load(str(tmp_path)), max_length=64), HFLM(str(tmp_path), device="cpu", dtype="float32", max_length=64, batch_size=2)
    def asked(kind, args):
        return [Instance(kind, {}, arg, i) for i, arg in enumerate(args)]
    first = ours.generate_until(asked("generate_until", [("what is it", {"until": [], "max_gen_toks": 3})]))[0]
    pairs = [("why? ", "because"), ("why?", " not"), ("", "all"), ("größe " * 12, "cut at its beginning"), ("what is it", first), ("a", "b" * 40)]
    for mine, hf in zip(ours.loglikelihood(asked("loglikelihood", pairs)), theirs.loglikelihood(asked("loglikelihood", pairs))):
        assert mine[0] == pytest.approx(hf[0], abs=1e-4) and mine[1] == bool(hf[1])
    texts = [("short",), ("a text that is longer than the model may read at once, " * 4,)]
    assert ours.loglikelihood_rolling(asked("loglikelihood_rolling", texts)) == pytest.approx(theirs.loglikelihood_rolling(asked("loglikelihood_rolling", texts)), abs=1e-3)
    some = [("why?", {"until": ["e"], "max_gen_toks": 20}), ("größe " * 30, {"until": [], "max_gen_toks": 10, "do_sample": False})]
    assert ours.generate_until(asked("generate_until", some)) == theirs.generate_until(asked("generate_until", some))


# ---- long contexts, gap ------------------------------------------------------------------------------------------------------------


def test_needle(spoken, tmp_path):  # noqa: F811
    text = tmp_path / "text"
    text.write_text("It was the best of times, it was the worst of times. " * 40)
    how = dict(lengths=[600, 900], depths=[0, 1], items=2, text=str(text))
    results = evaluate.needle(spoken, tmp_path / "a", **how)
    assert set(results["scores"]) == {"passkey", "needle", "associative", "copy", "perplexity"}
    assert results["passkey"] == {n: {d: results["passkey"][n][d] for d in (0.0, 1.0)} for n in (600, 900)}
    assert results["perplexity"]["position"] == [64, 128, 256, 512, 900] and (tmp_path / "a" / "needle.svg").exists()
    ids = spoken.tokenizer.encode(text.read_text())
    losses = []
    for at in (0, 901):
        z = spoken.logits([ids[at:at + 900]])[0].astype(np.float64)
        losses.append(np.logaddexp.reduce(z, -1) - z[np.arange(900), ids[at + 1:at + 901]])
    expected = [np.exp(np.mean(losses, 0)[a:b].mean()) for a, b in ((0, 64), (64, 128), (128, 256), (256, 512), (512, 900))]
    assert results["perplexity"]["value"] == pytest.approx(expected, rel=1e-4)
    cells = tmp_path / "a" / "cells.jsonl"
    whole, before = cells.read_bytes(), state_of(tmp_path / "a")
    cells.write_bytes(whole[:len(whole) // 2])
    evaluate.needle(spoken, tmp_path / "a", **how)
    assert cells.read_bytes() == whole and state_of(tmp_path / "a") == before
    with pytest.raises(ValueError, match="fewer than 5001 tokens"):
        perplexity_by_position(spoken, 5000, text.read_text())


def test_needle_without_a_tokenizer(models, tmp_path):  # noqa: F811
    results = evaluate.needle(models["hybrid2"], tmp_path, lengths=[40], items=2)
    assert set(results["scores"]) == {"associative", "copy"} and results["perplexity"] is None


def test_gap(spoken, tmp_path):  # noqa: F811
    results = evaluate.gap(spoken, tmp_path / "a", count=8, max_new_tokens=6)
    items = json.loads((tmp_path / "a" / "items.json").read_text())
    for i, item in enumerate(make_items(8)):
        ask = item["question"] + "\n" + "\n".join(f"{'ABCD'[n]}. {c}" for n, c in enumerate(item["choices"])) + "\nAnswer with the letter of the right choice.\nAnswer:"
        ids = spoken.tokenizer.encode(ask)
        letter = np.argmax([value for value, _ in evaluate.log_likelihoods(spoken, [(ids, spoken.tokenizer.encode(f" {c}")) for c in "ABCD"])])
        text = mil.generate(spoken, [[{"role": "user", "content": ask}]], 6)[0].text
        assert items["likelihood"][str(i)] == (letter == item["answer"])
        assert items["generation"][str(i)] == (named(text, item["choices"]) == "ABCD"[item["answer"]])
    assert results["letters"]["right"] == {"A": 2, "B": 2, "C": 2, "D": 2} and sum(results["letters"]["generation"].values()) == 8
    assert results["scores"]["gap"] == results["scores"]["likelihood"] - results["scores"]["generation"]
    before = state_of(tmp_path / "a")
    for file in tmp_path.glob("a/*.jsonl"):
        file.write_bytes(file.read_bytes()[:-30])
    evaluate.gap(spoken, tmp_path / "a", count=8, max_new_tokens=6)
    assert state_of(tmp_path / "a") == before


@pytest.mark.parametrize("text, letter", [("B", "B"), (" (C) because", "C"), ("The answer is D.", "D"), ("Answer: A", "A"), ("A list of words", "A"), ("It is pear", "C"),
                                          ("I think B", "B"), ("apple or pear", "none"), ("", "none"), ("E", "none")])
def test_the_letter_that_a_text_names(text, letter):
    assert named(text, ["apple", "plum", "pear", "fig"]) == letter


@pytest.mark.parametrize("row, says", [({}, "needs a question"), ({"question": "?", "choices": ["a"], "answer": 0}, "2 to 10"),
                                       ({"question": "?", "choices": ["a", "b"], "answer": "C"}, "one of the 2"), ({"question": "?", "choices": ["a", "b"]}, "None")])
def test_bad_items(tmp_path, row, says):
    write_lines(tmp_path / "x", [{"question": "?", "choices": ["a", "b"], "answer": "b"}, row])
    with pytest.raises(ValueError, match=f"x:2.*{says}"):
        read_items(str(tmp_path / "x"))


# ---- the report --------------------------------------------------------------------------------------------------------------------


def annotations(path, model, preferences):
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps([{"instruction": f"i{i}", "generator_1": "ref", "generator_2": model, "annotator": "judge", "preference": p}
                                for i, p in enumerate(preferences)]))


def test_report_of_annotations(tmp_path):
    rng = np.random.default_rng(0)
    a, b = (1 + rng.random(400)).tolist(), (1 + 0.5 * rng.random(400)).tolist()
    a[3], a[4], b[5] = None, 0, float("nan")
    assert wins([{"instruction": "i", "preference": p} for p in (2, 1.5)]) == {"win_rate": {"i": 100, "i (2)": 50}}
    annotations(tmp_path / "a" / "judge" / "annotations.json", "a", a)
    annotations(tmp_path / "b" / "annotations.json", "b", b)
    numbers = evaluate.report([tmp_path / "a", tmp_path / "b"], tmp_path / "page.html")["alpaca"]
    x = np.array([0.5 if p == 0 else p - 1 for p in a if p is not None]) * 100
    found = numbers["models"]["a"]["win_rate"]
    assert found["n"] == 399 and (found["value"], found["error"]) == pytest.approx((x.mean(), x.std(ddof=1) / 399**0.5))
    assert found["value"] - found["low"] == pytest.approx(1.96 * found["error"], rel=0.05)
    d = np.array([(0.5 if p == 0 else p - 1) - (q - 1) for p, q in zip(a, b) if p is not None and q == q]) * 100
    pair = numbers["pairs"][0]
    assert pair["n"] == 398 and pair["difference"] == pytest.approx(d.mean()) and pair["low"] < d.mean() < pair["high"]
    assert pair["high"] - pair["low"] == pytest.approx(2 * 1.96 * d.std(ddof=1) / 398**0.5, rel=0.05)
    page = (tmp_path / "page.html").read_text()
    assert "a - b" in page and "win_rate" in page
    with pytest.raises(ValueError, match="a model 'a' already"):
        evaluate.report([tmp_path / "a", tmp_path / "a"], tmp_path / "page.html")
    with pytest.raises(ValueError, match="no results.json"):
        evaluate.report([tmp_path / "nothing"], tmp_path / "page.html")


def test_a_run_s_model_is_called_as_the_run(spoken, tmp_path):
    mil.save(spoken, tmp_path / "half" / "model")
    assert evaluate.gap(mil.load(tmp_path / "half" / "model"), tmp_path / "gap", count=2, max_new_tokens=2)["model"] == "half"
    with pytest.raises(OSError, match="cannot write /proc/gap: "):
        evaluate.gap(spoken, "/proc/gap", count=2)


def test_answers_alone_need_no_prompts_of_a_judge(spoken, tmp_path):
    write_lines(tmp_path / "mt_bench" / "question.jsonl", QUESTIONS[:1])
    evaluate.mtbench(spoken, tmp_path, tmp_path / "out", judge=None, max_new_tokens=2, name="half")
    assert (tmp_path / "out" / "model_answer" / "half.jsonl").exists()


def test_report_from_the_shell(spoken, data, tmp_path, judge, capsys):  # noqa: F811
    for name in ("a", "b"):
        evaluate.gap(spoken, tmp_path / f"gap-{name}", count=4, max_new_tokens=2, name=name)
        evaluate.needle(spoken, tmp_path / f"needle-{name}", lengths=[400], depths=[0.5], items=1, name=name)
        evaluate.mtbench(spoken, data, tmp_path / f"mt-{name}", judge="j", judge_url=judge.url, max_new_tokens=2, name=name)
    capsys.readouterr()
    assert main(["evaluate", "report", *map(str, tmp_path.glob("*-?")), "--out", str(tmp_path / "page.html")]) == 0
    out, err = capsys.readouterr()
    page = (tmp_path / "page.html").read_text()
    assert "average" in out and "page.html" in err and page.count("<img") == 5 and page.count("Differences") == 3
    assert main(["evaluate", "gap", spoken.folder, "--out", str(tmp_path / "gap-a"), "--count", "5"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "another folder" in err
    assert main(["evaluate", "report", str(tmp_path)]) == 2 and main(["evaluate"]) == 2
