"""Chat templates: where one comes from, how it is kept, and the two that are no Jinja of Hugging Face's kind.

A template turns a conversation into pieces of text, each tokenised as a whole, and says which characters of
them are learned. ``jinja_template.py`` has the usual kind; here are PaddleNLP's pairs, and none at all.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from sft.conversations import Conversation, Turn, up_to_last_target
from sft.data.template_habits import refuse_tools
from sft.data.thoughts import with_thought
from sft.errors import UsageError
from sft.foreign_text import listed, quoted
from sft.model_files import check_links
from sft.small_files import is_there, read_object, read_text, why

JINJA_FILE = "chat_template.jinja"
PAIRS_FILE = "chat_template.json"


@dataclass(frozen=True)
class WrittenText:
    """Text that is tokenised as a whole, the character ranges in it that are targets, and what each of them weighs."""

    text: str
    targets: tuple[tuple[int, int], ...] = ()
    weights: tuple[float, ...] = ()

    @classmethod
    def of(cls, text: str, turn: Turn | None = None) -> WrittenText:
        """Text that is a target as a whole, if it is that of a turn that trains."""
        return cls(text, ((0, len(text)),), (turn.weight,)) if turn is not None and turn.trains else cls(text)


@dataclass(frozen=True)
class Written:
    """A conversation as training reads it."""

    pieces: tuple[WrittenText, ...]
    rewritten: int = 0
    """Answers that were to be learned and are not, because the template writes them otherwise once they are past."""
    calls_rewritten: int = 0
    """The tool calls in these."""
    ends: bool = True
    """Whether what is learned ends with a token on which an answer can stop."""
    is_raw: bool = False
    """Whether it is a document (:mod:`sft.data.raw_text`), which begins as the tokenizer begins a text."""


@dataclass(frozen=True)
class Marks:
    """What a template needs to know of a tokenizer."""

    special: dict[str, str]
    """``bos_token``, ``eos_token`` and so on, as templates name them."""
    endings: tuple[str, ...]
    """The texts of all tokens on which a turn may end."""
    eos: str

    def end_of_turn(self, text: str) -> int | None:
        """Where the special token that ends ``text`` ends, white space after it left out; None without one."""
        stripped = text.rstrip()
        return len(stripped) if stripped.endswith(self.endings) else None


class Template(Protocol):
    """How a conversation is written."""

    marks: Marks
    one_bos: bool
    """Whether the tokenizer's BOS is added where it is missing and doubled ones go; if not, tokens stay as written."""

    @property
    def takes_thoughts(self) -> bool:
        """Whether it takes the thought of an answer apart from its content; if not, it is written before that."""
        ...

    def training(self, turns: Sequence[Turn]) -> Written:
        """The text up to the last answer that trains. Raises :class:`UsageError` where no mask would be right."""
        ...

    def texts(self, turns: Sequence[Turn]) -> list[str]:
        """The pieces of text that :meth:`training` makes, in a time that grows with the turns alone."""
        ...

    def prompt(self, turns: Sequence[Turn]) -> list[str]:
        """The pieces of text from which the model is to answer."""
        ...

    def render(self, turns: Sequence[Turn], add_generation_prompt: bool = False) -> str:
        """The conversation as one text; with ``add_generation_prompt``, up to where the model is to answer."""
        ...


