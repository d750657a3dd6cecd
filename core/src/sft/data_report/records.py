"""A record as the model reads it: its tokens as text, with what is learned and what is special told apart."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import numpy as np

from sft.data.encoded import Encoded
from sft.data.tokenizer import Tokenizer
from sft.data_report.value import Piece, ShownRecord

_BROKEN = "\ufffd"
"""What a decoder writes for bytes that are no character yet."""
_BYTES = 4
"""Of the longest character."""


class Writer:
    """Writes records with the texts of ``tokenizer``."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.backend.get_added_tokens_decoder()
        self._special = {number: token.content for number, token in added.items() if token.special}

    def record(self, split: str, place: str, data: Encoded, rows: Sequence[int]) -> ShownRecord:
        """The record that became ``rows`` of ``data``, each given by its number."""
        pieces, tokens, learned = [], 0, 0
        for row in (document for number in rows for document in range(*data.edges[number : number + 2])):
            ids = data.ids[data.offsets[row] : data.offsets[row + 1]]
            trained = data.trained[data.offsets[row] : data.offsets[row + 1]].copy()
            trained[:1] = False  # nothing stands before it from which it could be predicted
            pieces.append(self.pieces(ids, trained))
            tokens += len(ids)
            learned += int(trained.sum())
        return ShownRecord(split, place, tokens, learned, pieces)

    def pieces(self, ids: np.ndarray, trained: np.ndarray) -> list[Piece]:
        """Tokens ``ids`` int [n] as text, those that are ``trained`` (bool [n]) told apart. Joined, the texts are what
        the tokenizer makes of all ids."""
        runs = groupby(range(len(ids)), lambda n: (bool(trained[n]), n if int(ids[n]) in self._special else None))
        found: list[Piece] = []
        before: list[int] = []
        for (learned, special), numbers in runs:
            tokens = [int(ids[number]) for number in numbers]
            found.append(Piece(self._text(before, tokens), learned, special is not None))
            before = tokens
        return found

    def _text(self, before: list[int], tokens: list[int]) -> str:
        """The text of ``tokens`` after those ``before``: some tokenizers write the first token of a text otherwise."""
        if len(tokens) == 1 and tokens[0] in self._special:
            return self._special[tokens[0]]
        whole, start = self._tokenizer.decode([*before, *tokens]), self._tokenizer.decode(before)
        return whole[len(start) :] if whole.startswith(start) else self._tokenizer.decode(tokens)

    def each(self, ids: np.ndarray) -> list[tuple[str, int]]:
        """Tokens ``ids`` int [n] as texts, each with how many tokens it is: some are a character together only. Joined,
        the texts are what the tokenizer makes of all ids."""
        numbers: list[int] = ids.tolist()
        found: list[tuple[str, int]] = []
        before: list[int] = []
        start = 0
        for at in range(1, len(numbers) + 1):
            text = self._text(before, numbers[start:at])
            following = range(at + 1, min(at + _BYTES, len(numbers) + 1))
            if text.endswith(_BROKEN) and not all(
                self._text(before, numbers[start:end]).startswith(text) for end in following
            ):
                continue  # what comes next makes a character of it
            if text or not found:
                found.append((text, at - start))
                before = numbers[start:at]
            else:  # bytes of a character that stands there already
                found[-1] = (found[-1][0], found[-1][1] + at - start)
                before += numbers[start:at]
            start = at
        return found
