"""The model of a run: weights, attention and adapters, each with the plugins that have a say in it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sft.errors import UsageError
from sft.models import loading
from sft.models.fingerprint import fingerprint
from sft.models.generation import check_room
from sft.models.kernels import Kernels, use_kernels
from sft.models.layers import sizes, trainable
from sft.models.own_kernels import own_kernels
from sft.models.saved_layers import let_train, with_parameters
from sft.models.token_rows import let_rows_train
from sft.plugins.calls import checked

if TYPE_CHECKING:
    from sft.context import CoreRun, Run
    from sft.plugins.registry import Plugins
    from sft.precision import Precision


def set_up(run: CoreRun) -> None:
    """Build the model of :attr:`run.source`, fill it with weights, and let plugins adapt it: :attr:`run.model`.

    Each plugin that has a say in it is asked. Raises :class:`UsageError` where plugins, model and data do not go
    together.
    """
    run.base_fingerprint = fingerprint(run.source)
    check_questions(run)
    quantizer = run.hook.sft_quantizer(run=run)
    backend = attention_backend(run)
    run.model = loading.load_model(run.source, quantizer, run.precision, run.strategy, run.progress)
    run.model.attention = backend or run.model.attention
    if run.settings.training.recompute:
        run.model.recompute = True
    if run.exports_adapter:  # what is exported is the adapter, so the base must stay what it is
        for parameter in run.model.parameters():
            parameter.stop_gradient = True
    names = {name for name, _ in run.model.named_parameters()}
    layers = with_parameters(run.model)
    run.hook.sft_adapt_model(run=run, model=run.model)
    run.whole = let_train(run, layers)
    run.rows = let_rows_train(run)
    if not run.exports_adapter and names != {name for name, _ in run.model.named_parameters()}:
        raise UsageError(
            f"Plugins {', '.join(run.plugins.names)} change the model's layers and none of them exports an adapter, "
            "so the result could not be saved; add one that does."
        )
    if not trainable(run.model):
        raise UsageError("Nothing trains: the active plugins left no trainable parameter.")
    run.sizes = sizes(dict(run.strategy.parameters(run.model)), run.model)
    run.strategy.connect(run.model)
    kernels = kernels_for(run.plugins, run, run.precision)
    use_kernels(run.model, kernels)
    for hook in ("sft_kernels", "sft_attention_backend"):
        provider = run.plugins.provider(hook)
        who = "own" if provider is None else f"{provider} ({run.plugins.origin(provider)})"
        run.arithmetic[hook.removeprefix("sft_")] = who
    run.arithmetic.update(kernels.arithmetic)


def check_questions(run: CoreRun) -> None:
    """Refuse a prompt that has no room in the model together with its answer."""
    for question in [*run.samples, *run.questions]:
        check_room(question.ids, run.settings.generation, run.source.architecture.positions)


def kernels_for(plugins: Plugins, run: Run | None, precision: Precision) -> Kernels:
    """What computes a model's pieces: what a plugin provides, or else the core's own for device and precision."""
    kernels = plugins.hook.sft_kernels(run=run, precision=precision)
    if kernels is None:
        return own_kernels(precision)
    # Where hooks are checked, paddle is not there yet, and neither is this class.
    return checked(kernels, Kernels, "sft_kernels", plugins.who(str(plugins.provider("sft_kernels"))))


def attention_backend(run: CoreRun) -> Any | None:
    """The attention of a plugin, if one provides it; :class:`UsageError` where it would leave out what the model, or a
    collator that packs, needs of it."""
    architecture, attention = run.source.architecture, run.plugins.provider("sft_attention_backend")
    backend = run.hook.sft_attention_backend(run=run, config=architecture)
    if backend is None:
        return None
    if architecture.attention_cap is not None and not getattr(backend, "caps", False):
        raise UsageError(
            f"{run.source.folder} caps its attention scores, which attention backend {attention} does not compute; "
            "leave it out."
        )
    windows = [block.window for block in architecture.blocks if block.window is not None]
    if not getattr(backend, "packed", False) and windows and min(windows) < architecture.positions:
        raise UsageError(
            f"{run.source.folder} has layers that see a window of {min(windows)} tokens, which attention backend "
            f"{attention} does not compute; leave it out."
        )
    if getattr(run.collator, "packs", False) and not getattr(backend, "packed", False):
        collator = run.plugins.provider("sft_collator")
        raise UsageError(
            f"Plugin {collator} packs several records into a row, and attention backend {attention} would let them "
            "see each other; leave one of them out."
        )
    return backend
