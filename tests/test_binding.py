"""What the generic op caller refuses, and in what words; that it never crashes; threads, forks, reference counts."""
import os
import signal
import sys
import threading
import traceback

import numpy as np
import pytest
from conftest import same
from mambainllama import backend as backends
from mambainllama import ops

NAMES = sorted(backends.module("cpu").OPS)
every_op = pytest.mark.parametrize("op", NAMES)

SIZES = dict(b=2, t=3, m=4, c=5, o=6, k=7, v=8, h=4, g=2, p=6, q=3, n=3, f=5, s=3, l=40, x=4, d=8, w=4, j=2)
SCALARS = dict(eps=1e-5, scale=1.0, window=2, sinks=2, silu=1, block=1, temperature=1.0, kind=0, lr=0.1, b1=0.9, b2=0.9, decay=0.1,
               gscale=1.0, step=1, seed=3, key=5, first=16, to=1, count=2, add=1) | {"from": 0}


def sizes(module, op):
    """Sizes that the op takes together."""
    if op.startswith("selective_scan"):
        return SIZES | dict(d=12, k=4, r=module.SCAN_RING + 32)
    if op.startswith("ssd"):
        return SIZES | dict(r=module.SSD_RING + 32)
    return SIZES | (dict(k=2, l=3) if op == "verify" else {})


def valid(backend, op):
    """Arguments of a good call, every optional one given."""
    r, n, args = np.random.default_rng(1), sizes(backend.module, op), {}
    for p in backend.parameters(op):
        shape = tuple(n[letter] for letter in p.letters)
        if p.output:
            continue
        elif p.scalar:
            args[p.name] = SCALARS[p.name]
        elif p.type == "@":
            top = {"ids": n["v"], "target": n["v"], "draft": n["v"], "count": n["k"] + 1, "keep": n["t"] + 1, "top_k": 5}
            args[p.name] = r.integers(0, top.get(p.name, 1), shape).astype(np.int32)
        else:
            args[p.name] = r.random(shape).astype(np.float32)
    if op.startswith("lm_loss"):
        args["ids"] = np.array([r.permutation(n["v"])[: n["j"]] for _ in range(n["m"])], np.int32)
    if "slot" in args:
        args["slot"] = np.array([2, 0], np.int32)
    if "prev" in args:
        args["prev"] = np.tile(np.arange(n["t"], dtype=np.int32) - 1, (n["b"], 1))
    return args


def call(backend, op, args):
    return getattr(backend.module, op)(**args)


def bits(out):
    return b"".join(v.tobytes() for v in (out if isinstance(out, tuple) else (out,)) if v is not None)


def refused(backend, op, args, *words):
    """The call raises ValueError or TypeError with one sentence that names the op and has the given words."""
    with pytest.raises((ValueError, TypeError)) as error:
        call(backend, op, args)
    sentence = str(error.value)
    for word in (op, *words):
        assert str(word) in sentence, f"{word!r} is not in: {sentence}"
    assert "\n" not in sentence and len(sentence) < 400
    return sentence


def arrays(backend, op):
    return [p for p in backend.parameters(op) if not p.output and not p.scalar]


