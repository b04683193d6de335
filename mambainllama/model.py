"""Model and State: thin faces of the C types. Everything that computes is below them; here arrays are prepared and named."""
import fnmatch
import zlib

import numpy as np

from . import backend
from .config import architecture, initializer_range, is_dynamic, mamba_config, rope, stop_ids
from .parallel import ranks

DTYPES = {"float32": np.float32, "bfloat16": np.uint16}  # and the dtype of their arrays
KL_KINDS = {"forward": 0, "reverse": 1, "paper": 0, "jensen-shannon": 2}


def _dtype(value, name):
    if value not in DTYPES:
        raise ValueError(f"{name} is {value!r}, expected {' or '.join(map(repr, DTYPES))}")


def _int32(values, name):
    try:
        array = np.asarray(values)
    except ValueError:
        raise ValueError(f"argument {name!r} must be an array of integers, and its rows differ in length") from None
    if array.dtype.kind not in "iub" and array.size:
        raise ValueError(f"argument {name!r} must hold integers, got {array.dtype}")
    if array.size and (array.max() > 2**31 - 1 or array.min() < -2**31):
        raise ValueError(f"argument {name!r} must fit int32")
    return np.ascontiguousarray(array, np.int32)


def _rows(value, name, count):
    """None, or an int32 array with one entry a row; a plain integer is meant for every row."""
    if value is None:
        return None
    if np.shape(value) not in ((), (count,)):
        raise ValueError(f"argument {name!r} must be an integer or have {count} entries, got shape {np.shape(value)}")
    return _int32(np.broadcast_to(value, (count,)), name)


def _prev(value, shape):
    """None, or an int32 array of `shape`; a row is meant for the whole batch."""
    if value is None:
        return None
    array = _int32(value, "prev")
    try:
        return np.ascontiguousarray(np.broadcast_to(array, shape))
    except ValueError:
        raise ValueError(f"argument 'prev' must have the shape of ids {shape}, got {array.shape}") from None


def _floats(value, name, shape):
    """A float32 array of `shape`; a number is meant for every entry."""
    try:
        array = np.asarray(value, np.float32)
    except (TypeError, ValueError):
        raise ValueError(f"argument {name!r} must be an array of numbers") from None
    if array.shape not in ((), shape):
        raise ValueError(f"argument {name!r} must be a number or have the shape {shape}, got {array.shape}")
    return np.broadcast_to(array, shape)


def _layers(value):
    layers = _int32(value, "layers")
    if layers.ndim != 1:
        raise ValueError(f"argument 'layers' must be a list of numbers, got shape {layers.shape}")
    return layers


def _ids(ids):
    ids = _int32(ids, "ids")
    if ids.ndim != 2:
        raise ValueError(f"argument 'ids' must have shape (batch, tokens), got {ids.shape}")
    return ids


def _ids_and_targets(ids, targets):
    ids, targets = _int32(ids, "ids"), _int32(targets, "targets")
    if ids.ndim != 2 or targets.shape != ids.shape:
        raise ValueError(f"ids and targets must have one shape (batch, tokens), got {ids.shape} and {targets.shape}")
    return ids, targets


def fits(name, patterns):
    """Whether a pattern (as in a shell) fits the name and none that begins with "!" does; these alone: all but what they fit."""
    positive = [pattern for pattern in patterns if not pattern.startswith("!")] or ["*"]
    return any(fnmatch.fnmatchcase(name, p) for p in positive) and not any(fnmatch.fnmatchcase(name, p[1:]) for p in patterns if p.startswith("!"))


