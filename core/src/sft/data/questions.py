"""What a model is asked: the prompt that a conversation makes, and what its record has as the answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sft.conversations import Conversation, Turn, up_to_last_target
from sft.data.shortening import Suffixes, beginning
from sft.data.tokenizer import Tokenizer


def encode_prompt(turns: Sequence[Turn], tokenizer: Tokenizer) -> list[int]:
    """Ids of a conversation that the model is to answer: exactly what training shows before a target."""
    template = tokenizer.template
    ids = [token for text in template.prompt(turns) for token in tokenizer.encode(text)]
    return tokenizer.with_bos(ids) if template.one_bos else ids


def fitting(turns: list[Turn], tokenizer: Tokenizer, longest: int) -> list[Turn]:
    """``turns`` without the oldest questions and answers that make their prompt longer than ``longest`` tokens.

    A system turn and the last question stay, even where these alone are longer.
    """
    return Suffixes(turns).longest(longest, lambda kept: len(encode_prompt(kept, tokenizer)))


@dataclass(frozen=True)
class Question:
    """A record to be answered: its prompt's ids, the text of the last user turn, and the answer in the data."""

    ids: list[int]
    prompt: str
    reference: str

    @staticmethod
    def of(conversation: Conversation, tokenizer: Tokenizer, src_length: int) -> Question:
        """What stands before the last answer that is learned, of at most ``src_length`` tokens, as training cuts it:
        the oldest turns go first, then the beginning."""
        turns, answer = before_last_answer(conversation)
        ids = encode_prompt(fitting(turns, tokenizer, src_length), tokenizer)
        if len(ids) > src_length:
            del ids[beginning(ids, len(ids) - src_length, tokenizer)]
        return Question(ids, turns[-1].content if turns else "", reference_of(turns, answer, tokenizer))


def before_last_answer(conversation: Conversation) -> tuple[Conversation, Turn]:
    """The turns before the last answer that is learned, and that answer."""
    *before, answer = up_to_last_target(conversation)
    return conversation.of(before), answer


def reference_of(turns: Conversation, answer: Turn, tokenizer: Tokenizer) -> str:
    """The text that a model would have to answer with after ``turns``, as answers are shown: of an answer with a
    thought or calls what the chat template makes of it."""
    if not answer.tool_calls and answer.reasoning is None:
        return answer.content
    written = tokenizer.template.training(turns.of([*turns, answer]))
    piece = next(piece for piece in reversed(written.pieces) if piece.targets)
    ids = tokenizer.encode(piece.text[slice(*piece.targets[-1])])
    return tokenizer.decode(ids, skip_special_tokens=True).strip()
