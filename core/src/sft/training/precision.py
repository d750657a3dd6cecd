"""The precision in which a run computes: float32, or bfloat16 or float16 where the device can."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from sft.errors import UsageError
from sft.precision import Precision
from sft.settings.arguments import TrainingArguments

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

GROWTH_STEPS = 2000
"""Steps without an overflow after which the loss scale doubles (paddle's and torch's default)."""


def choose_precision(
    training: TrainingArguments, given: Collection[str], frozen: bool, say: Callable[[str], None]
) -> Precision:
    """The precision that the settings ask for, which a line describes. If the device cannot do it, a line says so, and
    it is float32; with ``require_precision`` that is a :class:`UsageError` instead.

    ``given`` are the settings that the user gave: fp16_opt_level O1 keeps float32 weights where it is one of them.
    ``frozen``: whether the model's own weights stay what they are.
    """
    if not (training.bf16 or training.fp16):
        return Precision()
    wanted, short = ("bfloat16", "bf16") if training.bf16 else ("float16", "fp16")
    import paddle

    device, level = paddle.device.get_device(), training.fp16_opt_level
    reason = lacking(wanted, device)
    if reason is not None:
        fact = f"{short} is asked for, and {reason}"
        if training.require_precision:
            raise UsageError(f"{fact}; leave {short} out, or leave require_precision out to compute in float32.")
        say(f"precision: {fact}: computing in float32 (require_precision makes this an error)")
        return Precision()
    typed = level == "O1" and "fp16_opt_level" in given
    held = wanted if level == "O2" or (frozen and not typed) else "float32"
    if device == "cpu":  # paddle's own operations on it are float32
        held = held if frozen else "float32"
        precision = Precision(wanted, "float32", held)
        how = f"{wanted} products with float32 sums, by paddle's oneDNN"
        beyond = "; fp16_opt_level O2 is more than a CPU can do" if level == "O2" else ""
    else:
        precision = Precision(wanted, wanted if level == "O2" else "float32", held)
        how, beyond = f"{wanted} products", ""
    if precision.weights != "float32":
        kept = f"weights are held in {wanted}, what trains has float32 masters"
    elif precision.frozen != "float32":
        kept = f"frozen matrices are held in {wanted}, other weights in float32"
    else:
        kept = "weights are held in float32"
    say(f"precision: {how}; {kept}{beyond}")
    return precision


def lacking(dtype: str, device: str) -> str | None:
    """Why ``device``, which paddle uses now, does not multiply matrices of ``dtype``; None where it does."""
    if device == "cpu" and dtype == "bfloat16":
        from sft.models.onednn import why_not

        return why_not()
    return None if has_matmul(dtype) else f"paddle has no {dtype} matrix product on {device}"


def has_matmul(dtype: str) -> bool:
    """Try whether paddle can multiply matrices of ``dtype`` on the current device."""
    import paddle

    one = paddle.ones([1, 1]).astype(dtype)
    try:
        paddle.matmul(one, one)
    except RuntimeError as error:
        if "is not registered" not in str(error):
            raise  # the device's own trouble, not a missing kernel
        return False
    return True


class LossScale:
    """The factor that keeps float16 gradients from vanishing (arXiv 1710.03740); 1 and constant in other precisions.

    It halves at an overflow, whose step is skipped, and doubles after GROWTH_STEPS steps without one.
    """

    def __init__(self, precision: Precision, initial: float) -> None:
        self.dynamic = precision.dtype == "float16"
        self.value = initial if self.dynamic else 1.0
        self.good_steps = 0

    def accepts(self, loss: float, grad_norm: float) -> bool:
        """Whether the step may be taken. If not, the scale has been halved, and the step must be skipped."""
        finite = math.isfinite(loss) and math.isfinite(grad_norm)
        if not self.dynamic or (not finite and self.value < 1.0):
            return finite
        self.good_steps = self.good_steps + 1 if finite else 0
        if not finite:
            self.value /= 2.0
        elif self.good_steps == GROWTH_STEPS:
            self.value, self.good_steps = self.value * 2.0, 0
        return finite

    @property
    def gives_up(self) -> bool:
        """Whether a step that is not finite ends the run, because the scale cannot go any lower."""
        return not self.dynamic or self.value < 1.0

    def state(self) -> dict[str, Any]:
        return {"dynamic": self.dynamic, "value": self.value, "good_steps": self.good_steps}

    def load(self, state: dict[str, Any]) -> None:
        """Take over the scale of a checkpoint, if both the checkpoint and this run compute in float16."""
        # Checkpoints of before "dynamic" was written: other precisions have 1.
        if self.dynamic and state.get("dynamic", state["value"] != 1.0):
            self.value, self.good_steps = float(state["value"]), int(state["good_steps"])
