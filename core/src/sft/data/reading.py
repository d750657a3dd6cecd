"""Reading what a run learns from and is measured on: each record found, checked and encoded."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

from sft.data.bad_records import BadRecord, Limit
from sft.data.encoded import NO_TARGET, Encoded
from sft.data.encoded_cache import EncodedCache, Kept
from sft.data.encoding import Question, encode
from sft.data.formats import Formats
from sft.data.learned import Learned
from sft.data.processes import Encoders, encoders, processes_for
from sft.data.sources import Passing, read, size_of, unread
from sft.data.stream import WINDOW, Stream
from sft.errors import UsageError
from sft.foreign_text import shown
from sft.progress import duration
from sft.seams import Conversation

if TYPE_CHECKING:
    from sft.data.batches import Data
    from sft.data.tokenizer import Tokenizer
    from sft.plugins.registry import Plugins
    from sft.progress import Progress, Task
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
    dev: Encoded | None
    samples: list[Question]
    """What is answered before and after training (``num_samples``)."""
    questions: list[Question]
    """What is answered in each evaluation (``eval_with_do_generation``)."""
    places: Callable[[int, Sequence[int]], list[str]]
    """File and line of training records, which are read again: of a number of records, and of those with these numbers
    after them, each from 0, in this order."""


def read_data(
    settings: Settings,
    plugins: Plugins,
    tokenizer: Tokenizer,
    progress: Progress,
    train_files: list[Path],
    dev_files: list[Path],
    model: Path,
    sizes: ModelSizes,
) -> RunData:
    """Read, check and encode every record, and say what became of them.

    ``sizes`` are those of the model in the folder ``model``; data that is too large for it is refused.
    """
    data, training, say = settings.data, settings.training, progress.say
    if tokenizer.vocab_size > sizes.vocabulary:
        raise UsageError(
            f"{model}: its tokenizer has {tokenizer.vocab_size} tokens, its model {sizes.vocabulary}; they do not "
            "belong together."
        )
    skips = data.on_bad_record == "skip"
    limits = {split: Limit(data.on_bad_record_limit, split) for split in ("train", "dev")}
    learned = Learned(data.train_on, data.train_on_thoughts)
    tokens_of = partial(
        encode,
        tokenizer=tokenizer,
        src_length=data.src_length,
        max_length=data.max_length,
        room=(model, sizes.positions),
        skips=skips,
        learned=learned,
    )
    say(f"chat template: {tokenizer.template_name}")

    def conversations(
        files: list[Path], formats: Formats | None = None, task: Task | None = None
    ) -> Iterator[Conversation | BadRecord]:
        formats, done = formats or Formats(plugins, skips), 0
        for record in read(files, skips=skips):
            if task is not None:
                done = done if isinstance(record, BadRecord) else record.done
                task.advance(done=done)
            yield formats.turns_or_bad(record)

    def conversations_after(number: int) -> Iterator[Conversation | BadRecord]:
        """All but the first ``number``, which are neither read as JSON nor asked for their format, but for the first
        that can be read: it says in which format the others are."""
        if not number:
            yield from conversations(train_files)
            return
        formats = Formats(plugins, skips)
        next((True for one in read(train_files, skips=skips) if isinstance(formats.turns_or_bad(one), list)), None)
        with progress.task("passing over records", "records", number) as task:
            records = read(train_files, Passing(number, task.advance), skips=skips)
            following = next(records, None)
        for record in chain([following] if following else [], records):
            yield formats.turns_or_bad(record)

    def answerable(files: list[Path]) -> Iterator[Question]:
        for turns in conversations(files):
            try:
                if isinstance(turns, Conversation):
                    yield Question.of(turns, tokenizer, data.src_length)
            except UsageError:  # counted and listed where it is encoded
                if not skips:
                    raise

    def places(after: int, numbers: Sequence[int]) -> list[str]:
        last, wanted = max(numbers, default=-1), set(numbers)
        records = enumerate(islice(conversations_after(after), last + 1))
        found = {number: str(conversation.place) for number, conversation in records if number in wanted}
        return [found[number] for number in numbers]

    def questions(files: list[Path], number: int | None) -> list[Question]:
        return list(islice(answerable(files), number))

    cache = None
    if data.encoded_cache is not None:
        folder, lengths = Path(data.encoded_cache).expanduser(), (data.src_length, data.max_length)
        cache = EncodedCache(folder, plugins, tokenizer, lengths, learned, sizes.positions, progress)

    def encoded(files: list[Path], split: str) -> Encoded:
        place = cache.place(files) if cache else None
        kept = cache.read(place, skips) if cache and place else None
        if kept is None:
            if cache:
                cache.check_writable()
            kept, seconds = newly_encoded(files, split)
            if cache and place:
                cache.write(place, kept)
            elif seconds > _WORTH_KEEPING:
                say(f"encoding {split} data took {duration(seconds)}; --encoded_cache FOLDER keeps it for the next run")
        elif place:
            say(f"{split} data is read encoded from {place.path}")
        records, name = kept
        limits[split].check(records.bad, records.counts.records_skipped, records.counts.records)
        say(f"{split} data: {records.counts.records:,} records of {name}, {records.counts}")
        if records.bad:
            first = records.bad[0]
            say(f"note: the first of the {split} records that are skipped is {first.place}: {first.reason}")
        return records

    def newly_encoded(files: list[Path], split: str) -> tuple[Kept, float]:
        """The data, and the seconds that it took."""
        began, formats = time.monotonic(), Formats(plugins, skips)
        with (
            progress.task(f"reading {split} data", "records", size_of(files), of_units=False) as task,
            encoders(processes_for(files, data.dataset_num_proc)) as by,
        ):
            records = tokens_of(conversations(files, formats, task), by=by, check=limits[split].check)
        if not len(records):
            raise UsageError(NO_TARGET.format(split))
        return Kept(records, formats.name), time.monotonic() - began

    def streamed(files: list[Path], split: str) -> Stream:
        kept = "" if data.encoded_cache is None else ", and not kept in encoded_cache"
        number = f"{len(files)} file{'s' * (len(files) > 1)}"
        say(f"{split} data: streamed from {number}, {WINDOW:,} records at a time{kept}")
        several = data.dataset_num_proc or 1
        by = Encoders(several) if several > 1 else map  # they are needed, and there, as long as the stream is
        return Stream(files, conversations_after, partial(tokens_of, by=by), check=limits[split].check)

    evaluates = training.do_eval is not False or training.evaluation_strategy != "no" or not training.do_train
    uses_dev = bool(dev_files) and evaluates
    needs_dev = training.evaluation_strategy != "no" or training.do_eval
    if not training.do_train and not uses_dev:
        raise UsageError(
            f"do_train is false, and {data.dataset_name_or_path} has no dev data to measure; add dev.json, or measure "
            "a file with sft evaluate."
        )
    if needs_dev and not uses_dev:
        raise UsageError(
            f"Evaluation is asked for, and {data.dataset_name_or_path} has no dev data in use; add dev.json, "
            "or set evaluation_strategy to no and leave do_eval out."
        )
    if data.eval_with_do_generation and not uses_dev:
        raise UsageError(
            f"eval_with_do_generation answers dev data, and {data.dataset_name_or_path} has none in use; add dev.json, "
            "or leave do_eval and eval_with_do_generation out."
        )
    train: Data | None = None
    if train_files:
        train = (streamed if data.lazy else encoded)(train_files, "train")
        train.check_fits(model, sizes.positions)  # reads the first window of a stream
    dev = encoded(dev_files, "dev") if uses_dev else None
    samples = questions(dev_files if uses_dev else train_files, settings.generation.num_samples)
    asked = questions(dev_files, None) if data.eval_with_do_generation else []
    return RunData(train, dev, samples, asked, places)


def note_unread(dataset: Path, files: list[Path], say: Callable[[str], None]) -> None:
    """Say which files of a data folder look like data to measure on and are not read."""
    names = unread(dataset, files)
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        listed = ", ".join(map(shown, names[:3]))
        say(
            f"note: {listed}{more} in {dataset} {'are' if len(names) > 1 else 'is'} not read; dev data "
            "is what is called dev or validation, and sft evaluate measures any file that it is given"
        )
