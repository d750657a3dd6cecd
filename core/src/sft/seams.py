"""The protocols behind the hooks of ``hookspecs.py``: what a plugin hands to the core, and what the core asks of it.

Shapes: B rows, S tokens in a row, H query heads, K key/value heads, D head size. The data path is numpy;
tensors are paddle's. A technique of the adapter seam has no object of its own: it answers
``sft_adapt_model`` and, if it has weights to keep, the three hooks about adapter folders.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

if TYPE_CHECKING:
    import numpy as np

    from sft.distributed.pieces import Piece


@dataclass(frozen=True)
class Turn:
    """One message of a conversation; ``trains`` says whether its text is a target."""

    role: str
    content: str
    trains: bool = False


@dataclass(frozen=True)
class Example:
    """One encoded record. ``input_ids`` int64 [n]; ``labels`` int64 [n], already shifted, -100 = no target."""

    input_ids: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class Batch:
    """What a collator makes of rows, each of which is one or several documents and then padding.

    ``input_ids``, ``labels`` (already shifted, -100 where nothing is learned) and ``position_ids`` (from 0 in
    each document) are int64 [B, S]. ``startend_row_indices`` is int32 [B, 1, S, 1] in FlashMask's causal form (query
    rows from that index on do not see the key): documents do not see each other, and each padding token is a
    document of its own. ``lengths`` are the document lengths of each row, without padding.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    position_ids: np.ndarray
    startend_row_indices: np.ndarray
    lengths: tuple[tuple[int, ...], ...]

    @property
    def packed(self) -> bool:
        """Whether a row holds several documents; if not, causal attention alone is right for all that is learned."""
        return any(len(row) > 1 for row in self.lengths)

    @property
    def tokens(self) -> int:
        """Tokens without padding."""
        return sum(sum(row) for row in self.lengths)

    @property
    def padding_tokens(self) -> int:
        return int(self.input_ids.size) - self.tokens

    @property
    def target_tokens(self) -> int:
        return int((self.labels != -100).sum())


class DataCollator(Protocol):
    """Decides which records share a row, and makes batches of rows.

    Attributes:
        packs: Whether a row may hold several records; attention must then be able to keep them apart.
    """

    packs: bool

    def rows(self, lengths: np.ndarray, rng: np.random.Generator | None) -> list[tuple[int, ...]]:
        """Record numbers of each row of one pass over the data, in training order.

        ``lengths`` int64 [records] in tokens. ``rng`` shuffles; None keeps the data's order (evaluation).
        Every record must appear exactly once.
        """
        ...

    def batch(self, rows: Sequence[Sequence[Example]]) -> Batch:
        """Rows of examples → a batch."""
        ...


class AttentionBackend(Protocol):
    """Computes attention in every decoder layer while training and evaluating; answers go through a cache.

    Attributes:
        packed: Whether ``startend_row_indices`` are honoured; if not (or unset), rows of several documents are refused.
        describes_padding: Whether it wants the indices for rows of one document too, to leave their padding out.
        caps: Whether it takes ``cap``; if not (or unset), models that cap their scores (Gemma 2) are refused.
    """

    packed: bool
    describes_padding: bool
    caps: bool

    def attend(
        self, query: Any, key: Any, value: Any, startend_row_indices: Any | None, cap: float | None = None
    ) -> Any:
        """Causal attention, scaled by 1/√D. query [B, S, H, D]; key, value [B, S, K, D] → [B, S, H, D].

        ``startend_row_indices`` int32 [B, 1, S, 1] as in :class:`Batch`, or None: causal attention says it all. A layer
        that sees a window has rows that end sooner. ``cap`` is given where there is one: scores s, scaled, become
        cap · tanh(s / cap) before the mask.
        """
        ...


