"""What a run is about to do, said in a few lines before its first step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from sft.data.batches import Schedule
from sft.facts import Fact, lines_of
from sft.foreign_text import shown
from sft.models.layers import held_by
from sft.training.memory import asked, device_memory

if TYPE_CHECKING:
    from sft.context import CoreRun


def tell_plan(run: CoreRun, schedule: Schedule | None) -> None:
    """Say what the run is about to do; without a ``schedule`` it only measures."""
    values = outlook(run, schedule)
    run.progress.tell("plan", values, ["plan:", *lines_of(facts(values), run.progress.width)])


def outlook(run: CoreRun, schedule: Schedule | None) -> dict[str, Any]:
    """The same as JSON values. ``data`` and ``steps`` are there where the run trains; rows, tokens and padding are
    those of the first pass, where the data is read whole."""
    trained, total = run.sizes
    values: dict[str, Any] = {
        "model": str(run.settings.model.model_name_or_path),
        "family": run.source.family.model_type,
        "parameters": total,
        "trained_parameters": trained,
        "held": held_by(run.plugins.provider("sft_quantizer"), run.model).removeprefix(", "),
        "plugins": {name: str(getattr(plugin, "summary", "")) for name, plugin in run.plugins},
        "dev": None if run.dev_data is None else {"records": len(run.dev_data), "tokens": int(run.dev_data.tokens)},
        "output_dir": str(run.output_dir),
    }
    if schedule is None:
        return values
    training, world = run.settings.training, run.strategy.data_world
    values["dev_is_asked_for"] = bool(training.do_eval or training.evaluation_strategy != "no")
    values["data"] = _data(run, schedule)
    values["steps"] = {
        "total": schedule.total_steps,
        "done": run.step,
        "passes": _passes(run, schedule),
        "rows": schedule.rows_per_step,
        "micro_batch": training.per_device_train_batch_size,
        "micro_batches": training.gradient_accumulation_steps,
        "processes": world,
        "checkpoints": _every(training.save_strategy, training.save_steps),
        "evaluations": _every(training.evaluation_strategy, run.eval_steps) if run.dev_data is not None else None,
    }
    device, memory = device_memory()
    # A plugin that was given as a class is not known to those that would have to say what it needs.
    need = None
    if not run.plugins.direct:
        need = asked(lambda hook: hook.sft_memory_need(values=run.given, device=device, memory=memory))
    values["memory"] = None if need is None else {"bytes": int(need), "of": memory, "device": device}
    return values


def _passes(run: CoreRun, schedule: Schedule) -> float | None:
    """Over the data; None where it is not read whole."""
    if run.settings.training.max_steps < 1:
        return run.settings.training.num_train_epochs
    if run.settings.data.lazy:
        return None
    return round(schedule.total_steps / -(-len(schedule.first_rows) // schedule.rows_per_step), 2)


def _every(strategy: str, steps: int) -> int | str | None:
    """After how many steps, or "epoch"; None for never."""
    return steps if strategy == "steps" else "epoch" if strategy == "epoch" else None


def _data(run: CoreRun, schedule: Schedule) -> dict[str, Any]:
    if run.settings.data.lazy:
        return {"streamed": True}
    training = run.settings.training
    rows = schedule.first_rows
    padding = padding_of(rows, training.per_device_train_batch_size, schedule.rows_per_step, run.strategy.data_world)
    return {
        "streamed": False,
        "records": len(next(schedule.data.windows()).lengths),
        "rows": len(rows),
        "tokens": int(rows.sum()),
        "padding_tokens": padding,
    }


def padding_of(rows: np.ndarray, size: int, step: int, world: int) -> int:
    """The tokens by which ``rows`` (int64 [rows], the tokens of each) are padded, where each of ``world`` processes
    takes its rows of a ``step`` in micro-batches of ``size``, and pads them to the longest of each."""
    whole = np.zeros(-(-len(rows) // step) * step, np.int64)
    whole[: len(rows)] = rows
    held = np.arange(len(whole)) < len(rows)
    # Process r has rows r, r + world, … of a step.
    form = (-1, step // (size * world), size, world)
    lengths, there = whole.reshape(form), held.reshape(form)
    return int(((lengths.max(axis=2, keepdims=True) - lengths) * there).sum())


def facts(values: dict[str, Any]) -> list[Fact]:
    """What :func:`outlook` knows, in words."""
    total, trained = values["parameters"], values["trained_parameters"]
    held = f", {values['held']}" if values["held"] else ""
    found: list[Fact] = [
        (
            "model",
            [
                f"{shown(values['model'])} ({values['family']})",
                f"{total:,} parameters, {trained:,} train ({100 * trained / total:.2f} %){held}",
            ],
        )
    ]
    if "steps" in values:
        found += [("data", [_of_data(values["data"])]), ("steps", _of_steps(values["steps"]))]
    if values["dev"] is not None:
        found.append(("dev data", [_of_dev(values)]))
    if values.get("memory") is not None:
        need, there = values["memory"]["bytes"], values["memory"]["of"]
        beside = "" if values["memory"]["device"] == "gpu" else ", beside the program and its data"
        found.append(("memory", [f"about {_size(need)} of {_size(there)} where rows are full{beside}"]))
    if values["plugins"]:
        each = [f"{name}: {shown(summary)}" if summary else name for name, summary in values["plugins"].items()]
        found.append(("plugins", each))
    return [*found, ("written to", [values["output_dir"]])]


def _of_data(data: dict[str, Any]) -> str:
    if data["streamed"]:
        return "streamed, so its rows are not known beforehand"
    padding = data["padding_tokens"]
    share = 100 * padding / max(1, data["tokens"] + padding)
    return (
        f"{data['records']:,} records in {data['rows']:,} rows a pass, {data['tokens']:,} tokens and about "
        f"{share:.1f} % padding"
    )


def _of_steps(steps: dict[str, Any]) -> list[str]:
    parts = [f"{count:,}" for count in (steps["processes"], steps["micro_batches"], steps["micro_batch"])]
    product = f" ({' x '.join(parts[parts[0] == '1' :])})" if steps["rows"] > 1 else ""
    passes = "" if steps["passes"] is None else f", {steps['passes']:g} pass{'es' * (steps['passes'] != 1)}"
    done = f", of which {steps['done']:,} are done" if steps["done"] else ""
    lines = [f"{steps['total']:,}{done}{passes}; {steps['rows']:,} row{'s' * (steps['rows'] > 1)} a step{product}"]
    for what, name in (("an evaluation", "evaluations"), ("a checkpoint", "checkpoints")):
        every = steps[name]
        if every is not None:
            lines.append(f"{what} every {'pass' if every == 'epoch' else f'{every:,} steps' if every > 1 else 'step'}")
    return lines


def _of_dev(values: dict[str, Any]) -> str:
    dev = values["dev"]
    counts = f"{dev['records']:,} records, {dev['tokens']:,} tokens"
    if "steps" not in values:
        return counts
    hint = "" if values["dev_is_asked_for"] else " (do_eval false leaves that out)"
    return f"{counts}, measured before and after training{hint}"


def _size(size: float) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**28 else f"{size / 2**20:.1f} MiB"
