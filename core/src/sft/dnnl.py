"""oneDNN's C functions, by ctypes, in the library that paddle's own wheel carries: an engine, reorders, and products
with a matrix in a layout of oneDNN's own.

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
_SOURCE, _TARGET, _WEIGHTS = 1, 17, 33  # DNNL_ARG_FROM, DNNL_ARG_TO, DNNL_ARG_WEIGHTS
_ANY = 1  # dnnl_format_tag_any
_WEIGHTS_FORM = 131  # dnnl_query_weights_md
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
        library.dnnl_primitive_desc_query_md.argtypes = (c_void_p, c_int, c_int)
        library.dnnl_primitive_desc_query_md.restype = c_void_p
        library.dnnl_memory_desc_get_size.argtypes = (c_void_p,)
        library.dnnl_memory_desc_get_size.restype = c_size_t
        self.handle, self.stream = c_void_p(), c_void_p()
        check(library.dnnl_engine_create(byref(self.handle), _CPU, c_size_t(0)))
        check(library.dnnl_stream_create(byref(self.stream), self.handle, _IN_ORDER))


class _Primitive:
    """What oneDNN computes, and the objects of the library that this takes, which it gives back in the end."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self._library = engine, engine.library
        self._made: list[tuple[Any, c_void_p]] = []

    def _new(self, create: Any, destroy: Any, *given: Any) -> c_void_p:
        made = c_void_p()
        check(create(byref(made), *given))
        self._made.append((destroy, made))
        return made

    def _form(self, shape: Sequence[int], dtype: int, strides: Sequence[int] | None) -> c_void_p:
        """A memory descriptor; of a layout that oneDNN chooses where there are no ``strides``."""
        laid: Any = _ANY
        create = self._library.dnnl_memory_desc_create_with_tag
        if strides is not None:
            create, laid = self._library.dnnl_memory_desc_create_with_strides, _Dims(*strides)
        return self._new(create, self._library.dnnl_memory_desc_destroy, len(shape), _Dims(*shape), dtype, laid)

    def _described(self, create: Any, *given: Any) -> c_void_p:
        return self._new(create, self._library.dnnl_primitive_desc_destroy, *given)

    def _make(self, description: c_void_p, forms: dict[int, c_void_p]) -> None:
        """``forms`` are those of the arguments, by which they are."""
        library = self._library
        self._primitive = self._new(library.dnnl_primitive_create, library.dnnl_primitive_destroy, description)
        self._memories = [
            self._new(library.dnnl_memory_create, library.dnnl_memory_destroy, form, self._engine.handle, None)
            for form in forms.values()
        ]
        which = zip(forms, self._memories, strict=True)
        self._arguments = (_Argument * len(forms))(*(_Argument(place, memory) for place, memory in which))

    def run(self, *addresses: int) -> None:
        """With the memory at ``addresses``, while the engine's lock is held. Raises :class:`OneDNNError`."""
        library, stream = self._library, self._engine.stream
        for memory, address in zip(self._memories, addresses, strict=True):
            check(library.dnnl_memory_set_data_handle(memory, address))
        check(library.dnnl_primitive_execute(self._primitive, stream, len(addresses), self._arguments))
        check(library.dnnl_stream_wait(stream))

    def close(self) -> None:
        """Give back what it holds; it is not to be run any more."""
        while self._made:
            destroy, one = self._made.pop()
            destroy(one)


class Reorder(_Primitive):
    """Of values of one ``shape``: from a type and strides, in values, to a type and strides. It runs from one address
    to another."""

    def __init__(
        self,
        engine: Engine,
        shape: Sequence[int],
        source: tuple[int, Sequence[int]],
        target: tuple[int, Sequence[int]] | c_void_p,
    ) -> None:
        """``target`` may be a layout of oneDNN's own. It takes 0.03 ms, since oneDNN keeps its code. Raises
        :class:`OneDNNError`."""
        super().__init__(engine)
        try:
            forms = {_SOURCE: self._form(shape, *source)}
            forms[_TARGET] = target if isinstance(target, c_void_p) else self._form(shape, *target)
            ends = [value for form in forms.values() for value in (form, engine.handle)]
            self._make(self._described(self._library.dnnl_reorder_primitive_desc_create, *ends, None), forms)
        except BaseException:
            self.close()
            raise


class PackedProduct(_Primitive):
    """x [rows, inner] · W [inner, columns], both bfloat16, → float32, W in the layout that oneDNN takes fastest for so
    many rows. It runs with the addresses of x, of W in that layout, and of the product.

    Attributes:
        size: The bytes of W in that layout.
    """

    def __init__(self, engine: Engine, rows: int, inner: int, columns: int) -> None:
        """Raises :class:`OneDNNError`."""
        super().__init__(engine)
        self._shape = inner, columns
        try:
            x = self._form((rows, inner), BFLOAT16, (inner, 1))
            y = self._form((rows, columns), FLOAT32, (columns, 1))
            forms = x, self._form(self._shape, BFLOAT16, None), None, y  # None is the bias
            create = self._library.dnnl_matmul_primitive_desc_create
            description = self._described(create, engine.handle, *forms, None)
            self._packed = c_void_p(self._library.dnnl_primitive_desc_query_md(description, _WEIGHTS_FORM, 0))
            self.size = int(self._library.dnnl_memory_desc_get_size(self._packed))
            self._make(description, {_SOURCE: x, _WEIGHTS: self._packed, _TARGET: y})
        except BaseException:
            self.close()
            raise

    def packing(self, strides: Sequence[int]) -> Reorder:
        """From W of these ``strides`` to that layout."""
        return Reorder(self._engine, self._shape, (BFLOAT16, strides), self._packed)
