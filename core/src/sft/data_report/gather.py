"""From the settings of a run to what is known of its data: each split is gone over once, as the run would read it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sft.context import CoreRun
from sft.conversations import Conversation
from sft.data.batches import PaddedCollator
from sft.data.encoded import Counts
from sft.data.learned import Learned
from sft.data.mixing import Mix
from sft.data.reading import check_belongs, named_split
from sft.data.sets import DataSet, open_sets
from sft.data.sources import size_of
from sft.data.stream import WINDOW
from sft.data_report import near
from sft.data_report.look import Look, Seen, text_of
from sft.data_report.passing import Pass
from sft.data_report.records import Writer
from sft.data_report.rows import RowTally
from sft.data_report.tallies import ContentTally, LengthTally
from sft.data_report.value import DataReport, SetCounts, ShownRecord, Split
from sft.errors import PluginError, TooEarlyError, UsageError
from sft.foreign_text import shown
from sft.hub_names import is_hub_name
from sft.models.loading import open_model
from sft.models.source import find_tokenizer
from sft.models.vocabulary import grown_tokenizer
from sft.resolve import resolve
from sft.settings.checks import check_plugins, check_settings
from sft.settings.paddlenlp import listing
from sft.settings.reading import normalise

if TYPE_CHECKING:
    from sft.data.encoding import Group
    from sft.seams import DataCollator

_SAID = (
    *("src_length", "max_length", "truncation", "train_on", "train_on_thoughts", "enable_thinking"),
    *("on_bad_record", "lazy", "seed", "per_device_train_batch_size", "gradient_accumulation_steps"),
)


@dataclass(frozen=True)
class Wanted:
    """Which records are shown: the first ``number``, or of those that hold the text ``find``."""

    number: int
    find: str | None = None


def data_report(
    values: Mapping[str, Any], wanted: Wanted, say: Callable[[str], None], plugins: Iterable[type] = ()
) -> DataReport:
    """What the model would see in a run with the settings ``values``, by name. No weights are read. ``plugins`` are
    classes as in :func:`sft.run`.

    Raises :class:`UsageError` for what a run refuses before it trains, but for records that are too long for the model,
    which are counted.
    """
    settings, active, without_effect = resolve(normalise(values), plugins)
    for name in ("model_name_or_path", "dataset_name_or_path"):
        if not settings.flat()[name]:
            raise UsageError(f"{name} is not set; add --{name} VALUE or put it into the settings file.")
    check_settings(settings, active)
    run = CoreRun(settings, active, say, values)
    active.hook.sft_check(run=run)
    check_plugins(active)
    if without_effect:
        for line in listing(without_effect):
            say(line)
    with run.progress:
        return _Gathering(run, wanted).report()


class _Gathering:
    def __init__(self, run: CoreRun, wanted: Wanted) -> None:
        self.run, self.wanted, self.settings = run, wanted, run.settings
        data, model = run.settings.data, run.settings.model
        self.dataset = ", ".join(one.path for one in data.sets)
        trains = run.settings.training.do_train
        self.sets = open_sets(data, run.plugins, run.progress, run.files_of, trains=trains)
        if not any(self.sets):
            raise UsageError(
                f"do_train is false, and {shown(self.dataset)} has no dev data to look at; add dev.json, or leave "
                "do_train out."
            )
        source = open_model(model.place, run.plugins, model.allow_pickle, run, weights=False)
        named = model.tokenizer_name_or_path or (model.place if is_hub_name(model.place) else None)
        folder = find_tokenizer(named) if named else source.folder
        run.tokenizer = grown_tokenizer(run.settings, source, folder, None, run.say)
        run.resumes, run.step = False, 0
        check_belongs(run.tokenizer, source.folder, source.architecture)
        self.model, self.positions = source.folder, source.architecture.positions
        self.writer = Writer(run.tokenizer)
        self.notes: list[str] = []
        self.shown: list[ShownRecord] = []
        self.found = 0
        self.look = Look(
            run.tokenizer,
            data.src_length,
            data.max_length,
            skips=data.on_bad_record == "skip",
            learned=Learned(data.train_on, data.train_on_thoughts),
            truncation=data.truncation,
            find=wanted.find,
        )

    def report(self) -> DataReport:
        """Go over the splits that there are."""
        named = {"train": self.sets.train, "dev": self.sets.dev}
        tallies = {split: self._gone_over(split, sets) for split, sets in named.items() if sets}
        splits = {split: tally.split() for split, tally in tallies.items()}
        both = len(tallies) == 2
        for name, split in splits.items():
            if split.over_model:
                self.notes.append(
                    f"{split.over_model:,} {name} records keep more than {self.positions + 1} tokens, which the model "
                    f"cannot read, and a run refuses them: give --max_length {self.positions + 1}"
                )
        if not near.is_there():
            self.notes.append(near.MISSING)
        rows = tallies["train"].rows if "train" in tallies else None
        return DataReport(
            str(self.model),
            self.dataset,
            self.run.tokenizer.template_name,
            {name: value for name, value in self.settings.flat().items() if name in _SAID},
            splits,
            None if rows is None else rows.count(),
            tallies["dev"].content.shared_with(tallies["train"].content) if both else None,
            self.wanted.find,
            None if self.wanted.find is None else self.found,
            self.shown,
            self.notes,
        )

    def _gone_over(self, split: str, sets: list[DataSet]) -> _SplitTally:
        rows = self._row_tally(sets) if split == "train" else None
        tally = _SplitTally(self.look.max_length, self.positions, rows)
        for one in sets:
            name = named_split(split, one, sets)
            going = Pass(name, one, self.settings.data, self.run.plugins, self.run.progress)
            tally.begin(one)
            for group, seen in going.over(self.look):
                tally.add(group, seen)
                self._show(split, group, seen)
            tally.end(going.format)
            if not tally.kept:
                raise one.nothing(name, tally.counts.records)
        return tally

    def _show(self, split: str, group: Group, seen: Seen) -> None:
        """Keep those of the group that are to be shown."""
        self.found += int(seen.found.sum())
        asked = seen.readable if self.wanted.find is None else seen.readable[seen.found]
        for number in asked.tolist():
            if len(self.shown) >= self.wanted.number:
                return
            rows = np.flatnonzero(seen.rows_of == number).tolist()
            if rows:
                place = str(Conversation.seen(group[number]).place)
                self.shown.append(self.writer.record(split, place, seen, rows))

    def _row_tally(self, sets: list[DataSet]) -> RowTally | None:
        data, training = self.settings.data, self.settings.training
        who = self.run.plugins.provider("sft_collator")
        mix, lazy = Mix.of([one.weight for one in sets], training.seed, data.mix_until), data.lazy
        if mix is not None and lazy:
            self.notes.append("rows are not counted where data sets are mixed by weight and lazy")
            return None
        collator: DataCollator | None
        try:
            collator = self.run.hook.sft_collator(run=self.run)
        except PluginError as error:
            if not isinstance(error.__cause__, TooEarlyError):
                raise
            self.notes.append(f"rows are not counted: plugin {who} makes them of what only a run has")
            return None
        shared = self.run.plugins.provider("sft_parallel_strategy")
        if shared is not None:
            self.notes.append(
                f"rows and steps are those of a single process, whatever plugin {shared} shares them among"
            )
        return RowTally(
            collator or PaddedCollator(self.run.tokenizer.pad_id),
            who or "padding",
            training.seed,
            training.per_device_train_batch_size,
            training.gradient_accumulation_steps,
            WINDOW if lazy else None,
            mix,
        )


class _SplitTally:
    """What is added up of train or dev data, one data set after the other."""

    def __init__(self, max_length: int, positions: int, rows: RowTally | None) -> None:
        self._max_length, self._positions = max_length, positions
        self.rows = rows
        self.turns, self.whole, self.formats = Counter[str](), LengthTally(), Counter[str]()
        self.content, self.over_model = ContentTally(), 0
        self.near = near.NearSample() if near.is_there() else None
        self.first_skipped: str | None = None
        self.files: list[Path] = []
        self.sets: dict[str, SetCounts] = {}
        self._before = Counts()
        """Of the sets before this one."""
        self._set: DataSet
        self.counts, self.kept = Counts(), 0
        """Of this one."""

    def begin(self, one: DataSet) -> None:
        """What is added from now on is of this set."""
        self._set, self.counts, self.kept = one, Counts(), 0
        self.files += one.files

    def add(self, group: Group, seen: Seen) -> None:
        """The records of a group."""
        before = self._before.records + self.counts.records
        self.counts += seen.counts
        self.turns += seen.turns
        self.whole.add(seen.whole)
        self.kept += len(seen)
        self.over_model += int((seen.longest_of_each > self._positions).sum())
        if self.first_skipped is None and seen.bad:
            self.first_skipped = f"{seen.bad[0].place}: {seen.bad[0].reason}"
        if self.rows is not None:
            self.rows.add(seen.lengths, seen.rows_of + before)
        for number, content in zip(seen.readable.tolist(), seen.hashes.tolist(), strict=True):
            conversation = Conversation.seen(group[number])
            if self.near is not None and self.near.takes(content):
                self.near.add(content, len(self.content), text_of(conversation))
            self.content.add(content, conversation.place)

    def end(self, name: str) -> None:
        """All of the set has been added, whose records are in the format ``name``."""
        counts = self.counts
        self.sets[self._set.name] = SetCounts(name, self._set.weight, asdict(counts))
        self.formats[name] += counts.records - counts.records_skipped
        self._before += counts
        if self.rows is not None:
            self.rows.end_set()

    def split(self) -> Split:
        """All of it; nothing can be added any more."""
        return Split(
            [str(path) for path in self.files],
            size_of(self.files),
            dict(self.formats),
            asdict(self._before),
            dict(self.turns),
            self.whole.lengths(),
            self.whole.above(self._max_length),
            self.over_model,
            self.content.duplicates(),
            None if self.near is None else self.near.near(self.content.different(), self.content.places),
            self.first_skipped,
            self.sets if len(self.sets) > 1 else {},
        )
