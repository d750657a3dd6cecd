"""What one rank keeps of a micro-batch from forward to backward, in bytes: derived operation by operation.

docs/plan.md has the formulas. h hidden, i inner, q = query heads x head size, k = key/value heads x head size.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

from sft import Architecture, Block
from sft_parallel_4d.model_size import KEYS, ROW, Division, Precision, key_copies, of_block, total
from sft_parallel_4d.outline import LinearOutline, Outline

ROWS, SHARED = 128, 4 * 128 * 128
"""Query rows in a block of attention, and scores of a head that a block may have, as the core has them."""
CHUNK, GPU_LEAST, GPU_CHUNK, GPU_SHARE = 24 << 20, 64 << 20, 1 << 30, 64
"""Bytes of a chunk of float32 logits, on a GPU at most, and what part of its memory otherwise, as the core's loss has
it."""


@dataclass(frozen=True)
class Shape:
    """How a micro-batch and the model are divided on one rank."""

    rows: int
    length: int
    targets: int
    """Positions of the micro-batch that have a label."""
    tensor: int = 1
    sequence: bool = False
    context: int = 1
    """Ranks that share the tokens of each row: ``length`` is that of whole rows, ``targets`` are those of a share."""

    @property
    def tokens(self) -> int:
        """Those that are here."""
        return self.rows * self.length // self.context

    @property
    def sharing_heads(self) -> int:
        """Ranks that divide the heads while attention sees whole rows."""
        return self.tensor * self.context

    @property
    def spread(self) -> int:
        """By how much sequence parallelism divides what lies between Linears."""
        return self.tensor if self.sequence else 1


def block_kept(outline: Outline, number: int, shape: Shape, precision: Precision) -> int:
    """Of block ``number``, without recomputation."""
    model, tensor = outline.architecture, shape.tensor
    hidden, query, key = model.hidden, model.heads * model.head_size / tensor, _keys(model, tensor) * model.head_size
    # RMSNorms keep x / rms and 1 / rms in float32.
    behind = outline.norms - (model.norms.before_attention is not None)
    wide = _attention_norms_kept(outline, shape) + behind * (hidden + 1) / shape.spread
    # Linears keep their inputs, all of the sequence; q, k and v share one, gate and up the other. Rotation keeps none.
    narrow: float = 2 * hidden
    # Attention's q, k, v, and the output, which is o_proj's input.
    narrow += 2 * query + 2 * key * copies(model, shape)
    if shape.context > 1:  # o_proj's input has come back from other ranks, and is another tensor
        narrow += query
    if precision.products == 16:
        wide += model.heads / tensor  # a sum a row, of GPUs' kernels; in float32 it is computed again
    narrow += _mlp_kept(model, model.blocks[number], tensor)
    wide += _routing_kept(model.blocks[number])
    linears = outline.blocks[number]
    narrow += sum(_beside(linear, model, model.blocks[number], tensor) for linear in linears)
    once = sum(linear.kept_once / (1 if linear.name.endswith(ROW) else tensor) for linear in linears)
    kept = shape.tokens * (4 * wide + precision.products / 8 * narrow) + 4 * once
    cast = tuple(pair for pair in of_block(outline, number) if precision.casts(pair[0]))
    kept += precision.products / 8 * total(cast, Division(tensor, 1, key_copies(outline, tensor)), precision).values
    return round(kept)


def _attention_norms_kept(outline: Outline, shape: Shape) -> float:
    """Of a token, in float32: by the norm before attention, and those of queries and keys: of each head, or of all
    heads together."""
    model, tensor = outline.architecture, shape.tensor
    heads, keys = model.heads / tensor, _keys(model, tensor)
    kept = (model.hidden + 1) / shape.spread if model.norms.before_attention is not None else 0.0
    if model.head_norm == "head":
        kept += (heads + keys) * (model.head_size + 1)
    elif model.head_norm == "all":
        kept += (heads + keys) * model.head_size + 2
    return kept


def _beside(linear: LinearOutline, model: Architecture, block: Block, tensor: int) -> float:
    """Of a token, what techniques keep beside a Linear of the ``block``; experts get all tokens alike."""
    kept = linear.kept + linear.kept_outputs / _ways(linear, model, tensor)
    if block.experts is None or ".experts." not in linear.name:
        return kept
    return kept * block.experts.chosen / block.experts.count


def _ways(linear: LinearOutline, model: Architecture, tensor: int) -> float:
    """By how many ranks its outputs are divided."""
    if linear.name.endswith(ROW):
        return 1
    return min(tensor, model.kv_heads) if linear.name.endswith(KEYS) else tensor


def _is_behind(linear: LinearOutline) -> bool:
    """Whether forward comes to it after attention."""
    return ".self_attn." not in linear.name or linear.name.endswith(ROW)


def _keys(model: Architecture, tensor: int) -> float:
    """Key/value heads on a rank."""
    return max(1, model.kv_heads / tensor)


def _factors(model: Architecture) -> int:
    """Of the intermediate size, what an MLP keeps: gate, up and their product; tanh-GELU's result too."""
    return 3 if model.activation == "silu" else 4


