"""MT-Bench of a teacher and its hybrids in one call, with a page that compares them:

    python benchmarks/mt_bench.py teacher=Llama-3-8B-Instruct half=half quarter=quarter eighth=eighth zero=zero \\
        --data FastChat/fastchat/llm_judge/data --out eval/mtbench --device cuda

Where the judge is: $OPENAI_BASE_URL and $OPENAI_API_KEY. The last line is JSON.
"""
import argparse
import json

from mambainllama import evaluate
from mambainllama.evaluate.compare import compared


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", required=True, help="FastChat's fastchat/llm_judge/data")
    p.add_argument("--judge", default="gpt-4")
    p.add_argument("--max-new-tokens", type=int, default=1024)
    found = compared(p, evaluate.mtbench)
    columns = list(dict.fromkeys(metric for metrics in found["models"].values() for metric in metrics))
    print(f"{'model':24}" + "".join(f"{c[:11]:>12}" for c in columns))
    for model, metrics in found["models"].items():
        print(f"{model:24}" + "".join(f"{metrics[c]['value']:12.2f}" if metrics.get(c, {}).get("value") is not None else f"{'-':>12}" for c in columns))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
