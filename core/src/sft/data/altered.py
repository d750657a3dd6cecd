"""Templates that alter answers: whether what is learned of a record is the answer that it has."""

from __future__ import annotations

from sft.conversations import Turn
from sft.data.templates import Written
from sft.data.thoughts import parted
from sft.errors import UsageError
from sft.foreign_text import quoted

ENOUGH = 4
"""So many characters together show that a text comes from another."""


def holds_answer(turns: list[Turn], written: Written) -> bool:
    """Whether the last answer stands as it is, but for white space, in the last text that is learned.

    Raises :class:`UsageError` where nothing of it does: the model would learn what is left of the template.
    """
    turn = next(turn for turn in reversed(turns) if turn.trains)
    piece = next(piece for piece in reversed(written.pieces) if piece.targets)
    answer, text = turn.content, piece.text[slice(*piece.targets[-1])]
    if answer.strip() in text:
        return True
    thought, rest = parted(turn)
    if thought is not None and rest.strip() in text and thought.strip() in piece.text:
        return True
    answer, text = "".join(answer.split()), "".join(text.split())
    if answer in text:
        return True
    if not any(answer[start : start + ENOUGH] in text for start in range(0, len(answer), ENOUGH)):
        raise UsageError(
            f"the chat template leaves this record's answer out, and writes {quoted(text)} in its place; correct the "
            "template, or give chat_template another."
        )
    return False
