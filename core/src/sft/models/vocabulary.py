"""Tokenizer and model with more tokens (`new_tokens`): in a run, and where what it trained is opened."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from sft.data.tokenizer import NewToken, Tokenizer, tokens_beyond
from sft.models.adapter_folder import saved_rows
from sft.models.grown import rows_for
from sft.models.loading import ModelSource
from sft.models.rows_in_files import read_rows
from sft.settings.arguments import Settings


def grown_tokenizer(
    settings: Settings, source: ModelSource, folder: Path, now: datetime | None, say: Callable[[str], None]
) -> Tokenizer:
    """The tokenizer of a run, whose files are in ``folder``, with the template and the new tokens that are set; the
    model of ``source`` gets rows for these, and a line says so. ``now`` is the date of the run."""
    new = [NewToken(text, special) for text, special in settings.model.tokens_to_add().items()]
    tokenizer = Tokenizer(folder, now, settings.data.chat_template, settings.data.enable_thinking, new)
    if new:
        say(grow(source, tokenizer))
    return tokenizer


def grow(source: ModelSource, tokenizer: Tokenizer) -> str:
    """Let the model of ``source`` have rows for the tokens that ``tokenizer`` got; a line that says what was done."""
    if not tokenizer.new_ids:
        return "new_tokens: the tokenizer has all of them already"
    ids = sorted(tokenizer.new_ids)
    before = source.architecture.vocabulary
    rows = rows_for(before, max(ids) + 1)
    source.grow(rows, ids)
    where = f"embeddings grow from {before:,} to {rows:,} rows" if rows > before else "for which there are rows already"
    what = f"1 token, id {ids[0]:,}" if len(ids) == 1 else f"{len(ids):,} tokens, ids {ids[0]:,} to {ids[-1]:,}"
    return f"new_tokens: {what}, {where}"


def grown_as(adapter: Path | None, source: ModelSource) -> list[NewToken]:
    """The tokens that the run of ``adapter`` added to the tokenizer of its base; ``source`` gets the rows that its
    embedding has in the adapter's file, or as many as it had for the tokens whose rows are there."""
    if adapter is None or not (adapter / "tokenizer.json").is_file():
        return []
    new = tokens_beyond(source.folder, adapter) if (source.folder / "tokenizer.json").is_file() else []
    trained = [max(rows.ids, default=0) for rows in read_rows(adapter).values()]
    rows = max(saved_rows(adapter), rows_for(source.architecture.vocabulary, max(trained, default=0) + 1))
    if rows > source.architecture.vocabulary:
        source.grow(rows, ())
    return new
