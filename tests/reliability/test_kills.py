"""``kill -9`` before, in the midst of and after every operation on files of a run, and at random moments: resumed with
``auto`` it ends with the same files, metrics and optimizer state, to the bit, as a run that nobody stopped.

The whole form makes every kill; the short form some of each kind. ``killing.py`` starts and kills the runs.
"""

from __future__ import annotations

import json
import random
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from reliability import figures
from reliability.killing import IMPORTED, Ended, Operation, Runs, replayed, started
from sft.testing import needs, read_metrics, write_data

MODELS = Path(__file__).resolve().parents[2] / "core" / "tests" / "fixtures" / "models"
MOMENTS = 200 if figures.WHOLE else 1
"""Kills of a case at random moments."""
KINDS = None if figures.WHOLE else 4
"""Kills of one process of a case at operations, each of another kind; None is all of them."""
pytestmark = [pytest.mark.slow, pytest.mark.timeout(7200 if figures.WHOLE else 240)]


@dataclass(frozen=True)
class Case:
    settings: dict[str, Any]
    needs: tuple[str, ...] = ()
    ranks: int = 1
    old: dict[str, Any] | None = None
    """The settings of a finished run that is in the folder before."""
    facts: dict[str, Any] = field(default_factory=dict)
    by_settings: dict[str, Any] = field(default_factory=lambda: {"resume_from_checkpoint": "auto"})
    """What is given to go on; None takes a setting back."""


