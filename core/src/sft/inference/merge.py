"""An adapter folded into its base: ``sft merge``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft import runtime
from sft.errors import UsageError
from sft.files import check_free
from sft.inference.open import settings_for, tokenizer_of
from sft.models.adapter_folder import check_base
from sft.models.loading import open_model
from sft.progress import Progress

if TYPE_CHECKING:
    from sft.models.shards import WeightFormat

USES = ("sft merge", ("sft_model_family", "sft_model_config", "sft_quantizer", "sft_adapter_merger"))


def merge(
    model: str,
    adapter: Path,
    output: Path,
    say: Callable[[str], None],
    requested: Sequence[str] = (),
    form: WeightFormat | None = None,
    device: str | None = None,
    allow_pickle: bool = False,
) -> int:
    """Write ``model`` with ``adapter`` folded in to ``output`` in ``form`` (by default safetensors in Hugging Face
    layout); the number of merged tensors.

    Where the adapter was trained over a quantized base, it is folded into that: weights are quantized and read back.
    ``device`` (cpu, gpu, gpu:N; by default paddle's choice) is where the arithmetic happens, in float32.
    ``allow_pickle``: the base's weights may be pickled.
    """
    given: dict[str, Any] = {"model_name_or_path": model, "allow_pickle": allow_pickle, "device": device}
    settings, plugins = settings_for(adapter, requested, given, USES)
    runtime.require_paddle()
    source = open_model(settings.model.place, plugins, allow_pickle)
    if form is not None and form.layout == "paddle" and source.family.paddle_prefix is None:
        raise UsageError(
            f"{source.folder}: PaddleNLP's format is not known here of model_type {source.family.model_type!r}; leave "
            "--format paddle out."
        )
    tokenizer = tokenizer_of(source, settings, adapter)
    check_free(output)
    with runtime.restored(device):
        runtime.exact_products()
        say(runtime.prepare())
        if device is not None:
            runtime.use_device(device)

        from sft.models.saving import write_merged

        check_base(adapter, source, plugins, settings.options, say)
        merger = plugins.hook.sft_adapter_merger(folder=adapter, hook=plugins.hook)
        with Progress(say) as progress:
            return write_merged(output, source, merger, tokenizer, plugins.hook.sft_quantizer(run=None), form, progress)
