"""What a run would hold in memory, on paper: settings, plugins and a ``config.json``, and nothing heavy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from sft.context import Run
from sft.errors import UsageError
from sft.models.architecture import Architecture
from sft.models.loading import open_model
from sft.models.outline import Outline, of_architecture
from sft.plugins.registry import Plugins, implements
from sft.resolve import resolve
from sft.settings.arguments import Settings, normalise
from sft.settings.paddlenlp import listing

CHANGES_TENSORS = ("sft_adapt_model", "sft_quantizer")


@dataclass(frozen=True)
class PaperRun:
    """A run that has been resolved and will not happen.

    Attributes:
        without_effect: What to say of given settings that do nothing.
    """

    settings: Settings
    plugins: tuple[str, ...]
    outline: Outline
    without_effect: tuple[str, ...]


def outline(values: Mapping[str, Any], extra: Iterable[type] = ()) -> PaperRun:
    """The model that a run with these settings would train, with what its plugins make of it.

    Only ``config.json`` is read (or fetched, of a hub name). ``extra`` are plugin classes as in :func:`sft.run`.
    Raises :class:`UsageError` as a run would, and for a plugin that changes the model and does not say how on paper.
    """
    settings, active, without_effect = resolve(normalise(values), extra)
    name = settings.model.model_name_or_path
    if not name:
        raise UsageError("model_name_or_path is not set; add --model_name_or_path VALUE.")
    found = _of_model(name, active)
    adapts = active.provider("sft_export_adapter") is not None
    quantizer = active.provider("sft_quantizer")
    if quantizer is not None and not adapts:
        raise UsageError(
            f"Plugin {quantizer} quantizes the base model, which then cannot be trained as a whole; add an adapter "
            "plugin, or leave it out."
        )
    for plugin, cls in active:
        if any(implements(cls, hook) for hook in CHANGES_TENSORS) and not implements(cls, "sft_outline"):
            raise UsageError(
                f"Plugin {plugin} ({active.origin(plugin)}) changes the model and does not say on paper how "
                "(it lacks sft_outline), so nothing can be planned with it; leave it out."
            )
    if adapts:
        found.freeze()
    training = settings.training
    # With 16 bits paddle's own attention takes its blockwise kernel on GPUs; it has none for 32.
    found.attention_in_blocks = training.bf16 or training.fp16
    active.hook.sft_outline(outline=found)
    said = [listing(without_effect)] if without_effect else []
    return PaperRun(settings, tuple(active.names), found, tuple(said))


def model_outline(run: Run) -> Outline:
    """The model that ``run`` is going to open, on paper: what its ``config.json`` says and plugins change in that,
    without adapters and quantizers. A hub name's ``config.json`` is fetched.

    Raises :class:`UsageError` for a model of which nothing is known on paper.
    """
    return _of_model(str(run.settings.model.model_name_or_path), run.plugins)


def _of_model(name: str, plugins: Plugins) -> Outline:
    source = open_model(name, plugins, weights=False)
    architecture = source.architecture
    if source.family.build is not None or not isinstance(architecture, Architecture):
        raise UsageError(
            f"{source.folder}: model_type {source.family.model_type!r} is a class of a plugin's own, of which nothing "
            "is known on paper, so nothing can be planned with it; plan with a model of the decoder's families."
        )
    return of_architecture(architecture)
