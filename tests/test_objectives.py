"""What training minimises, through mil.sft, mil.distill and mil.dpo: loss, metrics and the gradient of one step (the first moments of a
fresh AdamW are a tenth of it) against torch in float64, one document at a time; the original code's distillation; TRL's DPO; the
templates' masks. Each reference is written from its own source, without ours: packing, masks and shares of micro-batches are ours alone."""
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import mambainllama as mil
from mambainllama.data import Batches, read
from mambainllama.preference import Preference
from mambainllama.recipe import load_recipe
from test_model import build, error, reference
from test_tokenizer import CHAT, TEMPLATES

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
F = torch.nn.functional

FOLDER = Path(__file__).parent / "data" / "llama3"
HALF = ["mamba1 hybrid", "mamba2 hybrid"]  # ½ attention each
ONE = {"steps": 1, "length": 32, "batch": 1, "clip": None, "betas": [0.9, 0.98], "warmup": 0.0, "lr": 1e-3}


def documents(seed=0, count=9, longest=32):
    """Rows of ids, as a chat of several turns counts: stretches of tokens, the first of all included in some."""
    r = np.random.default_rng(seed)
    rows = [{"ids": r.integers(61, size=r.integers(2, longest + 1)).tolist()} for _ in range(count)]
    for row in rows:
        row["mask"] = np.repeat(r.integers(2, size=16), 3)[:len(row["ids"]) - 1].tolist() + [1]
    return rows


def packed(rows, **changes):
    """ONE step over all rows, packed, a micro-batch for each row of the packing: unequal counts of tokens."""
    return {**ONE, "accumulate": len(Batches(read(rows), ONE["length"], 1)), **changes}


def gradients_are(model, params):
    found = model.moments()
    assert set(found) == set(params)
    errors = {name: error(m * 10, params[name].grad) for name, (m, _, _) in found.items()}
    assert max(errors.values()) < 1e-4, max(errors, key=errors.get)


def targets_of(row):
    """The row's ids and labels as the formula needs them: position t predicts t + 1."""
    ids, mask = torch.tensor(row["ids"])[None], torch.tensor(row["mask"], dtype=torch.bool)
    return ids, torch.where(mask[1:], ids[0, 1:], -100)


# -- fine-tuning and distillation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HALF)
def test_fine_tuning(name):
    model, rows = build(name), documents()
    _, ref, params, arch = reference(model)
    losses, count = 0, 0
    for row in rows:
        ids, labels = targets_of(row)
        losses = losses + F.cross_entropy(ref.logits(params, ids, arch)[0, :-1], labels, reduction="sum")
        count += int((labels >= 0).sum())
    (losses / count).backward()
    report = mil.sft(model, rows, packed(rows))
    assert report["ce"] == report["loss"] == pytest.approx(losses.item() / count, rel=1e-5)
    gradients_are(model, params)


def divergence(kind, p, q):
    """Of the student's log-probabilities q from the teacher's p, (T)."""
    if kind == "reverse":
        p, q = q, p
    if kind == "jensen-shannon":
        m = torch.log((p.exp() + q.exp()) / 2)
        return (F.kl_div(m, p, log_target=True, reduction="none") + F.kl_div(m, q, log_target=True, reduction="none")).sum(-1) / 2
    return F.kl_div(q, p, log_target=True, reduction="none").sum(-1)


@pytest.mark.parametrize("name", HALF)
@pytest.mark.parametrize("kind", ["forward", "reverse", "jensen-shannon"])
def test_distillation(name, kind):
    model, teacher, rows, tau = build(name), build("transformer", seed=2), documents(1, 6), 1.7
    _, ref, params, arch = reference(model)
    _, _, frozen, its = reference(teacher)
    ce, kl, count = 0, 0, 0
    for row in rows:
        ids, labels = targets_of(row)
        use, z = labels >= 0, ref.logits(params, ids, arch)[0, :-1]
        with torch.no_grad():
            u = ref.logits(frozen, ids, its)[0, :-1]
        ce = ce + F.cross_entropy(z, labels, reduction="sum")
        kl = kl + tau**2 * divergence(kind, torch.log_softmax(u / tau, -1), torch.log_softmax(z / tau, -1))[use].sum()
        count += int(use.sum())
    (0.3 * ce / count + 0.7 * kl / count).backward()
    report = mil.distill(model, teacher, rows, packed(rows, ce=0.3, kl=0.7, temperature=tau, kl_kind=kind))
    assert [report["ce"], report["kl"]] == pytest.approx([ce.item() / count, kl.item() / count], rel=2e-5)
    gradients_are(model, params)


