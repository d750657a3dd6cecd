"""What of a conversation is learned: ``train_on`` and ``train_on_thoughts``.

It is decided on the text that the template writes, where a target is a range of characters, whatever the template.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from sft.conversations import Conversation, Turn, up_to_last_target
from sft.data.encoded import Counts
from sft.data.templates import Template, Written, WrittenText
from sft.data.thoughts import has_closing, parted, thoughts_in
from sft.errors import UsageError

TRAIN_ON = ("answers", "last_answer", "everything")
THOUGHTS = ("all", "not_empty", "none")


@dataclasses.dataclass(frozen=True)
class Text:
    """A conversation as training reads it."""

    written: Written
    """With all that stands in its answers as targets."""
    pieces: tuple[WrittenText, ...]
    """With the targets that are learned."""
    counts: Counts | None
    """Of its calls and thoughts; None where it has none of either."""


@dataclasses.dataclass(frozen=True)
class Learned:
    """``train_on``: answers (all that train), last_answer (of these the last), or everything, which is also the
    question and what the template puts around it. ``thoughts``: all, not_empty, or none of those in the answers."""

    train_on: str = "answers"
    thoughts: str = "all"

    def turns(self, turns: list[Turn]) -> list[Turn]:
        """``turns``, of which no more train than are learned."""
        trained = [index for index, turn in enumerate(turns) if turn.trains]
        if self.train_on != "last_answer" or len(trained) < 2:
            return turns
        earlier = set(trained[:-1])
        return Conversation.seen(turns).of(
            dataclasses.replace(turn, trains=False) if index in earlier else turn for index, turn in enumerate(turns)
        )

    def text(self, template: Template, turns: Sequence[Turn]) -> Text:
        """``turns`` written down. Raises what :meth:`sft.data.templates.Template.training` raises, and
        :class:`UsageError` where everything is learned and a turn weighs something else than the text around it."""
        if self.train_on == "everything":
            if any(turn.weight != 1 for turn in turns):
                raise UsageError(
                    "train_on everything learns a conversation as one text, and a message of this one has a weight of "
                    "its own; give the weight to the record, or leave train_on out."
                )
            texts = template.texts(turns)
            pieces = tuple(WrittenText(text, ((0, len(text)),), (1.0,)) for text in texts)
            written = Written(pieces, ends=template.marks.end_of_turn(texts[-1]) is not None)
        else:
            written = template.training(turns)
        if not _has_more(turns, written):
            return Text(written, written.pieces, None)
        counts = self._counts(template, turns, written)
        return Text(written, self._kept(written, turns, counts), counts)

    def _counts(self, template: Template, turns: Sequence[Turn], written: Written) -> Counts:
        counts = Counts()
        for turn in up_to_last_target(turns):
            if turn.trains:
                counts.calls += len(turn.tool_calls)
            if turn.tool_calls and not any(parted(turn)[1].strip() in piece.text for piece in written.pieces):
                counts.texts_removed_by_template += 1
            thought = parted(turn)[0] if turn.reasoning is not None or "</think>" in turn.content else None
            if thought is not None and thought.strip():
                is_seen = any(thought.strip() in piece.text for piece in written.pieces)
                counts.thoughts_removed_by_template += not is_seen
                is_put = is_seen and turn.reasoning is not None and not template.takes_thoughts
                counts.thoughts_put_before_answer += is_put
        counts.calls -= written.calls_rewritten
        counts.calls_rewritten_by_template = written.calls_rewritten
        return counts

    def _kept(self, written: Written, turns: Sequence[Turn], counts: Counts) -> tuple[WrittenText, ...]:
        """The pieces without the thoughts that are not learned, which are counted."""
        known = [turn.reasoning for turn in turns if turn.reasoning]
        pieces = []
        for piece in written.pieces:
            targets = list(zip(piece.targets, piece.weights, strict=True))
            for first, stop, is_empty in thoughts_in(piece.text, piece.targets, known):
                leaves = self.thoughts == "none" or (is_empty and self.thoughts == "not_empty")
                counts.thoughts += not leaves and not is_empty
                counts.empty_thoughts += not leaves and is_empty
                counts.thoughts_left_out += leaves and not is_empty
                counts.empty_thoughts_left_out += leaves and is_empty
                if leaves:
                    targets = [(part, w) for target, w in targets for part in _without(target, first, stop)]
            left, weights = tuple(target for target, _ in targets), tuple(weight for _, weight in targets)
            pieces.append(piece if left == piece.targets else WrittenText(piece.text, left, weights))
        return tuple(pieces)


def _has_more(turns: Sequence[Turn], written: Written) -> bool:
    """Whether there is a call or a thought to count. Most data has none, and is not to be slower for it."""
    if any(turn.tool_calls or turn.reasoning is not None or "</think>" in turn.content for turn in turns):
        return True
    return any(has_closing(piece.text) for piece in written.pieces)


def _without(target: tuple[int, int], first: int, stop: int) -> Iterator[tuple[int, int]]:
    """What is left of a range without the one from ``first`` to ``stop``."""
    start, end = target
    if stop <= start or first >= end:
        yield target
        return
    if start < first:
        yield start, first
    if stop < end:
        yield stop, end
