"""Checkpoints: everything a run needs to go on as if it had never stopped, in safetensors and JSON.

``checkpoint-N/`` holds what a user would load (the adapter in PEFT layout, or the whole model) and, in
``trainer/``, what resuming needs beside it: the optimizer's state (in pieces, where several processes share the run),
plugins' arrays, ``state.json``, and ``manifest.json``, by which damage is noticed. Trainable parameters come back bit
by bit: from the adapter's file, where ``state.json`` says at which place of it they are, and otherwise from
``trainable.safetensors``. It resumes on any number of processes, however they divide the model.
Randomness has no hidden state: every draw is a function of the seed and the step number, both of which are in
``state.json``, as is the position in the data. The folder appears complete or not at all.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sft.distributed.parts import is_elsewhere, whole_shape
from sft.distributed.pieces import SavedState, save_pieces
from sft.errors import PluginError, UsageError
from sft.files import can_write, remove_folder, save_tensors, staged_folder, staging_of, sync, write_json
from sft.plugins.calls import a_or_an
from sft.training.checkpoint_folder import FORMAT, checkpoints, step_of
from sft.training.divergence import check_finite, last_good
from sft.training.held_once import find_places, take
from sft.training.manifest import write_manifest
from sft.training.result import write_result
from sft.training.shared import shared
from sft.training.steps_file import NAME as STEPS

if TYPE_CHECKING:
    from sft.context import CoreRun
    from sft.optimizer import Optimizer
    from sft.seams import ParallelStrategy

OPTIMIZER = "optimizer"


def save(run: CoreRun, optimizer: Optimizer, state: dict[str, Any]) -> Path:
    """Write ``checkpoint-N`` for ``state["step"]`` and drop the oldest ones beyond ``save_total_limit``, as
    :func:`drop_old` does. Weights that are not finite are an :class:`SftError` before anything changes.

    Where several processes share the run each writes its part of the optimizer's state, and the main one the rest.
    """
    check_finite(run, optimizer)
    run.check_lock()
    strategy = run.strategy
    folder = run.output_dir / f"checkpoint-{state['step']}"
    with contextlib.ExitStack() as staged:
        trainable = [(name, p) for name, p in strategy.parameters(run.model) if not p.stop_gradient]
        values = {name: p.numpy() for name, p in strategy.whole(trainable)} if run.exports_adapter else {}
        with strategy.assembled(run.model):
            shared(strategy, lambda: _write_whole(run, folder, staged, values, state))
        own = staging_of(folder) / "trainer" / f"{strategy.own_file(OPTIMIZER)}.safetensors"
        pieces = strategy.pieces(optimizer.parameters)
        shared(strategy, lambda: save_pieces(own, optimizer.state(), pieces, optimizer.grains))
        shared(strategy, lambda: _close(run, folder, staged))
    drop_old(run, state["step"])
    if strategy.is_main:
        run.hook.sft_checkpoint_saved(run=run, folder=folder)
    return folder


def _write_whole(
    run: CoreRun, folder: Path, staged: contextlib.ExitStack, values: dict[str, np.ndarray], state: dict[str, Any]
) -> None:
    """What the main process writes, into the staging folder of ``folder``, which gets its name as ``staged`` closes.
    The others take part."""
    if not run.strategy.is_main:
        write_result(run, None)
        return
    try:
        run.keep_folder()
        if folder.exists():  # left from a run that this one has rewound past
            remove_folder(folder)
        staging = staged.enter_context(staged_folder(folder))
    except OSError:
        write_result(run, None)  # the others wait in it
        raise
    adapter = write_result(run, staging)
    plugins, arrays = _plugin_state(run)
    trainer = staging / "trainer"
    trainer.mkdir()
    places = {}
    for kind, state_arrays in (("trainable", values), ("plugins", arrays)):
        places[kind] = find_places(adapter, state_arrays)
        remaining = {name: array for name, array in state_arrays.items() if name not in places[kind]}
        if remaining or kind == "plugins":
            save_tensors(trainer / f"{kind}.safetensors", remaining)
    write_json(trainer / "state.json", {"format": FORMAT, **state, "plugins": plugins, "in_adapter": places})


def _close(run: CoreRun, folder: Path, staged: contextlib.ExitStack) -> None:
    """All processes have written their part; the main one sees to it that it is there to stay, and names it."""
    if run.strategy.is_main:
        write_manifest(staging_of(folder))
        for name in ("metrics.jsonl", STEPS):
            if (run.output_dir / name).exists():
                sync(run.output_dir / name)  # what they hold up to now belongs to this moment
    staged.close()


def drop_old(run: CoreRun, step: int, is_end: bool = False) -> None:
    """Remove the oldest checkpoints beyond ``save_total_limit``. That of ``step`` is whole, and counts as one of them.

    It stays, and so does the best one where the run is to end with it, and, unless this ``is_end``, the newest one from
    which a step has been taken: of later ones nobody knows yet whether their weights are of any use. All processes take
    part.
    """
    limit = run.settings.training.save_total_limit
    if limit:
        shared(run.strategy, lambda: _drop_old(run, step, limit, is_end) if run.strategy.is_main else None)


def _drop_old(run: CoreRun, step: int, limit: int, is_end: bool) -> None:
    stays = {run.best["step"]} if run.settings.training.load_best_model_at_end and run.best else set()
    older = [folder for folder in checkpoints(run.output_dir) if step_of(folder) < step]
    good = None if is_end else last_good(run)
    for folder in older[: max(0, len(older) - (limit - 1))]:
        if step_of(folder) not in stays and folder != good:
            remove_folder(folder)


def restore(run: CoreRun, optimizer: Optimizer, folder: Path, state: dict[str, Any]) -> None:
    """Put parameters, optimizer state and plugin state back. The model has been built and adapted."""
    restore_model(run, folder, state, "resume")
    # In two steps: while a file is open, all that was read of it stays in memory.
    values = _optimizer_state(run, optimizer, folder)
    optimizer.load(values)


def _optimizer_state(run: CoreRun, optimizer: Optimizer, folder: Path) -> dict[str, np.ndarray]:
    """What this process updates of the optimizer's state in a checkpoint."""
    pieces = run.strategy.pieces(optimizer.parameters)
    saved = SavedState(folder / "trainer", OPTIMIZER, optimizer.grains)
    values = {}
    for key in saved:
        name, _, kind = key.rpartition(".")
        name = _todays_name(run, name)
        if name in pieces:
            values[f"{name}.{kind}"] = saved.piece(key, pieces[name], tuple(optimizer.parameters[name].shape))
    return values


