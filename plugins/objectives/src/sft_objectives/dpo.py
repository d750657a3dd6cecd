"""Plugin ``dpo``: direct preference optimisation (arXiv 2305.18290)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import sft
from sft import UsageError

if TYPE_CHECKING:
    from sft import Objective, Run, Turn


@dataclass
class DpoOptions:
    dpo_beta: float = sft.option(0.1, "β: how far the model may go from its reference", above=0)
    dpo_loss_type: str = sft.option("sigmoid", "the loss of a pair", choices=("sigmoid", "hinge", "ipo"))


class Dpo(sft.Plugin):
    """Learns from pairs of answers which one is preferred, beside the frozen model that the adapter stands on."""

    name = "dpo"
    api_version = ">=1.1,<2"
    summary = "Learn from pairs of answers, of which one is preferred."
    reference = "arXiv 2305.18290"
    conflicts = ("label-smoothing", "focal-loss", "z-loss")  # what these change is no part of a pair's loss
    Options = DpoOptions

    @sft.hookimpl
    def sft_check(self, run: Run) -> None:
        if run.plugins.provider("sft_export_adapter") is None:
            raise UsageError(
                "dpo compares the model with itself before training, which is the model with its adapter switched off; "
                "add an adapter, such as --plugin lora."
            )
        if run.settings.data.train_on == "everything":
            raise UsageError("dpo compares answers, and train_on everything would learn the questions; leave it out.")

    @sft.hookimpl
    def sft_record_format(self, record: dict[str, Any]) -> list[Turn]:
        from sft_objectives.pairs import pair_of

        return pair_of(record)

    @sft.hookimpl
    def sft_objective(self, run: Run) -> Objective:
        from sft_objectives.preference import Preference

        with sft.without_adapter(run.model):
            pass  # a model that has no frozen base is refused before anything is measured
        return Preference(run, self.options.dpo_beta, self.options.dpo_loss_type)