# --- where a template comes from --------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """A template's text: ``kind`` is jinja, pairs (PaddleNLP's ``chat_template.json``) or none."""

    kind: str
    text: str
    place: str
    """The file or folder that errors name."""
    name: str
    """What a run says it uses."""

    def same(self, other: Source) -> bool:
        return (self.kind, self.text) == (other.kind, other.text)

    def write(self, folder: Path) -> None:
        """Make this the template of the tokenizer whose files are in ``folder``, for every reader of them.

        transformers prefers ``chat_template.jinja``; its older versions and PaddleNLP read ``tokenizer_config.json``.
        """
        for name in (JINJA_FILE, PAIRS_FILE):
            (folder / name).unlink(missing_ok=True)
        if self.kind != "none":
            (folder / (JINJA_FILE if self.kind == "jinja" else PAIRS_FILE)).write_text(self.text, encoding="utf-8")
        path = folder / "tokenizer_config.json"
        if path.is_file():
            config = json.loads(path.read_text(encoding="utf-8"))
            config.pop("chat_template", None)
            if self.kind == "jinja":
                config["chat_template"] = self.text
            path.write_text(json.dumps(config, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def find_source(folder: Path, given: str | None = None) -> Source:
    """The template that is asked for: ``given`` (a file, a tokenizer's folder, or none), else that of ``folder``."""
    if given is None:
        return _of_folder(folder)
    if given.strip().lower() == "none":
        return Source("none", "", str(folder), "none; prompt and answer follow each other")
    path = Path(given).expanduser()
    if path.is_dir():
        check_links(path)
        return _of_folder(path)
    text = _read(path)
    if path.suffix == ".json":
        return _of_json(path, text)
    if not text.strip():
        raise UsageError(f"chat_template {path} is empty; give a template, or none to train without one.")
    return Source("jinja", text, str(path), str(path))


def _of_folder(folder: Path) -> Source:
    """A Jinja template first, as transformers finds it, then PaddleNLP's pairs."""
    if is_there(folder / JINJA_FILE):
        return Source("jinja", _read(folder / JINJA_FILE), str(folder), f"{folder / JINJA_FILE}{_unused(folder)}")
    path = folder / "tokenizer_config.json"
    found = read_object(path).get("chat_template") if is_there(path) else None
    if isinstance(found, list) and all(
        isinstance(entry, dict) and {"name", "template"} <= set(entry) for entry in found
    ):
        named = {str(entry["name"]): entry["template"] for entry in found}
        found = named.get("default") or next(iter(named.values()), None)
    if found is not None and not isinstance(found, str):
        raise UsageError(
            f"{path} must give chat_template as text, or a list of objects with name and template, not "
            f"{quoted(found)}; correct it, or give chat_template a file."
        )
    if found is not None:
        return Source("jinja", found, str(folder), f"{path}{_unused(folder)}")
    if (folder / PAIRS_FILE).is_file():
        return _of_json(folder / PAIRS_FILE, _read(folder / PAIRS_FILE))
    return Source("none", "", str(folder), f"none in {folder}; prompt and answer follow each other")


def _unused(folder: Path) -> str:
    return f" ({PAIRS_FILE} beside it is not used)" if (folder / PAIRS_FILE).is_file() else ""


def _of_json(path: Path, text: str) -> Source:
    """PaddleNLP's object, or one that holds a Jinja template as old processors of transformers have it."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"Chat template {path} is not valid JSON ({why(error)}); correct it.") from error
    if isinstance(values, dict) and isinstance(values.get("chat_template"), str):
        return Source("jinja", values["chat_template"], str(path), str(path))
    fault = _fault(values)
    if fault:
        raise UsageError(
            f"Chat template {path}: {fault}; PaddleNLP's form is "
            '{"system": "…", "conversation": ["… {{user}} …", "{{bot}} …"], "query": "… {{query}} …"}.'
        )
    return Source("pairs", text, str(path), f"{path} (PaddleNLP)")


def _fault(values: Any) -> str:
    if not isinstance(values, dict):
        return f"it holds {type(values).__name__}, not an object"
    unknown = [key for key in values if key not in ("system", "conversation", "query")]
    if unknown:
        return f"it has unknown keys ({listed(unknown, 3)})"
    parts = values.get("conversation")
    if not (isinstance(parts, list) and len(parts) == 2 and all(isinstance(part, str) for part in parts)):
        return '"conversation" must be two texts, what the user says and what the bot answers'
    wrong = [key for key in ("system", "query") if not isinstance(values.get(key), (str, type(None)))]
    return f'"{wrong[0]}" must be text' if wrong else ""


def _read(path: Path) -> str:
    return read_text(path, "Chat template ", "give a file with a template, or none")


# --- none, and PaddleNLP's pairs ----------------------------------------------------------------------------


class Plain:
    """No template: turns follow each other, and answers end with end-of-text. Tokenised apart, as they are used."""

    one_bos = True
    takes_thoughts = False

    def __init__(self, marks: Marks) -> None:
        self.marks = marks

    def training(self, turns: Sequence[Turn]) -> Written:
        read = up_to_last_target(turns)
        return Written(tuple(map(WrittenText.of, self.prompt(read), read)))

    def texts(self, turns: Sequence[Turn]) -> list[str]:
        return [piece.text for piece in self.training(turns).pieces]

    def prompt(self, turns: Sequence[Turn]) -> list[str]:
        refuse_tools(Conversation.seen(turns), "A text without chat template")
        return [with_thought(turn) + (self.marks.eos if turn.role == "assistant" else "") for turn in turns]

    def render(self, turns: Sequence[Turn], add_generation_prompt: bool = False) -> str:
        return "".join(self.prompt(turns))


class _OfThread(threading.local):
    """The sandbox of a thread, and the parts of a template in it."""

    def __init__(self) -> None:
        from sft.data.sandbox import Sandbox

        self.environment = Sandbox(keep_trailing_newline=True)
        self.compiled: dict[str, Any] = {}


class Pairs:
    """PaddleNLP's ``chat_template.json``: a system text, then a text for each question and one for its answer.

    Training tokenises the parts one by one and adds nothing, as ``encode_chat_inputs`` does; a prompt is put
    together in the same parts, with ``query`` for the last question, as ``apply_chat_template`` writes it.
    """

    one_bos = False
    takes_thoughts = False

    def __init__(self, source: Source, marks: Marks) -> None:
        self.place = source.place
        self.marks = marks
        self._values = json.loads(source.text)
        self._mine = _OfThread()

    def training(self, turns: Sequence[Turn]) -> Written:
        refuse_tools(Conversation.seen(turns), f"Chat template {self.place}")
        texts, targets = self._parts(up_to_last_target(turns), {"is_training": True})
        return Written(tuple(map(WrittenText.of, texts, targets)), ends=self.marks.end_of_turn(texts[-1]) is not None)

    def texts(self, turns: Sequence[Turn]) -> list[str]:
        return [piece.text for piece in self.training(turns).pieces]

    def prompt(self, turns: Sequence[Turn]) -> list[str]:
        refuse_tools(Conversation.seen(turns), f"Chat template {self.place}")
        if not turns or turns[-1].role != "user":
            raise UsageError(f"Chat template {self.place} writes a prompt that ends with the user's turn; add one.")
        context: dict[str, Any] = {"is_training": False}
        earlier, last = turns[:-1], turns[-1]
        number = sum(turn.role == "assistant" for turn in earlier)
        texts, _ = self._parts(earlier, context, length=number + 1)
        query = self._values.get("query")
        texts.append(last.content if query is None else self._write(query, query=last.content, index=number, **context))
        return texts

    def render(self, turns: Sequence[Turn], add_generation_prompt: bool = False) -> str:
        if add_generation_prompt:
            return "".join(self.prompt(turns))
        return "".join(self._parts(turns, {"is_training": True})[0])

    def _parts(
        self, turns: Sequence[Turn], context: dict[str, Any], length: int | None = None
    ) -> tuple[list[str], list[Turn | None]]:
        """Texts, and of which answer each is. ``context`` is filled as PaddleNLP fills it: ``length`` is known in a
        prompt only, and no turn of it is the last."""
        turns = list(turns)
        if turns and turns[0].role == "system":
            context["system"] = turns.pop(0).content
            if "system" not in self._variables:
                raise UsageError(
                    f"Chat template {self.place} has no place for a system turn; put {{{{system}}}} into it."
                )
        if [turn.role for turn in turns] != ["user", "assistant"] * (len(turns) // 2):
            raise UsageError(
                f"Chat template {self.place} writes pairs of a user's and an assistant's turn, and a conversation has "
                f"{', '.join(turn.role for turn in turns)}; correct it, or use a Jinja template."
            )
        texts: list[str] = []
        targets: list[Turn | None] = []
        if self._values.get("system"):
            texts.append(self._write(self._values["system"], **context))
            targets.append(None)
        if length is not None:
            context["length"] = length
        pairs = list(zip(turns[::2], turns[1::2], strict=True))
        for index, (user, bot) in enumerate(pairs):
            context.update(is_first=index == 0, is_last=length is None and index + 1 == len(pairs))
            for part in self._values["conversation"]:
                texts.append(self._write(part, user=user.content, bot=with_thought(bot), index=index, **context))
            targets += [None, bot]
        return texts, targets

    def _write(self, part: str, **values: Any) -> str:
        try:
            mine = self._mine
            if part not in mine.compiled:
                mine.compiled[part] = mine.environment.compiled(part)
            texts = [value for value in values.values() if isinstance(value, str)]
            return str(mine.environment.written(mine.compiled[part], texts, values))
        except Exception as error:
            raise self._unusable(error) from error

    @cached_property
    def _variables(self) -> set[str]:
        from jinja2.meta import find_undeclared_variables

        parts = [self._values.get("system") or "", *self._values["conversation"]]
        try:
            return {name for part in parts for name in find_undeclared_variables(self._mine.environment.parse(part))}
        except Exception as error:
            raise self._unusable(error) from error

    def _unusable(self, error: Exception) -> UsageError:
        return UsageError(f"Chat template {self.place} cannot be used ({' '.join(str(error).split())}).")
