"""A rank of a real run that writes down when it does what: forward and backward of each micro-batch, each collective
from when it leaves to when all of it has come, and each time that Python waits for the device.

``record(settings)`` is for ``run_ranks``. Times are seconds of the machine's monotonic clock, which all ranks share.
"""

from __future__ import annotations

import functools
import math
import os
import threading
import time
import traceback
from typing import Any

import groups

import sft

READERS = ("numpy", "item", "tolist", "cpu", "__array__", "__float__", "__int__", "__bool__", "__index__")
COLLECTIVES: tuple[str, ...] = (
    *("all_reduce", "reduce_scatter", "reduce_scatter_tensor", "all_gather", "all_gather_into_tensor"),
    *("all_to_all_single", "broadcast", "send", "recv"),
)


class Recorder:
    """``events``: of each what it is, and its times; ``waits``: where Python has read a value out of a tensor."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self.waits: list[str] = []
        self.step = 0
        self._reading = threading.local()

    # --- collectives ---

    def watch_collectives(self) -> None:
        for name in COLLECTIVES:
            setattr(groups.ProcessGroup, name, self._noted(name, getattr(groups.ProcessGroup, name)))

    def _noted(self, name: str, method: Any) -> Any:
        @functools.wraps(method)
        def noted(group: Any, first: Any, second: Any = None, *rest: Any, **more: Any) -> Any:
            # What is sent of an operation with two tensors is the second one.
            tensor = second if name.startswith(("reduce_scatter", "all_gather", "all_to_all")) else first
            if name == "reduce_scatter":
                tensor = first
            size = math.prod(tensor.shape) * int(tensor.element_size())
            if name == "reduce_scatter":
                size *= group.size()
            event = {
                "what": name.removesuffix("_tensor").removesuffix("_into").removesuffix("_single"),
                "step": self.step,
                "group": list(group._world_ranks),
                "bytes": size,
                "began": time.monotonic(),
                "overlaps": False,
            }
            self.events.append(event)
            task = method(group, first, second, *rest, **more)
            self._note_end(task, event)
            return task

        return noted

    def _note_end(self, task: Any, event: dict[str, Any]) -> None:
        if task.is_completed():
            event["ended"] = time.monotonic()
            return
        event["overlaps"] = True
        complete = task._complete

        def ended() -> None:
            groups.mailbox().came = 0.0
            complete()
            event["waited"] = time.monotonic()
            event["ended"] = min(event["waited"], max(event["began"], groups.mailbox().came))

        task._complete = ended

    # --- what the device is asked ---

    def watch_waits(self, paddle: Any) -> None:
        for name in READERS:
            setattr(paddle.Tensor, name, self._watched(getattr(paddle.Tensor, name)))

    def _watched(self, method: Any) -> Any:
        @functools.wraps(method)
        def read(*arguments: Any, **more: Any) -> Any:
            if getattr(self._reading, "now", False) or not self.step:
                return method(*arguments, **more)
            frame = traceback.extract_stack(limit=2)[0]
            self.waits.append(f"{self.step} {os.path.basename(frame.filename)} {frame.name}")
            self._reading.now = True
            try:
                return method(*arguments, **more)
            finally:
                self._reading.now = False

        return read

    # --- what goes to the host ---

    def watch_host(self) -> None:
        from sft_parallel_4d.offload import Host

        Host.take = self._timed("take", Host.take)  # type: ignore[method-assign]

    # --- what the run does ---

    def watch_micro_batches(self) -> None:
        from sft.training.loop import Learning

        for name in ("forward", "loss", "backward"):
            setattr(Learning, name, self._timed(name, getattr(Learning, name)))

    def _timed(self, name: str, method: Any) -> Any:
        @functools.wraps(method)
        def timed(*arguments: Any, **more: Any) -> Any:
            began = time.monotonic()
            try:
                return method(*arguments, **more)
            finally:
                self.events.append({"what": name, "step": self.step, "began": began, "ended": time.monotonic()})

        return timed

    def watch_block(self, block: Any) -> None:
        """From when it has what it needs until it is through forward."""
        began: list[float] = []

        def ended(*_: Any) -> None:
            self.events.append({"what": "block", "step": self.step, "began": began.pop(), "ended": time.monotonic()})

        block.register_forward_pre_hook(lambda *_: began.append(time.monotonic()))
        block.register_forward_post_hook(ended)


def record(settings: dict[str, Any], bucket: int | None = None) -> dict[str, Any]:
    """One rank of a run, with buckets of so many bytes; all its events from the second step on, and its waits."""
    import paddle

    from sft_parallel_4d import options

    if bucket is not None:
        options.BUCKET = bucket
    recorder = Recorder()
    recorder.watch_collectives()
    recorder.watch_micro_batches()
    recorder.watch_waits(paddle)
    recorder.watch_host()

    class Steps(sft.Plugin):
        name = "steps"
        api_version = 1

        @sft.hookimpl
        def sft_run_started(self, run: sft.Run) -> None:
            for block in run.model.model.layers:
                recorder.watch_block(block)

        @sft.hookimpl
        def sft_step_ended(self, run: sft.Run, record: dict[str, Any]) -> None:
            recorder.step = record["step"] + 1

        @sft.hookimpl
        def sft_run_ended(self, run: sft.Run, summary: Any) -> None:
            recorder.step = 0

    sft.run(settings, plugins=[Steps], say=lambda text: None)
    return {
        "process": os.getpid(),
        "events": [event for event in recorder.events if event["step"] > 1],
        "waits": [wait for wait in recorder.waits if not wait.startswith("1 ")],
    }
