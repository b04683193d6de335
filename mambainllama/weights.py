"""Files of weights: safetensors and pytorch_model.bin, read and written. A file is memory-mapped and checked before
anything in it is trusted; its tensors are views of the map, so nothing is read before it is used.

Formats: github.com/huggingface/safetensors (README and safetensors/src/tensor.rs for what is refused); PyTorch's zip of a
pickle and one member a storage (torch/serialization.py). The pickle is interpreted here, a dozen opcodes that build dicts
and tensors: there is no code in it that could run."""
import json
import math
import mmap
import os
import pickle
import pickletools
import re
import struct
import zipfile
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from .config import parse_json, read_json, regular, show

# dtype on disk: NumPy's type. BF16 and the 8-bit floats, which NumPy lacks, are their bits.
DTYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "F8_E5M2": "u1", "F8_E4M3": "u1", "BOOL": "?",
    "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1",
}
STORAGES = {
    "torch DoubleStorage": "F64", "torch FloatStorage": "F32", "torch HalfStorage": "F16", "torch BFloat16Storage": "BF16",
    "torch LongStorage": "I64", "torch IntStorage": "I32", "torch ShortStorage": "I16", "torch CharStorage": "I8",
    "torch ByteStorage": "U8", "torch BoolStorage": "BOOL",
}
REBUILD, PARAMETER, DICT = "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter", "collections OrderedDict"
HEADER_BYTES = 100_000_000  # the largest header and the largest pickle that are read: the safetensors crate's limit
MOST_DIMS = 32              # of a tensor, NumPy's limit
MOST_OPCODES = 1 << 18      # of a pickle: a tensor takes some 40


class Weights(Mapping):
    """Tensors by name: read-only arrays that view memory-mapped files, BF16 as uint16 bits. `where`: the folder or file."""

    def __init__(self, where):
        self.where = where
        self._tensors = {}

    def add(self, name, dtype, array):
        self._tensors[name] = dtype, array

    def dtype(self, name):
        """"F32", "BF16", "F16", … as stored."""
        return self._tensors[name][0]

    def __getitem__(self, name):
        return self._tensors[name][1]

    def __iter__(self):
        return iter(self._tensors)

    def __len__(self):
        return len(self._tensors)


def open_weights(folder):
    """The Weights of a model folder: model.safetensors, else its shards, else pytorch_model.bin, else its shards.
    ValueError, one sentence that names the file: none of these, unreadable, broken or hostile content."""
    folder = Path(folder)
    for name, read in (("model.safetensors", read_safetensors), ("pytorch_model.bin", _read_torch)):
        if os.path.lexists(folder / name):
            return read(folder / name)
        if os.path.lexists(folder / f"{name}.index.json"):
            return _read_shards(folder, f"{name}.index.json", read)
    raise ValueError(f"{folder} has no weights, expected model.safetensors, its shards with an index, or pytorch_model.bin")


def _read_shards(folder, index, read):
    files = read_json(folder / index).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
        raise ValueError(f"{folder / index}: weight_map must be an object of file names")
    shards = {}
    for file in sorted(set(files.values())):
        if file in ("", ".", "..") or re.search(r"[/\\\0]", file):
            raise ValueError(f"{folder / index} names the file {show(file)}, expected one in the same folder")
        shards[file] = read(folder / file)
    out = Weights(folder)
    for name, file in files.items():
        if name not in shards[file]:
            raise ValueError(f"{folder / file} lacks the tensor {show(name)} that {index} places there")
        out.add(name, shards[file].dtype(name), shards[file][name])
    return out


def _map(path):
    """A read-only memory map of a regular file that is not empty."""
    try:
        with open(path, "rb", opener=regular) as file:
            if os.fstat(file.fileno()).st_size == 0:
                raise ValueError(f"{path} is empty, expected weights")
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from None


def _shape_is_sound(shape):
    return (isinstance(shape, (list, tuple)) and len(shape) <= MOST_DIMS and all(type(n) is int and 0 <= n < 1 << 62 for n in shape)
            and math.prod(max(n, 1) for n in shape) < 1 << 62)


# ---- safetensors -------------------------------------------------------------------------------------------------------------


