"""Damaged checkpoints: what is not as it was written is noticed, named, and passed over."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from stopped_runs import KINDS, SETTINGS, checkpoints_of, contents, stop, watching

import sft
from sft.progress import Progress
from sft.training import manifest
from sft.training.checkpoint_folder import read_checkpoint
from sft.training.manifest import damage, write_manifest

Train = Callable[..., sft.Summary]
Metrics = Callable[..., list[dict[str, Any]]]

QUIET = Progress(lambda text: None)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Something like a checkpoint."""
    found = tmp_path / "checkpoint-3"
    (found / "trainer").mkdir(parents=True)
    (found / "weights.safetensors").write_bytes(bytes(range(256)) * 3)
    (found / "trainer" / "state.json").write_text('{"step": 3}')
    write_manifest(found)
    return found


def test_it_lists_each_file_with_its_size_and_sha256(folder: Path) -> None:
    """Against digests that sha256sum gave."""
    assert json.loads((folder / "trainer" / "manifest.json").read_text()) == {
        "format": 1,
        "files": {
            "trainer/state.json": {
                "bytes": 11,
                "sha256": "a76b25b15faff287c95e28b4a43ff88d437be30fcec77d072a333b6115427769",
            },
            "weights.safetensors": {
                "bytes": 768,
                "sha256": "f3a25aa93aa2fbba28d79260535bbd6a5eb0fc1c24a8b0f04e12b484c1dfe363",
            },
        },
    }
    assert damage(folder) is None
    assert damage(folder, QUIET) is None


@pytest.mark.parametrize("name", ["weights.safetensors", "trainer/state.json", "trainer/manifest.json"])
def test_every_single_bit_counts(folder: Path, name: str) -> None:
    path = folder / name
    content = path.read_bytes()
    step = 8 if name == "trainer/manifest.json" else 307  # each byte of the manifest, in one of its bits or another
    for bit in range(0, 8 * len(content), step):
        bit += bit // 8 % 8 if step == 8 else 0
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        assert name in str(damage(folder, QUIET)) or name.endswith("manifest.json"), bit
        assert damage(folder, QUIET) is not None, bit
    path.write_bytes(content)
    assert damage(folder, QUIET) is None


@pytest.mark.parametrize(
    ("change", "clause", "is_seen_at_once"),
    [
        (lambda f: (f / "weights.safetensors").unlink(), "weights.safetensors is missing", True),
        (lambda f: (f / "weights.safetensors").write_bytes(b""), "has 0 bytes instead of 768", True),
        (lambda f: (f / "weights.safetensors").write_bytes(bytes(768)), "weights.safetensors is not what was", False),
        (lambda f: (f / "trainer/manifest.json").unlink(), "trainer/manifest.json is missing", True),
        (lambda f: (f / "trainer/manifest.json").write_text(""), "trainer/manifest.json is damaged", True),
        (lambda f: (f / "trainer/more.safetensors").write_text(""), "trainer/more.safetensors is none of its", True),
        (lambda f: shutil.rmtree(f / "trainer"), "trainer/manifest.json is missing", True),
        (lambda f: [(f / "weights.safetensors").unlink(), (f / "weights.safetensors").mkdir()], "is missing", True),
    ],
)
def test_what_is_damaged_is_named(folder: Path, change: Any, clause: str, is_seen_at_once: bool) -> None:
    change(folder)
    assert clause in str(damage(folder, QUIET))
    assert (damage(folder) is not None) == is_seen_at_once


@pytest.mark.parametrize(
    "name", ["weights.safetensors", "trainer/state.json", "trainer/manifest.json", "trainer", "more.safetensors"]
)
def test_a_link_is_none_of_its_files(folder: Path, name: str) -> None:
    """Even where what it leads to is as it was written: that may be another thing by the time that it is read."""
    away = folder.parent / "away"
    if (folder / name).exists():
        (folder / name).rename(away)
    else:
        away.write_bytes(b"")
    (folder / name).symlink_to(away)
    clause = "is none of its files" if name == "more.safetensors" else "is a link, and none of its files"
    for progress in (None, QUIET):
        assert damage(folder, progress) == f"{name} {clause}"


def test_a_file_that_nobody_reads_may_lie_beside_it(folder: Path) -> None:
    (folder / "notes.txt").write_text("the one for the paper")
    assert damage(folder, QUIET) is None


