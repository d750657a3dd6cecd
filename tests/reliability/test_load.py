"""Much of everything: broken records, steps, bytes of data, lines of metrics. Counts are exact, and memory stays."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reliability import figures
from sft.data.stream import WINDOW
from sft.files import read_report
from sft.testing import needs, read_metrics
from sft.training.journal import Journal

MODEL = Path(__file__).resolve().parents[2] / "core" / "tests" / "fixtures" / "models" / "llama-tied-gqa"
MIB = 1 << 20
pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600 if figures.WHOLE else 240)]

BROKEN = {
    b'{"src": "a", "tgt": ': "is not JSON",
    b"[1, 2]": "holds list",
    b'{"src": "a"}': 'has no "tgt"',
    b'{"src": "a", "tgt": " "}': "is empty",
    b'{"src": "\xff\xfe", "tgt": "b"}': "is not UTF-8",
    b'{"src": "a", "src": "b", "tgt": "c"}': "stands twice",
    b'{"messages": [{"role": "user", "content": "a"}]}': "this record is messages",
    b'{"instruction": "a", "output": "b"}': "this record is Alpaca",
}


def started(output: Path, **settings: Any) -> subprocess.Popen[str]:
    settings = {"model_name_or_path": MODEL, "output_dir": output, "disable_tqdm": True, **settings}
    plugin = [part for name in [settings.pop("plugin", None)] if name for part in ("--plugin", name)]
    line = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "sft", "run", *plugin, *line]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finished(process: subprocess.Popen[str]) -> str:
    said, _ = process.communicate()
    assert process.returncode == 0, said
    return said


READING: dict[str, dict[str, Any]] = {
    "one process": {},
    "dataset_num_proc": {"dataset_num_proc": 2},
    "lazy": {"lazy": True},
}


@pytest.mark.row("load", "broken records skipped: {name}")
@pytest.mark.parametrize("name", READING)
def test_broken_records_are_counted_and_listed(tmp_path: Path, name: str) -> None:
    """One in a hundred, of eight kinds, at places that chance chose."""
    records, way = 100_000 if figures.WHOLE else 9_000, READING[name]
    chosen = sorted(random.Random(7).sample(range(1, records + 1), records // 100))
    kinds = list(BROKEN)
    broken = {line: kinds[number % len(kinds)] for number, line in enumerate(chosen)}
    with (tmp_path / "train.json").open("wb") as file:
        for line in range(1, records + 1):
            file.write(broken.get(line) or b'{"src": "question %d", "tgt": "answer %d"}' % (line, line % 97))
            file.write(b"\n")
    began = time.monotonic()
    steps = {"max_steps": 2}
    if "lazy" in way:  # it is read to its end, and not a window more
        windows = [range(start, min(start + WINDOW, records + 1)) for start in range(1, records + 1, WINDOW)]
        good = [len(window) - sum(line in window for line in chosen) for window in windows]
        steps = {"max_steps": sum(-(-count // 500) for count in good), "per_device_train_batch_size": 500}
    settings = {"dataset_name_or_path": tmp_path / "train.json", "on_bad_record": "skip", "max_length": 24, **steps}
    finished(started(tmp_path / "out", **settings, **way))
    seconds = time.monotonic() - began
    counts = read_report(tmp_path / "out")["result"]["data"]["train"]
    listed = [json.loads(line) for line in (tmp_path / "out" / "bad_records.jsonl").read_text().splitlines()]
    assert (counts["records"], counts["records_skipped"]) == (records, len(chosen))
    assert [entry["line"] for entry in listed] == chosen
    for entry in listed:
        assert BROKEN[broken[entry["line"]]] in entry["reason"]
    case = f"broken records skipped: {name}"
    figures.record("load", case, records=records, skipped=len(chosen), listed=len(listed), seconds=seconds)


def resident(process: subprocess.Popen[str], output: Path) -> Iterator[tuple[int, float]]:
    """The step that was logged last, and the memory of the process then in KiB, until it ends."""
    pages = Path(f"/proc/{process.pid}/statm")
    while process.poll() is None:
        time.sleep(0.1)
        try:
            memory = int(pages.read_text().split()[1]) * 4
            lines = (output / "metrics.jsonl").read_bytes().splitlines()
            yield json.loads(lines[-1])["step"], memory
        except (OSError, IndexError, ValueError):
            continue


WAYS = {
    "LoRA, packed": {"plugin": "lora,zero-padding", "learning_rate": 1e-3},
    "full, padded, lazy, checkpoints": {
        **{"lazy": True, "save_strategy": "steps", "save_steps": 50, "save_total_limit": 2},
    },
}


@pytest.mark.row("load", "memory over steps: {way}")
@pytest.mark.parametrize("way", [pytest.param(way, marks=needs("lora", "zero-padding")) for way in WAYS])
def test_memory_stays_over_many_steps(tmp_path: Path, way: str) -> None:
    """The line through what is resident after the first quarter of the steps rises by less than 1 KiB a step."""
    steps = 2_000 if figures.WHOLE else 300
    data = tmp_path / "train.json"
    rng = np.random.default_rng(0)
    lines = [{"src": "word " * int(rng.integers(1, 9)), "tgt": "answer " * int(rng.integers(1, 9))} for _ in range(500)]
    data.write_text("\n".join(map(json.dumps, lines)))
    began = time.monotonic()
    settings = {"dataset_name_or_path": data, "max_steps": steps, "logging_steps": 5, "max_length": 64}
    process = started(tmp_path / "out", **settings, per_device_train_batch_size=4, **WAYS[way])
    found = np.array([at for at in resident(process, tmp_path / "out") if at[0] >= steps // 4])
    finished(process)
    assert len(found) >= 10
    slope = float(np.polyfit(found[:, 0], found[:, 1], 1)[0])
    peaks = {line["step"]: line["peak_memory_mib"] for line in read_metrics(tmp_path / "out") if "loss" in line}
    rise = peaks[steps] - peaks[steps // 4]
    figures.record(
        "load", f"memory over steps: {way}", steps=steps, KiB_a_step=slope, MiB_more_at_the_peak=rise,
        seconds=time.monotonic() - began,
    )  # fmt: skip
    assert slope < (1 if figures.WHOLE else 16)
    assert rise <= (4 if figures.WHOLE else 16)


@pytest.mark.row("load", "a large file as a stream")
def test_a_stream_takes_the_same_memory_however_large_its_file_is(tmp_path: Path) -> None:
    """Ten windows of 1 GB (in the short form one of 24 MB) beside as many of a file that holds no more than these."""
    windows, size = (10, 1 << 30) if figures.WHOLE else (1, 24 * MIB)
    rows = 512
    steps = windows * WINDOW // rows
    words = [f"word{number} " for number in range(1000)]
    rng, record, written = np.random.default_rng(0), 0, 0
    small, large = tmp_path / "small.json", tmp_path / "large.json"
    began = time.monotonic()
    with small.open("w") as one, large.open("w") as other:
        while written < size:
            text = "".join(words[number] for number in rng.integers(0, 1000, 130))
            line = json.dumps({"src": f"{record} {text}", "tgt": "yes"}) + "\n"
            record, written = record + 1, written + len(line)
            other.write(line)
            if record <= windows * WINDOW:
                one.write(line)
    peaks = {}
    for path in (small, large):
        output = tmp_path / path.stem
        settings = {"lazy": True, "max_steps": steps, "per_device_train_batch_size": rows, "max_length": 16}
        finished(started(output, dataset_name_or_path=path, **settings))
        report = read_report(output)["result"]
        assert report["rows"] == windows * WINDOW
        peaks[path.stem] = report["peak_memory_mib"]
    more = peaks["large"] - peaks["small"]
    figures.record(
        "load", "a large file as a stream", MiB=written // MIB, records=record, MiB_at_the_peak=peaks["large"],
        MiB_more_than_of_a_small_one=more, seconds=time.monotonic() - began,
    )  # fmt: skip
    assert more <= 48


@pytest.mark.row("load", "metrics of a week, a line every two seconds, read at a resume")
def test_the_metrics_of_a_week_are_read_in_a_second(tmp_path: Path) -> None:
    """By a resume; one that has been changed by hand takes longer, since each of its lines is read as JSON to see
    whether it still is a line of the run. The lines up to the checkpoint stay."""
    lines = 300_000 if figures.WHOLE else 100_000
    limits = {"seconds_of_a_core_as_it_was": 1.0, "where_a_line_was_changed": 4.0}
    path = tmp_path / "metrics.jsonl"
    row = {
        **{"epoch": 1.5, "loss": 1.2345678901234567, "learning_rate": 4.9e-05, "grad_norm": 0.7654321098765432},
        **{"seconds": 2.034, "tokens": 12345, "target_tokens": 6789, "padding_tokens": 12, "peak_memory_mib": 4321},
    }
    journal = Journal(path)
    for step in range(1, lines + 1):
        journal.write({"step": step, **row})
        if step == lines - 10:
            state = {"step": step, "journal": journal.state(), "evaluation": {}}
    whole = path.read_bytes()
    seconds: dict[str, float] = {}
    for name, content in zip(limits, (whole, whole.replace(b"1.5", b"2.5", 1)), strict=True):
        tries = []
        for _ in range(3):
            path.write_bytes(content)
            began = time.process_time()  # other work on the machine does not count
            changed = Journal(path).rewind(state, path)
            tries.append(time.process_time() - began)
            assert (changed is None) == (content is whole)
            assert path.read_bytes() == b"".join(content.splitlines(keepends=True)[: lines - 10])
        seconds[name] = min(tries)
    case = "metrics of a week, a line every two seconds, read at a resume"
    figures.record("load", case, lines=lines, **seconds)
    assert all(seconds[name] < limit for name, limit in limits.items()), seconds
