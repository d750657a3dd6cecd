"""What a conversation loses first where it is too long: its oldest turns, then the beginning of its prompt."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence

import numpy as np

from sft.conversations import Conversation, Turn
from sft.data.tokenizer import Tokenizer


def without_oldest(turns: list[Turn]) -> list[Turn] | None:
    """The conversation without its oldest question and answer (a system turn stays); None if one is left."""
    suffixes = Suffixes(turns)
    return suffixes[1] if len(suffixes) > 1 else None


class Suffixes:
    """A conversation, then without its oldest question and answer, and so on; a system turn stays, and the turn
    ``kept``. Each is made when it is asked for: all of them are as long as the square of the turns."""

    def __init__(self, turns: list[Turn], kept: int | None = None) -> None:
        self._turns = turns
        self._head = 1 if turns and turns[0].role == "system" else 0
        last = len(turns) - 1 if kept is None else kept
        self._starts = [index for index in range(self._head + 1, last + 1) if turns[index].role == "user"]

    def __len__(self) -> int:
        return 1 + len(self._starts)

    def __getitem__(self, number: int) -> list[Turn]:
        if number == 0:
            return self._turns
        start = self._starts[number - 1]
        return Conversation.seen(self._turns).of(self._turns[: self._head] + self._turns[start:])

    def longest(self, most: int, length: Callable[[list[Turn]], int]) -> list[Turn]:
        """The first that has at most ``most`` tokens, the last one if none has. Few are measured: the tokens of all
        would take the square of the turns too."""
        last = len(self) - 1
        return self[bisect_left(range(last + 1), True, 0, last, key=lambda number: length(self[number]) <= most)]


def beginning(ids: Sequence[int] | np.ndarray, excess: int, tokenizer: Tokenizer) -> slice:
    """The first ``excess`` tokens of a prompt, which it loses where it is too long; a BOS before them stays."""
    first = int(tokenizer.bos_id is not None and ids[0] == tokenizer.bos_id)
    return slice(first, first + excess)
