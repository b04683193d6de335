"""What the server gives together and one at a time: `python benchmarks/serve.py [FOLDER] [--device cuda] [--draft FOLDER]`.

The command runs as its users run it, in a process of its own, and the client is plain HTTP in this one. The same requests, of prompts of 8
to --longest tokens and 8 to --new new ones (greedy), are sent one after the other and then all at once, after a warm-up. Beginnings are not
remembered (--cache 0), so that the second pass has no advantage. The CPU seconds are the server's. Then a chat of growing length is asked
with remembered beginnings, for what they save. Without FOLDER a model of random weights, --layers of width --width in bf16. The last line
is JSON."""
import argparse
import http.client
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

import mambainllama as mil


def random_model(folder, width, layers, attention):
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": width, "intermediate_size": 3 * width,
              "num_hidden_layers": layers, "num_attention_heads": width // 64, "num_key_value_heads": max(width // 256, 1), "head_dim": 64,
              "vocab_size": 32000, "rms_norm_eps": 1e-5, "hidden_act": "silu", "max_position_embeddings": 4096, "rope_theta": 500000.0}
    mil.save(mil.convert(mil.random(config, dtype="bfloat16"), attention=attention, check=False), folder)


class Serving:
    def __init__(self, *args):
        command = [sys.executable, "-m", "mambainllama", "serve", *map(str, args), "--port", "0"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.port = int(self.process.stdout.readline().split("http://127.0.0.1:")[1].split()[0])

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait()

    def ask(self, prompt, new):
        """(seconds, usage)"""
        start = time.perf_counter()
        connection = http.client.HTTPConnection("127.0.0.1", self.port)
        connection.request("POST", "/v1/completions", json.dumps({"prompt": prompt, "max_tokens": new, "temperature": 0}))
        usage = json.loads(connection.getresponse().read())["usage"]
        connection.close()
        return time.perf_counter() - start, usage

    def cpu_seconds(self):
        """Of the server's process so far; less than wall seconds say, this depends on what else the machine does."""
        with open(f"/proc/{self.process.pid}/stat") as f:
            return sum(map(int, f.read().rpartition(")")[2].split()[11:13])) / os.sysconf("SC_CLK_TCK")

    def metric(self, name):
        connection = http.client.HTTPConnection("127.0.0.1", self.port)
        connection.request("GET", "/metrics")
        lines = connection.getresponse().read().decode().splitlines()
        return next(float(line.split()[1]) for line in lines if line.startswith(f"mambainllama_{name} "))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--draft")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--longest", type=int, default=32)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--attention", type=float, default=0.5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or temporary
        if not args.folder:
            random_model(folder, args.width, args.layers, args.attention)
        rng = np.random.default_rng(0)
        with open(os.path.join(folder, "config.json")) as f:
            vocabulary = json.load(f)["vocab_size"]
        asked = [(rng.integers(0, vocabulary, rng.integers(8, args.longest + 1)).tolist(), int(rng.integers(8, args.new + 1)))
                 for _ in range(args.requests)]
        options = [folder, "--device", args.device, *(["--draft", args.draft] if args.draft else [])]
        with Serving(*options, "--cache", 0) as server:
            for prompt, new in asked[:3]:
                server.ask(prompt, new)
            result = {}
            for name, workers in (("one at a time", 1), ("together", args.requests)):
                before, cpu, start = server.metric("rounds_total"), server.cpu_seconds(), time.perf_counter()
                with ThreadPoolExecutor(workers) as pool:
                    answers = list(pool.map(lambda a: server.ask(*a), asked))
                wall, cpu = time.perf_counter() - start, server.cpu_seconds() - cpu
                tokens = sum(usage["completion_tokens"] for _, usage in answers)
                latency = sorted(seconds for seconds, _ in answers)
                result[name] = {"seconds": wall, "cpu_seconds": cpu, "tokens_per_second": tokens / wall,
                                "requests_per_second": len(asked) / wall,
                                "latency_median": latency[len(latency) // 2], "latency_p95": latency[int(0.95 * len(latency))],
                                "rounds": server.metric("rounds_total") - before, "acceptance": server.metric("acceptance")}
                print(f"{name:14s} {wall:7.2f} s {tokens / wall:8.1f} tokens/s {len(asked) / wall:7.2f} requests/s, "
                      f"latency {latency[len(latency) // 2]:.2f} s (95 %: {latency[int(0.95 * len(latency))]:.2f} s), {cpu:.2f} s of CPU")
            result["gain"] = result["one at a time"]["seconds"] / result["together"]["seconds"]
            print(f"together is {result['gain']:.2f} times as fast")
        chat = rng.integers(0, vocabulary, 900).tolist()
        with Serving(*options) as server:
            server.ask(asked[0][0], 8)
            turns = [server.ask(chat[:n], 1) for n in (700, 800, 900)]
            again = server.ask(chat[:900], 1)
        result["chat"] = [{"prompt": usage["prompt_tokens"], "cached": usage["prompt_tokens_details"]["cached_tokens"], "seconds": seconds}
                          for seconds, usage in [*turns, again]]
        for turn in result["chat"]:
            print(f"prompt of {turn['prompt']} tokens, {turn['cached']} remembered: {1e3 * turn['seconds']:.0f} ms to its first token")
    print(json.dumps({"device": args.device, **result}))


if __name__ == "__main__":
    main()
