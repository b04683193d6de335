"""MT-Bench (Zheng et al., arXiv 2306.05685) in FastChat's files and with its prompts: what its gen_judgment.py and show_result.py read."""
import re
import time
import uuid
from pathlib import Path

import numpy as np

from ..data import rows as read_rows
from .figures import radar, save
from .judge import Judge
from .run import Records, Run, complete, digest, write_lines

TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "extraction": 0.0, "math": 0.0, "coding": 0.0, "reasoning": 0.0, "stem": 0.1, "humanities": 0.1}
OTHERS = 0.7  # the temperature of other categories
WITH_REFERENCE = ("math", "reasoning", "coding")
RATINGS = (re.compile(r"\[\[(\d+\.?\d*)\]\]"), re.compile(r"\[(\d+\.?\d*)\]"))  # the second where the first is not there, as FastChat does


def mtbench(model, data, out, judge="gpt-4", judge_url=None, name=None, bench="mt_bench", max_new_tokens=1024, seed=0, batch=None, limit=None,
            parallel=8, progress=None):
    """Answers both turns of each question, has them rated, and returns the results, also in out/results.json.

    data      FastChat's llm_judge/data: BENCH/question.jsonl, and for a judge judge_prompts.jsonl and BENCH/reference_answer/*.jsonl
    judge     the model that the server at judge_url ($OPENAI_BASE_URL) is asked for; None: only answer
    name      model_id in the files (default: the model's folder's)
    parallel  questions that the judge has at a time
    max_new_tokens, seed, batch: as in generate; limit: only the first questions

    out/model_answer/NAME.jsonl and out/model_judgment/JUDGE_single.jsonl are FastChat's: a rating that cannot be read, or is not of 1 to 10, is -1, is counted
    in "failures", and is asked for again by the next call. Scores: first_turn, second_turn, average, and one a category.
    ValueError: a folder of another form, a model without a chat template, a judge that cannot be asked."""
    if model.tokenizer is None or model.tokenizer.chat_template is None:
        raise ValueError("mtbench: the model has no chat template, and a second turn needs one")
    folder = Path(data)
    questions = _lines(folder / bench / "question.jsonl", "question_id", "category", "turns")
    prompts = {row["name"]: row for row in _lines(folder / "judge_prompts.jsonl", "name", "system_prompt", "prompt_template")} if judge else {}
    references = _references(folder / bench / "reference_answer", judge, questions) if judge else {}
    run = Run(out, "mtbench", model, {"bench": bench, "questions": digest(questions), "max_new_tokens": max_new_tokens, "seed": seed,
                                      "temperatures": TEMPERATURES}, name)
    questions = questions[:limit]
    name = run.about["model"]
    turns = _answers(run, model, questions, max_new_tokens, seed, batch, progress)
    path = run.out / "model_answer" / f"{name}.jsonl"
    old = Records(path, lambda row: row["question_id"]).rows
    answers = {q["question_id"]: old.get(q["question_id"]) or {
        "question_id": q["question_id"], "answer_id": uuid.uuid4().hex, "model_id": name,
        "choices": [{"index": 0, "turns": turns[q["question_id"]]}], "tstamp": time.time()} for q in questions}
    write_lines(path, (old | answers).values())
    if judge is None:
        return run.finish({}, {}, judge=None)
    found = _judgments(run, name, questions, answers, references, prompts, Judge(judge, judge_url), parallel, progress)
    return _results(run, judge, questions, found)


def _lines(path, *keys):
    found = [row for _, row in read_rows(str(path), "mtbench")]
    for row in found:
        if not all(key in row for key in keys):
            raise ValueError(f"{path}: a line needs {', '.join(keys)}, and one has {', '.join(row) or 'nothing'}")
    if not found:
        raise ValueError(f"{path} is empty")
    return found


def _references(folder, judge, questions):
    """{question_id: turns} of the answers that the judge compares with: its own, or the folder's first."""
    needed = [q["question_id"] for q in questions if q["category"] in WITH_REFERENCE]
    if not needed:
        return {}
    files = [folder / f"{judge}.jsonl", *sorted(folder.glob("*.jsonl"))]
    path = next((file for file in files if file.exists()), files[0])
    found = {row["question_id"]: row["choices"][0]["turns"] for row in _lines(path, "question_id", "choices")}
    missing = [q for q in needed if q not in found]
    if missing:
        raise ValueError(f"{path} has no reference answer to question {missing[0]}")
    return found