def _cached(teacher, shape):
    """A teacher of loss that is (ids, log_probs, tail): as C takes it, and (B,T) where it says something."""
    try:
        ids, log_probs, tail = teacher
        ids, log_probs, tail = _int32(ids, "teacher's ids"), *(np.ascontiguousarray(a, np.float32) for a in (log_probs, tail))
    except (TypeError, ValueError) as error:
        raise ValueError(f"a teacher that is no Model must be (ids, log_probs, tail), as top_log_probs gives them: {error}") from None
    if ids.shape[:-1] != shape or not ids.shape[-1] or log_probs.shape != ids.shape or tail.shape != shape:
        raise ValueError(f"the teacher's ids and log_probs must have shape (batch, tokens, k) and its tail (batch, tokens) = {shape}, got "
                         f"{ids.shape}, {log_probs.shape} and {tail.shape}")
    known = ids[..., 0] >= 0
    with np.errstate(over="ignore"):
        mass = np.exp(log_probs).sum(-1) + np.exp(tail)
    wrong = np.argwhere(known & ~(abs(mass - 1) < 1e-3))
    if len(wrong):
        raise ValueError(f"the teacher's probabilities at {tuple(map(int, wrong[0]))} add up to {mass[tuple(wrong[0])]:.4g}, expected 1")
    if not known.all():
        ids = np.where(known[..., None], ids, np.arange(ids.shape[-1], dtype=np.int32))
    return (ids, log_probs, tail), known


