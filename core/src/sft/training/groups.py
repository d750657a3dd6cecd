"""The optimizer of a run: its groups as plugins change them, and who steps them."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from sft.errors import UsageError
from sft.models.layers import trainable
from sft.optimizer import Optimizer
from sft.plugins.calls import checked, checking, mistaken
from sft.seams import ParameterGroup
from sft.settings.words import without_answer
from sft.training.adamw import AdamW

if TYPE_CHECKING:
    from sft.context import CoreRun


def default_groups(parameters: dict[str, Any], weight_decay: float) -> list[ParameterGroup]:
    """Matrices have weight decay; vectors (biases, norms) have none, as is usual."""
    decay = {name: p for name, p in parameters.items() if p.ndim > 1}
    rest = {name: p for name, p in parameters.items() if p.ndim <= 1}
    groups = [ParameterGroup("decay", decay, 1.0, weight_decay), ParameterGroup("no_decay", rest, 1.0, 0.0)]
    return [group for group in groups if group.parameters]


def check_groups(groups: list[ParameterGroup], parameters: dict[str, Any]) -> None:
    """Check that every trainable parameter is in exactly one group; :class:`UsageError` names the first that is not."""
    seen = Counter(name for group in groups for name in group.parameters)
    for name in parameters:
        if seen[name] != 1:
            raise UsageError(
                f"Parameter {name} is in {seen[name]} optimizer groups and must be in one; "
                "a plugin that changes parameter groups is at fault."
            )


def make_optimizer(run: CoreRun) -> Optimizer:
    """What a plugin provides over the trainable parameters, in the groups as plugins have changed them; or AdamW.

    Raises :class:`UsageError` where processes share the values of a parameter that only can be stepped as a whole.
    """
    parameters = trainable(run.model)
    groups = default_groups(parameters, run.settings.training.weight_decay)
    run.hook.sft_parameter_groups(run=run, groups=groups)
    check_groups(groups, parameters)
    groups = run.strategy.share(groups)
    optimizer = run.hook.sft_optimizer(run=run, groups=groups)
    if optimizer is None:
        without_answer(run.settings, "optim")
        return AdamW(groups, run.settings.training)
    name = str(run.plugins.provider("sft_optimizer"))
    # Where hooks are checked, paddle is not there yet, and neither is this class.
    checked(optimizer, Optimizer, "sft_optimizer", run.plugins.who(name))
    given = {name: p for group in groups for name, p in group.parameters.items()}
    if {name: id(p) for name, p in optimizer.parameters.items()} != {name: id(p) for name, p in given.items()}:
        raise mistaken("an optimizer of other parameters than its groups have", "sft_optimizer", run.plugins.who(name))
    _check_division(run, optimizer, name)
    for method, gives in (("new_state", dict), ("update", None)):
        what = f"its optimizer's {method}"
        setattr(optimizer, method, checking(getattr(optimizer, method), gives, what, run.plugins.who(name)))
    return optimizer


def _check_division(run: CoreRun, optimizer: Optimizer, plugin: str) -> None:
    """Refuse, in all processes, to step a piece of what only can be stepped as a whole."""
    if optimizer.elementwise:
        return
    pieces = run.strategy.pieces(optimizer.parameters)
    here = optimizer.parameters.items()
    cut = [n for n, p in here if not pieces[n].is_whole or pieces[n].part.shape != tuple(p.shape)]
    if run.strategy.largest(len(cut)):
        these = f" (here {cut[0]})" if cut else ""
        raise UsageError(
            f"The optimizer of plugin {plugin} steps a parameter as a whole, and the processes of this run divide "
            f"some{these}; take a plan that leaves them whole, or another optim."
        )
