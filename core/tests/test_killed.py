"""Processes that end before any single operation on files: whatever is left can be read, or is refused, and can go on.

An audit hook of Python stands for the end of the process: from one operation on, none is made any more.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from stopped_runs import KINDS, LORA, SETTINGS, checkpoints_of, contents

import sft
from sft import files
from sft.files import publish
from sft.models.config import read_config
from sft.models.families.known import FAMILIES
from sft.models.shards import WeightFormat, write_tensors
from sft.models.source import ModelFolder, Weights
from sft.progress import Progress
from sft.testing import needs
from sft.training import checkpoint
from sft.training.checkpoint_folder import find_checkpoint, read_checkpoint
from sft.training.result import PUBLISHED, RESULT_KEYS

Train = Callable[..., sft.Summary]


class KilledError(BaseException):
    """Not an Exception: nothing catches it to go on."""


class Killer:
    """Counts operations that change files under ``folder``; before number ``last`` and any later one: the end."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._last, self._active = str(folder), 0, False
        self.count = 0

    def kills(self, last: int, work: Callable[[], Any]) -> bool:
        """Whether ``work`` was stopped before its operation number ``last``, from 0."""
        self.count, self._last, self._active = 0, last, True
        try:
            work()
        except KilledError:
            return True
        finally:
            self._active = False
        return self.count > last  # what came of it was caught by somebody

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self._active or event not in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link"):
            return
        if event == "open" and not isinstance(arguments[1], str) and not arguments[2] & 0o3:
            return
        if event == "open" and isinstance(arguments[1], str) and not set(arguments[1]) & set("wax+"):
            return
        if self._folder in str(arguments[0]) or event in ("os.remove", "os.rmdir"):  # rmtree names no folder
            self.count += 1
            if self.count > self._last:
                raise KilledError


_killers: dict[Path, Killer] = {}


@pytest.fixture
def killer(tmp_path: Path) -> Iterator[Killer]:
    if not _killers:
        sys.addaudithook(lambda event, arguments: [one(event, arguments) for one in _killers.values()] and None)
    _killers[tmp_path] = Killer(tmp_path)
    yield _killers[tmp_path]
    _killers[tmp_path]._active = False


# --- a result over an older one -----------------------------------------------------------------------------


