"""What ``sft certify`` needs to try a plugin that not every run can show: ``certify = sft.Trial(…)`` in its class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sft.errors import UsageError
from sft.plugins.marks import implements


@dataclass(frozen=True)
class Trial:
    """What a plugin needs to be tried, which its class has as ``certify``::

        certify = sft.Trial(settings={"evaluation_strategy": "steps", "eval_steps": 1})

    Attributes:
        settings: Settings by name, the core's and its own, without which it could not be tried. They are in all its
            runs, and in those of other plugins beside it.
        options: For options of its own for which nobody can guess a value, such as a text: another one than the
            default, by name.
        records: Records in its own format (``sft_record_format``), as in a data file; a dozen short ones, which are
            learned and measured.
        environment: Variables, such as those that keep a library from the network. ``{folder}`` in a value is a folder
            that is removed afterwards.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    records: Sequence[Mapping[str, Any]] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


def trial_of(plugin: Any) -> Trial:
    """What a plugin's class or module says that it needs; raises :class:`UsageError` where that is no
    :class:`Trial`."""
    found = getattr(plugin, "certify", None)
    if found is None:
        return Trial()
    if not isinstance(found, Trial):
        raise UsageError(f"certify of plugin {plugin.name} is {found!r}, not an sft.Trial; make it one.")
    return found


def no_records(plugin: Any) -> str | None:
    """Why a plugin that reads records of its own cannot be tried: it does not say what one is."""
    trial = trial_of(plugin)
    if not implements(plugin, "sft_record_format") or trial.records or "dataset_name_or_path" in trial.settings:
        return None
    return "it reads records in a format of its own, and gives none to learn (certify = sft.Trial(records=[…]))."