def _answers(run, model, questions, max_new_tokens, seed, batch, progress):
    """{question_id: the texts of all turns}: a turn of all questions at a time, each after the model's own answers to the turns before."""
    texts = {q["question_id"]: [] for q in questions}
    for turn in range(max(len(q["turns"]) for q in questions)):
        asked = []
        for i, q in enumerate(questions):
            if turn >= len(q["turns"]):
                continue
            chat = [message for user, own in zip(q["turns"], texts[q["question_id"]])
                    for message in ({"role": "user", "content": user}, {"role": "assistant", "content": own})]
            asked.append({"key": f"{q['question_id']} turn {turn + 1}", "prompt": [*chat, {"role": "user", "content": q["turns"][turn]}],
                          "index": 2 * i + turn, "temperature": TEMPERATURES.get(q["category"], OTHERS)})
        found = complete(run, model, asked, max_new_tokens, batch, progress, file="turns.jsonl", seed=seed)
        for q in questions:
            if turn < len(q["turns"]):
                texts[q["question_id"]].append(found[f"{q['question_id']} turn {turn + 1}"]["text"].strip())
    return texts


def _judgments(run, name, questions, answers, references, prompts, judge, parallel, progress):
    """{(question_id, turn): score}."""
    records = Records(run.out / "model_judgment" / f"{judge.name.replace('/', '_')}_single.jsonl", lambda row: (row["question_id"], row["turn"]))
    asked = {}
    for q in questions:
        for turn in (1, 2):
            if turn > len(q["turns"]):
                continue
            had = records.rows.get((q["question_id"], turn))
            if had is None or had["score"] == -1:
                kind = ("single-math-v1" if q["category"] in WITH_REFERENCE else "single-v1") + ("-multi-turn" if turn == 2 else "")
                if kind not in prompts:
                    raise ValueError(f"judge_prompts.jsonl has no prompt {kind}")
                asked[q["question_id"], turn] = (kind, _prompt(prompts[kind], q, answers[q["question_id"]], references.get(q["question_id"]), turn))

    def done(key, text):
        kind, prompt = asked[key]
        records.add({"question_id": key[0], "model": name, "judge": [judge.name, kind], "user_prompt": prompt, "judgment": text,
                     "score": rating(text), "turn": key[1], "tstamp": time.time()})
    judge.ask_all([(key, [{"role": "system", "content": prompts[kind]["system_prompt"]}, {"role": "user", "content": prompt}])
                   for key, (kind, prompt) in asked.items()], done, parallel, progress)
    return {key: row["score"] for key, row in records.rows.items()}


def _prompt(template, question, answer, reference, turn):
    given = answer["choices"][0]["turns"]
    words = {f"ref_answer_{i}": text for i, text in enumerate(reference or (), 1)}
    if turn == 1:
        words |= {"question": question["turns"][0], "answer": given[0]}
    else:
        words |= {f"{what}_{i + 1}": texts[i] for what, texts in (("question", question["turns"]), ("answer", given)) for i in range(2)}
    return template["prompt_template"].format(**words)


def rating(text):
    """The number in [[…]], or in […] where there is none; -1 for none of 1 to 10."""
    for pattern in RATINGS:
        found = pattern.search(text)
        if found:
            score = float(found[1])
            return (int(score) if score.is_integer() else score) if 1 <= score <= 10 else -1
    return -1


def _results(run, judge, questions, found):
    category = {q["question_id"]: q["category"] for q in questions}
    good = {key: score for key, score in found.items() if score != -1 and key[0] in category}
    failures = sum(len(q["turns"][:2]) for q in questions) - len(good)

    def mean(keep):
        some = [score for key, score in good.items() if keep(*key)]
        return float(np.mean(some)) if some else None
    scores = {"average": mean(lambda q, turn: True), "first_turn": mean(lambda q, turn: turn == 1), "second_turn": mean(lambda q, turn: turn == 2)}
    categories = {c: {"average": mean(lambda q, t: category[q] == c), "first_turn": mean(lambda q, t: category[q] == c and t == 1),
                      "second_turn": mean(lambda q, t: category[q] == c and t == 2)} for c in dict.fromkeys(category.values())}
    save(radar({run.about["model"]: {c: value["average"] for c, value in categories.items()}}), run.out / "radar.svg")
    notes = [f"{failures} of {failures + len(good)} judgments have no rating; the same call asks for them again"] if failures else []
    return run.finish(scores | {c: value["average"] for c, value in categories.items()}, {"average": {f"{q} turn {t}": s for (q, t), s in good.items()}},
                      judge=judge, categories=categories, failures=failures, notes=notes)