@pytest.mark.parametrize(
    "value",
    [
        *([], 3, None, {}, {"format": 1}, {"format": 2, "files": {}}, {"format": 1, "files": []}),
        *({"format": 1, "files": {"a": 3}}, {"format": 1, "files": {"a": {"bytes": 1}}}),
        *({"format": 1, "files": {name: {"bytes": 1, "sha256": "0"}}} for name in ("../a", "/etc/passwd", "", "a//b")),
        *({"format": 1, "files": {name: {"bytes": 1, "sha256": "0"}}} for name in ("a/../../b", "./a", "a\0b", "a/")),
        *({"format": 1, "files": {"a": {"bytes": size, "sha256": "0"}}} for size in ("1", 1.0, True, None)),
    ],
    ids=repr,
)
def test_no_manifest_is_trusted(folder: Path, value: Any) -> None:
    """It may come from elsewhere: nothing outside the folder is opened, and nothing but a clause comes of it."""
    text = json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    (folder / "trainer" / "manifest.json").write_text(text)
    assert damage(folder, QUIET) == "trainer/manifest.json is damaged"


# --- which checkpoint a run goes on from --------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_flipped_bit_in_any_file_is_noticed(whole: Any, tmp_path: Path, kind: dict[str, Any]) -> None:
    """And the checkpoint before is taken; asked for by its name it is refused."""
    out = shutil.copytree(whole(kind), tmp_path / "out")
    newest = out / "checkpoint-12"
    files = [path for path in newest.rglob("*") if path.is_file()]
    assert len(files) >= 8
    for path in files:
        content = path.read_bytes()
        path.write_bytes(content[:-3] + bytes([content[-3] ^ 8]) + content[-2:])
        said: list[str] = []
        found = read_checkpoint("auto", out, Progress(said.append))
        assert found is not None
        assert (found.folder, found.state["step"]) == (out / "checkpoint-9", 9)
        (line,) = said
        assert line.startswith(f"note: {newest} is damaged: ")
        assert line.endswith("; checkpoint-12 is passed over")
        assert path.relative_to(newest).as_posix() in line
        with pytest.raises(sft.UsageError, match=r"checkpoint-12 is damaged: .*resume from another checkpoint"):
            read_checkpoint(str(newest), out, QUIET)
        path.write_bytes(content)
    said = []
    newest.rename(out / "checkpoint-14")
    shutil.copy(out / "checkpoint-9" / "trainer" / "optimizer.safetensors", out / "checkpoint-3" / "trainer")
    found = read_checkpoint("auto", out, Progress(said.append))
    assert found is not None
    assert found.folder == out / "checkpoint-9"
    assert "checkpoint-14 is damaged: its state is that of step 12; " in said[-1]
    with pytest.raises(sft.UsageError, match=r"trainer/optimizer\.safetensors is not what was written"):
        read_checkpoint(str(out / "checkpoint-3"), out, QUIET)


def test_a_run_goes_on_from_the_newest_that_is_whole(
    train: Train, metrics: Metrics, whole: Any, tmp_path: Path
) -> None:
    out, steps = tmp_path / "out", []
    said: list[str] = []
    stop(train, 8, **SETTINGS)
    (out / "checkpoint-6" / "trainer" / "plugins.safetensors").write_bytes(b"")
    (out / "checkpoint-7").mkdir()
    train("out", (watching(steps),), resume_from_checkpoint="auto", say=said.append, **SETTINGS)
    assert steps == list(range(4, 14))
    passed = [line.rpartition("; ")[2] for line in said if "passed over" in line]
    assert passed == ["checkpoint-7 is passed over", "checkpoint-6 is passed over"]
    assert metrics(out, same=True) == metrics(whole(), same=True)
    assert contents(out) == contents(whole())


@pytest.mark.parametrize(
    ("sealed", "name"),
    [(True, name) for name in ("trainer/state.json", "trainer/manifest.json", "model.safetensors", "config.json")]
    + [(False, name) for name in ("trainer/state.json", "trainer/optimizer.safetensors", "model.safetensors")],
)
def test_a_checkpoint_with_a_link_is_passed_over(whole: Any, tmp_path: Path, sealed: bool, name: str) -> None:
    out = shutil.copytree(whole(), tmp_path / "out")
    newest, state = out / "checkpoint-12", out / "checkpoint-12" / "trainer" / "state.json"
    if not sealed:
        (newest / "trainer" / "manifest.json").unlink()
        state.write_text(json.dumps({**json.loads(state.read_text()), "format": 3}))
    (newest / name).rename(tmp_path / "away")
    (newest / name).symlink_to(tmp_path / "away")
    said: list[str] = []
    found = read_checkpoint("auto", out, Progress(said.append))
    assert found is not None
    assert found.folder == out / "checkpoint-9"
    assert (
        said[-1] == f"note: {newest} is damaged: {name} is a link, and none of its files; checkpoint-12 is passed over"
    )
    with pytest.raises(sft.UsageError, match="is a link, and none of its files; resume from another"):
        read_checkpoint(str(newest), out, QUIET)


