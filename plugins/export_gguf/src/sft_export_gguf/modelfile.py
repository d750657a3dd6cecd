"""A Modelfile for Ollama, whose templates are Go's: found by what the chat template writes, not by what it says.

Most chat templates write each message between two fixed texts. Those are read off conversations that the template has
written; the result is then compared with the template on others. Where it differs, nothing is claimed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import sft

_USER, _ANSWER, _MORE, _SYSTEM = "QuZ1x", "WjK2v", "YbH3p", "XfG4n"
"""Contents that stand nowhere in a template."""
_TRIALS = (
    (("user", "How are you?"),),
    (("system", "Be brief."), ("user", "Hello.\n\nSecond line")),
    (("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "Line\nline {x}"), ("user", "d")),
    (("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c")),
)
_SPACED = ((("user", " a \n"), ("assistant", "\n b "), ("user", "c")), (("system", " s "), ("user", "c")))


@dataclass(frozen=True)
class Turns:
    """What a template writes around messages; after the last one the model answers."""

    start: str
    """Before the first message, where that is not the system's."""
    system: tuple[str, str]
    user: tuple[str, str]
    """The second up to where the answer begins."""
    answer_end: str

    def write(self, messages: Sequence[tuple[str, str]]) -> str:
        around = {"system": self.system, "user": self.user, "assistant": ("", self.answer_end)}
        text = "" if messages[0][0] == "system" else self.start
        return text + "".join(around[role][0] + content + around[role][1] for role, content in messages)

    def go(self) -> str:
        """The same as a Go template for Ollama."""
        first = '{{ if or (not .Messages) (ne (index .Messages 0).Role "system") }}' + self.start + "{{ end }}"
        return (
            (first if self.start else "")
            + '{{ range .Messages }}{{ if eq .Role "system" }}'
            + self.system[0] + "{{ .Content }}" + self.system[1]
            + '{{ else if eq .Role "user" }}'
            + self.user[0] + "{{ .Content }}" + self.user[1]
            + '{{ else if eq .Role "assistant" }}{{ .Content }}'
            + self.answer_end
            + "{{ end }}{{ end }}"
        )  # fmt: skip


def modelfile(model: sft.FinishedModel, weights: str, system: str | None) -> str:
    """The text of a Modelfile for the GGUF file ``weights`` beside it. What of the model it cannot say is said to the
    user."""
    lines = [f"FROM ./{weights}"]
    turns = turns_of(model) if model.renders else None
    if turns is not None:
        lines.append(f'TEMPLATE """{turns.go()}"""')
    elif model.renders:
        model.say(
            "note: the chat template does more than to write each message between fixed texts, so the Modelfile has no "
            "TEMPLATE, and Ollama takes what it has for one that resembles it; add a TEMPLATE in Go's language"
        )
    if system is not None:
        if '"""' in system:
            raise sft.UsageError('gguf_system must not contain """, which ends a text in a Modelfile; change it.')
        lines.append(f'SYSTEM """{system}"""')
    lines += [f"PARAMETER {name} {value}" for name, value in _parameters(model)]
    return "\n".join(lines) + "\n"


def _parameters(model: sft.FinishedModel) -> list[tuple[str, str]]:
    """The texts that end an answer, and how it is drawn."""
    texts = {added["id"]: added["content"] for added in model.tokenizer_json.get("added_tokens", ())}
    found = [
        ("stop", f'"{texts[number]}"') for number in model.stop_ids if number in texts and '"' not in texts[number]
    ]
    given = model.generation
    if given.get("do_sample") is False:
        given = {"temperature": 0, "repetition_penalty": given.get("repetition_penalty")}
    names = {"temperature": "temperature", "top_k": "top_k", "top_p": "top_p", "repetition_penalty": "repeat_penalty"}
    return found + [(name, str(given[key])) for key, name in names.items() if isinstance(given.get(key), (int, float))]


def turns_of(model: sft.FinishedModel) -> Turns | None:
    """What the chat template of ``model`` writes around messages, without the token that the tokenizer begins a text
    with; None where it does more than that."""
    if "strftime_now" in (model.chat_template or ""):  # it writes the date, which would stay today's
        return None
    try:
        plain = _pieces(model, [("user", _USER), ("assistant", _ANSWER), ("user", _MORE)])
        headed = _pieces(model, [("system", _SYSTEM), ("user", _USER)])
    except sft.UsageError:  # it refuses a role, or an order
        return None
    if plain is None or headed is None:
        return None
    before, asked, between, last = plain
    opening = _common_end(before, between, headed[1])
    turns = Turns(
        before.removesuffix(opening),
        (headed[0], headed[1].removesuffix(opening)),
        (opening, last),
        between.removesuffix(opening),
    )
    if asked != last or headed[2] != last or not _agrees(model, turns, _TRIALS):
        return None
    if any("{{" in text or '"""' in text for text in _texts(turns)):  # which would be Go, or the end of the template
        return None
    if not _agrees(model, turns, _SPACED):
        model.say("note: the chat template takes spaces around a message away, and Ollama keeps them")
    return turns


def _texts(turns: Turns) -> tuple[str, ...]:
    return (turns.start, *turns.system, *turns.user, turns.answer_end)


def _pieces(model: sft.FinishedModel, messages: Sequence[tuple[str, str]]) -> list[str] | None:
    """What stands around the contents of ``messages``; None where one of them is not there once."""
    text, pieces = _rendered(model, messages), []
    for _, content in messages:
        if text.count(content) != 1:
            return None
        before, _, text = text.partition(content)
        pieces.append(before)
    return [*pieces, text]


def _rendered(model: sft.FinishedModel, messages: Sequence[tuple[str, str]]) -> str:
    text = model.render([sft.Turn(role, content) for role, content in messages], add_generation_prompt=True)
    return text.removeprefix(model.bos_text) if model.adds_bos and model.bos_text is not None else text


def _agrees(model: sft.FinishedModel, turns: Turns, trials: Sequence[Sequence[tuple[str, str]]]) -> bool:
    try:
        return all(turns.write(messages) == _rendered(model, messages) for messages in trials)
    except sft.UsageError:
        return False


def _common_end(*texts: str) -> str:
    """The longest text with which all of them end."""
    shortest = min(texts, key=len)
    ends = (shortest[at:] for at in range(len(shortest) + 1))
    return next(end for end in ends if all(text.endswith(end) for text in texts))