TRAINING: dict[str, Any] = {
    "model_name_or_path": str(MODELS / "llama-tied-gqa"),
    "max_length": 48,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 1,
    "weight_decay": 0.1,
    "max_steps": 5,
    "logging_steps": 2,
    "save_strategy": "steps",
    "save_steps": 2,
    "save_total_limit": 1,
    "evaluation_strategy": "steps",
    "eval_steps": 3,
    "device": "cpu",
    "disable_tqdm": "true",
}
LORA = {"plugin": "lora", "lora_rank": 4, "lora_dropout": 0.3}
PACKED = {**LORA, "plugin": "lora,zero-padding"}
CASES = {
    "LoRA with dropout, packed": Case(PACKED, ("lora", "zero-padding")),
    "full, padded, with NEFTune": Case({"plugin": "neftune"}, ("neftune",)),
    "nf4 and PiSSA, lazy": Case(
        {**LORA, "plugin": "lora,pissa,nf4", "lazy": "true"},
        ("lora", "pissa", "nf4"),
    ),
    "overwriting another run": Case(
        {**LORA, "overwrite_output_dir": "true"},
        ("lora",),
        old={**LORA, "learning_rate": 3e-3, "save_total_limit": 2},
        by_settings={"resume_from_checkpoint": "auto", "overwrite_output_dir": None},
    ),
    "measuring alone": Case({"do_train": "false"}, by_settings={"overwrite_output_dir": "true"}),
    "a result in shards": Case({}, facts={"shard_bytes": 20_000}),
    "two ranks": Case(
        {**PACKED, "plugin": "lora,zero-padding,parallel-4d"}, ("lora", "zero-padding", "parallel-4d"), 2
    ),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    with started(tmp_path_factory.mktemp("kills")) as found:
        yield found


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    records = [
        {"src": f"type#{('coat', 'shirt', 'dress')[n % 3]}" + "*warm" * (n % 4), "tgt": "A coat" + " for you" * (n % 5)}
        for n in range(29)
    ]
    return write_data(tmp_path_factory.mktemp("data"), records[:25], records[25:])


@pytest.mark.parametrize("name", [pytest.param(name, marks=needs(*case.needs)) for name, case in CASES.items()])
def test_kills(runs: Runs, data: Path, tmp_path: Path, name: str) -> None:
    trial = Trial(runs, data, tmp_path, CASES[name])
    began = time.monotonic()
    lost: list[str] = []
    count = 0
    for rank, operations in enumerate(trial.operations):
        for operation, how in chosen(operations, random.Random(f"{name} {rank}")):
            count += 1
            lost += trial.lost(f"{how} {operation}", rank=rank, kill=(operation.number, how))
    covered = sum(map(len, trial.operations))
    moments = random.Random(name)
    for _ in range(MOMENTS):
        moment = moments.uniform(0, trial.seconds)
        lost += trial.lost(f"after {moment:.3f} s", after=moment)
    figures.record(
        "kills",
        name,
        kills=count + MOMENTS,
        lost=len(lost),
        operations_covered=covered,
        random_moments=MOMENTS,
        seconds=time.monotonic() - began,
    )
    assert not lost, f"{len(lost)} of {count + MOMENTS}:\n" + "\n".join(lost)


def chosen(operations: list[Operation], draw: random.Random) -> list[tuple[Operation, str]]:
    """The kills to make, with their moments. After an operation the disk is as before the next one, but other processes
    may have gone on; a write can be made in part."""
    found = [(one, how) for one in operations for how in ("before", "within", "after")]
    found = [(one, how) for one, how in found if how != "within" or (one.kind == "write" and one.size > 1)]
    if KINDS is None:
        return found
    kinds: dict[tuple[str, str], list[tuple[Operation, str]]] = {}
    for one, how in found:
        kinds.setdefault((one.kind, how), []).append((one, how))
    return [draw.choice(kinds[kind]) for kind in draw.sample(sorted(kinds), min(KINDS, len(kinds)))]


class Trial:
    """One case: its whole run, and what comes of it when it is killed."""

    def __init__(self, runs: Runs, data: Path, folder: Path, case: Case) -> None:
        self._runs, self._folder, self._case = runs, folder, case
        self._given = {**TRAINING, "dataset_name_or_path": str(data), **case.settings}
        self._old = folder / "old"
        if case.old is not None:
            old = {**TRAINING, "dataset_name_or_path": str(data), **case.old, "output_dir": str(folder / "out")}
            ended(runs.run(old, **case.facts))
            shutil.copytree(folder / "out", self._old)
        modules = folder / "modules"
        self._prepare()
        before = tree(self._out)
        whole = ended(self._run(modules=str(modules)))
        runs.imports = [one for one in modules.read_text().split() if one.startswith(IMPORTED)]
        self._whole = snapshot(self._out)
        # Nothing went past the count, and what is changed without a call that could be counted is not there.
        self.operations = whole.by_rank
        everything = [one for each in self.operations for one in each]
        kinds = Counter(one.kind for one in everything)
        assert not {"map", "link", "symlink", "copy", "allocate"} & set(kinds), kinds
        assert replayed(everything, before) == tree(self._out), kinds
        self._prepare()
        self.seconds = ended(self._run()).seconds
        assert differences(snapshot(self._out), self._whole) == []
        assert runs.threads() == 1, "what is forked has several threads"

    @property
    def _out(self) -> Path:
        return self._folder / "out"

    def _prepare(self) -> None:
        shutil.rmtree(self._out, ignore_errors=True)
        if self._old.exists():
            shutil.copytree(self._old, self._out)

    def _run(self, changes: dict[str, Any] | None = None, **how: Any) -> Ended:
        settings = {**self._given, "output_dir": str(self._out), **(changes or {})}
        settings = {name: value for name, value in settings.items() if value is not None}
        return self._runs.run(settings, ranks=self._case.ranks, **self._case.facts, **how)

    def lost(self, what: str, **kill: Any) -> list[str]:
        """What is wrong with the run when it has been killed and goes on; empty where nothing is."""
        self._prepare()
        killed = self._run(**kill)
        if killed.code not in (-9, 0) or (killed.code == 0 and "kill" in kill):
            return [f"{what}: it was not killed but ended with {killed.code}: {killed.said[-2000:]}"]
        # Where the older run is still there, it is to be overwritten; all else goes on.
        is_old = self._case.old is not None and report(self._out) == report(self._old)
        changes = {} if is_old else self._case.by_settings
        again = self._run(changes)
        if again.code:
            return [f"{what}: it did not go on, exit code {again.code}: {again.said[-2000:]}"]
        found = snapshot(self._out)
        wrong = differences(found, self._whole)
        return [f"{what}: {', '.join(wrong)}"] if wrong else []


def ended(run: Ended) -> Ended:
    assert run.code == 0, run.said[-4000:]
    return run


def report(folder: Path) -> bytes:
    return (folder / "run.json").read_bytes()


def tree(folder: Path) -> dict[Path, None]:
    """Every path under ``folder``, itself among them if it is there."""
    return dict.fromkeys(path for path in (folder, *folder.rglob("*")) if path.exists())


TIMES = (
    "seconds",
    "eval_seconds",
    "peak_memory_mib",
    "date",
    "digest",
    "resume_from_checkpoint",
    "overwrite_output_dir",
)
"""What may differ between a run that was stopped and one that was not, in ``state.json``: times and their digest."""


def snapshot(folder: Path) -> dict[str, Any]:
    """Everything under ``folder`` that equal runs have in common, by path; a folder has None."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_dir():
            found[name] = None
        elif path.name == "metrics.jsonl":
            found[name] = read_metrics(path.parent, same=True)
        elif path.name == "state.json":
            found[name] = without_times(json.loads(path.read_text()))
        elif path.name == "run.json":
            found[name] = json.loads(path.read_text())["status"]
        elif path.name == "manifest.json":  # the state's hash is in it
            found[name] = sorted(json.loads(path.read_text())["files"])
        else:
            found[name] = path.read_bytes()
    return found


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_times(one) for key, one in value.items() if key not in TIMES}
    return value


def differences(found: Any, wanted: Any, name: str = "") -> list[str]:
    """Where the two differ, by the path in folders and JSON files."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        return [
            one
            for key in sorted({*found, *wanted})
            for one in (
                differences(found[key], wanted[key], f"{name} {key}".strip())
                if key in found and key in wanted
                else [f"{name} {key} is {'missing' if key in wanted else 'too much'}".strip()]
            )
        ]
    return [] if found == wanted else [f"{name} differs"]
