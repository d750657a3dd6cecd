"""A finished model, opened to be written: the base, and what folds the adapter in.

Where there is neither an adapter nor a quantizer, nothing is computed, and paddle stays out of it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from sft import runtime
from sft.inference.open import tokenizer_of
from sft.models.adapter_folder import check_base
from sft.models.loading import ModelSource, open_model
from sft.plugins.registry import Plugins
from sft.settings.arguments import Settings

if TYPE_CHECKING:
    from sft.models.finished import FinishedModel


def opened_source(settings: Settings, plugins: Plugins, adapter: Path | None) -> ModelSource:
    """The model that ``settings`` name, of which no weight has been read."""
    if _computes(plugins, adapter):
        runtime.require_paddle()
    return open_model(settings.model.place, plugins, settings.model.allow_pickle)


@contextlib.contextmanager
def finished(
    settings: Settings,
    plugins: Plugins,
    adapter: Path | None,
    source: ModelSource,
    dtype: str,
    say: Callable[[str], None],
) -> Iterator[FinishedModel]:
    """``source`` with ``adapter`` folded in, in the ``dtype`` that :class:`FinishedModel` takes. The arithmetic happens
    on the device that is set; afterwards paddle has its device of before."""
    from sft.models.finished import FinishedModel
    from sft.models.saved_layers import SavedMerger, tied_once

    tokenizer = tokenizer_of(source, settings, adapter)
    if not _computes(plugins, adapter):
        yield FinishedModel(source, tokenizer, dtype=dtype, say=say)
        return
    device = settings.training.device
    with runtime.restored(device):
        runtime.exact_products()
        say(runtime.prepare())
        if device is not None:
            runtime.use_device(device)
        merger = None
        if adapter is not None:
            check_base(adapter, source, plugins, settings.options, say)
            merger = plugins.hook.sft_adapter_merger(folder=adapter, hook=plugins.hook)
            if saved := tied_once(adapter, source):
                merger = SavedMerger(merger, saved)
        yield FinishedModel(source, tokenizer, merger, plugins.hook.sft_quantizer(run=None), dtype, say)


def _computes(plugins: Plugins, adapter: Path | None) -> bool:
    return adapter is not None or plugins.provider("sft_quantizer") is not None