@pytest.mark.parametrize("name", HALF)
def test_kl_kind_paper_is_the_original_code_s(name):
    """jxiw/MambaInLlama, train_mamba2/train_hybrid.py, a batch of four: F.kl_div(log_softmax(student), softmax(teacher),
    reduction="batchmean") of all positions, the last and the uncounted among them, unshifted; transformers' shifted cross-entropy;
    kl_weight and ce_weight. Ours in two micro-batches of unequal counts."""
    model, teacher, r = build(name), build("transformer", seed=2), np.random.default_rng(5)
    rows = [{"ids": r.integers(61, size=32).tolist(), "mask": [0] * (32 - n) + [1] * n} for n in (31, 2, 9, 5)]
    _, ref, params, arch = reference(model)
    _, _, frozen, its = reference(teacher)
    ids = torch.tensor([row["ids"] for row in rows])
    labels = torch.where(torch.tensor([row["mask"] for row in rows]) > 0, ids, -100)
    z = ref.logits(params, ids, arch)
    with torch.no_grad():
        u = ref.logits(frozen, ids, its)
    kl = F.kl_div(F.log_softmax(z, dim=-1), F.softmax(u, dim=-1), reduction="batchmean")
    ce = F.cross_entropy(z[:, :-1].reshape(-1, 61), labels[:, 1:].reshape(-1))
    loss = 0.1 * kl + 1.0 * ce
    loss.backward()
    report = mil.distill(model, teacher, rows, {**ONE, "batch": 2, "accumulate": 2, "kl_kind": "paper", "kl": 0.1, "ce": 1.0})
    assert [report[key] for key in ("loss", "kl", "ce")] == pytest.approx([loss.item(), kl.item(), ce.item()], rel=2e-5)
    gradients_are(model, params)


def test_steps_of_the_original_code():
    """Adam, clipping and a constant rate over four steps on one batch, all but the Mamba layers frozen: where weights and loss end."""
    model, teacher, row = build("mamba2 hybrid"), build("transformer", seed=2), documents(0, 1, 20)[0]
    _, ref, params, arch = reference(model)
    _, _, frozen, its = reference(teacher)
    before = {name: model.get(name) for name in params}
    learn = [p for name, p in params.items() if "mamba" in name]
    adam = torch.optim.Adam(learn, lr=3e-3, betas=(0.9, 0.98))
    ids, labels = targets_of(row)
    with torch.no_grad():
        u = F.softmax(ref.logits(frozen, ids, its), -1)
    for _ in range(4):
        adam.zero_grad()
        z = ref.logits(params, ids, arch)
        loss = 0.1 * F.kl_div(F.log_softmax(z, -1), u, reduction="batchmean") + F.cross_entropy(z[0, :-1], labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learn, 0.1)
        adam.step()
    recipe = {**ONE, "length": len(row["ids"]), "steps": 4, "lr": 3e-3, "clip": 0.1, "schedule": "constant", "train": ["*mamba*"]}
    report = mil.distill(model, teacher, [row], {**recipe, "kl_kind": "paper", "kl": 0.1, "ce": 1.0})
    assert report["loss"] == pytest.approx(loss.item(), rel=1e-4)
    for name, start in before.items():
        moved = params[name].detach().numpy() - start
        assert error(model.get(name) - start, moved) < 2e-2 if "mamba" in name else np.array_equal(model.get(name), start), name


# -- preference ---------------------------------------------------------------------------------------------------------------------

LOSSES = [("sigmoid", 0.0), ("sigmoid", 0.2), ("ipo", 0.0)]
ANSWERS = ("chosen", "rejected")


def preference(kind, smooth, beta, own, held, lengths):
    """{"loss", metric…} of log-probabilities {"chosen": (pairs), "rejected": (pairs)} by TRL's formulas: sigmoid as its 0.28 smooths it,
    ipo of means over tokens, and rewards of sums."""
    chosen, rejected = (own[key] - held[key] for key in ANSWERS)
    margin = beta * (chosen - rejected)
    loss = -(1 - smooth) * F.logsigmoid(margin) - smooth * F.logsigmoid(-margin)
    if kind == "ipo":
        loss = (chosen / lengths["chosen"] - rejected / lengths["rejected"] - 1 / (2 * beta)) ** 2
    metrics = {"margin": margin.mean(), "accuracy": (margin > 0).double().mean(), **{key: own[key].mean() for key in ANSWERS}}
    return {"loss": loss.mean(), **metrics}


def numbers(values, like):
    return {key: float(torch.as_tensor(like[key]).detach()) for key in values}


