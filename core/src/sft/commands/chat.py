"""``sft chat``: a conversation in the terminal."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sft.commands.shared import (
    GENERATION,
    SEED,
    TEMPLATE,
    lines_of_standard_input,
    model_options,
    put_out,
    say,
    setting_options,
    typed_values,
)
from sft.errors import UsageError
from sft.seams import Turn
from sft.settings.arguments import check_draw

if TYPE_CHECKING:
    from sft.inference.open import Opened

USES = ("sft chat", ("sft_model_family", "sft_model_config", "sft_quantizer", "sft_kernels"))

HELP = "/exit or Ctrl-D leaves, /reset forgets the conversation, /system TEXT sets the system message, Ctrl-C stops."
_ANYWHERE = nullcontext()


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
    from sft.inference.open import opened, settings_for

    folder = Path(adapter) if adapter else None
    chosen, active = settings_for(folder, plugins, {"model_name_or_path": model, **typed_values(settings)}, USES)
    check_draw(chosen.generation)
    with opened(chosen, active, folder, say) as found:
        chat = Chat(found, chosen.generation, chosen.training.seed, system)
        if found.tokenizer.chat_template is None:
            say("note: this model has no chat template, so turns follow each other as they are")
        if not sys.stdin.isatty():
            _talk(chat, lines_of_standard_input(), _ANYWHERE)
            return
        say(HELP)
        with CtrlC().heard() as ctrl_c:
            _talk(chat, _typed(ctrl_c), ctrl_c)


def _talk(chat: Chat, lines: Iterable[str], stoppable: AbstractContextManager[Any]) -> None:
    for line in lines:
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
            _answer(chat, line.strip(), stoppable)


class Chat:
    """A conversation: its turns, and the model that answers."""

    def __init__(self, opened: Opened, generation: Any, seed: int, system: str | None) -> None:
        self.model, self.tokenizer, self.precision = opened.model, opened.tokenizer, opened.precision
        self.generation, self.seed = generation, seed
        self.system = system
        self.turns: list[Turn] = []
        """What has been said and is not forgotten, without the system message."""

    def ask(self, text: str, show: Any, stoppable: AbstractContextManager[Any] = _ANYWHERE) -> int:
        """Answer ``text`` with pieces that ``show`` receives; returns how many old turns were forgotten for want of
        room. Raises :class:`UsageError` where a question has no room or no place; it is then not part of the
        conversation. An answer that is interrupted remains as far as it was shown; where ``stoppable`` is a
        :class:`CtrlC`, it is interrupted while it is computed, and not while the conversation is written down.
        """
        from sft.data.encoding import encode_prompt, fitting
        from sft.models.generation import answers, check_room

        head = [Turn("system", self.system)] if self.system else []
        positions = self.model.architecture.positions
        asked = [*head, *self.turns, Turn("user", text)]
        kept = fitting(asked, self.tokenizer, positions - self.generation.max_new_tokens)
        ids = encode_prompt(kept, self.tokenizer)
        check_room(ids, self.generation, positions)
        pieces: list[str] = []

        def keep(piece: str) -> None:
            pieces.append(piece)
            show(piece)

        try:
            with stoppable, self.precision.autocast():
                answers(self.model, self.tokenizer, [ids], self.generation, self.seed, keep)
        finally:
            if pieces:
                self.turns = [*kept[len(head) :], Turn("assistant", "".join(pieces))]
        return len(asked) - len(kept)


def _answer(chat: Chat, text: str, stoppable: AbstractContextManager[Any]) -> None:
    try:
        forgotten = chat.ask(text, lambda piece: put_out(piece, nl=False), stoppable)
    except UsageError as error:
        say(f"sft: {error}")
    except KeyboardInterrupt:
        click.echo()
        say("(stopped)")
    else:
        click.echo()
        if forgotten:
            say(f"({forgotten} old turns no longer fit into the model's positions and were left out)")


class CtrlC:
    """Ctrl-C in a terminal: raises KeyboardInterrupt inside ``with ctrl_c:`` and nowhere else. One that comes between
    two such blocks is raised at the beginning of the next, so that none is lost and none ends the chat."""

    def __init__(self) -> None:
        self._armed = self._pending = False

    @contextmanager
    def heard(self) -> Iterator[CtrlC]:
        """Listen in the main thread, in place of what else would happen at Ctrl-C."""
        before = signal.signal(signal.SIGINT, self._handle), signal.signal(signal.SIGALRM, lambda *_: None)
        # Python's readline sees a signal only while it waits for a key: one that comes while it draws a key would be
        # kept until the next key. So the wait is interrupted five times a second.
        signal.setitimer(signal.ITIMER_REAL, 0.2, 0.2)
        try:
            yield self
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGINT, before[0])
            signal.signal(signal.SIGALRM, before[1])

    def _handle(self, *_: Any) -> None:
        self._pending = True
        if self._armed:
            self._raise()

    def _raise(self) -> None:
        self._armed = self._pending = False  # until the next block: what comes while this is handled waits
        raise KeyboardInterrupt

    def __enter__(self) -> None:
        self._armed = True
        if self._pending:
            self._raise()

    def __exit__(self, *_: Any) -> None:
        self._armed = False


def _typed(ctrl_c: CtrlC) -> Iterator[str]:
    """The lines that are typed, with editing; Ctrl-C gives up the line."""
    import readline  # noqa: F401  (input() edits and recalls lines with it)

    while True:
        try:
            with ctrl_c:
                line = input("> ")
        except KeyboardInterrupt:
            say("\n(/exit or Ctrl-D leaves)")
            continue
        except EOFError:
            click.echo()
            return
        yield line
