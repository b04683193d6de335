"""One page that compares what evaluations left: a table a kind, paired differences with bootstrap intervals, figures."""
import argparse
import html
from itertools import combinations
from pathlib import Path

import numpy as np

from ..config import said
from ..report import image, page, table
from ..weights import replacing
from . import figures
from .alpaca import wins
from .needle import panels
from .run import read_object

DRAWS = 10000  # of a bootstrap
SHOWN = 40  # metrics of a kind with a table of their own; a suite of many subtasks has more


def report(folders, out, seed=0):
    """Writes the page out.html and returns its numbers: {kind: {"models": {model: {metric: {"value", "error", "low", "high", "n"}}}, "pairs": [{"metric",
    "a", "b", "difference", "low", "high", "n"}]}}.

    folders   of evaluations (results.json and items.json), or with AlpacaEval's annotations.json, or such a file itself. value and error are the
              mean of the items and its standard error, as alpaca_eval's; low and high the 95 % interval of a bootstrap over items; a difference is
              a - b over the items that both have, resampled together.
    ValueError: a folder with neither, two models of one name."""
    kinds = {}
    for folder in folders:
        kind, results, items = read(folder)
        models = kinds.setdefault(kind, {})
        if results["model"] in models:
            raise ValueError(f"{folder}: there is a model {results['model']!r} already: give its evaluation another --name")
        models[results["model"]] = (results, items)
    numbers = {kind: _numbers(models, seed) for kind, models in kinds.items()}
    parts = [part for kind, models in kinds.items() for part in _section(kind, models, numbers[kind])]
    with replacing(out) as file:
        file.write(page("Evaluation: " + ", ".join(dict.fromkeys(model for models in kinds.values() for model in models)), *parts).encode())
    return numbers


def compare(function, models, out, device="cpu", dtype=None, **how):
    """Evaluates each of {name: folder} with function(model, out=out/name, name=name, **how), one after the other, and writes out/report.html;
    -> report's numbers."""
    from ..checkpoint import load
    for name, folder in models.items():
        function(load(folder, device=device, dtype=dtype), out=Path(out) / name, name=name, **how)
    return report([Path(out) / name for name in models], Path(out) / "report.html")


def compared(parser, function):
    """compare's numbers, as a script asks for them: parser has the arguments of function that the script adds; here come those of compare. What is
    wrong is one sentence, and an exit."""
    parser.add_argument("models", nargs="+", type=_named, metavar="NAME=FOLDER")
    parser.add_argument("--out", required=True, help="a folder a model, and report.html; the same call goes on in it")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--limit", type=int, help="only the first questions")
    args = vars(parser.parse_args())
    try:
        return compare(function, dict(args.pop("models")), **args)[function.__name__]
    except (ValueError, OSError) as error:
        parser.error(said(error))


def _named(text):
    name, _, folder = text.partition("=")
    if not name or not folder:
        raise argparse.ArgumentTypeError(f"expected NAME=FOLDER, such as half=run/model, not {text!r}")
    return name, folder


def read(folder):
    """(kind, results, items) of a folder."""
    path = Path(folder)
    if (path / "results.json").exists():
        results = read_object(path / "results.json")
        items = read_object(path / "items.json") if (path / "items.json").exists() else {}
        if not all(isinstance(results.get(key), kind) for key, kind in (("kind", str), ("model", str), ("scores", dict))):
            raise ValueError(f"{path / 'results.json'} is not of an evaluation: it lacks kind, model or scores")
        return results["kind"], results, items
    file = path if path.is_file() else path / "annotations.json"
    if not file.exists():
        under = sorted(path.glob("*/annotations.json"))  # alpaca_eval puts them into a folder named after the judge
        if len(under) != 1:
            more = f"and {len(under)} in its folders" if under else "nor one in its folders"
            raise ValueError(f"{folder} has no results.json and no annotations.json, {more}")
        file = under[0]
    rows = read_object(file, list)
    if not rows or not all(isinstance(row, dict) and "instruction" in row and "preference" in row for row in rows):
        raise ValueError(f"{file} is not AlpacaEval's: a row needs instruction and preference")
    items = wins(rows)
    judges = ", ".join(dict.fromkeys(str(row.get("annotator", "unknown")) for row in rows))
    results = {"model": str(rows[0].get("generator_2", file.parent.name)), "judge": judges, "failures": len(rows) - len(items["win_rate"]),
               "scores": {metric: float(np.mean(list(values.values()))) for metric, values in items.items() if values}}
    return "alpaca", results, items


