"""mambainllama.torch: values and gradients against a float64 recurrence that autograd differentiates, opcheck, torch.compile."""
import numpy as np
import pytest

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
import mambainllama as mil  # noqa: E402
from mambainllama import backend as backends  # noqa: E402
from mambainllama.torch import selective_scan, ssd  # noqa: E402

SIZES = {"selective_scan": dict(x=(2, 11, 24), dt=(2, 11, 24), A_log=(24, 4), B=(2, 11, 3, 4), C=(2, 11, 6, 4), D=(24,), dt_bias=(24,), z=(2, 11, 24), state=(2, 24, 4)),
         "ssd": dict(x=(2, 11, 2, 5), dt=(2, 11, 6), A_log=(6,), B=(2, 11, 2, 3), C=(2, 11, 6, 3), D=(6,), dt_bias=(6,), state=(2, 6, 5, 3))}
CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1,
          "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 61, "initializer_range": 0.3}
FUNCTIONS = {"selective_scan": selective_scan, "ssd": ssd}
both = pytest.mark.parametrize("name", SIZES)


def draw(name, *without, device="cpu", dtype=torch.float32):
    r = np.random.default_rng(0)
    args = {key: torch.tensor(r.normal(size=size) * (0.5 if key != "A_log" else 0.3), dtype=dtype if key in "xdtBCz" else torch.float32, device=device)
            for key, size in SIZES[name].items() if key not in without}
    return {key: value.requires_grad_() for key, value in args.items()}


