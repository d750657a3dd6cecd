"""The kinds of failure that a user sees. Anything else is a bug and keeps its traceback."""

from __future__ import annotations

import re
import signal
import traceback

from sft.foreign_text import safe

LONGEST = 4_000
"""Characters of a message: one that quotes a file of somebody else must not fill the screen."""


class SftError(Exception):
    """A run cannot go on. The command line prints the message as one sentence and exits with ``exit_code``.

    The message may quote what is not ours: it is :func:`sft.safe` and cut, and no line after the first can be taken for
    one of ours.
    """

    exit_code = 1

    def __init__(self, message: object = "") -> None:
        text = safe(str(message)[: 2 * LONGEST])
        text = text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"
        super().__init__(re.sub(r"\n(?!  )", "\n  ", text))


class UsageError(SftError):
    """The request cannot be honoured as it stands; the message says what is wrong, where, and what to do."""

    exit_code = 2


class PluginError(SftError):
    """A plugin's code failed in a hook, or returned what the hook does not expect; the message names both.

    ``__cause__`` is what the plugin raised, with its traceback from the plugin's own function on; None where it only
    returned something wrong.
    """

    def details(self) -> str:
        """The plugin's own traceback as Python prints it; empty where it raised nothing."""
        return "" if self.__cause__ is None else "".join(traceback.format_exception(self.__cause__))


class SftDeprecationWarning(FutureWarning):
    """Something of the plugin API is used that goes with its next major version; the text says what, and what to use
    instead. Shown once in a process. A plugin that publishes hooks warns with it too:
    ``@sft.hookspec(warn_on_impl=sft.SftDeprecationWarning("…"))``."""


class SignalError(SystemExit, KeyboardInterrupt):
    """A signal has ended a run; ``number`` says which. A program that does not catch it exits, as the command line
    does, with ``exit_code``: 128 and the number.

    ``moment`` says after what it ended, in a clause such as "after step 7", on which all processes of the run agreed;
    it is empty where the run ended at once.
    """

    def __init__(self, number: int, moment: str = "") -> None:
        super().__init__(128 + number)
        self.number, self.moment, self.exit_code = number, moment, 128 + number

    def __str__(self) -> str:
        return f"{signal.Signals(self.number).name} {self.moment}".rstrip()


class TooEarlyError(SftError, AttributeError):
    """A member of ``run`` was read in a hook that is called before it exists; the message names it and its hook."""

    def __init__(self, message: str, name: str, run: object) -> None:
        SftError.__init__(self, message)
        AttributeError.__init__(self, message, name=name, obj=run)
