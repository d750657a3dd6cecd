"""A run opened again, to be looked into: its settings and plugins, its data, and its model as each checkpoint has it,
on one process. Nothing is written to its folder."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from sft.context import CoreRun, Run
from sft.conversations import Conversation, Turn
from sft.data.batches import Schedule, assemble, make_batch
from sft.data.encoding import Encoding
from sft.data.learned import Learned
from sft.data.questions import encode_prompt
from sft.errors import UsageError
from sft.fine_tune import made_ready
from sft.foreign_text import shown
from sft.inference.asked import of_file
from sft.resolve import resolve
from sft.seams import Batch
from sft.settings.again import check_data_is_there, report_of, settings_again
from sft.settings.checks import check_plugins
from sft.training.checkpoint_folder import Checkpoint, checkpoints, step_of, whole_checkpoint
from sft.training.resume_checks import check_same_base
from sft.training.steps_file import read_steps
from sft.voice import Printer

if TYPE_CHECKING:
    from sft.data.encoded import Encoded
    from sft.optimizer import Optimizer


class PastStep(NamedTuple):
    """A step that a run has made.

    Attributes:
        number: From 1.
        records: The numbers of its records (:meth:`Reopened.batch`), in its order.
        rate: Its learning rate, to be multiplied with that of each parameter group.
        weight: What its batches weigh together, by which the sum of their losses was divided: of cross-entropy its
            target tokens, each as it weighs.
        clip: What its gradients were multiplied with so that they are no longer than ``max_grad_norm``; 0 where the
            step was skipped, and 1 where nobody wrote down how long they were.
    """

    number: int
    records: tuple[int, ...]
    rate: float
    weight: float
    clip: float = 1.0


class Reopened:
    """A run as :func:`reopened` gives it, its model in evaluation mode: without dropout, and without noise that only
    training has. Its numbers of records count from 0 what is learned as one: a record, or the part of one that
    ``truncation split`` has made.

    Attributes:
        run: As hooks see it, with all members; ``run.model`` is as the last checkpoint has it.
        folder: The run's folder.
        checkpoints: The steps of the checkpoints that are kept, in ascending order.
        optimizer: That of the run, with the groups of its parameters; what it keeps of them is empty until
            :meth:`restore` is told to fill it.
        trainable: What trains, by structured name.
    """

    def __init__(self, run: CoreRun, folder: Path, report: Mapping[str, Any], last: Checkpoint) -> None:
        from sft.models.layers import trainable
        from sft.training.groups import make_optimizer

        assert run.train_data is not None
        self._run, self.folder, self._report = run, folder, report
        self.checkpoints = [step_of(one) for one in checkpoints(folder)]
        self._data: Encoded = next(run.train_data.windows()).data
        said = last.state["data"]
        if not run.train_data.has_fingerprint(str(said["fingerprint"])):
            raise UsageError(
                f"{folder} was trained on other tokens than its data gives now, so no record of that time can be "
                "looked up; put the data back as it was, or name it with --dataset_name_or_path."
            )
        check_same_base(run, last.folder)
        own = Schedule.of(run.settings.training, run.train_data, run.collator, 1)
        self._schedule = replace(own, rows_per_step=int(said["rows_per_step"]))  # that of all its processes
        self._last = last
        self.optimizer: Optimizer = make_optimizer(run)
        self.trainable: dict[str, Any] = trainable(run.model)
        self.restore(self.checkpoints[-1])

    @property
    def run(self) -> Run:
        return self._run

    # --- the model ------------------------------------------------------------------------------------------------

    def restore(self, step: int, optimizer: bool = False) -> None:
        """Let the model be as the checkpoint of ``step`` has it, and, if wanted, what the optimizer keeps too. Raises
        :class:`UsageError` where the checkpoint is not there, or damaged."""
        from sft.training import checkpoint

        folder = self.folder / f"checkpoint-{step}"
        found = self._last if folder == self._last.folder else whole_checkpoint(folder, self._run.progress)
        if optimizer:
            checkpoint.restore(self._run, self.optimizer, found.folder, found.state)
        else:
            checkpoint.restore_model(self._run, found.folder, found.state, "measure")
        self._run.step = step
        self._run.model.eval()

    def loss(self, batch: Batch) -> Any:
        """The sum of what the run minimises over a batch, a scalar float32 tensor, for :meth:`gradients`."""
        from sft.models.forward import hidden_states

        with self._run.precision.autocast():
            hidden = hidden_states(self._run.model, batch)
            return self._run.objective.loss(self._run.model, 1.0, hidden, batch)[0]

    def cross_entropy(self, batch: Batch) -> Any:
        """The sum of the plain cross-entropy (nats) of a batch's targets, whatever the run minimises; a scalar float32
        tensor, for :meth:`gradients`."""
        from sft.models.forward import hidden_states
        from sft.training.loss import target_loss

        with self._run.precision.autocast():
            return target_loss(hidden_states(self._run.model, batch), batch.labels, self._run.model.lm_head)

    def gradients(self, loss: Any) -> dict[str, Any]:
        """The gradient of ``loss`` in each parameter of :attr:`trainable` that it depends on, float32 tensors."""
        loss.backward()
        found = {}
        for name, parameter in self.trainable.items():
            if parameter.grad is not None:
                found[name] = parameter.grad.astype("float32").clone()  # what shares its memory goes with it
            parameter.clear_gradient(False)
        return found

    # --- what it has learned ----------------------------------------------------------------------------------------

    def __len__(self) -> int:
        """How many records there are."""
        return len(self._data)

    def batch(self, record: int) -> Batch:
        """A record alone, as the run's own collator writes it: in a row that it shares with nobody, packed or not."""
        return make_batch(self._data, self._run.collator, [(record,)])

    def read_as(self, records: Sequence[int]) -> list[int]:
        """Which of the records that were read, from 0, each of ``records`` is, or is a part of."""
        return self._data.numbers(records)

    def places(self, records: Sequence[int]) -> list[str]:
        """File and line of each of ``records``; the files are read again."""
        return self._run.places({}, self.read_as(records))

    def text(self, record: int) -> str:
        """What the model reads of a record, without special tokens; of several conversations in one, each on a line."""
        edges = self._data.edges[record : record + 2]
        spans = (self._data.offsets[number : number + 2] for number in range(*edges))
        decode = self._run.tokenizer.decode
        return "\n".join(decode(self._data.ids[slice(*span)].tolist(), skip_special_tokens=True) for span in spans)

    def steps(self) -> Iterator[PastStep]:
        """The steps that the run has made: up to its end, or where it has none, to its last checkpoint."""
        from sft.training.rates import make_rates

        rates, clips = make_rates(self._run, self._schedule.total_steps), self._clips()
        objective, size = self._run.objective, self._run.settings.training.per_device_train_batch_size
        for step, batches in islice(self._schedule.batches(0, None, 0, 1, size), self._end):
            records = tuple(number for row in step.rows for number in row)
            weight, clip = sum(map(objective.weight, batches)), clips.get(step.number, 1.0)
            yield PastStep(step.number, records, rates(step.number), weight, clip)

    def _clips(self) -> dict[int, float]:
        """The :attr:`PastStep.clip` of each step whose figures were written down."""
        from sft.training.loop import clip_factor

        figures, longest = read_steps(self.folder), self._run.settings.training.max_grad_norm
        if figures is None:
            return {}
        norms = zip(figures.grad_norm.tolist(), figures.known, figures.taken, strict=True)
        return {
            number: clip_factor(norm, longest) if taken else 0.0
            for number, (norm, known, taken) in enumerate(norms, start=1)
            if known
        }

    @cached_property
    def _end(self) -> int:
        status, result = self._report.get("status"), self._report.get("result")
        if status == "finished" and isinstance(result, dict) and isinstance(result.get("steps"), int):
            return int(result["steps"])
        return self.checkpoints[-1]

    # --- what it is asked -------------------------------------------------------------------------------------------

    def asked(self, path: Path) -> list[tuple[Conversation, Turn | None]]:
        """What a file asks, and the answers that its records have: each line of a text file is a question, and of a
        file of records the last answer of each is told apart."""
        return list(of_file(path, self._run.plugins))

    def answer(self, turns: Sequence[Turn]) -> str:
        """What the model answers to ``turns``, drawn as the run's settings say; shorter where its positions end."""
        from sft.models.generation import answers

        settings, tokenizer = self._run.settings, self._run.tokenizer
        prompt = encode_prompt(Conversation.seen(turns), tokenizer)
        room = self._run.source.architecture.positions - len(prompt)
        longest = max(1, min(settings.generation.max_new_tokens, room))
        generation = replace(settings.generation, max_new_tokens=longest)
        with self._run.precision.autocast():
            return answers(self._run.model, tokenizer, [prompt], generation, settings.training.seed)[0]

    def answered(self, turns: Sequence[Turn], answer: Turn) -> Batch:
        """``answer`` after ``turns``, encoded as the run encodes its data: a batch of one row, of which the answer
        alone is learned. Raises :class:`UsageError` where the run's lengths leave nothing of it."""
        data, positions = self._run.settings.data, self._run.source.architecture.positions
        encode = Encoding(
            self._run.tokenizer,
            data.src_length,
            min(data.max_length, positions + 1),  # the last token is only predicted
            learned=Learned("last_answer", data.train_on_thoughts),
        )
        tools = Conversation.seen(turns).tools
        found = encode([Conversation([*turns, replace(answer, trains=True, weight=1.0)], tools=tools)])
        if not len(found):
            raise UsageError(
                f"Nothing is left of the answer {shown(repr(answer.content))} within src_length {data.src_length} and "
                f"max_length {data.max_length}, to which the run cut its records; shorten the prompt."
            )
        return assemble([[found[0]]], self._run.tokenizer.pad_id)