def write_model(folder: Path, value: float, parts: int) -> None:
    """A folder with config and weights, all of them ``value``, in so many files."""
    tensors = {f"llama.layers.{n}.weight": np.full((8, 8), value, np.float32) for n in range(12)}
    form = WeightFormat(shard_bytes=sum(tensor.nbytes for tensor in tensors.values()) // parts)
    write_tensors(folder, iter(tensors.items()), form)
    (folder / "config.json").write_text(f'{{"value": {value}}}')
    (folder / "tokenizer.json").write_text(f"{value}")


def value_of(folder: Path) -> set[float]:
    """What a reader finds in the weights; :class:`sft.UsageError` where it refuses the folder."""
    found = {read_config(folder)["value"]}
    weights = Weights(ModelFolder(folder), FAMILIES["llama"])
    assert len(list(weights)) == 12
    return found.union(*(set(weights.read(name).ravel().tolist()) for name in weights))


def values_by_index(folder: Path) -> set[float]:
    """What a reader finds that begins with the index of shards, or with the one file, and asks for no config."""
    index = folder / "model.safetensors.index.json"
    names = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {"model.safetensors"}
    found = [load_file(folder / name) for name in names]
    return {float(value) for tensors in found for tensor in tensors.values() for value in tensor.ravel()}


@pytest.mark.parametrize(("before", "after"), [(4, 4), (4, 3), (1, 4), (4, 1), (1, 1)])
def test_no_reader_sees_a_mixture_of_two_results(tmp_path: Path, killer: Killer, before: int, after: int) -> None:
    (tmp_path / "old").mkdir()
    write_model(tmp_path / "old", 1.0, before)
    out = tmp_path / "out"

    def work() -> None:
        with publish(out, RESULT_KEYS, PUBLISHED) as staging:
            write_model(staging, 2.0, after)

    seen = []
    for operation in range(1000):
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(tmp_path / "old", out)
        killed = killer.kills(operation, work)
        try:
            (value,) = value_of(out)
        except sft.UsageError:
            value = 0.0
        seen.append(value)
        with contextlib.suppress(FileNotFoundError):
            assert len(values_by_index(out)) == 1
        if not killed:
            break
        work()
        assert value_of(out) == {2.0}
    assert killer.count > 5
    assert seen == sorted(seen, key=[1.0, 0.0, 2.0].index)  # the old one, then none, then the new one
    assert set(seen) == {1.0, 0.0, 2.0}
    assert {path.name for path in out.iterdir()} == {path.name for path in fresh(tmp_path, after).iterdir()}


@pytest.mark.parametrize(("before", "after"), [(4, 4), (1, 1)])
def test_a_reader_has_one_model_where_a_result_is_replaced(tmp_path: Path, before: int, after: int) -> None:
    """A large model is read for minutes, and a run may end meanwhile."""
    write_model(tmp_path, 1.0, before)
    weights = Weights(ModelFolder(tmp_path), FAMILIES["llama"])
    names = list(weights)
    with publish(tmp_path, RESULT_KEYS, PUBLISHED) as staging:
        write_model(staging, 2.0, after)
    for name in names:
        assert (weights.read(name) == 1.0).all()
        assert (weights.read_part(name, (slice(2), slice(None))) == 1.0).all()
    # Columns are read by the library, which opens the path.
    with pytest.raises(sft.UsageError, match=r"model.*safetensors has been replaced while it was read"):
        weights.read_part(names[0], (slice(2), slice(2)))
    assert value_of(tmp_path) == {2.0}


def fresh(folder: Path, parts: int) -> Path:
    (folder / "fresh").mkdir()
    write_model(folder / "fresh", 2.0, parts)
    return folder / "fresh"


@pytest.mark.slow
def test_a_run_killed_while_it_publishes_goes_on(
    train: Train, dataset: Path, tmp_path: Path, killer: Killer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A finished run in shards that is made longer: its folder holds the old model, none, or the new one."""
    from sft.inference.evaluate import evaluate_finished
    from sft.training import publish

    monkeypatch.setattr(WeightFormat.__init__, "__defaults__", ("hf", True, 20_000, "base"))
    settings = {**SETTINGS, "save_steps": 2, "evaluation_strategy": "no", "eval_steps": None}
    train("whole", **{**settings, "max_steps": 4})
    train("old", **{**settings, "max_steps": 2})
    assert len(list((tmp_path / "old").glob("model-*"))) > 3
    own, out = publish.publish_result, tmp_path / "out"

    def loss(folder: Path) -> float | None:
        given = {"model_name_or_path": str(folder), "dataset_name_or_path": str(dataset)}
        try:
            return float(evaluate_finished(given, None, lambda text: None)["eval_loss"])
        except sft.UsageError as error:
            if "has no config.json" not in str(error):
                raise
            return None

    old, new = loss(tmp_path / "old"), loss(tmp_path / "whole")
    seen = []
    for operation in range(0, 1000, 7):
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(tmp_path / "old", out)
        killed: list[bool] = []

        def published(run: Any, optimizer: Any, operation: int = operation, killed: list[bool] = killed) -> None:
            killed.append(killer.kills(operation, lambda: own(run, optimizer)))
            if killed[0]:
                raise KilledError

        monkeypatch.setattr(publish, "publish_result", published)
        try:
            train("out", resume_from_checkpoint="auto", **{**settings, "max_steps": 4})
        except KilledError:
            pass
        seen.append(loss(out))
        monkeypatch.setattr(publish, "publish_result", own)
        if not killed[0]:
            break
        train("out", resume_from_checkpoint="auto", **{**settings, "max_steps": 4})
        assert contents(out) == contents(tmp_path / "whole")
    assert seen == sorted(seen, key=[old, None, new].index)
    assert set(seen) == {old, None, new}


# --- checkpoints --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [KINDS[0], pytest.param(LORA, id="lora", marks=[needs("lora"), pytest.mark.slow])])
@pytest.mark.parametrize(
    "over", [pytest.param(False, id="new"), pytest.param(True, id="over a damaged one", marks=pytest.mark.slow)]
)
def test_a_save_that_is_killed_leaves_the_old_checkpoint_or_the_new_one(
    train: Train, tmp_path: Path, killer: Killer, monkeypatch: pytest.MonkeyPatch, kind: dict[str, Any], over: bool
) -> None:
    """Whole, before any operation; and what else is left goes when the run goes on."""
    own, out, before = checkpoint.save, tmp_path / "out", tmp_path / "before"
    found: list[int] = []

    def saved_at_the_end(run: Any, optimizer: Any, state: dict[str, Any]) -> None:
        own(run, optimizer, state)
        checkpoint.drop_old(run, state["step"], is_end=True)

    def killed(run: Any, optimizer: Any, state: dict[str, Any]) -> Path:
        if state["step"] == 3:
            return own(run, optimizer, state)
        if over:
            shutil.copytree(out / "checkpoint-3", out / "checkpoint-6")
        shutil.copytree(out, before)
        for operation in range(1000):
            shutil.rmtree(out)
            shutil.copytree(before, out)
            stops = killer.kills(operation, lambda: saved_at_the_end(run, optimizer, state))
            newest = read_checkpoint("auto", out, Progress(lambda text: None))
            assert newest is not None
            found.append(newest.state["step"])
            if not stops:
                break
            files.remove_leftovers(out)
            names = {path.name for path in out.iterdir()}
            assert names <= {"checkpoint-6"} | {path.name for path in before.iterdir()}
        return out / "checkpoint-6"

    monkeypatch.setattr(checkpoint, "save", killed)
    train("out", save_total_limit=1, **{**SETTINGS, **kind, "max_steps": 6})
    assert len(found) > 20
    assert found == sorted(found)
    assert set(found) == {3, 6}
    assert checkpoints_of(out) == ["checkpoint-6"]


# --- folders that stay known --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", ["measuring", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("overwriting", "measuring over"))]
)
def test_a_folder_stays_known_as_a_run(
    train: Train, tmp_path: Path, killer: Killer, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Killed before any operation of a start, it can be overwritten, and resumed where it has a checkpoint."""
    from sft.training import run_folder

    old, out = tmp_path / "old", tmp_path / "out"
    train("old", **{**SETTINGS, "max_steps": 3, "save_steps": 1})
    prepared: list[Any] = []
    own = run_folder._clear
    monkeypatch.setattr(run_folder, "_clear", lambda *arguments: prepared.append(arguments) or own(*arguments))
    over = {"overwrite_output_dir": True} if kind != "measuring" else {}
    settings = {**over, **({"do_train": False} if "measuring" in kind else {"max_steps": 1, "do_eval": False})}
    if over:
        shutil.copytree(old, out)
    train("out", **settings)
    ((run, source, record),) = prepared
    for operation in range(1000):
        shutil.rmtree(out, ignore_errors=True)
        if over:
            shutil.copytree(old, out)
        run.report = {}
        killed = killer.kills(operation, lambda: own(run, source, record))
        if over and (out / "run.json").read_bytes() != (old / "run.json").read_bytes():
            assert find_checkpoint("auto", out) is None  # what is left of the older run is not this one's
        for name, value in (("overwrite_output_dir", True), ("resume_from_checkpoint", "auto")):
            training = run.settings.training
            asked = {"overwrite_output_dir": False, "resume_from_checkpoint": None, "do_train": True, name: value}
            held = {key: getattr(training, key) for key in asked}
            for key, wanted in asked.items():
                setattr(training, key, wanted)
            run_folder.check_output(run)
            for key, wanted in held.items():
                setattr(training, key, wanted)
        if not killed:
            break
    assert killer.count > (5 if over else 1)
    assert not checkpoints_of(out)


def test_checkpoints_tell_that_a_folder_is_a_run(train: Train, tmp_path: Path) -> None:
    out = tmp_path / "out"
    settings = {**SETTINGS, "max_steps": 4}
    train("whole", **settings)
    train("out", **settings)
    for path in [out / "run.json", *out.glob("model*")]:
        path.unlink()
    with pytest.raises(sft.UsageError, match="already holds a run; choose another folder, continue it"):
        train("out", **settings)
    train("out", resume_from_checkpoint="auto", **settings)
    assert contents(out) == contents(tmp_path / "whole")
    (out / "run.json").unlink()
    train("out", overwrite_output_dir=True, max_steps=1)
    assert not checkpoints_of(out)
