"""DLPack: arrays of other libraries come in and our memory goes out without a copy, and lives as long as anybody uses it."""
import ctypes
import gc
import sys

import mambainllama as mil
import numpy as np
import pytest
from conftest import CUDA, same
from mambainllama import backend as backends
from mambainllama import ops

CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2,
          "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 61, "initializer_range": 0.3}
NAME = "model.layers.0.mlp.up_proj.weight"


class Foreign:
    """Another library's array: nothing but the protocol, and whether it was asked and let go."""

    def __init__(self, array, old=False):
        self.array, self.old, self.asked = array, old, 0

    def __dlpack__(self, **how):
        if self.old and "max_version" in how:
            raise TypeError("unexpected keyword argument 'max_version'")
        self.asked += 1
        return self.array.__dlpack__(**how)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


@pytest.fixture(params=["cpu", pytest.param("cuda32", marks=CUDA), pytest.param("cuda", marks=CUDA)])
def where(request):
    """mil's arguments of a device and precision."""
    how = {"device": request.param[:4].rstrip("3"), "dtype": "bfloat16" if request.param == "cuda" else "float32"}
    try:
        backends.module(**how)
    except ValueError as error:
        pytest.skip(str(error))
    return how


def model_on(where):
    return mil.convert(mil.random(CONFIG, seed=1, **where), mamba_layers=[1])


def arguments(shape=(2, 9, 4, 8)):
    r = np.random.default_rng(0)
    b, t, h, p = shape
    return {"x": r.normal(size=(b, t, 2, p)).astype("f4"), "dt": r.normal(size=(b, t, h)).astype("f4"), "A_log": r.random(h).astype("f4"),
            "B": r.normal(size=(b, t, 2, 6)).astype("f4"), "C": r.normal(size=(b, t, h, 6)).astype("f4"), "D": r.random(h).astype("f4")}


@pytest.mark.parametrize("old", [False, True])
def test_host_arguments_are_read_and_written_where_they_are(old):
    args = arguments()
    foreign = {name: Foreign(array, old) for name, array in args.items()}
    assert same(ops.ssd_forward(**foreign), ops.ssd_forward(**args)) and all(f.asked == 1 for f in foreign.values())
    y, x = np.ones((3, 4), "f4"), np.full((3, 4), 2, "f4")
    ops.accumulate(y=Foreign(y), x=x)
    assert (y == 3).all()


def test_what_cannot_be_read_is_refused():
    y = np.ones((3, 4), "f4")
    frozen = y.copy()
    frozen.flags.writeable = False
    for args, match in [({"y": Foreign(frozen), "x": y}, "writable"), ({"y": Foreign(y.T.copy().T), "x": y}, "contiguous"),
                        ({"y": Foreign(y.astype("f8")), "x": y}, "must be float32, got float64"), ({"y": Foreign(y[0]), "x": y}, "2 axes"),
                        ({"y": y, "x": Foreign(y[:2])}, "size 2")]:
        with pytest.raises(ValueError, match=match):
            ops.accumulate(**args)

    class Elsewhere(Foreign):
        def __dlpack_device__(self):
            return (2, 7)

    class Broken(Foreign):
        def __dlpack__(self, **how):
            return object()

    with pytest.raises(ValueError, match=r"\(2, 7\)"):
        ops.accumulate(y=Elsewhere(y), x=y)
    with pytest.raises(ValueError, match="no DLPack 1 tensor"):
        ops.accumulate(y=Broken(y), x=y)
    with pytest.raises(TypeError, match="__dlpack__"):
        ops.accumulate(y=[1.0], x=y)


def test_arguments_are_let_go(where):
    arrays = arguments()
    before = {name: sys.getrefcount(array) for name, array in arrays.items()}
    for bad in ({}, {"B": Foreign(np.zeros((1, 2), "f4"))}):  # whether the call succeeds or not
        try:
            ops.ssd_forward(**{name: Foreign(array) for name, array in arrays.items()} | bad, **where)
        except ValueError:
            assert bad
    gc.collect()
    assert {name: sys.getrefcount(array) for name, array in arrays.items()} == before


def test_a_parameter_is_its_own_memory_and_outlives_its_model(where):
    model = model_on(where)
    expected, tensor = model.raw(NAME), model.tensor(NAME)
    assert tensor.shape == expected.shape and tensor.dtype == where["dtype"]
    assert tensor.__dlpack_device__() == ((1, 0) if where["device"] == "cpu" else (2, 0))
    assert pointer(tensor) == pointer(model.tensor(NAME)) != pointer(model.tensor(NAME.replace("up", "gate")))
    model.set(NAME, np.zeros(expected.shape, "f4"))  # the holder keeps what it read
    assert pointer(tensor) != pointer(model.tensor(NAME)) and not model.get(NAME).any()
    capsule = tensor.__dlpack__(max_version=(1, 0))
    del model, tensor
    gc.collect()
    assert read(capsule, expected.nbytes) == expected.tobytes()
    with pytest.raises(ValueError, match="no parameter"):
        model_on(where).tensor("nothing")


def test_numpy_reads_a_parameter_in_place():
    model = model_on({"device": "cpu", "dtype": "float32"})
    array = np.from_dlpack(model.tensor(NAME))
    assert array.ctypes.data == pointer(model.tensor(NAME)) and not array.flags.writeable and same(array, model.get(NAME))
    with pytest.raises(BufferError, match="neither copied"):
        np.from_dlpack(model.tensor(NAME), copy=True)


