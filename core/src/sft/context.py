"""The state of a run: :class:`Run` is what plugins see of it, :class:`CoreRun` adds what only the core uses, and
:class:`Summary` is the outcome. The procedure is in ``fine_tune.py``.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.control import Control
from sft.errors import TooEarlyError
from sft.foreign_text import without_secrets
from sft.progress import Progress
from sft.run_log import RunLog
from sft.stopping import Stop

if TYPE_CHECKING:
    from datetime import datetime

    import numpy as np

    from sft.data.batches import Data, Step
    from sft.data.questions import Question
    from sft.data.several import Measured
    from sft.data.tokenizer import Tokenizer
    from sft.folder_lock import FolderLock
    from sft.plugins.registry import Plugins
    from sft.precision import Precision
    from sft.seams import DataCollator, ParallelStrategy
    from sft.settings.arguments import Settings


@dataclass
class Summary:
    """What a run did and learned, in numbers. Losses are nats per target token.

    Attributes:
        output_dir: The run's folder.
        steps: Optimizer steps, those before a resume among them.
        epochs: Passes over the data that these made; a fraction where the last one is not whole.
        seconds: The whole run took, by the clock.
        train_loss_first, train_loss_last: Of the first and the last line that was logged; None without one.
        eval_loss_before, eval_loss_after: Of dev data, by the model as it came and by the result; None where none was
            measured.
        trainable_parameters, total_parameters: In values.
        tokens, target_tokens, padding_tokens: That went through the model in training: without padding; of these, what
            was learned; and the padding.
        rows: Rows that were trained: records, or packs of several.
        skipped_steps: Steps that changed nothing: they overflowed in float16, or their loss or gradient was not finite.
        peak_memory_mib: The most that the device had in use, in MiB; on a CPU the process.
        data: What became of the records of ``train`` and ``dev``, as counts by what they are.
        samples: ``prompt``, ``before``, ``after`` and the ``reference`` answer of each sample prompt.
        stopped_early: Where a hook or the file STOP has ended the training before its last step: that ``step`` and the
            ``reason``. Otherwise None.
        speaks: Whether this process tells the user: of several that share a run, one.
    """

    output_dir: Path
    steps: int
    epochs: float
    seconds: float
    train_loss_first: float | None
    train_loss_last: float | None
    eval_loss_before: float | None
    eval_loss_after: float | None
    trainable_parameters: int
    total_parameters: int
    tokens: int
    target_tokens: int
    padding_tokens: int
    rows: int
    skipped_steps: int
    peak_memory_mib: int
    data: dict[str, dict[str, int]] = field(default_factory=dict)
    samples: list[dict[str, str]] = field(default_factory=list)
    stopped_early: dict[str, Any] | None = None
    speaks: bool = True

    def as_dict(self) -> dict[str, Any]:
        """All of it as JSON values, as ``run.json`` has it."""
        values = {**asdict(self), "output_dir": str(self.output_dir)}
        del values["speaks"]
        return values


class Member:
    """A member of :class:`Run` that exists from a hook on. Reading it earlier raises :class:`sft.TooEarlyError`.

    A value that is assigned to the instance hides this descriptor, which therefore answers only while there is none.
    """

    def __init__(self, since: str, meaning: str) -> None:
        self.since, self.meaning, self.name = since, meaning, ""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, run: Run | None, owner: type) -> Any:
        if run is None:
            return self
        raise TooEarlyError(f"run.{self.name} does not exist yet: it does from {self.since} on", self.name, run)

    def __repr__(self) -> str:
        return f"<from {self.since} on>"


def since(hook: str, meaning: str) -> Any:
    """A :class:`Member`, for a class body that annotates it with the type of its value."""
    return Member(hook, meaning)


class Run:
    """One run, as plugins see it. They may use what is listed here and nothing else; two runs in one process share
    nothing.

    Each member exists from a certain hook on, and in every hook that is called later. Reading it earlier raises
    :class:`sft.TooEarlyError`, which names that hook.
    """

    settings: Settings = since(
        "sft_check",
        "The resolved settings: `model`, `data`, `generation`, `training`, and `options` of plugins by name; "
        "`flat()` is all of them by their own names.",
    )
    given: dict[str, Any] = since("sft_check", "The settings by name as they came, `plugin` among them.")
    plugins: Plugins = since("sft_check", "The active plugins: `names`, `provider(hook)`, `origin(name)`.")
    hook: Any = since(
        "sft_check", "Calls hooks, also those that plugins publish: `run.hook.NAME(argument=...)`, by keyword."
    )
    progress: Progress = since(
        "sft_check",
        'Shows how far long work has come: `for item in run.progress.over(items, "reading", "files")`.',
    )
    control: Control = since(
        "sft_check", "Asks the run to stop, to save or to evaluate after this step: `run.control.stop(reason)`."
    )
    source: Any = since(
        "sft_model_config",
        "The model before it is built: its `folder`, `values` (the content of config.json), `family` and "
        "`architecture`. What plugins change in the config is in `architecture` when all of them have been asked.",
    )
    resumes: bool = since(
        "sft_collator", "True if a checkpoint will be restored, so that a costly initialisation can be skipped."
    )
    tokenizer: Tokenizer = since("sft_collator", "The tokenizer, with its chat template.")
    precision: Precision = since(
        "sft_collator",
        "The dtypes of the run: `dtype` of matrix products, `weights` of the model, `frozen` of its matrices that do "
        "not train; `autocast()`.",
    )
    step: int = since("sft_collator", "The last optimizer step that was made, from 1; 0 before the first.")
    strategy: ParallelStrategy = since(
        "sft_quantizer", "The processes that share the run (`sft.ParallelStrategy`); `is_main` says who writes files."
    )
    model: Any = since("sft_adapt_model", "The paddle model, with its weights.")

    def __init__(
        self, settings: Settings, plugins: Plugins, say: Callable[[str], None], given: Mapping[str, Any] | None = None
    ) -> None:
        self.settings = settings
        self.given = dict(given or {})
        self.plugins = plugins
        self.hook = plugins.hook
        self.control = Control()
        plugins.tell = lambda text: self.say(text)
        self.progress = Progress(say, bars=not settings.training.disable_tqdm)

    @property
    def say(self) -> Callable[[str], None]:
        """Tells the user one line. Setting it replaces the voice of `progress` too."""
        return self.progress.say

    @say.setter
    def say(self, say: Callable[[str], None]) -> None:
        self.progress.voice = say

    @property
    def output_dir(self) -> Path:
        """The run's folder. It is made before the first evaluation, or else before `sft_run_started`."""
        return Path(str(self.settings.training.output_dir)).expanduser()

    def rng(self, name: str) -> np.random.Generator:
        """Random numbers that depend on the run's seed and ``name`` alone, not on what was drawn before."""
        import numpy as np

        return np.random.default_rng([self.settings.training.seed, zlib.crc32(name.encode())])