class Model:
    """A decoder whose layers are attention, Mamba-1 or Mamba-2 mixers, attention in a window with sinks, or add nothing but their MLP.

    config: config.json's dict.  mamba: mamba_config.json's dict, None for a Transformer.
    dtype: "float32" | "bfloat16" of the matrices; everything else is float32.
    Made by load, random and convert; parameters are zero until set.  Raises ValueError for what config.py refuses.
    folder: where it was loaded from, None otherwise.  stop_tokens: ids that end an answer, read once when the model is made.
    """

    def __init__(self, config, mamba=None, device="cpu", dtype="float32"):
        _dtype(dtype, "dtype")
        ranks()  # of a job, each takes its share of threads and its GPU before anything computes
        self.module = backend.module(device, dtype)
        self.c = self.module.Model(architecture(config, mamba), dtype)
        self.config, self.device, self.dtype = dict(config), device, dtype
        self._mamba_config = mamba and dict(mamba)
        self.folder = self.tokenizer = None
        self.stop_tokens = []
        self._names = None
        self._rope_length = None

    # -- what it is -----------------------------------------------------------------------------------------------------

    @property
    def layer_kinds(self):
        """["attention", "mamba2", …], one a layer: "attention", "mamba1", "mamba2", "window" or "identity"."""
        return self.c.kinds()

    @property
    def mamba_config(self):
        """mamba_config.json's dict for the layers as they are now; None when all are attention."""
        kinds = self.layer_kinds
        if all(kind == "attention" for kind in kinds):
            return None
        windows, sinks = self.c.windows()
        return mamba_config(self.config, kinds, {**(self._mamba_config or {}), "window": windows, "sinks": sinks})

    @property
    def names(self):
        """{checkpoint name (training spelling): shape}."""
        if self._names is None:
            self._names = self.c.names()
        return dict(self._names)

    def get(self, name):
        """The parameter as a float32 array in the checkpoint's shape, a copy."""
        return self.c.get(name)

    def raw(self, name):
        """The parameter as stored: float32, or uint16 holding the bits of bf16."""
        return self.c.raw(name)

    def tensor(self, name):
        """The parameter's own memory on its device, for `torch.from_dlpack` and other readers of DLPack: float32 or bfloat16, no copy.

        To be read, not written: models share it. It stays as it is as long as anybody holds it; `set` and a training step then give the
        parameter new memory."""
        return self.c.tensor(name)

    def fingerprint(self, names=None):
        """Of the parameters' names and bits (default: all), hexadecimal."""
        crc = 0
        for name in sorted(self.names if names is None else names):
            crc = zlib.crc32(np.ascontiguousarray(self.raw(name)), zlib.crc32(name.encode(), crc))
        return f"{crc:08x}"

    def set(self, name, array):
        """Writes a parameter: float32 (rounded to bf16 where that is how it is stored) or uint16 (the bits of bf16); or an array of another
        library with __dlpack__, float32 or bfloat16, which on the model's device is copied there."""
        if not isinstance(array, (np.ndarray, np.generic)) and hasattr(array, "__dlpack_device__"):
            return self.c.set(name, array)
        array = np.asarray(array)
        if array.dtype == np.float64 or array.dtype == np.float16:
            array = array.astype(np.float32)
        self.c.set(name, np.ascontiguousarray(array) if array.ndim else array)

    # -- gradients and the optimiser ------------------------------------------------------------------------------------------

    def trainable(self, patterns=("*",), gradients="float32"):
        """Which parameters get gradients, by patterns over names (fits); returns their names. ValueError if a pattern fits none.

        gradients: "float32" | "bfloat16", how those of bf16 matrices are kept. bfloat16 ones take half the memory: a backward adds to them in
        float32 and rounds the sum, so that the first since zero_grad leaves the float32 gradient rounded (of a tied embedding: twice). The
        others are float32."""
        _dtype(gradients, "gradients")
        patterns = [patterns] if isinstance(patterns, str) else list(patterns)
        names = self.names
        for pattern in patterns:
            if not fnmatch.filter(names, pattern.removeprefix("!")):
                raise ValueError(f"the pattern {pattern!r} fits no parameter name (such as {next(iter(names))!r})")
        chosen = [name for name in names if fits(name, patterns)]
        keep = set(chosen)
        for name in names:
            self.c.set_trainable(name, name in keep)
        self.c.half_gradients(gradients == "bfloat16")
        return chosen

    def grad(self, name):
        """The gradient that backward calls have added up, float32. ValueError when frozen or before any backward."""
        return self.c.grad(name)

    def zero_grad(self):
        self.c.zero_grad()

    def grad_norm(self):
        """The norm of all gradients together; of a job's rank: of its part of them."""
        return self.c.grad_norm()

    def step(self, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, scale=1.0, step=1, moments="float32"):
        """One AdamW step on every trainable parameter (of a job's rank: on its part of them, parallel.py); gradients are multiplied by
        `scale` first; `step` counts from 1.

        moments: "float32" | "bfloat16", how they are kept. bfloat16 ones take half the memory and are rounded up or down at random
        around their values (csrc/ops.h, adamw), by the parameter, the element and `step` alone: the same steps give the same bits.
        ValueError if they are of the other kind already."""
        _dtype(moments, "moments")
        self.c.step(lr, betas[0], betas[1], eps, weight_decay, scale, step, moments == "bfloat16")

    def moments(self):
        """{name: (m, v, master weights or None)} of the parameters that have taken a step; m and v as stored: float32, or uint16
        (the bits of bf16). Of a job's rank: what it holds, flat where that is not all."""
        found = {name: self.c.moments(name) for name in self.names}
        return {name: values for name, values in found.items() if values}

    def set_moments(self, name, m, v, master=None):
        """Gives a parameter the moments of moments(), and with them their kind."""
        self.c.set_moments(name, m, v, master)

    # -- calls ---------------------------------------------------------------------------------------------------------------------

    def _set_rope(self, length):
        """Dynamic RoPE depends on how long the sequence is; every other type is set once."""
        if is_dynamic(self.config, self._mamba_config) and length != self._rope_length:
            self.c.set_rope(*rope(self.config, length, self._mamba_config))
            self._rope_length = length

    def logits(self, ids, state=None, keep=None, slot=None, prev=None, last=None, extend=False):
        """Logits of `ids` (B,T): float32 (B,T,V), or (B,last,V) of the last `last` kept tokens.

        state: what came before, a State; slot (B): its rows (default 0 … B-1).  keep (B) or int: how many of the tokens are
        committed (default all); the rest stay pending for State.commit.  extend: the tokens follow the pending ones, which
        otherwise are dropped.  prev (B,T): the token before t: t-1, -1 the incoming state, -2 nothing (no state then).
        ValueError, state untouched: ids out of range, capacity exceeded, a slot twice, another model's state, a bad prev.
        """
        ids = _ids(ids)
        batch, length = ids.shape
        keep, slot = _rows(keep, "keep", batch), _rows(slot, "slot", batch)
        if extend and keep is None:
            keep = np.zeros(batch, np.int32)
        prev = _prev(prev, ids.shape)
        if state is not None and not isinstance(state, State):
            raise ValueError(f"argument 'state' must be a State, got {type(state).__name__}")
        if last is not None and (not isinstance(last, (int, np.integer)) or not 0 <= last <= length):
            raise ValueError(f"argument 'last' must be an integer from 0 to {length}, got {last!r}")
        self._set_rope(length + (int(state.pos.max()) if state else 0))
        return self.c.logits(ids, state.c if state else None, keep, slot, prev, -1 if last is None else int(last), extend)

    def loss(self, ids, targets, teacher=None, ce=1.0, kl=0.0, temperature=1.0, kind="forward", prev=None, backward=False,
             recompute=False):
        """ce · cross-entropy + kl · KL to `teacher`, means over the positions with a target; backward=True adds to the gradients.

        ids, targets (B,T): targets[b,t] is what position t must predict, -100 = no loss.  KL is temperature² · KL(teacher ||
        student) of the softmaxes at `temperature` (kind "forward"), the other way round ("reverse"), half of either's KL to the mean of
        both ("jensen-shannon"), or the original code's
        sum over all positions, targets or not, divided by B ("paper").  recompute: keep only layer inputs for backward.
        Returns {"loss", "ce", "kl", "tokens"}; ce and kl unweighted.

        teacher: a Model, or what its top_log_probs gave for these ids and this temperature: (ids (B,T,k), log_probs (B,T,k), tail (B,T)).
        Then both distributions are over k+1 outcomes, the k tokens and any other, so that the KL is at most the Model's own
        (data-processing inequality) and equal to it where k is the vocabulary; at a position whose ids are all -1 it is 0.
        """
        ids, targets = _ids_and_targets(ids, targets)
        prev = _prev(prev, ids.shape)
        if kind not in KL_KINDS:
            raise ValueError(f"kind is {kind!r}, expected {' or '.join(map(repr, KL_KINDS))}")
        if not temperature > 0 or not np.isfinite([ce, kl, temperature]).all():
            raise ValueError(f"ce, kl and temperature must be finite and temperature positive, got {ce}, {kl}, {temperature}")
        if kl and teacher is None:
            raise ValueError("kl > 0 needs a teacher")
        known = None
        if isinstance(teacher, tuple):
            teacher, known = _cached(teacher, ids.shape)
        elif teacher is not None:
            self._check_teacher(teacher)
            teacher._set_rope(ids.shape[1])
            teacher = teacher.c
        self._set_rope(ids.shape[1])
        mask = (targets >= 0).astype(np.float32)
        tokens = int(mask.sum())
        count = max(tokens, 1)
        kl_mask, kl_count = (np.ones_like(mask), max(len(ids), 1)) if kind == "paper" else (mask, count)
        if known is not None:
            kl_mask = kl_mask * known
        wce, wkl = (mask * np.float32(ce / count), kl_mask * np.float32(kl / kl_count)) if backward else (mask, kl_mask)
        losses = self.c.loss(ids, targets, wce, wkl, teacher, prev, temperature, KL_KINDS[kind], backward, recompute)
        means = {"ce": float(losses[0].sum(dtype=np.float64, where=mask > 0)) / count,
                 "kl": float(losses[1].sum(dtype=np.float64, where=kl_mask > 0)) / kl_count}
        return {"loss": ce * means["ce"] + kl * means["kl"], **means, "tokens": tokens}

    def top_log_probs(self, ids, k, temperature=1.0, prev=None):
        """The k likeliest next tokens at each position of `ids` (B,T), of softmax(logits / temperature), as loss takes them for a teacher:
        (ids (B,T,k) int32, likeliest first and of equal ones the lower id; their log-probabilities (B,T,k) float32; the log of what all
        others have together (B,T) float32, -inf where k is the vocabulary). ValueError: k is not from 1 to the vocabulary."""
        ids = _ids(ids)
        if not 0 < temperature < np.inf:
            raise ValueError(f"temperature must be finite and positive, got {temperature}")
        self._set_rope(ids.shape[1])
        return self.c.top_log_probs(ids, _prev(prev, ids.shape), temperature, k)

    def log_probs(self, ids, targets, prev=None, weights=None, recompute=False):
        """Log-probabilities (B,T) float32 of the targets, 0 where there is none; shapes as in loss.

        weights (B,T): adds the gradient of -sum(weights * log_probs) to the gradients, as loss does of its own."""
        ids, targets = _ids_and_targets(ids, targets)
        self._set_rope(ids.shape[1])
        mask = (targets >= 0).astype(np.float32)
        given = mask if weights is None else mask * np.asarray(weights, np.float32)
        losses = self.c.loss(ids, targets, given, np.zeros_like(mask), None, _prev(prev, ids.shape), 1.0, 0, weights is not None, recompute)
        return np.where(mask > 0, -losses[0], np.float32(0))

    def hidden(self, ids, layers, prev=None, mid=False):
        """The residual stream: float32 (n,B,T,C), for each of the n rising `layers` what goes into it (before its first norm); the number
        of layers stands for what comes out of the last (before the final norm). mid: what stands between its mixer and its MLP
        instead, so that mid - input is what the mixer adds. ids, prev (B,T) as in logits.  ValueError: no such layer."""
        ids = _ids(ids)
        self._set_rope(ids.shape[1])
        return self.c.hidden(ids, _layers(layers), _prev(prev, ids.shape), mid)

    def align(self, ids, teacher, what="mixer", layers=None, prev=None, weights=None, mask=None, own_prefix=False, backward=False):
        """How far this model's layers are from `teacher`'s when both read the same: squared errors, float32 (n,B,T).

        For each of the n rising `layers` (default: those whose kinds differ) both models' layer reads one residual stream, and the error
        of a position is the sum over channels of (student - teacher)²: of what their mixers add to it ("mixer"), or of the layers'
        outputs ("hidden"); both are compared before the stream is added, which in bf16 would round small differences away. That stream
        is the teacher's own; own_prefix: what this model's layers before it give.
        mask (B,T): 0 where a position does not count, and its error reads 0.  ids, prev (B,T) as in logits.
        backward: adds the gradient of the sum of weights[i] · mask · error over layers and positions (weights (n): default 1). It stays in
        the layer: what comes before only makes its input.  Layers are run once and one at a time, up to the last that is
        compared: both models' activations of one layer are held, so there is nothing to recompute.
        ValueError: a teacher of other sizes or on another backend, layers that do not rise, wrong shapes.

        MOHAWK's second stage (arXiv 2408.10189; "mixer" where its MLPs are frozen) and RADLADS' first step (arXiv 2505.03005, "mixer");
        their code minimises the distance, this is its square.
        """
        ids = _ids(ids)
        if what not in ("mixer", "hidden"):
            raise ValueError(f"what is {what!r}, expected 'mixer' or 'hidden'")
        self._check_teacher(teacher)
        for model in (self, teacher):
            model._set_rope(ids.shape[1])
        if layers is None:
            layers = [i for i, pair in enumerate(zip(self.layer_kinds, teacher.layer_kinds)) if pair[0] != pair[1]]
        layers = _layers(layers)
        mask = _floats(1 if mask is None else mask, "mask", ids.shape)
        weights = _floats(1 if weights is None else weights, "weights", layers.shape)
        given = np.ascontiguousarray(weights[:, None, None] * mask) if backward else None
        errors = self.c.align(ids, teacher.c, layers, given, what == "hidden", own_prefix, _prev(prev, ids.shape))
        return np.where(mask != 0, errors, np.float32(0))

    def _check_teacher(self, teacher):
        if not isinstance(teacher, Model):
            raise ValueError(f"argument 'teacher' must be a Model, got {type(teacher).__name__}")
        if teacher.module is not self.module:
            raise ValueError(f"student and teacher must be on one backend, got {self.module.__name__} and {teacher.module.__name__}")


