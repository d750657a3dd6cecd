"""Attention's seam: each attention layer of a PaddleNLP model computes with the run's backend.

PaddleNLP binds ``attn_func`` to each layer; it is replaced there, on the instance, so two models in one
process do not share anything. Training and evaluation always pass ``startend_row_indices`` (that is also
what keeps PaddleNLP from building a dense mask); generation passes a key/value cache and a 2-D mask instead,
and goes to PaddleNLP's own function.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from sft.errors import UsageError

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
    layers = [layer for layer in model.sublayers() if hasattr(layer, "attn_func")]
    if not layers:
        raise UsageError(f"{type(model).__name__} has no attention seam that sft knows, so it cannot be trained here.")
    for layer in layers:
        layer.attn_func = _dispatch(backend, layer.attn_func, layer.config)
        # Keys and values come unrepeated: PaddleNLP repeats them for grouped heads unless this is set.
        layer.config = copy.copy(layer.config)
        layer.config.use_flash_attention = True
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


def hidden_states(model: Any, batch: Batch) -> Any:
    """The backbone's last hidden states [B, S, hidden] for a batch, through the installed backend."""
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
    outputs = backbone(
        input_ids=paddle.to_tensor(batch.input_ids),
        position_ids=paddle.to_tensor(batch.position_ids),
        attn_mask_startend_row_indices=indices,
        use_cache=False,
        return_dict=False,
    )
    return outputs[0] if isinstance(outputs, tuple) else outputs
