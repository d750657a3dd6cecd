"""What hooks ask of their run (``run.control``): to stop, to save, to evaluate.

``training/wishes.py`` makes one answer of what the processes of a run ask, and ``training/loop.py`` carries it out.
"""

from __future__ import annotations

STOP, SAVE, EVALUATE = "stop", "save", "evaluate"


class Control:
    """Asks something of the run, from any hook and in any process: it is done once, in all of them.

    It is done when the step that is under way has ended, and what is asked before the first step, after that one. What
    :func:`sft_evaluated` asks is done after the same step, but for another evaluation, which comes after the next one;
    so does what :func:`sft_checkpoint_saved` asks. After the last step, and with ``do_train false``, nothing is done.

    Attributes:
        evaluates: Whether there is dev data that is measured; known from ``sft_collator`` on, and False before.
    """

    def __init__(self) -> None:
        self.evaluates = False
        self._asked: dict[str, str] = {}

    def stop(self, reason: str) -> None:
        """End the training after this step as after the last one: the result is written and measured, and the run has
        finished. ``reason`` is a clause for the user, such as "eval_loss has not fallen in 3 evaluations"; ``run.json``
        has it. Of several, the first counts. Raises :class:`ValueError` where there is none."""
        if not isinstance(reason, str) or not reason.strip():
            raise ValueError(f"run.control.stop needs a reason for the user, got {reason!r}")
        self._asked.setdefault(STOP, " ".join(reason.split()))

    def save(self) -> None:
        """Write a checkpoint of this step, whatever ``save_strategy`` says. It counts in ``save_total_limit``, and, if
        this step is evaluated too, among those that ``load_best_model_at_end`` chooses from."""
        self._asked[SAVE] = ""

    def evaluate(self) -> None:
        """Measure the dev data at this step. Where there is none, the user is told so, and the run goes on."""
        self._asked[EVALUATE] = ""

    def taken(self) -> dict[str, str]:
        """For the core: what has been asked since the last call, with the reasons of stops."""
        asked, self._asked = self._asked, {}
        return asked
