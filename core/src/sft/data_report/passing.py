"""One pass over a data set, by what a run reads it with: the same readers, formats, encoding and processes."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING

from sft.data.bad_records import Limit
from sft.data.encoding import Group, grouped, looked_at
from sft.data.processes import encoders, processes_for
from sft.data.sets import DataSet, Reader
from sft.data.sources import size_of
from sft.data_report.look import Look, Seen

if TYPE_CHECKING:
    from sft.plugins.registry import Plugins
    from sft.progress import Progress
    from sft.settings.arguments import DataArguments


class Pass:
    """The records of a data set, encoded and looked at a group at a time. ``split`` names it in messages."""

    def __init__(self, split: str, one: DataSet, data: DataArguments, plugins: Plugins, progress: Progress) -> None:
        self.set = one
        self._split, self._data, self._progress = split, data, progress
        self._read = Reader(plugins, data.on_bad_record == "skip", progress)
        self._formats = self._read.formats(one)

    @property
    def format(self) -> str:
        """The format of its records, once one has been read."""
        return self._formats.name

    def over(self, look: Look) -> Iterator[tuple[Group, Seen]]:
        """Each group of conversations, and what ``look`` makes of it. Raises what a run raises of bad records."""
        limit = Limit(self._data.on_bad_record_limit, self._split)
        waiting: deque[Group] = deque()
        files = self.set.files
        with (
            self._progress.task(f"reading {self._split} data", "records", size_of(files), of_units=False) as task,
            encoders(processes_for(files, self._data.dataset_num_proc)) as by,
        ):
            conversations = (conversation for _, conversation in self._read(self.set, self._formats, task))
            for seen in looked_at(by(look, _kept(grouped(conversations), waiting)), limit.check):
                assert isinstance(seen, Seen)
                yield waiting.popleft(), seen


def _kept(groups: Iterator[Group], waiting: deque[Group]) -> Iterator[Group]:
    """``groups``, each of which waits for what becomes of it."""
    for group in groups:
        waiting.append(group)
        yield group
