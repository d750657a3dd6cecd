"""Plugin ``z-loss``: keeps the normaliser of the softmax near 1 (PaLM, arXiv 2204.02311)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import sft

if TYPE_CHECKING:
    from sft import Run, Targets, TokenLoss


@dataclass
class ZLossOptions:
    z_loss_weight: float = sft.option(1e-4, "factor c of c·log²Z", minimum=0)


@dataclass(frozen=True)
class Normalised:
    """ℓ + c·log²Z, with Z = Σ exp(z)."""

    weight: float

    def loss(self, targets: Targets, before: Any) -> Any:
        return before + targets.log_normaliser.square() * self.weight


class ZLoss(sft.Plugin):
    """Adds c·log²Z to the loss of each token, after what other plugins make of that."""

    name = "z-loss"
    api_version = ">=1.1,<2"
    summary = "Adds c·log²Z, which keeps logits from drifting."
    reference = "arXiv 2204.02311, section 5"
    order = 20
    Options = ZLossOptions

    @sft.hookimpl
    def sft_token_loss(self, run: Run) -> TokenLoss:
        return Normalised(self.options.z_loss_weight)
