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
    tools_option,
    typed_values,
)
from sft.conversations import Conversation, ToolCall, Turn
from sft.errors import UsageError
from sft.settings.arguments import check_draw

if TYPE_CHECKING:
    from sft.inference.open import Opened

USES = ("sft chat", ("sft_model_family", "sft_model_config", "sft_quantizer", "sft_kernels"))

HELP = "/exit or Ctrl-D leaves, /reset forgets the conversation, /system TEXT sets the system message, Ctrl-C stops."
RESULT = "/result TEXT gives the result"
_ANYWHERE = nullcontext()


@click.command(name="chat")
@model_options("A quantizer, where the adapter does not name it; no:NAME leaves one out.")
@click.option("--system", help="A system message; the model's chat template must have a place for it.")
@tools_option()
@setting_options("chat_template", "enable_thinking", *GENERATION, chat_template=TEMPLATE, seed=SEED)
def command(
    model: str,
    adapter: str | None,
    plugins: tuple[str, ...],
    system: str | None,
    tools: str | None,
    **settings: Any,
) -> None:
    """Talk with a model: each line is a turn, and the answer appears as it grows.

    /exit or Ctrl-D leaves, /reset forgets the conversation, /system TEXT sets the system message (without TEXT
    there is none any more), Ctrl-C stops an answer, of which the part that was given stays in the conversation.

    All turns so far go through the model's chat template. When they and max_new_tokens no longer fit into the
    model's positions, the oldest question and its answer are left out, and a line says so.

    Where an answer calls one of the --tools, a line says which and with what; /result TEXT gives the result of the
    call (of the first one that has none), and the model goes on when it has them all.

    Without a terminal, the lines of standard input are the turns, and standard output has the answers.
    """
    from sft.data.calls import read_tools
    from sft.inference.open import opened, settings_for

    folder = Path(adapter) if adapter else None
    chosen, active = settings_for(folder, plugins, {"model_name_or_path": model, **typed_values(settings)}, USES)
    check_draw(chosen.generation)
    offered = read_tools(Path(tools)) if tools else ()
    with opened(chosen, active, folder, say) as found:
        chat = Chat(found, chosen.generation, chosen.training.seed, system, offered)
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
            chat.forget()
        elif word == "/system":
            chat.system = rest.strip() or None
        elif word == "/help":
            say(HELP)
        elif word == "/result":
            if chat.waiting and chat.result(rest.strip()):
                _answer(chat, None, stoppable)
            elif chat.waiting:
                say(f"({RESULT} of {chat.waiting[0].name})")
            else:
                say("no call waits for a result")
        elif word.startswith("/") and word[1:].isalpha():
            say(f"there is no {word}; {HELP}")
        elif word:
            _answer(chat, line.strip(), stoppable)


class Chat:
    """A conversation: its turns, and the model that answers."""

    def __init__(
        self, opened: Opened, generation: Any, seed: int, system: str | None, tools: tuple[dict[str, Any], ...] = ()
    ) -> None:
        self.model, self.tokenizer, self.precision = opened.model, opened.tokenizer, opened.precision
        self.generation, self.seed = generation, seed
        self.system = system
        self.turns: list[Turn] = []
        """What has been said and is not forgotten, without the system message."""
        self.tools = tools
        self.waiting: list[ToolCall] = []
        """Calls of the last answer whose results are not given."""
        self._results: list[Turn] = []

    def forget(self) -> None:
        """Begin anew."""
        self.turns, self.waiting, self._results = [], [], []

    def result(self, text: str) -> bool:
        """Take the result of the first call that waits; returns whether it was the last, and :meth:`ask` may go on."""
        call = self.waiting.pop(0)
        self._results.append(Turn("tool", text, tool_call_id=call.id, name=call.name))
        return not self.waiting

    def ask(self, text: str | None, show: Any, stoppable: AbstractContextManager[Any] = _ANYWHERE) -> int:
        """Answer ``text``, or the results of calls where it is None, with pieces that ``show`` receives; returns how
        many old turns were forgotten for want of room. Raises :class:`UsageError` where a question has no room or no
        place; it is then not part of the conversation. An answer that is interrupted remains as far as it was shown;
        where ``stoppable`` is a :class:`CtrlC`, it is interrupted while it is computed, and not while the conversation
        is written down.
        """
        from sft.data.calls import calls_in
        from sft.data.questions import encode_prompt, fitting
        from sft.models.generation import answers, check_room

        head = [Turn("system", self.system)] if self.system else []
        positions = self.model.architecture.positions
        new = [] if text is None else [Turn("user", text)]
        asked = Conversation([*head, *self.turns, *self._results, *new], tools=self.tools)
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
                said, calls = calls_in("".join(pieces), self.tools)
                self.turns = [*kept[len(head) :], Turn("assistant", said, tool_calls=calls)]
                self.waiting, self._results = list(calls), []
        return len(asked) - len(kept)


def _answer(chat: Chat, text: str | None, stoppable: AbstractContextManager[Any]) -> None:
    from sft.data.calls import shown_call

    try:
        forgotten = chat.ask(text, lambda piece: put_out(piece, nl=False), stoppable)
    except UsageError as error:
        say(f"sft: {error}")
    except KeyboardInterrupt:
        click.echo()
        say("(stopped)")
    else:
        click.echo()
        for call in chat.waiting:
            say(f"(call: {shown_call(call)}; {RESULT})")
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
            click.echo(err=True)
            say("(/exit or Ctrl-D leaves)")
            continue
        except EOFError:
            click.echo()
            return
        yield line