def _mlp_kept(model: Architecture, block: Block, tensor: int) -> float:
    """Of a token, beside the MLP's input."""
    if block.experts is None:
        return _factors(model) * model.inner / tensor
    experts = block.experts
    # Of each chosen expert its input, what its MLP keeps, and its result, which its weight is multiplied with.
    kept = experts.chosen * (2 * model.hidden + _factors(model) * experts.inner / tensor)
    if experts.shared_inner is not None:
        kept += _factors(model) * experts.shared_inner / tensor + model.hidden
    return kept


def _routing_kept(block: Block) -> int:
    """Of a token, what leads it to its experts and back, in values of 4 bytes: probabilities of all; of each chosen
    one its number, its places in the order of experts and back (64 bits each), and its weight."""
    if block.experts is None:
        return 0
    experts = block.experts
    weights = 2 * experts.chosen + 1 if experts.normalise else experts.chosen
    return experts.count + 6 * experts.chosen + weights + (experts.shared_inner is not None)


def reading_kept(outline: Outline, shape: Shape) -> int:
    """Of a micro-batch for all blocks: float32 cosines and sines of each token, for each kind of rotary embedding; for
    each kind of window what attention adds to hidden scores, and which rows it gathers (int32, there and back)."""
    model, length = outline.architecture, shape.length
    turning = sum(8 * shape.tokens * rotary.size for rotary in model.rotaries)
    windows = {block.window for block in model.blocks if block.window is None or block.window < length}
    rows = min(ROWS, length)
    heads = model.heads / shape.tensor + _keys(model, shape.tensor) * copies(model, shape)
    gathered = round(8 * shape.tokens * heads)
    return turning + len(windows) * (gathered + 4 * rows * (length - 1 + rows))


