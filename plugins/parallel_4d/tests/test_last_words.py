"""What a rank writes down of its end."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from sft_parallel_4d import last_words
from sft_parallel_4d.environment import FOLDER

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
    deeds = [lambda: last_words.report(NEWS), lambda: last_words.record(CONSEQUENCE, sure=False)]
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
