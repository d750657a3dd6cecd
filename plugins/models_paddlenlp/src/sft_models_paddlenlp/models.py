"""PaddleNLP's backbones as :class:`sft.LanguageModel`: block by block, with attention asked of the reading.

Each attention layer of PaddleNLP hands its queries, keys and values to a function of its own. On the instance, that
function is replaced by one that asks the :class:`sft.Reading` of this pass; tables of the rotary embedding are made as
long as its positions, of which a pass of one token has a high one. Where experts are, PaddleNLP says which of them a
token goes to, and :class:`_Experts` sends it there. Everything else is PaddleNLP's.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import paddle
from paddle import nn
from paddle.nn import functional as F

import sft
from sft_models_paddlenlp.readers import PaddleNLPShape


class _Model(nn.Layer, ABC):
    """What the three have in common. ``backbone`` is the attribute that has Hugging Face's name for it."""

    backbone: ClassVar[str]
    kernels: Any = sft.PLAIN

    def __init__(self, shape: PaddleNLPShape) -> None:
        super().__init__()
        self.architecture = shape
        self.attention: Any = sft.DefaultAttention()
        self.recompute = False
        self._reading: Any = None
        self.longest = 0
        """How long tables must be for the positions of this pass."""
        self.tables: _Tables | None = None
        with _quietly():
            setattr(self, self.backbone, self.make(dict(shape.settings)))
        for layer in self.sublayers():  # by the run's kernels, held in its precision, as those of the decoder
            if isinstance(layer, nn.Linear):  # DeepSeek-V2's are of a subclass, which tells fp8 apart when it is made
                layer.__class__ = sft.Linear
            elif isinstance(layer, nn.Embedding):
                layer.__class__, layer.stream = _Embedding, paddle.get_default_dtype()
        for number, block in enumerate(self.blocks):
            self.open(block, number)

    @abstractmethod
    def make(self, settings: dict[str, Any]) -> Any:
        """PaddleNLP's backbone of a config."""

    @property
    @abstractmethod
    def blocks(self) -> Any:
        """PaddleNLP's blocks, in order."""

    @abstractmethod
    def open(self, block: Any, number: int) -> None:
        """Let the attention of ``block`` ask this pass's reading."""

    @abstractmethod
    def through(self, block: Any, hidden: Any) -> Any:
        """``hidden`` through one block of PaddleNLP's."""

    @abstractmethod
    def leave(self, hidden: Any) -> Any:
        """The last norm."""

    def enter(self, embedded: Any) -> Any:
        """What goes into the first block, as PaddleNLP's blocks want it."""
        return embedded

    def embed(self, tokens: Any) -> Any:
        """int64 [B, S] → [B, S, hidden]."""
        return self.get_input_embeddings()(tokens)

    def get_input_embeddings(self) -> Any:
        """The embedding."""
        return getattr(self, self.backbone).get_input_embeddings()

    def hidden_states(self, embedded: Any, reading: Any) -> Any:
        """[B, S, hidden] → [B, S, hidden], through all blocks and the last norm."""
        hidden = self.enter(embedded)
        for block in self.blocks:
            if self.recompute and self.training:
                hidden = sft.recomputed(self._read, hidden, block, reading)
            else:
                hidden = self._read(hidden, block, reading)
        return self.leave(hidden)

    def _read(self, hidden: Any, block: Any, reading: Any) -> Any:
        self._reading, self.longest = reading, reading.longest
        try:
            return self.through(block, hidden)
        finally:
            self._reading = None

    def attend(self, number: int, query: Any, key: Any, value: Any) -> Any:
        """Attention of block ``number`` as the reading of this pass computes it."""
        return self._reading.attend(number, query, key, value)

    @property
    def positions(self) -> Any:
        """int64 [B, S]."""
        return self._reading.positions


@dataclass(eq=False)
class _Asks:
    """Stands for the function that attention ``number`` of PaddleNLP's calls. An object, not a closure: a copy of the
    model then asks that copy."""

    model: _Model
    number: int


