"""The base that an adapter was trained over, as its file tells it: which weights, and which plugins changed it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.errors import UsageError

if TYPE_CHECKING:
    from sft.context import Run

FINGERPRINT = "sft.base"
"""Where adapter_model.safetensors keeps the fingerprint of the weights that it was trained over."""
QUANTIZER = "sft.quantizer"
"""Where it keeps the plugin that quantized them, with its options: they travel with the file."""
CONFIG = "sft.config"
"""Where it keeps the plugins that changed the base's config, with their options."""


def about_base(run: Run) -> dict[str, str]:
    """What an adapter file says, as metadata, about the base that it was trained over."""
    about = {FINGERPRINT: run.base_fingerprint}
    if run.source.changed_by:
        about[CONFIG] = json.dumps({name: options_of_plugin(run, name) for name in run.source.changed_by})
    name = run.plugins.provider("sft_quantizer")
    if name is not None:
        about[QUANTIZER] = json.dumps({"plugin": [name], **options_of_plugin(run, name)})
    return about


def options_of_plugin(run: Run, name: str) -> dict[str, Any]:
    """The options of a plugin of ``run`` by name."""
    return asdict(run.settings.options[name]) if name in run.settings.options else {}


def trained_over(adapter: Path) -> str | None:
    """The fingerprint of the weights that an adapter, or a checkpoint with one, was trained over; None where its file
    does not say."""
    return _metadata(adapter).get(FINGERPRINT)


def base_plugins(folder: Path) -> dict[str, dict[str, Any]]:
    """The plugins that made the base of the adapter in ``folder`` what it is, each with its options: those that changed
    its config, and the quantizer."""
    found: dict[str, dict[str, Any]] = {}
    metadata = _metadata(folder)
    try:
        found.update(json.loads(metadata.get(CONFIG, "{}")))
        quantizer = dict(json.loads(metadata.get(QUANTIZER, "{}")))
        found.update(dict.fromkeys(quantizer.pop("plugin", ()), quantizer))
        if not all(isinstance(options, dict) for options in found.values()):
            raise TypeError("options are an object")
    except (ValueError, TypeError) as error:
        raise UsageError(
            f"{folder}: what adapter_model.safetensors says of its base's plugins is damaged ({error}); copy the "
            "adapter again."
        ) from error
    return found


def _metadata(folder: Path) -> dict[str, str]:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(str(folder / "adapter_model.safetensors"), framework="numpy").metadata() or {}
    except (OSError, SafetensorError):
        return {}  # whoever reads the tensors says what is wrong
