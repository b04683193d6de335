"""AlpacaEval (github.com/tatsu-lab/alpaca_eval): our answers to its 805 instructions, judged and scored by its own library."""
import collections
import json
import logging
import math
import os
import warnings
from pathlib import Path

from ..config import said
from .run import Run, complete, digest, library, question, read_object, write_json

DATA = "hf://datasets/tatsu-lab/alpaca_eval/alpaca_eval_gpt4_baseline.json"  # instructions and the reference's answers
JUDGE = "weighted_alpaca_eval_gpt4_turbo"  # AlpacaEval 2's


def alpaca(model, out, instructions=None, reference=None, judge=JUDGE, judge_model=None, name=None, max_new_tokens=2048, temperature=0.7, top_p=1.0,
           seed=0, batch=None, limit=None, progress=None):
    """Writes out/model_outputs.json, has it judged, and returns the results, also in out/results.json.

    instructions  a JSON list of {"instruction", "dataset"}; None: the 805 of the hub. One that occurs twice is answered once.
    reference     a JSON list of {"instruction", "output", "generator"}; None: GPT-4 Turbo's of the hub, or what instructions has as "output"
    judge         a configuration of alpaca_eval (a name or a path); None: only answer. $OPENAI_BASE_URL and $OPENAI_API_KEY say where it is.
    judge_model   the model that the server is asked for, in place of the configuration's
    name          of the model in the tables (default: its folder's)
    max_new_tokens, temperature, top_p, seed, batch: as in generate; the defaults are those of the paper's runs
    limit         only the first instructions

    Scores: "win_rate" and, where the hub can be reached, "length_controlled_winrate"; "notes" says where it could not.
    Called again it goes on, with answers and judgments. ValueError: files of another form, alpaca_eval missing, a judge that cannot be asked."""
    rows, notes = _instructions(instructions)
    settings = {"instructions": digest([row["instruction"] for row in rows]), "max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p,
                "seed": seed}
    run, rows = Run(out, "alpaca", model, settings, name), rows[:limit]
    name = run.about["model"]
    if judge is not None:  # what is missing is said before hours of answers
        against, package = _reference(reference, rows), _package()
        config = _config(package, run.out, judge, judge_model)
    asked = [{"key": row["instruction"], "prompt": question(model, row["instruction"]), "index": i, "temperature": temperature}
             for i, row in enumerate(rows)]
    answers = complete(run, model, asked, max_new_tokens, batch, progress, top_p=top_p, seed=seed)
    outputs = [{"dataset": row.get("dataset", "alpaca_eval"), "instruction": row["instruction"], "generator": name,
                "output": answers[row["instruction"]]["text"].strip().replace("\0", "\ufffd")} for row in rows]  # pandas ends a text at NUL
    write_json(run.out / "model_outputs.json", outputs)
    cut = sum(answers[row["instruction"]]["finish"] == "length" for row in rows)
    scores = {"avg_length": sum(len(row["output"]) for row in outputs) / len(outputs)}
    if judge is None:
        return run.finish(scores, {}, cut=cut, notes=notes)
    cache = run.out / f"annotations-{Path(judge).name}{'-' + judge_model.replace('/', '_') if judge_model else ''}.cache.json"
    annotations, table, told = _judge(run, outputs, against, package, config, cache)
    scores |= {key: float(value) for key, value in table.items() if isinstance(value, (int, float)) or hasattr(value, "item")}
    missing = len(outputs) - len([row for row in annotations if _preference(row) is not None])
    if missing:
        notes.append(f"{missing} of {len(outputs)} answers have no judgment (the judge said nothing that can be read, or the reference lacks them); "
                     "the same call asks for them again")
    return run.finish(scores, wins(annotations), judge=judge if judge_model is None else f"{judge} ({judge_model})", cut=cut,
                      judged=len(outputs) - missing, failures=missing, notes=notes + told)


def wins(annotations):
    """{"win_rate": {instruction: 100 for a win, 50 for a draw, 0}}, and the same of the length-controlled ones: AlpacaEval's annotations as items.
    An instruction's second row gets " (2)"."""
    found, seen = {"win_rate": {}, "length_controlled_winrate": {}}, collections.Counter()
    for row in annotations:
        seen[row["instruction"]] += 1
        key = row["instruction"] + (f" ({seen[row['instruction']]})" if seen[row["instruction"]] > 1 else "")
        if _preference(row) is not None:
            found["win_rate"][key] = 100 * _preference(row)
        controlled = row.get("glm_preference")
        if isinstance(controlled, float) and math.isfinite(controlled):
            found["length_controlled_winrate"][key] = 100 * controlled
    return {metric: values for metric, values in found.items() if values or metric == "win_rate"}


def _preference(row):
    """0 … 1, how much of a win; None where there is no judgment. AlpacaEval counts from 1 (the reference) to 2, and 0 as a draw."""
    value = row.get("preference")
    if not isinstance(value, (int, float)) or not (value == 0 or 1 <= value <= 2):  # NaN is none of these
        return None
    return (1.5 if value == 0 else value) - 1


def _instructions(source):
    """(rows, notes)."""
    if source is None:
        datasets = library("datasets")
        try:
            rows = [dict(row) for row in datasets.load_dataset("json", data_files=DATA, split="train")]
        except Exception as error:  # of the network, the hub, the library
            raise ValueError(f"the 805 instructions cannot be loaded from the hub ({said(error)}): give --instructions FILE") from None
    else:
        rows = _listed(source, "instruction")
    seen = collections.Counter(row["instruction"] for row in rows)
    first = {}
    for row in rows:
        first.setdefault(row["instruction"], row)
    unique = list(first.values())
    more = len(rows) - len(unique)
    notes = [f"{sum(n > 1 for n in seen.values())} instructions occur more than once ({more} rows more): each is answered and counted once"] if more else []
    if not unique:
        raise ValueError(f"{source} has no instructions")
    return unique, notes


