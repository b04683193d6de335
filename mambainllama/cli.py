"""The command line: each command is a thin call of the package's own functions.

Exit codes: 0 done, 2 bad input (one sentence on stderr), 130 interrupted."""
import argparse
import json
import os
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from .config import MIXERS, said
from .parallel import ranks, started

SETTINGS = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "seed")  # options of what is generated

def main(argv=None):
    """Runs one command; -> the exit code. Of a job's ranks, the first one alone speaks."""
    if started()[0]:
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
            return _main(argv)
    return _main(argv)


def _main(argv):
    try:
        parser = _parser()
        args, rest = parser.parse_known_args(argv)
        unknown = [word for word in rest if word.startswith("-")] if "prompts" in args else rest
        if unknown:
            args.parser.error("unrecognized arguments: " + " ".join(unknown))
        if rest:  # argparse takes no more positionals once options have come between
            args.prompts += rest
        if ranks().size > 1 and args.run not in (_cache, _distill, _train, _sft, _dpo, _run):
            raise ValueError("only training and caches share their work out to ranks; start this command without mpirun")
        with ranks().job():
            args.run(args)
        sys.stdout.flush()
        return 0
    except SystemExit as e:  # argparse: --help (0) or a wrong argument (2)
        return e.code
    except KeyboardInterrupt as e:
        print("mambainllama: interrupted" + (f": {e}" if str(e) else ""), file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output left: `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError, RuntimeError, MemoryError) as e:
        print("mambainllama: " + said(e), file=sys.stderr)
        return 2


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def _command_of(commands):
    """What adds a command to `commands`: a function of its name, what runs it, its help and its examples; -> its parser."""
    def command(name, run, help_, example):
        p = commands.add_parser(name, help=help_, description=help_, epilog="examples:\n" + example,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
        p.set_defaults(run=run, parser=p)
        return p
    return command


def _parser():
    top = _Parser(prog="mambainllama", description="Llama in, Mamba hybrid out: convert, distil, generate.",
                  epilog="`mambainllama COMMAND --help` has examples of each. Where a model's folder is asked for, org/name is the hub's model.")
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)

    command = _command_of(commands)

    def device(p):
        p.add_argument("--device", default="cpu", metavar="cpu|cuda", help="where to compute (default: cpu)")

    def device_and_dtype(p):
        device(p)
        p.add_argument("--dtype", choices=["float32", "bfloat16"], help="of the matrices (default: as stored)")

    p = command("demo", _demo, "Train a small teacher, convert, distil and measure it; write a report.", """\
  mambainllama demo
  mambainllama demo --out /tmp/demo --seed 1""")
    device(p)
    p.add_argument("--out", type=_folder, default="demo", help="folder for models, metrics and the report (default: demo)")
    p.add_argument("--seed", type=int, default=0)

    p = command("convert", _convert, "Replace attention layers by Mamba mixers that start as the attention's own.", """\
  mambainllama convert Llama-3.2-1B-Instruct hybrid --attention 0.5
  mambainllama convert teacher hybrid --mamba-layers 0,2,4 --mixer mamba1 --init random
  mambainllama convert teacher baseline --attention 0.5 --mixer window --window 128 --sinks 4""")
    device_and_dtype(p)
    p.add_argument("teacher", help="folder of the teacher")
    p.add_argument("out", type=_folder, help="folder to write")
    which = p.add_mutually_exclusive_group(required=True)
    which.add_argument("--attention", type=float, metavar="SHARE", help="share of layers to keep: 0.5, 0.25, 0.125 or 0")
    which.add_argument("--mamba-layers", type=_numbers, metavar="I,J,...", help="the layers to replace, from 0")
    p.add_argument("--mixer", choices=MIXERS, default="mamba2",
                   help="window: the attention, to the last tokens and the first; identity: nothing (default: mamba2)")
    p.add_argument("--window", type=int, metavar="N", help="for --mixer window: the last tokens that are seen (default: 128)")
    p.add_argument("--sinks", type=int, metavar="N", help="for --mixer window: the first tokens, seen as well (default: 4)")
    p.add_argument("--init", choices=["attention", "identity", "calibrated", "random"], default="attention",
                   help="attention: its projections; identity: these, and convolutions that pass their input on; calibrated: these, and decays, "
                        "gates and scales from what attention does on --data (default: attention)")
    p.add_argument("--data", metavar="DATA", help="for --init calibrated: rows of messages, text or ids")
    p.add_argument("--seed", type=int, default=0)

    p = command("plan", _plan, "Which attention layers to keep: measured a layer, with what each plan costs and may lose.", """\
  mambainllama plan Llama-3.2-1B-Instruct --data chats.jsonl --out plan
  mambainllama plan teacher --data chats.jsonl --attention 0.5 0.25 0 --student aligned/model --recipe recipe.yaml --probe-steps 50
  mambainllama plan demo/teacher --data chats.jsonl --set length=128 --set steps=400 --probe-steps 0""")
    p.add_argument("teacher", help="folder of the teacher")
    p.add_argument("--data", required=True, nargs="+", help="what will be distilled on, as for distill")
    p.add_argument("--attention", type=float, nargs="+", metavar="SHARE", default=[0.5, 0.25],
                   help="shares of layers to keep, a plan or two for each (default: 0.5 0.25)")
    p.add_argument("--student", metavar="FOLDER", help="the teacher without attention, aligned (default: converted now)")
    p.add_argument("--align-steps", type=int, default=50, metavar="N", help="align what is converted now for N steps first (default: 50)")
    p.add_argument("--probe-steps", type=int, default=20, metavar="N",
                   help="distil each plan for N, 2N and 4N steps and forecast the loss; 0: no forecast (default: 20)")
    p.add_argument("--rows", type=int, default=16, metavar="N", help="packed rows of held-out data to measure on (default: 16)")
    p.add_argument("--context", type=int, default=512, metavar="N", help="tokens before those that are timed; 0: no timing (default: 512)")
    p.add_argument("--out", type=_folder, help="folder for plan.json, whose stages go into a recipe, and plan.png")
    _with_recipe(p)
    device_and_dtype(p)

    p = command("distill", _distill, "Distil a teacher into a hybrid; started again with the same --out, it goes on.", """\
  mambainllama distill teacher chats.jsonl --out run --recipe recipe.yaml
  mambainllama distill teacher chats.jsonl --out run --student hybrid --set steps=2000 --set lr=3e-5
  mambainllama distill hybrid chats.jsonl --out run --cache cached --set steps=2000
  mambainllama distill teacher chats.jsonl --out run --set 'stages=[{"mamba_layers": [0, 2], "steps": 500}]'""")
    p.add_argument("teacher", help="folder of the teacher; with --cache: of the student")
    _data(p, "messages or text")
    p.add_argument("--student", help="folder made by `convert` (default: the teacher itself; the recipe's stages convert it)")
    p.add_argument("--cache", metavar="DIR", help="learn from what `cache` wrote of the teacher, which is then not loaded")
    _training(p)
    device_and_dtype(p)

    p = command("cache", _cache, "Write a teacher's likeliest next tokens at each token of the data; started again, it goes on.", """\
  mambainllama cache teacher --data chats.jsonl --out cached --length 2048
  mambainllama cache teacher --data chats.jsonl --out cached --k 64 --temperature 2 --student hybrid""")
    p.add_argument("teacher", help="folder of the teacher")
    _data(p, "messages or text, those of the runs to come", "--data", required=True, metavar="DATA")
    p.add_argument("--out", type=_folder, required=True, metavar="DIR", help="folder to write, 8 K + 4 bytes a token")
    p.add_argument("--k", type=int, default=32, metavar="K", help="likeliest tokens that are kept; the rest is one number (default: 32)")
    p.add_argument("--length", type=int, default=2048, metavar="N", help="the recipe's length (default: 2048)")
    p.add_argument("--temperature", type=float, default=1.0, metavar="X", help="the recipe's temperature (default: 1)")
    p.add_argument("--batch", type=int, default=8, metavar="N", help="rows computed together (default: 8)")
    p.add_argument("--student", metavar="FOLDER", help="whose KL is measured with and without the cache (default: half its layers converted)")
    device_and_dtype(p)

    p = command("train", _train, "Train with the plain next-token loss; started again with the same --out, it goes on.", """\
  mambainllama train hybrid chats.jsonl --out run --set steps=1000
  mambainllama train config.json text.jsonl --tokenizer Llama-3.2-1B --out run --recipe recipe.yaml""")
    p.add_argument("model", help="folder, or a config.json: then from random weights")
    _data(p, "messages or text")
    p.add_argument("--tokenizer", metavar="FOLDER", help="for a config.json: the folder whose tokenizer the model takes")
    _training(p)
    device_and_dtype(p)

    p = command("sft", _sft, "Fine-tune on chats: the answers alone count; started again with the same --out, it goes on.", """\
  mambainllama sft hybrid chats.jsonl --out run --set steps=1000 --set lr=2e-5
  mambainllama sft hybrid hub:HuggingFaceH4/ultrachat_200k:train_sft more.parquet --out run --set epochs=1""")
    p.add_argument("model", help="folder")
    _data(p, "messages")
    _training(p)
    device_and_dtype(p)

    p = command("dpo", _dpo, "Learn from pairs which answer is preferred; started again with the same --out, it goes on.", """\
  mambainllama dpo hybrid pairs.jsonl --out run --set steps=500 --set lr=5e-7 --set beta=0.1
  mambainllama dpo hybrid pairs.jsonl --out run --reference teacher --recipe recipe.yaml""")
    p.add_argument("model", help="folder")
    _data(p, "prompt, chosen and rejected")
    p.add_argument("--reference", metavar="FOLDER", help="the model that it is held to, such as the teacher (default: the model as it came)")
    _training(p)
    device_and_dtype(p)

    p = command("run", _run, "Run a whole recipe: pseudo-labels, conversion, distillation, SFT, DPO; started again, it goes on.", """\
  mambainllama run recipe.yaml --out run
  mambainllama run paper-llama3-8b-mamba2-half --dry-run
  mambainllama run paper-llama3-8b-mamba2-half --set teacher=Llama-3-8B --set distill.data=chats.jsonl --set sft.data=chats.jsonl --out run""")
    p.add_argument("recipe", help="YAML or JSON, or the name of one of the package's own (a wrong name lists them)")
    p.add_argument("--out", type=_folder, help="folder for the parts and the report (default: the recipe's)")
    p.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a key of the recipe, or PART.KEY=VALUE; repeatable")
    p.add_argument("--dry-run", action="store_true", help="only say what would be done: stages, layers, tokens, bytes, expected time")

    p = command("generate", _generate, "Continue prompts.", """\
  mambainllama generate hybrid "The capital of France is"
  mambainllama generate hybrid --chat "Why is the sky blue?" --max-new-tokens 256 --draft small-hybrid
  mambainllama generate hybrid --file prompts.txt --json --temperature 0.8 --seed 1 > answers.jsonl
  mambainllama generate tiny --ids "1 5 3" "2 2"
  mambainllama generate teacher --prompts chats.jsonl --out answers.jsonl --max-new-tokens 512
  mambainllama generate teacher --prompts chats.jsonl --out answers.0.jsonl --shard 0/4""")
    p.add_argument("model", help="folder")
    p.add_argument("prompts", nargs="*", metavar="PROMPT", help="one or more; none: all of stdin is the prompt")
    p.add_argument("--file", help="one prompt a line instead")
    p.add_argument("--prompts", dest="rows", metavar="JSONL", help="rows of messages, prompt, text or ids, answered into --out")
    p.add_argument("--out", metavar="JSONL", help="with --prompts: the answers, a line each that distill and train read")
    p.add_argument("--shard", type=_shard, metavar="I/N", help="with --prompts: only rows whose index modulo N is I")
    form = p.add_mutually_exclusive_group()
    form.add_argument("--chat", action="store_true", help="each prompt is a user's message, put through the chat template")
    form.add_argument("--ids", action="store_true", help="each prompt is token ids: \"1 5 3\"")
    p.add_argument("--stop", action="append", metavar="TEXT", help="end where this appears; may be repeated")
    p.add_argument("--json", action="store_true", help="one JSON object a prompt: text, tokens, finish")
    p.add_argument("--batch", type=int, metavar="N", help="prompts decoded side by side (default: 32)")
    _sampling(p, 64, 0.0)
    device_and_dtype(p)

    p = command("chat", _chat, "Talk to a model; Ctrl-D or /quit ends, /new starts again.", """\
  mambainllama chat hybrid
  mambainllama chat hybrid --draft small-hybrid --lookahead 6 --system "Answer in one sentence." """)
    p.add_argument("model", help="folder with a chat template")
    p.add_argument("--system", help="system message")
    _sampling(p, 512, 0.7)
    device_and_dtype(p)

    p = command("export", _export, "Write a hybrid as vLLM, transformers (FalconH1) or the paper's own code reads it.", """\
  mambainllama export hybrid served --to vllm
  mambainllama export hybrid falcon --to falcon-h1
  mambainllama export hybrid original --to original --fused --base meta-llama/Llama-3.2-1B-Instruct""")
    p.add_argument("model", help="folder")
    p.add_argument("out", type=_folder, help="folder to write")
    p.add_argument("--to", choices=["vllm", "falcon-h1", "original"], required=True,
                   help="vllm: for the plug-in qwerky-vllm-models; falcon-h1: transformers' FalconH1 (Mamba-2 only); original: jxiw/MambaInLlama")
    p.add_argument("--fused", action="store_true", help="original: names as its inference code has them")
    p.add_argument("--bin", action="store_true", help="original: pytorch_model.bin, which it wants of models on the hub")
    p.add_argument("--base", metavar="NAME", help="original: the model that it loads first")
    device_and_dtype(p)

    p = command("push", _push, "Upload a model to the Hugging Face hub, with a card made from its run.", """\
  mambainllama push run org/name
  mambainllama push hybrid org/name --private --evaluation hybrid-alpaca""")
    p.add_argument("folder", help="of a model, or of a run: its `out`")
    p.add_argument("repo", help="org/name")
    p.add_argument("--private", action="store_true", help="only its owner sees it")
    p.add_argument("--evaluation", action="append", default=[], metavar="DIR", help="of `evaluate`: its scores go into the card; repeatable")

    p = command("serve", _serve, "Serve a model to OpenAI's clients, and a page to chat with it; Ctrl-C ends, twice at once.", """\
  mambainllama serve hybrid
  mambainllama serve hybrid --draft small-hybrid --device cuda --context 8192 --port 8080
  curl localhost:8000/v1/chat/completions -d '{"messages": [{"role": "user", "content": "Hello"}]}'""")
    p.add_argument("model", help="folder")
    p.add_argument("--draft", metavar="FOLDER", help="a smaller model of the same vocabulary that proposes tokens")
    p.add_argument("--lookahead", type=int, metavar="K", default=4, help="tokens that the draft proposes a round (default: 4)")
    p.add_argument("--host", default="127.0.0.1", help="(default: 127.0.0.1, this machine alone)")
    p.add_argument("--port", type=int, default=8000, metavar="N", help="0: a free one, which is printed (default: 8000)")
    p.add_argument("--name", help="what the model is called in answers (default: the folder's name); requests may call it anything")
    p.add_argument("--api-key", metavar="KEY", default=os.environ.get("MIL_API_KEY"), help="asked of clients (default: MIL_API_KEY)")
    p.add_argument("--rows", type=int, metavar="N", help="requests decoded side by side (default: 32, fewer beyond 4 GiB, on a GPU 32 GiB)")
    p.add_argument("--context", type=int, metavar="N", help="most tokens of prompt and answer (default: the model's, at most 4096)")
    p.add_argument("--queue", type=int, metavar="N", default=1024, help="most requests that wait (default: 1024)")
    p.add_argument("--cache", type=int, metavar="MIB", default=1024, help="memory for states of prompts' beginnings (default: 1024)")
    device_and_dtype(p)
    from .evaluate import command as evaluations
    p = commands.add_parser("evaluate", help="Measure a model: AlpacaEval, MT-Bench, lm-evaluation-harness, long contexts.",
                            description="Measure a model; each has its own --help.")
    evaluations.add(p, _command_of, device_and_dtype)

    p = command("info", _info, "What a folder holds: layers, parameters, bytes, tokenizer.", """\
  mambainllama info hybrid
  mambainllama info hybrid --json""")
    p.add_argument("folder")
    p.add_argument("--json", action="store_true", help="as one JSON object")
    return top


def _data(p, what, name="data", **options):
    p.add_argument(name, nargs="+", **options,
                   help=f"rows of {what}: JSONL, *.parquet or a folder of these, hub:NAME[:CONFIG][:SPLIT]; or several")


def _source(args):
    return args.data[0] if len(args.data) == 1 else args.data


def _training(p):
    p.add_argument("--out", type=_folder, required=True, help="folder for checkpoints, metrics and the finished model")
    _with_recipe(p)


def _with_recipe(p):
    p.add_argument("--recipe", metavar="FILE", help="YAML or JSON")
    p.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a key of the recipe; repeatable")


def _sampling(p, max_new_tokens, temperature):
    add = p.add_argument
    add("--max-new-tokens", type=int, metavar="N", default=max_new_tokens, help=f"(default: {max_new_tokens})")
    add("--temperature", type=float, metavar="X", default=temperature, help=f"0: the likeliest token (default: {temperature})")
    add("--top-k", type=int, metavar="K", default=0, help="the k likeliest tokens only (default: 0, all)")
    add("--top-p", type=float, metavar="X", default=1.0, help="the smallest set of this probability only (default: 1)")
    add("--min-p", type=float, metavar="X", default=0.0, help="tokens this likely beside the likeliest only (default: 0)")
    add("--seed", type=int, default=0, metavar="N", help="of the random numbers (default: 0)")
    add("--draft", metavar="FOLDER", help="a smaller model of the same vocabulary that proposes tokens")
    add("--lookahead", type=int, metavar="K", default=4, help="tokens that the draft proposes a round (default: 4)")


def _numbers(text):
    try:
        return [int(n) for n in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of layer numbers such as 0,2,4") from None


def _shard(text):
    part, slash, parts = text.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and int(part) < int(parts)):
        raise argparse.ArgumentTypeError(f"{text!r} is no shard such as 0/4, the first of four")
    return int(part), int(parts)


def _folder(text):
    if not text:
        raise argparse.ArgumentTypeError("'' is no folder to write to")
    return text


def _load(folder, args):
    import mambainllama as mil
    return mil.load(folder, device=args.device, dtype=args.dtype)


def _options(args):
    options = {name: getattr(args, name) for name in (*SETTINGS, "lookahead")}
    return options | {"draft": _load(args.draft, args) if args.draft else None}


def _note(*words):
    print(*words, file=sys.stderr, flush=True)


def _demo(args):
    from .demo import demo
    demo(out=args.out, device=args.device, seed=args.seed)


def _convert(args):
    import mambainllama as mil
    teacher = _load(args.teacher, args)
    chosen = {"attention": args.attention} if args.mamba_layers is None else {"mamba_layers": args.mamba_layers}
    student = mil.convert(teacher, mixer=args.mixer, init=args.init, seed=args.seed, data=args.data, window=args.window, sinks=args.sinks,
                          **chosen)
    mil.save(student, args.out)
    _note(f"{args.out}: {_kinds(student)}")


def _push(args):
    import mambainllama as mil
    print(mil.push(args.folder, args.repo, args.private, args.evaluation))


def _export(args):
    import mambainllama as mil
    mil.export(_load(args.model, args), args.out, args.to, args.fused, args.bin, args.base)
    _note(f"{args.out}: for {args.to}")


def _plan(args):
    import mambainllama as mil
    from .plan import load_plan_recipe, table
    recipe = _recipe(args, load_plan_recipe)
    teacher = _load(args.teacher, args)
    student = _load(args.student, args) if args.student else None
    result = mil.plan(teacher, _source(args), args.attention, recipe, student, args.align_steps, args.probe_steps, args.rows,
                      args.context, args.out)
    print(table(result))
    if args.out:
        _note(f"{args.out}: plan.json, plan.png")


def _recipe(args, check=None):
    """The recipe file with --set's keys over it, checked before any model is loaded."""
    from .recipe import load_recipe, read_recipe
    recipe = read_recipe(args.recipe) if args.recipe else {}
    if not isinstance(recipe, dict):
        raise ValueError(f"{args.recipe}: a recipe is a mapping of keys to values")
    recipe |= dict(_assigned(args.set))
    (check or load_recipe)(recipe)
    return recipe


def _assigned(items):
    """(key, value) of each KEY=VALUE."""
    for item in items:
        key, equals, value = item.partition("=")
        if not equals:
            raise ValueError(f"--set {item}: expected KEY=VALUE")
        yield key, _value(value)


def _value(text):
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _distill(args):
    import mambainllama as mil
    from .recipe import load_recipe
    recipe = _recipe(args)
    if args.cache:
        if args.student:
            raise ValueError("--student does not go with --cache: the student is the first argument")
        student = _load(args.teacher, args)
        return _report(mil.distill(student, args.cache, _source(args), recipe, out=args.out), student)
    if not args.student and not any(stage["mamba_layers"] for stage in load_recipe(recipe)["stages"]):
        raise ValueError("the student would be the teacher itself: give --student, a folder made by `convert`, or stages with mamba_layers")
    teacher = _load(args.teacher, args)
    student = _load(args.student, args) if args.student else mil.convert(teacher, mamba_layers=[])
    _report(mil.distill(student, teacher, _source(args), recipe, out=args.out), student)


def _cache(args):
    import mambainllama as mil
    from .info import readable
    teacher = _load(args.teacher, args)
    student = _load(args.student, args) if args.student else None
    report = mil.cache(teacher, _source(args), args.out, args.length, args.k, args.temperature, args.batch, student)
    tokens, each = report["tokens"], report["bytes_per_token"]
    _note(f"{args.out}: {tokens:,} tokens, {each} bytes each, {readable(tokens * each)}; all but the {args.k} likeliest have "
          f"{report['tail_mass']:.2%}; KL {report['full_kl']:.4f}, from the cache {report['cached_kl']:.4f} (bias {report['bias']:.2g})")


def _train(args):
    import mambainllama as mil
    recipe = _recipe(args)
    if args.model.endswith(".json"):
        from .config import read_json
        from .hub import fetch
        from .tokenizer import Tokenizer
        model = mil.random(read_json(args.model), seed=recipe.get("seed", 0), device=args.device, dtype=args.dtype)
        model.tokenizer = Tokenizer(fetch(args.tokenizer, weights=False)) if args.tokenizer else None
    else:
        model = _load(args.model, args)
    _report(mil.train(model, _source(args), recipe, out=args.out), model)


def _sft(args):
    import mambainllama as mil
    recipe, model = _recipe(args), _load(args.model, args)
    _report(mil.sft(model, _source(args), recipe, out=args.out), model)


def _dpo(args):
    import mambainllama as mil
    recipe, model = _recipe(args), _load(args.model, args)
    reference = _load(args.reference, args) if args.reference else "start"
    _report(mil.dpo(model, _source(args), recipe, reference, out=args.out), model)


def _run(args):
    from .pipeline import read_plan, run
    recipe = read_plan(args.recipe)
    for key, value in _assigned(args.set):
        part, dot, name = key.partition(".")
        if not dot:
            recipe[key] = value
            continue
        found = [settings for parts in recipe.get("run", []) for settings in [parts.get(part)] if settings is not None]
        if not found:
            raise ValueError(f"--set {key}: the recipe has no part {part!r}")
        for settings in found:
            settings[name] = value
    result = run(recipe, args.out, args.dry_run)
    if args.dry_run:
        print(result)
    else:
        _note(f"{result['model']}: the model; {result['html']}: the report")


def _report(report, model):
    _note(f"{report['model']}: {_kinds(model)}, loss {report['loss']:.4f} after {report['steps']} steps")


def _generate(args):
    import mambainllama as mil
    if args.rows or args.out or args.shard:
        return _answer(args)
    if args.file and args.prompts:
        raise ValueError("give prompts as arguments or in --file, not both")
    prompts = args.prompts or (_lines(args.file) if args.file else [sys.stdin.read().rstrip("\n")])
    if args.chat:
        prompts = [[{"role": "user", "content": p}] for p in prompts]
    elif args.ids:
        prompts = [_ids(p) for p in prompts]
    model = _load(args.model, args)
    live = len(prompts) == 1 and not args.json and model.tokenizer is not None
    out = mil.generate(model, prompts, stop=args.stop, batch=args.batch, callback=_stream if live else None, **_options(args))
    for i, row in enumerate(out):
        if args.json:
            print(json.dumps({"text": row.text, "tokens": row.tokens, "finish": row.finish}, ensure_ascii=False))
        elif live:
            print()
        else:
            head = f"--- {i} ({row.finish})\n" if len(out) > 1 else ""
            print(head + (row.text if model.tokenizer else " ".join(map(str, row.tokens))))
    _note(_speed(out.stats))


def _answer(args):
    import mambainllama as mil
    if not (args.rows and args.out):
        raise ValueError("--prompts rows.jsonl and --out answers.jsonl go together")
    others = {"PROMPT": args.prompts, "--file": args.file, "--chat": args.chat, "--ids": args.ids, "--stop": args.stop,
              "--json": args.json, "--draft": args.draft}
    for name, given in others.items():
        if given:
            raise ValueError(f"{name} does not go with --prompts")
    settings = {name: getattr(args, name) for name in SETTINGS}
    report = mil.answer(_load(args.model, args), args.rows, args.out, batch=args.batch, shard=args.shard or (0, 1), **settings)
    _note(f"{args.out}: {report['answered']} of {report['rows']} rows answered now, {_speed(report)}")


def _lines(file):
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--file {file} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if not lines:
        raise ValueError(f"--file {file} is empty: there is no prompt")
    return lines


def _ids(text):
    try:
        return [int(t) for t in text.split()]
    except ValueError:
        raise ValueError(f"--ids: {text!r} is no list of token ids such as \"1 5 3\"") from None


def _stream(index, token, text):
    print(text, end="", flush=True)


def _speed(stats):
    line = f"{stats['new_tokens']} tokens, {stats['tokens_per_second']:.1f} tokens/s"
    if stats.get("drafted"):
        line += f", {stats['acceptance']:.0%} of drafts accepted, {stats['tokens_per_verify']:.2f} tokens per verify"
    return line


def _chat(args):
    import mambainllama as mil
    model = _load(args.model, args)
    if model.tokenizer is None:
        raise ValueError(f"{args.model} has no tokenizer, so there is no way to chat with it")
    options = _options(args)
    start = [{"role": "system", "content": args.system}] if args.system else []
    talk = list(start)
    while True:
        try:
            said = input("> ").strip()
        except EOFError:
            return print()
        if said == "/quit":
            return
        if said == "/new":
            talk = list(start)
        elif said:
            talk.append({"role": "user", "content": said})
            out = mil.generate(model, talk, callback=_stream, **options)
            print()
            _note(f"[{_speed(out.stats)}]")
            talk.append({"role": "assistant", "content": out[0].text})
            options["seed"] += 1


def _serve(args):
    try:
        from .serve import serve
    except ImportError as error:
        raise ValueError(f"serve needs Starlette and uvicorn ({error}): pip install 'mambainllama[serve]'") from None
    model = _load(args.model, args)
    draft = _load(args.draft, args) if args.draft else None
    serve(model, draft, args.lookahead, args.host, args.port, args.name, args.api_key, ready=lambda line: print(line, flush=True),
          rows=args.rows, context=args.context, queue=args.queue, cache=args.cache << 20)


def _kinds(model):
    from .info import count_kinds
    return f"{count_kinds(model.layer_kinds)} of {len(model.layer_kinds)} layers"


def _info(args):
    from .info import describe, readable
    found = describe(args.folder)
    if args.json:
        return print(json.dumps(found))
    layers = "; ".join(f"{len(numbers)} {kind} ({', '.join(map(str, numbers))})" for kind, numbers in found["layers"].items())
    if found["windows"]:
        layers += f"; windows of {', '.join(map(str, dict.fromkeys(found['windows'])))} tokens and {found['sinks']} sinks"
    stops = ", ".join(map(str, found["stop_tokens"])) or "none"
    lines = {
        "architecture": f"{found['architecture']}, {sum(map(len, found['layers'].values()))} layers: {layers}",
        "parameters": f"{found['parameters']:,}",
        "weights": ", ".join(f"{readable(n)} of {dtype}" for dtype, n in found["bytes"].items()),
        "decoding": f"{readable(found['kv_bytes_per_token'])} of K/V a token"
                    + (f" (windows of {found['window']} tokens)" if found["window"] else "")
                    + f", {readable(found['state_bytes_per_sequence'])} of state a sequence (float32)",
        "vocabulary": f"{found['vocab_size']:,} tokens, stop tokens: {stops}",
        "tokenizer": {None: "none: prompts are token ids", False: "without a chat template", True: "with a chat template"}[
            found["chat_template"]],
    }
    for name, value in lines.items():
        print(f"{name:13} {value}")
    for name, size in found["files"].items():
        print(f"{'':13} {size:>15,} {name}")
