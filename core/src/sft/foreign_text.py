"""Text that is not ours, as it may be shown: what data, files, models and the network say moves no cursor, sets no
title, turns no line round and gives no secret away.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterable, Mapping
from typing import Any

LINE = 200
"""Characters of somebody else's text in a sentence of ours."""
MASK = "***"

_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = LINE
_REPR.maxlevel = 3
_SPACES = "\u3000\xa0\u2002\u2003\u2009\u202f"  # printable to everyone but Python; of Chinese and French texts
_JOINERS = "\u200c\u200d"  # parts of words in Persian and Hindi, and of emoji
_HARMLESS = frozenset(_SPACES + _JOINERS + "\t\n")
_KNOWN = re.compile(
    r"\b(?:hf|api_org)_[A-Za-z0-9]{16,}"  # Hugging Face
    r"|\b(?:sk|pk|rk)-[A-Za-z0-9_-]{20,}"  # OpenAI, Anthropic, Stripe
    r"|\bgh[pousr]_[A-Za-z0-9]{20,}|\bgithub_pat_\w{20,}|\bglpat-[\w-]{16,}"  # GitHub, GitLab
    r"|\bxox[abeprs]-[A-Za-z0-9-]{10,}"  # Slack
    r"|\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"  # AWS
    r"|\beyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]+"  # JSON web tokens
)
_AROUND = re.compile(
    r"(?P<scheme>\b[A-Za-z][A-Za-z0-9+.-]{0,20}://)[^\s/@'\"]+@"
    r"|(?P<bearer>\b(?:[Bb]earer|[Bb]asic) )[A-Za-z0-9._~+/=-]{12,}"
    r"|(?P<query>[?&](?:access_token|auth|api_?key|key|password|secret|sig|signature|token|X-Amz-[A-Za-z]+)=)[^\s&'\"]+",
    re.IGNORECASE,
)
_SECRET_WORDS = frozenset(
    ("token", "secret", "secrets", "password", "passwd", "passphrase", "pwd", "credential", "credentials", "apikey")
    + ("authorization", "cookie", "cookies")
)
_KEYS = frozenset(("api", "access", "private", "secret", "auth", "encryption", "signing", "account", "ssh", "license"))
_SPECIAL_TOKENS = frozenset(
    ("bos", "eos", "pad", "unk", "sep", "cls", "mask", "image", "audio", "video", "bot", "eot", "prefix", "suffix")
)


def harmless(text: str) -> str:
    """``text`` with each character that a terminal would obey, or that turns the direction of others, written as its
    code (``\\x1b``); lines stay lines. Pieces of a text may be given one by one."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in _HARMLESS else _code(c) for c in text)


def shown(text: object, limit: int = LINE) -> str:
    """Somebody else's text within a line of ours: :func:`harmless`, on one line, without secrets, and cut to ``limit``
    characters."""
    line = one_line(str(text)[: 4 * limit + 4096])
    return line if len(line) <= limit else line[: limit - 1] + "…"


def one_line(text: str) -> str:
    """A line of ours as it is printed: :func:`safe`, and a line also where others' text in it, such as the name of a
    folder, has several."""
    return safe(text).replace("\n", "\\n").replace("\t", "\\t")


def quoted(value: Any) -> str:
    """Somebody else's value within a line of ours: as Python writes it, of large ones the beginning, and :func:`shown`.
    It takes no longer for a value that is large, or that holds itself many times."""
    return shown(_REPR.repr(value))


def listed(names: Iterable[Any], most: int = 8) -> str:
    """Somebody else's names within a line of ours, with commas between them; of many the first, and none of none."""
    found = [shown(name) for name in names]
    return ", ".join([*found[:most], *(["…"] if len(found) > most else [])]) or "none"


def safe(text: str) -> str:
    """A line or a message of ours, in which others' text may stand, as it is printed or written: :func:`harmless`,
    without secrets."""
    return harmless(masked(text))


def masked(text: str) -> str:
    """``text`` without what is known to be a secret by its form: a user's part of a URL, tokens of well-known
    services."""
    if "://" in text or "earer " in text or "asic " in text or "=" in text:
        text = _AROUND.sub(_mask_around, text)
    return _KNOWN.sub(MASK, text)


def without_secrets(value: Any, name: str = "") -> Any:
    """A setting, or an object of settings, to be written down or shown: what looks like a secret by its ``name``, in
    any depth, or by its own form is masked. Unset values, numbers and switches stay."""
    if isinstance(value, Mapping):
        return {key: without_secrets(one, str(key)) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_secrets(one, name) for one in value]
    if isinstance(value, str):
        return MASK if value and is_secret(name) else masked(value)
    return value


def is_secret(name: str) -> bool:
    """Whether a setting of that name holds a secret: ``hub_token``, ``apiKey``, ``db_password``, not ``pad_token``."""
    words = [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)]
    if not words:
        return False
    before = words[-2] if len(words) > 1 else ""
    if words[-1] == "token":
        return before not in _SPECIAL_TOKENS
    return words[-1] in _SECRET_WORDS or (words[-1] == "key" and before in _KEYS)


def _mask_around(match: re.Match[str]) -> str:
    kept = match["scheme"] or match["bearer"] or match["query"]
    return f"{kept}{MASK}@" if match["scheme"] else f"{kept}{MASK}"


def _code(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
