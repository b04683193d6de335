"""lm-evaluation-harness on our models: `lm` runs its tasks, `harness_model` is its view of a model, `log_likelihoods` what computes them."""
import numpy as np

from ..config import said
from ..generate import generate, part_size
from ..model import State
from .run import Run, bar, library

TAIL = 32  # tokens that a call may leave uncommitted
# arXiv 2408.15237, the zero-shot table (WG PI HS AE AC MM OB TQ PM RA) and the Open LLM Leaderboard one with its numbers of shots
PAPER = {0: ["winogrande", "piqa", "hellaswag", "arc_easy", "arc_challenge", "mmlu", "openbookqa", "truthfulqa_mc2", "pubmedqa", "race"],
         5: ["mmlu", "winogrande"], 10: ["hellaswag"], 25: ["arc_challenge"]}
SUITES = {"paper": PAPER}


def lm(model, out, tasks=None, suite=None, shots=None, limit=None, chat=False, batch=8, max_length=None, include=None, name=None, progress=None):
    """Runs tasks of lm-evaluation-harness; -> the results, also in out/results.json; "lm_eval" in them is the library's own table.

    tasks      names of the library's tasks or groups, or a suite: "paper"
    shots      examples before a question; None: the task's own
    limit      questions a task, for a first look
    chat       questions and examples go through the chat template
    batch      contexts side by side; changes no number but by rounding
    include    a folder of tasks of one's own, in the library's YAML
    Requests that were answered are kept in out/requests*.db: called again, only the others are. "notes" names tasks whose data cannot be had.
    ValueError: an unknown task or suite, lm_eval missing, a hub that cannot be reached."""
    if (tasks is None) == (suite is None):
        raise ValueError("lm: give tasks or a suite")
    if suite is not None and suite not in SUITES:
        raise ValueError(f"lm: there is no suite {suite!r}, only {', '.join(SUITES)}")
    if model.tokenizer is None:
        raise ValueError("lm: the model has no tokenizer, and tasks are text")
    plan = SUITES[suite] if suite else {shots: [tasks] if isinstance(tasks, str) else list(tasks)}
    manager = _manager([task for names in plan.values() for task in names], include)
    settings = {"plan": {"own" if n is None else n: names for n, names in plan.items()}, "chat": chat, "max_length": max_length}
    run = Run(out, "lm", model, settings, name)
    run.version("lm_eval")
    evaluator, adapter = library("lm_eval.evaluator"), harness_model(model, batch, max_length, progress)
    scores, errors, items, tables, notes = {}, {}, {}, {}, []
    for n, task in [(n, task) for n, names in plan.items() for task in names]:  # one at a time: what cannot be loaded stops no other
        try:
            found = evaluator.simple_evaluate(model=adapter, tasks=[task], num_fewshot=n, limit=limit, apply_chat_template=chat, task_manager=manager,
                                              use_cache=str(run.out / "requests"), log_samples=True, fewshot_as_multiturn=chat)
        except ConnectionError as error:  # the hub
            raise ValueError(f"lm: the data of {task} cannot be loaded ({said(error)}); what was computed is kept, and the same call goes on") from None
        except (FileNotFoundError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "Dataset scripts" not in str(error):  # which datasets 4 no longer runs
                raise
            notes.append(f"{task} is left out, since its data cannot be loaded ({said(error)})")
            continue
        end = "" if n is None else f" {n}-shot"
        tables.setdefault("own" if n is None else str(n), {}).update(found["results"])
        for name, table in found["results"].items():
            for key, value in table.items():
                metric, _, kept = key.partition(",")
                if not isinstance(value, (int, float, np.floating)) or not kept:
                    continue
                place, metric = (errors, metric.removesuffix("_stderr")) if metric.endswith("_stderr") else (scores, metric)
                place[f"{name}{end} {metric}{_filter(kept)}"] = float(value)
        for name, samples in found["samples"].items():
            for sample in samples:
                for metric in sample.get("metrics", ()):
                    if isinstance(sample.get(metric), (int, float, bool, np.number)):
                        items.setdefault(f"{name}{end} {metric}{_filter(sample.get('filter', 'none'))}", {})[str(sample["doc_id"])] = float(sample[metric])
    if not tables:
        raise ValueError(f"lm: {'; '.join(notes)}")
    return run.finish(scores, items, errors=errors, limit=limit, lm_eval=tables, notes=notes)


def _filter(name):
    """What a metric's name ends with: a task may have several filters of answers, such as gsm8k's strict-match and flexible-extract."""
    return "" if name == "none" else f" ({name})"


def _manager(tasks, include):
    """lm_eval's index of tasks: of the folder alone where that has them all, since reading the library's own 14,000 takes some seconds."""
    package = library("lm_eval.tasks")
    for defaults in (False, True) if include else (True,):
        manager = package.TaskManager(include_path=include, include_defaults=defaults)
        unknown = [task for task in tasks if task not in manager.all_tasks]
        if not unknown:
            return manager
    raise ValueError(f"lm: lm_eval has no task {', '.join(unknown)}")


def harness_model(model, batch=8, max_length=None, progress=None):
    """The model as an lm_eval TemplateLM, to be given to simple_evaluate(model=…). Tokens are those of the library's Hugging Face backend.

    max_length: tokens that a question may have (default: the model's max_position_embeddings); it is cut at its beginning."""
    api, utils = library("lm_eval.api.model"), library("lm_eval.utils")
    tokenizer = model.tokenizer
    bos, eos = tokenizer.special_id("bos_token"), tokenizer.special_id("eos_token")
    stops = [eos] if eos is not None else list(model.stop_tokens)

    class Harness(api.TemplateLM):
        eot_token_id = property(lambda self: stops[0] if stops else None)
        prefix_token_id = property(lambda self: bos if bos is not None else self.eot_token_id)
        tokenizer_name = property(lambda self: f"mambainllama-{tokenizer.fingerprint}")
        max_gen_toks = 256

        def __init__(self):
            super().__init__()
            self.max_length = max_length or model.config.get("max_position_embeddings", 2048)
            self.bos_text = tokenizer.decode([bos], skip_special_tokens=False) if bos is not None else None

        def tok_encode(self, string, add_special_tokens=None, **kwargs):
            if add_special_tokens is None:
                add_special_tokens = not (self.bos_text and string.startswith(self.bos_text))
            return tokenizer.encode(string, add_special_tokens=add_special_tokens)

        def chat_template(self, chat_template=False):
            return tokenizer.chat_template if chat_template else None

        def apply_chat_template(self, chat_history, add_generation_prompt=True):
            text = tokenizer.render(chat_history, add_generation_prompt)
            if add_generation_prompt:
                return text
            said = chat_history[-1]["content"].rstrip()  # an answer that is to be continued: without what ends it
            return text[:text.rindex(said) + len(said)]

        def _loglikelihood_tokens(self, requests, disable_tqdm=False, **kwargs):
            pairs = []
            for _, context, continuation in requests:
                ids = (context + continuation)[-(self.max_length + 1):]
                cut = max(len(ids) - len(continuation), 1)
                pairs.append((ids[:cut], ids[cut:]))

            def done(i, found):
                if requests[i][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[i][0], found)
            return log_likelihoods(model, pairs, batch, done, progress)

        def loglikelihood_rolling(self, requests, disable_tqdm=False):
            windows, owners = [], []
            for i, request in enumerate(requests):
                for window in utils.get_rolling_token_windows(token_list=self.tok_encode(request.args[0]), prefix_token=self.prefix_token_id,
                                                              max_seq_len=self.max_length, context_len=1):
                    windows.append(utils.make_disjoint_window(window))
                    owners.append(i)
            found = np.zeros(len(requests))
            np.add.at(found, owners, text_log_likelihoods(model, windows, batch, progress))
            for request, value in zip(requests, found.tolist()):
                self.cache_hook.add_partial("loglikelihood_rolling", request.args, value)
            return found.tolist()

        def generate_until(self, requests, disable_tqdm=False):
            groups, out = {}, [None] * len(requests)
            for i, request in enumerate(requests):
                groups.setdefault(repr(request.args[1]), []).append(i)
            with bar("answers", len(requests), progress=progress) as shown:
                for numbers in groups.values():
                    how = utils_models.normalize_gen_kwargs(requests[numbers[0]].args[1], self.max_gen_toks)
                    limit = how["max_gen_toks"]
                    room = self.max_length - limit
                    if room < 1:
                        raise ValueError(f"lm: {limit} new tokens leave no room for a question in {self.max_length} tokens")
                    until = how.get("until") or []
                    until = [text for text in ([until] if isinstance(until, str) else until) if text]

                    def done(place, answered):
                        i = numbers[place]
                        out[i] = answered.text
                        self.cache_hook.add_partial("generate_until", requests[i].args, answered.text)
                        shown.update()
                    generate(model, [self.tok_encode(requests[i].args[0])[-room:] for i in numbers], limit, stop=until or None, stop_tokens=stops,
                             temperature=how.get("temperature", 0.0) if how.get("do_sample") else 0.0, top_p=how.get("top_p", 1.0),
                             top_k=how.get("top_k", 0), batch=batch, finished=done)
            return out

    utils_models = library("lm_eval.models.utils")
    return Harness()


def log_likelihoods(model, pairs, batch=8, done=None, progress=None):
    """[(log p(continuation | context), whether greedy decoding gives it)] of pairs of token ids, both at least one token long.

    Contexts that occur more than once are read once; longest first, `batch` side by side. done(i, (log p, greedy)): called for each as it is
    known."""
    groups = {}
    for i, (context, continuation) in enumerate(pairs):
        if not len(context):
            raise ValueError(f"log_likelihoods: pair {i} has no context")
        groups.setdefault(tuple(context) if len(continuation) <= TAIL else i, []).append(i)
    groups = sorted(groups.values(), key=lambda group: -len(pairs[group[0]][0]))
    found = [None] * len(pairs)
    with bar("log-likelihoods", len(pairs), progress=progress) as shown:
        for start in range(0, len(groups), batch):
            block = groups[start:start + batch]
            room = max(len(pairs[i][0]) + len(pairs[i][1]) for group in block for i in group)
            state = State(model, len(block), room + TAIL)
            _prefill(model, state, [pairs[group[0]][0][:-1] for group in block])
            for turn in range(max(map(len, block))):
                live = [(slot, group[turn]) for slot, group in enumerate(block) if turn < len(group)]
                for i, result in zip([i for _, i in live], _tails(model, state, live, pairs)):
                    found[i] = result
                    if done:
                        done(i, result)
                    shown.update()
    return found


def _prefill(model, state, contexts):
    """Row b of the State reads contexts[b], which do not get longer from row to row."""
    step = part_size(model)
    for at in range(0, len(contexts[0]) if contexts else 0, step):
        parts = [context[at:at + step] for context in contexts]
        keep = [len(part) for part in parts if len(part)]
        model.logits(_padded(parts[:len(keep)]), state, keep=np.array(keep), slot=np.arange(len(keep)), last=0)


def _tails(model, state, live, pairs):
    """(log p, greedy) of pairs[i] for each (slot, i) of live, whose slots have read all of the context but its last token. A continuation of
    TAIL tokens at most leaves the State as it was."""
    totals, greedy = np.zeros(len(live)), np.ones(len(live), bool)
    inputs = [[pairs[i][0][-1], *pairs[i][1][:-1]] for _, i in live]
    for at in range(0, max(map(len, inputs)), TAIL):
        rows = [r for r, ids in enumerate(inputs) if at < len(ids)]
        parts = [inputs[r][at:at + TAIL] for r in rows]
        keep = np.array([len(part) if len(inputs[r]) > TAIL else 0 for r, part in zip(rows, parts)])
        logits = model.logits(_padded(parts), state, keep=keep, slot=np.array([live[r][0] for r in rows]))
        for r, part, row in zip(rows, parts, logits):
            target = np.asarray(pairs[live[r][1]][1][at:at + TAIL])
            z = row[:len(part)] - row[:len(part)].max(-1, keepdims=True)
            chosen = z[np.arange(len(part)), target].astype(np.float64)
            totals[r] += (chosen - np.log(np.exp(z).sum(-1, dtype=np.float64))).sum()
            greedy[r] &= bool((z.argmax(-1) == target).all())
    return list(zip(totals.tolist(), greedy.tolist()))


def text_log_likelihoods(model, pairs, batch=8, progress=None):
    """log p(continuation | context) (n) of pairs whose continuations are long: whole forwards, without a table of logits."""
    out = np.zeros(len(pairs))
    order = sorted(range(len(pairs)), key=lambda i: -len(pairs[i][0]) - len(pairs[i][1]))
    with bar("log-likelihoods", len(pairs), progress=progress) as shown:
        for start in range(0, len(order), batch):
            some = order[start:start + batch]
            whole = [[*pairs[i][0], *pairs[i][1]] for i in some]
            ids, targets = _padded([row[:-1] for row in whole]), np.full((len(some), len(whole[0]) - 1), -100, np.int32)
            for b, i in enumerate(some):
                n = len(pairs[i][1])
                targets[b, len(whole[b]) - 1 - n:len(whole[b]) - 1] = pairs[i][1]
            out[some] = model.log_probs(ids, targets).sum(-1, dtype=np.float64)
            shown.update(len(some))
    return out


def _padded(rows):
    """Lists of ids as int32 (n, longest), filled up with 0."""
    out = np.zeros((len(rows), max(map(len, rows))), np.int32)
    for b, row in enumerate(rows):
        out[b, :len(row)] = row
    return out
