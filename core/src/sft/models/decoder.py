"""A decoder-only transformer, of every family that an :class:`Architecture` can describe. Read from top to bottom.

Parameters have Hugging Face's names, Linear weights Paddle's layout [in, out]. B rows, S tokens a row, H query heads,
K key/value heads, D head size. What a forward pass needs beside tokens, it finds in a :class:`Reading`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import paddle
from paddle import nn
from paddle.nn import functional as F

from sft.distributed.meeting import Exchange, Meeting, Vocabulary
from sft.models.architecture import Architecture, Block, Experts
from sft.models.attention import DefaultAttention
from sft.models.experts import through_experts
from sft.models.families.family import Reading
from sft.models.kernels import PLAIN, Linear
from sft.models.norms import rms_norm
from sft.models.recompute import recomputed
from sft.precision import product_dtype


class CausalLM(nn.Layer):
    """The decoder with its head: tokens → logits. It is what a :class:`sft.LanguageModel` must be."""

    kernels = PLAIN

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.architecture = architecture
        self.attention: Any = DefaultAttention()
        """The backend of training and evaluation; see :class:`sft.AttentionBackend`."""
        self.recompute = False
        """Whether each block is computed again in backward instead of keeping what is in it."""
        self.model = Decoder(architecture)
        self.lm_head = Head(architecture, self.model.embed_tokens.weight if architecture.tied else None)

    def get_input_embeddings(self) -> Any:
        """The embedding, under the name that it has in transformers and PaddleNLP."""
        return self.model.embed_tokens

    def embed(self, tokens: Any) -> Any:
        """int64 [B, S] → what goes into the first block, [B, S, hidden]."""
        return self.model.embed(tokens)

    def hidden_states(self, embedded: Any, reading: Reading) -> Any:
        """[B, S, hidden], through all blocks and the last norm."""
        return self.model(embedded, reading, self.recompute and paddle.is_grad_enabled())

    def forward(self, tokens: Any, reading: Reading) -> Any:
        """int64 [B, S] → logits float [B, S, V]."""
        return self.lm_head(self.hidden_states(self.embed(tokens), reading))


class Decoder(nn.Layer):
    """Embedding, blocks, and the last norm."""

    meeting = Meeting()

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.embed_tokens = Embedding(architecture.vocabulary, architecture.hidden)
        self.layers = nn.LayerList(
            [DecoderBlock(architecture, block, number) for number, block in enumerate(architecture.blocks)]
        )
        self.norm = RMSNorm(architecture.hidden, architecture)
        self.embedding_scale = architecture.embedding_scale

    def embed(self, tokens: Any) -> Any:
        """int64 [B, S] → what goes into the first block, [B, S, hidden]."""
        hidden = self.embed_tokens(tokens)
        return hidden if self.embedding_scale == 1.0 else hidden * self.embedding_scale

    def forward(self, hidden: Any, reading: Reading, recompute: bool) -> Any:
        """[B, S, hidden], through all blocks and the last norm."""
        hidden = self.meeting.begin(hidden)
        for block in self.layers:
            hidden = recomputed(block, hidden, reading) if recompute else block(hidden, reading)
        return self.meeting.end(self.norm(hidden))


class Embedding(nn.Embedding):
    """Tokens → rows of the matrix, in the type of the residual stream, which the matrix may be narrower than."""

    narrows = True

    def __init__(self, vocabulary: int, hidden: int) -> None:
        super().__init__(vocabulary, hidden)
        self.stream = paddle.get_default_dtype()

    def forward(self, tokens: Any) -> Any:
        return super().forward(tokens).astype(self.stream)

    def look_up(self, tokens: Any, matrix: Any) -> Any:
        """Rows of another ``matrix`` [V, r], which processes that share the vocabulary divide as this one:
        int64 [B, S] → [B, S, r]."""
        return F.embedding(tokens, matrix)


class DecoderBlock(nn.Layer):
    """x + attention(x), then x + mlp(x), with norms before, after or around each."""

    meeting = Meeting()

    def __init__(self, architecture: Architecture, block: Block, number: int) -> None:
        super().__init__()
        self.self_attn = Attention(architecture, block, number)
        self.mlp: Any = (
            MLP(architecture, architecture.inner) if block.experts is None else SparseMLP(architecture, block.experts)
        )
        self.residual_scale = architecture.residual_scale
        self._norms = architecture.norms
        for name in vars(architecture.norms).values():
            if name is not None:
                setattr(self, name, RMSNorm(architecture.hidden, architecture))

    def forward(self, hidden: Any, reading: Reading) -> Any:
        norms, meeting = self._norms, self.meeting
        entered = meeting.enter(self._norm(norms.before_attention, hidden))
        attended = self._norm(norms.after_attention, meeting.leave(self.self_attn(entered, reading)))
        hidden = hidden + self._scaled(attended)
        entered = meeting.enter(self._norm(norms.before_mlp, hidden))
        return hidden + self._scaled(self._norm(norms.after_mlp, meeting.leave(self.mlp(entered))))

    def _norm(self, name: str | None, x: Any) -> Any:
        return x if name is None else getattr(self, name)(x)

    def _scaled(self, x: Any) -> Any:
        return x if self.residual_scale == 1.0 else x * self.residual_scale


class Attention(nn.Layer):
    """Projections to queries, keys and values, rotation, attention, projection back."""

    def __init__(self, architecture: Architecture, block: Block, number: int) -> None:
        super().__init__()
        self.number, self.rotary = number, block.rotary
        self.head_size = size = architecture.head_size
        self.heads, self.kv_heads = architecture.heads, architecture.kv_heads
        hidden, bias = architecture.hidden, architecture.attention_bias
        query, key = self.heads * size, self.kv_heads * size
        if architecture.fused_attention:
            self.qkv_proj = linear(hidden, query + 2 * key, bias)
        else:
            self.q_proj = linear(hidden, query, bias)
            self.k_proj = linear(hidden, key, bias)
            self.v_proj = linear(hidden, key, bias)
        self.o_proj = linear(query, hidden, architecture.output_bias)
        self.head_norm = architecture.head_norm
        if self.head_norm is not None:
            self.q_norm = RMSNorm(size if self.head_norm == "head" else query, architecture)
            self.k_norm = RMSNorm(size if self.head_norm == "head" else key, architecture)
        # Backends scale by 1/√D; another scale goes into the query.
        scale = architecture.attention_scale
        self.query_scale = 1.0 if scale is None else scale * math.sqrt(size)

    def forward(self, x: Any, reading: Reading) -> Any:
        """[B, S, hidden] → [B, S, hidden]."""
        query, key, value = self._project(x)
        if self.rotary is not None:
            query, key = reading.turn(query, self.rotary), reading.turn(key, self.rotary)
        if self.query_scale != 1.0:
            query = query * self.query_scale
        out = reading.attend(self.number, query, key, value)
        return self.o_proj(out.reshape([0, 0, self.heads * self.head_size]))

    def _project(self, x: Any) -> tuple[Any, Any, Any]:
        """Normed queries [B, S, H, D], keys and values [B, S, K, D]."""
        sizes = [self.heads * self.head_size, *[self.kv_heads * self.head_size] * 2]
        if hasattr(self, "qkv_proj"):
            query, key, value = paddle.split(self.qkv_proj(x), sizes, axis=-1)
        else:
            query, key, value = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.head_norm == "all":
            query, key = self.q_norm(query), self.k_norm(key)
        query, key, value = (one.reshape([0, 0, -1, self.head_size]) for one in (query, key, value))
        if self.head_norm == "head":
            query, key = self.q_norm(query), self.k_norm(key)
        return query, key, value


class MLP(nn.Layer):
    """down(activation(gate(x)) · up(x))."""

    kernels = PLAIN

    def __init__(self, architecture: Architecture, inner: int) -> None:
        super().__init__()
        hidden, bias = architecture.hidden, architecture.mlp_bias
        if architecture.fused_mlp:
            self.gate_up_proj = linear(hidden, 2 * inner, bias)
        else:
            self.gate_proj = linear(hidden, inner, bias)
            self.up_proj = linear(hidden, inner, bias)
        self.down_proj = linear(inner, hidden, bias)
        self.activation = architecture.activation

    def forward(self, x: Any) -> Any:
        """[..., hidden] → [..., hidden]."""
        if hasattr(self, "gate_up_proj"):
            gate, up = paddle.chunk(self.gate_up_proj(x), 2, axis=-1)
        else:
            gate, up = self.gate_proj(x), self.up_proj(x)
        gated = self.kernels.swiglu if self.activation == "silu" else self.kernels.geglu
        return self.down_proj(gated(gate, up))


class SparseMLP(nn.Layer):
    """Each token goes through the experts that the router finds likeliest, weighted by its probabilities."""

    exchange = Exchange()

    def __init__(self, architecture: Architecture, experts: Experts) -> None:
        super().__init__()
        self.count, self.chosen, self.normalise = experts.count, experts.chosen, experts.normalise
        self.gate = Router(architecture.hidden, experts.count, bias_attr=False)
        self.experts = nn.LayerList([MLP(architecture, experts.inner) for _ in range(experts.count)])
        if experts.shared_inner is not None:
            self.shared_expert = MLP(architecture, experts.shared_inner)
            self.shared_expert_gate = Router(architecture.hidden, 1, bias_attr=False)

    def forward(self, x: Any) -> Any:
        """[B, S, hidden] → [B, S, hidden]."""
        tokens = x.reshape([-1, x.shape[-1]])
        weights, chosen = paddle.topk(F.softmax(self.gate(tokens).astype("float32"), axis=-1), self.chosen, axis=-1)
        if self.normalise:
            weights = weights / weights.sum(axis=-1, keepdim=True)
        out = through_experts(tokens, weights, chosen, list(self.experts), self.count, self.exchange)
        if hasattr(self, "shared_expert"):
            out = out + F.sigmoid(self.shared_expert_gate(tokens)) * self.shared_expert(tokens)
        return out.reshape(x.shape)


class Router(Linear):
    """Says how much each expert counts. Techniques leave it alone unless it is named."""


class RMSNorm(nn.Layer):
    """y = (offset + w) · x / √(mean(x²) + ε) over the last dimension (arXiv 1910.07467)."""

    kernels = PLAIN
    total: Callable[[Any], Any] | None = None
    """Where processes share the last dimension: what sums a tensor over them."""

    def __init__(self, size: int, architecture: Architecture) -> None:
        super().__init__()
        self.weight = self.create_parameter([size], default_initializer=nn.initializer.Constant(1.0))
        self.epsilon, self.offset = architecture.norm_epsilon, architecture.norm_offset
        self.size = size

    def forward(self, x: Any) -> Any:
        if self.total is None:
            out = self.kernels.rms_norm(x, self.weight, self.epsilon, self.offset)
        else:
            out = rms_norm(x, self.weight, self.epsilon, self.offset, self.size, self.total)
        # Under automatic casts each of the products that it goes into would round it for itself, and keep its copy.
        return out.astype(product_dtype(out))


class Head(nn.Layer):
    """Hidden states → logits: W [hidden, V], or the embedding [V, hidden], transposed."""

    kernels = PLAIN
    narrows = True
    vocabulary = Vocabulary()

    def __init__(self, architecture: Architecture, embedding: Any | None) -> None:
        super().__init__()
        self.transpose_y = embedding is not None
        shape = [architecture.hidden, architecture.vocabulary]
        self.weight = self.create_parameter(shape) if embedding is None else embedding
        self.scale, self.cap = architecture.logit_scale, architecture.logit_cap

    def forward(self, hidden: Any) -> Any:
        """[..., hidden] → [..., V]."""
        return self.logits(self.products(hidden))

    def products(self, hidden: Any) -> Any:
        """[..., hidden] → products with the matrix, [..., columns]: as many as are here, where processes share it."""
        return self.kernels.linear(hidden, self.weight, transposed=self.transpose_y)

    def logits(self, products: Any) -> Any:
        """[..., columns] → [..., V]: scaled, capped, and put together."""
        logits = products if self.scale == 1.0 else products * self.scale
        return self.vocabulary.whole(logits if self.cap is None else paddle.tanh(logits / self.cap) * self.cap)


def linear(in_features: int, out_features: int, bias: bool) -> Linear:
    return Linear(in_features, out_features, bias_attr=None if bias else False)
