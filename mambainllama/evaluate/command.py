"""`mambainllama evaluate …`: each a thin call of the package's functions."""
import argparse
import sys

from .alpaca import JUDGE
from .needle import LENGTHS


def add(top, command_of, device_and_dtype):
    """The parser of `evaluate` gets its commands; command_of and device_and_dtype are the command line's."""
    command = command_of(top.add_subparsers(title="evaluations", metavar="KIND", required=True))

    def common(p):
        p.add_argument("--out", required=True, metavar="DIR", help="folder of the answers and results; the same call goes on in it")
        p.add_argument("--name", metavar="NAME", help="of the model in tables and files (default: its folder's, of RUN/model the run's)")
        p.add_argument("--batch", type=int, metavar="N", help="rows side by side")
        device_and_dtype(p)

    p = command("alpaca", _alpaca, "AlpacaEval: answers to its instructions, judged and scored by its library.", """\
  mambainllama evaluate alpaca hybrid --out eval/alpaca
  OPENAI_BASE_URL=http://127.0.0.1:8000/v1 mambainllama evaluate alpaca hybrid --judge alpaca_eval_gpt4 --judge-model llama-70b --out eval/alpaca
  mambainllama evaluate alpaca hybrid --instructions mine.json --reference theirs.json --no-judge --out eval/mine""")
    p.add_argument("model", help="folder")
    p.add_argument("--instructions", metavar="JSON", help="a list of {instruction, dataset} (default: the 805 of the hub)")
    p.add_argument("--reference", metavar="JSON", help="a list of {instruction, output} to compare with (default: the hub's GPT-4 Turbo)")
    p.add_argument("--judge", default=JUDGE, help=f"a configuration of alpaca_eval (default: {JUDGE}); where it is: $OPENAI_BASE_URL")
    p.add_argument("--judge-model", metavar="NAME", help="the model to ask there, in place of the configuration's")
    p.add_argument("--no-judge", action="store_true", help="only write model_outputs.json")
    _sampling(p, 2048)
    p.add_argument("--temperature", type=float, default=0.7, metavar="X", help="(default: 0.7)")
    p.add_argument("--top-p", type=float, default=1.0, metavar="X", help="(default: 1)")
    common(p)

    p = command("mtbench", _mtbench, "MT-Bench in FastChat's files, with its prompts.", """\
  mambainllama evaluate mtbench hybrid --data FastChat/fastchat/llm_judge/data --out eval/mtbench
  mambainllama evaluate mtbench hybrid --data data --judge llama-70b --judge-url http://127.0.0.1:8000/v1 --out eval/mtbench""")
    p.add_argument("model", help="folder with a chat template")
    p.add_argument("--data", required=True, metavar="DIR", help="FastChat's fastchat/llm_judge/data")
    p.add_argument("--judge", default="gpt-4", metavar="NAME", help="the model that judges (default: gpt-4)")
    p.add_argument("--judge-url", metavar="URL", help="…/v1 (default: $OPENAI_BASE_URL, else OpenAI's)")
    p.add_argument("--no-judge", action="store_true", help="only write the answers")
    p.add_argument("--parallel", type=int, default=8, metavar="N", help="questions that the judge has at a time (default: 8)")
    _sampling(p, 1024)
    common(p)

    p = command("lm", _lm, "Tasks of lm-evaluation-harness.", """\
  mambainllama evaluate lm hybrid --suite paper --out eval/lm
  mambainllama evaluate lm hybrid --tasks hellaswag,piqa --shots 0 --limit 100 --out eval/look""")
    p.add_argument("model", help="folder")
    which = p.add_mutually_exclusive_group(required=True)
    which.add_argument("--tasks", metavar="A,B", help="names of tasks or groups")
    which.add_argument("--suite", choices=["paper"], help="the paper's tasks with its numbers of examples")
    p.add_argument("--shots", type=int, metavar="N", help="examples before a question (default: the task's)")
    p.add_argument("--limit", type=int, metavar="N", help="questions a task")
    p.add_argument("--chat", action="store_true", help="through the chat template")
    p.add_argument("--max-length", type=int, metavar="N", help="tokens of a question (default: the model's)")
    p.add_argument("--include", metavar="DIR", help="folder of tasks of your own")
    common(p)

    p = command("needle", _needle, "Pass key, needle, recall and perplexity over depth and length.", """\
  mambainllama evaluate needle hybrid --lengths 1024,4096,16384 --out eval/needle
  mambainllama evaluate needle hybrid --text essays.txt --depths 0,0.1,0.5,0.9,1 --out eval/needle""")
    p.add_argument("model", help="folder")
    p.add_argument("--lengths", type=_list(int), default=list(LENGTHS), metavar="N,N", help=f"in tokens (default: {','.join(map(str, LENGTHS))})")
    p.add_argument("--depths", type=_list(float), default=[0, 0.25, 0.5, 0.75, 1], metavar="X,X", help="0: the beginning (default: 0,0.25,0.5,0.75,1)")
    p.add_argument("--items", type=int, default=8, metavar="N", help="a cell (default: 8)")
    p.add_argument("--text", metavar="FILE", help="what the needle is hidden in, and perplexity is of")
    p.add_argument("--seed", type=int, default=0, metavar="N")
    common(p)

    p = command("gap", _gap, "The same items by likelihood and by generation, and the letters chosen.", """\
  mambainllama evaluate gap hybrid --out eval/gap
  mambainllama evaluate gap hybrid --items items.jsonl --out eval/gap""")
    p.add_argument("model", help="folder")
    p.add_argument("--items", metavar="JSONL", help="rows of question, choices and answer (default: made)")
    p.add_argument("--count", type=int, default=100, metavar="N", help="of made items (default: 100)")
    p.add_argument("--max-new-tokens", type=int, default=32, metavar="N", help="of a generation (default: 32)")
    p.add_argument("--seed", type=int, default=0, metavar="N")
    common(p)

    p = command("report", _report, "One page that compares models: intervals, paired differences, figures.", """\
  mambainllama evaluate report eval/teacher eval/half eval/quarter --out comparison.html
  mambainllama evaluate report eval/alpaca alpaca_eval/results/zephyr-7b-beta --out comparison.html""")
    p.add_argument("folders", nargs="+", metavar="DIR", help="of evaluations, or with AlpacaEval's annotations.json")
    p.add_argument("--out", default="evaluation.html", metavar="HTML", help="(default: evaluation.html)")


