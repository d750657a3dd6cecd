"""An adapter folded into its base: ``sft merge``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.errors import UsageError
from sft.files import check_free, staged_folder
from sft.inference.finished import finished, opened_source
from sft.inference.open import settings_for
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
    source = opened_source(settings, plugins, adapter)
    if form is not None and form.layout == "paddle" and source.family.paddle_prefix is None:
        raise UsageError(
            f"{source.folder}: PaddleNLP's format is not known here of model_type {source.family.model_type!r}; leave "
            "--format paddle out."
        )
    check_free(output)
    dtype = "base" if form is None else form.dtype
    with finished(settings, plugins, adapter, source, dtype, say) as whole, Progress(say) as progress:
        from sft.models.saving import write_finished

        with staged_folder(output) as staging:
            write_finished(staging, whole, form, progress)
        return whole.changed
