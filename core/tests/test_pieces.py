"""Optimizer state in pieces: whatever the division under which it was written, it is read whole, and in any other."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
from safetensors.numpy import load_file

import sft
from sft.distributed.parts import Part
from sft.distributed.pieces import Piece, SavedState, save_pieces
from sft.training import checkpoint

SHAPES = {"linear": (6, 8), "norm": (7,), "table": (12, 5)}
KINDS = ("moment1", "moment2", "beta1_pow_acc")
GRAINS = {"beta1_pow_acc": 0}
DIVIDED = {"linear": 1, "table": 0}
"""Along which dimension tensor parts are cut; the norm is whole in each."""


@pytest.fixture
def state() -> dict[str, np.ndarray]:
    """The state of the whole model: every value another one."""
    found, last = {}, 0
    for name, shape in SHAPES.items():
        for kind in KINDS:
            size = 1 if kind.endswith("_pow_acc") else int(np.prod(shape))
            found[f"{name}.{kind}"] = np.arange(last, last + size, dtype=np.float32).reshape(
                (1,) if kind.endswith("_pow_acc") else shape
            )
            last += size
    return found


def division(tensor: int, flat: int) -> Iterator[tuple[str, dict[str, Piece], dict[str, int]]]:
    """Of each process: its file, the pieces it steps, and their lengths, those of the last one with padding."""
    for rank in range(tensor * flat):
        pieces, lengths = {}, {}
        for name, shape in SHAPES.items():
            cut = tensor > 1 and name in DIVIDED
            part = Part(shape, DIVIDED[name] if cut else 0, rank % tensor if cut else 0, tensor if cut else 1)
            size = int(np.prod(shape)) // part.count
            lengths[name] = -(-size // flat)
            bounds = [min(size, place * lengths[name]) for place in (rank // tensor, rank // tensor + 1)]
            pieces[name] = Piece(part, *bounds, written=cut or rank % tensor == 0)
        yield f"optimizer-{rank}", pieces, lengths


def stepped(state: dict[str, np.ndarray], pieces: dict[str, Piece], lengths: dict[str, int]) -> dict[str, np.ndarray]:
    """What one process has of the state, cut by hand: flat, and with padding that must not be written."""
    found = {}
    for key, whole in state.items():
        name = key.partition(".")[0]
        if key.endswith("_pow_acc"):
            found[key] = whole
            continue
        piece, padded = pieces[name], np.full(lengths[name], -1, np.float32)
        part = np.split(whole, piece.part.count, piece.part.axis)[piece.part.index] if piece.part.count > 1 else whole
        values = part.reshape(-1)[piece.start : piece.stop]
        padded[: len(values)] = values
        found[key] = padded
    return found


def write(folder: Path, state: dict[str, np.ndarray], tensor: int, flat: int) -> None:
    for file, pieces, lengths in division(tensor, flat):
        save_pieces(folder / f"{file}.safetensors", stepped(state, pieces, lengths), pieces, GRAINS)


@pytest.mark.parametrize("before", [(1, 1), (2, 1), (1, 3), (2, 2), (2, 5)], ids=str)
def test_what_is_written_in_pieces_is_read_under_any_division(
    tmp_path: Path, state: dict[str, np.ndarray], before: tuple[int, int]
) -> None:
    """``before`` and afterwards: parts along a dimension, and flat pieces of these."""
    write(tmp_path, state, *before)
    saved = SavedState(tmp_path, "optimizer", GRAINS)
    assert set(saved) == set(state)
    for key, whole in state.items():
        np.testing.assert_array_equal(saved.whole(key), whole, strict=True)
    for after in ((1, 1), (2, 1), (1, 4), (2, 3)):
        for _, pieces, lengths in division(*after):
            for key, expected in stepped(state, pieces, lengths).items():
                found = saved.piece(key, pieces[key.partition(".")[0]], expected.shape)
                np.testing.assert_array_equal(found, np.where(expected == -1, 0, expected), strict=True)


def test_a_piece_is_given_in_the_shape_of_what_is_stepped(tmp_path: Path, state: dict[str, np.ndarray]) -> None:
    """As tensor parallelism alone has it: a matrix."""
    write(tmp_path, state, 2, 3)
    half = Piece(Part((6, 8), 1, 1, 2), 0, 24)
    found = SavedState(tmp_path, "optimizer", GRAINS).piece("linear.moment2", half, (6, 4))
    np.testing.assert_array_equal(found, state["linear.moment2"][:, 4:], strict=True)


def test_each_value_is_written_once_and_no_padding(tmp_path: Path, state: dict[str, np.ndarray]) -> None:
    write(tmp_path, state, 2, 5)
    found = [load_file(path) for path in sorted(tmp_path.iterdir())]
    assert len(found) == 10
    for key, whole in state.items():
        values = np.concatenate([tensors[key].reshape(-1) for tensors in found if key in tensors])
        if not key.endswith("_pow_acc"):
            assert sorted(values) == sorted(whole.reshape(-1))


@pytest.mark.parametrize(("lost", "lacking"), [(3, ["linear", "table"]), (4, ["linear", "norm", "table"])])
def test_a_missing_file_is_noticed(tmp_path: Path, state: dict[str, np.ndarray], lost: int, lacking: list[str]) -> None:
    """Process 3 writes no norm: it has the same as process 2."""
    write(tmp_path, state, 2, 5)
    (tmp_path / f"optimizer-{lost}.safetensors").unlink()
    saved = SavedState(tmp_path, "optimizer", GRAINS)
    for name in SHAPES:
        key = f"{name}.moment2"
        if name not in lacking:
            np.testing.assert_array_equal(saved.whole(key), state[key])
            continue
        with pytest.raises(sft.UsageError, match=rf"lacks pieces of {key} \(\d+ of \d+ values\); a process's file is"):
            saved.whole(key)


def test_no_file_and_a_cut_off_file_are_named(tmp_path: Path, state: dict[str, np.ndarray]) -> None:
    with pytest.raises(sft.UsageError, match=r"has no optimizer\.safetensors; resume from another checkpoint"):
        SavedState(tmp_path, "optimizer", GRAINS)
    write(tmp_path, state, 2, 1)
    path = tmp_path / "optimizer-1.safetensors"
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(sft.UsageError, match=r"optimizer-1\.safetensors cannot be read \(.*\); resume from another"):
        SavedState(tmp_path, "optimizer", GRAINS)


# --- a checkpoint of two processes --------------------------------------------------------------------------


class Process:
    """A strategy whose processes are threads, and what its steps have of ``state``: a half of each tensor."""

    values: ClassVar[dict[int, float]] = {}

    def __init__(self, rank: int, barrier: threading.Barrier, state: dict[str, np.ndarray]) -> None:
        self.is_main, self._rank, self._barrier = rank == 0, rank, barrier
        _, self._pieces, lengths = list(division(1, 2))[rank]
        self.state = stepped(state, self._pieces, lengths)

    def parameters(self, model: Any) -> list[Any]:
        return []

    def whole(self, parameters: Any) -> Iterator[Any]:
        return iter(())

    def assembled(self, model: Any) -> Any:
        return contextlib.nullcontext()

    def pieces(self, stepped: Any) -> dict[str, Piece]:
        return self._pieces

    def own_file(self, stem: str) -> str:
        return f"{stem}-{self._rank}"

    def largest(self, value: float) -> float:
        Process.values[self._rank] = value
        self.wait()
        found = max(Process.values.values())
        self.wait()  # before the next one is put there
        return found

    def wait(self) -> None:
        self._barrier.wait(timeout=20)


def test_two_processes_write_one_checkpoint(
    tmp_path: Path, state: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each its half of the optimizer's state, one of them all the rest; ``checkpoint-2`` is there when all have. Either
    is slow once, so that the other would be too early if it did not wait."""
    barrier, told = threading.Barrier(2), []

    def run_of(rank: int) -> tuple[Any, Any]:
        strategy = Process(rank, barrier, state)
        training = SimpleNamespace(save_total_limit=1, load_best_model_at_end=False)
        hook = SimpleNamespace(sft_checkpoint_saved=lambda run, folder: told.append((rank, sorted(contents(folder)))))
        run = SimpleNamespace(
            **{"strategy": strategy, "output_dir": tmp_path, "model": None, "exports_adapter": True, "hook": hook},
            settings=SimpleNamespace(training=training),
            taken=1,
            check_lock=lambda: None,
            keep_folder=lambda: None,
            plugins=SimpleNamespace(names=["counter"], ask=lambda name, hook, run: {"count": rank}),
        )
        return run, SimpleNamespace(
            state=lambda: (late(0.1 * (rank == 1)), strategy.state)[1], parameters={}, grains=GRAINS
        )

    def late(seconds: float) -> bool:
        time.sleep(seconds)
        return seconds > 0

    def write_result(run: Any, folder: Path | None) -> dict[str, np.ndarray]:
        if folder is not None:
            late(0.4)
            (folder / "adapter").write_text("whole")
        return {}

    monkeypatch.setattr(checkpoint, "write_result", write_result)

    def contents(folder: Path) -> set[str]:
        return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}

    (tmp_path / "checkpoint-1").mkdir()
    with ThreadPoolExecutor(2) as pool:
        runs = [run_of(rank) for rank in range(2)]
        done = [pool.submit(checkpoint.save, run, optimizer, {"step": 2}) for run, optimizer in runs]
        folders = [one.result(timeout=30) for one in done]
    trainer = ("optimizer-0", "optimizer-1", "plugins")
    files = {
        "adapter",
        "trainer/manifest.json",
        "trainer/state.json",
        *(f"trainer/{name}.safetensors" for name in trainer),
    }
    assert folders == [tmp_path / "checkpoint-2"] * 2
    assert told == [(0, sorted(files))]
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
    written = json.loads((folders[0] / "trainer" / "state.json").read_text())
    assert (written["step"], written["plugins"]) == (2, {"counter": {"count": 0}})
    saved = SavedState(folders[0] / "trainer", "optimizer", GRAINS)
    for key, whole in state.items():
        np.testing.assert_array_equal(saved.whole(key), whole, strict=True)
