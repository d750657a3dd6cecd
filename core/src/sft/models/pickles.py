"""Tensors out of pickled weight files, as ``paddle.save`` and ``torch.save`` write them; no code in them is run.

A pickle says which functions to call to put its objects together, so whoever opens one with Python's own unpickler runs
whatever its author liked. Here the few names that tensors need stand for functions of this module, which build
numpy arrays and nothing else; any other name is refused. Not even numpy's own are lent: a forged state of a real dtype
makes numpy take numbers for pointers. And whatever a file gives as a number is held to be a plain int before anything
is computed with it: with numpy's the sums wrap round, and a bound is kept that is none.

It is Python's unpickler in Python, not the one in C: there a number in the file says how long a table is to be, and a
tuple of tuples as a key overruns the stack. A file of weights takes some ten operations a tensor, so it is as quick.
"""

from __future__ import annotations

import math
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from sft.errors import UsageError

_NAMES = "StructuredToParameterName@@"
"""Where paddle keeps the parameters' names in its own graph; they mean nothing here."""
_CHUNKS = "UnpackBigParamInfor@@"
"""Where paddle says, in protocols 2 and 3, which parts a tensor of a gibibyte or more was cut into."""
_TYPES = frozenset("b1 i1 u1 i2 u2 i4 u4 i8 u8 f2 f4 f8".split())
_TORCH_TYPES = {
    "DoubleStorage": "<f8",
    "FloatStorage": "<f4",
    "HalfStorage": "<f2",
    "BFloat16Storage": "<u2",  # the same bits, as paddle has them in numpy
    "LongStorage": "<i8",
    "IntStorage": "<i4",
    "ShortStorage": "<i2",
    "CharStorage": "<i1",
    "ByteStorage": "<u1",
    "BoolStorage": "|b1",
}