@pytest.mark.parametrize("name", HALF)
@pytest.mark.parametrize("kind, smooth", LOSSES)
def test_preference(name, kind, smooth):
    model, other = build(name), build(name, seed=4)
    r = np.random.default_rng(0)
    rows = [{key: r.integers(61, size=r.integers(1, n)).tolist() for key, n in (("prompt", 12), ("chosen", 20), ("rejected", 20))}
            for _ in range(6)]

    def log_probs(model):
        _, ref, params, arch = reference(model)
        found = {key: [] for key in ANSWERS}
        for row in rows:
            for key in ANSWERS:
                ids, start = torch.tensor(row["prompt"] + row[key]), len(row["prompt"])
                z = torch.log_softmax(ref.logits(params, ids[None], arch)[0], -1)
                found[key].append(sum(z[t - 1, ids[t]] for t in range(start, len(ids))))
        return {key: torch.stack(values) for key, values in found.items()}, params

    own, params = log_probs(model)
    with torch.no_grad():
        held, _ = log_probs(other)
    expected = preference(kind, smooth, 0.3, own, held, {key: torch.tensor([len(row[key]) for row in rows]) for key in ANSWERS})
    expected["loss"].backward()
    report = mil.dpo(model, rows, {**ONE, "batch": 2, "accumulate": 3, "beta": 0.3, "preference": kind, "label_smoothing": smooth}, other)
    assert numbers(expected, report) == pytest.approx(numbers(expected, expected), rel=2e-5)
    gradients_are(model, params)


def user(text):
    return {"role": "user", "content": text}


def says(text):
    return {"role": "assistant", "content": text}


PAIRS = [{"prompt": [user("What is the key of the blue door?")], "chosen": [says("The key is seven.")], "rejected": [says("Forty-two")]},
         {"prompt": [{"role": "system", "content": "Be brief."}, user("Copy: a b c d.")], "chosen": [says("a b c d")],
          "rejected": [says("a b c d, and then some more words")]},
         {"prompt": [user("Twelve and thirty?"), says("Forty-two"), user("And one more?")], "chosen": [says("Forty-three")],
          "rejected": [says("Größe 東京 🙂")]}]
# of TRL 1.16.0 on PAIRS, as test_trl_itself computes it where trl is installed
TRL = {"sigmoid": 0.462252, "ipo": 18.596334, "margin": 0.601904, "accuracy": 2 / 3, "chosen": -58.809692, "rejected": -109.127296}


def with_template(folder, template=None):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(FOLDER / name, folder / name)
    if template:
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": template}))
    return folder


