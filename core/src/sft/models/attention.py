"""Attention's seam: each attention layer of a PaddleNLP model computes with the run's backend.

What is replaced is replaced on the instance, so two models in one process do not share anything: ``attn_func`` where
PaddleNLP binds one to each layer, the layer's ``forward`` where it does not (Mistral, Gemma). Training and evaluation
always pass ``startend_row_indices`` through the model's own arguments, which is also what keeps PaddleNLP from
building a dense mask, and what recomputation passes again; generation passes a key/value cache and a 2-D mask
instead, and goes to PaddleNLP's own code.
"""

from __future__ import annotations

import copy
import types
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from sft.errors import UsageError
from sft.models.families import FAMILIES

if TYPE_CHECKING:
    from sft.seams import Batch


class DefaultAttention:
    """paddle's ``scaled_dot_product_attention``; rows of several documents get a dense mask, of O(S²) memory."""

    packed = True
    describes_padding = False

    def attend(self, query: Any, key: Any, value: Any, startend_row_indices: Any | None) -> Any:
        from paddle.nn.functional import scaled_dot_product_attention

        if startend_row_indices is None:
            return scaled_dot_product_attention(query, key, value, is_causal=True)
        # With both a mask and is_causal paddle ignores the mask, so causality goes into it.
        return scaled_dot_product_attention(query, key, value, attn_mask=dense_mask(startend_row_indices))


def dense_mask(startend_row_indices: Any) -> Any:
    """int32 [B, 1, S, 1], causal → float32 [B, 1, S, S]: 0 where query i sees key j, else a large negative number."""
    import paddle

    length = startend_row_indices.shape[2]
    query = paddle.arange(length, dtype="int32").reshape([1, 1, length, 1])
    key = paddle.arange(length, dtype="int32").reshape([1, 1, 1, length])
    end = startend_row_indices.transpose([0, 1, 3, 2])
    seen = (query >= key) & (query < end)
    return paddle.where(seen, paddle.zeros([1]), paddle.full([1], -1e30))


def install(model: Any, backend: Any) -> None:
    """Make every attention layer of ``model`` compute with ``backend`` in training and evaluation."""
    found = False
    for layer in model.sublayers():
        if hasattr(layer, "attn_func"):
            layer.attn_func = _dispatch(backend, layer.attn_func, layer.config)
            # Keys and values come unrepeated: PaddleNLP repeats them for grouped heads unless this is set.
            layer.config = copy.copy(layer.config)
            layer.config.use_flash_attention = True
        elif type(layer).__name__ in _FORWARDS:
            layer.sft_backend = backend
            layer.forward = types.MethodType(_FORWARDS[type(layer).__name__], layer)
        else:
            continue
        found = True
    if not found:
        raise UsageError(f"{type(model).__name__} has no attention seam that sft knows, so it cannot be trained here.")
    if FAMILIES[model.config.model_type].mask_argument == "attention_mask":
        backbone = getattr(model, model.base_model_prefix)
        backbone._prepare_decoder_attention_mask = partial(_prepare_mask, backbone._prepare_decoder_attention_mask)
    model.sft_attention_backend = backend


def _dispatch(backend: Any, own: Any, own_config: Any) -> Any:
    def attn_func(
        query: Any,
        config: Any,
        key: Any,
        value: Any,
        attention_mask: Any,
        output_attentions: bool,
        **rest: Any,
    ) -> Any:
        indices = rest.get("attn_mask_startend_row_indices")
        if indices is None:
            groups = query.shape[2] // key.shape[2]
            if groups > 1:
                key, value = (tensor.repeat_interleave(groups, axis=2) for tensor in (key, value))
            return own(query, own_config, key, value, attention_mask, output_attentions, **rest)
        causal = indices.shape[2] == 1
        out = backend.attend(query, key, value, None if causal else indices)
        return out.reshape([0, 0, out.shape[2] * out.shape[3]])

    return attn_func