def read_pickled(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a file by name, in the file's layout and dtype; bfloat16 is uint16 of the same bits.

    Raises :class:`UsageError` for a file that is damaged, or that holds anything but tensors.
    """
    try:
        with path.open("rb") as stream:
            is_zip = stream.read(4) == b"PK\x03\x04"
            stream.seek(0)
            found = _from_torch(path) if is_zip else _PaddleUnpickler(stream).load()
            return _tensors(found)
    except _RefusedError as error:
        raise UsageError(
            f"{path} {_shown(error)}, where weights have nothing but tensors, so it is not read; "
            "get the model as safetensors."
        ) from error
    except Exception as error:
        raise UsageError(
            f"{path} is not a readable file of weights ({_shown(error) or type(error).__name__}); "
            "copy it again, or get the model as safetensors."
        ) from error


def _shown(error: Exception) -> str:
    """What an error says in one line; words of the file may be in it."""
    line = " ".join(str(error).split())[:200]
    return "".join(character if character.isprintable() else "?" for character in line)


class _RefusedError(Exception):
    pass


class _DType:
    """What stands for a numpy dtype while an array is put together: its letters, such as f4, and its byte order."""

    def __init__(self, letters: Any, *flags: Any) -> None:
        if type(letters) is not str or letters not in _TYPES:
            raise _RefusedError(f"holds numpy arrays of dtype {_named(letters)}")
        self.letters, self.order = letters, "<"

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = ">" if state[1] == ">" else "<"


class _Array:
    """What stands for a numpy array, whose own state no file may set."""

    def __init__(self, value: np.ndarray | None = None) -> None:
        self.value = value

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, is_fortran, content = state
        if not isinstance(dtype, _DType) or type(content) is not bytes:
            raise ValueError("an array has no content")
        shape = _counts(shape)
        flat = np.frombuffer(content, np.dtype(dtype.order + dtype.letters))
        flat = flat.astype(flat.dtype.newbyteorder("="), copy=False)
        self.value = flat.reshape(shape, order="F" if is_fortran else "C")


class _Storage:
    """What stands for a storage of torch: the values that tensors lie in, in one row."""

    def __init__(self, values: np.ndarray) -> None:
        self.values = values


_PythonUnpickler: Any = pickle._Unpickler


class _Unpickler(_PythonUnpickler):
    """Admits the names in ``admitted``, and gives what stands there for them."""

    admitted: dict[str, Callable[..., Any] | str]
    dispatch = dict(_PythonUnpickler.dispatch)

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" not in self.admitted:
            raise _RefusedError(f"calls {module}.{name}"[:100])
        return self.admitted[f"{module}.{name}"]

    def load_build(self) -> None:
        """Give the state on top of the stack to the object below: to those alone that expect one."""
        state = self.stack.pop()
        if isinstance(self.stack[-1], (_DType, _Array)):
            self.stack[-1].__setstate__(state)
        elif not isinstance(self.stack[-1], OrderedDict):  # torch's versions of modules, which say nothing here
            raise _RefusedError(f"sets the state of a {type(self.stack[-1]).__name__}")

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        _put(self.stack[-1], [key, value])

    def load_setitems(self) -> None:
        items = self.pop_mark()
        _put(self.stack[-1], items)

    def load_dict(self) -> None:
        items = self.pop_mark()
        self.append(_put({}, items))

    def load_set(self) -> None:
        raise _RefusedError("holds a set")

    dispatch[pickle.BUILD[0]] = load_build
    dispatch[pickle.SETITEM[0]] = load_setitem
    dispatch[pickle.SETITEMS[0]] = load_setitems
    dispatch[pickle.DICT[0]] = load_dict
    for _code in (pickle.EMPTY_SET, pickle.ADDITEMS, pickle.FROZENSET):
        dispatch[_code[0]] = load_set


def _put(target: Any, items: list[Any]) -> Any:
    """Set keys and values, which alternate in ``items``; only what is hashed without descending may be a key."""
    if not isinstance(target, dict):
        raise ValueError("items are set in what has none")
    for key, value in zip(items[::2], items[1::2], strict=True):
        if type(key) not in (str, int):
            raise _RefusedError(f"names something by a {type(key).__name__}")
        target[key] = value
    return target


def _counts(numbers: Any) -> tuple[int, ...]:
    """``numbers``, if they are plain ints of 0 or more: not bools, and nothing of numpy's, whose sums wrap round."""
    if type(numbers) not in (tuple, list) or not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError("a size is not a whole number of 0 or more")
    return tuple(numbers)


def _named(what: Any) -> str:
    """What a file gives as a name, for a message; it may be any object."""
    return repr(what[:40]) if type(what) is str else type(what).__name__


class _PaddleUnpickler(_Unpickler):
    def __init__(self, stream: Any) -> None:
        super().__init__(stream, encoding="latin1")
        # Functions of this unpickler alone: what a pickle sets on one is gone with it.
        self.admitted = {
            "numpy.ndarray": "ndarray",
            "numpy.dtype": lambda *state: _DType(*state),
            "_codecs.encode": lambda text, _: text.encode("latin1"),  # bytes, in protocol 2
            "collections.OrderedDict": lambda: OrderedDict(),
        }
        for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            self.admitted[f"{module}._reconstruct"] = lambda *_: _Array()
        for module in ("builtins", "__builtin__"):
            self.admitted[f"{module}.tuple"] = tuple  # (name, array): a tensor outside a state dict
            self.admitted[f"{module}.bytes"] = lambda: b""  # of an empty tensor, in protocol 2


class _TorchUnpickler(_Unpickler):
    def __init__(self, stream: Any, storage: Callable[[str, str, int], _Storage]) -> None:
        super().__init__(stream)
        self.storage = storage
        self.admitted = {
            "collections.OrderedDict": lambda: OrderedDict(),
            "torch._utils._rebuild_tensor_v2": lambda *parts: _rebuild(*parts[:4]),
            "torch._utils._rebuild_parameter": lambda data, *_: data,
            **{f"torch.{name}": dtype for name, dtype in _TORCH_TYPES.items()},
        }

    def persistent_load(self, what: Any) -> _Storage:
        kind, dtype, key, _, count = what
        if type(kind) is not str or kind != "storage" or type(dtype) is not str or dtype not in _TORCH_TYPES.values():
            raise _RefusedError(f"asks for a {_named(kind)} of {_named(dtype)}")
        if type(key) is not str:
            raise ValueError("a storage has no name")
        return self.storage(dtype, key, *_counts((count,)))


def _from_torch(path: Path) -> Any:
    """What is in a zip file of torch 1.6 or later; storages are mapped, and read when they are needed."""
    with zipfile.ZipFile(path) as archive:
        (pickled,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
        root = pickled[: -len("data.pkl")]
        if f"{root}byteorder" in archive.namelist():
            with archive.open(f"{root}byteorder") as stream:
                if stream.read(16) != b"little":
                    raise ValueError("it is big-endian")
        mapped: dict[str, np.ndarray] = {}

        def storage(dtype: str, key: str, count: int) -> _Storage:
            if key not in mapped:
                mapped[key] = _mapped(path, archive.getinfo(f"{root}data/{key}"))
            values = mapped[key].view(dtype)
            if count > values.size:
                raise ValueError(f"storage {key} is shorter than it says")
            return _Storage(values[:count])

        if archive.getinfo(pickled).compress_type != zipfile.ZIP_STORED:
            raise ValueError("its tensors are compressed")
        with archive.open(pickled) as stream:
            return _TorchUnpickler(stream, storage).load()


def _mapped(path: Path, entry: zipfile.ZipInfo) -> np.ndarray:
    """The bytes of an entry that is stored as it is, where they lie in the file."""
    if entry.compress_type != zipfile.ZIP_STORED:
        raise ValueError("its tensors are compressed")
    if not entry.file_size:
        return np.zeros(0, np.uint8)
    with path.open("rb") as stream:
        stream.seek(entry.header_offset + 26)  # the lengths of name and extra field, which come before the content
        lengths = stream.read(4)
    start = entry.header_offset + 30 + int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")
    if start < 0 or start + entry.file_size > path.stat().st_size:
        raise ValueError("a storage reaches beyond the file")
    return np.memmap(path, np.uint8, "r", start, (entry.file_size,))


def _rebuild(storage: Any, offset: Any, shape: Any, strides: Any) -> _Array:
    """The tensor that lies in ``storage`` from ``offset`` on, with ``strides`` in values."""
    (offset,), shape, strides = _counts((offset,)), _counts(shape), _counts(strides)
    if not isinstance(storage, _Storage) or len(shape) != len(strides):
        raise ValueError("a tensor has no storage")
    values = storage.values
    if 0 in shape:
        return _Array(np.zeros(shape, values.dtype))
    steps = [stride if size > 1 else 0 for size, stride in zip(shape, strides, strict=True)]
    last = offset + sum((size - 1) * step for size, step in zip(shape, steps, strict=True))
    if last >= values.size or math.prod(shape) > values.size:
        raise ValueError("a tensor reaches beyond its storage")
    size = values.itemsize
    # numpy checks this against the buffer once more, which as_strided does not.
    return _Array(np.ndarray(shape, values.dtype, values, offset * size, [step * size for step in steps]))


def _tensors(found: Any) -> dict[str, np.ndarray]:
    """What was unpickled as tensors by name; :class:`_RefusedError` for what is none."""
    if not isinstance(found, dict):
        raise _RefusedError(f"holds {type(found).__name__} in place of tensors by name")
    found.pop(_NAMES, None)
    chunks = found.pop(_CHUNKS, {})
    tensors: dict[str, np.ndarray] = {}
    for name, value in found.items():
        if isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], str):
            value = value[1]
        if isinstance(value, _Array):
            value = value.value
        if not isinstance(name, str) or not isinstance(value, np.ndarray):
            raise _RefusedError(f"holds {type(value).__name__} under {str(name)[:80]!r}")
        tensors[name] = value
    for name, about in chunks.items():
        shape, names = _counts(about["OriginShape"]), about["slices"]
        if type(names) not in (tuple, list) or not all(type(part) is str for part in names):
            raise ValueError(f"the parts of {name} have no names")
        parts = [tensors.pop(part) for part in names]
        if math.prod(shape) != sum(part.size for part in parts):
            raise ValueError(f"the parts of {name} do not add up")
        tensors[name] = np.concatenate(parts).reshape(shape)
    return tensors