def read_safetensors(path):
    """The Weights in one file. ValueError: unreadable, broken or hostile content."""
    data = _map(path)
    if len(data) < 8:
        raise ValueError(f"{path} has {len(data)} bytes, too few for a safetensors header")
    (length,) = struct.unpack("<Q", data[:8])
    if length > min(len(data) - 8, HEADER_BYTES):
        raise ValueError(f"{path}: the header is said to have {length} bytes, and the file has {len(data)} (limit {HEADER_BYTES})")
    header = parse_json(data[8 : 8 + length], f"{path}: the header", unique=True)
    header.pop("__metadata__", None)
    spans = []
    for name, entry in header.items():
        entry = entry if isinstance(entry, dict) else {}
        dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise ValueError(f"{path}: the tensor {show(name)} has the dtype {show(dtype)}, expected one of {', '.join(DTYPES)}")
        if not _shape_is_sound(shape):
            raise ValueError(f"{path}: the tensor {show(name)} has the shape {show(shape)}, expected a list of sizes")
        if not (isinstance(offsets, list) and len(offsets) == 2 and all(type(n) is int for n in offsets)
                and 0 <= offsets[0] <= offsets[1]):
            raise ValueError(f"{path}: the tensor {show(name)} has the offsets {show(offsets)}, expected [begin, end]")
        size = math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize
        if offsets[1] - offsets[0] != size:
            raise ValueError(f"{path}: the tensor {show(name)} of {dtype} {show(shape)} needs {size} bytes, "
                             f"and its offsets give {offsets[1] - offsets[0]}")
        spans.append((*offsets, name, dtype, shape))
    end, out = 0, Weights(path)
    for begin, after, name, dtype, shape in sorted(spans, key=lambda span: span[:2]):
        if begin != end:
            raise ValueError(f"{path}: the tensor {show(name)} begins at byte {begin} of the data, expected {end}: tensors must "
                             "neither overlap nor leave holes")
        end = after
    if 8 + length + end != len(data):
        raise ValueError(f"{path} has {len(data)} bytes, and its header describes {8 + length + end}")
    for begin, after, name, dtype, shape in spans:
        kind = np.dtype(DTYPES[dtype])
        out.add(name, dtype, np.frombuffer(data, kind, math.prod(shape), 8 + length + begin).reshape(shape)
                if after > begin else np.zeros(shape, kind))
    return out


