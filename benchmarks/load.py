"""Loading a checkpoint: `python benchmarks/load.py [--device cuda] [--shape 8B | --folder FOLDER]`.

Without --folder it writes one of random weights in bf16 (Llama-3's shapes) into a temporary folder. Each row is one mil.load: the first with
the files dropped from the page cache (as far as the system lets go of them), the others from memory. GB/s are the files' bytes over the
time from the call to the last byte's arrival on the device. Host: the most memory of its own that the process held during the load, more
than before it; mapped files do not count. The last line is JSON.
"""
import argparse
import json
import os
import tempfile
import threading
import time
from pathlib import Path

from decode import CONFIG, SHAPES

import mambainllama as mil


def own_memory():
    """Bytes of this process that no file backs."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return 1024 * int(line.split()[1])
    return 0


class Watch:
    """The most own_memory() while it is open, looked at every 5 ms."""

    def __enter__(self):
        self.most, self.over = own_memory(), threading.Event()
        self.thread = threading.Thread(target=self.look)
        self.thread.start()
        return self

    def look(self):
        while not self.over.wait(0.005):
            self.most = max(self.most, own_memory())

    def __exit__(self, *_):
        self.over.set()
        self.thread.join()


def forget(files):
    for file in files:
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(folder, args):
    files = [f for f in Path(folder).iterdir() if f.suffix in (".safetensors", ".bin")]
    size, rows = sum(f.stat().st_size for f in files), []
    print(f"{args.device}: {size / 1e9:.2f} GB in {len(files)} file{'s' * (len(files) != 1)}\n")
    print(f"{'load':>6s} {'s':>8s} {'GB/s':>7s} {'host MiB':>9s} {'device GiB':>11s}")
    for i in range(args.repeat + 1):
        if i == 0:
            forget(files)
        before, start = own_memory(), time.perf_counter()
        with Watch() as watch:
            model = mil.load(folder, device=args.device, dtype=args.dtype)
            model.get("model.norm.weight")  # behind everything that was sent
            seconds = time.perf_counter() - start
        row = {"load": "warm" if i else "cold", "seconds": seconds, "gbs": size / seconds / 1e9, "host_bytes": watch.most - before,
               "device_bytes": model.module.memory()[0]}
        rows.append(row)
        print(f"{row['load']:>6s} {seconds:8.2f} {row['gbs']:7.2f} {row['host_bytes'] / 2**20:9.0f} {row['device_bytes'] / 2**30:11.2f}", flush=True)
        del model
    print(json.dumps({"device": args.device, "dtype": args.dtype, "bytes": size, "rows": rows}))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument("--shape", default="8B", choices=list(SHAPES))
    parser.add_argument("--folder", help="a checkpoint to load instead")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="of the matrices, default as stored")
    parser.add_argument("--repeat", type=int, default=2, help="warm loads")
    args = parser.parse_args()
    if args.folder:
        return measure(args.folder, args)
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        mil.save(mil.random(CONFIG | SHAPES[args.shape], dtype="bfloat16", device=args.device), folder)
        print(f"{args.shape} of random weights written in {time.perf_counter() - start:.1f} s")
        measure(folder, args)


if __name__ == "__main__":
    main()
