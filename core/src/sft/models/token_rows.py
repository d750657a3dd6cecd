"""Rows of some tokens that train beside an adapter (`trainable_token_indices`). The matrices of embedding and head stay
frozen, and the rows stand in for theirs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import paddle
from paddle import nn

from sft.errors import UsageError
from sft.foreign_text import quoted
from sft.models.beside import Beside, HeadLayer
from sft.models.grown import EMBEDDING, HEAD
from sft.models.layers import vocabulary_layers
from sft.models.rows_in_files import Rows, rows_for_base

if TYPE_CHECKING:
    from sft.context import CoreRun
    from sft.data.tokenizer import Tokenizer

NEW = "new"
"""In the setting: the tokens of ``new_tokens``."""


class EmbeddingRows(nn.Layer):
    """An embedding in which some tokens have ``rows``, float32 [n, hidden]. Each process has all of these."""

    sides: ClassVar[dict[str, tuple[str | None, ...]]] = {"rows": (None, None)}

    def __init__(self, base: Any, rows: Rows) -> None:
        super().__init__()
        self.base, self.ids, self.rows = base, rows.ids, _parameter(self, rows.values)
        object.__setattr__(self, "known", paddle.to_tensor(np.asarray(rows.ids, np.int64)))  # no buffer

    def forward(self, tokens: Any) -> Any:
        """int64 [B, S] → [B, S, hidden]."""
        embedded, known = self.base(tokens), self.known
        place = paddle.searchsorted(known, tokens).clip(max=len(self.ids) - 1)
        own = (paddle.gather(known, place.flatten()).reshape(place.shape) == tokens).unsqueeze(-1)
        return paddle.where(own, nn.functional.embedding(place, self.rows).astype(embedded.dtype), embedded)


class HeadRows(HeadLayer, nn.Layer):
    """A head in which some tokens have rows of its own, float32 [n, hidden], or those of an embedding that it is tied
    to."""

    sides: ClassVar[dict[str, tuple[str | None, ...]]] = {"rows": (None, None)}

    def __init__(self, base: Any, rows: Rows | EmbeddingRows) -> None:
        super().__init__()
        self.base, self.ids = base, rows.ids
        tied = rows if isinstance(rows, EmbeddingRows) else None
        object.__setattr__(self, "tied", tied)  # no sublayer, under whose name its rows would be known too
        self.rows = None if isinstance(rows, EmbeddingRows) else _parameter(self, rows.values)

    def beside(self, hidden: Any) -> Beside:
        rows = self.rows if self.tied is None else self.tied.rows
        return Beside(paddle.matmul(hidden, rows, transpose_y=True), tokens=self.ids)


def _parameter(layer: nn.Layer, values: np.ndarray) -> Any:
    parameter = layer.create_parameter(list(values.shape), dtype="float32")
    parameter.set_value(np.ascontiguousarray(values, np.float32))
    return parameter


def put_rows(model: Any, rows: Mapping[str, Rows], tied: bool) -> None:
    """Let ``rows``, by the names of their matrices, stand in for those of ``model``; of a ``tied`` one the embedding's
    for both."""
    if not rows:
        return
    embedding, head = vocabulary_layers(model)
    if EMBEDDING in rows:
        layer = EmbeddingRows(embedding.layer, rows[EMBEDDING])
        embedding.replace(layer)
        if tied:
            head.replace(HeadRows(head.layer, layer))
    if HEAD in rows:
        head.replace(HeadRows(head.layer, rows[HEAD]))


def let_rows_train(run: CoreRun) -> dict[str, tuple[int, ...]]:
    """Let the rows train that the run's ``trainable_token_indices`` names, and those of the adapter from which the run
    goes on, with the values that they have there. The structured names of the parameters, with the ids of their rows.

    Raises :class:`UsageError` for what is no token, and where embedding or head train otherwise.
    """
    wanted = run.settings.model.trainable_token_indices
    stored = {} if run.continued is None else rows_for_base(run.continued, run.source)
    if not wanted and not stored:
        return {}
    ids = ids_of(wanted, run.tokenizer, run.source.architecture.vocabulary)
    _check(run, stored, ids)
    rows = stored or {name: Rows(tuple(ids), values) for name, values in _begun(run, ids).items()}
    put_rows(run.model, rows, run.source.architecture.tied)
    count = len(next(iter(rows.values())).ids)
    what = (
        "1 row of {} trains"
        if count == 1 and len(rows) == 1
        else f"{count:,} row{'s' if count > 1 else ''} of {{}} train"
    )
    run.say(f"trainable_token_indices: {what.format(' and of '.join(rows))}")
    return {name.replace(".weight", ".rows"): one.ids for name, one in rows.items()}


def ids_of(wanted: Sequence[Any], tokenizer: Tokenizer, rows: int) -> list[int]:
    """The ids that ``trainable_token_indices`` names, in ascending order: numbers, tokens, or ``new``. Raises
    :class:`UsageError` for what is no token of a model of so many ``rows``."""
    found: set[int] = set()
    for one in wanted:
        if one == NEW:
            if not tokenizer.new_ids:
                raise UsageError(
                    "trainable_token_indices: new means the tokens that new_tokens adds, and it adds none; name "
                    "others, or leave it out."
                )
            found.update(tokenizer.new_ids)
            continue
        text = "" if isinstance(one, bool) else str(one)
        is_number = text.isdecimal() and text.isascii()
        number = int(text) if is_number else tokenizer.backend.token_to_id(text)
        if number is None or number >= rows:
            raise UsageError(
                f"trainable_token_indices: {quoted(one)} is no token of this model; give ids from 0 to {rows - 1:,}, "
                "tokens as tokenizer.json has them, or new."
            )
        found.add(number)
    return sorted(found)


def _check(run: CoreRun, stored: Mapping[str, Rows], ids: Sequence[int]) -> None:
    for place in vocabulary_layers(run.model):
        if hasattr(place.layer, "sides"):
            raise UsageError(
                f"{place.name} is adapted, and trainable_token_indices lets some of its rows train; leave one of the "
                "two out."
            )
        if f"{place.name}.weight" in run.whole:
            raise UsageError(
                f"{place.name} trains whole, with all of its rows; leave trainable_token_indices out, or "
                f"{place.name.rpartition('.')[2]} out of modules_to_save."
            )
    for rows in stored.values():
        if ids and tuple(ids) != rows.ids:
            raise UsageError(
                f"{run.continued} has trained the rows of {len(rows.ids)} tokens, and trainable_token_indices names "
                "others; leave it out, and these go on."
            )
    lacking = sorted({*run.tokenizer.new_ids} - {*(ids or next(iter(stored.values())).ids)})
    if lacking:
        raise UsageError(
            f"new_tokens adds token {lacking[0]:,}, whose row is a mean that knows nothing, and "
            "trainable_token_indices leaves it out; add new to it."
        )


def _begun(run: CoreRun, ids: Sequence[int]) -> dict[str, np.ndarray]:
    """The rows of ``ids`` in the matrices of the model, float32 [n, hidden]. All processes take part."""
    embedding, head = vocabulary_layers(run.model)
    places = {EMBEDDING: embedding} if run.source.architecture.tied else {EMBEDDING: embedding, HEAD: head}
    chosen, found = paddle.to_tensor(np.asarray(ids, np.int64)), {}
    for name, place in places.items():
        axis = 0 if name == EMBEDDING else 1
        for _, matrix in run.strategy.whole([(name, place.layer.weight)]):
            values = paddle.index_select(matrix, chosen, axis=axis).astype("float32").numpy()
            found[name] = values if axis == 0 else values.T
    return found


def rows_of(run: CoreRun) -> dict[str, Rows]:
    """What the rows are now, by the names of their matrices. All processes take part."""
    if not run.rows:
        return {}
    parameters = [(name, p) for name, p in run.strategy.parameters(run.model) if name in run.rows]
    whole = run.strategy.whole(parameters)
    return {name.replace(".rows", ".weight"): Rows(run.rows[name], p.numpy()) for name, p in whole}


class RowsMerger:
    """A merger that puts rows that were trained into the matrices that another one has merged; ``rows`` are by the
    names of these."""

    def __init__(self, merger: Any, rows: Mapping[str, Rows]) -> None:
        self._merger, self._rows, self._left = merger, rows, set(rows)

    def merge(self, name: str, weight: Any) -> Any:
        """See :class:`sft.AdapterMerger`."""
        merged = self._merger.merge(name, weight)
        if name not in self._rows:
            return merged
        self._left.discard(name)
        return paddle.to_tensor(self._rows[name].put(merged.numpy()))

    def unused(self) -> list[str]:
        """See :class:`sft.AdapterMerger`."""
        return sorted([*self._merger.unused(), *self._left])
