"""What a record of a data file is to a chat template: a conversation, its turns, and the calls in them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ToolCall:
    """A call in an answer. ``arguments`` are JSON values by name; ``id`` is what a result names it by, if anything."""

    name: str
    arguments: dict[str, Any]
    id: str | None = None


@dataclass(frozen=True)
class Turn:
    """One message of a conversation.

    Attributes:
        role: system, user, assistant, or tool for the result of a call; text for a document, which is alone.
        content: Its text; of an answer what follows the thought and stands beside the calls.
        trains: Whether it is a target: its thought, its text and its calls.
        weight: What the loss of each of its targets counts; above 0 where it trains.
        reasoning: The thought before an answer. One may also stand in ``content``, between ``<think>`` and
            ``</think>``; it is then written as it stands there where the chat template takes it so.
        tool_calls: The calls of an answer.
        tool_call_id: Of a result, the ``id`` of its call.
        name: Of a result, the name of the tool.
    """

    role: str
    content: str
    trains: bool = False
    weight: float = 1.0
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    name: str | None = None


class Conversation(list[Turn]):
    """The turns of a record, the tools that are offered in it, where it stands, and what it weighs.

    ``tools`` are JSON objects as OpenAI has them: ``{"type": "function", "function": {"name": …, …}}``. ``place`` is
    the file and line, for what can only be found wrong later; the core sets it. The weight of each turn counts
    ``weight`` times. ``beside`` are further conversations of the same record, such as other answers to its question:
    all of them are learned in one row, in their order, as documents that do not see each other.
    """

    def __init__(
        self,
        turns: Iterable[Turn] = (),
        place: Any = None,
        tools: Iterable[dict[str, Any]] = (),
        weight: float = 1.0,
        beside: Iterable[Conversation] = (),
    ) -> None:
        super().__init__(turns)
        self.place = place
        self.tools = tuple(tools)
        self.weight = weight
        self.beside = tuple(beside)

    @property
    def together(self) -> tuple[Conversation, ...]:
        """All conversations of the record, this one first."""
        return (self, *self.beside)

    def of(self, turns: Iterable[Turn]) -> Conversation:
        """Other ``turns`` with the same tools, place and weight, such as some of its own, and nothing beside them."""
        return Conversation(turns, self.place, self.tools, self.weight)

    @staticmethod
    def seen(turns: Sequence[Turn]) -> Conversation:
        """``turns`` as a conversation; itself if it is one."""
        return turns if isinstance(turns, Conversation) else Conversation(turns)


def up_to_last_target(turns: Sequence[Turn]) -> Conversation:
    """``turns`` without those after the last one that trains, which training does not read."""
    last = max(index for index, turn in enumerate(turns) if turn.trains)
    return Conversation.seen(turns).of(turns[: last + 1])
