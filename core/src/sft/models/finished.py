"""A model as it is handed on after training: its tensors one at a time, with an adapter folded in, and what goes with
them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sft.conversations import Turn
from sft.data.tokenizer import Tokenizer
from sft.errors import UsageError
from sft.models.architecture import ModelShape
from sft.models.config import hf_config
from sft.models.grown import EMBEDDING, HEAD, Growth
from sft.models.layers import target_layers
from sft.models.loading import ModelSource, build_model
from sft.small_files import why

if TYPE_CHECKING:
    from sft.seams import AdapterMerger, Quantizer

Updates = dict[str, tuple[np.ndarray, np.ndarray]]
"""By layer A [in, r] and B [r, out], float32: the layer computes x · (W + A·B)."""


class FinishedModel:
    """A model in the form in which ``sft_export`` gets it. Tensors are read one at a time, in any order.

    They have the same names in all families that sft's decoder computes: those of Hugging Face's Llama, as far as it
    has them (each expert has matrices of its own, ``mlp.experts.N``), whatever the files call them and however they
    are laid out there. A tied head is not among them.

    Where the adapter was trained over a quantized base, it is folded into that: weights are quantized and read back.

    Attributes:
        say: Prints a line for the user.
        changed: How many of the tensors that were read the adapter has changed.
        adapter_alone: Whether somebody has asked for :meth:`updates`.
    """

    def __init__(
        self,
        source: ModelSource,
        tokenizer: Tokenizer,
        merger: AdapterMerger | None = None,
        quantizer: Quantizer | None = None,
        dtype: str = "base",
        say: Callable[[str], None] = lambda text: None,
        updates: Callable[[], Updates] | None = None,
    ) -> None:
        """``dtype``: "base", so that each tensor has the dtype of its file, to which what is merged is rounded; or
        "float32". Over a quantized base all is float32."""
        self.source, self.tokenizer, self.say = source, tokenizer, say
        self._merger, self._quantizer, self._dtype = merger, quantizer, dtype
        self._weights = source.weights()
        self._stored = {source.family.from_file(name, self._weights.layout): name for name in self._weights}
        self._quantized = (
            set() if quantizer is None else {f"{layer.name}.weight" for layer in target_layers(build_model(source))}
        )
        self._left = set(self._stored)
        self._updates = updates
        self.changed = 0
        self.adapter_alone = False

    # --- tensors --------------------------------------------------------------------------------------------

    @property
    def names(self) -> list[str]:
        """The names of all tensors, in alphabetical order of the files' names."""
        return list(self._stored)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape that :meth:`read` gives; no weight is read for it."""
        shape = self._weights.shape(self._stored[name])
        found = tuple(shape[::-1] if self._is_turned(name, len(shape)) else shape)
        return found if self._growth_of(name) is None else (self.source.architecture.vocabulary, *found[1:])

    def dtype_of(self, name: str) -> str:
        """The dtype that :meth:`read` gives, by numpy's name or "bfloat16"; no weight is read for it."""
        if self._quantizer is not None or self._dtype == "float32":
            return "float32"
        stored = self._stored[name]
        return str(self._weights.read_stored(stored, tuple(slice(1) for _ in self._weights.shape(stored))).dtype)

    @cached_property
    def dtype(self) -> str:
        """The dtype of all tensors; float32 where they differ."""
        found = {self.dtype_of(name) for name in self.names}
        return found.pop() if len(found) == 1 else "float32"

    def read(self, name: str) -> np.ndarray:
        """One tensor; Linears are [out, in], and bfloat16 is as ``ml_dtypes`` has it. The arithmetic is float32.

        Raises :class:`UsageError` where the tensor cannot be read, or would not be finite with the adapter.
        """
        stored = self._weights.read_stored(self._stored[name])
        if self._is_turned(name, stored.ndim):
            stored = stored.T
        growth = self._growth_of(name)
        if growth is not None:
            stored = growth.of(stored, 0)
        weight, is_new = self._finish(name, stored)
        if self._dtype == "float32":
            weight = weight.astype(np.float32, copy=False)
        elif self._quantizer is None:
            with np.errstate(over="ignore"):  # it is an error below
                weight = weight.astype(stored.dtype, copy=False)
        if weight is not stored:
            _check_finite(name, stored, weight)
        if name in self._left:
            self._left.remove(name)
            self.changed += is_new
        return np.ascontiguousarray(weight)

    def unread(self) -> list[str]:
        """The tensors that nobody has read yet; none where the adapter is written alone."""
        return [] if self.adapter_alone else sorted(self._left)

    def updates(self) -> Updates:
        """The adapter as updates of low rank, by layer: what ``sft_adapter_updates`` says. Whoever asks for them writes
        the adapter alone.

        Raises :class:`UsageError` where there is no adapter, or one that is more than such updates.
        """
        if self._updates is None:
            raise UsageError("There is no adapter to write alone; name its folder.")
        self.adapter_alone = True
        return self._updates()

    def check_adapter(self) -> None:
        """Once all tensors have been read: refuse an adapter with weights for which there was no tensor."""
        if self._merger is not None and not self.adapter_alone and self._merger.unused():
            shown = ", ".join(self._merger.unused()[:3])
            raise UsageError(
                f"The adapter has weights that {self.source.folder} has no place for ({shown}); it belongs to another "
                "model."
            )

    def _growth_of(self, name: str) -> Growth | None:
        return self.source.growth if name in (EMBEDDING, HEAD) else None

    def _is_turned(self, name: str, dimensions: int) -> bool:
        return self._weights.layout == "paddle" and self.source.family.is_transposed(name, dimensions)

    def _finish(self, name: str, stored: np.ndarray) -> tuple[np.ndarray, bool]:
        """One tensor [out, in], in float32 if the adapter or the quantizer changed it, and whether the adapter did."""
        if self._merger is None and self._quantizer is None:
            return stored, False
        import paddle

        base = paddle.to_tensor(np.ascontiguousarray(stored.astype(np.float32, copy=False)))
        if self._quantizer is not None and name in self._quantized:
            weight = np.ascontiguousarray(stored.astype(np.float32, copy=False).T)
            layer = self._quantizer.quantize(name.removesuffix(".weight"), weight, None)
            base = base if layer is None else layer.dequantize().T
        merged = base if self._merger is None else self._merger.merge(name, base)
        if merged is base and self._quantizer is None:
            return stored, False
        array = merged.numpy()
        is_new = merged is not base and not np.array_equal(array, base.numpy())
        return array, is_new

    # --- what goes with them ----------------------------------------------------------------------------------

    @property
    def architecture(self) -> ModelShape:
        """What the model computes, as its family's reader has it: an :class:`sft.Architecture` where that is sft's
        decoder."""
        return self.source.architecture

    @property
    def config(self) -> dict[str, Any]:
        """``config.json`` as it is written for Hugging Face, with what plugins changed in it."""
        return hf_config(self.source.values, self.dtype, self.source.family)

    @property
    def generation(self) -> dict[str, Any]:
        """``generation_config.json``; empty where there is none."""
        if self.source.generation is None:
            return {}
        try:
            values = json.loads(self.source.generation)
        except ValueError as error:
            raise UsageError(
                f"{self.source.folder / 'generation_config.json'} is not JSON ({why(error)}); correct or remove it."
            ) from error
        return values if isinstance(values, dict) else {}

    @property
    def name(self) -> str:
        """What the model's folder is called."""
        return self.source.folder.resolve().name

    # --- text -------------------------------------------------------------------------------------------------

    @property
    def tokenizer_json(self) -> dict[str, Any]:
        """``tokenizer.json`` as the tokenizers library writes it, whatever version of it had written the file; without
        padding and truncation."""
        return dict(json.loads(self.tokenizer.backend.to_str()))

    @property
    def bos_id(self) -> int | None:
        return self.tokenizer.bos_id

    @property
    def bos_text(self) -> str | None:
        """The token that begins a text, as text."""
        return self.tokenizer.special.get("bos_token")

    @property
    def adds_bos(self) -> bool:
        """Whether the tokenizer itself begins a text with BOS."""
        return self.tokenizer.adds_bos

    @property
    def eos_ids(self) -> list[int]:
        """The tokenizer's end-of-text token first, then those of the model's config."""
        return list(self.tokenizer.eos_ids)

    @property
    def stop_ids(self) -> list[int]:
        """Tokens on which an answer ends: :attr:`eos_ids`, and what ends a turn of the chat template."""
        return list(self.tokenizer.stop_ids)

    @property
    def chat_template(self) -> str | None:
        """The chat template in Jinja; None without one, and where it is in PaddleNLP's form (:attr:`renders`)."""
        return self.tokenizer.chat_template if self.tokenizer.has_jinja else None

    @property
    def renders(self) -> bool:
        """Whether conversations have a form of their own, in Jinja or not."""
        return self.tokenizer.chat_template is not None

    def render(self, turns: Sequence[Turn], add_generation_prompt: bool = False) -> str:
        """A conversation as the chat template writes it, or up to where the model is to answer; raises
        :class:`UsageError` for what the template refuses."""
        return self.tokenizer.render(turns, add_generation_prompt)

    def save_tokenizer(self, folder: Path) -> None:
        """Write ``tokenizer.json``, ``tokenizer_config.json``, the chat template and what else belongs to them."""
        self.tokenizer.save(folder)


def _check_finite(name: str, stored: np.ndarray, weight: np.ndarray) -> None:
    """Refuse a ``weight`` to be written that is not finite where the base's, as ``stored``, is."""
    if np.isfinite(weight).all() or not (np.isfinite(stored) & ~np.isfinite(weight)).any():
        return
    if weight.dtype == np.float32:
        raise UsageError(f"With the adapter, {name} would not be finite; the adapter is damaged: copy it again.")
    raise UsageError(
        f"With the adapter, {name} has values that do not fit into {weight.dtype}, the base's; add --dtype float32."
    )
