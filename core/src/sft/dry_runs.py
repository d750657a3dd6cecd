"""A run that is resolved and does not happen: settings, plugins and a ``config.json``, and nothing heavy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from sft.errors import UsageError
from sft.models.loading import ModelSource, open_model
from sft.plugins.registry import Plugins
from sft.resolve import resolve
from sft.settings.arguments import Settings
from sft.settings.checks import check_plugins
from sft.settings.paddlenlp import listing
from sft.settings.reading import normalise


@dataclass(frozen=True)
class DryRun:
    """What a run would begin with.

    Attributes:
        settings: As :attr:`sft.Run.settings`.
        plugins: The active plugins, started, as :attr:`sft.Run.plugins`.
        source: The model as a run would open it: ``folder``, ``family``, ``architecture``. No weights were looked for.
        without_effect: What to say of given settings that do nothing; empty if there are none.
    """

    settings: Settings
    plugins: Plugins
    source: ModelSource
    without_effect: str


def dry_run(values: Mapping[str, Any], plugins: Iterable[type] = ()) -> DryRun:
    """Resolve the settings of a run by name, as :func:`sft.run` does, and open its model without weights.

    Only ``config.json`` is read (or fetched, of a hub name). ``plugins`` are classes as in :func:`sft.run`. Raises
    :class:`UsageError` as a run would; model_name_or_path alone must be set.
    """
    settings, active, without_effect = resolve(normalise(values), plugins)

    if not settings.model.model_name_or_path:
        raise UsageError("model_name_or_path is not set; add --model_name_or_path VALUE.")
    source = open_model(settings.model.place, active, weights=False)
    check_plugins(active)
    return DryRun(settings, active, source, "\n".join(listing(without_effect)) if without_effect else "")
