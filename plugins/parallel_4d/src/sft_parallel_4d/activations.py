"""What one rank keeps of a micro-batch from forward to backward, in bytes: derived operation by operation.

docs/plan.md has the formulas. h hidden, i inner, q = query heads x head size, k = key/value heads x head size.
"""

from __future__ import annotations

from dataclasses import dataclass

from sft import Outline
from sft_parallel_4d.model_size import ROW, Division, Precision, of_block, total

CHUNK = 64 << 20
"""Bytes of a chunk of float32 logits, as the core's loss has it."""
GATED = ("llama", "qwen2")
"""Families whose gate is one operation (swiglu) and keeps one tensor less."""
WITHOUT_TABLES = ("gemma",)
"""Families that compute cosines and sines anew in each layer."""


@dataclass(frozen=True)
class Shape:
    """How a micro-batch and the model are divided on one rank."""

    rows: int
    length: int
    targets: int
    """Positions of the micro-batch that have a label."""
    tensor: int = 1
    sequence: bool = False

    @property
    def tokens(self) -> int:
        return self.rows * self.length

    @property
    def spread(self) -> int:
        """By how much sequence parallelism divides what lies between Linears."""
        return self.tensor if self.sequence else 1


def block_kept(outline: Outline, number: int, shape: Shape, precision: Precision) -> int:
    """Of block ``number``, without recomputation."""
    tensor, heads = shape.tensor, outline.heads
    hidden, inner, query = outline.hidden, outline.inner, outline.heads * outline.head_size
    key = outline.kv_heads * outline.head_size
    # Two RMSNorms keep x / rms and 1 / rms in float32.
    wide = 2 * (hidden + 1) / shape.spread
    # Linears keep their inputs, all of the sequence; q, k and v share one, gate and up the other.
    narrow: float = 2 * hidden
    # Rotation keeps both factors of its four products: q, k, their rotated halves, cos and sin.
    narrow += (2 * query + 2 * key) / tensor + 2 * outline.head_size
    if outline.attention_in_blocks:
        narrow += (2 * query + 2 * key) / tensor  # q, k, v, and the output, which is o_proj's input
        wide += heads / tensor  # and a sum a row
    else:
        narrow += (4 * query + heads * shape.length) / tensor  # q, k and v of all heads, output; probabilities
    narrow += (3 if outline.family.model_type in GATED else 4) * inner / tensor
    block = outline.blocks[number]
    narrow += sum(linear.kept for linear in block)
    once = sum(linear.kept_once / (1 if linear.name.endswith(ROW) else tensor) for linear in block)
    kept = shape.tokens * (4 * wide + precision.products / 8 * narrow) + 4 * once
    if precision.casts:
        kept += precision.products / 8 * total(of_block(outline, block), Division(tensor), precision).values
    return round(kept)


def boundary(outline: Outline, shape: Shape, precision: Precision) -> int:
    """The residual stream between two blocks: what recomputation keeps of a block, and a pipeline sends."""
    return shape.tokens * outline.hidden // shape.spread * precision.weights // 8


def backward_extra(outline: Outline, shape: Shape, precision: Precision) -> int:
    """What a block's backward holds beyond what forward kept: gradients of the widest intermediate results."""
    tensor, query = shape.tensor, outline.heads * outline.head_size
    factors = 3 if outline.family.model_type in GATED else 4
    mlp = 3 * outline.hidden + factors * outline.inner / tensor
    freed = factors * outline.inner / tensor + 2 * outline.hidden
    scores = 0 if outline.attention_in_blocks else 2 * outline.heads * shape.length / tensor
    attention = scores + 3 * query / tensor + 2 * outline.hidden - freed
    return round(shape.tokens * precision.products / 8 * max(mlp, attention))


def at_borders(outline: Outline, shape: Shape, precision: Precision, recompute: bool, first: bool, last: bool) -> int:
    """What a pipeline stage keeps of a micro-batch beside its blocks: what it has received, until its gradient is sent
    back (recomputation keeps that anyway), and what it has sent."""
    ends = (not first and not recompute) + (not last)
    return ends * boundary(outline, shape, precision)


def norm_kept(outline: Outline, shape: Shape) -> int:
    """The last norm's x / rms and 1 / rms."""
    return shape.tokens // shape.spread * (outline.hidden + 1) * 4


def last_kept(outline: Outline, shape: Shape, precision: Precision) -> int:
    """Of the last norm and the loss, until backward: the loss keeps its gradients instead of logits."""
    narrow = precision.products // 8
    kept = norm_kept(outline, shape) + shape.targets * outline.hidden * narrow
    return kept + _head_gradient(outline, shape, precision)


def logits(outline: Outline, shape: Shape, precision: Precision) -> int:
    """The most that the chunked loss holds at a time while it runs: logits of a chunk, in four or five float32
    stages, the hidden states, and between chunks two gradients of lm_head."""
    width = outline.vocabulary // shape.tensor
    rows = max(1, min(shape.targets, CHUNK // (4 * width)))
    chunk, narrow = 4 * rows * width, precision.products // 8
    states = (shape.tokens + shape.targets) * outline.hidden * narrow
    if rows == shape.targets:
        return states + max(4 * chunk, 3 * chunk + last_kept(outline, shape, precision))
    # What is left of the chunk before is still there while the next one is made.
    second, chunks = 4 * min(rows, shape.targets - rows) * width, -(-shape.targets // rows)
    heads = min(2, chunks - 1) * _head_gradient(outline, shape, precision)
    return states + max(4 * chunk, 3 * chunk + 2 * second + heads)


def _head_gradient(outline: Outline, shape: Shape, precision: Precision) -> int:
    weight = outline.embedding if outline.head is None else outline.head
    return weight.size // shape.tensor * precision.weights // 8 if weight.trains else 0


def tables(outline: Outline) -> int:
    """The float32 tables of cosines and sines."""
    return 0 if outline.family.model_type in WITHOUT_TABLES else 8 * outline.positions * outline.head_size
