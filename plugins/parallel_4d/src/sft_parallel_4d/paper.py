"""What a run would hold in memory, on paper: the model of its ``config.json``, with what its plugins make of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import sft
from sft import UsageError
from sft_parallel_4d.outline import Outline, of_architecture

if TYPE_CHECKING:
    from sft import DryRun, Run


NAME = "parallel-4d"


@dataclass(frozen=True)
class PaperRun:
    """A run that has been resolved and will not happen, and its model on paper.

    Attributes:
        notes: What to say beside the figures.
    """

    run: DryRun
    outline: Outline
    notes: tuple[str, ...]


def outline(values: Mapping[str, Any], plugins: Iterable[type] = ()) -> PaperRun:
    """The model that a run with these settings by name would train, with what its plugins make of it.

    Only ``config.json`` is read (or fetched, of a hub name). ``plugins`` are classes as in :func:`sft.run`. Raises
    :class:`UsageError` as a run would, and for a plugin that adds or replaces tensors and does not say how on paper.
    """
    run = sft.dry_run(with_this_plugin(values), plugins)
    active, paper = run.plugins, _of_source(run.source)
    silent = [name for name in active.names if name not in active.implementing("parallel_outline")]
    adapter = active.provider("sft_export_adapter")
    for name in silent:
        if name in (adapter, active.provider("sft_quantizer")):
            raise UsageError(
                f"Plugin {name} ({active.origin(name)}) changes the model and does not say on paper how "
                "(it lacks parallel_outline), so nothing can be planned with it; leave it out."
            )
    if adapter is not None:
        paper.freeze()
    active.hook.parallel_outline(outline=paper, hook=active.hook)
    if active.implementing("sft_token_loss"):
        paper.target_sums += 2  # the chosen logit by itself, and the mean
    model = run.settings.model
    if adapter is not None:
        new, rows = model.tokens_to_add(), model.trainable_token_indices
        paper.let_train([*model.modules_to_save, *(("embed_tokens", "lm_head") if new and not rows else ())])
        count = sum(len(new) if one == "new" else 1 for one in rows)
        for _ in range((1 if paper.tied else 2) if rows else 0):
            paper.share("rows", (count, paper.hidden), (None, None))
        if rows:
            paper.exclude("rows of the embedding or lm_head train", "pipeline", "stage3")
    notes = [run.without_effect] if run.without_effect else []
    changing = [name for name in silent if name in active.implementing("sft_adapt_model")]
    if changing:
        notes.append(
            f"note: {' and '.join(changing)} may change the model (sft_adapt_model) and does not say on paper how "
            "(parallel_outline); the figures are those of a model in which it adds and freezes no tensor"
        )
    optimizer = active.provider("sft_optimizer")
    paper.with_state()
    if optimizer is not None and paper.state is None:
        notes.append(
            f"note: the figures have the state that AdamW keeps; that of plugin {optimizer} keeps another, of "
            "which nothing is known on paper"
        )
    return PaperRun(run, paper, tuple(notes))


def model_outline(run: Run) -> Outline:
    """The model that ``run`` is going to open, on paper: what its ``config.json`` says and plugins change in that,
    without adapters and quantizers. A hub name's ``config.json`` is fetched.

    Raises :class:`UsageError` for a model of which nothing is known on paper.
    """
    return _of_source(sft.open_model(run.settings.model.place, run.plugins, weights=False))


def _of_source(source: Any) -> Outline:
    if source.family.build is not None or not isinstance(source.architecture, sft.Architecture):
        raise UsageError(
            f"{source.folder}: model_type {source.family.model_type!r} is a class of a plugin's own, of which nothing "
            "is known on paper, so it can be neither planned nor divided; train it on one process, or take a model of "
            "the decoder's families."
        )
    return of_architecture(source.architecture)


def with_this_plugin(values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with this plugin among those that they ask for, so that its options count whatever they are, and its
    hook is there."""
    asked = values.get("plugin") or []
    return {**values, "plugin": [*(asked.split(",") if isinstance(asked, str) else asked), NAME]}