def need_model(value, name):
    """ValueError in one sentence if it is none, such as a folder's name."""
    if not isinstance(value, Model):
        raise ValueError(f"{name} must be a model, as mil.load(folder) gives one, not {value!r:.60}")


class State:
    """What decoding remembers of `batch` sequences of up to `capacity` tokens: K/V rows, conv inputs, SSM checkpoints and the
    ring of inputs not yet folded into them.  `pos` moves only when tokens are committed.  ValueError for sizes below 1."""

    def __init__(self, model, batch, capacity):
        self.c = model.module.State(model.c, batch, capacity)
        self.model = model

    pos = property(lambda self: self.c.pos, doc="committed tokens (batch,) int32")
    pending = property(lambda self: self.c.pending, doc="tokens that wait for commit (batch,) int32")
    batch = property(lambda self: self.c.batch)
    capacity = property(lambda self: self.c.capacity)
    row_bytes = property(lambda self: self.c.row_bytes, doc="bytes of memory that one row takes")

    def commit(self, n, path=None, rows=None):
        """Accepts the first n[i] pending tokens of row rows[i] (default: all rows), or those at path[i,:n[i]], a branch of a tree.
        ValueError, nothing moved: more than are pending, or a path that does not rise."""
        rows = np.arange(self.batch, dtype=np.int32) if rows is None else np.atleast_1d(_int32(rows, "rows"))
        if path is not None:
            path = np.atleast_2d(_int32(path, "path"))
            if len(path) != len(rows):
                raise ValueError(f"path has {len(path)} rows, expected {len(rows)}")
        self.c.commit(rows, _rows(n, "n", len(rows)), None if path is None else np.ascontiguousarray(path))

    def reset(self, rows=None):
        """Empties the rows (default: all)."""
        self.c.reset(np.arange(self.batch, dtype=np.int32) if rows is None else np.atleast_1d(_int32(rows, "rows")))

    def copy(self, dst, src):
        """Row dst becomes what row src is."""
        self.c.copy(dst, src)

    def save(self, path):
        """Writes the whole State to one .npz file."""
        arrays = self.c.dump()
        with open(path, "wb") as file:
            np.savez(file, *arrays)

    def load(self, path):
        """Reads what save wrote for a model of the same shape, batch and capacity; ValueError otherwise, state untouched."""
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = [np.ascontiguousarray(file[f"arr_{i}"]) for i in range(len(file.files))]
        except Exception as error:  # OSError, KeyError, and whatever zipfile and zlib raise for a damaged file
            raise ValueError(f"{path}: not a saved state ({error})") from None
        self.c.restore(arrays)


def random(config, seed=0, device="cpu", dtype=None):
    """A model with random weights: config.json's dict; "mamba" in it: mamba_config.json's dict, for a hybrid.

    Matrices N(0, initializer_range²) (default 0.02), norms 1, biases 0, Mamba's own parameters as a fresh conversion makes
    them. dtype: default float32. ValueError for what the architecture refuses.
    """
    config = dict(config)
    mamba, std, stops = config.pop("mamba", None), initializer_range(config), stop_ids(config)
    model = Model(config, mamba, device, dtype or "float32")
    model.stop_tokens = stops
    model.c.randomize(int(seed) & (2**64 - 1), std)
    return model
