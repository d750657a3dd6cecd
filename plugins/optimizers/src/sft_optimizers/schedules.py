"""Learning-rate schedules, by the formulas of transformers: a warm-up from 0 to the peak, and then each its own way."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import sft

if TYPE_CHECKING:
    from sft import Run

Rates = Callable[[int], float]


@dataclass
class WsdOptions:
    wsd_decay_steps: int = sft.option(0, "steps of the decay at the end; above 0 it overrides the ratio", minimum=0)
    wsd_decay_ratio: float = sft.option(0.1, "share of all steps that the decay takes", minimum=0, maximum=1)
    wsd_decay_type: str = sft.option("cosine", "shape of the decay", choices=("cosine", "linear", "1-sqrt"))
    wsd_min_lr_ratio: float = sft.option(0.0, "where the decay ends, as a share of the peak", minimum=0, maximum=1)


class Wsd(sft.Plugin):
    """Warm-up, a plateau, and a decay at the end (arXiv 2404.06395): to train longer, resume from a checkpoint of the
    plateau with more steps."""

    name = "wsd"
    api_version = ">=1.1,<2"
    summary = "Learning rate: warm-up, a plateau, and a decay in the last steps."
    reference = "arXiv 2404.06395"
    Options = WsdOptions
    certify = sft.Trial(settings={"wsd_decay_ratio": 0.6})  # of three steps

    @sft.hookimpl
    def sft_schedule(self, run: Run, total: int) -> Rates:
        options, training = self.options, run.settings.training
        warmup = training.warmup_of(total)
        decay = options.wsd_decay_steps or math.ceil(total * options.wsd_decay_ratio)
        if warmup + decay > total:
            raise sft.UsageError(
                f"The run has {total} steps, and wsd {warmup} of warm-up and {decay} of decay; give fewer of them, or "
                "more max_steps."
            )
        peak, least, shape = training.learning_rate, options.wsd_min_lr_ratio, _SHAPES[options.wsd_decay_type]

        def rate(step: int) -> float:
            done = step - 1
            if done < warmup:
                factor = done / warmup
            elif done < total - decay:
                return peak
            elif done < total:
                factor = shape((done - (total - decay)) / decay)
            else:
                factor = 0.0
            return peak * (factor * (1 - least) + least)

        return rate


_SHAPES: dict[str, Callable[[float], float]] = {
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
    "linear": lambda progress: 1 - progress,
    "1-sqrt": lambda progress: 1 - math.sqrt(progress),
}


@dataclass
class CosineWithMinLrOptions:
    min_lr: float | None = sft.option(None, "the learning rate that the cosine ends with", minimum=0)
    min_lr_rate: float | None = sft.option(None, "the same as a share of the peak", minimum=0, maximum=1)


class CosineWithMinLr(sft.Plugin):
    """A cosine that ends at a rate above 0."""

    name = "cosine-with-min-lr"
    api_version = ">=1.1,<2"
    summary = "Learning rate: warm-up, then a cosine down to a rate above 0."
    reference = "arXiv 1608.03983"
    reads = ("num_cycles",)
    Options = CosineWithMinLrOptions
    certify = sft.Trial(settings={"min_lr_rate": 0.1})

    @sft.hookimpl
    def sft_check(self, run: Run) -> None:
        least, share, peak = self.options.min_lr, self.options.min_lr_rate, run.settings.training.learning_rate
        if (least is None) == (share is None):
            both = "both min_lr and min_lr_rate are set; keep one" if least is not None else "set min_lr or min_lr_rate"
            raise sft.UsageError(f"cosine_with_min_lr needs the rate that it ends with: {both}.")
        if least is not None and least > peak:
            raise sft.UsageError(f"min_lr {least:g} is above learning_rate {peak:g}; lower it.")

    @sft.hookimpl
    def sft_schedule(self, run: Run, total: int) -> Rates:
        training, share = run.settings.training, self.options.min_lr_rate
        peak, warmup = training.learning_rate, training.warmup_of(total)
        least = self.options.min_lr if share is None else share * peak

        def rate(step: int) -> float:
            done = step - 1
            if done < warmup:
                return peak * done / warmup
            progress = (done - warmup) / max(1, total - warmup)
            wave = 0.5 * (1 + math.cos(2 * math.pi * training.num_cycles * progress))
            return wave * (peak - least) + least

        return rate


@dataclass
class InverseSqrtOptions:
    inverse_sqrt_timescale: int | None = sft.option(
        None, "steps in which the rate falls to 1/√2; unset: as many as the warm-up has, or 10,000", minimum=1
    )


class InverseSqrt(sft.Plugin):
    """A rate that falls with the root of the steps, and does not depend on how many there will be."""

    name = "inverse-sqrt"
    api_version = ">=1.1,<2"
    summary = "Learning rate: warm-up, then as 1/√step."
    reference = "arXiv 1706.03762"
    Options = InverseSqrtOptions

    @sft.hookimpl
    def sft_schedule(self, run: Run, total: int) -> Rates:
        training = run.settings.training
        peak, warmup = training.learning_rate, training.warmup_of(total)
        scale = self.options.inverse_sqrt_timescale or warmup or 10_000

        def rate(step: int) -> float:
            done = step - 1
            return peak * done / warmup if done < warmup else peak / math.sqrt((done - warmup + scale) / scale)

        return rate
