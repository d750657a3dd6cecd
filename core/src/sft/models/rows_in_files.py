"""Rows of some tokens in an adapter's folder, as PEFT has them (`trainable_token_indices`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.errors import UsageError
from sft.foreign_text import quoted, shown
from sft.models.adapter_folder import DELTA, PREFIX, read_rows_tensors
from sft.models.grown import EMBEDDING, HEAD
from sft.seams import AdapterFiles

if TYPE_CHECKING:
    import numpy as np

    from sft.models.loading import ModelSource

_CALLED = {name.removesuffix(".weight").rpartition(".")[2]: name for name in (EMBEDDING, HEAD)}
"""What PEFT's config calls the two layers, and their matrices."""


@dataclass(frozen=True)
class Rows:
    """Rows of a matrix [V, hidden]: of the tokens ``ids``, in ascending order, ``values`` float32 [n, hidden]."""

    ids: tuple[int, ...]
    values: np.ndarray

    def put(self, matrix: np.ndarray) -> np.ndarray:
        """A copy of ``matrix`` with these rows, in its dtype."""
        import numpy as np

        found = np.array(matrix)
        found[list(self.ids)] = self.values.astype(found.dtype)
        return found


def read_rows(folder: Path) -> dict[str, Rows]:
    """The rows that the adapter in ``folder`` has instead of its base's, by the name of the matrix (``EMBEDDING``,
    ``HEAD``). None of a matrix that is in the file whole: there they are part of it."""
    return {name: rows for name, (rows, whole) in read_rows_and_wholes(folder).items() if whole is None}


def read_rows_and_wholes(folder: Path) -> dict[str, tuple[Rows, np.ndarray | None]]:
    """For each matrix of which the adapter in ``folder`` has rows, these, and the matrix itself with them, where it is
    in the file: PEFT writes it where the vocabulary has grown."""
    import numpy as np

    config, tensors = read_rows_tensors(folder)
    named = _named(folder, config.get("trainable_token_indices"))
    found: dict[str, tuple[Rows, np.ndarray | None]] = {}
    first: Any = None
    for name in (EMBEDDING, HEAD):
        start = f"{PREFIX}{name.removesuffix('.weight')}."
        own = {key[len(start) :]: value for key, value in tensors.items() if key.startswith(start)}
        values, whole = own.get(DELTA), own.get("token_adapter.base_layer.weight")
        if values is None:
            tied = name == HEAD and named.get(EMBEDDING) == named.get(HEAD)
            if name in named and not tied:
                raise _damaged(folder, f"it names rows of {shown(name)}, and adapter_model.safetensors has none")
            continue  # a tied head has the embedding's
        if name == HEAD and name not in named and EMBEDDING in found and np.array_equal(values, first):
            continue  # PEFT writes them twice where it writes the matrix
        first, ids = values, named.get(name, ())
        if values.ndim != 2 or len(ids) != len(values):
            raise _damaged(folder, f"it names {len(ids)} tokens of {shown(name)}, whose rows are {list(values.shape)}")
        order = np.argsort(np.asarray(ids, np.int64), kind="stable")
        rows = Rows(tuple(ids[place] for place in order), values.astype(np.float32)[order])
        found[name] = rows, None if whole is None else rows.put(whole)
    return found


def _named(folder: Path, indices: Any) -> dict[str, list[int]]:
    """The tokens that a config names, by the name of the matrix."""
    given = indices if isinstance(indices, dict) else {"embed_tokens": indices} if indices else {}
    found = {}
    for layer, ids in given.items():
        name = _CALLED.get(str(layer).rpartition(".")[2])
        plain = isinstance(ids, list) and all(isinstance(one, int) and not isinstance(one, bool) for one in ids)
        if name is None or not plain or min(ids, default=0) < 0 or len(set(ids)) != len(ids):
            raise _damaged(folder, f"{quoted(layer)}: {quoted(ids)} are no different tokens of embed_tokens or lm_head")
        found[name] = ids
    return found


def _damaged(folder: Path, why: str) -> UsageError:
    return UsageError(
        f"{folder}: adapter_config.json has trainable_token_indices that cannot be: {why}; copy it again."
    )


def rows_for_base(folder: Path, source: ModelSource) -> dict[str, Rows]:
    """:func:`read_rows`; :class:`UsageError` where they do not fit the model of ``source``."""
    found = read_rows(folder)
    for name, rows in found.items():
        vocabulary, hidden = source.architecture.vocabulary, source.architecture.hidden
        if rows.values.shape[1] != hidden or max(rows.ids, default=0) >= vocabulary:
            raise UsageError(
                f"The adapter in {folder} has rows of {shown(name)} (up to token {max(rows.ids, default=0):,}, of "
                f"{rows.values.shape[1]:,} values), which do not fit this model ({vocabulary:,} rows of {hidden:,})."
            )
    if source.architecture.tied and HEAD in found:
        raise UsageError(
            f"{folder} has rows of embedding and head that are apart, and in {source.folder} the two are one matrix; "
            "train the adapter with rows of embed_tokens alone, or over a base whose tie_word_embeddings is false."
        )
    return found


def check_same_rows(checkpoint: Path, own: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse a checkpoint whose rows are not of the same tokens as those of a run: ``own``, by parameter."""
    theirs = {
        name.replace(".weight", ".rows"): rows.ids for name, (rows, _) in read_rows_and_wholes(checkpoint).items()
    }
    if own != theirs:
        raise UsageError(
            f"{checkpoint} has trained the rows of other tokens than trainable_token_indices names here; put that back "
            "as it was, or start a new run."
        )


def with_rows(files: AdapterFiles, rows: Mapping[str, Rows]) -> AdapterFiles:
    """An adapter's files with ``rows``, by the names of their matrices, as PEFT writes them."""
    if not rows:
        return files
    ids = {called: list(rows[name].ids) for called, name in _CALLED.items() if name in rows}
    config = {**files.config, "trainable_token_indices": ids if HEAD in rows else ids["embed_tokens"]}
    own = {f"{PREFIX}{name.removesuffix('.weight')}.{DELTA}": one.values for name, one in rows.items()}
    return AdapterFiles(config, {**files.tensors, **own})