@contextmanager
def writing(path):
    """An OSError of the block becomes one sentence that says which path could not be written."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # a file within the block, which has its sentence
            raise
        raise OSError(f"cannot write {path}: {error.strerror}") from None


@contextmanager
def replacing(path, mark=""):
    """A binary file that becomes `path` when the block ends: written under a temporary name beside it, on disk (fsync) before it
    is renamed. An error leaves the old file whole and no temporary one; an OSError is that of writing. mark: in the temporary name,
    this process's own where several write one path."""
    path = Path(path)
    temporary = path.with_name(path.name + mark + ".tmp")
    with writing(path):
        try:
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            _sync_folder(path.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def _sync_folder(folder):
    handle = os.open(folder, os.O_RDONLY)  # so that a power cut does not undo a rename
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_weights(path, tensors, max_shard_bytes=5 << 30):
    """Writes tensors, a Mapping name -> float32 array or uint16 array (bfloat16 bits), as safetensors to path
    (…/model.safetensors). Above max_shard_bytes: shards beside it, model-00001-of-00002.safetensors …, and
    path.index.json. Tensors are asked for one at a time, twice (type, then content), and not kept.

    The weights that path held are whole until the last rename, and their shards go after it. ValueError: a tensor of another
    dtype; OSError, one sentence that names the file: it cannot be written."""
    path = Path(path)
    sizes = {}
    for name in tensors:
        array = np.asarray(tensors[name])
        if array.dtype not in (np.float32, np.uint16):
            raise ValueError(f"write_weights: {name} is {array.dtype}, expected float32 or uint16 (bfloat16 bits)")
        sizes[name] = "F32" if array.dtype == np.float32 else "BF16", array.shape, array.nbytes
    shards, room = [[]], max_shard_bytes
    for name in sorted(sizes, key=lambda name: sizes[name][0] == "BF16"):  # float32 first: all are aligned
        if shards[-1] and sizes[name][2] > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(name)
        room -= sizes[name][2]
    index = path.with_name(path.name + ".index.json")
    old = _shards_of(path)
    if len(shards) == 1:
        write_safetensors(path, shards[0], sizes, tensors)
        stale = [index, *old]
    else:
        files = _unused_names(path, len(shards), old)
        try:
            for file, names in zip(files, shards):
                write_safetensors(file, names, sizes, tensors)
            places = {name: file.name for file, names in zip(files, shards) for name in names}
            total = sum(size for _, _, size in sizes.values())
            with replacing(index) as file:
                file.write(json.dumps({"metadata": {"total_size": total}, "weight_map": places}, indent=2).encode())
        except BaseException:
            for file in files:
                file.unlink(missing_ok=True)
            raise
        stale = [path, *old]  # path goes first: readers prefer it to the index
    for file in stale:
        file.unlink(missing_ok=True)


def write_safetensors(path, names, sizes, tensors, mark=""):
    """Writes the named tensors to one file; sizes: name -> (dtype as in DTYPES, shape, bytes); mark: as in replacing."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name in names:
        dtype, shape, size = sizes[name]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path, mark) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in names:
            file.write(np.ascontiguousarray(tensors[name]).reshape(-1).view(np.uint8).data)


def widened(bits):
    """bf16's bits, uint16, as float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def rounded(values):
    """The bits of the nearest bf16 of float32, the even one of two."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def write_torch(path, tensors):
    """Writes tensors, as write_weights takes them, to path (…/pytorch_model.bin) as torch.save writes a state_dict: a zip of a pickle and
    one member a tensor. model.safetensors beside it, which readers prefer, goes afterwards. Errors as write_weights."""
    path = Path(path)

    def pickled(value):
        return pickle.dumps(value, 2)[2:-1]  # without its protocol and its end

    with replacing(path) as file, zipfile.ZipFile(file, "w") as archive:  # members are stored

        def member(name, data):
            with archive.open(zipfile.ZipInfo(f"{path.stem}/{name}"), "w", force_zip64=len(data) > 1 << 31) as to:
                to.write(data)

        opcodes = [b"\x80\x02}("]
        for i, name in enumerate(tensors):
            array = np.ascontiguousarray(tensors[name])
            if array.dtype not in (np.float32, np.uint16):
                raise ValueError(f"write_torch: {name} is {array.dtype}, expected float32 or uint16 (bfloat16 bits)")
            kind = b"FloatStorage" if array.dtype == np.float32 else b"BFloat16Storage"
            strides = tuple(stride // array.itemsize for stride in array.strides)
            opcodes += [pickled(name), b"ctorch._utils\n_rebuild_tensor_v2\n((", pickled("storage"), b"ctorch\n" + kind + b"\n", pickled(str(i)),
                        pickled("cpu"), pickled(array.size), b"tQ", pickled(0), pickled(array.shape), pickled(strides),
                        b"\x89ccollections\nOrderedDict\n)RtR"]
            member(f"data/{i}", array.reshape(-1).view(np.uint8).data)
        member("data.pkl", b"".join(opcodes) + b"u.")
        member("byteorder", b"little")
        member("version", b"3\n")
    whole = path.with_name("model.safetensors")
    for file in (whole, whole.with_name(whole.name + ".index.json"), *_shards_of(whole)):
        file.unlink(missing_ok=True)


def _shards_of(path):
    """The files beside path that are named like its shards, left over ones of a killed run included."""
    pattern = re.compile(re.escape(path.stem) + r"(-v\d+)?-\d{5}-of-\d{5}" + re.escape(path.suffix) + r"(\.tmp)?")
    return [file for file in path.parent.iterdir() if pattern.fullmatch(file.name)] if path.parent.is_dir() else []


def _unused_names(path, count, old):
    """Names for new shards beside the old ones: a shard replaced in place would leave a mixture behind if we were killed."""
    taken, version = {file.name for file in old}, 0
    while True:
        mark = f"-v{version}" if version else ""
        names = [f"{path.stem}{mark}-{i + 1:05d}-of-{count:05d}{path.suffix}" for i in range(count)]
        if not taken.intersection(names):
            return [path.with_name(name) for name in names]
        version += 1


# ---- pytorch_model.bin -------------------------------------------------------------------------------------------------------


class _Global(str):
    """What a pickle names: "module name". Never looked up."""


class _Storage:
    def __init__(self, dtype, array):
        self.dtype, self.array = dtype, array


class _Tensor:
    def __init__(self, dtype, array):
        self.dtype, self.array = dtype, array


def _read_torch(path):
    data = _map(path)
    members = _members(path, data)
    pickles = [name for name in members if name.split("/")[1:] == ["data.pkl"]]
    if len(pickles) != 1:
        raise ValueError(f"{path} has {len(pickles)} members data.pkl, expected one, as torch.save writes it")
    root = pickles[0].split("/")[0]
    if f"{root}/byteorder" in members and bytes(members[f"{root}/byteorder"]) != b"little":
        raise ValueError(f"{path} is not in little-endian byte order")
    pickle = bytes(members[pickles[0]][: HEADER_BYTES + 1])
    if len(pickle) > HEADER_BYTES:
        raise ValueError(f"{path}: data.pkl is larger than {HEADER_BYTES} bytes")
    try:
        state = _Pickle(path, members, root).load(pickle)
    except (IndexError, KeyError, TypeError):  # a stack that is empty, a memo that was not written, a list that is none
        raise ValueError(f"{path}: data.pkl is damaged") from None
    if not isinstance(state, dict):
        raise ValueError(f"{path} holds {type(state).__name__.strip('_')}, expected a dict of tensors")
    out = Weights(path)
    for name, value in state.items():
        if not isinstance(value, _Tensor):
            raise ValueError(f"{path}: {show(name)} is not a tensor")
        out.add(name, value.dtype, value.array)
    return out


def _members(path, data):
    """{name: memoryview of the map} of a zip whose members are stored uncompressed, as torch.save's are."""
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, IndexError, OverflowError, struct.error, OSError):
        raise ValueError(f"{path} is not a zip archive, expected one as torch.save writes it since PyTorch 1.6") from None
    out, view = {}, memoryview(data)
    for info in infos:
        begin = info.header_offset
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 or info.file_size != info.compress_size:
            raise ValueError(f"{path}: the member {show(info.filename)} is compressed or encrypted, expected it stored")
        if not 0 <= begin <= len(view) - 30 or bytes(view[begin : begin + 4]) != b"PK\3\4":
            raise ValueError(f"{path}: the member {show(info.filename)} is not where the archive says")
        begin += 30 + sum(struct.unpack("<HH", view[begin + 26 : begin + 30]))
        if not 0 <= info.file_size <= len(view) - begin or info.filename in out:
            raise ValueError(f"{path}: the member {show(info.filename)} is cut off or there twice")
        out[info.filename] = view[begin : begin + info.file_size]
    return out


