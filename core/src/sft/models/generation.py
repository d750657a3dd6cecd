"""Answering prompts token by token, over a key/value cache, shown exactly as training showed them.

One loop serves runs, ``sft evaluate``, ``sft generate`` and ``sft chat``: prompts of a batch are padded on the
left, which no token sees, so an answer does not depend on the prompts beside it. A draw depends on the seed
and the prompt's own tokens alone.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from sft.arrays import array_of
from sft.data.tokenizer import Tokenizer
from sft.errors import UsageError
from sft.settings.arguments import GenerationArguments

REPLACEMENT = "\ufffd"


def check_room(ids: Sequence[int], generation: GenerationArguments, positions: int) -> None:
    """Refuse a prompt without a token, and one whose answer would not fit into the model's positions."""
    if not ids:
        raise UsageError(
            "A prompt has no token: it is empty, and the chat template adds nothing to it; write something."
        )
    if len(ids) + generation.max_new_tokens > positions:
        raise UsageError(
            f"A prompt of {len(ids)} tokens and an answer of max_new_tokens {generation.max_new_tokens} do not fit "
            f"into the model's {positions} positions; lower max_new_tokens or shorten the prompt."
        )


def answers(
    model: Any,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    generation: GenerationArguments,
    seed: int,
    show: Callable[[str], None] | None = None,
    advanced: Callable[[int, float], None] | None = None,
) -> list[str]:
    """The answers to prompts (ids), computed together as one batch.

    ``show`` is for a single prompt: it gets the answer piece by piece. ``advanced`` is called after each step with the
    number of new tokens, and how many of the answers are done: of one that has not ended, its share of max_new_tokens.
    """
    assert show is None or len(prompts) == 1
    for prompt in prompts:
        check_room(prompt, generation, model.architecture.positions)
        size = model.architecture.vocabulary
        if max(prompt) >= size:
            raise UsageError(
                f"A prompt has the token id {max(prompt)}, and the model's vocabulary has {size} tokens; the "
                "tokenizer, or its chat template, belongs to another model."
            )
    found: list[list[int]] = [[] for _ in prompts]
    text = Text(tokenizer)
    with _evaluating(model):
        steps = _decode(model, tokenizer, prompts, generation, seed)
        for step, tokens in enumerate(steps, start=1):
            for row, token in tokens.items():
                found[row].append(token)
            if show is not None and tokens and (piece := text.grown(found[0])):
                show(piece)
            if advanced is not None:
                advanced(len(tokens), len(prompts) - len(tokens) * (1 - step / generation.max_new_tokens))
    if show is not None and (piece := text.grown(found[0], complete=True)):
        show(piece)
    return [text.of(tokens) for tokens in found]


def unit(prompts: int) -> str:
    """What is counted while so many prompts are answered, as in "40 tokens for 3 prompts"."""
    return f"tokens for {prompts:,} prompt{'s' if prompts != 1 else ''}"


class Text:
    """What of a growing answer can be shown: whole characters that will not change any more."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._shown = ""

    def of(self, tokens: Sequence[int]) -> str:
        """The text of a whole answer."""
        return self._tokenizer.decode(tokens, skip_special_tokens=True).strip()

    def grown(self, tokens: Sequence[int], complete: bool = False) -> str:
        """The text that has come since the last call. Half a character waits for its other half, and white space
        for a word after it, because the answer's last white space is not part of it."""
        text = self.of(tokens)
        if not complete:
            text = text.rstrip(REPLACEMENT).rstrip()
        # A decoder may take bytes of earlier characters for invalid until the last of a new one has come.
        if not text.startswith(self._shown):
            return ""
        piece, self._shown = text[len(self._shown) :], text
        return piece


def distribution(logits: np.ndarray, generation: GenerationArguments) -> np.ndarray:
    """The probabilities float64 [V] that the next token is drawn with: temperature, then top_k, then top_p."""
    scaled = logits.astype(np.float64) / generation.temperature
    if 0 < generation.top_k < len(scaled):
        scaled[scaled < np.partition(scaled, -generation.top_k)[-generation.top_k]] = -np.inf
    probabilities = np.exp(scaled - scaled.max())
    probabilities /= probabilities.sum()
    if generation.top_p < 1:
        order = np.argsort(-probabilities, kind="stable")
        likelier = np.cumsum(probabilities[order]) - probabilities[order]
        probabilities[order[likelier >= generation.top_p]] = 0.0
        probabilities /= probabilities.sum()
    return np.asarray(probabilities)


def _decode(
    model: Any,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    generation: GenerationArguments,
    seed: int,
) -> Iterator[dict[int, int]]:
    """For each step the new token of every row that has not ended; tokens that end an answer are left out."""
    import paddle

    from sft.models.cache import CachedReading

    draws = [np.random.default_rng([seed, zlib.crc32(np.asarray(ids, np.int64).tobytes())]) for ids in prompts]
    width = max(len(prompt) for prompt in prompts)
    ids = np.full((len(prompts), width), tokenizer.pad_id, np.int64)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = prompt
    going = set(range(len(prompts)))
    padding = np.asarray([width - len(prompt) for prompt in prompts])
    reading, everything = CachedReading(model.architecture, padding, model.kernels), ids
    for _ in range(generation.max_new_tokens):
        if reading.is_outgrown:
            reading, ids = CachedReading(model.architecture, padding, model.kernels), everything
        reading.expect(ids.shape[1])
        hidden = model.hidden_states(model.embed(paddle.to_tensor(ids)), reading)
        logits = model.lm_head(hidden[:, -1:])[:, 0].astype("float32")
        if generation.top_k == 1:
            chosen = _likeliest(logits)
        else:
            chosen = np.full(len(prompts), tokenizer.pad_id)
            values = logits.numpy()
            for row in going:
                chosen[row] = draws[row].choice(values.shape[1], p=distribution(values[row], generation))
        going -= {row for row in going if int(chosen[row]) in tokenizer.stop_ids}
        yield {row: int(chosen[row]) for row in sorted(going)}
        if not going:
            return
        ids = chosen.astype(np.int64)[:, None]
        everything = np.concatenate([everything, ids], axis=1)


def _likeliest(logits: Any) -> np.ndarray:
    """Of each row of logits float32 [B, V] the first of its largest: int64 [B]."""
    if logits.place.is_cpu_place():  # paddle's argmax takes five times as long as numpy's
        logits = logits.contiguous()  # a plugin's lm_head may give a part of something
        return np.asarray(array_of(logits).argmax(axis=-1))
    return np.asarray(logits.argmax(axis=-1).numpy())


@contextlib.contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Without gradients and dropout; the model's mode is restored, also where the loop is left early."""
    import paddle

    was_training = model.training
    model.eval()
    try:
        with paddle.no_grad(), model.kernels.answering():
            yield
    finally:
        if was_training:
            model.train()