def theirs(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    """A folder: the reference, FOLDER, with noise."""
    folder = tmp_path_factory.mktemp("policy")
    model, r = theirs(FOLDER), np.random.RandomState(7)
    for p in model.parameters():
        p.data += torch.tensor(0.05 * r.standard_normal(tuple(p.shape)), dtype=torch.float32)
    model.save_pretrained(folder)
    return with_template(folder)


def ours(policy, rows, kind="sigmoid", smooth=0.0, **recipe):
    recipe = {"steps": 1, "length": 128, "batch": len(rows), "preference": kind, "label_smoothing": smooth, **recipe}
    return mil.dpo(mil.load(policy), rows, recipe, mil.load(FOLDER))


def as_trl(tokenizer, row):
    """(ids, where the answer starts) of both, by TRL 1.16's DPOTrainer._prepare_dataset: up to where the prompt, with what asks for an
    answer, and the whole chats part."""
    whole = [tokenizer.apply_chat_template(row["prompt"] + row[key], return_dict=False) for key in ANSWERS]
    prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
    start = min(next((i for i, (a, b) in enumerate(zip(prompt, ids)) if a != b), len(prompt)) for ids in whole)
    return [(ids, start) for ids in whole]


def trl(policy, rows, kind, smooth):
    """Its numbers by its path: chosen and rejected in one padded batch of transformers' model."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(policy)
    pairs = [as_trl(tokenizer, row) for row in rows]
    order = [pair[half] for half in (0, 1) for pair in pairs]
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row, _ in order], batch_first=True)
    answer = torch.tensor([[start <= t < len(row) for t in range(ids.shape[1])] for row, start in order])
    present = torch.tensor([[t < len(row) for t in range(ids.shape[1])] for row, _ in order])

    def sums(folder):
        with torch.no_grad():
            z = theirs(folder)(ids, attention_mask=present.long(), use_cache=False).logits
        each = torch.log_softmax(z[:, :-1].double(), -1).gather(2, ids[:, 1:, None])[..., 0] * answer[:, 1:]
        return dict(zip(ANSWERS, each.sum(1).chunk(2)))

    return preference(kind, smooth, 0.1, sums(policy), sums(FOLDER), dict(zip(ANSWERS, answer.sum(1).chunk(2))))


@pytest.mark.parametrize("kind, smooth", LOSSES)
def test_preference_of_chats_is_trl_s(policy, kind, smooth):
    expected = trl(policy, PAIRS, kind, smooth)
    report = ours(policy, PAIRS, kind, smooth)
    assert numbers(expected, report) == pytest.approx(numbers(expected, expected), rel=1e-5)
    if not smooth:
        stored = {**TRL, "loss": TRL[kind]}
        assert numbers(expected, report) == pytest.approx(numbers(expected, stored), rel=1e-4)


@pytest.mark.parametrize("name", TEMPLATES)
def test_pairs_are_tokens_as_trl_s(name, tmp_path):
    """But for what a template leaves outside its generation block: TRL counts the line's end after "marked"'s."""
    model = mil.load(FOLDER)
    model.tokenizer = type(model.tokenizer)(with_template(tmp_path, TEMPLATES[name]))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    goal = Preference(model, "start", load_recipe({"steps": 1, "length": 400}))
    for row, pair in zip(PAIRS, goal.read(PAIRS, "data").pairs):
        for (ids, start), (own, targets) in zip(as_trl(tokenizer, row), pair):
            assert own.tolist() == ids
            end = len(ids) - (name == "marked")
            assert targets.tolist() == [-100] * (start - 1) + ids[start:end] + [-100] * (len(ids) - end + 1)


def test_trl_itself(policy, tmp_path):
    """DPOTrainer's evaluation of the same rows; and of its robust loss, which holds the smoothed sigmoid."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    rows = Dataset.from_list(PAIRS)
    for kind, loss, smooth in (("sigmoid", "sigmoid", 0.0), ("ipo", "ipo", 0.0), ("sigmoid", "robust", 0.2)):
        arguments = trl.DPOConfig(output_dir=str(tmp_path), per_device_eval_batch_size=3, beta=0.1, loss_type=loss, label_smoothing=smooth,
                                  report_to=[], use_cpu=True, bf16=False, disable_tqdm=True)
        found = trl.DPOTrainer(theirs(policy), theirs(FOLDER), args=arguments, train_dataset=rows, eval_dataset=rows,
                               processing_class=transformers.AutoTokenizer.from_pretrained(policy)).evaluate()
        names = ("loss", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected")
        expected = dict(zip(("loss", "margin", "accuracy", *ANSWERS), (found[f"eval_{name}"] for name in names)))
        report = ours(policy, PAIRS, kind, smooth)
        if loss == "robust":  # ((1 - e) a - e b) / (1 - 2 e), and ours (1 - e) a + e b; a the plain loss
            plain = ours(policy, PAIRS)["loss"]
            expected["loss"] = 2 * (1 - smooth) * plain - (1 - 2 * smooth) * expected["loss"]
        assert numbers(expected, report) == pytest.approx(expected, rel=1e-5)


# -- which tokens count -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TEMPLATES)
def test_fine_tuning_of_chats(name, tmp_path):
    """Cross-entropy of transformers' own model with labels where its tokenizer says that an answer is: {% generation %}'s mask, or what a
    turn adds to the chat rendered with what asks for it."""
    model = mil.load(FOLDER)
    model.tokenizer = type(model.tokenizer)(with_template(tmp_path, TEMPLATES[name]))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    chats, total, count = [CHAT, CHAT[1:3], PAIRS[2]["prompt"]], 0, 0
    for chat in chats:
        found = tokenizer.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=name == "marked")
        ids, counts = found["input_ids"], found.get("assistant_masks", [0] * len(found["input_ids"]))
        for i, message in enumerate(chat):
            if message["role"] == "assistant" and name != "marked":
                start, end = (len(tokenizer.apply_chat_template(part, add_generation_prompt=ask, return_dict=False))
                              for part, ask in ((chat[:i], True), (chat[:i + 1], False)))
                counts[start:end] = [1] * (end - start)
        labels = torch.tensor([[i if c else -100 for i, c in zip(ids, counts)]])
        with torch.no_grad():
            total += theirs(FOLDER)(torch.tensor([ids]), labels=labels, use_cache=False).loss.item() * sum(counts)
        count += sum(counts)
    rows = [{"messages": chat} for chat in chats]
    report = mil.sft(model, rows, {**ONE, "length": 400, "accumulate": 1, "batch": 1})
    assert report["ce"] == pytest.approx(total / count, rel=1e-5)