@dataclass(eq=False)
class _Tables:
    """Stands for the rotary embedding ``own`` of PaddleNLP's: cosines and sines for as many positions as this pass
    has."""

    model: _Model
    own: Any

    def __call__(self, x: Any, *_: Any, **__: Any) -> Any:
        with paddle.amp.auto_cast(enable=False):  # in 16 bits, which DeepSeek-V2's einsum would get, angles are none
            return self.own(x, self.model.longest)


class Qwen(_Model):
    """Qwen 1: multi-head attention with rotary embedding, RMSNorm, and SwiGLU over two matrices."""

    backbone = "transformer"

    def __init__(self, shape: PaddleNLPShape) -> None:
        super().__init__(shape)
        self.lm_head = _Head(shape)

    def make(self, settings: dict[str, Any]) -> Any:
        from paddlenlp.transformers.qwen.configuration import QWenConfig
        from paddlenlp.transformers.qwen.modeling import QWenModel

        return QWenModel(QWenConfig(**settings))

    @property
    def blocks(self) -> Any:
        return self.transformer.h

    def open(self, block: Any, number: int) -> None:
        block.attn._attn = _QwenAttention(self, number)
        _share_tables(self, block.attn)

    def through(self, block: Any, hidden: Any) -> Any:
        return block(hidden, position_ids=self.positions, use_cache=False)

    def leave(self, hidden: Any) -> Any:
        return self.transformer.ln_f(hidden)


class _QwenAttention(_Asks):
    def __call__(self, query: Any, key: Any, value: Any, attention_mask: Any = None) -> tuple[Any, None]:
        return self.model.attend(self.number, query, key, value).flatten(2), None


class ChatGLM(_Model):
    """ChatGLM2 and 3: grouped heads, of which half the dimensions turn in pairs; sequence before batch inside."""

    backbone = "transformer"

    def __init__(self, shape: PaddleNLPShape) -> None:
        super().__init__(shape)
        self.transformer.output_layer = _Head(shape)  # PaddleNLP's turns sequence and batch

    def make(self, settings: dict[str, Any]) -> Any:
        from paddlenlp.transformers.chatglm_v2.configuration import ChatGLMv2Config
        from paddlenlp.transformers.chatglm_v2.modeling import ChatGLMv2Model

        return ChatGLMv2Model(ChatGLMv2Config(**settings))

    @property
    def blocks(self) -> Any:
        return self.transformer.encoder.layers

    @property
    def lm_head(self) -> Any:
        return self.transformer.output_layer

    def get_input_embeddings(self) -> Any:
        return self.transformer.embedding.word_embeddings

    def open(self, block: Any, number: int) -> None:
        block.self_attention._core_attention = _ChatGLMAttention(self, number)

    def enter(self, embedded: Any) -> Any:
        return embedded.transpose([1, 0, 2])

    def through(self, block: Any, hidden: Any) -> Any:
        with paddle.amp.auto_cast(enable=False):
            tables = self.transformer.rotary_pos_emb(self.longest)  # [positions, dimensions / 2, 2]
        return block(hidden, None, tables[self.positions.transpose([1, 0])], use_cache=False)[0]

    def leave(self, hidden: Any) -> Any:
        encoder = self.transformer.encoder
        return (encoder.final_layernorm(hidden) if encoder.post_layer_norm else hidden).transpose([1, 0, 2])