def _sampling(p, tokens):
    p.add_argument("--max-new-tokens", type=int, default=tokens, metavar="N", help=f"(default: {tokens})")
    p.add_argument("--seed", type=int, default=0, metavar="N")
    p.add_argument("--limit", type=int, metavar="N", help="only the first N questions")


def _list(kind):
    def read(text):
        try:
            return [kind(part) for part in text.split(",")]
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers such as 1,2") from None
    return read


def _call(function, args, *names, **more):
    """function(model, out=…, …) with the options of these names; prints its scores."""
    import mambainllama as mil
    results = function(mil.load(args.model, device=args.device, dtype=args.dtype), out=args.out, **{name: getattr(args, name) for name in names}, **more)
    for name, value in results["scores"].items():
        print(f"{name:40} {'' if value is None else format(value, '.4f')}")
    for note in results.get("notes", []):
        print(f"note: {note}", file=sys.stderr)
    print(f"{args.out}/results.json: {results['model']}, {results['seconds']:.0f} s", file=sys.stderr)


def _alpaca(args):
    from . import alpaca
    _call(alpaca, args, "instructions", "reference", "judge_model", "name", "max_new_tokens", "temperature", "top_p", "seed", "batch", "limit",
          judge=None if args.no_judge else args.judge)


def _mtbench(args):
    from . import mtbench
    _call(mtbench, args, "data", "judge_url", "name", "max_new_tokens", "seed", "batch", "limit", "parallel", judge=None if args.no_judge else args.judge)


def _lm(args):
    from . import lm
    _call(lm, args, "suite", "shots", "limit", "chat", "max_length", "include", tasks=args.tasks and args.tasks.split(","), batch=args.batch or 8,
          name=args.name)


def _needle(args):
    from . import needle
    _call(needle, args, "lengths", "depths", "items", "text", "seed", "name", batch=args.batch or 8)


def _gap(args):
    from . import gap
    _call(gap, args, "items", "count", "max_new_tokens", "seed", "batch", "name")


def _report(args):
    from . import report
    numbers = report(args.folders, args.out)
    for kind, found in numbers.items():
        for model, metrics in found["models"].items():
            for metric, number in list(metrics.items())[:8]:
                if number["value"] is not None:
                    print(f"{kind:8} {model:32} {metric:28} {number['value']:.4f}" + (f" ± {number['error']:.4f}" if "error" in number else ""))
    print(f"{args.out}: the page", file=sys.stderr)
