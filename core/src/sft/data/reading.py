"""Reading what a run learns from and is measured on: each record found, checked and encoded."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from sft.conversations import Conversation
from sft.data.bad_records import Limit
from sft.data.encoded import Encoded
from sft.data.encoded_cache import EncodedCache, Kept
from sft.data.encoding import encode
from sft.data.feeds import Feed, InTurn, Mixed
from sft.data.learned import Learned
from sft.data.mixing import Mix
from sft.data.processes import Encoders, encoders, processes_for
from sft.data.questions import Question
from sft.data.raw_text import is_raw
from sft.data.sets import DataSet, OpenSets, Reader
from sft.data.several import Measured, Several
from sft.data.sources import size_of
from sft.data.stream import WINDOW, Stream
from sft.durations import duration
from sft.errors import UsageError
from sft.foreign_text import shown

if TYPE_CHECKING:
    from sft.data.batches import Data
    from sft.data.tokenizer import Tokenizer
    from sft.plugins.registry import Plugins
    from sft.progress import Progress
    from sft.settings.arguments import Settings


_WORTH_KEEPING = 30.0
"""Seconds of encoding after which a run says how the next one is spared them."""


class ModelSizes(Protocol):
    """What limits the data a model can read."""

    @property
    def vocabulary(self) -> int:
        """How many tokens it has an embedding for."""
        ...

    @property
    def positions(self) -> int:
        """The longest document that it can read, in tokens."""
        ...


class RunData(NamedTuple):
    """The data of a run, read and encoded."""

    train: Data | None
    dev: Measured | None
    samples: list[Question]
    """What is answered before and after training, and at each evaluation (``num_samples``)."""
    questions: list[Question]
    """What is answered in each evaluation (``eval_with_do_generation``)."""
    places: Callable[[dict[str, Any], Sequence[int]], list[str]]
    """File and line of training records, which are read again: of a window's place, and of those with these numbers in
    the window, each from 0, in this order."""


def read_data(
    settings: Settings,
    plugins: Plugins,
    tokenizer: Tokenizer,
    progress: Progress,
    sets: OpenSets,
    model: Path,
    sizes: ModelSizes,
) -> RunData:
    """Read, check and encode every record of ``sets``, and say what became of them.

    ``sizes`` are those of the model in the folder ``model``; data that is too large for it is refused.
    """
    check_belongs(tokenizer, model, sizes)
    progress.say(f"chat template: {tokenizer.template_name}")
    uses_dev = _uses_dev(settings, sets)
    reading = _Reading(settings, plugins, tokenizer, progress, model, sizes)
    train = reading.train(sets.train) if sets.train else None
    if train is not None:
        train.check_fits(model, sizes.positions)  # reads the first window of a stream
    dev = reading.dev(sets.dev) if uses_dev else None
    asked = sets.dev if uses_dev else sets.train
    samples = reading.questions(asked, settings.generation.num_samples)
    questions = reading.questions(sets.dev, None) if settings.data.eval_with_do_generation else []
    if settings.data.eval_with_do_generation and not questions:
        raise UsageError(
            "eval_with_do_generation answers questions of the dev data, which has none (raw text asks nothing); leave "
            "it out, or add dev data of another format."
        )
    if settings.generation.num_samples and not samples:
        progress.say("note: no record asks anything, so num_samples answers nothing")
    return RunData(train, dev, samples, questions, partial(reading.places, sets.train))


def check_belongs(tokenizer: Tokenizer, model: Path, sizes: ModelSizes) -> None:
    """Refuse a tokenizer with more tokens than the model in the folder ``model`` has an embedding for."""
    if tokenizer.vocab_size > sizes.vocabulary:
        raise UsageError(
            f"{model}: its tokenizer has {tokenizer.vocab_size} tokens, its model {sizes.vocabulary}; they do not "
            "belong together."
        )


def _uses_dev(settings: Settings, sets: OpenSets) -> bool:
    """Whether dev data is measured; :class:`UsageError` where it is to be, and there is none."""
    data, training = settings.data, settings.training
    named = ", ".join(shown(one.path) for one in data.sets)
    has = "has" if len(data.sets) == 1 else "have"
    evaluates = training.do_eval is not False or training.evaluation_strategy != "no" or not training.do_train
    uses_dev = bool(sets.dev) and evaluates
    needs_dev = training.evaluation_strategy != "no" or training.do_eval
    if not training.do_train and not uses_dev:
        raise UsageError(
            f"do_train is false, and {named} {has} no dev data to measure; add dev.json, or measure "
            "a file with sft evaluate."
        )
    if needs_dev and not uses_dev:
        raise UsageError(
            f"Evaluation is asked for, and {named} {has} no dev data in use; add dev.json, "
            "or set evaluation_strategy to no and leave do_eval out."
        )
    if data.eval_with_do_generation and not uses_dev:
        raise UsageError(
            f"eval_with_do_generation answers dev data, and {named} {has} none in use; add dev.json, "
            "or leave do_eval and eval_with_do_generation out."
        )
    return uses_dev


class _Reading:
    """Data sets read in one way: by these plugins, for this tokenizer and these lengths."""

    def __init__(
        self,
        settings: Settings,
        plugins: Plugins,
        tokenizer: Tokenizer,
        progress: Progress,
        model: Path,
        sizes: ModelSizes,
    ) -> None:
        data = settings.data
        self._data, self._seed = data, settings.training.seed
        self._tokenizer, self._progress, self._say = tokenizer, progress, progress.say
        self._skips = data.on_bad_record == "skip"
        self._read = Reader(plugins, self._skips, progress)
        learned = Learned(data.train_on, data.train_on_thoughts)
        self._tokens_of = partial(
            encode,
            tokenizer=tokenizer,
            src_length=data.src_length,
            max_length=data.max_length,
            room=(model, sizes.positions),
            skips=self._skips,
            learned=learned,
            truncation=data.truncation,
        )
        self._cache = None
        if data.encoded_cache is not None:
            folder, lengths = Path(data.encoded_cache).expanduser(), (data.src_length, data.max_length, data.truncation)
            self._cache = EncodedCache(folder, plugins, tokenizer, lengths, learned, sizes.positions, progress)

    # --- data -----------------------------------------------------------------------------------------------

    def train(self, sets: Sequence[DataSet]) -> Data:
        """What the run learns from."""
        mix = self._mix_of(sets)
        if mix is not None:
            each = zip(sets, mix.weights, strict=True)
            shares = ", ".join(f"{weight / sum(mix.weights):.1%} {shown(one.name)}" for one, weight in each)
            last = "all have" if mix.until_all else "the first has"
            self._say(f"train data is drawn by weight: {shares}; a pass ends when {last} been used up")
        if self._data.lazy:
            return self._streamed(sets, mix)
        found = {one.name: self._encoded(one, named_split("train", one, sets)) for one in sets}
        return Several(found, mix) if len(found) > 1 else next(iter(found.values()))

    def dev(self, sets: Sequence[DataSet]) -> Measured:
        """What is measured."""
        return Measured({one.name: self._encoded(one, named_split("dev", one, sets)) for one in sets})

    def _encoded(self, one: DataSet, split: str) -> Encoded:
        cache, limit = self._cache, Limit(self._data.on_bad_record_limit, split)
        place = cache.place(one.files, one.shape) if cache else None
        kept = cache.read(place, self._skips) if cache and place else None
        if kept is None:
            if cache:
                cache.check_writable()
            kept, seconds = self._newly_encoded(one, split, limit)
            if cache and place:
                cache.write(place, kept)
            elif seconds > _WORTH_KEEPING:
                self._say(
                    f"encoding {split} data took {duration(seconds)}; --encoded_cache FOLDER keeps it for the next run"
                )
        elif place:
            self._say(f"{split} data is read encoded from {place.path}")
        records, name = kept
        limit.check(records.bad, records.counts.records_skipped, records.counts.records)
        self._say(f"{split} data: {records.counts.records:,} records of {name}, {records.counts}")
        if records.bad:
            first = records.bad[0]
            self._say(f"note: the first of the {split} records that are skipped is {first.place}: {first.reason}")
        return records

    def _newly_encoded(self, one: DataSet, split: str, limit: Limit) -> tuple[Kept, float]:
        """The data, and the seconds that it took."""
        began, formats = time.monotonic(), self._read.formats(one)
        with (
            self._progress.task(f"reading {split} data", "records", size_of(one.files), of_units=False) as task,
            encoders(processes_for(one.files, self._data.dataset_num_proc)) as by,
        ):
            found = (conversation for _, conversation in self._read(one, formats, task))
            records = self._tokens_of(found, by=by, check=limit.check)
        if not len(records):
            raise one.nothing(split, records.counts.records)
        return Kept(records, formats.name), time.monotonic() - began

    def _streamed(self, sets: Sequence[DataSet], mix: Mix | None) -> Stream:
        files = [path for one in sets for path in one.files]
        kept = "" if self._data.encoded_cache is None else ", and not kept in encoded_cache"
        number = f"{len(files)} file{'s' * (len(files) > 1)}"
        self._say(f"train data: streamed from {number}, {WINDOW:,} records at a time{kept}")
        several = self._data.dataset_num_proc or 1
        by = Encoders(several) if several > 1 else map  # they are needed, and there, as long as the stream is
        limits = [Limit(self._data.on_bad_record_limit, named_split("train", one, sets)) for one in sets]
        shapes = [one.shape for one in sets]
        is_plain = mix is None and not any(any(part is not None for part in shape) for shape in shapes)
        return Stream(
            files,
            partial(self._feed, sets, mix),
            partial(self._tokens_of, by=by),
            names=[one.name for one in sets],
            shape="" if is_plain else json.dumps([[len(one.files) for one in sets], shapes, str(mix)]),
            check=lambda one, bad, skipped, records: limits[one].check(bad, skipped, records),
        )

    def _feed(self, sets: Sequence[DataSet], mix: Mix | None, place: dict[str, Any] | None) -> Feed:
        if mix is not None:
            return Mixed(sets, self._read.after, mix, place)
        return InTurn(sets, self._read.after, place)

    # --- single records -------------------------------------------------------------------------------------

    def questions(self, sets: Sequence[DataSet], number: int | None) -> list[Question]:
        """What stands before the last answer of the first ``number`` records, None: of all."""
        return list(islice(chain.from_iterable(map(self._answerable, sets)), number))

    def _answerable(self, one: DataSet) -> Iterator[Question]:
        for _, turns in self._read(one):
            try:
                if isinstance(turns, Conversation) and not is_raw(turns):
                    yield Question.of(turns, self._tokenizer, self._data.src_length)
            except UsageError:  # counted and listed where it is encoded
                if not self._skips:
                    raise

    def places(self, sets: Sequence[DataSet], place: dict[str, Any], numbers: Sequence[int]) -> list[str]:
        """See :attr:`RunData.places`."""
        found: Iterator[Any] = (conversation for one in sets for _, conversation in self._read(one))
        if self._data.lazy:
            found = chain.from_iterable(self._feed(sets, self._mix_of(sets), place).take(WINDOW).by_set)
        last, wanted = max(numbers, default=-1), set(numbers)
        named = {
            number: str(conversation.place)
            for number, conversation in enumerate(islice(found, last + 1))
            if number in wanted
        }
        return [named[number] for number in numbers]

    def _mix_of(self, sets: Sequence[DataSet]) -> Mix | None:
        return Mix.of([one.weight for one in sets], self._seed, self._data.mix_until)


def named_split(split: str, one: DataSet, sets: Sequence[DataSet]) -> str:
    """The split, for messages, with the name of its set where there are several."""
    return split if len(sets) == 1 else f"{split} ({shown(one.name)})"