def test_parameters_are_set_from_dlpack(where):
    model, other = model_on(where), model_on(where)
    for name in (NAME, "model.layers.1.mamba.conv1d.weight", "model.norm.weight"):
        value = np.random.default_rng(1).normal(size=model.names[name]).astype("f4")
        model.set(name, Foreign(value))
        other.set(name, value)
        assert same(model.raw(name), other.raw(name))
        model.set(name, np.zeros_like(value))
        model.set(name, other.tensor(name))  # on the device itself
        assert same(model.raw(name), other.raw(name)) and pointer(model.tensor(name)) != pointer(other.tensor(name))
    ids = np.arange(12)[None]
    other.set("model.norm.weight", np.zeros(32, "f4"))
    assert model.logits(ids).any() and not other.logits(ids).any()
    with pytest.raises(ValueError, match="shape"):
        model.set(NAME, other.tensor("model.norm.weight"))
    with pytest.raises(ValueError, match="float64"):
        model.set(NAME, Foreign(np.zeros(model.names[NAME])))


@CUDA
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_op_results_stay_on_the_device(dtype):
    """Results of a call are the next one's arguments; what it gives is what the call with NumPy's arrays gives."""
    try:
        module = backends.module("cuda", dtype)
    except ValueError as error:
        pytest.skip(str(error))
    r = np.random.default_rng(0)
    x, w1, w2 = (r.normal(size=s).astype("f4") for s in ((2, 5, 32), (48, 32), (32, 48)))
    model = mil.random(CONFIG | {"intermediate_size": 48}, device="cuda", dtype=dtype)
    model.set(NAME, w1)
    up = model.tensor(NAME)
    hidden = module.linear_forward(x=x, w=up)  # one of the arguments is there
    assert type(hidden).__name__ == "Tensor" and hidden.dtype == dtype and hidden.shape == (2, 5, 48)
    y = module.linear_forward(x=hidden, w=w2)
    stored = model.raw(NAME)
    expected = module.linear_forward(x=module.linear_forward(x=x, w=stored), w=w2)
    assert same(y.numpy(), expected)
    used = module.memory()[0]
    del hidden, y
    gc.collect()
    assert module.memory()[0] < used
    grad = module.linear_backward(dy=module.linear_forward(x=x, w=up), x=x, w=up, dw=np.zeros((48, 32), "f4"))  # in place on the host
    assert grad.shape == x.shape
    ids = np.array([[3, 1, 2]], np.int32)
    row = module.embedding_forward(w=model.tensor("model.embed_tokens.weight"), ids=ids)
    assert same(row.numpy(), model.get("model.embed_tokens.weight")[ids])
    losses = module.lm_loss_forward(h=x[0], w=model.tensor("model.embed_tokens.weight"), target=np.array([1, 2, 60, -1, 5], np.int32))
    assert all(same(got.numpy(), expected) for got, expected in zip(losses, module.lm_loss_forward(
        h=x[0], w=model.raw("model.embed_tokens.weight"), target=np.array([1, 2, 60, -1, 5], np.int32))))
    if dtype == "bfloat16":  # what the device keeps in bf16 is given so
        with pytest.raises(ValueError, match="must be bfloat16 on this device, got float32"):
            module.rmsnorm_forward(x=model.tensor("model.norm.weight"), w=np.ones(32, "f4"), eps=1e-5)
    capsule = up.__dlpack__(max_version=(1, 0))
    inside(capsule).tensor.offset = 4
    inside(capsule).tensor.shape[0] -= 1
    with pytest.raises(ValueError, match="to 16 bytes"):
        module.linear_forward(x=x, w=Given(capsule, (2, 0)))
    with pytest.raises(ValueError, match="writable"):  # models share their parameters
        module.accumulate(y=model.tensor("model.embed_tokens.weight"), x=row)


# ---- a capsule's inside, as dlpack.h has it ------------------------------------------------------------------------------------


class DLTensor(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("device", ctypes.c_int32 * 2), ("dims", ctypes.c_int32), ("dtype", ctypes.c_uint32),
                ("shape", ctypes.POINTER(ctypes.c_int64)), ("strides", ctypes.POINTER(ctypes.c_int64)), ("offset", ctypes.c_uint64)]


class Versioned(ctypes.Structure):
    _fields_ = [("version", ctypes.c_uint32 * 2), ("context", ctypes.c_void_p), ("release", ctypes.c_void_p), ("flags", ctypes.c_uint64),
                ("tensor", DLTensor)]


class Given:
    """A capsule as an argument."""

    def __init__(self, capsule, device):
        self.capsule, self.device = capsule, device

    def __dlpack__(self, **how):
        return self.capsule

    def __dlpack_device__(self):
        return self.device


def inside(capsule):
    get = ctypes.pythonapi.PyCapsule_GetPointer
    get.restype, get.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    return ctypes.cast(get(capsule, b"dltensor_versioned"), ctypes.POINTER(Versioned)).contents


def pointer(tensor):
    capsule = tensor.__dlpack__(max_version=(1, 0))
    found = inside(capsule)
    assert list(found.version) == [1, 0] and found.flags == 1 and found.tensor.shape[0] == tensor.shape[0]
    return found.tensor.data


def read(capsule, n):
    """Bytes of the capsule's memory: by an op, on a device that the host cannot read."""
    tensor = inside(capsule).tensor
    if tensor.device[0] == 1:
        return ctypes.string_at(tensor.data, n)
    half = tensor.dtype & 0xffff == 0x1004

    to = np.zeros((tensor.shape[0], tensor.shape[1]), np.uint16 if half else np.float32)
    backends.module("cuda", "bfloat16" if half else "float32").transfer(dst=to, src=Given(capsule, (2, 0)), to=0, count=len(to), **{"from": 0})
    return to.tobytes()