def test_a_named_pipe_for_a_state_is_not_waited_for(whole: Any, tmp_path: Path) -> None:
    out = shutil.copytree(whole(), tmp_path / "out")
    (out / "checkpoint-12" / "trainer" / "manifest.json").unlink()
    (out / "checkpoint-12" / "trainer" / "state.json").unlink()
    os.mkfifo(out / "checkpoint-12" / "trainer" / "state.json")
    found = read_checkpoint("auto", out, QUIET)
    assert found is not None
    assert found.folder == out / "checkpoint-9"


def test_where_none_is_whole_nothing_is_touched(train: Train, stopped: Path) -> None:
    (stopped / "checkpoint-3" / "model.safetensors").write_bytes(b"")
    before = contents(stopped, without=())
    with pytest.raises(sft.UsageError, match=r"None of the checkpoints .*model\.safetensors has 0 bytes"):
        train(resume_from_checkpoint="auto", **SETTINGS)
    assert contents(stopped, without=()) == before


def test_one_that_cannot_be_read_is_not_passed_over(
    train: Train, stopped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be whole, and going back behind it would remove it."""
    before, digests = contents(stopped, without=()), manifest._digests

    def fails(paths: Sequence[Path], *more: Any) -> list[str]:
        if any("checkpoint-3" in str(path) for path in paths):
            raise OSError(errno.EIO, "Input/output error", str(paths[0]))
        return digests(paths, *more)

    monkeypatch.setattr(manifest, "_digests", fails)
    with pytest.raises(sft.UsageError, match=r"Input/output error\), so nobody can tell whether checkpoint-3 is whole"):
        train(resume_from_checkpoint="auto", **SETTINGS)
    assert contents(stopped, without=()) == before


def test_a_checkpoint_of_an_earlier_version_goes_on_unchecked(train: Train, whole: Any, stopped: Path) -> None:
    """And a line says so. It is no way around the check: today's have a manifest."""
    trainer, said = stopped / "checkpoint-3" / "trainer", []
    (trainer / "manifest.json").unlink()
    with pytest.raises(sft.UsageError, match=r"trainer/manifest\.json is missing"):
        train(resume_from_checkpoint="auto", **SETTINGS)
    state = json.loads((trainer / "state.json").read_text())
    del state["journal"]["digest"]
    (trainer / "state.json").write_text(json.dumps({**state, "format": 3}))
    train(resume_from_checkpoint="auto", say=said.append, **SETTINGS)
    assert [line for line in said if "damage to them would go unnoticed" in line]
    assert contents(stopped / "checkpoint-12") == contents(whole() / "checkpoint-12")


# --- which ones stay ----------------------------------------------------------------------------------------


def test_one_too_many_goes_when_a_run_goes_on(train: Train, whole: Any, tmp_path: Path) -> None:
    """It may have been killed between a save and the removal of what is beyond save_total_limit."""
    settings = {**SETTINGS, "save_total_limit": 1, "max_steps": 7}
    stop(train, 7, **settings)
    shutil.copytree(whole() / "checkpoint-3", tmp_path / "out" / "checkpoint-3")
    train("out", resume_from_checkpoint="auto", **settings)
    assert checkpoints_of(tmp_path / "out") == ["checkpoint-6"]


def test_what_was_just_written_stays_whatever_lies_beside_it(train: Train, tmp_path: Path) -> None:
    class Litter(sft.Plugin):
        name = "litter"
        api_version = 1

        @sft.hookimpl
        def sft_step_ended(self, run: sft.Run, record: dict[str, Any]) -> None:
            (run.output_dir / "checkpoint-900").mkdir(exist_ok=True)

    train("out", (Litter,), **{**SETTINGS, "save_total_limit": 1, "max_steps": 6})
    assert checkpoints_of(tmp_path / "out") == ["checkpoint-6", "checkpoint-900"]
