"""Every op as a function of arrays: `mambainllama.ops.ssd_forward(x=…, …, device="cpu")`.

The docstring of each is its signature: names, dtypes, sizes, and the formula with its source. Arrays are NumPy's, or another library's with
`__dlpack__`: of host memory these are read where they are. With device="cuda" arrays on that device are read and written there (what the
signature leaves unmarked is bfloat16 then, float32 with dtype="float32"), and the results are Tensors there, for `torch.from_dlpack`.
"""

from . import backend


def _op(name, doc):
    def call(*args, device="cpu", dtype=None, **kwargs):
        return getattr(backend.module(device, dtype), name)(*args, **kwargs)

    call.__name__ = call.__qualname__ = name
    call.__doc__ = doc
    return call


_base = backend.module("cpu")
__all__ = [*_base.OPS, "sum_squares"]
for _name in __all__:
    globals()[_name] = _op(_name, getattr(_base, _name).__doc__)