class AdapterLayer(Protocol):
    """What ``sft_adapt_model`` puts in the place of a Linear: a paddle Layer, [..., in] → [..., out].

    Attributes:
        sides: How processes divide its tensors. For each attribute that holds one (a parameter, or a frozen tensor):
            which side of the Linear each dimension is, "in" or "out", and None for one that is neither. A layer
            whose parameters are not all in it is refused where processes share the layers of a model.
    """

    sides: ClassVar[dict[str, tuple[str | None, ...]]]

    def forward(self, x: Any) -> Any:
        """[..., in] → [..., out]. What needs a whole dimension that processes share asks :func:`sft.sum_over`."""
        ...


class QuantizedLayer(Protocol):
    """What stands for a quantized Linear: a paddle Layer, [..., in] → [..., out].

    Attributes:
        bias: Float32 [out]; None where there is none. It need not be a parameter.
    """

    in_features: int
    out_features: int
    bias: Any

    def forward(self, x: Any) -> Any:
        """[..., in] → [..., out]; gradients flow to ``x``."""
        ...

    def dequantize(self) -> Any:
        """The weight as a float32 Tensor [in, out], for merging and for what an adapter begins with."""
        ...

    def part(self, axis: int, index: int, count: int) -> Any:
        """The layer of part ``index`` of ``count`` of the weight [in, out] along ``axis``, in the same codes. A layer
        without this method is refused where processes share the layers of a model."""
        ...


class Quantizer(Protocol):
    """Stands in for Linear layers while weights stream in, so that no float copy of the model ever exists."""

    def quantize(self, name: str, weight: np.ndarray, bias: np.ndarray | None) -> QuantizedLayer | None:
        """The layer that stands for Linear ``name`` (as Hugging Face names it), or None to keep it as it is.

        ``weight`` float32 [in, out] (Paddle's layout), ``bias`` float32 [out].
        """
        ...


class Learning(Protocol):
    """What a step does with one micro-batch; a strategy decides when (:meth:`ParallelStrategy.accumulate`).

    Of one micro-batch, forward comes first, then loss, then backward. Between them other micro-batches may pass.
    """

    def forward(self, batch: Batch, received: Any | None = None, told: Callable[[], None] | None = None) -> Any:
        """Tells plugins of the batch (``sft_micro_batch``), then sends it through the model, in
        ``run.precision.autocast()``. Returns the hidden states [B, S, hidden] after the last layer that is here.

        ``received``, of that shape, goes into the first block that is here instead of the embedding of the batch's
        tokens. ``told`` is called once plugins have been told: from there on other processes may be waited for.
        """
        ...

    def loss(self, hidden: Any, batch: Batch) -> Any:
        """The summed loss (nats, a scalar float32 tensor) of the batch's target tokens, from the hidden states that
        come after the model's last layer."""
        ...

    def backward(self, loss: Any) -> None:
        """Adds the gradients of the loss, which is weighted so that all losses of a step add up to its mean loss
        (times the loss scale of float16), to those of the parameters."""
        ...

    def idle(self) -> Learning:
        """The same for a micro-batch that is here only because other processes wait: it is not announced to plugins,
        and its loss weighs nothing."""
        ...


