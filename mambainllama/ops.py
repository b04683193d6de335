"""Every op as a function of NumPy arrays: `mambainllama.ops.ssd_forward(x=…, …, device="cpu")`.

The docstring of each is its signature: names, dtypes, sizes, and the formula with its source.
"""

from . import backend


def _op(name, doc):
    def call(*args, device="cpu", **kwargs):
        return getattr(backend.module(device), name)(*args, **kwargs)

    call.__name__ = call.__qualname__ = name
    call.__doc__ = doc
    return call


_base = backend.module("cpu")
__all__ = [*_base.OPS, "sum_squares"]
for _name in __all__:
    globals()[_name] = _op(_name, getattr(_base, _name).__doc__)