@contextlib.contextmanager
def reopened(
    folder: Path,
    say: Callable[[str], None] | None = None,
    settings: Mapping[str, Any] | None = None,
    plugins: Iterable[type] = (),
) -> Iterator[Reopened]:
    """Open the run that ``folder`` holds again, with the settings and plugins that its run.json has.

    ``settings`` take the place of the run's, by name: where its model and its data are now, and on which ``device`` it
    is computed. ``plugins`` are classes as in :func:`sft.run`; ``say`` gets the lines that otherwise go to standard
    error. Plugins that only watch, and those that divide a run among processes, stay out; what was trained with
    ``fp16`` is computed in float32. Afterwards paddle has its device of before.

    Raises :class:`UsageError` where the folder holds no run with a checkpoint, or one whose records cannot be looked
    up: its data has changed, or is streamed (``lazy``).
    """
    plugins, say = list(plugins), say or Printer("stderr")
    kept, report, settings = checkpoints(folder), report_of(folder), settings or {}
    values = {**settings_again(report, plugins), **settings, "output_dir": str(folder)}
    values.pop("fp16", None)  # its gradients need a loss scale
    if values.get("lazy"):
        raise UsageError(
            f"{folder} streamed its data (lazy), and none of its records can be looked up by itself; train without "
            "lazy."
        )
    if not kept:
        raise UsageError(
            f"{folder} has kept no checkpoint, and only in those a run can be looked into; train with --save_strategy "
            "steps or epoch."
        )
    check_data_is_there(folder, report["settings"], settings)
    resolved, active, _ = resolve({**values, "resume_from_checkpoint": str(kept[-1])}, plugins)
    run = CoreRun(resolved, active, say, values)
    check_plugins(active)
    active.hook.sft_check(run=run)
    with run.progress, made_ready(run) as last:
        yield Reopened(run, folder, report, cast("Checkpoint", last))
