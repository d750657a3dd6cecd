"""Trackers whose log is files in the run's folder: ``tensorboard`` and ``visualdl``."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

from sft_track.tracker import Tracker, folder_in, name_of

if TYPE_CHECKING:
    from sft import Run


class TensorBoard(Tracker):
    """Event files in ``output_dir/tensorboard``, written by the library ``tensorboard`` alone; settings as text."""

    name = "tensorboard"
    api_version = ">=1.1,<2"
    summary = "Log to TensorBoard's event files."
    reference = "https://www.tensorflow.org/tensorboard"
    library = "tensorboard"

    def begin(self, run: Run, earlier: str | None, after: int) -> str:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        folder = folder_in(run.output_dir / "tensorboard", earlier)
        self._writer = EventFileWriter(str(folder))
        if earlier is not None:  # what was logged after the checkpoint is not shown any more
            start = Event(step=after + 1, wall_time=time.time(), session_log=SessionLog(status=SessionLog.START))
            self._writer.add_event(start)
        else:
            self._text("settings", run.settings.written())
        return folder.name

    def write(self, step: int, numbers: dict[str, float]) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=value) for name, value in numbers.items()]
        self._add(step, Summary(value=values))

    def end(self, status: str, summary: dict[str, Any]) -> None:
        self._text("result", {"status": status, **summary})
        self._writer.close()

    def _text(self, tag: str, values: dict[str, Any]) -> None:
        from tensorboard.plugins.text.summary_v2 import text_pb

        self._add(0, text_pb(tag, f"```json\n{json.dumps(values, indent=2, ensure_ascii=False)}\n```"))

    def _add(self, step: int, summary: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self._writer.add_event(Event(step=step, wall_time=time.time(), summary=summary))
        self._writer.flush()


class VisualDL(Tracker):
    """Record files in ``output_dir/visualdl``. A resumed run writes on beside them; of the steps after its checkpoint,
    which are made twice, VisualDL shows both points."""

    name = "visualdl"
    api_version = ">=1.1,<2"
    summary = "Log to VisualDL's record files."
    reference = "https://github.com/PaddlePaddle/VisualDL"
    library = "visualdl"

    def begin(self, run: Run, earlier: str | None, after: int) -> str:
        from visualdl import LogWriter

        folder = folder_in(run.output_dir / "visualdl", earlier)
        self._writer = LogWriter(logdir=str(folder), display_name=name_of(run))
        if earlier is None:
            self._text("settings", run.settings.written())
        return folder.name

    def write(self, step: int, numbers: dict[str, float]) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(tag=name.replace("%", "_"), step=step, value=value)  # it refuses that sign
        self._writer.flush()

    def end(self, status: str, summary: dict[str, Any]) -> None:
        self._text("result", {"status": status, **summary})
        self._writer.close()

    def _text(self, tag: str, values: dict[str, Any]) -> None:
        self._writer.add_text(tag=tag, step=0, text_string=json.dumps(values, indent=2, ensure_ascii=False))
