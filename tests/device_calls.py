"""What a step asks of a device: the kernels that it launches, and how often it waits for an answer.

Kernels are counted by paddle's profiler, backward included. A wait is a value that Python reads out of a tensor, a
gradient that it sets (paddle copies it at once; ``grad_`` takes it as it is), or a kernel that reads a value itself
because the shape of its result depends on it. All are the same on a CPU, where waiting costs nothing, and on a GPU,
where it empties the queue of kernels. Arrays of the host that are copied to the device are counted by themselves: a GPU
takes them by a blocking copy, which by Paddle's sources comes behind the kernels that are queued.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import sft
from sft.plugins.discovery import installed

NO_NATIVE_CODE = ["no:fast-cpu"] if "fast-cpu" in installed() else []
"""For the setting ``plugin``: native code stands for kernels, and is not counted."""
READERS = ("numpy", "item", "tolist", "cpu", "__array__", "__float__", "__int__", "__bool__", "__index__")
ASKING_KERNELS = ("bincount", "masked_select", "nonzero", "repeat_interleave_with_tensor_index", "unique")


@dataclass
class Calls:
    kernels: Counter[str] = field(default_factory=Counter)
    """How often each kernel was launched."""
    waits: list[str] = field(default_factory=list)
    """Where each wait came from: file, line and function, or the kernel's name."""
    micro_batches: int = 0
    """Of the step."""
    copies: list[str] = field(default_factory=list)
    """Likewise of each array that was copied to the device."""


@contextlib.contextmanager
def counted(paddle: Any) -> Iterator[Calls]:
    """A context whose calls are counted; the :class:`Calls` have their numbers at its end."""
    from paddle import profiler

    calls, reading = Calls(), threading.local()

    def watched(method: Any) -> Any:
        @functools.wraps(method)
        def read(*arguments: Any, **more: Any) -> Any:
            # float() calls item(), and so on: one wait. And a gradient that is set to nothing is not waited for.
            if getattr(reading, "now", False) or (isinstance(arguments[0], Grad) and arguments[-1] is None):
                return method(*arguments, **more)
            calls.waits.append(_caller())
            reading.now = True
            try:
                return method(*arguments, **more)
            finally:
                reading.now = False

        return read

    to_tensor = paddle.to_tensor

    def copied(*arguments: Any, **more: Any) -> Any:
        if not isinstance(more.get("place"), paddle.CPUPlace):
            calls.copies.append(_caller())
        return to_tensor(*arguments, **more)

    methods = {name: getattr(paddle.Tensor, name) for name in (*READERS, "grad")}
    grad = methods["grad"]

    class Grad:
        def __get__(self, tensor: Any, kind: Any = None) -> Any:
            return grad.__get__(tensor, kind)

        __set__ = watched(lambda self, tensor, value: grad.__set__(tensor, value))

    recorder = profiler.Profiler(targets=[profiler.ProfilerTarget.CPU], on_trace_ready=lambda _: None)
    for name in READERS:
        setattr(paddle.Tensor, name, watched(methods[name]))
    paddle.Tensor.grad, paddle.to_tensor = Grad(), copied
    try:
        recorder.start()
        yield calls
        recorder.stop()
    finally:
        paddle.to_tensor = to_tensor
        for name, method in methods.items():
            setattr(paddle.Tensor, name, method)
    for root in recorder.profiler_result.get_data().values():
        calls.kernels.update(_launched(root))
    calls.waits += [name for name in ASKING_KERNELS for _ in range(calls.kernels[name])]


def _caller() -> str:
    """Of the function that is being counted: file, line and function."""
    frame = next(one for one in reversed(traceback.extract_stack(limit=4)[:-2]) if one.name != "__setattr__")
    return f"{frame.filename.rpartition('/')[2]}:{frame.lineno} {frame.name}"


def _launched(node: Any) -> Iterator[str]:
    if node.name.endswith(" kernel launch"):
        yield node.name.removesuffix(" kernel launch")
    for child in node.children_node:
        yield from _launched(child)


class CountStep(sft.Plugin):
    """Counts the calls of one step of a run, from the end of the step before it to its own; ``calls`` has them."""

    name = "count-step"
    api_version = 1
    step = 3
    calls: Calls

    @sft.hookimpl
    def sft_micro_batch(self, run: sft.Run, batch: sft.Batch) -> None:
        if run.step == self.step - 1:
            self.calls.micro_batches += 1

    @sft.hookimpl
    def sft_step_ended(self, run: sft.Run, record: dict[str, Any]) -> None:
        import paddle

        if record["step"] == self.step - 1:
            self._context = counted(paddle)
            type(self).calls = self._context.__enter__()
        elif record["step"] == self.step:
            self._context.__exit__(None, None, None)
