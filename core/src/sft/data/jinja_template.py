"""Chat templates in Jinja, rendered as transformers renders them, and where in their text the answers stand.

A template with ``{% generation %}`` blocks says itself what is learned. In any other, an answer is what the
template adds to the text that generation would start from, wherever those two agree with the whole text.
"""

from __future__ import annotations

import datetime
import json
import re
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from sft.conversations import Conversation, Turn, up_to_last_target
from sft.data.template_habits import Habits
from sft.data.templates import Marks, Source, Written, WrittenText
from sft.data.texts import all_texts
from sft.data.thoughts import parted, without_empty, without_empty_end
from sft.errors import UsageError

_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_DATE = re.compile(r"""strftime_now\s*\(\s*(?:'([^'\\]*)'|"([^"\\]*)")\s*\)""")
_PRIVATE = range(0xE000, 0xF8FF)
"""Code points without a meaning, of which two that no message holds mark the blocks while a text is rendered."""


class _OfThread(threading.local):
    """What a thread has for itself: a stream is encoded while the model trains, by a thread."""

    edges = ("", "")
    """What marks blocks in the text that is being rendered."""
    environment: Any = None
    template: Any = None


class JinjaTemplate:
    """A Hugging Face chat template; ``now`` is what it is told the date is, ``told`` what else it is told by name."""

    one_bos = True

    def __init__(
        self, source: Source, marks: Marks, now: datetime.datetime, told: Mapping[str, Any] | None = None
    ) -> None:
        self.place = source.place
        self.marks = marks
        self.habits = Habits(self._write, source.place)
        self._told = dict(told or {})
        self._source = source.text
        self._now = now
        self._mine = _OfThread()
        self._has_blocks = bool(_GENERATION.search(source.text))

    @property
    def takes_thoughts(self) -> bool:
        return self.habits.thought is not None

    def render(self, turns: Sequence[Turn], add_generation_prompt: bool = False) -> str:
        return self._render(Conversation.seen(turns), add_generation_prompt)[0]

    def prompt(self, turns: Sequence[Turn]) -> list[str]:
        conversation = Conversation.seen(turns)
        text = self.render(conversation, add_generation_prompt=True)
        self.habits.check(conversation, text)
        return [text]

    def training(self, turns: Sequence[Turn]) -> Written:
        conversation = up_to_last_target(turns)
        written = self._by_blocks(conversation) if self._has_blocks else self._by_prompts(conversation)
        self.habits.check(conversation, written.pieces[0].text)
        return written

    def texts(self, turns: Sequence[Turn]) -> list[str]:
        if self._has_blocks:
            return [piece.text for piece in self.training(turns).pieces]
        conversation = up_to_last_target(turns)
        text = self.render(conversation)
        self.habits.check(conversation, text)
        end = self.marks.end_of_turn(text)
        return [text[:end] if end is not None else text + self.marks.eos]

    # --- which characters are learned -----------------------------------------------------------------------

    def _by_prompts(self, turns: Conversation) -> Written:
        """An earlier answer that the template writes otherwise by the end of the conversation is not learned: what
        stands there is not what the model would have had to answer."""
        text, targets, weights, rewritten, calls = self.render(turns), [], [], 0, 0
        for index, turn in enumerate(turns):
            if not turn.trains:
                continue
            before = self.render(turns.of(turns[:index]), add_generation_prompt=True)
            is_last = index + 1 == len(turns)
            until = text if is_last else self.render(turns.of(turns[: index + 1]))
            if is_last and not until.startswith(before):
                if self._told.get("enable_thinking") is False and (parted(turn)[0] or "").strip():
                    raise UsageError(
                        "enable_thinking is false, so the model is asked for answers without a thought, and the last "
                        "answer of this record has one; leave enable_thinking out, or take the thought out."
                    )
                raise UsageError(
                    f"The chat template of {self.place} writes an answer into another text than the one it gives to be "
                    f"answered ({_difference(before, until)}), so what is learned would not be what is asked for; give "
                    "chat_template another file, or a template with generation blocks."
                )
            if turn.tool_calls and until.startswith(before) and not text.startswith(until):
                # A call is no other one where the empty thought before it goes once its result is there (Qwen3).
                answer = until[len(before) :]
                before = without_empty_end(before)
                until = before + without_empty(answer)
            if not (until.startswith(before) and text.startswith(until)):
                rewritten += 1
                calls += len(turn.tool_calls)
                continue
            end = self.marks.end_of_turn(until)
            if end is None and is_last:  # as ``texts`` does
                until += self.marks.eos
                text, end = until, len(until)
            targets.append((len(before), end if end is not None else len(until)))
            weights.append(turn.weight)
        return Written((WrittenText(text[: targets[-1][1]], tuple(targets), tuple(weights)),), rewritten, calls)

    def _by_blocks(self, turns: Conversation) -> Written:
        """The blocks as they stand; a block belongs to the answer of the same number."""
        text, blocks = self._render(turns, False)
        answers = [index for index, turn in enumerate(turns) if turn.role == "assistant"]
        common = turns[answers[0]].weight if answers else 1.0
        if all(turns[index].trains and turns[index].weight == common for index in answers):
            chosen = [(block, common) for block in blocks]
        else:
            parts = [turns.of(turns[: end + 1]) for end in answers]
            if any(len(self._render(part, False)[1]) != number for number, part in enumerate(parts, start=1)):
                raise UsageError(
                    f"The chat template of {self.place} has not one generation block for each answer, so an answer "
                    "that is not to be learned, or weighs something else, cannot be told from the others; learn from "
                    "all alike, or take it out."
                )
            learned = [(block, turns[index]) for block, index in zip(blocks, answers, strict=True)]
            chosen = [(block, turn.weight) for block, turn in learned if turn.trains]
        chosen = [(block, weight) for block, weight in chosen if block[1] > block[0]]
        if not chosen:
            raise UsageError(
                f"The chat template of {self.place} puts no text into its generation blocks for a conversation of "
                f"{_roles(self.habits.messages(turns))}; correct the template."
            )
        targets, weights = zip(*chosen, strict=True)
        text = text[: targets[-1][1]]
        ends = self.marks.end_of_turn(text) is not None
        return Written((WrittenText(text, targets, weights),), max(0, len(answers) - len(blocks)), ends=ends)

    # --- rendering ------------------------------------------------------------------------------------------

    def _render(self, turns: Conversation, add_generation_prompt: bool) -> tuple[str, list[tuple[int, int]]]:
        """The text, and the ranges of characters that come from generation blocks."""
        variables = {"add_generation_prompt": add_generation_prompt, **self._told}
        return self._written(self.habits.messages(turns), turns.tools, all_texts(turns), variables)

    def _write(self, messages: list[dict[str, Any]], tools: Sequence[dict[str, Any]]) -> str:
        """What it writes of messages that are none of a record's."""
        texts = [json.dumps(value, ensure_ascii=False) for value in (*messages, *tools)]
        return self._written(messages, tools, texts, {"add_generation_prompt": False, **self._told})[0]

    def _written(
        self,
        messages: list[dict[str, Any]],
        tools: Sequence[dict[str, Any]],
        texts: list[str],
        variables: Mapping[str, Any],
    ) -> tuple[str, list[tuple[int, int]]]:
        environment, template = self._compiled()
        if self._has_blocks:
            self._mine.edges = _unused_characters(texts)
        values = {
            "messages": messages,
            "tools": list(tools) or None,
            "documents": None,
            **variables,
            **self.marks.special,
        }
        try:
            text = environment.written(template, texts, values)
        except Exception as error:
            cause = " ".join(str(error).split()).rstrip(".")
            raise UsageError(
                f"The chat template of {self.place} cannot write a conversation of {_roles(messages)}: {cause}."
            ) from error
        return _without_edges(text, *self._mine.edges) if self._has_blocks else (text, [])

    def _compiled(self) -> tuple[Any, Any]:
        """The sandbox of this thread, and the template in it."""
        if self._mine.template is None:
            from jinja2.ext import loopcontrols

            from sft.data.sandbox import Sandbox

            environment = Sandbox(extensions=[loopcontrols, _generation_extension(self)])
            environment.limit_filter("tojson", _tojson)
            environment.globals["strftime_now"] = self._now.strftime
            try:
                template = environment.compiled(self._source)
            except Exception as error:
                raise UsageError(
                    f"The chat template of {self.place} is not valid Jinja ({error}); give chat_template another file."
                ) from error
            template.globals = dict(template.globals)  # a chain of dictionaries is slow to copy, once for each text
            self._mine.environment, self._mine.template = environment, template
        return self._mine.environment, self._mine.template

    def between_edges(self, text: str) -> str:
        """What stands for a generation block in the text that Jinja makes."""
        opening, closing = self._mine.edges
        return opening + text + closing