def restore_model(run: CoreRun, folder: Path, state: dict[str, Any], why: str) -> None:
    """Put the model back as it was: its trainable parameters by name, and plugin state, for what ``why`` says
    (``sft_restore``)."""
    from sft.models.loading import fill
    from sft.models.source import ModelFolder

    strategy = run.strategy
    if run.exports_adapter:
        trainable = {name: p for name, p in strategy.parameters(run.model) if not p.stop_gradient}
        stored = _arrays(folder, state, "trainable")
        values = {_todays_name(run, name): value for name, value in stored.items()}
        _load_trainable(strategy, trainable, values, folder)
    else:
        fill(run.model, replace(run.source, place=ModelFolder(folder), growth=None), strategy, progress=run.progress)
    arrays = _arrays(folder, state, "plugins")
    with strategy.assembled(run.model):
        for name in run.plugins.names:
            own = {key.partition("/")[2]: value for key, value in arrays.items() if key.startswith(f"{name}/")}
            own.update(state["plugins"].get(name, {}))
            if own:
                run.plugins.ask(name, "sft_restore", run=run, state=own, why=why, step=state["step"])


def _todays_name(run: CoreRun, name: str) -> str:
    """The name of a parameter whose name in a checkpoint is ``name``: the first ones had PaddleNLP's."""
    renamed: str = run.source.family.from_file(name, "paddle")
    return renamed


