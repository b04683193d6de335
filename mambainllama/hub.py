"""Models of the Hugging Face hub, through `huggingface_hub` (extra `hub`): download by name, upload with a card made from the run."""
import json
import os
import re
from pathlib import Path

import yaml

from .config import library, read_json, said, show

SETTINGS = ["*.json", "*.jinja", "tokenizer.model", "merges.txt"]
NAME = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(@[\w./-]+)?")
LOAD = """import mambainllama as mil

model = mil.load("{0}")
print(mil.generate(model, [[{{"role": "user", "content": "Hello"}}]])[0].text)"""
EXPORTED = {  # config.json's model_type: how such a model is used
    "mambainllama_mamba": "pip install vllm qwerky-vllm-models\nvllm serve {0}",
    "falcon_h1": 'from transformers import AutoModelForCausalLM\n\nmodel = AutoModelForCausalLM.from_pretrained("{0}")',
}
METRICS = ("loss", "ce", "kl", "error", "margin", "accuracy", "eval_loss")


def fetch(folder, weights=True):
    """`folder` itself; of "org/name" or "org/name@revision" that is no folder here, the one that the hub's model is downloaded to (once).
    weights: False, the settings and the tokenizer alone. ValueError in one sentence: no library, no network, no such model."""
    name = os.fspath(folder)
    if os.path.lexists(name) or not NAME.fullmatch(name):
        return folder
    hub = library("huggingface_hub", f"{name} is no folder, and to download the hub's model of that name", "hub")
    repo, _, revision = name.partition("@")

    def download(patterns):
        return hub.snapshot_download(repo, revision=revision or None, allow_patterns=patterns, ignore_patterns=["*/*"])

    try:
        found = Path(download(SETTINGS + ["*.safetensors"] * weights))
        if weights and not any(found.glob("*.safetensors")):
            found = Path(download(SETTINGS + ["*.bin"]))
    except Exception as error:  # of the network, the hub, the disk
        raise ValueError(f"{name} is no folder, and the hub's model of that name cannot be downloaded: {said(error)}") from None
    return found


def push(folder, repo, private=False, evaluations=()):
    """Uploads a model folder, or the model of a run's folder (mil.distill's or mil.run's `out`), to the hub's `repo`; → its address.

    With it goes a model card, README.md: layers, stages, losses and the recipe, from what the run left, and the scores of `evaluations`,
    folders that mil.evaluate wrote, and of those within the run's; the folder's own README.md instead if there is one. ValueError in one
    sentence: no model there, no library, no network, no leave to write."""
    if not NAME.fullmatch(repo) or "@" in repo:
        raise ValueError(f"{show(repo)} is no name on the hub, expected org/name")
    model, runs = _runs(Path(folder))
    card = None if (model / "README.md").exists() else model_card(model, runs, repo, evaluations)
    hub = library("huggingface_hub", f"to upload to {repo}", "hub")
    try:
        api = hub.HfApi()
        address = api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=str(model), ignore_patterns=["*.tmp"], commit_message="Upload the model")
        if card:
            api.upload_file(path_or_fileobj=card.encode(), path_in_repo="README.md", repo_id=repo, commit_message="Upload the model card")
    except Exception as error:  # of the network, the hub, the disk
        raise ValueError(f"{model} cannot be uploaded to {repo}: {said(error)}") from None
    return str(address)


def _runs(folder):
    """(model folder, folders of the training that led to it, the first one first)"""
    def done(place):
        return sorted((report.parent for report in place.glob("*-*/report.json")), key=lambda part: int(part.name.split("-")[0]))

    if not (folder / "config.json").exists():
        places = [folder / "model", *(part / "model" for part in done(folder)[::-1])]
        found = next((place for place in places if (place / "config.json").exists()), None)
        if found is None:
            raise ValueError(f"{folder} has no config.json and no model in it, expected a model folder or a run's")
        folder = found
    run = folder.resolve().parent
    if folder.name != "model" or not (run / "report.json").exists():
        return folder, done(run) if folder.name == "model" else []
    if (run / "part.json").exists():  # one of a whole recipe's parts
        return folder, [part for part in done(run.parent) if int(part.name.split("-")[0]) <= int(run.name.split("-")[0])]
    return folder, [run]


def model_card(model, runs, repo, evaluations=()):
    """README.md's text for a model folder and the folders of its training (each with report.json, perhaps part.json) and evaluation."""
    from .evaluate.compare import read  # here: both read folders through fetch
    from .info import describe

    config = read_json(model / "config.json")
    base = config.get("_name_or_path") or _teacher(runs)
    head = {"library_name": "mambainllama", "pipeline_tag": "text-generation", "tags": ["mamba", "hybrid", "mambainllama"]}
    if base and NAME.fullmatch(base):
        head["base_model"] = base
    how = EXPORTED.get(config.get("model_type"), LOAD).format(repo)
    if config.get("model_type") in EXPORTED:
        about = f"A hybrid of {config.get('num_hidden_layers')} layers, attention and Mamba, exported by mambainllama."
    else:
        found = describe(model)
        layers = "; ".join(f"{len(numbers)} {kind} ({', '.join(map(str, numbers))})" for kind, numbers in found["layers"].items())
        about = (f"A model of {sum(map(len, found['layers'].values()))} layers: {layers}; {found['parameters']:,} parameters, "
                 f"{' and '.join(found['bytes'])}.")
    out = [f"---\n{yaml.safe_dump(head, sort_keys=False).strip()}\n---", f"# {repo.split('/')[-1]}",
           about + (f" Made from {base}." if base else ""), f"```\n{how}\n```"]
    rows, recipes = [], []
    for run in runs:
        report = read_json(run / "report.json")
        settings = report.get("recipe")
        if not isinstance(settings, dict):  # of answers
            continue
        recipes.append(f"{run.name}:\n\n```yaml\n{yaml.safe_dump(json.loads(json.dumps(settings, default=str)), sort_keys=False).strip()}\n```")
        for stage in report.get("stages", ()):
            values = [f"{key} {stage[key]:.4f}" for key in METRICS if isinstance(stage.get(key), float)]
            rows.append([run.name, stage["stage"] + 1, stage["step"], f"{stage['tokens'] / 1e6:.2f}", ", ".join(values)])
    if rows:
        out += ["## Training", _table(["run", "stage", "last step", "million tokens", "at its end"], rows)]
    near = sorted({file.parent for place in (model, model.parent if runs else model, *runs) for file in place.glob("*/results.json")})
    scores = []
    for kind, results, _ in map(read, dict.fromkeys([*evaluations, *near])):
        scores += [[kind, results["model"], key, f"{value:g}", results.get("judge") or ""] for key, value in results["scores"].items() if value is not None]
    if scores:
        out += ["## Evaluation", _table(["evaluation", "model", "measure", "value", "judge"], scores)]
    if recipes:
        out += ["## Recipe", *recipes]
    return "\n\n".join(out) + "\n"


def _table(head, rows):
    lines = [head, ["---"] * len(head), *([str(cell).replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _teacher(runs):
    """The teacher that a whole recipe names: part.json holds what came before a part, and before that."""
    place = read_json(runs[-1] / "part.json") if runs and (runs[-1] / "part.json").exists() else {}
    while isinstance(place.get("before"), dict):
        place = place["before"]
    return place.get("teacher")
