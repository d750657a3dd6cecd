"""Plugin ``label-smoothing``: a part of each target's probability goes to all tokens alike (arXiv 1512.00567)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import sft

if TYPE_CHECKING:
    from sft import Run, Targets, TokenLoss


@dataclass
class LabelSmoothingOptions:
    label_smoothing_factor: float = sft.option(0.1, "share ε of the target that goes to all tokens", minimum=0, below=1)


@dataclass(frozen=True)
class Smoothed:
    """(1 − ε)·ℓ + ε·(log Σ exp(z) − mean z), the second part being the mean of −log softmax(z) over all V tokens."""

    share: float

    def loss(self, targets: Targets, before: Any) -> Any:
        every = targets.log_normaliser - targets.mean_logit
        return before * (1.0 - self.share) + every * self.share


class LabelSmoothing(sft.Plugin):
    """Cross-entropy to (1 − ε)·onehot + ε/V, as torch's and Hugging Face's ``label_smoothing_factor`` has it."""

    name = "label-smoothing"
    api_version = ">=1.1,<2"
    summary = "A share of each target's probability goes to all tokens alike."
    reference = "arXiv 1512.00567, section 7"
    Options = LabelSmoothingOptions

    @sft.hookimpl
    def sft_token_loss(self, run: Run) -> TokenLoss:
        return Smoothed(self.options.label_smoothing_factor)
