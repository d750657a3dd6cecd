"""What plugins make of the cross-entropy of each target token, within the chunked loss (``sft_token_loss``)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import paddle

from sft.errors import SftError
from sft.plugins.calls import failed, from_plugin, mistaken
from sft.precision import no_casts
from sft.seams import Targets, TokenLoss


class Slopes(NamedTuple):
    """The gradient of losses in the logits z: probabilities · p + onehot(label) · y + m, each float32 [n, 1]."""

    probabilities: Any
    label: Any
    every: Any


@dataclass(frozen=True)
class TokenLosses:
    """The token losses of a run, each with the name of its plugin, in the order in which they follow each other.

    A loss is a function of three numbers of a position, log softmax(z)[label], log Σ exp(z) and the mean of z, whose
    gradients in z are known: autograd sees [n, 1], never logits, and where processes share the vocabulary nobody but
    the cross-entropy has to ask the others.
    """

    parts: Sequence[tuple[str, TokenLoss]]

    def __call__(
        self, labels: Any, losses: Any, log_normaliser: Any, mean_logit: Any, columns: int, learns: bool
    ) -> tuple[Any, Slopes | None]:
        """From the cross-entropies ``losses``, float64 [n, 1], to the losses that are learned, and their slopes where
        something ``learns``. ``labels`` int64 [n, 1], the others float64 [n, 1]; ``columns``: of all processes.
        """
        with no_casts(), paddle.enable_grad():
            leaves = [-losses.detach(), log_normaliser.detach(), mean_logit.detach()]
            for leaf in leaves:
                leaf.stop_gradient = not learns
            targets, found = Targets(labels, *leaves), -leaves[0]
            for who, part in self.parts:
                found = _asked(who, part, targets, found)
            if not learns:
                return found, None
            given: list[Any] = [None] * 3
            if not found.stop_gradient:
                given = paddle.grad([found.sum()], leaves, allow_unused=True)
        label, normaliser, mean = (paddle.zeros_like(losses) if one is None else one for one in given)
        slopes = (normaliser - label, label, mean / columns)
        return found.detach(), Slopes(*(one.astype("float32") for one in slopes))


def _asked(who: str, part: TokenLoss, targets: Targets, before: Any) -> Any:
    try:
        found = part.loss(targets, before)
    except SftError:
        raise
    except Exception as error:
        raise failed(error, "the loss of a token", who) from from_plugin(error)
    is_tensor = isinstance(found, paddle.Tensor)
    if not is_tensor or found.dtype != before.dtype or found.shape != before.shape:
        what = f"{found.dtype} {list(found.shape)}" if is_tensor else type(found).__name__
        raise mistaken(f"{what} where float64 {list(before.shape)} is expected", "the loss of a token", who)
    return found
