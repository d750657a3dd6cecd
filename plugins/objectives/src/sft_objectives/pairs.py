"""Preference records: one question, an answer that was chosen, and one that was rejected."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import sft
from sft import Conversation


def pair_of(record: Mapping[str, Any]) -> Conversation:
    """The conversation that was chosen, with the rejected one beside it; what both begin with is not learned.

    Known are TRL's layouts (``prompt``, ``chosen`` and ``rejected`` as texts or as messages; the last two as whole
    conversations) and LLaMA-Factory's (``chosen`` and ``rejected`` beside ``instruction`` and ``input``, or
    beside ``conversations``). Raises ``ValueError`` for what is no such record.
    """
    for key in ("chosen", "rejected"):
        if not record.get(key):
            raise ValueError(
                f'the record has no "{key}" (its keys: {sft.shown(", ".join(record))}), and dpo learns from pairs of '
                "answers; take it out, or leave dpo out."
            )
    if record.get("weight") is not None:
        raise ValueError('a pair of answers has no "weight" of its own; take it out.')
    chosen, rejected = (_with_answer(record, key) for key in ("chosen", "rejected"))
    same = next((n for n, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
    if same is None:
        raise ValueError('"chosen" and "rejected" are the same, or one begins the other, so neither is preferred.')
    rejected = _after(rejected, same, "rejected")
    return Conversation(_after(chosen, same, "chosen"), tools=chosen.tools, beside=[rejected])


def _with_answer(record: Mapping[str, Any], which: str) -> Conversation:
    """The whole conversation that ends with the answer that was ``which``, chosen or rejected."""
    more = {key: record[key] for key in ("system", "tools") if record.get(key) is not None}
    answers = _answers(record[which], which)
    if answers and _role(answers[0]) not in ("assistant", "gpt"):
        # A whole conversation; what stands beside it only repeats some of it.
        return sft.turns_of({**more, "messages": answers})
    if record.get("instruction") is not None:
        kept = {key: record[key] for key in ("instruction", "input", "history") if record.get(key) is not None}
        return sft.turns_of({**kept, **more, "output": _text(record[which])})
    for key in ("prompt", "question", "messages", "conversations"):
        if record.get(key) is not None:
            name = "conversations" if key == "conversations" else "messages"
            return sft.turns_of({**more, name: [*_messages(record[key], key), *answers]})
    raise ValueError(
        f"the record has two answers and no question (its keys: {sft.shown(', '.join(record))}); give it as "
        '"prompt", or begin "chosen" and "rejected" with it.'
    )


def _after(turns: Conversation, same: int, key: str) -> Conversation:
    """``turns``, of which those from number ``same`` on are learned, as far as they are answers."""
    learned = turns.of(replace(turn, trains=turn.trains and n >= same) for n, turn in enumerate(turns))
    if not any(turn.trains for turn in learned):
        raise ValueError(f'"{key}" holds no answer that the other has not.')
    if any(turn.weight != 1 for turn in learned if turn.trains):
        raise ValueError(f'a message of "{key}" has a weight, which a pair of answers does not take; take it out.')
    return learned


def _answers(answer: Any, which: str) -> list[Any]:
    """What follows the question, as messages: a text, a message, or several."""
    if isinstance(answer, str):
        return [_message("assistant", answer)]
    return [answer] if isinstance(answer, Mapping) else _messages(answer, which)


def _messages(value: Any, key: str) -> list[Any]:
    if isinstance(value, str):
        return [_message("user", value)]
    if not isinstance(value, list):
        raise ValueError(f'"{key}" must be text or a list of messages, not {sft.shown(repr(value)[:80])}.')
    return value


def _text(answer: Any) -> Any:
    """The answer beside an instruction; of a message its content."""
    if isinstance(answer, list) and len(answer) == 1:
        answer = answer[0]
    return answer.get("value", answer.get("content")) if isinstance(answer, Mapping) else answer


def _message(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


def _role(message: Any) -> Any:
    return message.get("role", message.get("from")) if isinstance(message, Mapping) else None