def _are_indices(mask: Any) -> bool:
    return mask is not None and mask.ndim == 4 and mask.shape[3] == 1 and str(mask.dtype) == "paddle.int32"


def _prepare_mask(own: Callable[..., Any], attention_mask: Any, *rest: Any) -> Any:
    """Indices reach the layers as they are; of any other mask PaddleNLP's ``own`` makes a dense one."""
    return attention_mask if _are_indices(attention_mask) else own(attention_mask, *rest)


def _attend(layer: Any, hidden: Any, position_ids: Any, indices: Any) -> Any:
    """Projections, rotary embedding, the backend, projection: [B, S, hidden] → [B, S, hidden]."""
    from paddlenlp.transformers.gemma.modeling import apply_rotary_pos_emb

    size = layer.head_dim
    query = layer.q_proj(hidden).reshape([0, 0, layer.num_heads, size])
    key, value = (
        proj(hidden).reshape([0, 0, layer.num_key_value_heads, size]) for proj in (layer.k_proj, layer.v_proj)
    )
    tables = (table.reshape([1, -1, 1, size]) for table in layer.rotary_emb(value, seq_len=hidden.shape[1]))
    query, key = apply_rotary_pos_emb(query, key, *tables, position_ids)
    causal = indices.shape[2] == 1
    out = layer.sft_backend.attend(query, key, value, None if causal else indices)
    return layer.o_proj(out.reshape([0, 0, layer.num_heads * size]))


def _mistral_forward(
    self: Any,
    hidden_states: Any,
    attention_mask: Any = None,
    position_ids: Any = None,
    past_key_value: Any = None,
    output_attentions: bool = False,
    use_cache: bool = False,
) -> Any:
    if _are_indices(attention_mask):
        return _attend(self, hidden_states, position_ids, attention_mask), None, None
    own = type(self).forward
    return own(self, hidden_states, attention_mask, position_ids, past_key_value, output_attentions, use_cache)


def _gemma_forward(
    self: Any,
    hidden_states: Any,
    position_ids: Any = None,
    past_key_value: Any = None,
    attention_mask: Any = None,
    output_attentions: bool = False,
    use_cache: bool = False,
    alibi: Any = None,
) -> Any:
    if _are_indices(attention_mask):
        return _attend(self, hidden_states, position_ids, attention_mask)
    own = type(self).forward
    return own(self, hidden_states, position_ids, past_key_value, attention_mask, output_attentions, use_cache, alibi)


_FORWARDS: dict[str, Callable[..., Any]] = {"MistralAttention": _mistral_forward, "GemmaAttention": _gemma_forward}


def hidden_states(model: Any, batch: Batch, embedded: Any | None = None) -> Any:
    """The backbone's last hidden states [B, S, hidden] for a batch, through the installed backend.

    ``embedded`` [B, S, hidden] goes into the first block instead of the embedding of the batch's tokens.
    """
    import paddle

    backend = model.sft_attention_backend
    if batch.packed and not getattr(backend, "packed", False):
        raise UsageError(
            f"A row holds several records, and attention backend {type(backend).__name__} would let them see each "
            "other; leave the backend or the packing out."
        )
    if batch.packed or getattr(backend, "describes_padding", False):
        indices = paddle.to_tensor(batch.startend_row_indices)
    else:
        # Causal attention says it all. An array of length 1 stands for that.
        indices = paddle.full([batch.input_ids.shape[0], 1, 1, 1], batch.input_ids.shape[1], "int32")
    backbone = getattr(model, model.base_model_prefix)
    begin = {"input_ids": paddle.to_tensor(batch.input_ids)} if embedded is None else {"inputs_embeds": embedded}
    outputs = backbone(
        **begin,
        position_ids=paddle.to_tensor(batch.position_ids),
        use_cache=False,
        return_dict=False,
        **{FAMILIES[model.config.model_type].mask_argument: indices},
    )
    return outputs[0] if isinstance(outputs, tuple) else outputs