def in_child(work, seconds=30):
    """Runs work() in a forked child; the exit status must be 0."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            signal.alarm(seconds)
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code == 0, f"the child ended with {signal.Signals(-code).name if code < 0 else code}"


def isolated(backend, work):
    """A crash of work() is a failure of the test alone; on CUDA it runs here, for a context does not survive a fork."""
    work() if backend.name.startswith("_cuda") else in_child(work)


# ---- what is refused --------------------------------------------------------------------------------------------------------


@every_op
def test_good_calls(backend, op):
    """By name, by position, with None or nothing for what is optional."""
    args = valid(backend, op)
    inputs = [p for p in backend.parameters(op) if not p.output]
    copies = [{k: v.copy() if isinstance(v, np.ndarray) else v for k, v in args.items()} for _ in range(2)]
    named, positional = call(backend, op, copies[0]), getattr(backend.module, op)(*(copies[1][p.name] for p in inputs))
    assert bits(named) == bits(positional)
    required = {p.name: args[p.name] for p in inputs if not p.optional}
    call(backend, op, required)
    call(backend, op, required | {p.name: None for p in inputs if p.optional})


@every_op
def test_refuses_what_is_not_the_array_it_takes(backend, op):
    args = valid(backend, op)
    for p in arrays(backend, op):
        a = args[p.name]
        wrong = {"list": a.tolist(), "number": 3.0, "string": "x", "rank + 1": a[None].copy(), "float64": a.astype(np.float64),
                 "int64": a.astype(np.int64), "bool": a.astype(bool), "float16": a.astype(np.float16),
                 "other of the two": a.astype(np.float32 if p.type == "@" else np.int32), "object": a.astype(object),
                 "byte-swapped": a.astype(a.dtype.newbyteorder()), "strided": np.repeat(a, 2, -1)[..., ::2]}
        if a.ndim > 1:
            wrong |= {"Fortran order": np.asfortranarray(a), "rank - 1": a[0].copy()}
        unaligned = np.zeros(a.nbytes + 1, np.uint8)[1:].view(a.dtype).reshape(a.shape)
        wrong["unaligned"] = unaligned
        if p.in_place:
            wrong["read-only"] = a.copy()
            wrong["read-only"].flags.writeable = False
        if p.type != "#":
            wrong["bf16 bits"] = a.astype(np.uint16)
        for what, value in wrong.items():
            refused(backend, op, args | {p.name: value}, f"'{p.name}'")
        if not p.optional:
            refused(backend, op, args | {p.name: None}, f"'{p.name}'")
            refused(backend, op, {k: v for k, v in args.items() if k != p.name}, f"'{p.name}'")


@every_op
def test_refuses_sizes_that_disagree(backend, op):
    args, inputs = valid(backend, op), arrays(backend, op)
    for p in inputs:
        for axis, letter in enumerate(p.letters):
            if not any(letter in q.letters for q in inputs if q is not p) and p.letters.count(letter) == 1:
                continue  # a size that nobody else has is free
            for grown in (1, -1):
                n = args[p.name].shape[axis] + grown
                value = np.resize(args[p.name], (*args[p.name].shape[:axis], n, *args[p.name].shape[axis + 1 :]))
                sentence = refused(backend, op, args | {p.name: value}, n, n - grown)
                assert f"({letter})" in sentence and "axis" in sentence, sentence


@every_op
def test_refuses_unknown_and_surplus_arguments(backend, op):
    args, inputs = valid(backend, op), [p for p in backend.parameters(op) if not p.output]
    refused(backend, op, args | {"bogus": 1}, "bogus")
    for p in backend.parameters(op):
        if p.output and p.name not in args:
            refused(backend, op, args | {p.name: 1}, p.name)
    positional = [args[p.name] for p in inputs]
    with pytest.raises(TypeError, match=op):
        getattr(backend.module, op)(*positional, 1)
    with pytest.raises(TypeError, match=inputs[0].name):
        getattr(backend.module, op)(*positional[:1], **args)


@every_op
def test_refuses_numbers_that_are_none(backend, op):
    args = valid(backend, op)
    for p in backend.parameters(op):
        if p.scalar:
            wrong = ["x", [1], np.zeros(2), float("nan"), float("inf"), 1j] + ([0.5, -1, 2**70] if p.type == "@" else [])
            for value in wrong:
                refused(backend, op, args | {p.name: value}, f"'{p.name}'")


FAR, NEAR = 2**31 - 1, -(2**31)
RANGES = [
    ("ids", (-1, 8, FAR, NEAR), ("embedding_forward", "embedding_backward", "lm_loss_forward", "lm_loss_backward")),
    ("target", (8, FAR), ("lm_loss_forward", "lm_loss_backward")),
    ("draft", (-1, 8, FAR, NEAR), ("verify",)),
    ("count", (-1, 3, FAR), ("verify",)),
    ("top_k", (-1, NEAR), ("sample", "verify")),
    ("slot", (-1, 3, FAR, NEAR), ("attention_forward", "conv1d_forward", "selective_scan_forward", "ssd_forward")),
    ("slot", (0,), ("attention_forward", "conv1d_forward", "selective_scan_forward", "ssd_forward")),  # the second row's, too
    ("keep", (-1, 4, FAR, NEAR), ("attention_forward", "conv1d_forward", "selective_scan_forward", "ssd_forward")),
    ("prev", (-3, 2, 3, FAR, NEAR), ("attention_forward", "attention_backward", "conv1d_forward", "conv1d_backward",
                                     "selective_scan_forward", "selective_scan_backward", "ssd_forward", "ssd_backward")),
    ("pos", (-1, NEAR, FAR), ("attention_forward", "conv1d_forward", "selective_scan_forward", "ssd_forward")),
    ("committed", (-1, NEAR, FAR), ("selective_scan_forward", "ssd_forward")),
    ("seen", (-1, NEAR, FAR), ("selective_scan_forward", "ssd_forward")),
    ("position", (-1, NEAR), ("rope_forward", "rope_backward")),
]


@pytest.mark.parametrize("name, values, op", [(n, v, op) for n, v, names in RANGES for op in names])
def test_refuses_indices_out_of_range(backend, name, values, op):
    args = valid(backend, op)
    for value in values:
        wrong = args[name].copy()
        wrong.flat[2 if name == "prev" else 0] = value
        refused(backend, op, args | {name: wrong}, name, value)


@pytest.mark.parametrize("op", ["attention", "conv1d", "selective_scan", "ssd"])
def test_refuses_trees_that_it_cannot_run(backend, op):
    """A tree needs a past that keeps its inputs, and a call of at most 32 tokens."""
    for part in ("forward", "backward"):
        args = {k: v for k, v in valid(backend, f"{op}_{part}").items() if "cache" not in k and "ring" not in k}
        prev = args["prev"].copy()
        prev[0] = [-1, 0, 0]
        refused(backend, f"{op}_{part}", args | {"prev": prev}, "prev", 0)
    args, long = valid(backend, f"{op}_forward"), sizes(backend.module, f"{op}_forward") | {"t": 33}
    for p in arrays(backend, f"{op}_forward"):
        if "t" in p.letters:
            args[p.name] = np.resize(args[p.name], tuple(long[letter] for letter in p.letters))
    args["prev"] = np.tile(np.arange(33, dtype=np.int32) - 1, (2, 1))
    call(backend, f"{op}_forward", args)
    args["prev"][1, 20] = 3
    refused(backend, f"{op}_forward", args, "prev", 3, 19)


@pytest.mark.parametrize("op, change, word", [
    ("attention_forward", dict(h=5), "multiple"), ("ssd_forward", dict(h=5), "multiple"),
    ("ssd_backward", dict(h=5), "multiple"),
    ("conv1d_forward", dict(d=9), "multiple"), ("selective_scan_forward", dict(k=3, d=9), "multiple"),
    ("selective_scan_forward", dict(k=5), "d = 12"), ("rope_forward", dict(p=7), "p = 7"), ("verify", dict(l=4), "l = 4"),
    ("attention_forward", dict(l=32), "at least 35"), ("conv1d_forward", dict(l=34), "at least 35"),
    ("selective_scan_forward", dict(r=32), "ring"), ("ssd_forward", dict(r=49), "ring"),
    ("sample", dict(v=0), "v"), ("lm_loss_forward", dict(v=0), "v"), ("conv1d_forward", dict(w=0), "w"),
    ("ssd_forward", dict(g=0), "g"), ("top_log_probs", dict(j=9), "j (9) must be at most size v (8)")])
def test_refuses_sizes_that_break_a_rule(backend, op, change, word):
    args, n = valid(backend, op), sizes(backend.module, op) | change
    for p in arrays(backend, op):
        args[p.name] = np.resize(args[p.name], tuple(n[letter] for letter in p.letters)).astype(args[p.name].dtype)
    refused(backend, op, args, word)


@pytest.mark.parametrize("op, change, words", [
    ("attention_forward", dict(kcache=None), ("kcache", "vcache")), ("lm_loss_forward", dict(tw=None), ("th", "tw")),
    ("lm_loss_forward", dict(tail=None), ("ids", "tail")), ("lm_loss_backward", dict(log_probs=None), ("ids", "log_probs")),
    ("lm_loss_forward", dict(ids=np.full((4, 2), 5, np.int32)), ("ids", "different", "index 1")),
    ("top_log_probs", dict(temperature=0.0), ("temperature",)),
    ("ssd_forward", dict(ring_dt=None), ("ring_x", "ring_dt")),
    ("selective_scan_forward", dict(ring_B=None), ("ring_x", "ring_B")),
    ("ssd_forward", dict(state=None), ("ring", "state")), ("selective_scan_forward", dict(ring_x=None), ("ring_x",)),
    ("lm_loss_backward", dict(kind=3), ("kind",)), ("lm_loss_forward", dict(temperature=0.0), ("temperature",)),
    ("adamw", dict(step=0), ("step",)), ("adamw", dict(first=2), ("first", "4")),
    ("adamw", dict(m=np.zeros(3, np.uint16)), ("m", "v", "dtype")), ("transfer", dict(to=2), ("rows",)), ("transfer", {"from": 3}, ("rows",)),
    ("transfer", dict(count=10**15), ("rows",)), ("conv1d_forward", dict(block=3), ("block",)),
    ("conv1d_forward", dict(block=0), ("block",)), ("conv1d_backward", dict(block=2**40), ("block",)),
    ("conv1d_forward", dict(block=2**64 - 1), ("block",)), ("conv1d_backward", dict(block=2**63), ("block",)),
    ("attention_forward", dict(sinks=8), ("cache", 41)), ("attention_forward", dict(sinks=2**63), ("cache", 40)),
    ("conv1d_forward", dict(silu=2), ("silu",)), ("conv1d_backward", dict(silu=2**64 - 1), ("silu",))])
def test_refuses_arguments_that_do_not_go_together(backend, op, change, words):
    refused(backend, op, valid(backend, op) | change, *words)


@pytest.mark.parametrize("op", ["selective_scan_forward", "ssd_forward"])
@pytest.mark.parametrize("cursors, why", [
    (dict(pos=5, committed=5, seen=6), "the checkpoint is ahead of what is committed"),
    (dict(pos=5, committed=6, seen=5), "the call starts before what is committed"),
    (dict(pos=35, committed=5, seen=5), "more than 32 tokens pending"),
    (dict(pos=90, committed=90, seen=0), "the ring does not reach back to the checkpoint"),
    (dict(pos=61, committed=32, seen=0), "nor does it with the pending tokens")])
def test_refuses_cursors_that_cannot_be(backend, op, cursors, why):
    args = valid(backend, op)
    state = args["state"].copy()
    for name, value in cursors.items():
        args[name] = np.full(3, value, np.int32)

    def work():
        refused(backend, op, args)
        assert same(args["state"], state)

    isolated(backend, work)


# ---- the functions themselves -----------------------------------------------------------------------------------------------


@every_op
def test_every_op_is_documented(backend, op):
    doc = getattr(backend.module, op).__doc__
    assert backend.module.OPS[op] in doc and len(doc.splitlines()[2]) > 8
    assert getattr(ops, op).__doc__ == getattr(backends.module("cpu"), op).__doc__ and getattr(ops, op).__name__ == op
    assert op in ops.__all__


def test_the_public_ops_choose_the_device():
    x = np.ones((2, 3), np.float32)
    y = ops.rmsnorm_forward(x, np.ones(3, np.float32), 1e-5)
    assert same(y, backends.module("cpu").rmsnorm_forward(x, np.ones(3, np.float32), 1e-5))
    assert same(ops.rmsnorm_forward(x, w=np.ones(3, np.float32), eps=1e-5, device="cpu"), y)
    with pytest.raises(ValueError, match="gpu"):
        ops.rmsnorm_forward(x, np.ones(3, np.float32), 1e-5, device="gpu")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cuda_says_what_it_lacks(dtype):
    """The modules, a library, a driver, or a device: one sentence."""
    try:
        backends.module("cuda", dtype)
    except ValueError as error:
        assert str(error).startswith("device 'cuda'") and "\n" not in str(error)
        assert any(word in str(error) for word in ("built without CUDA", "cannot open shared object", "driver", "no CUDA device"))


@every_op
def test_empty_arrays(backend, op):
    """No rows: nothing to do, outputs of size 0."""
    args, n = valid(backend, op), sizes(backend.module, op) | {"m": 0, "b": 0}
    if op == "adamw":
        n["n"] = 0
    if op == "transfer":
        args |= {"to": 0, "from": 0, "count": 0}
    for p in arrays(backend, op):
        args[p.name] = np.resize(args[p.name], tuple(n[letter] for letter in p.letters)).astype(args[p.name].dtype)
    args = backend.prepare(op, args)  # as a bf16 module keeps it
    before = {k: v.copy() for k, v in args.items() if isinstance(v, np.ndarray)}
    out = call(backend, op, args)
    for value in out if isinstance(out, tuple) else (out,) if out is not None else ():
        assert value.size == 0
    assert all(same(args[k], v) for k, v in before.items())


@every_op
def test_references_are_not_lost(backend, op):
    """Good and refused calls leave the reference counts of their arguments alone."""
    args = valid(backend, op)
    first = arrays(backend, op)[0].name
    counts = {k: sys.getrefcount(v) for k, v in args.items() if isinstance(v, np.ndarray)}
    for _ in range(50):
        call(backend, op, args)
        with pytest.raises(TypeError):
            call(backend, op, args | {"bogus": 1})
        with pytest.raises(TypeError):
            call(backend, op, args | {first: 3})
    assert counts == {k: sys.getrefcount(v) for k, v in args.items() if isinstance(v, np.ndarray)}


# ---- processes and threads --------------------------------------------------------------------------------------------------


def odd_value(r, value):
    """Something else in the place of a good argument."""
    if not isinstance(value, np.ndarray):
        return r.choice(np.array([0, 1, 2, 7, 1000, -1, 0.0, 1e30, -1e30, 2**31, 2**62, None], object))
    kind = r.integers(0, 7)
    if kind == 0:
        shape = list(value.shape)
        shape[r.integers(0, len(shape))] = int(r.integers(0, 70))
        return np.resize(value, shape).astype(value.dtype)
    if kind == 1 and value.dtype == np.int32:
        changed = value.copy()
        changed.flat[r.integers(0, value.size)] = r.choice([-(2**31), -2, -1, 0, 1, 2, 5, 33, 50, 1000, 2**30, 2**31 - 1])
        return changed
    if kind == 2 and value.dtype == np.float32:
        changed = value.copy()
        changed.flat[r.integers(0, value.size)] = r.choice([np.nan, np.inf, -np.inf, 1e38, -1e38, 1e-45, 0, -1, 2])
        return changed
    if kind == 3:
        return value.astype(r.choice(["f8", "i8", "u2", "f4", "i4", "O"]))
    if kind == 4:
        return r.choice(np.array([None, 3, "x", (), b"", np.float32(1)], object))
    if kind == 5:
        return value[..., ::-1] if r.random() < 0.5 else value.T
    return value.copy()


@every_op
def test_random_arguments_never_crash(backend, op):
    """One to four arguments replaced: a result, ValueError or TypeError; never a signal, never another exception."""

    def work():
        r, good, passed = np.random.default_rng(1), valid(backend, op), 0
        for _ in range(300):
            args = {k: v.copy() if isinstance(v, np.ndarray) else v for k, v in good.items()}
            for name in r.choice(list(args), r.integers(1, 5)):
                if r.random() < 0.1:
                    args.pop(name, None)
                else:
                    args[name] = odd_value(r, good[name])
            try:
                call(backend, op, args)
                passed += 1
            except (ValueError, TypeError) as error:
                assert op in str(error)
        assert passed > 0

    isolated(backend, work)


def heavy(backend):
    """Calls that are large enough to be spread over threads, with their arguments."""
    r = np.random.default_rng(1)
    f = lambda *shape: r.standard_normal(shape).astype(np.float32)
    x, w = f(2, 64, 96), f(96, 96)
    scan = dict(x=f(2, 64, 64), dt=f(2, 64, 64), A_log=f(64, 16), B=f(2, 64, 2, 16), C=f(2, 64, 4, 16))
    ssd = dict(x=f(2, 64, 2, 32), dt=f(2, 64, 4), A_log=f(4), B=f(2, 64, 2, 32), C=f(2, 64, 4, 32))
    heads = dict(q=f(2, 64, 4, 32), k=f(2, 64, 2, 32), v=f(2, 64, 2, 32))
    return [("linear_forward", dict(x=x, w=w)), ("linear_forward", dict(x=x[:, :8].copy(), w=w)),
            ("selective_scan_forward", scan), ("selective_scan_backward", scan | {"dy": f(2, 64, 64)}), ("ssd_forward", ssd),
            ("ssd_backward", ssd | {"dy": f(2, 64, 4, 32)}), ("attention_forward", heads),
            ("lm_loss_backward", dict(h=f(128, 64), w=f(301, 64), target=r.integers(0, 301, 128).astype("i4")))]


def test_threads_run_ops_at_once(backend):
    """Every thread gets the bits of a call that ran alone, again and again."""
    calls = heavy(backend)
    expected = [bits(call(backend, op, args)) for op, args in calls]
    wrong = []

    def work(first):
        for i in range(10 * len(calls)):
            op, args = calls[(first + i) % len(calls)]
            if bits(call(backend, op, args)) != expected[(first + i) % len(calls)]:
                wrong.append(op)

    threads = [threading.Thread(target=work, args=(i,)) for i in (0, 3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def test_a_forked_child_runs_ops(backend):
    if backend.name.startswith("_cuda"):
        pytest.skip("a CUDA context does not survive a fork")
    calls = heavy(backend)
    expected = [bits(call(backend, op, args)) for op, args in calls]  # the parent's threads are running now

    def work():
        assert [bits(call(backend, op, args)) for op, args in calls] == expected
        in_child(lambda: call(backend, *calls[0]))  # and its own child

    in_child(work)
    assert [bits(call(backend, op, args)) for op, args in calls] == expected, "the parent after the fork"
