"""The model's tokenizer: ``tokenizer.json`` through the ``tokenizers`` library, and its chat template."""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from sft.conversations import ToolCall, Turn
from sft.data.jinja_template import JinjaTemplate, written_dates
from sft.data.templates import JINJA_FILE, PAIRS_FILE, Marks, Pairs, Plain, Template, find_source
from sft.errors import UsageError
from sft.foreign_text import quoted
from sft.small_files import is_there, read_bytes, read_object, why

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    JINJA_FILE,
    PAIRS_FILE,
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)
_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")


@dataclass(frozen=True)
class NewToken:
    """A token that the tokenizer's files do not have. One that is ``special`` is left out where answers are shown."""

    text: str
    special: bool = False


def tokens_beyond(folder: Path, other: Path) -> list[NewToken]:
    """The added tokens of the tokenizer in ``other`` that the one in ``folder`` does not have, or not as special ones,
    by their ids."""
    texts = [read_bytes(one / "tokenizer.json") for one in (folder, other)]
    if texts[0] == texts[1]:
        return []
    known, found = (_added_tokens(text) for text in texts)
    beyond = {text: special for text, special in found.items() if text not in known or (special and not known[text])}
    return [NewToken(text, special) for text, special in beyond.items()]


def _added_tokens(file: bytes) -> dict[str, bool]:
    """The added tokens of a ``tokenizer.json`` by their ids, each with whether it is special; none of a broken file, of
    which its reader speaks."""
    try:
        added = sorted(json.loads(file)["added_tokens"], key=lambda one: int(one["id"]))
        return {str(one["content"]): one.get("special") is True for one in added}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return {}


