"""Checkpoints: everything a run needs to go on as if it had never stopped, in safetensors and JSON.

``checkpoint-N/`` holds what a user would load (the adapter in PEFT layout, or the whole model) and, in
``trainer/``, what resuming needs: the trainable parameters bit by bit (``trainable.safetensors``, where what
is exported is an adapter), the optimizer's state and plugins' arrays by structured names, and ``state.json``.
Randomness has no hidden state: every draw is a function of the seed and the step number, both of which are in
``state.json``, as is the position in the data. The folder appears complete or not at all.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sft.errors import UsageError
from sft.files import remove_folder, save_tensors, staged_folder, write_json

if TYPE_CHECKING:
    from sft.running import Run
    from sft.training.optimizer import Optimizer

FORMAT = 2
_KEYS = (
    *("date", "step", "epoch", "seed", "data", "loss_scale", "journal", "before", "evaluation", "best", "settings"),
    *("shaping", "plugins"),
)
_NAME = re.compile(r"checkpoint-(\d+)")


def checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoints of a run directory, oldest step first."""
    found = [path for path in output_dir.glob("checkpoint-*") if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=step_of)


def step_of(folder: Path) -> int:
    """The step after which ``checkpoint-N`` was written."""
    return int(folder.name.rpartition("-")[2])


def asks_to_resume(request: bool | str | None) -> bool:
    """Whether ``--resume_from_checkpoint`` asks for anything."""
    return bool(request) and str(request).lower() != "false"


def find_checkpoint(request: bool | str | None, output_dir: Path) -> Path | None:
    """What ``--resume_from_checkpoint`` asks for; None is a fresh start. Raises :class:`UsageError`."""
    if not asks_to_resume(request):
        return None
    if str(request).lower() in ("auto", "true"):
        found = checkpoints(output_dir)
        return found[-1] if found else None
    path = Path(str(request)).expanduser()
    if not (path / "trainer" / "state.json").is_file():
        raise UsageError(
            f"{path} is not a checkpoint of sft (no trainer/state.json); give a checkpoint-N folder or auto."
        )
    return path


def read_state(folder: Path) -> dict[str, Any]:
    """``state.json`` of a checkpoint."""
    path = folder / "trainer" / "state.json"
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read ({error}); resume from another checkpoint.") from error
    if not isinstance(state, dict) or "format" not in state:
        raise UsageError(f"{path} is not the state of a run; resume from another checkpoint.")
    if state["format"] != FORMAT:
        raise UsageError(f"{folder} was written by another version of sft (format {state['format']}).")
    if not set(_KEYS) <= set(state):
        raise UsageError(f"{path} is not complete; resume from another checkpoint.")
    return state


def save(run: Run, optimizer: Optimizer, state: dict[str, Any]) -> Path:
    """Write ``checkpoint-N`` for ``state["step"]`` and drop the oldest ones beyond ``save_total_limit``; the best one
    stays where the run is to end with it."""
    folder = run.output_dir / f"checkpoint-{state['step']}"
    if folder.exists():  # left from a run that this one has rewound past
        remove_folder(folder)
    with staged_folder(folder) as staging:
        run.write_result(staging)
        trainer = staging / "trainer"
        trainer.mkdir()
        if run.exports_adapter:
            values = {name: parameter.numpy() for name, parameter in optimizer.parameters.items()}
            save_tensors(trainer / "trainable.safetensors", values)
        save_tensors(trainer / "optimizer.safetensors", optimizer.state())
        plugins, arrays = _plugin_state(run)
        save_tensors(trainer / "plugins.safetensors", arrays)
        write_json(trainer / "state.json", {"format": FORMAT, **state, "plugins": plugins})
    limit = run.settings.training.save_total_limit
    keeps = run.best["step"] if run.settings.training.load_best_model_at_end and run.best else None
    for old in checkpoints(run.output_dir)[:-limit] if limit else []:
        if step_of(old) != keeps:
            remove_folder(old)
    run.hook.sft_checkpoint_saved(run=run, folder=folder)
    return folder


def load(run: Run, optimizer: Optimizer, folder: Path, state: dict[str, Any]) -> None:
    """Put parameters, optimizer state and plugin state back. The model has been built and adapted."""
    load_model(run, optimizer.parameters, folder, state)
    optimizer.load(_read(folder / "trainer" / "optimizer.safetensors"))


def load_model(run: Run, parameters: dict[str, Any], folder: Path, state: dict[str, Any]) -> None:
    """Put the model back as it was: its trainable ``parameters`` by name, and plugin state."""
    from sft.models.loading import fill

    trainer = folder / "trainer"
    if run.exports_adapter:
        _load_trainable(parameters, _read(trainer / "trainable.safetensors"), folder)
    else:
        fill(run.model, replace(run.source, folder=folder))
    arrays = _read(trainer / "plugins.safetensors")
    for name in run.plugins.names:
        own = {key.partition("/")[2]: value for key, value in arrays.items() if key.startswith(f"{name}/")}
        own.update(state["plugins"].get(name, {}))
        if own:
            run.plugins.ask(name, "sft_restore", run=run, state=own)


def _read(path: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    try:
        return load_file(str(path))
    except Exception as error:
        raise UsageError(f"{path} cannot be read ({error}); resume from another checkpoint.") from error


def _load_trainable(parameters: dict[str, Any], values: dict[str, np.ndarray], folder: Path) -> None:
    for name in sorted(set(values) | set(parameters)):
        shapes = [list(x[name].shape) if name in x else "none" for x in (values, parameters)]
        if shapes[0] != shapes[1]:
            raise UsageError(
                f"{folder} was trained with other parameters ({name}: {shapes[0]} there, {shapes[1]} in this run); "
                "resume with the plugins and settings of that run."
            )
    for name, parameter in parameters.items():
        parameter.set_value(values[name])


def _plugin_state(run: Run) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    plain: dict[str, Any] = {}
    arrays: dict[str, np.ndarray] = {}
    for name in run.plugins.names:
        for key, value in (run.plugins.ask(name, "sft_state", run=run) or {}).items():
            if isinstance(value, np.ndarray):
                arrays[f"{name}/{key}"] = value
            else:
                plain.setdefault(name, {})[key] = value
    return plain, arrays
