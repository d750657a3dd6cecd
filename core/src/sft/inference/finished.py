"""A finished model, opened to be written: the base, and what folds the adapter in.

Where there is neither an adapter nor a quantizer, nothing is computed, and paddle stays out of it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from sft import runtime
from sft.errors import UsageError
from sft.inference.open import tokenizer_of
from sft.models.adapter_folder import check_base
from sft.models.loading import ModelSource, open_model
from sft.plugins.registry import Plugins
from sft.settings.arguments import Settings

if TYPE_CHECKING:
    from sft.models.finished import FinishedModel, Updates


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
    from sft.models.rows_in_files import rows_for_base
    from sft.models.saved_layers import SavedMerger, tied_once
    from sft.models.token_rows import RowsMerger

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
        merger, updates = None, None
        if adapter is not None:
            updates = partial(_updates, plugins, adapter, source, say)
            check_base(adapter, source, plugins, settings.options, say)
            merger = plugins.hook.sft_adapter_merger(folder=adapter, hook=plugins.hook)
            if saved := tied_once(adapter, source):
                merger = SavedMerger(merger, saved)
            if rows := rows_for_base(adapter, source):
                merger = RowsMerger(merger, rows)
        yield FinishedModel(source, tokenizer, merger, plugins.hook.sft_quantizer(run=None), dtype, say, updates)


def _updates(plugins: Plugins, adapter: Path, source: ModelSource, say: Callable[[str], None]) -> Updates:
    """The adapter as updates of low rank; :class:`UsageError` where it is more than that."""
    from sft.models.rows_in_files import rows_for_base
    from sft.models.saved_layers import tied_once

    more = [*tied_once(adapter, source), *rows_for_base(adapter, source)]
    if more:
        raise UsageError(
            f"{adapter} is more than updates of low rank: {more[0]} trained too, or some of its rows; fold it into its "
            "base."
        )
    silent = {*plugins.implementing("sft_adapter_merger")} - {*plugins.implementing("sft_adapter_updates")}
    if silent:
        raise UsageError(
            f"Plugin {min(silent)} folds {adapter} in, or changes how, and does not say its updates of low rank "
            "(sft_adapter_updates); fold the adapter into its base."
        )
    provider = plugins.provider("sft_adapter_updates")
    found: Updates | None = plugins.hook.sft_adapter_updates(folder=adapter, hook=plugins.hook)
    if found is None:
        raise UsageError(
            f"{adapter} is more than updates of low rank, as plugin {provider} reads it; fold it into its base."
        )
    if (quantizer := plugins.provider("sft_quantizer")) is not None:
        say(f"note: the adapter was trained over a base that {quantizer} held; over another it means nearly the same")
    return found


def _computes(plugins: Plugins, adapter: Path | None) -> bool:
    return adapter is not None or plugins.provider("sft_quantizer") is not None
