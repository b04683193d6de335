"""The recurrences of Mamba-1 and Mamba-2 for PyTorch: differentiable functions over torch tensors, on the CPU and on CUDA, for torch.compile too.

Tensors are read where they are and results are made there (DLPack); one that is not contiguous is copied. On the CPU all are float32. On
CUDA x, dt, B, C and z are float32 or bfloat16, all the same; A_log, D, dt_bias and state are float32. Gradients of gradients: none.
`torch.ops.mambainllama.{selective_scan, ssd}` are the custom ops below the functions (extra: pip install 'mambainllama[torch]')."""
try:
    import torch
except ImportError:
    raise ImportError("mambainllama.torch needs torch: pip install 'mambainllama[torch]'") from None

from . import backend

__all__ = ["selective_scan", "ssd"]
OPTIONAL = {"D", "dt_bias", "z", "state", "prev"}
SUMMED = ("A_log", "D", "dt_bias")  # over rows: their gradients are added to


def selective_scan(x, dt, A_log, B, C, D=None, dt_bias=None, z=None, state=None, prev=None, return_state=False):
    """Mamba-1 (Gu & Dao 2023): S = exp(d A) S + d B x, y = (C S + D x) silu(z), d = softplus(dt + dt_bias), A = -exp(A_log).

    x, dt, z (b,t,d)  A_log (d,n)  B (b,t,j,n)  C (b,t,k,n)  D, dt_bias (d), d = k n: channel c reads block c/n of C and block c/n/(k/j) of B.
    state (b,d,n): S before the first token, default 0.  prev (b,t) int32: t-1, or -2 where a document of a packed row starts.
    Returns y (b,t,d), with return_state (y, S after the last token).  ValueError in one sentence: sizes, dtypes or devices that do not fit.
    """
    return _call(torch.ops.mambainllama.selective_scan, (x, dt, A_log, B, C, D, dt_bias, z, state, prev), return_state)


def ssd(x, dt, A_log, B, C, D=None, dt_bias=None, state=None, prev=None, return_state=False):
    """Mamba-2 (Dao & Gu 2024): S = exp(-d exp(A_log)) S + d x B^T, y = S C + D x, d = softplus(dt + dt_bias).

    x (b,t,g,p)  dt (b,t,h)  A_log, D, dt_bias (h)  B (b,t,g,n)  C (b,t,h,n), h a multiple of g: head i reads group i/(h/g) of x and B.
    state (b,h,p,n), prev and what is returned, y (b,t,h,p): as in selective_scan.
    """
    return _call(torch.ops.mambainllama.ssd, (x, dt, A_log, B, C, D, dt_bias, state, prev), return_state)


def _call(op, values, return_state):
    y, last = op(*values, return_state)
    return (y, last) if return_state else y


def _run(name, arguments):
    """An extension module's op on tensors, all on one device; → its results as tensors."""
    x = arguments["x"]
    module = backend.module(x.device.type, "bfloat16" if x.dtype == torch.bfloat16 else "float32")
    given = {key: None if value is None else _readable(value.detach().contiguous()) for key, value in arguments.items()}
    results = getattr(module, name)(**given)
    results = results if isinstance(results, tuple) else (results,)
    return [None if result is None else torch.from_dlpack(result) for result in results]


def _readable(tensor):
    """The tensor, or a copy of a view that begins within 16 bytes, which kernels read at a time."""
    return tensor.clone() if tensor.is_cuda and tensor.data_ptr() % 16 else tensor


def _define(name, names, size_of_y, size_of_state):
    """Registers name and name_backward. names: the op's tensor arguments; the sizes are functions of a dict of these."""
    tensors = ", ".join(f"Tensor{'?' if key in OPTIONAL else ''} {key}" for key in names)
    differentiable = names[:-1]  # not prev

    def floats(given, size):
        return given["x"].new_empty(size, dtype=torch.float32)

    def forward(*values):
        given, keep = dict(zip(names, values)), values[-1]
        state = given.pop("state")
        if keep or state is not None:
            state = floats(given, size_of_state(given)).zero_() if state is None else state.clone(memory_format=torch.contiguous_format)
        y, = _run(f"{name}_forward", given | {"state": state})
        return y, state if keep else floats(given, 0)

    def fake(*values):
        given, keep = dict(zip(names, values)), values[-1]
        return given["x"].new_empty(size_of_y(given)), floats(given, size_of_state(given) if keep else 0)

    def backward(dy, dlast, *values):
        given, keep = dict(zip(names, values)), values[-1]
        state = given["state"]
        dstate = dlast.clone(memory_format=torch.contiguous_format) if keep else None if state is None else torch.zeros_like(state)
        sums = {key: torch.zeros_like(given[key], memory_format=torch.contiguous_format) for key in SUMMED if given[key] is not None}
        results = _run(f"{name}_backward", given | {"dy": dy, "dstate": dstate} | {f"d{key}": value for key, value in sums.items()})
        found = dict(zip([key for key in ("x", "dt", "B", "C", "z") if key in names], results)) | sums | {"state": dstate if state is not None else None}
        return tuple(floats(given, 0) if found.get(key) is None else found[key] for key in differentiable)

    def fake_backward(dy, dlast, *values):
        given = dict(zip(names, values))
        return tuple(floats(given, 0) if given[key] is None else torch.empty_like(given[key], memory_format=torch.contiguous_format)
                     for key in differentiable)

    def setup(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:-1])
        ctx.keep = inputs[-1]

    def gradients(ctx, dy, dlast):
        saved = ctx.saved_tensors
        found = getattr(torch.ops.mambainllama, f"{name}_backward")(dy, dlast, *saved, ctx.keep)
        return (*(None if value is None else grad for value, grad in zip(saved, found)), None, None)  # prev, keep

    op = torch.library.custom_op(f"mambainllama::{name}", forward, mutates_args=(), schema=f"({tensors}, bool keep) -> (Tensor, Tensor)")
    op.register_fake(fake)
    op.register_autograd(gradients, setup_context=setup)
    reverse = torch.library.custom_op(f"mambainllama::{name}_backward", backward, mutates_args=(),
                                      schema=f"(Tensor dy, Tensor dlast, {tensors}, bool keep) -> ({', '.join(['Tensor'] * len(differentiable))})")
    reverse.register_fake(fake_backward)


_define("selective_scan", ("x", "dt", "A_log", "B", "C", "D", "dt_bias", "z", "state", "prev"), lambda a: a["x"].shape,
        lambda a: (a["x"].shape[0], *a["A_log"].shape))
_define("ssd", ("x", "dt", "A_log", "B", "C", "D", "dt_bias", "state", "prev"), lambda a: (*a["dt"].shape, a["x"].shape[-1]),
        lambda a: (a["x"].shape[0], a["dt"].shape[-1], a["x"].shape[-1], a["B"].shape[-1]))
