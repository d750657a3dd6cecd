"""With ``deterministic`` a run is held to it: its first micro-batch is computed twice, and must give the same bits."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from sft.errors import SftError

if TYPE_CHECKING:
    from sft.context import CoreRun


def check_repeats(run: CoreRun, compute: Callable[[], float], parameters: Mapping[str, Any]) -> None:
    """``compute`` draws afresh, computes a loss and leaves gradients in ``parameters``; it is called twice, and the
    gradients are cleared. All processes of a run take part, and :class:`SftError` is raised in all of them."""
    found = []
    for _ in range(2):
        loss = compute()
        found.append({"the loss": loss.hex(), **{name: _digest(p.grad) for name, p in parameters.items()}})
        for parameter in parameters.values():
            parameter.clear_gradient(False)
    different = [name for name, value in found[0].items() if found[1][name] != value]
    if run.strategy.largest(float(bool(different))):
        where = f"; here {different[0]} is the first of {len(different)} that differ" if different else ""
        raise SftError(
            "deterministic: the first micro-batch was computed twice, and its gradients are not the same to the last "
            f"bit{where}; leave out the plugin that computes it, or deterministic."
        )
    run.say("deterministic: the first micro-batch was computed twice, with the same bits")


def _digest(gradient: Any) -> str:
    return "" if gradient is None else hashlib.blake2b(gradient.astype("float32").numpy().tobytes()).hexdigest()
