"""Which extension module computes: the best that the processor has, or what MIL_BACKEND names."""
import importlib
import os
from functools import cache

from . import _cpu

CPU = ["_cpu"] + [name for name, level in (("_cpu_v3", "x86-64-v3"), ("_cpu_v4", "x86-64-v4")) if _cpu.supports(level)]


@cache
def module(device="cpu", dtype=None):
    """The extension module for `device` ("cpu" | "cuda"); on CUDA `dtype` "float32" means `_cuda32`. ValueError if there is none."""
    if device == "cpu":
        names = [os.environ["MIL_BACKEND"]] if os.environ.get("MIL_BACKEND") else CPU[::-1]
        if names[0] not in CPU:
            raise ValueError(f"MIL_BACKEND is {names[0]!r}, expected one of {', '.join(CPU)}")
    elif device == "cuda":
        names = ["_cuda32" if dtype == "float32" else "_cuda"]
    else:
        raise ValueError(f"device is {device!r}, expected 'cpu' or 'cuda'")
    for name in names:
        try:
            found = importlib.import_module(f"mambainllama.{name}")
        except ModuleNotFoundError:
            continue
        except ImportError as error:  # a shared library that is not there
            raise ValueError(f"device {device!r}: {error}") from None
        missing = found.missing()
        if missing:
            raise ValueError(f"device {device!r}: {missing}")
        return found
    raise ValueError(f"device {device!r} needs the extension module {names[0]}, which this installation does not have (built without CUDA)")


def fastest():
    """"cuda" where models in float32 can be on a GPU, else "cpu"."""
    try:
        module("cuda", "float32")
    except ValueError:
        return "cpu"
    return "cuda"


def modules():
    """{name: module} of every module that is built and that this processor can run."""
    found = {}
    for name in CPU:
        try:
            found[name] = importlib.import_module(f"mambainllama.{name}")
        except ModuleNotFoundError:
            pass
    return found


def workers(device="cpu"):
    """How many threads the ops use: MIL_NUM_THREADS, else the affinity count."""
    return module(device).workers()
