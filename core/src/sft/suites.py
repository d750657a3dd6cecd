"""What a plugin promises by being one, tried with small runs: the checks of ``sft.testing.suite``, each of which raises
:class:`AssertionError` with a sentence about what is not kept.

``train`` is the fixture of ``sft.testing``; ``settings`` are given to every run.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import sft
from sft.conformance import forward
from sft.inference.merge import merge
from sft.inference.open import load_for_inference
from sft.kit.validate import validated
from sft.tensor_files import read_tensors
from sft.training.journal import read_metrics

Train = Callable[..., sft.Summary]
CLOSE = 2e-5
"""How far logits of the same weights may lie apart, of the largest: float32 summed in another order."""


def check_declared(plugin: str) -> None:
    """What the plugin declares holds: ``sft plugins validate``."""
    for findings in validated(plugin):
        faults = "; ".join(f"{check}: {text}" for check, text in findings.faults)
        assert not faults, f"Plugin {plugin} does not hold what it declares. {faults}"


def check_resumes(train: Train, /, **settings: Any) -> None:
    """A run that stops and goes on measures and learns, to the bit, what one does that is not stopped."""
    settings = {**settings, "max_steps": 4, "save_strategy": "steps", "save_steps": 2, "logging_steps": 1}
    whole = train("whole", **settings)
    again = train("resumed", **settings, resume_from_checkpoint=str(whole.output_dir / "checkpoint-2"))
    expected, found = (read_metrics(one.output_dir, same=True) for one in (whole, again))
    later = [line for line in expected if line["step"] > 2]
    assert found[-len(later) :] == later, f"A resumed run measures {found}, and the whole one {expected}."
    check_same_result(whole.output_dir, again.output_dir, "A run that was resumed")


def check_same_result(expected: Path, found: Path, who: str) -> None:
    """Two run directories hold the same tensors, to the bit; ``who`` begins the sentence where they do not."""
    ours, theirs = _tensors(found), _tensors(expected)
    assert ours.keys() == theirs.keys(), f"{who} writes other tensors: {sorted(ours.keys() ^ theirs.keys())}."
    for name, value in theirs.items():
        assert np.array_equal(ours[name], value), f"{who} has learned another {name}."


def check_changes_nothing(train: Train, plugin: str, /, **settings: Any) -> None:
    """A run learns and measures, to the bit, what it does without the plugin."""
    alone = {**settings, "plugin": [name for name in settings["plugin"] if name != plugin]}
    alone = {name: value for name, value in alone.items() if not name.startswith(f"{plugin.replace('-', '_')}_")}
    without, beside = train("without", **alone), train("with", **settings)
    expected, found = (read_metrics(one.output_dir, same=True) for one in (without, beside))
    assert found == expected, f"With {plugin} a run measures other numbers."
    check_same_result(without.output_dir, beside.output_dir, f"A run with {plugin}")


def check_reloads(train: Train, base: Path, plugin: str, by_name: bool = True, /, **settings: Any) -> None:
    """An adapter that is read again, and one that is merged, compute what the trained model computes. ``by_name``: the
    reader is asked for by its name, and not found by what the folder says."""
    requested = [plugin] if by_name else []
    found: list[tuple[np.ndarray, np.ndarray]] = []

    class Look(sft.Plugin):
        name = "look"
        api_version = 1

        @sft.hookimpl
        def sft_run_ended(self, run: sft.Run, summary: sft.Summary) -> None:
            ids = _ids(run.model)
            found.append((ids, forward(run.model, ids)))

    done = train("adapter", (Look,), **settings)
    (ids, trained), folder = found[0], done.output_dir
    untouched = forward(load_for_inference(str(base), None, _quiet)[0], ids)
    assert _apart(trained, untouched) > CLOSE, f"{plugin} has learned nothing in {done.steps} steps; train more of it."
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    for key in ("peft_type", "target_modules", "base_model_name_or_path"):
        assert config.get(key), f"adapter_config.json of {plugin} has no {key}."
    again = forward(load_for_inference(str(base), folder, _quiet, requested)[0], ids)
    assert _apart(again, trained) <= CLOSE, f"An adapter of {plugin} computes something else when it is read again."
    merged = folder.with_name("merged")
    merge(str(base), folder, merged, _quiet, requested)
    folded = forward(load_for_inference(str(merged), None, _quiet)[0], ids)
    assert _apart(folded, trained) <= CLOSE, f"A merged adapter of {plugin} computes something else."


def _quiet(text: str) -> None: ...


def _ids(model: Any) -> np.ndarray:
    """int64 [2, 16], of the model's tokens."""
    vocabulary = int(model.architecture.vocabulary)
    return np.random.default_rng(0).integers(0, vocabulary, (2, 16))


def _apart(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one - other).max() / np.abs(other).max())


def _tensors(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor of a run's result."""
    return {name: value for path in sorted(folder.glob("*.safetensors")) for name, value in read_tensors(path).items()}