def _numbers(models, seed):
    found, pairs = {}, []
    for model, (results, items) in models.items():
        found[model] = {metric: {"value": value} for metric, value in results["scores"].items()}
        for metric, values in items.items():
            x = np.array(list(values.values()), float)
            if len(x):
                low, high = interval(x, seed)
                own = {"value": float(x.mean()), "error": error(x), "low": low, "high": high, "n": len(x)}
                found[model][metric] = own | ({"value": results["scores"][metric]} if results["scores"].get(metric) is not None else {})
    for a, b in combinations(models, 2):
        for metric in models[a][1]:
            x, y = models[a][1][metric], models[b][1].get(metric, {})
            both = [key for key in x if key in y]
            if both:
                d = np.array([x[key] - y[key] for key in both])
                low, high = interval(d, seed)
                pairs.append({"metric": metric, "a": a, "b": b, "difference": float(d.mean()), "low": low, "high": high, "n": len(d)})
    return {"models": found, "pairs": pairs}


def error(x):
    """The standard error of the mean of x (n)."""
    return float(x.std(ddof=1) / np.sqrt(len(x))) if len(x) > 1 else 0.0


def interval(x, seed=0, draws=DRAWS):
    """95 % of the means of x (n) resampled with replacement, n at a time."""
    rng = np.random.default_rng(seed)
    step = max(1, (1 << 22) // len(x))
    means = np.concatenate([x[rng.integers(0, len(x), (min(step, draws - at), len(x)))].mean(1) for at in range(0, draws, step)])
    return [float(v) for v in np.quantile(means, [0.025, 0.975])]


def _section(kind, models, numbers):
    metrics = list(dict.fromkeys(metric for values in numbers["models"].values() for metric in values))
    shown = metrics[:SHOWN]
    yield f"<h2>{html.escape(kind)}</h2>"
    about = [[model, results.get("fingerprint", ""), ", ".join(f"{n} {name}" for name, n in results.get("layers", {}).items()),
              results.get("judge") or "", results.get("failures", ""), " ".join(f"{k} {v}" for k, v in results.get("versions", {}).items())]
             for model, (results, _) in models.items()]
    yield table(["model", "fingerprint", "layers", "judge", "failures", "versions"], about)
    for model, (results, _) in models.items():
        for note in results.get("notes", []):
            yield f"<p>{html.escape(model)}: {html.escape(note)}</p>"
    yield table(["", *models], [[metric, *(_cell(numbers["models"][model].get(metric)) for model in models)] for metric in shown])
    yield "<p>Value ± standard error over items, [95 % bootstrap interval].</p>"
    pairs = [pair for pair in numbers["pairs"] if pair["metric"] in shown]
    if pairs:
        yield "<h3>Differences</h3>" + table(["metric", "", "difference", "95 % interval", "items"], [
            [p["metric"], f"{p['a']} - {p['b']}", f"{p['difference']:+.4g}", f"{p['low']:+.4g} … {p['high']:+.4g}" + ("" if p["low"] <= 0 <= p["high"] else " *"),
             p["n"]] for p in pairs])
        yield "<p>Over the items that both have, resampled together. *: the interval leaves out 0.</p>"
    yield from _figures(kind, models)


def _cell(number):
    if not number or number["value"] is None:
        return ""
    text = f"{number['value']:.4g}"
    return text + (f" ± {number['error']:.2g} [{number['low']:.4g}, {number['high']:.4g}]" if "error" in number else "")


def _figures(kind, models):
    found = {model: results for model, (results, _) in models.items()}
    if kind == "mtbench" and any(results.get("categories") for results in found.values()):
        yield image(figures.radar({model: {c: v["average"] for c, v in results["categories"].items()} for model, results in found.items()
                                   if results.get("categories")}), "scores by category")
    elif kind == "gap":
        yield image(figures.histograms({model: results["letters"] for model, results in found.items()}), "letters chosen")
    elif kind == "needle":
        for what in ("passkey", "needle"):
            maps = {f"{what}: {model}": results[what] for model, results in found.items() if what in results}
            if maps:
                yield image(figures.heat_maps(maps), what)
        yield image(figures.lines(panels(found)), "by length and position")
