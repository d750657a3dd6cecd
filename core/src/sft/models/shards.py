"""Weight files: tensors stream into one file or into numbered shards with an index, as transformers and PaddleNLP name
them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sft.errors import UsageError
from sft.files import save_tensors, write_json

if TYPE_CHECKING:
    import numpy as np

SHARD_BYTES = 2 * 10**9

_SIZE = re.compile(r"(\d+(?:\.\d+)?) *([KMGT]?)(i?)B?", re.IGNORECASE)


@dataclass(frozen=True)
class WeightFormat:
    """How a model directory keeps its weights."""

    layout: str = "hf"
    """"hf" (Linear weights [out, in], names ``model.…``) or "paddle" ([in, out], names as in the paddle model)."""
    safe: bool = True
    """safetensors; if not, ``model_state.pdparams``, pickled as ``paddle.save`` does it (layout "paddle" alone)."""
    shard_bytes: int = SHARD_BYTES
    """The largest file, unless one tensor alone is larger."""
    dtype: str = "base"
    """"base" (each tensor in the base's dtype), or "float32" (what was merged is not rounded)."""

    def __post_init__(self) -> None:
        if self.layout == "hf" and not self.safe:
            raise UsageError(
                "Without safe serialization the hf format would need torch to pickle its tensors; leave "
                "safe_serialization true, or give --format paddle."
            )

    @property
    def names(self) -> tuple[str, str]:
        """Stem and suffix of the weight files."""
        return ("model", ".safetensors") if self.safe else ("model_state", ".pdparams")


def parse_size(text: str) -> int:
    """Bytes of a human size, read as transformers reads it: ``2GB`` is 2·10⁹, ``2GiB`` is 2·2³⁰, a number is bytes.
    Raises :class:`UsageError` for any other text."""
    match = _SIZE.fullmatch(text.strip())
    if match is None or float(match[1]) == 0:
        raise UsageError(f"{text!r} is no size; give something like 2GB, 500MB or 1GiB.")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** " KMGT".index(match[2].upper() or " "))


def write_tensors(folder: Path, tensors: Iterable[tuple[str, np.ndarray]], form: WeightFormat | None = None) -> int:
    """Stream ``tensors``, whose names and layout are already ``form``'s, into weight files; the bytes of weights.

    One file has no number; more get numbers and an index. At most one shard is in memory.
    """
    form = form or WeightFormat()
    stem, suffix = form.names
    parts: list[dict[str, int]] = []
    shard: dict[str, np.ndarray] = {}

    def part(number: int) -> Path:
        return folder / f"part-{number:05d}{suffix}"

    def flush() -> None:
        if shard:
            _write(part(len(parts)), shard, form)
            parts.append({name: tensor.nbytes for name, tensor in shard.items()})
            shard.clear()

    held = 0
    for name, tensor in tensors:
        if held + tensor.nbytes > form.shard_bytes:
            flush()
            held = 0
        shard[name] = tensor
        held += tensor.nbytes
    flush()
    total = sum(sum(sizes.values()) for sizes in parts)
    if len(parts) == 1:
        part(0).rename(folder / f"{stem}{suffix}")
        return total
    weight_map = {}
    for number, sizes in enumerate(parts):
        name = f"{stem}-{number + 1:05d}-of-{len(parts):05d}{suffix}"
        part(number).rename(folder / name)
        weight_map.update(dict.fromkeys(sizes, name))
    write_json(folder / f"{stem}{suffix}.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})
    return total


def _write(path: Path, tensors: dict[str, np.ndarray], form: WeightFormat) -> None:
    if form.layout == "hf":
        save_tensors(path, tensors, {"format": "pt"})
        return
    # paddle has no bfloat16 in numpy: its files, and PaddleNLP's safetensors, say uint16 for the same bits.
    bits = {name: tensor.view("uint16") if tensor.dtype == "bfloat16" else tensor for name, tensor in tensors.items()}
    if form.safe:
        save_tensors(path, bits, {"format": "np"})
        return
    import paddle

    try:
        paddle.save(bits, str(path), protocol=4)
    except OSError as error:
        raise OSError(f"{path.name} could not be written: {error}") from error