def members() -> dict[str, tuple[str, str]]:
    """The members of :class:`Run` in the order in which they come to exist: from which hook on, and what each is."""
    late = {name: (m.since, m.meaning) for name, m in vars(Run).items() if isinstance(m, Member)}
    always = {name: ("sft_check", (getattr(Run, name).__doc__ or "")) for name in ("say", "output_dir", "rng")}
    first = {name: row for name, row in late.items() if row[0] == "sft_check"}
    return {**first, **always, **late}


Run.__doc__ = f"{Run.__doc__}\n    Members:\n" + "".join(
    f"        {name}: (from {hook} on) {meaning}\n" for name, (hook, meaning) in members().items()
)


class CoreRun(Run):
    """A run with what only the core uses. Plugins must not rely on it: it may change with any version.

    Attributes:
        without_effect: Settings that were given and do nothing here, with the reason.
        train_data: The records to train on, encoded; None where nothing is trained.
        dev_data: Those to measure; None where there are none, or none are used.
        samples: What is answered before and after training, and at each evaluation (``num_samples``).
        answered: The last answers to them, after which step.
        places: Says in which file and line training records stand: :attr:`sft.data.reading.RunData.places`.
        questions: What is answered in each evaluation (``eval_with_do_generation``).
        collator: Makes rows and batches of records.
        arithmetic: What the last bits of the run's numbers depend on, as run.json has it.
        other_arithmetic: Where it was another: for each time the step, what that went on from, and the differences.
        earlier: Where it went on from a checkpoint with other settings or another arithmetic: for each time the step
            ``until`` which it had these ``settings`` and this ``arithmetic``, in ascending order.
        taken: The last step that changed the model; later ones may have been skipped.
        at: The step that is computed, or was the last one (:class:`sft.data.batches.Step`); None before the first.
        objective: What it minimises, once the model is there.
        whole: Structured names of the parameters that train whole beside an adapter (``modules_to_save``).
        date: The time that chat templates are told where the run begins anew; None: now.
        rows: Those of rows of tokens that train (``trainable_token_indices``), each with the ids of these.
        continued: The folder of the adapter from which the run goes on, where it goes on from one.
        base_fingerprint: Identifies the weights that an exported adapter belongs to; see ``models/fingerprint.py``.
        sizes: The trainable parameters of the whole model, and all of them, counted in values.
        before: What was measured before training.
        evaluation: The record of the last evaluation, as ``sft_evaluated`` has it.
        best: The record of the best evaluation that has a checkpoint (``load_best_model_at_end``).
        executes: Whether the run is carried out in this process, not in others that were started for it.
        finished: Whether the run has finished. Nothing that goes wrong afterwards changes that.
        earlier_report: What run.json said before this run.
        stop: What signals have asked of the run.
        stopped_early: As :class:`Summary` has it.
        not_finite: Numbers of plugins that have been said not to be finite.
        lock: The lock of the run's folder, in the process that writes there; None before it is taken.
        log: What the run says, as it stands in the folder of a run.
        keep_folder: Makes the folder anew where it has vanished; for the process that writes there, before it does.
    """

    places: Callable[[dict[str, Any], Sequence[int]], list[str]]
    collator: DataCollator
    arithmetic: dict[str, Any]
    objective: Any
    base_fingerprint: str
    sizes: tuple[int, int]

    def __init__(
        self, settings: Settings, plugins: Plugins, say: Callable[[str], None], given: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(settings, plugins, say, given)
        self.without_effect: list[tuple[str, str]] = []
        self.train_data: Data | None = None
        self.dev_data: Measured | None = None
        self.samples: list[Question] = []
        self.answered: tuple[int, list[str]] | None = None
        self.questions: list[Question] = []
        self.before: dict[str, Any] = {}
        self.evaluation: dict[str, Any] = {}
        self.best: dict[str, Any] = {}
        self.other_arithmetic: list[dict[str, Any]] = []
        self.earlier: list[dict[str, Any]] = []
        self.taken = 0
        self.at: Step | None = None
        self.date: datetime | None = None
        self.whole: list[str] = []
        self.rows: dict[str, tuple[int, ...]] = {}
        self.continued: Path | None = None
        self.executes = False
        self.finished = False
        self.earlier_report: dict[str, Any] = {}
        self.stop = Stop(lambda text: self.progress.tell("note", {"text": text}, text, "warning"))
        self.stopped_early: dict[str, Any] | None = None
        self.not_finite: set[str] = set()
        self.lock: FolderLock | None = None
        self.log = RunLog(self.progress)
        self.keep_folder: Callable[[], None] = lambda: None

    def files_of(self, name: str, split: str) -> list[Path] | None:
        """The files that a plugin says hold a split of the data ``name``; None if none of them knows it."""
        files: list[Path] | None = self.hook.sft_data_source(run=self, name=name, split=split)
        return files

    @property
    def exports_adapter(self) -> bool:
        """Whether the result is an adapter; if not, it is the whole model."""
        return self.plugins.provider("sft_export_adapter") is not None

    @property
    def eval_steps(self) -> int:
        """Steps between evaluations."""
        return self.settings.training.eval_steps or self.settings.training.logging_steps

    def check_lock(self) -> None:
        """:class:`sft.SftError` if another run has taken the folder over."""
        if self.lock is not None:
            self.lock.check()

    def release_lock(self) -> None:
        """This run writes nothing more."""
        with self.stop.whole():
            if self.lock is not None:
                self.lock.release()
            self.log.end()

    def shaping(self) -> dict[str, dict[str, Any]]:
        """The options of the plugins that change what is learned, by plugin: what a resumed run must have too. What
        looks like a secret is masked, for checkpoints hold this."""
        options = self.settings.options
        named = {name: asdict(options[name]) if name in options else {} for name in self.plugins.shaping()}
        return {name: dict(without_secrets(given)) for name, given in named.items()}
