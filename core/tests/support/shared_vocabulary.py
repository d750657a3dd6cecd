"""Work of several processes that share the vocabulary, done in turns by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from sft.training.loss import Vocabulary


class WaitingError(Exception):
    """A part has said what it brings to an operation of all."""


class Columns(Vocabulary):
    """One part's turn: operations that all have entered are answered, at the next one the turn ends."""

    def __init__(self, start: int, answers: list[Any]) -> None:
        self.start, self._answers = start, iter(answers)
        self.asked: tuple[str, Any] | None = None

    def maximum(self, values: Any) -> Any:
        return self._all("maximum", values)

    def total(self, values: Any) -> Any:
        return self._all("total", values)

    def _all(self, operation: str, values: Any) -> Any:
        answer = next(self._answers, None)
        if answer is None:
            self.asked = (operation, values)
            raise WaitingError
        return answer


def together(paddle: Any, starts: Sequence[int], work: Callable[[int, Columns], Any]) -> list[Any]:
    """What ``work(number, vocabulary)`` gives for each part. It is done from its beginning for each operation of all,
    which needs no processes; parts that do not enter the same operations fail."""
    answers: list[Any] = []
    while True:
        found, asked = [], []
        for number, start in enumerate(starts):
            vocabulary = Columns(start, answers)
            try:
                found.append(work(number, vocabulary))
            except WaitingError:
                assert vocabulary.asked is not None
                asked.append(vocabulary.asked)
        if not asked:
            return found
        assert len(asked) == len(starts)
        ((operation,), values) = {name for name, _ in asked}, paddle.stack([value for _, value in asked])
        answers.append(values.max(axis=0) if operation == "maximum" else values.sum(axis=0))
