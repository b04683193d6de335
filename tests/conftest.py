"""The `backend` fixture: every op test runs on every extension module that is built. The `device` fixture: where a model test's models
are."""
import importlib

import numpy as np
import pytest
import reference
from mambainllama import backend as backends

# ||a - b|| / ||b|| of float32 sums, of the same in another order on the GPU, of bf16 activations.
TOLERANCE = {"_cpu": 1e-5, "_cuda32": 1e-4, "_cuda": 2e-2}


class Parameter:
    """One word of an op's spec: `name` type mark, `!`, `?`, `:letters`."""

    def __init__(self, word, output):
        head, self.letters = word.split(":")
        self.name = head.rstrip("%@#!?")
        marks = head[len(self.name) :]
        self.type = "".join(c for c in marks if c in "%@#")
        self.in_place, self.optional, self.output = "!" in marks, "?" in marks, output
        self.scalar = self.letters == "1"
        if self.scalar:
            self.letters = ""

    def dtype(self):
        return np.dtype("int32" if self.type == "@" else "float32")


class Backend:
    """An extension module, called with dicts of arrays; what a call must leave alone is checked in every call."""

    def __init__(self, name, module):
        self.name, self.module = name, module
        self.tolerance = next(v for k, v in TOLERANCE.items() if name == k or k == "_cpu" and name.startswith(k))
        self.bf16 = name == "_cuda"

    def parameters(self, op):
        arguments, outputs = self.module.OPS[op].split("->")
        return [Parameter(w, False) for w in arguments.split()] + [Parameter(w, True) for w in outputs.split()]

    def prepare(self, op, args):
        """The arrays in the dtypes of the spec; what the backend keeps in bf16 is rounded to it, and its twin sees the same."""
        types = {p.name: p for p in self.parameters(op)}
        out = {}
        for name, value in args.items():
            if isinstance(value, np.ndarray) and value.dtype != np.uint16:
                value = np.ascontiguousarray(value, types[name].dtype())
                if self.bf16 and types[name].type in ("", "#"):
                    value = reference.bf16_to_float(reference.float_to_bf16(value))
            out[name] = value
        return out

    def call(self, op, args):
        """Outputs and in-place arguments by name. Runs twice from the same arguments, the second time on memory that held NaN:
        both give the same bits, and no argument without `!` changes."""
        parameters = self.parameters(op)
        outputs = [p.name for p in parameters if p.output]
        results = []
        for _ in range(2):
            own = {k: v.copy() if isinstance(v, np.ndarray) else v for k, v in args.items()}
            returned = getattr(self.module, op)(**own)
            returned = dict(zip(outputs, returned if isinstance(returned, tuple) else (returned,)))
            kept = {k: None if v is None else v.copy() for k, v in returned.items()}
            for v in returned.values():
                if v is not None and v.dtype == np.float32:
                    v.fill(np.nan)
            del returned
            for p in parameters:
                if isinstance(own.get(p.name), np.ndarray):
                    if p.in_place:
                        kept[p.name] = own[p.name]
                    else:
                        assert same(own[p.name], args[p.name]), f"{op} changed its argument {p.name}"
            results.append(kept)
        for name, value in results[0].items():
            assert value is None or same(value, results[1][name]), f"{op}: {name} differs from run to run"
        return results[1]

    def close(self, got, expected, what, factor=1.0):
        assert got.shape == expected.shape, f"{what}: shape {got.shape}, expected {expected.shape}"
        assert np.isfinite(got).all(), f"{what}: not finite"
        error = np.linalg.norm(got.astype(np.float64) - expected)
        limit = factor * self.tolerance * np.linalg.norm(expected)
        assert error <= limit, f"{what}: error {error / max(np.linalg.norm(expected), 1e-300):.2e}"


def same(a, b):
    """Bit-equal."""
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


CUDA = pytest.mark.cuda


@pytest.fixture(scope="session", params=backends.CPU + [pytest.param(n, marks=CUDA) for n in ("_cuda32", "_cuda")])
def backend(request):
    name = request.param
    if name in backends.CPU:
        return Backend(name, importlib.import_module(f"mambainllama.{name}"))
    try:
        return Backend(name, backends.module("cuda", "float32" if name == "_cuda32" else None))
    except (ValueError, RuntimeError) as error:
        pytest.skip(str(error))


def grown(run, before, times):
    """Bytes of resident memory that `times` calls of run add to what it has after `before` of them."""
    def resident():
        with open("/proc/self/statm") as f:
            return int(f.read().split()[1]) * 4096
    for _ in range(before):
        run()
    start = resident()
    for _ in range(times):
        run()
    return resident() - start


class Device:
    """Where models are, and how far apart two ways to the same numbers may be: ||a - b|| / ||b|| of logits and of gradients."""

    LIMITS = {"cpu": (1e-5, 1e-4), "cuda32": (1e-4, 1e-3), "cuda": (6e-2, 0.15)}  # bf16 activations through four layers, and back

    def __init__(self, name):
        self.name = name
        self.logits, self.gradients = self.LIMITS[name]
        self.how = {"device": "cpu" if name == "cpu" else "cuda", "dtype": "bfloat16" if name == "cuda" else "float32"}


def on(*names):
    """Parameters for `device`, to be given with indirect: "cpu", "cuda32" (float32 on a GPU), "cuda" (bf16)."""
    return [pytest.param(name, marks=[CUDA] if name != "cpu" else []) for name in names]


@pytest.fixture(scope="session", params=on("cpu", "cuda32", "cuda"))
def device(request):
    found = Device(request.param)
    try:
        backends.module(**found.how)
    except ValueError as error:
        if found.name == "cpu":
            raise
        pytest.skip(str(error))
    return found
