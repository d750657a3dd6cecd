"""The two kinds of failure that a user sees. Anything else is a bug and keeps its traceback."""


class SftError(Exception):
    """A run cannot go on. The command line prints the message as one sentence and exits with ``exit_code``."""

    exit_code = 1


class UsageError(SftError):
    """The request cannot be honoured as it stands; the message says what is wrong, where, and what to do."""

    exit_code = 2