def copies(model: Architecture, shape: Shape) -> int:
    """How often a key head is there while attention sees whole rows: several ranks may look at one."""
    here = max(1, model.kv_heads // shape.tensor)
    return math.lcm(here, shape.context) // here


def swapped(model: Architecture, shape: Shape) -> float:
    """Values of a token that ranks swap that share rows: queries, keys and values there, and results back."""
    keys = _keys(model, shape.tensor) * copies(model, shape)
    return model.head_size * 2 * (model.heads / shape.tensor + keys)


def boundary(outline: Outline, shape: Shape, precision: Precision) -> int:
    """The residual stream between two blocks: what recomputation keeps of a block, and a pipeline sends."""
    return shape.tokens * outline.hidden // shape.spread * precision.weights // 8


def attending(outline: Outline, shape: Shape, precision: Precision) -> int:
    """What a block holds while its attention goes forward, which may be more than what is left of it when it is done:
    its input, queries, keys and values, the scaled queries; and results, three times when they are put into order, or
    once beside a bucket's keys and values, its scores, which are there twice while their mask is added, and that."""
    model, tensor = outline.architecture, shape.tensor
    query, key = model.heads * model.head_size / tensor, _keys(model, tensor) * model.head_size
    documents, rows, scores = _bucket(model, shape)
    width = 4 * _attention_norms_kept(outline, shape) + precision.products / 8 * (model.hidden + query + 2 * key)
    ordered = 4 * shape.tokens * 3 * query
    gathered = documents * (shape.length * 2 * key * copies(model, shape) + rows * query) / shape.context
    blocks = 4 * (shape.tokens * 2 * query + gathered + 2 * scores + rows * shape.length)
    return round(shape.tokens * width + max(ordered, blocks))


def _bucket(model: Architecture, shape: Shape) -> tuple[int, int, float]:
    """How many rows go through attention together, in blocks of how many queries each; scores of the largest block."""
    rows = min(ROWS, shape.length)
    documents = min(shape.rows, max(1, SHARED // (rows * shape.length)))
    return documents, rows, documents * model.heads / shape.sharing_heads * rows * shape.length


def backward_extra(
    outline: Outline, shape: Shape, precision: Precision, numbers: Collection[int]
) -> tuple[int, int, int]:
    """What a block's backward holds beyond what forward kept, with the gradient of the residual stream: in its MLP, the
    most, and beside the gradient of a weight; and in attention. Of blocks of such ``numbers``."""
    model = outline.architecture
    narrow = shape.tokens * precision.products / 8
    extra = [_mlp_extra(model, model.blocks[number], shape.tensor) for number in numbers]
    attention = _attention_extra(outline, shape, precision, numbers)
    return round(narrow * max(extra)[0]), round(narrow * max(beside for _, beside in extra)), round(attention)


def _mlp_extra(model: Architecture, block: Block, tensor: int) -> tuple[float, float]:
    """Of a token: gradients of gate and up, and while down_proj goes back those of its input and output. Of chosen
    experts gradients of all outputs are there, once more while they are put into order; experts come one by one."""
    hidden, experts = model.hidden, block.experts
    if experts is None:
        return hidden + 2 * model.inner / tensor, 2 * hidden + model.inner / tensor
    shared, own = (experts.shared_inner or 0) / tensor, experts.inner / tensor * experts.chosen / experts.count
    ordered = (2 + experts.chosen) * hidden
    most = max(ordered, (1 + experts.chosen) * hidden + 2 * own, 2 * hidden + 2 * shared)
    return most, max((1 + experts.chosen) * hidden + own, 2 * hidden + shared)


def _attention_extra(outline: Outline, shape: Shape, precision: Precision, numbers: Collection[int]) -> float:
    """When attention goes back, the MLP has freed what it kept, and so have the norms behind attention and techniques
    on all Linears behind it; the gradients of its output and of the residual stream are there."""
    model, tensor = outline.architecture, shape.tensor
    query = model.heads * model.head_size / tensor
    key = _keys(model, tensor) * model.head_size * copies(model, shape)
    behind = outline.norms - (model.norms.before_attention is not None)
    freed = min(_mlp_kept(model, model.blocks[number], tensor) for number in numbers)
    freed += model.hidden + behind * (model.hidden + 1) / shape.spread
    freed += min(
        sum(_beside(one, model, model.blocks[number], tensor) for one in outline.blocks[number] if _is_behind(one))
        for number in numbers
    )
    narrow = shape.tokens * precision.products / 8 * (query + model.hidden - freed)
    wide = 2 * query + model.heads / tensor  # scaled queries, the output's gradient once more, and sums of rows
    if precision.products == 16:  # float32 copies of keys, values and the output
        wide += query + 2 * key
    documents, rows, scores = _bucket(model, shape)
    length, blocks = shape.length, math.ceil(shape.length / rows)
    # Of the last bucket keys and values, and the gradients of these that its last block gives; queries' gradients of
    # the blocks before, and of the last one queries, output, its gradient twice, and what that gives.
    there = length * (4 * key + query) + 4 * rows * query
    if blocks > 1:  # what blocks have added up, what the one before the last has given, and as it was added
        there += 2 * key * (length * min(2, blocks - 1) + length - rows)
    before = (shape.rows - documents) * length * (query + 2 * key)  # results of other buckets
    stages = 2 if model.attention_cap is None else 3
    wide = shape.tokens * wide + (documents * there + before) / shape.context + stages * scores + rows * length
    return narrow + 4 * wide


def embedding_kept(outline: Outline, shape: Shape, precision: Precision) -> int:
    """Of the embedding, where tensor ranks have some of its rows each: those of others' tokens are zeros."""
    if shape.tensor == 1 or not outline.embedding.trains:
        return 0
    return shape.tokens * (outline.hidden + 1) * precision.weights // 8


def norm_kept(outline: Outline, shape: Shape) -> int:
    """The last norm's x / rms and 1 / rms."""
    return shape.tokens // shape.spread * (outline.hidden + 1) * 4


def last_kept(outline: Outline, shape: Shape, precision: Precision) -> int:
    """Of the last norm and the loss, until backward: the loss keeps its gradients instead of logits."""
    narrow = precision.products // 8
    kept = norm_kept(outline, shape) + shape.targets * outline.hidden * narrow
    return kept + head_gradient(outline, shape, precision.weights)


def chunk_bytes(device_memory: int | None) -> int:
    """Of float32 logits, on a GPU of so much memory, or on a CPU."""
    return CHUNK if device_memory is None else max(GPU_LEAST, min(GPU_CHUNK, device_memory // GPU_SHARE))


def logits(outline: Outline, shape: Shape, precision: Precision, most: int = CHUNK) -> int:
    """The most that the chunked loss holds at a time while it runs: logits of a chunk of ``most`` bytes, in four
    float32 stages, the hidden states, and in later chunks gradients of lm_head."""
    width = math.ceil(outline.vocabulary / shape.tensor)
    rows = max(1, min(shape.targets, most // (4 * width)))
    chunk, narrow = 4 * rows * width, precision.products // 8
    states = (shape.tokens + shape.targets) * outline.hidden * narrow
    weight = outline.embedding if outline.head is None else outline.head
    if precision.casts(weight):  # as products read it, once for all chunks
        states += outline.hidden * width * narrow
    if outline.architecture.logit_cap is not None:
        states += chunk  # capped logits, which the loss's slope needs
    if rows == shape.targets:
        return states + max(4 * chunk, 3 * chunk + last_kept(outline, shape, precision))
    # Beside those of a later chunk is what lm_head's gradient has come to, and its share of that, in float32.
    later, head = 4 * min(rows, shape.targets - rows) * width, head_gradient(outline, shape, 32)
    return states + max(4 * chunk, 2 * chunk + head, 4 * later + head, 2 * later + 2 * head)


def head_gradient(outline: Outline, shape: Shape, bits: int) -> int:
    """Of lm_head, if it trains, in values of ``bits``."""
    weight = outline.embedding if outline.head is None else outline.head
    return outline.hidden * math.ceil(outline.vocabulary / shape.tensor) * bits // 8 if weight.trains else 0
