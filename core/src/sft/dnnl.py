"""oneDNN's C functions, by ctypes, in the library that paddle's own wheel carries: an engine, and reorders.

A reorder copies values to another layout, another type, or both. Threads are paddle's: the wheel binds both to one
libiomp5.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from ctypes import byref, c_char_p, c_int, c_int64, c_size_t, c_uint, c_void_p
from typing import Any

from sft import runtime

BFLOAT16, FLOAT32 = 2, 3  # dnnl_data_type_t
_CPU, _IN_ORDER = 1, 1  # dnnl_engine_kind_t, dnnl_stream_flags_t
_SOURCE, _TARGET = 1, 17  # DNNL_ARG_FROM, DNNL_ARG_TO
_Dims = c_int64 * 12


class _Version(ctypes.Structure):
    _fields_ = (
        *(("major", c_int), ("minor", c_int), ("patch", c_int), ("hash", c_char_p)),
        *(("cpu_runtime", c_uint), ("gpu_runtime", c_uint)),
    )


class _Argument(ctypes.Structure):
    _fields_ = (("which", c_int), ("memory", c_void_p))


class OneDNNError(RuntimeError):
    """oneDNN could not do what it was asked for."""


def library() -> Any | None:
    """The oneDNN of the imported paddle; None where this build has none."""
    return runtime.library("libdnnl.so.3")


def check(status: int) -> None:
    """Raise :class:`OneDNNError` for what a function of the library returned, unless all went well."""
    if status:
        raise OneDNNError(f"paddle's oneDNN returned status {status}")


class Engine:
    """This processor, as a library computes on it.

    Attributes:
        library: The library.
        lock: To be held while anything is run.
    """

    def __init__(self, library: Any) -> None:
        """Raises :class:`OneDNNError` where the library is another than this was written for, and ``AttributeError``
        where it lacks a function."""
        self.library, self.lock = library, threading.Lock()
        library.dnnl_version.restype = ctypes.POINTER(_Version)
        version = library.dnnl_version().contents
        if version.major != 3:
            raise OneDNNError(f"paddle's oneDNN is version {version.major}.{version.minor}, and 3 is known here")
        library.dnnl_memory_set_data_handle.argtypes = (c_void_p, c_void_p)
        library.dnnl_primitive_execute.argtypes = (c_void_p, c_void_p, c_int, c_void_p)
        self.handle, self.stream = c_void_p(), c_void_p()
        check(library.dnnl_engine_create(byref(self.handle), _CPU, c_size_t(0)))
        check(library.dnnl_stream_create(byref(self.stream), self.handle, _IN_ORDER))


class Reorder:
    """Of values of one ``shape``: from a type and strides, in values, to a type and strides."""

    def __init__(
        self,
        engine: Engine,
        shape: Sequence[int],
        source: tuple[int, Sequence[int]],
        target: tuple[int, Sequence[int]],
    ) -> None:
        """It takes 0.03 ms, since oneDNN keeps its code. Raises :class:`OneDNNError`."""
        self._engine, library = engine, engine.library
        self._made: list[tuple[Any, c_void_p]] = []
        try:
            forms = [
                self._new(
                    *(library.dnnl_memory_desc_create_with_strides, library.dnnl_memory_desc_destroy),
                    *(len(shape), _Dims(*shape), dtype, _Dims(*strides)),
                )
                for dtype, strides in (source, target)
            ]
            ends = [value for form in forms for value in (form, engine.handle)]
            description = self._new(
                library.dnnl_reorder_primitive_desc_create, library.dnnl_primitive_desc_destroy, *ends, None
            )
            self._primitive = self._new(library.dnnl_primitive_create, library.dnnl_primitive_destroy, description)
            self._memories = [
                self._new(library.dnnl_memory_create, library.dnnl_memory_destroy, form, engine.handle, None)
                for form in forms
            ]
        except BaseException:
            self.close()
            raise
        which = zip((_SOURCE, _TARGET), self._memories, strict=True)
        self._arguments = (_Argument * 2)(*(_Argument(place, memory) for place, memory in which))

    def _new(self, create: Any, destroy: Any, *given: Any) -> c_void_p:
        made = c_void_p()
        check(create(byref(made), *given))
        self._made.append((destroy, made))
        return made

    def run(self, source: int, target: int) -> None:
        """Between two addresses, while the engine's lock is held. Raises :class:`OneDNNError`."""
        library, stream = self._engine.library, self._engine.stream
        for memory, address in zip(self._memories, (source, target), strict=True):
            check(library.dnnl_memory_set_data_handle(memory, address))
        check(library.dnnl_primitive_execute(self._primitive, stream, 2, self._arguments))
        check(library.dnnl_stream_wait(stream))

    def close(self) -> None:
        """Give back what it holds; it is not to be run any more."""
        while self._made:
            destroy, one = self._made.pop()
            destroy(one)
