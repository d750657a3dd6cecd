"""What a family is, and what a model's class must offer: what a plugin gives for ``sft_model_family``."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from sft.models.architecture import ModelShape
from sft.models.families.values import Values


class Reading(Protocol):
    """One forward pass: where each token stands, and what it sees.

    It is made for each pass: for rows of documents in training, for prompts and then token by token in answers. A
    class that asks it for attention, and turns by its positions, has packing, windows, padding on the left and a
    key/value cache without knowing of them.

    Attributes:
        positions: int64 [B, S], from 0 in each document.
        longest: How many positions a table must have: one more than the highest of these. Asking ``positions`` for it
            would make a GPU wait.
    """

    positions: Any
    longest: int

    def turn(self, x: Any, rotary: int) -> Any:
        """``x`` [B, S, heads, D] turned by its positions, by ``rotaries[rotary]`` of the model's shape."""
        ...

    def attend(self, layer: int, query: Any, key: Any, value: Any) -> Any:
        """Attention of block ``layer``, once a pass: query [B, S, H, D]; key, value [B, S, K, D] of these S tokens →
        [B, S, H, D]. Scores are scaled by 1/√D, and capped if the model's shape says so."""
        ...


class LanguageModel(Protocol):
    """What the core needs of a model's class, beside that it is a ``paddle.nn.Layer``.

    - ``named_parameters()`` have the names of Hugging Face's files (or what :attr:`Family.renamed` makes of them) and
      Paddle's layout: weights of Linears are [in, out]. Those of blocks begin with ``architecture.block_names``.
    - What adapters and quantizers may replace in a block is a ``paddle.nn.Linear`` and is called as a layer. When the
      model has been built, those of exactly this class become :class:`sft.Linear`, so the run's kernels compute them
      and a CPU run's bfloat16 is theirs; a subclass stays what it is.
    - It can be built with unallocated parameters (``paddle.LazyGuard``): it computes nothing from them when it is made.
    - The result of a token depends on what ``reading`` lets it see, and on nothing else in its batch.

    ``sft.testing.check_family`` tries all of this. Plans of several processes know the decoder's tensors alone, and so
    refuse every other class.

    Attributes:
        architecture: What its family's ``read`` gave.
        attention: The :class:`sft.AttentionBackend` of training. The core sets it; it begins as
            ``sft.DefaultAttention()``.
        kernels: The :class:`sft.Kernels` that compute its pieces. The core sets them, here and in each layer in it that
            has this attribute too; they begin as ``sft.PLAIN``.
        recompute: Whether training computes each block again in backward instead of keeping what is in it. The core
            sets it; it begins as False.
        lm_head: A layer, hidden [..., hidden] → logits [..., V], that is a matrix ``weight`` [hidden, V], or
            [V, hidden] where ``transpose_y`` is true. The loss takes the matrix; products are multiplied by ``scale``
            and then capped by ``cap``, where the layer has these.
    """

    architecture: ModelShape
    attention: Any
    kernels: Any
    recompute: bool
    lm_head: Any

    def get_input_embeddings(self) -> Any:
        """The embedding, a layer that :meth:`embed` calls: hooks on it change what goes into the model."""
        ...

    def embed(self, tokens: Any) -> Any:
        """int64 [B, S] → what goes into the first block, [B, S, hidden]."""
        ...

    def hidden_states(self, embedded: Any, reading: Reading) -> Any:
        """[B, S, hidden] → [B, S, hidden], through all blocks and the last norm: what goes into ``lm_head``."""
        ...


@dataclass(frozen=True)
class Family:
    """How a family's checkpoints are read and written.

    ``read`` makes of a ``config.json`` what the decoder computes, an :class:`sft.Architecture`. Where ``build`` is
    given, the model is a class of the plugin's own: ``read`` gives a :class:`sft.ModelShape` (or a class derived from
    it, with what the model needs beside), and ``build`` makes the :class:`LanguageModel` of it.

    Attributes:
        causal_lm: Its class in transformers, which ``architectures`` of a config names.
        read: From a config's :class:`Values`; :class:`sft.UsageError` for what is not computed.
        paddle_prefix: The backbone's name in PaddleNLP's layout; None: PaddleNLP has no such family.
        renamed: What parts of names are called in Hugging Face's files and here, as pairs of words between dots.
        build: The model of what ``read`` gave, with any weights; None: the decoder.
        upright: How the names of matrices end that are no Linear's: they lie in files as they do here, those of
            Linears transposed.
    """

    model_type: str
    causal_lm: str
    read: Callable[[Values], ModelShape]
    paddle_prefix: str | None = None
    renamed: tuple[tuple[str, str], ...] = ()
    build: Callable[[Any], Any] | None = None
    upright: tuple[str, ...] = ("embed_tokens.weight",)

    def architecture(self, values: Mapping[str, Any], where: Any) -> Any:
        """What a ``config.json`` describes; :class:`UsageError` naming ``where`` for what cannot be computed."""
        return self.read(Values(values, where))

    def from_file(self, name: str, layout: str) -> str:
        """A tensor's name in a file of ``layout`` ("hf" or "paddle") → its parameter's."""
        if layout == "paddle":
            return _swap(name, f"{self.paddle_prefix}.", "model.")
        for theirs, ours in self.renamed:
            name = re.sub(rf"\b{theirs}\b", ours, name)
        return name

    def to_file(self, name: str, layout: str) -> str:
        """A parameter's name → its tensor's in a file of ``layout``."""
        if layout == "paddle":
            return _swap(name, "model.", f"{self.paddle_prefix}.")
        for theirs, ours in self.renamed:
            name = re.sub(rf"\b{ours}\b", theirs, name)
        return name

    def is_transposed(self, name: str, dimensions: int) -> bool:
        """Whether files in Hugging Face's layout hold a tensor of so many ``dimensions`` as [out, in] that is [in, out]
        here: a Linear's."""
        return dimensions == 2 and not name.endswith(self.upright)


def _swap(name: str, old: str, new: str) -> str:
    return new + name[len(old) :] if name.startswith(old) else name
