"""Answering prompts with PaddleNLP's ``generate``, shown to the model exactly as training showed them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sft.data.encoding import encode_prompt
from sft.data.tokenizer import Tokenizer
from sft.errors import UsageError
from sft.seams import Turn
from sft.settings import GenerationArguments


def check_room(ids: Sequence[int], generation: GenerationArguments, positions: int) -> None:
    """Refuse a prompt whose answer would not fit into the model's positions."""
    if len(ids) + generation.max_new_tokens > positions:
        raise UsageError(
            f"A prompt of {len(ids)} tokens and an answer of max_new_tokens {generation.max_new_tokens} do not fit "
            f"into the model's {positions} positions; lower max_new_tokens or shorten the prompt."
        )


def answer(model: Any, tokenizer: Tokenizer, turns: Sequence[Turn], generation: GenerationArguments, seed: int) -> str:
    """The model's answer to a conversation that ends with the user's turn, without special tokens."""
    import paddle

    ids = encode_prompt(turns, tokenizer)
    check_room(ids, generation, model.config.max_position_embeddings)
    prompt = paddle.to_tensor([ids], dtype="int64")
    greedy = generation.top_k == 1
    was_training = model.training
    model.eval()
    paddle.seed(seed)
    with paddle.no_grad():
        found, _ = model.generate(
            input_ids=prompt,
            attention_mask=paddle.ones_like(prompt),
            max_new_tokens=generation.max_new_tokens,
            decode_strategy="greedy_search" if greedy else "sampling",
            top_k=generation.top_k,
            top_p=generation.top_p,
            temperature=generation.temperature,
            bos_token_id=tokenizer.bos_id,
            eos_token_id=tokenizer.stop_ids,
            pad_token_id=tokenizer.pad_id,
        )
    if was_training:
        model.train()
    tokens = [int(token) for token in found[0].numpy()]
    for index, token in enumerate(tokens):
        if token in tokenizer.stop_ids:
            tokens = tokens[:index]
            break
    return tokenizer.decode(tokens, skip_special_tokens=True).strip()