def _generation_extension(owner: JinjaTemplate) -> Any:
    """The Jinja tag ``{% generation %} … {% endgeneration %}``; jinja2 is imported when a template is used."""
    from jinja2 import nodes
    from jinja2.ext import Extension

    class Generation(Extension):
        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

        def _mark(self, caller: Any) -> str:
            return owner.between_edges(caller())

    return Generation


def _unused_characters(texts: Sequence[str]) -> tuple[str, str]:
    used = {character for text in texts for character in text if 0xE000 <= ord(character) <= 0xF8FF}
    free = (chr(code) for code in _PRIVATE if chr(code) not in used)
    return next(free), next(free)


def _without_edges(marked: str, opening: str, closing: str) -> tuple[str, list[tuple[int, int]]]:
    text: list[str] = []
    blocks: list[tuple[int, int]] = []
    length, start = 0, 0
    for part in re.split(f"([{opening}{closing}])", marked):
        if part == opening:
            start = length
        elif part == closing:
            blocks.append((start, length))
        else:
            text.append(part)
            length += len(part)
    return "".join(text), blocks


def written_dates(template: str, now: datetime.datetime) -> list[str]:
    """What the template may write of the date: its forms of it, or all of ``now`` where one is not plainly there."""
    calls = len(re.findall(r"strftime_now\b(?!\s+is\b)", template))
    forms = [single or double for single, double in _DATE.findall(template)]
    return [now.strftime(form) for form in forms] if len(forms) == calls else [now.isoformat()]


def _difference(before: str, until: str) -> str:
    """Where two texts part, as a quotation of each."""
    at = next((i for i, (a, b) in enumerate(zip(before, until, strict=False)) if a != b), min(len(before), len(until)))
    shown = [json.dumps(text[at : at + 30], ensure_ascii=False) for text in (until, before)]
    return f"{shown[0]} in the place of {shown[1]}"


def _roles(messages: Sequence[Mapping[str, Any]]) -> str:
    roles = [str(message["role"]) for message in messages]
    more = f" and {len(roles) - 8:,} more turns" if len(roles) > 8 else ""
    return (", ".join(roles[:8]) or "no turn") + more


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
