"""The protocols behind the hooks of ``hookspecs.py``: what plugins give to the core, and what the core asks of that.

Shapes: B rows, S tokens in a row, H query heads, K key/value heads, D head size. The data path is numpy;
tensors are paddle's. An adapter technique has no object of its own: it implements
``sft_adapt_model`` and, if it has weights to save, the three hooks about adapter folders.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

if TYPE_CHECKING:
    import numpy as np

    from sft.distributed.pieces import Piece


@dataclass(frozen=True)
class Example:
    """One encoded record. ``input_ids`` int64 [n]; ``labels`` int64 [n], already shifted, -100 = no target; ``weights``
    float32 [n], what the loss of each label counts (0: it is no target), or None where all count 1."""

    input_ids: np.ndarray
    labels: np.ndarray
    weights: np.ndarray | None = None


@dataclass(frozen=True)
class Batch:
    """What a collator makes of rows, each of which is one or several documents and then padding.

    ``input_ids``, ``labels`` (already shifted, -100 where nothing is learned) and ``position_ids`` (from 0 in
    each document) are int64 [B, S]. ``startend_row_indices`` is int32 [B, 1, S, 1] in FlashMask's causal form (query
    rows from that index on do not see the key): documents do not see each other, and each padding token is a
    document of its own. ``lengths`` are the document lengths of each row, without padding. ``weights`` are float32
    [B, S], above 0 where there is a label and 0 elsewhere, or None where every target counts 1.

    Where processes share rows, each computes with a batch of the tokens that it has of them: ``columns``, int64 [S'] in
    rising order, says which. ``input_ids``, ``labels``, ``position_ids`` and ``weights`` are then [B, S'], of these
    tokens alone; ``startend_row_indices`` and ``lengths`` are of whole rows. None: all tokens are here.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    position_ids: np.ndarray
    startend_row_indices: np.ndarray
    lengths: tuple[tuple[int, ...], ...]
    weights: np.ndarray | None = None
    columns: np.ndarray | None = None

    @property
    def width(self) -> int:
        """Tokens of a whole row, padding included: S."""
        return int(self.startend_row_indices.shape[2])

    def here(self, whole: np.ndarray) -> np.ndarray:
        """Of ``whole``, an array [B, :attr:`width`] of any dtype, the columns of this process: [B, S']."""
        return whole if self.columns is None else whole[:, self.columns]

    @property
    def packed(self) -> bool:
        """Whether a row holds several documents. If none does, plain causal attention gives the right loss."""
        return any(len(row) > 1 for row in self.lengths)

    @property
    def tokens(self) -> int:
        """Tokens without padding."""
        if self.columns is None:
            return sum(sum(row) for row in self.lengths)
        return sum(int((self.columns < sum(row)).sum()) for row in self.lengths)

    @property
    def padding_tokens(self) -> int:
        return int(self.input_ids.size) - self.tokens

    @property
    def target_tokens(self) -> int:
        return int((self.labels != -100).sum())

    @property
    def target_weight(self) -> float:
        """The sum of its targets' weights, by which a summed loss is divided."""
        return float(self.target_tokens if self.weights is None else self.weights.sum(dtype="float64"))


class DataCollator(Protocol):
    """Decides which records share a row, and makes batches of rows.

    Both methods are numpy alone. While a step runs, a thread calls them for the step after it, and an evaluation may
    call them at that time: what they need is in their arguments, and nothing is kept from one call to the next.

    Attributes:
        packs: Whether a row may hold several records; attention must then be able to keep them apart.
    """

    packs: bool

    def rows(self, lengths: np.ndarray, rng: np.random.Generator | None) -> list[tuple[int, ...]]:
        """The rows of one pass over the data, in training order: for each row, the numbers of its records.

        ``lengths`` int64 [records] in tokens. ``rng`` shuffles; None keeps the data's order (evaluation).
        Every record must appear exactly once.
        """
        ...

    def batch(self, rows: Sequence[Sequence[Example]]) -> Batch:
        """Rows of examples → a batch. :func:`sft.assemble` takes ``rows`` as they come, calling no Python for each."""
        ...


class AttentionBackend(Protocol):
    """Computes attention in every decoder layer while training and evaluating; answers go through a cache.

    Attributes:
        packed: Whether it obeys what :meth:`mask` is told. If False or unset, rows of several documents are refused.
        describes_padding: Whether it wants to be told of rows of one document too, to skip their padding.
        caps: Whether it takes ``cap``. If False or unset, models that cap their scores (Gemma 2) are refused.
    """

    packed: bool
    caps: bool

    @property
    def describes_padding(self) -> bool: ...

    def mask(self, ends: np.ndarray | None) -> Any:
        """What :meth:`attend` is to know of a batch's documents, in any form; it comes back as it is.

        Called once a batch for all layers, forward and backward (of layers with sliding windows, once for each size of
        window), before the first of them is computed. ``ends`` int32 [B, 1, S, 1] is ``startend_row_indices`` of
        :class:`Batch`; where a layer has a window it ends sooner. None means plain causal attention.
        """
        ...

    def attend(self, query: Any, key: Any, value: Any, mask: Any, cap: float | None = None) -> Any:
        """Causal attention, scaled by 1/√D. query [B, S, H, D]; key, value [B, S, K, D] → [B, S, H, D].

        ``mask`` is what :meth:`mask` made of this batch. ``cap`` is passed only by models that have one: scaled scores
        s become cap · tanh(s / cap) before the mask.
        """
        ...


class AdapterLayer(Protocol):
    """What ``sft_adapt_model`` puts in the place of a Linear: a paddle Layer, [..., in] → [..., out].

    Attributes:
        sides: How processes divide its tensors. For each attribute that holds one (a parameter, or a frozen tensor) it
            says which side of the Linear each dimension follows: "in", "out", or None for neither. Where processes
            share the layers of a model, a layer with a parameter that is not listed is refused.
    """

    sides: ClassVar[dict[str, tuple[str | None, ...]]]

    def forward(self, x: Any) -> Any:
        """[..., in] → [..., out]. If it needs the whole of a dimension that processes may share, it calls
        :func:`sft.sum_over`."""
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
        """The weight as a float32 Tensor [in, out], for merging and for adapters that start from it."""
        ...

    def part(self, axis: int, index: int, count: int) -> Any:
        """A layer for part ``index`` of ``count`` of the weight [in, out] along ``axis``, with the same codes. A layer
        without this method is refused where processes share the layers of a model."""
        ...


class Quantizer(Protocol):
    """Replaces Linear layers while weights stream in, so that no float copy of the model ever exists."""

    def quantize(self, name: str, weight: np.ndarray, bias: np.ndarray | None) -> QuantizedLayer | None:
        """The layer that replaces Linear ``name`` (Hugging Face's name), or None to keep the Linear.

        ``weight`` float32 [in, out] (Paddle's layout), ``bias`` float32 [out].
        """
        ...


@dataclass(frozen=True)
class Targets:
    """Some positions with a label, as a :class:`TokenLoss` sees them. With z the logits of a position over the whole
    vocabulary of V tokens, each a paddle Tensor [n, 1]; gradients flow from the float64 ones to the logits.

    Attributes:
        labels: int64.
        log_probability: float64, log softmax(z)[label]; 0 or less.
        log_normaliser: float64, log Σ exp(z).
        mean_logit: float64, Σ z / V.
    """

    labels: Any
    log_probability: Any
    log_normaliser: Any
    mean_logit: Any


class TokenLoss(Protocol):
    """Makes another loss of each target token's cross-entropy, within the chunked loss."""

    def loss(self, targets: Targets, before: Any) -> Any:
        """The loss of each position, nats, float64 [n, 1]; written with paddle's operations, whose gradients count.

        ``before`` is what the plugin before this one makes of it; for the first plugin, the cross-entropy
        ``-targets.log_probability``. Called for some positions at a time, each of which must be treated alone.
        """
        ...


class Losses(Protocol):
    """The cross-entropy of a micro-batch, as an :class:`Objective` asks for it. Logits exist for a chunk of positions
    at a time; lm_head may be divided among processes, which then ask in the same order."""

    def total(self, hidden: Any, labels: np.ndarray, weights: np.ndarray | None = None) -> Any:
        """Σ w · cross-entropy (nats) over the positions with a label: a scalar float32 tensor. Gradients flow to
        ``hidden`` [B, S, hidden], and to lm_head where it trains.

        ``labels`` int64 [B, S], already shifted, -100 where there is none; ``weights`` float32 [B, S], of any sign;
        None where all are 1. What is returned goes backward by a factor alone: a product or a sum may follow.
        """
        ...

    def each(self, hidden: Any, labels: np.ndarray) -> np.ndarray:
        """The cross-entropy of each position in nats, float64 [B, S], of ``labels`` int64 [B, S]; 0 where there is none
        (-100). No gradients flow."""
        ...


class Objective(Protocol):
    """What a step minimises: Σ loss(batch) / Σ weight(batch) over the micro-batches of all processes.

    Attributes:
        values: The names of what is logged beside the loss, each with a slash, as in ``rewards/margins``: no number of
            the core's own has one.
    """

    @property
    def values(self) -> tuple[str, ...]: ...

    def weight(self, batch: Batch) -> float:
        """What a batch counts: the number of its targets, or of whatever else the mean goes over. It is known before
        the batch goes forward."""
        ...

    def loss(self, losses: Losses, hidden: Any, batch: Batch) -> tuple[Any, Sequence[float]]:
        """The summed loss of a batch, a scalar float32 tensor, and the sums of :attr:`values`.

        ``hidden`` [B, S, hidden] comes out of the model's last layer. Called in training, in evaluation (without
        gradients, the model in evaluation mode), and for batches that only keep other processes from waiting, whose
        result does not count.
        """
        ...


class Learning(Protocol):
    """What a step does with one micro-batch; a strategy decides when (:meth:`ParallelStrategy.accumulate`).

    Each micro-batch goes forward, then its loss is computed, then it goes backward. Steps of other micro-batches may
    come in between.
    """

    @property
    def most(self) -> int:
        """How many micro-batches the process has that has most of them in this step."""
        ...

    def forward(self, batch: Batch, received: Any | None = None, told: Callable[[], None] | None = None) -> Any:
        """Announce the batch to plugins (``sft_micro_batch``), then send it through the model, in
        ``run.precision.autocast()``. Returns the hidden states [B, S, hidden] after the last layer that is here.

        ``received``, of that shape, goes into the first block that is here, in place of the embedded tokens. ``told``
        is called as soon as plugins have been told: only from then on may this process wait for others.
        """
        ...

    def loss(self, hidden: Any, batch: Batch) -> Any:
        """The summed loss of the batch, a scalar float32 tensor, as the run's :class:`Objective` has it; ``hidden`` is
        what comes out of the model's last layer."""
        ...

    def backward(self, loss: Any, upstream: Any | None = None) -> None:
        """Add the gradients of the loss to those of the parameters, which are float32 even where a parameter is not.
        The loss is weighted, so that the losses of a step add up to its mean loss (times the loss scale of float16).

        Where other layers follow in another process, ``loss`` is what :meth:`forward` gave and went there instead, and
        ``upstream``, of its shape, the gradient that has come back."""
        ...

    def idle(self) -> Learning:
        """The same for a micro-batch that only keeps other processes from waiting: plugins do not hear of it, and its
        loss has no weight."""
        ...


class ParallelStrategy(Protocol):
    """The place of this process among those that share the run, and the operations that involve the others.

    The methods are listed in the order in which a run uses them. Every process of a run calls them in the same order,
    because they may wait for the other processes.

    Attributes:
        data_rank: Which share of each step's rows this process gets, counted from 0.
        data_world: The number of shares.
        draw_rank: Processes with different values draw different random numbers (dropout, noise); those that must draw
            the same have the same value.
        is_main: Whether this process writes the run directory and speaks to the user.
        is_first: Whether this is, of the processes that read the same records, the one that writes their results.
    """

    data_rank: int
    data_world: int
    draw_rank: int
    is_main: bool
    is_first: bool

    # --- the model ---

    def divide(self, model: Any) -> None:
        """Reduce ``model``, whose parameters are not allocated yet, to what this process holds. Mark what is divided
        with :func:`sft.parallel.mark_part` and :func:`sft.parallel.mark_stage`."""
        ...

    def parameters(self, model: Any) -> Iterable[tuple[str, Any]]:
        """All parameters of the whole model by structured name, including those of other processes; tied ones once."""
        ...

    def store(self, parameter: Any, read: Callable[[tuple[slice, ...]], np.ndarray]) -> None:
        """Give a parameter its value. ``read`` returns any region of the whole tensor, in Paddle's layout and in the
        file's float type (bfloat16 as ``ml_dtypes`` has it)."""
        ...

    def linear_weight(self, layer: Any) -> Any:
        """The whole weight of a target layer, float32 [in, out], even if other processes hold parts of it."""
        ...

    def connect(self, model: Any) -> None:
        """Called when the model has its weights, attention and adapters: divide the tensors that adapters added, and
        make the forward pass work across processes."""
        ...

    # --- training ---

    def share(self, groups: list[ParameterGroup]) -> list[ParameterGroup]:
        """The optimizer's groups, with what this process updates under each name: the parameter, or a piece of it."""
        ...

    def accumulate(self, learning: Learning, batches: Sequence[Batch]) -> Any:
        """Take this process's micro-batches forward and backward by the methods of ``learning``; return the sum of
        their losses: a number, or, of a strategy that :class:`sft.parallel.ReadsTogether`, a scalar tensor that nobody
        has read. Afterwards the tensors that :meth:`share` returned hold the gradients, summed over all micro-batches
        of all data ranks.
        """
        ...

    def grad_norm(self, stepped: Mapping[str, Any]) -> float:
        """The norm of all gradients of all processes, with the loss scale still in them. ``stepped`` is what
        :meth:`share` returned, by name."""
        ...

    def updated(self) -> None:
        """Called after the optimizer's step: send the new values to the processes that need them."""
        ...

    def scores(
        self, model: Any, batches: Sequence[Batch], score: Callable[[Any, Batch], Sequence[float]], count: int
    ) -> list[float]:
        """Evaluate this process's ``batches``, without gradients: the element-wise sums of ``score(hidden, batch)``,
        which gives ``count`` numbers of the hidden states that come out of the model's last layer."""
        ...

    def answering(self) -> AbstractContextManager[Callable[[], None]]:
        """A context in which the model writes answers. It yields a function that is called after each batch of them."""
        ...

    def sum(self, values: Sequence[float]) -> list[float]:
        """The element-wise sum of ``values`` over all data ranks."""
        ...

    def largest(self, value: float) -> float:
        """The largest ``value`` of all processes."""
        ...

    # --- what is written ---

    def whole(self, parameters: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
        """The whole tensors of ``parameters`` (some of :meth:`parameters`) with their names, one at a time."""
        ...

    def assembled(self, model: Any) -> AbstractContextManager[None]:
        """A context in which adapter layers hold whole tensors, as on one process. At its end their tensors, changed or
        not, are divided again."""
        ...

    def pieces(self, stepped: Mapping[str, Any]) -> Mapping[str, Piece]:
        """For each tensor that :meth:`share` returned, which piece of the whole parameter it is."""
        ...

    def own_file(self, stem: str) -> str:
        """The name, without suffix, of the file that this process writes where each writes one; it begins with
        ``stem``."""
        ...

    def wait(self) -> None:
        """Wait until every process has called this."""
        ...


@runtime_checkable
class ReadsTogether(Protocol):
    """What a :class:`ParallelStrategy` may have too, so that a step waits for its device once."""

    def outcome(self, loss: Any, values: Sequence[float], stepped: Mapping[str, Any]) -> list[float]:
        """The figures of a step, in place of ``sum`` and ``grad_norm``: the sum of ``loss`` over all data ranks, the
        sums of ``values`` over them, and the norm that ``grad_norm`` gives.

        ``loss`` is what ``accumulate`` returned (nats, summed over the targets of this process, or what else the run
        minimises); ``values`` what the objective has summed up in this process; ``stepped`` what ``share`` returned.
        """
        ...


@dataclass
class ParameterGroup:
    """Parameters with the same optimizer settings. ``learning_rate`` is a factor on the schedule's rate.

    Attributes:
        parameters: Structured parameter name → paddle Parameter.
        weight_decay: What ``weight_decay`` of the settings is for these, not a factor on it.
    """

    name: str
    parameters: dict[str, Any] = field(default_factory=dict)
    learning_rate: float = 1.0
    weight_decay: float = 0.0


@dataclass(frozen=True)
class AdapterFiles:
    """An adapter as Hugging Face PEFT stores it.

    Attributes:
        config: The content of ``adapter_config.json``.
        tensors: Those of ``adapter_model.safetensors``, in PEFT's names and layout ([out, in]).
    """

    config: dict[str, Any]
    tensors: dict[str, np.ndarray]


class AdapterMerger(Protocol):
    """Merges an adapter folder into base weights, one tensor at a time."""

    def merge(self, name: str, weight: Any) -> Any:
        """The merged weight, or ``weight`` itself if the adapter has nothing for it.

        ``name`` is the tensor's Hugging Face name. ``weight`` is a float32 paddle Tensor on the device of the merge,
        [out, in] if it belongs to a Linear; so is the result.
        """
        ...

    def unused(self) -> list[str]:
        """Names of adapter tensors that no base weight has used; if there are any, the merge is refused."""
        ...
