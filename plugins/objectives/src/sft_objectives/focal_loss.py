"""Plugin ``focal-loss``: what the model knows already counts less (arXiv 1708.02002)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import sft

if TYPE_CHECKING:
    from sft import Run, Targets, TokenLoss

LEAST = 1e-12
"""Below it 1 − p counts as this, where a power below 1 would have no slope."""


@dataclass
class FocalLossOptions:
    focal_loss_gamma: float = sft.option(2.0, "power γ of 1 − p, with which a token counts", minimum=0)


@dataclass(frozen=True)
class Focal:
    """(1 − p)^γ·ℓ, where p is the target's probability; gradients flow through the factor too."""

    gamma: float

    def loss(self, targets: Targets, before: Any) -> Any:
        missed = (-targets.log_probability.expm1()).clip(min=LEAST)  # 1 − p, to the last bit where p is near 1
        return before * missed.pow(self.gamma)


class FocalLoss(sft.Plugin):
    """Tokens of probability p count (1 − p)^γ. Called after label smoothing, if both are active."""

    name = "focal-loss"
    api_version = ">=1.1,<2"
    summary = "Tokens that the model already predicts count less."
    reference = "arXiv 1708.02002"
    order = 10
    Options = FocalLossOptions

    @sft.hookimpl
    def sft_token_loss(self, run: Run) -> TokenLoss:
        return Focal(self.options.focal_loss_gamma)