class Tokenizer:
    """Text ↔ token ids exactly as ``tokenizer.json`` says, special tokens, and the chat template if there is one."""

    def __init__(
        self,
        folder: Path,
        now: datetime.datetime | None = None,
        chat_template: str | None = None,
        enable_thinking: bool | None = None,
        new_tokens: Sequence[NewToken] = (),
    ) -> None:
        """``now`` is what templates that print the date are told; a resumed run keeps that of its beginning.

        ``chat_template``: a file, the folder of a tokenizer whose template is wanted, or none; unset, ``folder``'s own.
        ``enable_thinking`` is told to the template, too, unless it is None. ``new_tokens`` get the ids after those that
        there are, but for those that the tokenizer has.
        """
        from tokenizers import Tokenizer as Backend

        self.folder = folder
        self._given = chat_template
        self._enable_thinking = enable_thinking
        self._files = {name: read_bytes(folder / name) for name in FILES if is_there(folder / name)}
        self.now = now or datetime.datetime.now()
        path = folder / "tokenizer.json"
        if "tokenizer.json" not in self._files:
            raise UsageError(
                f"{folder} has no tokenizer.json; write one with transformers: "
                "AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)."
            )
        try:
            self.backend = Backend.from_str(self._files["tokenizer.json"].decode("utf-8"))
        except Exception as error:
            raise UsageError(f"{path} cannot be read by the tokenizers library ({why(error)}); replace it.") from error
        self._new_tokens = tuple(new_tokens)
        self.new_ids = self._add(self._new_tokens)
        """The ids of those of ``new_tokens`` that the tokenizer did not have."""
        self.backend.no_padding()
        self.backend.no_truncation()
        self.config = _read_object(folder / "tokenizer_config.json")
        declared = {**_read_object(folder / "special_tokens_map.json"), **self.config}
        self.special = {key: _text(key, declared[key], folder) for key in _SPECIAL if declared.get(key)}
        model = {**_read_object(folder / "config.json"), **_read_object(folder / "generation_config.json")}
        self.eos_ids = self._eos_ids(model)
        self.bos_id = self._id("bos_token")
        self.adds_bos = self.bos_id is not None and self.backend.encode("a").ids[:1] == [self.bos_id]
        """Whether the tokenizer itself begins a text with BOS."""
        pad = self._id("pad_token")
        self.pad_id = pad if pad is not None else (self.eos_ids[0] if self.eos_ids else 0)
        self._own = find_source(folder)
        self._source = self._own if chat_template is None else find_source(folder, chat_template)
        self.template: Template = self._template()

    def __reduce__(self) -> Any:
        """For another process: it reads the files again, where the path of a chat template means the same."""
        return Tokenizer, (self.folder, self.now, self._given, self._enable_thinking, self._new_tokens)

    def _add(self, tokens: Sequence[NewToken]) -> list[int]:
        """Add tokens, each whole wherever it stands in a text; the ids of those that were not there. One that is there
        keeps its id, and becomes special where that is asked for."""
        if not tokens:
            return []
        from tokenizers import AddedToken

        tokens = list(dict.fromkeys(tokens))
        fresh = dict.fromkeys(token for token in tokens if self.backend.token_to_id(token.text) is None)
        special = {one.content for one in self.backend.get_added_tokens_decoder().values() if one.special}
        changed = [token for token in tokens if token in fresh or (token.special and token.text not in special)]
        for token in changed:
            added = AddedToken(token.text, normalized=False, special=token.special)
            (self.backend.add_special_tokens if token.special else self.backend.add_tokens)([added])
        if changed:
            self._files["tokenizer.json"] = self.backend.to_str(pretty=True).encode()
        return [int(self.backend.token_to_id(token.text)) for token in fresh]

    # --- ids ------------------------------------------------------------------------------------------------

    def encode(self, text: str) -> list[int]:
        """Ids of ``text`` alone; special tokens that stand in the text are recognised, none is added."""
        return list(self._encoded([text])[0].ids)

    def encode_spans(self, texts: Sequence[str]) -> list[tuple[list[int], Callable[[int], tuple[int, int]]]]:
        """For each text its ids, and what tells the range of characters that an id stands for, by the id's place.

        Ranges neither begin nor end before those of earlier ids. A list of them all would take longer to make than the
        ids, and few are asked for.
        """
        return [(one.ids, one.token_to_chars) for one in self._encoded(texts)]  # the list is made anew

    def _encoded(self, texts: Sequence[str]) -> list[Any]:
        try:
            return list(self.backend.encode_batch(list(texts), add_special_tokens=False))
        except TypeError as error:  # of what a record holds it has been said before
            raise UsageError(
                f"A text holds half of a surrogate pair, which is no text; it comes from the chat template "
                f"({self.template_name}) or the prompt: correct that."
            ) from error

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        return str(self.backend.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens))

    def with_bos(self, ids: list[int]) -> list[int]:
        """Exactly one BOS where the tokenizer or the template puts one: the second goes, a missing one comes."""
        if self.bos_id is None:
            return ids
        while ids[:2] == [self.bos_id, self.bos_id]:
            ids = ids[1:]
        return [self.bos_id, *ids] if self.adds_bos and ids[:1] != [self.bos_id] else ids

    @property
    def vocab_size(self) -> int:
        return int(self.backend.get_vocab_size(with_added_tokens=True))

    @property
    def eos_token(self) -> str:
        return self.special["eos_token"] if "eos_token" in self.special else self.backend.id_to_token(self.eos_ids[0])

    @cached_property
    def marks(self) -> Marks:
        """What chat templates need to know of this tokenizer."""
        added = self.backend.get_added_tokens_decoder().values()
        endings = {token.content for token in added if token.special} | {self.eos_token}
        return Marks(self.special, tuple(sorted(endings)), self.eos_token)

    # --- chat -----------------------------------------------------------------------------------------------

    @property
    def chat_template(self) -> str | None:
        """The text of the chat template, None without one."""
        return None if self._source.kind == "none" else self._source.text

    @property
    def has_jinja(self) -> bool:
        """Whether the chat template is in Jinja, as Hugging Face's are."""
        return self._source.kind == "jinja"

    @property
    def template_name(self) -> str:
        """Which chat template is used, for people."""
        return self._source.name

    def render(self, turns: Sequence[Turn], add_generation_prompt: bool = False) -> str:
        """The conversation as the chat template writes it, or up to where the model is to answer."""
        return self.template.render(turns, add_generation_prompt)

    @cached_property
    def stop_ids(self) -> list[int]:
        """Tokens on which an answer ends: the end-of-text tokens, and the one that ends a turn of the template."""
        ids = list(self.eos_ids)
        if self.chat_template is not None:
            text = self.render([Turn("user", "a"), Turn("assistant", "b")])
            end = self.marks.end_of_turn(text)
            last = self.encode(text[:end])[-1] if end is not None else ids[0]
            ids += [last] if last not in ids else []
        return ids + self._ends_of_calls(ids)

    def _ends_of_calls(self, known: Sequence[int]) -> list[int]:
        """The token on which an answer ends that calls a tool, where it is none of the ``known`` ones."""
        if not isinstance(self.template, JinjaTemplate) or self.template.habits.calls is None:
            return []
        call = Turn("assistant", "", tool_calls=(ToolCall("a", {}),))
        try:
            text = self.render([Turn("user", "a"), call])
        except UsageError:
            return []
        end = self.marks.end_of_turn(text)
        last = self.encode(text[:end])[-1:] if end is not None else []
        return [token for token in last if token not in known]

    def save(self, folder: Path) -> None:
        """Write the tokenizer's files as they were when it was read, but for a chat template that is not its own."""
        for name, content in self._files.items():
            (folder / name).write_bytes(content)
        if not self._source.same(self._own):
            self._source.write(folder)

    def fingerprint(self) -> str:
        """Changes with all that decides which ids a conversation becomes: files, special tokens, chat template, and the
        date where the template writes it."""
        digest = hashlib.sha256()
        for name, content in sorted(self._files.items()):
            digest.update(f"{name} {len(content)} ".encode() + content)
        source = self._source
        about = [self.special, self.eos_ids, self.bos_id, self.adds_bos, source.kind, source.text]
        about += [self._enable_thinking]
        digest.update(json.dumps([*about, written_dates(source.text, self.now)]).encode())
        return digest.hexdigest()

    # --- reading the files ----------------------------------------------------------------------------------

    def _id(self, name: str) -> int | None:
        text = self.special.get(name)
        return self.backend.token_to_id(text) if text is not None else None

    def _eos_ids(self, model: dict[str, Any]) -> list[int]:
        """The tokenizer's EOS first, then those that the model's generation config also ends on."""
        ids: list[int] = []
        if self._id("eos_token") is not None:
            ids.append(int(self._id("eos_token") or 0))
        declared, rows = model.get("eos_token_id"), model.get("vocab_size")
        known = max(self.vocab_size, rows if isinstance(rows, int) else 0)
        for value in declared if isinstance(declared, list) else [declared]:
            if value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < known:
                raise UsageError(
                    f"{self.folder}: eos_token_id {quoted(value)} of its config.json or generation_config.json is no "
                    "token of this model; correct it."
                )
            if value not in ids:
                ids.append(value)
        if not ids or (self._id("eos_token") is None and self.backend.id_to_token(ids[0]) is None):
            raise UsageError(f"{self.folder} names no end-of-text token; set eos_token in its tokenizer_config.json.")
        return ids

    def _template(self) -> Template:
        if self._enable_thinking is not None:
            return self._told_to_think(self._enable_thinking)
        if self._source.kind == "jinja":
            return JinjaTemplate(self._source, self.marks, self.now)
        return Pairs(self._source, self.marks) if self._source.kind == "pairs" else Plain(self.marks)

    def _told_to_think(self, thinks: bool) -> Template:
        """The template that is told whether to think, under both names that published ones have for it."""
        question = [Turn("user", "a")]
        if self._source.kind == "jinja":
            told = {name: dict.fromkeys(("enable_thinking", "thinking"), name) for name in (True, False)}
            made = {name: JinjaTemplate(self._source, self.marks, self.now, told[name]) for name in told}
            if made[True].prompt(question) != made[False].prompt(question):
                return made[thinks]
        raise UsageError(
            f"The chat template ({self.template_name}) writes the same whether enable_thinking is true or false; leave "
            "it out, or give chat_template one that heeds it."
        )


def _text(key: str, token: Any, folder: Path) -> str:
    text = token.get("content") if isinstance(token, dict) else token
    if not isinstance(text, str):
        raise UsageError(
            f"{folder}: tokenizer_config.json must give {key} as text, or an object with its content, not "
            f"{quoted(token)}."
        )
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UsageError(
            f"{folder}: tokenizer_config.json gives {key} as half of a surrogate pair, which is no text; correct it."
        ) from None
    return text


def _read_object(path: Path) -> dict[str, Any]:
    return read_object(path) if is_there(path) else {}
