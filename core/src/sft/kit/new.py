"""``sft plugins new``: a package that works as it is, to be changed piece by piece.

The templates are the plugin ``new-plugin`` of each kind, whole and right; a new package is a copy with the plugin's own
name in the place of that.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sft.errors import UsageError
from sft.files import check_free
from sft.foreign_text import quoted
from sft.plugins.discovery import installed
from sft.plugins.requests import switches
from sft.settings.arguments import core_options

_TEMPLATES = Path(__file__).parent / "templates"
_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")


@dataclass(frozen=True)
class Kind:
    """One line about what the template does, and what is typed after ``sft run`` to try it."""

    summary: str
    run: str = "--plugin new-plugin"


KINDS = {
    "adapter": Kind("A trained scale for each output of a frozen model's Linears."),
    "quantizer": Kind("The base model's Linears in 8-bit whole numbers.", "--plugin AN_ADAPTER,new-plugin"),
    "attention": Kind("Attention for some queries at a time, exact, with less memory."),
    "collator": Kind("Records of like length share a batch."),
    "optimizer": Kind("Steps along the sign of a running mean of gradients."),
    "objective": Kind("Cross-entropy with another weight on its first term."),
    "tracker": Kind("The numbers of a run in a CSV file."),
    "source": Kind("Data sets in ZIP archives.", "--dataset_name_or_path new-plugin://data.zip"),
    "family": Kind("Checkpoints of a model type that sft does not know."),
}


def write_package(name: str, kind: str, folder: Path | None) -> Path:
    """Write a package for plugin ``name`` into ``folder``, which must be new or empty (by default ``sft-NAME``, where
    the command is typed); the folder."""
    _check_name(name)
    target = Path(f"sft-{name}") if folder is None else folder
    check_free(target)
    for template, place in _places(kind, name):
        path = target / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(_filled(template.read_text(encoding="utf-8"), name, kind), encoding="utf-8")
    return target


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise UsageError(f"The name {quoted(name)} is not of small letters, digits and single dashes, as in my-plugin.")
    if name in installed():
        raise UsageError(
            f"Plugin {name} is installed already, from {installed()[name][0].origin}; choose another name."
        )
    own = name.replace("-", "_")
    if own in core_options() or own in switches():
        raise UsageError(f"The name {name} would be the switch {own}, which is a setting already; choose another name.")


def _places(kind: str, name: str) -> Iterator[tuple[Path, str]]:
    """The templates of a kind, and where in the package their copies go."""
    own = name.replace("-", "_")
    for file in ("pyproject.toml", "README.md", "conftest.py"):
        yield _TEMPLATES / "package" / f"{file}.template", file
    yield _TEMPLATES / "package" / "gitignore.template", ".gitignore"
    yield _TEMPLATES / kind / "plugin.py.template", f"src/sft_{own}.py"
    yield _TEMPLATES / kind / "test.py.template", f"tests/test_{own}.py"


def _filled(text: str, name: str, kind: str) -> str:
    requests = _TEMPLATES / kind / "requests.template"
    more = requests.read_text(encoding="utf-8") if requests.is_file() else ""
    words = name.split("-")
    for old, new in (
        ("@requests@\n", f"{more}\n"),
        ("@summary@", KINDS[kind].summary),
        ("@run@", KINDS[kind].run),
        ("new-plugin", name),
        ("new_plugin", "_".join(words)),
        ("NEW_PLUGIN", "_".join(words).upper()),
        ("NewPlugin", "".join(word.capitalize() for word in words)),
    ):
        text = text.replace(old, new)
    return text
