"""AlpacaEval of a teacher and its hybrids in one call, with a page that compares them:

    python benchmarks/alpaca_eval.py teacher=Llama-3-8B-Instruct half=half quarter=quarter eighth=eighth zero=zero --out eval/alpaca --device cuda

Where the judge is: $OPENAI_BASE_URL and $OPENAI_API_KEY. Needs `pip install '.[evaluate]'`. The last line is JSON.
"""
import argparse
import json
import sys
from pathlib import Path

sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != Path(__file__).resolve().parent]  # this file has the library's name

from mambainllama import evaluate  # noqa: E402
from mambainllama.evaluate.alpaca import JUDGE  # noqa: E402
from mambainllama.evaluate.compare import compared  # noqa: E402


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--judge", default=JUDGE, help="a configuration of alpaca_eval")
    p.add_argument("--judge-model", help="the model to ask for, in place of the configuration's")
    p.add_argument("--instructions", help="JSON (default: the 805 of the hub)")
    p.add_argument("--reference", help="JSON (default: the hub's)")
    p.add_argument("--max-new-tokens", type=int, default=2048)
    found = compared(p, evaluate.alpaca)
    print(f"{'model':24} {'win rate':>9} {'error':>6} {'LC win rate':>12} {'length':>7}")
    for model, m in found["models"].items():
        print(f"{model:24} {m['win_rate']['value']:9.2f} {m['win_rate'].get('error', 0):6.2f} "
              f"{m.get('length_controlled_winrate', {'value': float('nan')})['value']:12.2f} {m['avg_length']['value']:7.0f}")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
