"""What is tried in the tests of kills and signals: many kinds of runs, and what is the same whatever stops them."""

from __future__ import annotations

import json
import shutil
import signal
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from reliability.killing import IMPORTED, Ended, Runs, replayed
from sft.testing import needs, read_metrics, write_data

MODELS = Path(__file__).resolve().parents[2] / "core" / "tests" / "fixtures" / "models"


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
# Only adapters have dropout: no layer of the model families has any. Runs of all weights draw NEFTune's noise.
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


NAMES = [pytest.param(name, marks=needs(*case.needs)) for name, case in CASES.items()]


def write_records(folder: Path) -> Path:
    """The data of all cases."""
    records = [
        {"src": f"type#{('coat', 'shirt', 'dress')[n % 3]}" + "*warm" * (n % 4), "tgt": "A coat" + " for you" * (n % 5)}
        for n in range(29)
    ]
    return write_data(folder, records[:25], records[25:])


class Trial:
    """One case: its whole run, and what comes of it when it is killed."""

    def __init__(self, runs: Runs, data: Path, folder: Path, case: Case) -> None:
        self._runs, self._folder, self._case = runs, folder, case
        self.codes: Counter[int] = Counter()
        """How often the runs that were to be stopped have ended with each code."""
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
        self.codes[killed.code] += 1
        number = kill.get("number", signal.SIGKILL)
        may_be = {-number} | ({128 + number} if "number" in kill else set()) | ({0} if "after" in kill else set())
        if killed.code not in may_be:
            return [f"{what}: it ended with {killed.code}: {killed.said[-2000:]}"]
        if killed.code == 128 + number and (self._out / "run.json").exists():
            status = json.loads(report(self._out))["status"]
            ends = ("interrupted", "finished")  # by then it may be done; the comparison says whether it is
            if status not in ends and (self._case.old is None or report(self._out) != report(self._old)):
                return [f"{what}: run.json says {status}: {killed.said[-2000:]}"]
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
        if path.name.endswith(("report.html", "report.json")):  # of each run its own, and written when it has ended
            continue
        if path.is_dir():
            found[name] = None
        elif path.name == "metrics.jsonl":
            found[name] = read_metrics(path.parent, same=True)
        elif path.name == "state.json":
            found[name] = without_times(json.loads(path.read_text()))
        elif path.name == "sft.log":  # a stopped run has more to say
            found[name] = ""
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
