"""``sft chat``: a conversation in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from sft.commands.shared import GENERATION, SEED, TEMPLATE, generation_of, given, model_options, say, setting_options
from sft.errors import UsageError
from sft.seams import Turn

HELP = "/exit or Ctrl-D leaves, /reset forgets the conversation, /system TEXT sets the system message, Ctrl-C stops."


@click.command(name="chat")
@model_options("A quantizer, where the adapter does not name it; no:NAME leaves one out.")
@click.option("--system", help="A system message; the model's chat template must have a place for it.")
@setting_options("chat_template", *GENERATION, chat_template=TEMPLATE, seed=SEED)
def command(model: str, adapter: str | None, plugins: tuple[str, ...], system: str | None, **settings: Any) -> None:
    """Talk with a model: each line is a turn, and the answer appears as it grows.

    /exit or Ctrl-D leaves, /reset forgets the conversation, /system TEXT sets the system message (without TEXT
    there is none any more), Ctrl-C stops an answer, of which the part that was given stays in the conversation.

    All turns so far go through the model's chat template. When they and max_new_tokens no longer fit into the
    model's positions, the oldest question and its answer are left out, and a line says so.

    Without a terminal, the lines of standard input are the turns, and standard output has the answers.
    """
    from sft.adapters import load_for_inference, plugins_for, refuse_idle

    generation, seed = generation_of(settings)
    template = given(settings).get("chat_template")
    folder = Path(adapter) if adapter else None
    active = plugins_for(folder, plugins)
    refuse_idle(active, plugins, ("sft_quantizer",), "sft chat")
    loaded, tokenizer = load_for_inference(model, folder, say, plugins=active, chat_template=template)
    chat = Chat(loaded, tokenizer, generation, seed, system)
    if tokenizer.chat_template is None:
        say("note: this model has no chat template, so turns follow each other as they are")
    if sys.stdin.isatty():
        say(HELP)
    for line in _lines():
        word, _, rest = line.strip().partition(" ")
        if word == "/exit":
            return
        if word == "/reset":
            chat.turns = []
        elif word == "/system":
            chat.system = rest.strip() or None
        elif word == "/help":
            say(HELP)
        elif word.startswith("/") and word[1:].isalpha():
            say(f"there is no {word}; {HELP}")
        elif word:
            _answer(chat, line.strip())


class Chat:
    """A conversation: its turns, and the model that answers."""

    def __init__(self, model: Any, tokenizer: Any, generation: Any, seed: int, system: str | None) -> None:
        self.model, self.tokenizer, self.generation, self.seed = model, tokenizer, generation, seed
        self.system = system
        self.turns: list[Turn] = []
        """What has been said and is not forgotten, without the system message."""

    def ask(self, text: str, show: Any) -> int:
        """Answer ``text`` with pieces that ``show`` receives; returns how many old turns were forgotten for want of
        room. Raises :class:`UsageError` where a question has no room or no place; it is then not part of the
        conversation. An answer that is interrupted remains as far as it was shown.
        """
        from sft.data.encoding import encode_prompt, fitting
        from sft.models.generation import answers, check_room

        head = [Turn("system", self.system)] if self.system else []
        positions = self.model.config.max_position_embeddings
        asked = [*head, *self.turns, Turn("user", text)]
        kept = fitting(asked, self.tokenizer, positions - self.generation.max_new_tokens)
        ids = encode_prompt(kept, self.tokenizer)
        check_room(ids, self.generation, positions)
        self.turns = kept[len(head) :]
        pieces: list[str] = []

        def keep(piece: str) -> None:
            pieces.append(piece)
            show(piece)

        try:
            answers(self.model, self.tokenizer, [ids], self.generation, self.seed, keep)
        finally:
            if pieces:
                self.turns.append(Turn("assistant", "".join(pieces)))
            else:
                self.turns.pop()
        return len(asked) - len(kept)


def _answer(chat: Chat, text: str) -> None:
    try:
        forgotten = chat.ask(text, lambda piece: click.echo(piece, nl=False))
    except UsageError as error:
        say(f"sft: {error}")
    except KeyboardInterrupt:
        click.echo()
        say("(stopped)")
    else:
        click.echo()
        if forgotten:
            say(f"({forgotten} old turns no longer fit into the model's positions and were left out)")


def _lines() -> Iterator[str]:
    """The lines that are typed, with editing in a terminal; Ctrl-C gives up the line."""
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    import readline  # noqa: F401  (input() edits and recalls lines with it)

    while True:
        try:
            line = input("> ")
        except KeyboardInterrupt:
            say("\n(/exit or Ctrl-D leaves)")
            continue
        except EOFError:
            click.echo()
            return
        yield line