class ParallelStrategy(Protocol):
    """Where this process stands among all that share the run, and the operations that need the others.

    The members below :attr:`is_first` stand in the order in which a run uses them. Each process of a run calls them in
    the same order, for they may wait for the others.

    Attributes:
        data_rank: Which share of a step's rows is this process's, from 0.
        data_world: Of how many shares.
        draw_rank: What makes draws (dropout, noise) differ from other processes'; equal where the same values must be
            drawn.
        is_main: Whether this process writes the run directory and speaks to the user.
        is_first: Whether this process is the first of those that read the same records, and writes what is made of
            them.
    """

    data_rank: int
    data_world: int
    draw_rank: int
    is_main: bool
    is_first: bool

    # --- the model ---

    def divide(self, model: Any) -> None:
        """Reduce ``model``, whose parameters are not allocated, to what this process holds, marked with
        :func:`sft.parallel.mark_part` and :func:`sft.parallel.mark_stage`."""
        ...

    def parameters(self, model: Any) -> Iterable[tuple[str, Any]]:
        """All parameters of the whole model by structured name, tied ones once: those of other processes too."""
        ...

    def store(self, parameter: Any, read: Callable[[tuple[slice, ...]], np.ndarray]) -> None:
        """Give a parameter its value: ``read`` gives what is at a place of the whole tensor, in Paddle's layout."""
        ...

    def linear_weight(self, layer: Any) -> Any:
        """The whole weight of a target layer, float32 [in, out], wherever its parts are."""
        ...

    def connect(self, model: Any) -> None:
        """The model has its weights, its attention and its adapters: divide what those added, and let processes work
        together when it is called."""
        ...

    # --- training ---

    def share(self, groups: list[ParameterGroup]) -> list[ParameterGroup]:
        """The optimizer's groups, with what this process steps under each name: the parameter, or a piece of it."""
        ...

    def accumulate(self, learning: Learning, batches: Sequence[Batch]) -> float:
        """Forward, loss and backward of this process's micro-batches, as ``learning`` does each; returns the sum of
        their losses.

        Afterwards what :meth:`share` gave has the sum of the gradients over all micro-batches of all data ranks.
        """
        ...

    def grad_norm(self, stepped: Mapping[str, Any]) -> float:
        """The norm of all gradients over all processes, as they stand (with the loss scale); ``stepped`` is what
        :meth:`share` gave, by name."""
        ...

    def updated(self) -> None:
        """What is stepped here has new values: let each process have those that it needs."""
        ...

    def scores(self, model: Any, batches: Sequence[Batch]) -> tuple[float, int]:
        """Without gradients: summed loss of this process's ``batches``, and how many targets are the likeliest
        token."""
        ...

    def answering(self) -> AbstractContextManager[Callable[[], None]]:
        """Within it, the model writes answers; what it gives is called after some of them."""
        ...

    def sum(self, values: Sequence[float]) -> list[float]:
        """The element-wise sum over all data ranks."""
        ...

    def largest(self, value: float) -> float:
        """The largest of all processes' values."""
        ...

    # --- what is written ---

    def whole(self, parameters: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
        """Of :meth:`parameters`, name and whole tensor, one at a time."""
        ...

    def assembled(self, model: Any) -> AbstractContextManager[None]:
        """Within it, adapter layers hold whole tensors, as on one process; what they hold at its end is divided
        again."""
        ...

    def pieces(self, stepped: Mapping[str, Any]) -> Mapping[str, Piece]:
        """Which piece of a whole parameter each tensor of :meth:`share` is."""
        ...

    def own_file(self, stem: str) -> str:
        """Of the files whose names begin with ``stem``, the one (without suffix) that this process writes."""
        ...

    def wait(self) -> None:
        """Until every process is here."""
        ...


@dataclass
class ParameterGroup:
    """Parameters that share an optimizer setting; ``learning_rate`` multiplies the schedule's.

    Attributes:
        parameters: Structured parameter name → paddle Parameter.
    """

    name: str
    parameters: dict[str, Any] = field(default_factory=dict)
    learning_rate: float = 1.0
    weight_decay: float = 0.0


@dataclass(frozen=True)
class AdapterFiles:
    """An adapter as Hugging Face PEFT stores it: the config, and tensors in PEFT's names and layout ([out, in])."""

    config: dict[str, Any]
    tensors: dict[str, np.ndarray]


class AdapterMerger(Protocol):
    """Folds an adapter folder into base weights, one tensor at a time."""

    def merge(self, name: str, weight: Any) -> Any:
        """The merged weight, or ``weight`` itself if the adapter has nothing for it.

        ``name`` is the tensor's Hugging Face name; ``weight`` a float32 paddle Tensor [out, in] (one of another
        shape where it is no Linear's) on the device of the merge, as is what is returned.
        """
        ...

    def unused(self) -> list[str]:
        """Adapter tensors that no base weight has asked for; the core makes them an error."""
        ...
