"""Plugin ``lr-finder``: the learning rate grows until the loss diverges (Smith's range test, arXiv 1506.01186)."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import sft


@dataclass
class Options:
    lr_finder_low: float = sft.option(1e-7, "learning rate of the first step", above=0)
    lr_finder_high: float = sft.option(1.0, "learning rate of the last step", above=0)
    lr_finder_smoothing: float = sft.option(
        0.9, "share of the old average in the new one of the loss", minimum=0, below=1
    )
    lr_finder_diverged: float = sft.option(4.0, "the run ends where the loss is this many times the smallest", above=1)


class LearningRateFinder(sft.Plugin):
    """From low to high by the same factor at each step. Losses are averaged, a new one weighing 1 - β, and divided by
    1 - β^n, so that the first ones count fully."""

    name = "lr-finder"
    api_version = ">=1.1,<2"
    summary = "Raise the learning rate until the loss diverges, and say which rate suits."
    reference = "arXiv 1506.01186"
    Options = Options

    def __init__(self, options):
        super().__init__(options)
        self.average = 0.0
        self.curve = []  # of each step: its rate, and the smoothed loss

    @sft.hookimpl
    def sft_check(self, run):
        low, high = self.options.lr_finder_low, self.options.lr_finder_high
        if low >= high:
            raise sft.UsageError(f"lr_finder_low {low:g} is not below lr_finder_high {high:g}; lower it.")

    @sft.hookimpl
    def sft_schedule(self, run, total):
        low, high = self.options.lr_finder_low, self.options.lr_finder_high
        return lambda step: low * (high / low) ** ((step - 1) / max(total - 1, 1))

    @sft.hookimpl
    def sft_step_ended(self, run, record):
        beta = self.options.lr_finder_smoothing
        self.average = beta * self.average + (1 - beta) * record["loss"]
        smoothed = self.average / (1 - beta ** (len(self.curve) + 1))
        self.curve.append([record["learning_rate"], smoothed])
        smallest = min(loss for _, loss in self.curve)
        if smoothed > self.options.lr_finder_diverged * smallest:
            run.control.stop(f"the loss diverges at a learning rate of {record['learning_rate']:.2g}")

    @sft.hookimpl
    def sft_metrics(self, run, record):
        return {} if "eval_loss" in record else {"smoothed": self.curve[-1][1]}

    @sft.hookimpl
    def sft_state(self, run):
        return {"average": self.average, "curve": self.curve}

    @sft.hookimpl
    def sft_restore(self, run, state, why):
        if why == "resume":  # not where the run goes back to its best checkpoint: the curve is of all steps
            self.average, self.curve = float(state["average"]), [list(point) for point in state["curve"]]

    @sft.hookimpl
    def sft_run_ended(self, run, summary):
        if run.strategy.is_main:
            rate = steepest(self.curve)
            found = (
                "no learning rate at which the loss falls" if rate is None else f"the loss falls fastest at {rate:.2g}"
            )
            run.say(f"lr-finder: {found} ({len(self.curve)} steps)")


def steepest(curve):
    """The rate at which the loss falls most per factor of the rate, between two points; None if it never falls."""
    slopes = [
        ((after - before) / math.log(later / rate), math.sqrt(rate * later))
        for (rate, before), (later, after) in itertools.pairwise(curve)
    ]
    slope, rate = min(slopes, default=(0.0, 0.0))
    return rate if slope < 0 else None
