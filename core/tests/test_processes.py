"""Data encoded by several processes: the same as by one, in what is learned and in what is said."""

from __future__ import annotations

import os
import signal
import socket
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from timeless import timeless

import sft
from sft.conversations import Conversation, ToolCall, Turn
from sft.data import processes
from sft.data.bad_records import Place
from sft.data.encoded import Encoded
from sft.data.encoding import encode
from sft.data.learned import Learned
from sft.data.processes import PAYS_OFF, Encoders, processes_for
from sft.data.tokenizer import Tokenizer
from sft.testing import write_data

RECORDS = 60
"""In groups of 4, so that two processes have much to mix up."""


@pytest.fixture(scope="module")
def tokenizer(models: Path) -> Tokenizer:
    return Tokenizer(models / "qwen2-untied")


@pytest.fixture
def strict(models: Path, tmp_path: Path) -> Tokenizer:
    """Its template refuses a role."""
    (tmp_path / "strict.jinja").write_text(
        "{% for m in messages %}{% if m.role == 'nobody' %}{{ raise_exception('Who is that?') }}{% endif %}"
        "<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    return Tokenizer(models / "qwen2-untied", chat_template=str(tmp_path / "strict.jinja"))


@pytest.fixture(scope="module")
def two() -> Iterator[Encoders]:
    several = Encoders(2)
    yield several
    several.close()


def conversations(wrong: int | None = None, unread: int | None = None) -> Iterator[Conversation]:
    """Some are too long for 60 tokens. Record ``wrong`` has the role nobody; ``unread`` cannot be
    read at all."""
    for number in range(RECORDS):
        if number == unread:
            raise sft.UsageError(f"line {number} is not JSON")
        turns = [Turn("user", f"question {number} " * (number % 9)), Turn("assistant", f"answer {number}", trains=True)]
        if number % 4 == 3:
            turns += [Turn("user", "and then?"), Turn("assistant", "nothing " * (number % 30), trains=True)]
        if number % 5 == 1:
            turns[1] = Turn("assistant", f"answer {number}", trains=True, weight=0.5 + number)
        if number == wrong:
            turns = [Turn("assistant", "a", trains=True), Turn("nobody", "b"), Turn("assistant", "c", trains=True)]
        yield Conversation(turns, Place(Path("train.json"), number), weight=1 + number % 3)


def check_same(one: Encoded, other: Encoded) -> None:
    for name in ("ids", "trained", "offsets", "dropped", "weights"):
        expected, found = getattr(one, name), getattr(other, name)
        assert expected is not None
        assert found.dtype == expected.dtype
        assert np.array_equal(found, expected)
    assert other.counts == one.counts
    assert other.fingerprint() == one.fingerprint()


@pytest.mark.parametrize(("src_length", "max_length"), [(10**6, 10**6), (30, 60)])
def test_two_processes_encode_what_one_does(
    tokenizer: Tokenizer, two: Encoders, src_length: int, max_length: int
) -> None:
    one = encode(conversations(), tokenizer, src_length, max_length, 4)
    check_same(one, encode(conversations(), tokenizer, src_length, max_length, 4, by=two))
    assert one.counts.records == RECORDS
    assert (one.counts.prompts_truncated > 0) == (src_length == 30)


def test_tools_calls_and_thoughts_go_along(models: Path, two: Encoders) -> None:
    template = Path(__file__).parent / "fixtures" / "templates" / "qwen3_tools.jinja"
    tokenizer = Tokenizer(models / "qwen2-untied", chat_template=str(template))
    call = Turn("assistant", "", True, 0.5, tool_calls=(ToolCall("f", {"x": [3, "ü"]}, "one"),))
    answer = Turn("assistant", "9", True, 3, reasoning="why")
    turns = [Turn("user", "a"), call, Turn("tool", "3", tool_call_id="one", name="f"), answer]
    records = [Conversation(turns, None, [{"type": "function", "function": {"name": "f"}}])] * 6
    for learned in (Learned(), Learned("last_answer", "none")):
        one = encode(records, tokenizer, 10**6, 10**6, 2, learned=learned)
        check_same(one, encode(records, tokenizer, 10**6, 10**6, 2, by=two, learned=learned))
    assert one.counts.thoughts_left_out == 6


def test_the_date_and_the_template_go_along(models: Path, tmp_path: Path, two: Encoders) -> None:
    import datetime

    (tmp_path / "dated.jinja").write_text(
        "{{ strftime_now('%Y') }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    now = datetime.datetime(1999, 1, 1)
    dated = Tokenizer(models / "qwen2-untied", now, str(tmp_path / "dated.jinja"))
    found = encode(conversations(), dated, 10**6, 10**6, 4, by=two)
    check_same(encode(conversations(), dated, 10**6, 10**6, 4), found)
    assert dated.decode(found[0].input_ids).startswith("1999")


@pytest.mark.parametrize(("wrong", "unread"), [(9, None), (9, 10), (9, 12)])
def test_the_fault_is_the_one_that_one_process_meets_first(
    strict: Tokenizer, wrong: int | None, unread: int | None
) -> None:
    """A group of 4 is read before it is encoded: a line that cannot be read comes before a record of its own group."""
    said = []
    for by in (map, Encoders(2)):
        with pytest.raises(sft.UsageError) as fault:
            encode(conversations(wrong, unread), strict, 10**6, 10**6, 4, by=by)
        said.append(str(fault.value))
    assert said[0] == said[1]
    first = unread if unread is not None and (wrong is None or unread // 4 <= wrong // 4) else wrong
    assert f"line {first}" in said[0]


def test_a_record_longer_than_the_model_is_refused_there(tokenizer: Tokenizer) -> None:
    said = []
    for by in (map, Encoders(2)):
        with pytest.raises(sft.UsageError, match="A record has") as fault:
            encode(conversations(), tokenizer, 10**6, 10**6, 4, room=(Path("model"), 50), by=by)
        said.append(str(fault.value))
    assert said[0] == said[1]


def test_a_process_that_is_killed_is_named_and_the_others_end(tokenizer: Tokenizer) -> None:
    several = Encoders(2)

    def killing() -> Iterator[Conversation]:
        for number, turns in enumerate(conversations()):
            if number == 40:
                for process in several.processes:
                    os.kill(process, signal.SIGKILL)
            yield turns

    with pytest.raises(sft.SftError, match=r"ended by itself \(signal 9\).*give dataset_num_proc a lower number"):
        encode(killing(), tokenizer, 10**6, 10**6, 4, by=several)
    assert several.processes == []


@pytest.mark.parametrize("length", [1, 2_000_000])
def test_a_process_that_stands_still_is_not_waited_for_without_end(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, length: int
) -> None:
    """Nor where it does not even take what it is sent."""
    several, stopped = Encoders(1), []
    encode(list(conversations())[:3], tokenizer, 10**6, 10**6, 4, by=several)  # it has started
    monkeypatch.setattr(processes, "_PATIENCE", 1.0)
    with socket.socket(fileno=os.dup(several._started[0]._connection.fileno())) as sends:
        sends.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", 1, 0))

    def stopping() -> Iterator[Conversation]:
        for number, turns in enumerate(conversations()):
            if number == 40:
                stopped.extend(several.processes)
                os.kill(stopped[0], signal.SIGSTOP)
            content = "x" * length if number >= 40 else "x"
            yield Conversation([Turn("user", content), *turns[1:]], turns.place)

    began = time.monotonic()
    with pytest.raises(sft.SftError, match="has not answered for 1 s; look what has stopped it"):
        encode(stopping(), tokenizer, 10**6, 10**6, 4, by=several)
    assert time.monotonic() - began < 10
    with pytest.raises(ProcessLookupError):
        os.kill(stopped[0], 0)


def test_processes_are_started_as_they_are_needed_and_end_with_their_object(tokenizer: Tokenizer) -> None:
    several = Encoders(2)
    encode(list(conversations())[:3], tokenizer, 10**6, 10**6, 4, by=several)
    (process,) = several.processes
    os.kill(process, 0)  # it is there
    del several
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)


def test_how_many_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sft.data.processes.physical_cores", lambda: 8)
    monkeypatch.delenv("PADDLE_TRAINERS_NUM", raising=False)
    small, large = tmp_path / "small.json", tmp_path / "large.json"
    for path, size in ((small, PAYS_OFF - 1), (large, PAYS_OFF)):
        with path.open("wb") as file:
            file.truncate(size)
    assert [processes_for([path], None) for path in (small, large)] == [1, 8]
    assert [processes_for([path], 3) for path in (small, large)] == [3, 3]
    monkeypatch.setenv("PADDLE_TRAINERS_NUM", "4")  # which all read the data
    assert processes_for([large], None) == 2
    assert processes_for([large], 3) == 3


# --- in a run -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lazy", [False, True])
def test_a_run_of_two_processes_says_and_learns_what_one_does(
    train: Callable[..., Any], metrics: Callable[..., Any], tmp_path: Path, lazy: bool
) -> None:
    """A plugin's format among it, which no other process could import, and which counts."""
    asked = []

    class Reads(sft.Plugin):
        name = "reads"
        api_version = 1

        @sft.hookimpl
        def sft_record_format(self, record: dict[str, Any]) -> list[sft.Turn]:
            asked.append(os.getpid())
            return [Turn("user", f"{len(asked) % 40}: {record['src']}"), Turn("assistant", record["tgt"], trains=True)]

    said: dict[int, list[str]] = {}
    for number in (1, 2):
        said[number] = []
        asked.clear()
        train(
            str(number),
            plugins=(Reads,),
            max_steps=2,
            lazy=lazy,
            dataset_num_proc=number,
            save_strategy="steps",
            say=said[number].append,
        )
        assert set(asked) == {os.getpid()}
    assert any("of the format of plugin reads" in line for line in said[1])
    assert timeless(said[1], tmp_path / "1") == timeless(said[2], tmp_path / "2")
    assert metrics(tmp_path / "1", same=True) == metrics(tmp_path / "2", same=True)


def test_what_is_wrong_with_a_record_is_said_with_its_line(train: Callable[..., Any], tmp_path: Path) -> None:
    records = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}] * 3
    records.insert(2, {"messages": [{"role": "system", "content": "s"}, *records[0]["messages"]]})
    (tmp_path / "refuses.jinja").write_text(
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('No system turn.') }}{% endif %}"
        "{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    data = write_data(tmp_path / "data", records)
    said = []
    for number in (1, 2):
        with pytest.raises(sft.UsageError, match=r"train\.json, line 3: .*No system turn") as fault:
            train(
                dataset_name_or_path=str(data),
                chat_template=str(tmp_path / "refuses.jinja"),
                dataset_num_proc=number,
                max_steps=1,
            )
        said.append(str(fault.value))
    assert said[0] == said[1]
