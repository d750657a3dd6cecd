"""Tensors out of pickled weight files, as ``paddle.save`` and ``torch.save`` write them; no code in them is run.

A pickle says which functions to call to put its objects together, so whoever opens one with Python's own unpickler runs
whatever its author liked. Here the few names that tensors need stand for functions of this module, which build
numpy arrays and nothing else; any other name is refused. Not even numpy's own are lent: a forged state of a real dtype
makes numpy take numbers for pointers.
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
        if letters not in _TYPES:
            raise _RefusedError(f"holds numpy arrays of dtype {str(letters)[:40]!r}")
        self.letters, self.order = letters, "<"

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = ">" if state[1] == ">" else "<"


class _Array:
    """What stands for a numpy array until its content has come."""

    value: np.ndarray

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, is_fortran, content = state
        flat = np.frombuffer(content, np.dtype(dtype.order + dtype.letters))
        flat = flat.astype(flat.dtype.newbyteorder("="), copy=False)
        self.value = flat.reshape(shape, order="F" if is_fortran else "C")


class _Unpickler(pickle.Unpickler):
    """Admits the names in ``admitted``, and gives what stands there for them."""

    admitted: dict[str, Callable[..., Any] | str]

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" not in self.admitted:
            raise _RefusedError(f"calls {module}.{name}"[:100])
        return self.admitted[f"{module}.{name}"]


class _PaddleUnpickler(_Unpickler):
    def __init__(self, stream: Any) -> None:
        super().__init__(stream, encoding="latin1")
        # Functions of this unpickler alone: what a pickle sets on one is gone with it.
        self.admitted = {
            "numpy.ndarray": "ndarray",
            "numpy.dtype": lambda *state: _DType(*state),
            "_codecs.encode": lambda text, _: text.encode("latin1"),  # bytes, in protocol 2
            "collections.OrderedDict": OrderedDict,
        }
        for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            self.admitted[f"{module}._reconstruct"] = lambda *_: _Array()
        for module in ("builtins", "__builtin__"):
            self.admitted[f"{module}.tuple"] = tuple  # (name, array): a tensor outside a state dict
            self.admitted[f"{module}.bytes"] = lambda: b""  # of an empty tensor, in protocol 2


class _TorchUnpickler(_Unpickler):
    def __init__(self, stream: Any, storage: Callable[[str, str, int], np.ndarray]) -> None:
        super().__init__(stream)
        self.storage = storage
        self.admitted = {
            "collections.OrderedDict": OrderedDict,
            "torch._utils._rebuild_tensor_v2": lambda *parts: _rebuild(*parts[:4]),
            "torch._utils._rebuild_parameter": lambda data, *_: data,
            **{f"torch.{name}": dtype for name, dtype in _TORCH_TYPES.items()},
        }

    def persistent_load(self, what: Any) -> np.ndarray:
        kind, dtype, key, _, count = what
        if kind != "storage" or dtype not in _TORCH_TYPES.values():
            raise _RefusedError(f"asks for a {str(kind)[:40]} of {str(dtype)[:40]}")
        return self.storage(dtype, key, count)


def _from_torch(path: Path) -> Any:
    """What is in a zip file of torch 1.6 or later; storages are mapped, and read when they are needed."""
    with zipfile.ZipFile(path) as archive:
        (pickled,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
        root = pickled[: -len("data.pkl")]
        if f"{root}byteorder" in archive.namelist() and archive.read(f"{root}byteorder") != b"little":
            raise ValueError("it is big-endian")
        mapped: dict[str, np.ndarray] = {}

        def storage(dtype: str, key: str, count: int) -> np.ndarray:
            if key not in mapped:
                mapped[key] = _mapped(path, archive.getinfo(f"{root}data/{key}"))
            return mapped[key].view(dtype)[:count]

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
    return np.memmap(path, np.uint8, "r", start, (entry.file_size,))


def _rebuild(storage: np.ndarray, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> np.ndarray:
    """The tensor that lies in ``storage`` from ``offset`` on, with ``strides`` in values."""
    if min((offset, *shape, *strides)) < 0 or len(shape) != len(strides):
        raise ValueError("a tensor has a negative size")
    if 0 in shape:
        return np.zeros(shape, storage.dtype)
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if last >= storage.size:
        raise ValueError("a tensor reaches beyond its storage")
    steps = [stride * storage.itemsize for stride in strides]
    return np.lib.stride_tricks.as_strided(storage[offset:], shape, steps, writeable=False)


def _tensors(found: Any) -> dict[str, np.ndarray]:
    """What was unpickled as tensors by name; :class:`_RefusedError` for what is none."""
    if not isinstance(found, dict):
        raise _RefusedError(f"holds {type(found).__name__} in place of tensors by name")
    found.pop(_NAMES, None)
    chunks = found.pop(_CHUNKS, {})
    tensors = {}
    for name, value in found.items():
        if isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], str):
            value = value[1]
        if isinstance(value, _Array):
            value = value.value
        if not isinstance(name, str) or not isinstance(value, np.ndarray):
            raise _RefusedError(f"holds {type(value).__name__} under {str(name)[:80]!r}")
        tensors[name] = value
    for name, about in chunks.items():
        shape, parts = about["OriginShape"], [tensors.pop(part) for part in about["slices"]]
        if math.prod(shape) != sum(part.size for part in parts):
            raise ValueError(f"the parts of {name} do not add up")
        tensors[name] = np.concatenate(parts).reshape(shape)
    return tensors