def _arrays(folder: Path, state: dict[str, Any], kind: str) -> dict[str, np.ndarray]:
    """The arrays of a ``kind`` ("trainable" or "plugins") of a checkpoint, from its own file and the adapter's."""
    path, places = folder / "trainer" / f"{kind}.safetensors", state.get("in_adapter", {}).get(kind, {})
    arrays = _read(path) if kind == "plugins" or path.exists() else {}
    if places:
        path = folder / "adapter_model.safetensors"
        adapter = _read(path)
        try:
            arrays.update({name: take(adapter, place) for name, place in places.items()})
        except KeyError as error:
            raise UsageError(f"{path} has no tensor {error}; resume from another checkpoint.") from error
    return arrays


def _read(path: Path) -> dict[str, np.ndarray]:
    import ml_dtypes  # noqa: F401  (teaches numpy bfloat16)
    from safetensors.numpy import load_file

    try:
        return load_file(str(path))
    except MemoryError:
        raise
    except Exception as error:
        raise UsageError(f"{path} cannot be read ({error}); resume from another checkpoint.") from error


def _load_trainable(
    strategy: ParallelStrategy, parameters: dict[str, Any], values: dict[str, np.ndarray], folder: Path
) -> None:
    for name in sorted(set(values) | set(parameters)):
        there = list(values[name].shape) if name in values else "none"
        here = list(whole_shape(parameters[name])) if name in parameters else "none"
        if there != here:
            raise UsageError(
                f"{folder} was trained with other parameters ({name}: {there} there, {here} in this run); "
                "resume with the plugins and settings of that run."
            )
        if not _is_learned(values[name]):
            raise UsageError(
                f"{folder} holds values as {name} that no training writes ({values[name].dtype}, or not finite); "
                "resume from another checkpoint."
            )
    for name, parameter in parameters.items():
        if not is_elsewhere(parameter):
            strategy.store(parameter, values[name].__getitem__)


def _is_learned(value: np.ndarray) -> bool:
    """Whether these can be weights that trained: real numbers, and finite."""
    import ml_dtypes

    return value.dtype in (np.float32, np.float16, ml_dtypes.bfloat16) and bool(np.isfinite(value).all())


def check_plugin_state(run: CoreRun) -> None:
    """Ask for plugins' state before the first step, so that what no checkpoint could hold does not cost a training."""
    with run.strategy.assembled(run.model):
        if run.strategy.is_main:
            _plugin_state(run)


def _plugin_state(run: CoreRun) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    plain: dict[str, Any] = {}
    arrays: dict[str, np.ndarray] = {}
    for name in run.plugins.names:
        for key, value in (run.plugins.ask(name, "sft_state", run=run) or {}).items():
            wrong = _not_kept({key: None}) or _not_kept(value)
            if wrong is not None:
                raise PluginError(
                    f"{run.plugins.who(name)} answers sft_state with {wrong} under {key!r}, which a checkpoint cannot "
                    "keep; give JSON values and numpy arrays, or leave the plugin out."
                )
            if isinstance(value, np.ndarray):
                arrays[f"{name}/{key}"] = value
            else:
                plain.setdefault(name, {})[key] = value
    return plain, arrays


def _not_kept(value: Any, above: tuple[int, ...] = ()) -> str | None:
    """The kind of what in ``value`` would not come back from JSON, or from a file of tensors, as it was; ``above`` are
    the ids of what it lies in."""
    if isinstance(value, np.ndarray):
        numbers = value.dtype.kind in "biuf" or (value.dtype.kind == "V" and value.dtype.names is None)  # bfloat16
        return None if numbers and can_write(value.dtype) else f"an array of {value.dtype}"
    if isinstance(value, str):
        return None if _is_text(value) else f"text that is not Unicode ({value!r})"
    if value is None or isinstance(value, (int, float)):
        return None
    if not isinstance(value, (dict, list)):
        return a_or_an(type(value).__name__)
    if id(value) in above:
        return f"a {type(value).__name__} that holds itself"
    if isinstance(value, dict):
        for key in value:
            if not (isinstance(key, str) and _is_text(key)):
                return f"the key {key!r}"
    for item in value.values() if isinstance(value, dict) else value:
        if isinstance(item, np.ndarray):
            return f"an array in a {type(value).__name__}"
        wrong = _not_kept(item, (*above, id(value)))
        if wrong is not None:
            return wrong
    return None


def _is_text(value: str) -> bool:
    """Whether it can be written: half of a surrogate pair cannot."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
