"""What a rank writes down of its end."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from sft_parallel_4d import last_words
from sft_parallel_4d.environment import FOLDER
from sft_parallel_4d.watch import OtherRankError

NEWS = "rank 1 was killed by signal 9"
CONSEQUENCE = RuntimeError("connection closed by peer")


@pytest.fixture
def record_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(FOLDER, str(tmp_path))
    monkeypatch.setenv("PADDLE_TRAINER_ID", "0")
    return tmp_path / "rank0.error"


@pytest.mark.parametrize("first", ["the news", "the consequence"])
def test_news_that_comes_while_an_error_is_written_down(
    first: str, record_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another rank's death reaches a rank twice: as news, in the watch's thread, and as its own broken connection.
    Each may come at any moment of the other's writing, here at half of the file."""
    deeds = [lambda: last_words.report(NEWS, [1]), lambda: last_words.record(CONSEQUENCE, sure=False)]
    one, two = deeds if first == "the news" else reversed(deeds)
    second, write = threading.Thread(target=two), Path.write_text

    def slowly(path: Path, text: str, **how: Any) -> int:
        if second.ident is not None:
            return write(path, text, **how)
        with path.open("w", **how) as file:
            file.write(text[: len(text) // 2])
            file.flush()
            second.start()
            second.join(0.3)
            return file.write(text[len(text) // 2 :])

    monkeypatch.setattr(Path, "write_text", slowly)
    one()
    second.join()
    written = json.loads(record_file.read_text(encoding="utf-8"))
    assert (written["text"], written["sure"], written["relayed"]) == (NEWS, True, True)


@pytest.mark.parametrize("told", ["by the watch", "as an error"])
def test_who_is_gone_is_written_down_beside_the_sentence(told: str, record_file: Path) -> None:
    if told == "by the watch":
        last_words.report(NEWS, [1])
    else:
        last_words.record(OtherRankError(NEWS, [1]))
    assert last_words.read_record(record_file)["gone"] == [1]


def test_an_error_of_its_own_names_nobody_who_is_gone(record_file: Path) -> None:
    last_words.record(CONSEQUENCE)
    assert last_words.read_record(record_file)["gone"] == []