def twin(name, x, dt, A_log, B, C, D=None, dt_bias=None, z=None, state=None, prev=None):
    """(y, last): token by token."""
    d = torch.nn.functional.softplus(dt if dt_bias is None else dt + dt_bias)
    if name == "ssd":
        repeat = dt.shape[2] // x.shape[2]
        x, B = x.repeat_interleave(repeat, 2), B.repeat_interleave(repeat, 2)
        A_log, skip = A_log[:, None, None], None if D is None else D[:, None]
        S = x.new_zeros(*dt.shape[::2], x.shape[3], B.shape[3]) if state is None else state
    else:
        B, C = (m.repeat_interleave(x.shape[2] // m.shape[2], 2) for m in (B, C))
        skip, S = D, x.new_zeros(x.shape[0], *A_log.shape) if state is None else state
    ys = []
    for t in range(x.shape[1]):
        if prev is not None:
            S = torch.where((prev[:, t] == -2).reshape(-1, *[1] * (S.ndim - 1)), torch.zeros_like(S), S)
        step = d[:, t].reshape(*d[:, t].shape, *[1] * (S.ndim - 1 - (d.ndim - 2)))
        reads = C[:, t, :, None] if name == "ssd" else C[:, t]
        S = torch.exp(-step * torch.exp(A_log)) * S + step * x[:, t, ..., None] * (B[:, t, :, None] if name == "ssd" else B[:, t])
        y = (S * reads).sum(-1)
        ys.append(y if skip is None else y + skip * x[:, t])
    y = torch.stack(ys, 1)
    return y if z is None else y * torch.nn.functional.silu(z), S


def compare(name, args, tolerance, **more):
    """Value, final state and every gradient."""
    exact = {key: value.detach().double().cpu().requires_grad_() for key, value in args.items()}
    r = np.random.default_rng(1)
    got = FUNCTIONS[name](**args, **more, return_state=True)
    expected = twin(name, **exact, **{key: value.cpu() for key, value in more.items()})
    weights = [torch.tensor(r.normal(size=e.shape)) for e in expected]
    sum((w * e).sum() for w, e in zip(weights, expected)).backward()
    sum((w.to(g) * g).sum() for w, g in zip(weights, got)).backward()
    pairs = dict(zip(("y", "last"), zip(got, expected))) | {f"d{key}": (args[key].grad, exact[key].grad) for key in args}
    for key, (a, b) in pairs.items():
        assert a is not None and a.shape == b.shape and a.device == args["x"].device and torch.isfinite(a).all(), key
        error = (a.detach().double().cpu() - b.detach()).norm() / b.norm()
        assert error < tolerance, (key, error)
    assert all(args[key].grad.dtype == args[key].dtype for key in args)


@both
@pytest.mark.parametrize("without", [(), ("state",), ("D", "dt_bias", "z", "state")])
def test_values_and_gradients(name, without):
    compare(name, draw(name, *without), 1e-5)


@both
def test_packed_documents_and_views(name):
    prev = (torch.arange(11, dtype=torch.int32) - 1).repeat(2, 1)
    prev[0, 4] = prev[1, 7] = prev[1, 0] = -2
    args = draw(name, "state")
    compare(name, args, 1e-5, prev=prev)
    B = args["B"].detach()
    y = FUNCTIONS[name](**args | {"B": B.transpose(1, 2).contiguous().transpose(1, 2)})  # not contiguous
    assert torch.equal(y, FUNCTIONS[name](**args))


@both
def test_a_sequence_in_parts_is_the_sequence(name):
    args = draw(name)
    over_time = [key for key in args if SIZES[name][key][1:2] == (11,)]
    y, last = FUNCTIONS[name](**args, return_state=True)
    first, state = FUNCTIONS[name](**args | {key: args[key][:, :4] for key in over_time}, return_state=True)
    second, end = FUNCTIONS[name](**args | {key: args[key][:, 4:] for key in over_time} | {"state": state}, return_state=True)
    torch.testing.assert_close(torch.cat([first, second], 1), y)
    torch.testing.assert_close(end, last)
    rest = torch.autograd.grad(second.sum(), state, retain_graph=True)[0]  # the state carries the gradient on
    assert rest.abs().max() > 0 and torch.equal(args["state"], draw(name)["state"])


@both
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("without", [(), ("D", "dt_bias", "z", "state")])
def test_opcheck(name, keep, without):
    args = draw(name, *without)
    values = [args.get(key) for key in (*SIZES[name], "prev")]
    torch.library.opcheck(getattr(torch.ops.mambainllama, name), (*values, keep))
    y, last = getattr(torch.ops.mambainllama, name)(*values, keep)
    detached = [None if v is None else v.detach() for v in values]
    torch.library.opcheck(getattr(torch.ops.mambainllama, f"{name}_backward"), (torch.ones_like(y), torch.ones_like(last), *detached, keep))


@both
def test_compile(name):
    def loss(args):
        return (torch.tanh(FUNCTIONS[name](**args)) ** 2).sum()

    args = draw(name)
    expected = torch.autograd.grad(loss(args), list(args.values()))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    found = compiled(args)
    torch.testing.assert_close(found, loss(args))
    for a, b in zip(torch.autograd.grad(found, list(args.values())), expected):
        torch.testing.assert_close(a, b)


def test_what_does_not_fit_is_one_sentence():
    args = draw("ssd")
    for key, value, match in [("B", args["B"].double(), "float32, got float64"), ("dt", args["dt"][:, :, :5], "size"), ("x", args["x"][..., 0], "axes"),
                              ("prev", torch.zeros(2, 11, dtype=torch.int64), "int32, got int64")]:
        with pytest.raises((ValueError, RuntimeError), match=match):
            ssd(**args | {key: value})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_parameters_and_ops_take_tensors(dtype):
    model, name = mil.random(CONFIG, dtype=dtype), "model.layers.0.mlp.up_proj.weight"
    w = torch.from_dlpack(model.tensor(name))
    assert w.dtype == getattr(torch, dtype) and w.data_ptr() == torch.from_dlpack(model.tensor(name)).data_ptr() and np.array_equal(w.float().numpy(), model.get(name))
    x = torch.randn(2, 40, 64)
    torch.testing.assert_close(torch.from_dlpack(mil.ops.linear_forward(x=x, w=w)), x @ w.float().T)
    twice = 2 * w
    model.set(name, twice)
    del model
    assert torch.equal(2 * w, twice)  # which the model has left behind


@pytest.mark.cuda
@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_the_card(name, dtype):
    if not torch.cuda.is_available():
        pytest.skip("torch has no CUDA")
    compare(name, draw(name, device="cuda", dtype=dtype), 1e-4 if dtype == torch.float32 else 3e-2)
    args = draw(name, device="cuda", dtype=dtype)
    shifted = torch.empty(args["dt"].numel() + 1, device="cuda", dtype=dtype)[1:].view_as(args["dt"]).copy_(args["dt"].detach())  # aligned to its size alone
    assert torch.equal(FUNCTIONS[name](**args | {"dt": shifted}), FUNCTIONS[name](**args))
    with torch.cuda.stream(torch.cuda.Stream()):  # another stream's work is waited for
        big = torch.randn(4096, 4096, device="cuda")
        for _ in range(10):
            big = big @ big / 64
        late = {key: (value + 0 * big[0, 0]).to(value.dtype) for key, value in args.items()}
        y = FUNCTIONS[name](**late)
        total = y.float().sum()
    torch.cuda.synchronize()
    if torch.isfinite(big).all():
        torch.testing.assert_close(total, FUNCTIONS[name](**args).float().sum())


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_parameters_on_the_card(dtype):
    """torch sees a parameter where it is, and a product of ours with its tensors is torch's."""
    if not torch.cuda.is_available():
        pytest.skip("torch has no CUDA")
    model, name = mil.random(CONFIG, device="cuda", dtype=dtype), "model.layers.0.mlp.up_proj.weight"
    w = torch.from_dlpack(model.tensor(name))
    assert w.is_cuda and w.data_ptr() == torch.from_dlpack(model.tensor(name)).data_ptr() and np.array_equal(w.float().cpu().numpy(), model.get(name))
    x = torch.randn(2, 40, 64, device="cuda", dtype=w.dtype)
    y = torch.from_dlpack(backends.module("cuda", dtype).linear_forward(x=x, w=w))
    assert y.is_cuda and (y.float() - (x.float() @ w.float().T)).norm() < (1e-4 if dtype == "float32" else 1e-2) * y.float().norm()
    model.set(name, 2 * w)
    assert np.array_equal(model.get(name), 2 * w.float().cpu().numpy())
    del model
    for _ in range(20):  # memory that torch still uses is not given out again
        kept = torch.from_dlpack(backends.module("cuda", dtype).linear_forward(x=x, w=w))
        assert torch.equal(kept, y)
