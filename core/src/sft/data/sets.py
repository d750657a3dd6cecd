"""The data sets of a run, opened: which files hold the records of each, and reading these as conversations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from sft.conversations import Conversation
from sft.data.bad_records import BadRecord
from sft.data.dev_split import Side, bound_of_number, bound_of_share
from sft.data.encoded import NO_TARGET
from sft.data.finding import find_files, note_unread
from sft.data.formats import Formats, check_format
from sft.data.sources import Passing, Record, read, size_of
from sft.dataset_names import NamedSet, scheme_of
from sft.errors import UsageError
from sft.foreign_text import shown
from sft.plugins.discovery import ALL_OF_PROJECT

if TYPE_CHECKING:
    from sft.plugins.registry import Plugins
    from sft.progress import Progress, Task
    from sft.settings.arguments import DataArguments


@dataclass(frozen=True)
class DataSet:
    """The records of one split of a data set: those of ``files``, in their order."""

    name: str
    files: list[Path]
    weight: float | None = None
    limit: int | None = None
    """How many of its first records there are; None: all."""
    format: str | None = None
    """The format of its records; None: it is recognised."""
    side: Side | None = None
    """The side of ``dev_split`` on which its records are; None: all of them belong to it."""

    def records(self, skips: bool, passing: Passing | None = None) -> Iterator[tuple[int, Record | BadRecord]]:
        """Each record, after the number of records of the files that have been read with it. Those that are ``passing``
        come first, and do not come out; ``skips`` as :func:`sft.data.sources.read` has it."""
        passed = passing.left if passing else 0
        most = None if self.limit is None else max(0, self.limit - passed)
        for number, record in enumerate(islice(read(self.files, passing, skips=skips), most), start=passed + 1):
            if self.side is None or self.side.holds(record):
                yield number, record

    def nothing(self, split: str, records: int) -> UsageError:
        """What is said where no record of the set is left in ``split``, of so many ``records`` that were read."""
        if records or self.side is None:
            return UsageError(NO_TARGET.format(split))
        none = f"none of the few records of {shown(self.name)}"
        what = f"takes {none}; give a larger" if self.side.is_dev else f"leaves {none} to train on; give a smaller"
        return UsageError(f"dev_split {self.side.share:g} {what} share, or a number of records, such as 1.")

    @property
    def shape(self) -> list[str | int | bool | None]:
        """What decides, beside the files, which records it has and how they are read; JSON."""
        side = (self.side.bound, self.side.is_dev) if self.side is not None else (None, None)
        return [self.limit, self.format, *side]


class OpenSets(NamedTuple):
    """The data sets of a run: those to train on, and those to measure."""

    train: list[DataSet]
    dev: list[DataSet]


def open_sets(
    data: DataArguments,
    plugins: Plugins,
    progress: Progress,
    source: Callable[[str, str], list[Path] | None],
    *,
    trains: bool = True,
    files_are_dev: bool = False,
) -> OpenSets:
    """Find the files of all data sets that the settings name.

    ``source`` is what plugins say of a place and a split (``sft_data_source``); of what none of them knows, the core
    takes the place for a file or folder. ``trains``: whether training data is wanted. ``files_are_dev``: whether a set
    that is one file is there to be measured. Raises :class:`UsageError` for what is not there.
    """
    opened = OpenSets([], [])
    takes = False
    for one in data.sets:
        if one.format is not None:
            check_format(one.format, plugins)
        found = _Files(one, source)
        own = found.dev(files_are_dev)
        splits = data.dev_split is not None and one.train is not None and one.dev == "dev" and not own
        takes |= splits
        train = found.split(one.train) if one.train is not None and (trains or splits) else []
        found.note_unread([*train, *own], progress.say)
        base = DataSet(one.name, train, one.weight, one.limit, one.format)
        if splits:
            bound = _bound(float(data.dev_split or 0), base, data.on_bad_record == "skip", progress)
            opened.dev.append(replace(base, weight=None, side=Side(bound, True)))
            base = replace(base, side=Side(bound, False))
        elif own:
            opened.dev.append(replace(base, files=own, weight=None, limit=None if train else one.limit))
        if trains and train:
            opened.train.append(base)
    if data.dev_split is not None and not takes:
        raise UsageError(
            f"dev_split takes dev data out of training data, and {_all(data.sets)} has dev data of its own, or is not "
            "to be measured; leave dev_split out."
        )
    return opened


def _all(sets: Sequence[NamedSet]) -> str:
    return " and ".join(shown(one.path) for one in sets)


class _Files:
    """Where the splits of one data set are."""

    def __init__(self, one: NamedSet, source: Callable[[str, str], list[Path] | None]) -> None:
        self._one, self._source = one, source
        self._path = Path(one.path).expanduser()
        self._is_foreign = False

    def split(self, name: str) -> list[Path]:
        found = self._source(self._one.path, name)
        if found is not None:
            self._is_foreign = True
            return found
        scheme = scheme_of(self._one.path)
        if scheme is not None:
            raise UsageError(
                f"No active plugin opens {shown(self._one.path)}; install one that knows {scheme}:// "
                f"({ALL_OF_PROJECT}), or give a file or folder (`sft plugins` lists those that are installed)."
            )
        return find_files(self._path, name)

    def dev(self, files_are_dev: bool) -> list[Path]:
        if self._one.dev is None and not files_are_dev:
            return []
        is_whole = files_are_dev or self._one.train is None
        if is_whole and scheme_of(self._one.path) is None and self._path.is_file():
            return [self._path]
        found = self.split(self._one.dev or "dev")
        if not found and self._one.train is None:
            raise UsageError(f"{shown(self._one.path)} has no dev data, and is there to be measured; add dev.json.")
        return found

    def note_unread(self, files: list[Path], say: Callable[[str], None]) -> None:
        if not self._is_foreign and self._one.train == "train" and self._one.dev == "dev":
            note_unread(self._path, files, say)


def _bound(wanted: float, one: DataSet, skips: bool, progress: Progress) -> int:
    """The bound of hashes below which records are dev data; for a number of records all of them are read."""
    if wanted < 1:
        return bound_of_share(wanted)
    with progress.task("choosing dev data", "records", size_of(one.files), of_units=False) as task:
        bound = bound_of_number(int(wanted), (record for _, record in _followed(one.records(skips), task)))
    if not bound:
        raise UsageError(
            f"dev_split {int(wanted):,} would take all different records of {one.name}, and leave none to train on; "
            "give a smaller number."
        )
    return bound


def _followed(
    records: Iterator[tuple[int, Record | BadRecord]], task: Task
) -> Iterator[tuple[int, Record | BadRecord]]:
    """``records``, with which ``task`` advances."""
    done = 0
    for number, record in records:
        done = done if isinstance(record, BadRecord) else record.done
        task.advance(done=done)
        yield number, record


# --- reading ------------------------------------------------------------------------------------------------

Numbered = tuple[int, "Conversation | BadRecord"]
"""A conversation, after the number of records of its files that have been read with it."""


class Reader:
    """Reads data sets as conversations; where ``skips``, those that cannot be read come out as such."""

    def __init__(self, plugins: Plugins, skips: bool, progress: Progress) -> None:
        self._plugins, self._skips, self._progress = plugins, skips, progress

    def formats(self, one: DataSet) -> Formats:
        return Formats(self._plugins, self._skips, one.format)

    def __call__(self, one: DataSet, formats: Formats | None = None, task: Task | None = None) -> Iterator[Numbered]:
        """All records of a set, in their order."""
        formats, records = formats or self.formats(one), one.records(self._skips)
        for number, record in records if task is None else _followed(records, task):
            yield number, formats.turns_or_bad(record)

    def after(self, one: DataSet, number: int) -> Iterator[Numbered]:
        """All but those among the first ``number`` records of its files, which are neither read as JSON nor asked for
        their format, but for the first that can be read: it says in which format the others are."""
        if not number:
            yield from self(one)
            return
        formats = self.formats(one)
        every = one.records(self._skips)
        next((True for _, record in every if isinstance(formats.turns_or_bad(record), list)), None)
        with self._progress.task("passing over records", "records", number) as task:
            records = one.records(self._skips, Passing(number, task.advance))
            following = next(records, None)
        for read_by_then, record in chain([following] if following else [], records):
            yield read_by_then, formats.turns_or_bad(record)
