"""MT-Bench of a teacher and its hybrids in one call, with a page that compares them:

    python benchmarks/mt_bench.py teacher=Llama-3-8B-Instruct half=half quarter=quarter eighth=eighth zero=zero \\
        --data FastChat/fastchat/llm_judge/data --out eval/mtbench --device cuda

Where the judge is: $OPENAI_BASE_URL and $OPENAI_API_KEY. The last line is JSON.
"""
import argparse
import json

from mambainllama import evaluate


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("models", nargs="+", metavar="NAME=FOLDER")
    p.add_argument("--data", required=True, help="FastChat's fastchat/llm_judge/data")
    p.add_argument("--out", required=True, help="a folder a model, and report.html; the same call goes on in it")
    p.add_argument("--device", default="cpu")
    p.add_argument("--dtype")
    p.add_argument("--judge", default="gpt-4")
    p.add_argument("--batch", type=int)
    p.add_argument("--max-new-tokens", type=int, default=1024)
    p.add_argument("--limit", type=int)
    args = vars(p.parse_args())
    models = dict(model.split("=", 1) for model in args.pop("models"))
    found = evaluate.compare(evaluate.mtbench, models, **args)["mtbench"]
    columns = list(dict.fromkeys(metric for metrics in found["models"].values() for metric in metrics))
    print(f"{'model':24}" + "".join(f"{c[:11]:>12}" for c in columns))
    for model, metrics in found["models"].items():
        print(f"{model:24}" + "".join(f"{metrics[c]['value']:12.2f}" if metrics.get(c, {}).get("value") is not None else f"{'-':>12}" for c in columns))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
