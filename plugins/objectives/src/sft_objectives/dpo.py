"""Plugin ``dpo``: direct preference optimisation (arXiv 2305.18290)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import sft
from sft import UsageError

if TYPE_CHECKING:
    from sft import Objective, Reference, Run, Turn

_PAIRS = [
    {"prompt": f"type#{kind}" + "*warm" * (n % 3), "chosen": f"A {kind} for you.", "rejected": "No" + ", no" * (n % 4)}
    for n, kind in enumerate(["coat", "shirt", "dress", "skirt"] * 3)
]


@dataclass
class DpoOptions:
    dpo_beta: float = sft.option(0.1, "β: how far the model may go from its reference", above=0)
    dpo_loss_type: str = sft.option("sigmoid", "the loss of a pair", choices=("sigmoid", "hinge", "ipo"))


class Dpo(sft.Plugin):
    """Learns from pairs of answers which one is preferred, beside the model as it was: what an adapter stands on, or
    where the whole model trains a frozen copy."""

    name = "dpo"
    api_version = ">=1.1,<2"
    summary = "Learn from pairs of answers, of which one is preferred."
    reference = "arXiv 2305.18290"
    conflicts = ("label-smoothing", "focal-loss", "z-loss")  # what these change is no part of a pair's loss
    Options = DpoOptions
    certify = sft.Trial(records=_PAIRS)

    def __init__(self, options: DpoOptions) -> None:
        super().__init__(options)
        self.before: Reference | None = None

    @sft.hookimpl
    def sft_check(self, run: Run) -> None:
        if run.settings.data.train_on == "everything":
            raise UsageError("dpo compares answers, and train_on everything would learn the questions; leave it out.")

    @sft.hookimpl
    def sft_record_format(self, record: dict[str, Any]) -> list[Turn]:
        from sft_objectives.pairs import pair_of

        return pair_of(record)

    @sft.hookimpl
    def sft_objective(self, run: Run) -> Objective:
        from sft_objectives.preference import Preference

        self.before = sft.Reference(run.model)
        if self.before.copied:
            run.say(
                f"dpo: the model stays as it is now beside the one that trains, {self.before.copied / 2**20:,.0f} "
                "MiB more in each process (none with an adapter)"
            )
        return Preference(run, self.before, self.options.dpo_beta, self.options.dpo_loss_type)

    @sft.hookimpl
    def sft_state(self, run: Run) -> dict[str, Any]:
        """Which model a copy is of: the run that goes on makes it again."""
        copied = self.before is not None and self.before.copied
        return {"reference": sft.fingerprint(run.source)} if copied else {}

    @sft.hookimpl
    def sft_restore(self, run: Run, state: dict[str, Any]) -> None:
        if state["reference"] != sft.fingerprint(run.source):
            raise UsageError(
                f"The checkpoint compares with another model than {run.source.folder} is now; put that back as it was, "
                "or start a new run."
            )

    @sft.hookimpl(optionalhook=True)
    def parallel_outline(self, outline: Any, hook: Any) -> None:
        weights = [outline.embedding, outline.norm, *([] if outline.head is None else [outline.head])]
        if not any(weight.trains for weight in weights):
            return  # beside an adapter, the base itself
        outline.exclude("dpo compares with a copy of whole parameters", "stage3")
        for linear in outline.targets():
            for weight in list(linear.weights):
                linear.add(f"reference_{weight.name}", weight.shape, weight.sides, trains=False, bits=weight.bits)
        each = [outline.norm] * (len(outline.blocks) * outline.norms + 1)
        ends = [outline.embedding, *([] if outline.head is None else [outline.head])]
        for weight in [*ends, *each, *(one for inside in outline.inside for one in inside)]:
            outline.share(f"reference_{weight.name}", weight.shape, weight.sides, trains=False, bits=weight.bits)