def _listed(source, *keys):
    rows = read_object(source, list) if isinstance(source, (str, os.PathLike)) else list(source)
    for i, row in enumerate(rows):
        if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in keys):
            raise ValueError(f"{source if isinstance(source, (str, os.PathLike)) else 'the list'}: row {i} needs {' and '.join(keys)}, as strings")
    return rows


def _reference(source, rows):
    if source is not None:
        found = _listed(source, "instruction", "output")
    elif all(isinstance(row.get("output"), str) for row in rows):
        found = rows
    else:
        found = [dict(row) for row in _instructions(None)[0]]
    by_instruction = {row["instruction"]: row for row in found}
    kept = [{"instruction": row["instruction"], "output": by_instruction[row["instruction"]]["output"],
             "dataset": row.get("dataset", "alpaca_eval"), "generator": by_instruction[row["instruction"]].get("generator", "reference")}
            for row in rows if row["instruction"] in by_instruction]
    if not kept:
        raise ValueError("alpaca: the reference has an answer to none of the instructions")
    return kept


def _package():
    """alpaca_eval."""
    if os.environ.get("OPENAI_BASE_URL"):
        os.environ.setdefault("OPENAI_API_KEY", "none")  # a server of one's own asks for none, but the client insists
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the library's own imports
        try:
            library("pkg_resources")
            return library("alpaca_eval")
        except ValueError as error:
            raise ValueError(f"{error}; alpaca_eval 0.6 needs setuptools<81") from None


def _judge(run, outputs, reference, package, config, cache):
    """(annotations, the row of the leaderboard, notes)."""
    import openai
    run.version("alpaca_eval", "openai")
    _keep_judged(cache)
    quiet = logging.root.manager.disable
    logging.disable(logging.CRITICAL)  # the library's line a request, and its tracebacks of what is raised below
    try:
        table, annotations = package.evaluate(
            model_outputs=outputs, reference_outputs=reference, annotators_config=config, output_path=None, precomputed_leaderboard=None,
            is_return_instead_of_print=True, fn_metric=_win_rate, sort_by="win_rate", is_cache_leaderboard=False, caching_path=str(cache),
            annotation_kwargs={"chunksize": 10},  # it keeps whole chunks
            name=run.about["model"])
    except openai.OpenAIError as error:
        raise ValueError(f"the judge at {os.environ.get('OPENAI_BASE_URL', 'OpenAI')} cannot be asked: {said(error)}; the answers and what it has judged "
                         "are kept, and the same call goes on") from None
    except Exception as error:  # whatever the library raises for answers that it does not expect
        raise ValueError(f"alpaca_eval stopped: {said(error)}; the answers and what has been judged are kept, and the same call goes on") from None
    finally:
        logging.disable(quiet)
    scores, notes = dict(table.iloc[0]), []
    pandas = library("pandas")
    frame = pandas.DataFrame(annotations)
    try:
        if len(frame) != 805:
            raise ValueError("it is defined for the 805 instructions")
        metric = library("alpaca_eval.metrics").get_length_controlled_winrate
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            scores |= metric(frame, save_weights_dir=str(run.out / "weights"))
    except Exception as error:  # of the network, the hub, a scikit-learn that the library does not know
        notes.append(f"no length-controlled win rate ({said(error)[:200]}): the win rate alone")
        frame = frame.drop(columns="glm_preference", errors="ignore")
    scores.pop("mode", None)
    rows = json.loads(frame.to_json(orient="records"))
    write_json(run.out / "annotations.json", rows)
    return rows, scores, notes


def _win_rate(annotations):
    """The library's, which fails where nothing is judged."""
    judged = [row for row in annotations if _preference(row) is not None]
    return library("alpaca_eval.metrics").get_winrate(judged) if judged else {"win_rate": math.nan, "standard_error": math.nan}


def _keep_judged(path):
    """Leaves the whole rows with a judgment in the library's file, which it writes in place: those without are asked for again."""
    if not path.exists():
        return
    text, rows, read = path.read_text(encoding="utf-8", errors="replace"), [], json.JSONDecoder().raw_decode
    at = text.find("{")
    while at >= 0:
        try:
            row, end = read(text, at)
        except ValueError:  # torn
            break
        rows += [row] if _preference(row) is not None else []
        at = text.find("{", end)
    if rows:
        write_json(path, rows)
    else:
        path.unlink()


def _config(package, out, judge, judge_model):
    """What alpaca_eval takes: the name or path, or a file in out of its content with another model."""
    yaml = library("yaml")
    builtin = Path(package.__file__).parent / "evaluators_configs" / str(judge) / "configs.yaml"
    path = builtin if builtin.exists() else Path(judge) / "configs.yaml" if os.path.isdir(judge) else Path(judge)
    if not path.is_file():
        raise ValueError(f"alpaca_eval has no judge {judge!r}, and there is no such file")
    if not judge_model:
        return str(judge) if builtin.exists() else str(path.resolve())
    config = yaml.safe_load(path.read_text())
    for settings in config.values():
        settings["completions_kwargs"]["model_name"] = judge_model
        prompt = path.resolve().parent.parent / str(settings.get("prompt_template"))  # where the library looks for it
        if prompt.is_file():
            settings["prompt_template"] = str(prompt)
    changed = (out / "judge.yaml").resolve()
    changed.write_text(yaml.safe_dump(config))
    return str(changed)