class _Pickle:
    """Interpreter of the opcodes that a pickled state_dict consists of. Values: None, numbers, strings, tuples, lists, dicts with
    string keys, _Global, _Storage, _Tensor. (pickle.Unpickler would hash what it is given as a key and grow its memo to any
    index, so a small file could hang it or fill the memory; it is not used.)"""

    def __init__(self, path, members, root):
        self.path, self.members, self.root = path, members, root
        self.stack, self.marks, self.memo, self.storages = [], [], {}, {}

    def load(self, pickle):
        stack, memo = self.stack, self.memo
        try:
            for i, (op, arg, _) in enumerate(pickletools.genops(pickle)):
                name = op.name
                if i >= MOST_OPCODES:
                    raise ValueError(f"{self.path}: data.pkl has more than {MOST_OPCODES} opcodes, expected a dict of tensors")
                if name == "STOP":
                    return stack.pop()
                if name in _IGNORED:
                    continue
                if name in _CONSTANTS:
                    stack.append(_CONSTANTS[name])
                elif name in _LITERALS:
                    stack.append(arg)
                elif name in ("EMPTY_LIST", "EMPTY_DICT"):
                    stack.append([] if name == "EMPTY_LIST" else {})
                elif name == "MARK":
                    self.marks.append(len(stack))
                elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
                    memo[arg] = stack[-1]
                elif name == "MEMOIZE":
                    memo[len(memo)] = stack[-1]
                elif name in ("GET", "BINGET", "LONG_BINGET"):
                    stack.append(memo[arg])
                elif name == "GLOBAL":
                    stack.append(self.named(arg))
                elif name == "STACK_GLOBAL":
                    module, attribute = self.pop(2)
                    stack.append(self.named(f"{module} {attribute}" if type(module) is type(attribute) is str else ""))
                elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
                    stack.append(tuple(self.pop(int(name[-1]))))
                elif name == "TUPLE":
                    stack.append(tuple(self.marked()))
                elif name in ("APPEND", "APPENDS"):
                    values = self.marked() if name == "APPENDS" else self.pop(1)
                    self.top(list).extend(values)
                elif name in ("SETITEM", "SETITEMS"):
                    values = self.marked() if name == "SETITEMS" else self.pop(2)
                    if len(values) % 2 or not all(type(key) is str for key in values[::2]):
                        raise ValueError(f"{self.path}: data.pkl has a dict whose keys are not strings")
                    self.top(dict).update(zip(values[::2], values[1::2]))
                elif name == "BINPERSID":
                    stack.append(self.storage(stack.pop()))
                elif name == "REDUCE":
                    function, args = self.pop(2)
                    stack.append(self.call(function, args))
                elif name == "BUILD":
                    stack.pop()  # state_dict's _metadata, an attribute of its OrderedDict
                    self.top(dict)
                else:
                    raise ValueError(f"{self.path}: data.pkl uses {name}, which no file of weights needs (nothing was executed)")
        except ValueError as error:
            if str(error).startswith(str(self.path)):
                raise
            raise ValueError(f"{self.path}: data.pkl is damaged: {error}") from None
        raise ValueError(f"{self.path}: data.pkl is damaged: it does not end")

    def pop(self, n):
        if len(self.stack) < n:
            raise IndexError
        values = self.stack[-n:]
        del self.stack[-n:]
        return values

    def marked(self):
        mark = self.marks.pop()
        values = self.stack[mark:]
        del self.stack[mark:]
        return values

    def top(self, kind):
        if type(self.stack[-1]) is not kind:
            raise TypeError
        return self.stack[-1]

    def named(self, name):
        if name not in STORAGES and name not in (REBUILD, PARAMETER, DICT):
            raise ValueError(f"{self.path}: data.pkl calls {show(name.replace(' ', '.'))}, which a file of weights has no use for "
                             "(nothing was executed)")
        return _Global(name)

    def call(self, function, args):
        if type(function) is not _Global or type(args) is not tuple:
            raise TypeError
        if function == DICT and not args:
            return {}
        if function == PARAMETER and type(args[0]) is _Tensor:
            return args[0]
        if function == REBUILD and type(args[0]) is _Storage:
            return self.tensor(*args[:4])
        raise ValueError(f"{self.path}: data.pkl calls {function.replace(' ', '.')} with arguments that are not a tensor's")

    def storage(self, description):
        _, kind, key, _, count = description  # ("storage", type, key, device, elements)
        if type(kind) is not _Global or kind not in STORAGES or type(key) is not str or type(count) is not int:
            raise TypeError
        if key not in self.storages:
            dtype = np.dtype(DTYPES[STORAGES[kind]])
            bytes_ = self.members.get(f"{self.root}/data/{key}")
            if bytes_ is None or not 0 <= count * dtype.itemsize <= len(bytes_):
                raise ValueError(f"{self.path}: the storage {show(key)} of {show(count)} elements is missing or too short")
            self.storages[key] = _Storage(STORAGES[kind], np.frombuffer(bytes_, dtype, count) if count else np.zeros(0, dtype))
        return self.storages[key]

    def tensor(self, storage, offset, shape, strides):
        elements, flat = math.prod(shape) if _shape_is_sound(shape) else -1, storage.array
        sound = (elements >= 0 and type(offset) is int and type(strides) is tuple and len(strides) == len(shape)
                 and all(type(n) is int and 0 <= n < 1 << 62 for n in strides))
        # elements <= storage: a tensor expanded by strides of zero could claim any amount of memory
        if not sound or not 0 <= offset <= flat.size - (
                1 + sum((n - 1) * stride for n, stride in zip(shape, strides)) if elements else 0) or elements > flat.size:
            raise ValueError(f"{self.path}: a tensor of shape {show(shape)}, strides {show(strides)} and offset {show(offset)} "
                             f"does not lie within its storage of {flat.size} elements")
        strides = tuple(stride * flat.itemsize if n > 1 else 0 for n, stride in zip(shape, strides))
        return _Tensor(storage.dtype, np.lib.stride_tricks.as_strided(flat[offset:], shape, strides, writeable=False)
                       if elements else np.zeros(shape, flat.dtype))


_IGNORED = {"PROTO", "FRAME"}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_LITERALS = {"BININT", "BININT1", "BININT2", "LONG1", "LONG4", "INT", "LONG", "BINFLOAT", "FLOAT", "BINUNICODE", "SHORT_BINUNICODE",
             "BINUNICODE8", "UNICODE"}
