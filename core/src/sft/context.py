"""What hooks receive, :class:`Run`, and what the caller of a run gets, :class:`Summary`: state without procedure."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.progress import Progress

if TYPE_CHECKING:
    import numpy as np

    from sft.data.batches import Data
    from sft.data.encoding import Encoded, Question
    from sft.data.tokenizer import Tokenizer
    from sft.plugins.registry import Plugins
    from sft.precision import Precision
    from sft.seams import DataCollator, ParallelStrategy
    from sft.settings.arguments import Settings


@dataclass
class Summary:
    """What a run did and learned, in numbers. Losses are nats per target token.

    Attributes:
        rows: Rows that were trained: records, or packs of several.
        skipped_steps: Steps that overflowed in float16 and changed nothing.
        samples: ``prompt``, ``before``, ``after`` and the ``reference`` answer of each sample prompt.
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
    speaks: bool = True

    def as_dict(self) -> dict[str, Any]:
        """All of it as JSON values, as ``run.json`` has it."""
        values = {**asdict(self), "output_dir": str(self.output_dir)}
        del values["speaks"]
        return values


class Run:
    """One run. Plugins find here what they need; two runs in one process share nothing.

    Attributes:
        model: The paddle model, from ``sft_adapt_model`` on.
        source: Where the model comes from: ``folder``, ``values`` (config.json), ``family``, ``architecture``. From
            ``sft_model_config`` on.
        base_fingerprint: Tells the weights that an exported adapter belongs to; see ``models/fingerprint.py``.
        resumes: Whether a checkpoint is about to be put back: what the model begins with will be replaced by what is in
            it.
        tokenizer: From ``sft_record_format`` on.
        train_data: The encoded records, from ``sft_collator`` on; None where nothing is trained.
        dev_data: Likewise; None where there are none, or none are used.
        collator: What ``sft_collator`` gave, from ``sft_parallel_strategy`` on.
        strategy: The processes of the run (:class:`sft.ParallelStrategy`), from ``sft_quantizer`` on.
        precision: The dtypes of the run, from ``sft_collator`` on.
        arithmetic: On what the last bits of its numbers depend, as run.json has it.
        sizes: Trainable parameters and all of them, of the whole model, as numbers of values.
        settings: The resolved settings: ``model``, ``data``, ``generation``, ``training``, and ``options`` of plugins
            by name; ``flat()`` is all of them by their own names.
        given: The settings by name as they came, ``plugin`` among them.
        without_effect: Settings that were given and do nothing here, with the reason.
        plugins: The active plugins: ``names``, ``provider(hook)``, ``origin(name)``.
        hook: Calls hooks, those too that plugins publish: ``run.hook.NAME(argument=…)``.
        progress: Shows the user how far long work is: ``for item in run.progress.over(items, "reading", "files")``.
        before: What was measured before training.
        evaluation: The record of the last evaluation, as ``sft_evaluated`` has it.
        best: The record of the best evaluation that has a checkpoint (``load_best_model_at_end``).
        step: The last optimizer step that was made, from 1.
        executes: Whether the run is done in this process, not in others that are started for it.
        finished: Whether the run has finished; nothing that goes wrong now changes that.
        report: What this process has written to run.json.
        earlier_report: What run.json said before this run.
        samples: What is answered before and after training (``num_samples``).
        questions: What is answered in each evaluation (``eval_with_do_generation``).
    """

    model: Any
    source: Any
    base_fingerprint: str
    resumes = False
    tokenizer: Tokenizer
    train_data: Data | None = None
    dev_data: Encoded | None = None
    collator: DataCollator
    strategy: ParallelStrategy
    precision: Precision
    arithmetic: dict[str, Any]
    sizes: tuple[int, int]

    def __init__(
        self, settings: Settings, plugins: Plugins, say: Callable[[str], None], given: Mapping[str, Any] | None = None
    ) -> None:
        self.settings = settings
        self.given = dict(given or {})
        self.without_effect: list[tuple[str, str]] = []
        self.plugins = plugins
        self.hook = plugins.hook
        self.progress = Progress(say, bars=not settings.training.disable_tqdm)
        self.before: dict[str, Any] = {}
        self.evaluation: dict[str, Any] = {}
        self.best: dict[str, Any] = {}
        self.step = 0
        self.executes = False
        self.finished = False
        self.report: dict[str, Any] = {}
        self.earlier_report: dict[str, Any] = {}
        self.samples: list[Question] = []
        self.questions: list[Question] = []

    def __getattr__(self, name: str) -> Any:
        if name in Run.__annotations__:
            text = f"run.{name} is not there yet; help(sft.Run) says from which hook on it is"
        else:
            text = f"{type(self).__name__!r} object has no attribute {name!r}"
        raise AttributeError(text, name=name, obj=self)

    @property
    def say(self) -> Callable[[str], None]:
        """Tells the user one line. Setting it replaces the voice of :attr:`progress` too."""
        return self.progress.say

    @say.setter
    def say(self, say: Callable[[str], None]) -> None:
        self.progress.say = say

    def rng(self, name: str) -> np.random.Generator:
        """Random numbers that depend on the run's seed and ``name`` alone, not on what was drawn before."""
        import numpy as np

        return np.random.default_rng([self.settings.training.seed, zlib.crc32(name.encode())])

    @property
    def output_dir(self) -> Path:
        """The run directory; it is made before the first evaluation, or else before ``sft_run_started``."""
        return Path(str(self.settings.training.output_dir)).expanduser()

    @property
    def exports_adapter(self) -> bool:
        """Whether the result is an adapter; if not, it is the whole model."""
        return self.plugins.provider("sft_export_adapter") is not None

    def shaping(self) -> dict[str, dict[str, Any]]:
        """The options of the plugins that change what is learned, by plugin: what a resumed run must have too."""
        options = self.settings.options
        return {name: asdict(options[name]) if name in options else {} for name in self.plugins.shaping()}

    @property
    def eval_steps(self) -> int:
        """Steps between evaluations."""
        return self.settings.training.eval_steps or self.settings.training.logging_steps
