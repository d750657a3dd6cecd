"""Where a plugin comes from that no distribution provides: a file, or the program that gives its class."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any


@dataclass(frozen=True)
class PluginFile:
    """A plugin's file: its path as it was typed, and the SHA-256 of what was read there."""

    path: Path
    sha256: str

    def as_dict(self) -> dict[str, str]:
        """For run.json and checkpoints, with the whole path."""
        return {"path": str(self.path.absolute()), "sha256": self.sha256}


_FILES: dict[str, PluginFile] = {}
"""By the name of the module that was made of it."""


def remember(module: str, file: PluginFile) -> None:
    """``module`` was made of ``file``."""
    _FILES[module] = file


def file_of(plugin: Any) -> PluginFile | None:
    """The file that a plugin class or module was read from; None for one that comes from anywhere else."""
    return _FILES.get(plugin.__name__ if isinstance(plugin, ModuleType) else plugin.__module__)


def origin_of(plugin: Any) -> str:
    """What messages call the origin of a plugin that is not installed."""
    file = file_of(plugin)
    own = getattr(plugin, "__qualname__", plugin.__name__)
    return f"given directly as {own}" if file is None else f"the file {file.path}"
