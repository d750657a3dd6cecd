"""Written conversations as tokens, and what each token weighs as a target, before any is made to fit."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from sft.data.learned import Text
from sft.data.templates import WrittenText
from sft.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Tokenized:
    """A conversation in tokens: ``ids`` int32 [n], ``weights`` float32 [n], 0 = no target."""

    ids: np.ndarray
    weights: np.ndarray
    prompt: int
    """Tokens before the first answer that is learned, or its thought if that is not."""
    text: Text

    @property
    def targets(self) -> int:
        """How many of its tokens are learned: the first one never is."""
        return int(np.count_nonzero(self.weights[1:]))  # which the newest numpy counts in a type of its own


def tokenized(texts: Sequence[Text], tokenizer: Tokenizer) -> list[Tokenized]:
    """What each of ``texts`` is to a model; the tokenizer gets them together."""
    found = iter(tokenizer.encode_spans([piece.text for text in texts for piece in text.pieces]))
    every = []
    for text in texts:
        ids: list[int] = []
        marks: list[np.ndarray] = []
        answers: list[np.ndarray] = []
        for piece, whole in zip(text.pieces, text.written.pieces, strict=True):
            tokens, span = next(found)
            ids += tokens
            marks.append(_mark(len(tokens), span, piece))
            answers.append(marks[-1] if whole is piece else _mark(len(tokens), span, whole))
        fixed = tokenizer.with_bos(ids) if tokenizer.template.one_bos or text.written.is_raw else ids
        added = len(fixed) - len(ids)
        weights = _after_bos(marks, added)
        answered = weights if text.pieces is text.written.pieces else _after_bos(answers, added)
        every.append(Tokenized(np.array(fixed, np.int32), weights, _prompt_length(answered), text))
    return every


def _after_bos(marks: list[np.ndarray], added: int) -> np.ndarray:
    """What the tokens of all pieces weigh, after so many that were ``added`` before them; or taken, where below 0."""
    return np.concatenate([np.zeros(max(0, added), np.float32), *marks])[max(0, -added) :]


def _mark(tokens: int, span: Callable[[int], tuple[int, int]], piece: WrittenText) -> np.ndarray:
    """What tokens weigh, float32 [n]: those with at least one character in a target, else 0; one that reaches over its
    beginning belongs to it.

    ``span`` gives the characters of a token: neither their beginnings nor their ends ever go back.
    """
    marked = np.zeros(tokens, np.float32)
    for (start, end), weight in zip(piece.targets, piece.weights, strict=True):
        first = bisect_right(range(tokens), start, key=lambda token: span(token)[1])
        stop = bisect_left(range(tokens), end, first, key=lambda token: span(token)[0])
        marked[first:stop] = weight
    return marked


def _prompt_length(weights: np.ndarray) -> int:
    """Tokens before the first target."""
    first = int((weights > 0).argmax()) if len(weights) else 0
    return first if weights[first:].any() else len(weights)
