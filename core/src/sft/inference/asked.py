"""What a file, or the lines of a text, ask a model: conversations to be answered, and the answers that records have."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from sft.conversations import Conversation, Turn
from sft.data.bad_records import BadRecordError
from sft.data.formats import ASKING, Formats
from sft.data.questions import before_last_answer
from sft.data.sources import read
from sft.dataset_names import SUFFIXES
from sft.small_files import read_text

if TYPE_CHECKING:
    from sft.plugins.registry import Plugins


def of_texts(lines: Iterable[str]) -> Iterator[tuple[Conversation, Turn | None]]:
    """Each line that is not blank is a question, which nobody has answered."""
    return ((Conversation([Turn("user", line)]), None) for line in lines if line.strip())


def of_file(path: Path, plugins: Plugins) -> Iterator[tuple[Conversation, Turn | None]]:
    """Conversations to answer, and what their records have as the answer; each line of a text file is a question."""
    if path.suffix not in SUFFIXES:
        yield from of_texts(read_text(path, cure="give a file of prompts in UTF-8").split("\n"))
        return
    formats = Formats(plugins)
    for record in read([path]):
        turns = formats.turns(record, needs_target=False)
        asked, answer = (turns, None) if turns[-1].role in ASKING else before_last_answer(turns)
        if not asked:
            raise BadRecordError(
                record.place, ': this record asks nothing; take it out, or call a text that is to be answered "prompt".'
            )
        yield asked, answer