class _ChatGLMAttention(_Asks):
    def __call__(self, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> Any:
        tensors = (one.transpose([1, 0, 2, 3]) for one in (query, key, value))
        return self.model.attend(self.number, *tensors).flatten(2).transpose([1, 0, 2])


class DeepseekV2(_Model):
    """DeepSeek-V2: queries, keys and values from small latent vectors, and experts beside shared ones."""

    backbone = "model"

    def __init__(self, shape: PaddleNLPShape) -> None:
        super().__init__(shape)
        self.lm_head = _Head(shape)

    def make(self, settings: dict[str, Any]) -> Any:
        from paddlenlp.transformers.deepseek_v2.configuration import DeepseekV2Config
        from paddlenlp.transformers.deepseek_v2.modeling import DeepseekV2Model

        return DeepseekV2Model(DeepseekV2Config(**settings))

    @property
    def blocks(self) -> Any:
        return self.model.layers

    def open(self, block: Any, number: int) -> None:
        attention = block.self_attn
        scale = attention.softmax_scale * math.sqrt(attention.q_head_dim)
        attention.attn_func = _LatentAttention(self, number, attention.v_head_dim, scale)
        _share_tables(self, attention)
        if hasattr(block.mlp, "experts"):
            block.mlp.forward = _Experts(block.mlp)

    def through(self, block: Any, hidden: Any) -> Any:
        return block(hidden, position_ids=self.positions, use_cache=False)

    def leave(self, hidden: Any) -> Any:
        return self.model.norm(hidden)


@dataclass(eq=False)
class _LatentAttention(_Asks):
    """Values are narrower than keys, and scores have a scale of their own: backends want neither."""

    width: int
    scale: float

    def __call__(self, query: Any, config: Any, key: Any, value: Any, *_: Any, **__: Any) -> Any:
        missing = key.shape[3] - self.width
        if missing > 0:
            value = paddle.concat([value, paddle.zeros([*value.shape[:3], missing], value.dtype)], axis=-1)
        return self.model.attend(self.number, query * self.scale, key, value)[..., : self.width].flatten(2)


class _Experts:
    """Sends each token to the experts that PaddleNLP's gate chooses for it, and adds what the shared ones give.

    PaddleNLP does it by products with a one-hot matrix [tokens, experts, tokens of an expert], whose making also fails
    with paddle 3.3 (an int64 sum times an int32 mask).
    """

    def __init__(self, layer: Any) -> None:
        self.layer = layer

    def __call__(self, x: Any) -> Any:
        tokens, gate = x.reshape([-1, x.shape[-1]]), self.layer.gate
        weights, chosen = self._choose(gate, gate.gate_score_func(logits=F.linear(tokens, gate.weight)))
        out = sft.through_experts(tokens, weights, chosen, self.layer.experts)
        shared = getattr(self.layer, "shared_experts", None)
        return (out if shared is None else out + shared(tokens)).reshape(x.shape)

    def _choose(self, gate: Any, scores: Any) -> tuple[Any, Any]:
        """Weights, float32, and numbers of the chosen experts, [tokens, chosen], of ``scores`` [tokens, experts]."""
        scores = scores.astype("float32")
        if gate.topk_method == "greedy":
            weights, chosen = gate._topk_greedy(scores, k=gate.top_k)
        else:
            weights, chosen = gate._topk_group_limited_greedy(
                scores, k=gate.top_k, n_group=gate.n_group, topk_group=gate.topk_group
            )
        if gate.top_k > 1 and gate.norm_topk_prob:
            weights = weights / (weights.sum(axis=-1, keepdim=True) + 1e-20)
        return weights * gate.routed_scaling_factor, chosen


def _share_tables(model: _Model, attention: Any) -> None:
    """PaddleNLP gives every attention layer the same tables: one is enough."""
    if model.tables is None:
        model.tables = _Tables(model, attention.rotary_emb)
    del attention.rotary_emb
    attention.rotary_emb = model.tables


class _Embedding(nn.Embedding):
    """Its rows in the type ``stream`` of what goes through the blocks, which the matrix may be narrower than."""

    narrows = True
    stream: Any

    def forward(self, tokens: Any) -> Any:
        return super().forward(tokens).astype(self.stream)


class _Head(nn.Layer):
    """Hidden states → logits: a matrix [hidden, V]."""

    kernels: Any = sft.PLAIN
    narrows = True

    def __init__(self, shape: PaddleNLPShape) -> None:
        super().__init__()
        self.weight = self.create_parameter([shape.hidden, shape.vocabulary])

    def forward(self, hidden: Any) -> Any:
        return self.kernels.linear(hidden, self.weight)


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """PaddleNLP logs each class that it builds, warns of what its authors use, and gives weights values that are then
    read from files."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from paddlenlp.transformers.model_utils import no_init_weights
        from paddlenlp.utils.log import logger

        level = logger.logLevel
        logger.set_level("ERROR")
        try:
            with no_init_weights():
                yield
        finally:
            logger.set_level(level)
    warnings.filterwarnings("ignore", module=r"paddlenlp\.")  # and while it computes
