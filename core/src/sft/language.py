"""Help in the reader's language.

English texts are keys of a table in each distribution, ``zh_CN.json`` in its package: a text that has changed is found
there no more, and is shown in English. Messages of a run are English, so that they can be searched for.
"""

from __future__ import annotations

import json
import os
from functools import cache
from importlib import resources

from sft.errors import UsageError

LANGUAGES = {"en": None, "zh": "zh_CN.json"}
"""The languages of help, and the table of each; English needs none."""
VARIABLES = ("LC_ALL", "LC_MESSAGES", "LANG")


def language() -> str:
    """One of :data:`LANGUAGES`: what ``SFT_LANG`` says, else the locale; English for any other locale. Raises
    :class:`UsageError`."""
    asked = os.environ.get("SFT_LANG", "")
    if asked:
        if _short(asked) not in LANGUAGES:
            raise UsageError(f"SFT_LANG: help is there in {' and '.join(LANGUAGES)}, got {asked!r}.")
        return _short(asked)
    locale = _short(next(filter(None, map(os.environ.get, VARIABLES)), ""))
    return locale if locale in LANGUAGES else "en"


def _short(name: str) -> str:
    """``zh`` for zh_CN.UTF-8, zh-CN and zh."""
    return name.replace("-", "_").partition("_")[0].partition(".")[0].lower()


def translated(text: str, package: str = "sft") -> str:
    """A text of ``package`` (a distribution's own top-level one) in the reader's language, or as it is. What the core
    says too need not be in the package's own table."""
    name = language()
    return table(package, name).get(text) or table("sft", name).get(text, text)


@cache
def table(package: str, name: str) -> dict[str, str]:
    """What ``package`` says in the language ``name``, by the English text; empty where it brings no table."""
    file = LANGUAGES[name]
    if file is None:
        return {}
    try:
        path = resources.files(package) / file
    except (ImportError, TypeError, ValueError):  # the plugin is a file, which belongs to no package
        return {}
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def package_of(thing: object) -> str:
    """The package whose table has the texts of a plugin (a class, or a module) or of a function."""
    name = getattr(thing, "__module__", None) or getattr(thing, "__name__", "")
    return str(name).partition(".")[0]
