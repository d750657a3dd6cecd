"""The figures of a run over its steps, from the lines of ``metrics.jsonl``."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from sft.run_report.value import Curve, Moments
from sft.settings.best_metric import ANSWER_SCORES
from sft.training.steps_file import StepFigures

MOST_POINTS = 2000
"""Points of a curve. Of more the lowest and the highest of each stretch are kept, so that no spike is lost."""
_TRAIN = {"loss": "loss", "learning_rate": "learning_rate", "grad_norm": "grad_norm", "peak_memory_mib": "memory_mib"}
_DEV = {"eval_loss": "loss", "eval_accuracy": "accuracy", "eval_objective": "objective"}
EACH = "each step"
_COUNTED = ("tokens", "padding_tokens", "seconds")


def moments_of(lines: Sequence[dict[str, Any]]) -> Moments:
    """When the logged steps were made."""
    found, tokens, seconds = Moments(), 0, 0.0
    for line in lines:
        if "loss" in line and line["step"] > (found.steps[-1] if found.steps else 0):
            tokens += int(number_of(line.get("tokens")) or 0)
            seconds += number_of(line.get("seconds")) or 0.0
            found.steps.append(line["step"])
            found.epochs.append(number_of(line.get("epoch")) or 0.0)
            found.tokens.append(tokens)
            found.seconds.append(round(seconds, 3))
    return found


def curves_of(lines: Sequence[dict[str, Any]], each: StepFigures | None = None) -> list[Curve]:
    """Every figure that the lines have, in the order in which it is drawn; and where not every step has a line, loss
    and gradient norm of ``each`` step that was taken."""
    found: dict[tuple[str, str], tuple[list[int], list[float]]] = {}

    def add(chart: str, name: str, step: int, value: Any) -> None:
        number = number_of(value)
        if number is not None:
            steps, values = found.setdefault((chart, name), ([], []))
            if not steps or step > steps[-1]:  # a line that is there twice
                steps.append(step)
                values.append(number)

    for line in lines:
        step = line["step"]
        if "eval_loss" in line:
            for key, chart in _DEV.items():
                add(chart, "dev", step, line.get(key))
            sets = line.get("eval_sets")
            for name, one in sets.items() if isinstance(sets, dict) else ():
                for key, chart in _DEV.items():
                    add(chart, f"dev {name}", step, one.get(key) if isinstance(one, dict) else None)
            for score in ANSWER_SCORES:
                add("answers", score, step, line.get(f"eval_{score}"))
        else:
            for key, chart in _TRAIN.items():
                add(chart, "train", step, line.get(key))
            tokens, padding, seconds = (number_of(line.get(key)) for key in _COUNTED)
            if tokens and seconds:
                add("tokens_per_second", "train", step, tokens / seconds)
            if tokens is not None and padding is not None and tokens + padding:
                add("padding", "train", step, padding / (tokens + padding))
        of = "dev" if "eval_loss" in line else "train"
        for key, value in line.items():
            if "/" in key:
                add(key.removeprefix("eval_"), of, step, value)
    logged = len(found.get(("loss", "train"), ([], []))[0])
    if each is not None and (taken := each.taken).sum() > logged:
        steps = (taken.nonzero()[0] + 1).tolist()
        found["loss", EACH] = steps, each.loss[taken].tolist()
        found["grad_norm", EACH] = steps, each.grad_norm[taken].tolist()
    first = [*dict.fromkeys(_TRAIN.values()), "tokens_per_second", "padding", *_DEV.values(), "answers"]
    order = {chart: number for number, chart in enumerate(dict.fromkeys(first))}
    names = sorted(
        found, key=lambda one: (order.get(one[0], len(order)), one[0] if "/" in one[0] else "", one[1] != "train")
    )
    return [Curve(*name, *thinned(*found[name])) for name in names]


def thinned(steps: list[int], values: list[float], most: int = MOST_POINTS) -> tuple[list[int], list[float]]:
    """At most ``most`` points and two: of more, the lowest and the highest of each of equal stretches, with the first
    and the last point."""
    if len(steps) <= most:
        return steps, values
    size = math.ceil(2 * len(steps) / most)
    kept = {0, len(steps) - 1}
    for start in range(0, len(steps), size):
        stretch = range(start, min(start + size, len(steps)))
        kept |= {min(stretch, key=values.__getitem__), max(stretch, key=values.__getitem__)}
    chosen = sorted(kept)
    return _taken(steps, chosen), _taken(values, chosen)


def _taken(values: Sequence[Any], chosen: Iterable[int]) -> list[Any]:
    return [values[number] for number in chosen]


def number_of(value: Any) -> float | None:
    """A finite number; None for anything else."""
    is_one = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    return float(value) if is_one else None
