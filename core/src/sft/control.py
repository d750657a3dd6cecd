"""What hooks ask of their run (``run.control``): to stop, to save, to evaluate.

``training/wishes.py`` makes one answer of what the processes of a run ask, and ``training/loop.py`` carries it out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

STOP, SAVE, EVALUATE = "stop", "save", "evaluate"


_observes: ContextVar[bool] = ContextVar("observes", default=False)


@contextlib.contextmanager
def observing() -> Iterator[None]:
    """Within it nothing may be asked of a run: who only watches is called."""
    token = _observes.set(True)
    try:
        yield
    finally:
        _observes.reset(token)


class Control:
    """Asks something of the run, from any hook and in any process: it is done once, in all of them.

    It is done when the step that is under way has ended, and what is asked before the first step, after that one. What
    :func:`sft_evaluated` asks is done after the same step, but for another evaluation, which comes after the next one;
    so does what :func:`sft_checkpoint_saved` asks. After the last step, and with ``do_train false``, nothing is done.
    """

    def __init__(self) -> None:
        self._asked: dict[str, str] = {}

    def stop(self, reason: str) -> None:
        """End the training after this step as after the last one: the result is written and measured, and the run has
        finished. ``reason`` is a clause for the user, such as "eval_loss has not fallen in 3 evaluations"; ``run.json``
        has it. Of several, the first counts. Raises :class:`ValueError` where there is none."""
        if not isinstance(reason, str) or not reason.strip():
            raise ValueError(f"run.control.stop needs a reason for the user, got {reason!r}")
        self._ask(STOP, " ".join(reason.split()))

    def save(self) -> None:
        """Write a checkpoint of this step, whatever ``save_strategy`` says. It counts in ``save_total_limit``, and, if
        this step is evaluated too, among those that ``load_best_model_at_end`` chooses from."""
        self._ask(SAVE)

    def evaluate(self) -> None:
        """Measure the dev data at this step. Where there is none, the user is told so, and the run goes on."""
        self._ask(EVALUATE)

    def _ask(self, kind: str, reason: str = "") -> None:
        if _observes.get():
            raise RuntimeError(f"a plugin that only watches (observes = True) asks the run to {kind}")
        self._asked.setdefault(kind, reason)

    def taken(self) -> dict[str, str]:
        """For the core: what has been asked since the last call, with the reasons of stops."""
        asked, self._asked = self._asked, {}
        return asked
