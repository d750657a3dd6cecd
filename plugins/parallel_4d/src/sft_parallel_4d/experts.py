"""Expert parallelism (GShard, arXiv 2006.16668; DeepSpeed-MoE, arXiv 2201.05596): data ranks share out the experts of
each mixture, and send each other the tokens that these are chosen for. Without sharding, ranks that share rows are data
ranks in this: an expert does not ask of which rows its tokens are.

The ranks of a group have as many experts each, in order. What else there is, each has as without: its gradients add up
over all data ranks. Those of an expert are whole within its group, as tokens of all its ranks have gone through it, and
add up over the groups alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import paddle

from sft.parallel import Exchange, by_expert, mark_owner, owner_of
from sft_parallel_4d.meeting import crossing
from sft_parallel_4d.topology import Axis, among


class ExpertParallel:
    """Shares out experts among groups of ``degree`` neighbours along the ``data`` axis."""

    def __init__(self, data: Axis, degree: int, world: Axis) -> None:
        group, place = divmod(data.rank, degree)
        self.axis = among(world, data, range(group * degree, (group + 1) * degree), apart=True)
        """The processes that share out the experts of one model. Not the group by which gradients travel meanwhile:
        these come in an order of their own."""
        self._alike = among(world, data, range(place, data.size, degree))
        """Those of all groups that have the same ones."""
        self._data = data
        self._is_first = group == 0

    def divide(self, model: Any) -> None:
        """Mark the experts of other processes; nothing is allocated."""
        for mlp in mixtures(model):
            each = len(mlp.experts) // self.axis.size
            for number, expert in enumerate(mlp.experts):
                owner = number // each
                for marked in (*expert.sublayers(include_self=True), *expert.parameters()):
                    mark_owner(marked, owner, here=owner == self.axis.rank)

    def connect(self, model: Any) -> None:
        """Take the experts of other processes out of ``model``, and let tokens reach them."""
        exchange = _Exchange(self.axis)
        for mlp in mixtures(model):
            each = len(mlp.experts) // self.axis.size
            for number in range(len(mlp.experts)):
                if number // each != self.axis.rank:
                    del mlp.experts._sub_layers[str(number)]
            mlp.exchange = exchange

    def summed_over(self, parameter: Any) -> Axis:
        """The data ranks whose gradients of ``parameter`` are summands of the whole one."""
        return self._data if owner_of(parameter) is None else self._alike

    def writes(self, parameter: Any) -> bool:
        """Whether this is the first of the data ranks that have ``parameter``."""
        return self._is_first if owner_of(parameter) is not None else self._data.rank == 0


class _Exchange(Exchange):
    """All choices of an ``axis``, each at the process that has its expert, and back. The host asks the device once, for
    how many each sends each."""

    def __init__(self, axis: Axis) -> None:
        self._axis = axis

    def through(self, choices: Any, begins: Any, experts: Sequence[Callable[[Any], Any]]) -> Any:
        axis, here = self._axis, slice(self._axis.rank * len(experts), (self._axis.rank + 1) * len(experts))
        counts = np.diff(axis.gather(begins.unsqueeze(0), 0).numpy(), axis=1)  # of each process and expert
        leaving = counts[axis.rank].reshape([axis.size, -1]).sum(axis=1).tolist()
        coming = counts[:, here].sum(axis=1).tolist()

        def there(tensor: Any) -> Any:
            return axis.trade(tensor, leaving, coming)

        def back(tensor: Any) -> Any:
            return axis.trade(tensor, coming, leaving)

        if choices.stop_gradient and paddle.is_grad_enabled():
            # Backward meets the others too: in all processes, or in none, whatever has come to each.
            choices = choices.detach()
            choices.stop_gradient = False
        come = crossing(choices, there, back)
        return crossing(_sorted_through(come, counts[:, here], experts), back, there)


def _sorted_through(come: Any, counts: np.ndarray, experts: Sequence[Callable[[Any], Any]]) -> Any:
    """Tokens that came from each process, sorted by expert, through the experts: in the order in which they came.
    ``counts`` are of processes and experts."""
    if not counts.sum():  # nothing, but of the type that an expert gives, and with a way back
        row = paddle.zeros([1, come.shape[-1]], come.dtype)
        return experts[0](paddle.concat([come, row]))[:0]
    expert_of = np.concatenate([np.repeat(np.arange(counts.shape[1]), row) for row in counts])
    order = np.argsort(expert_of, kind="stable")
    tokens = paddle.gather(come, paddle.to_tensor(order))
    results = by_expert(tokens, counts.sum(axis=0).tolist(), experts)
    return paddle.gather(results, paddle.to_tensor(np.argsort(order)))


def mixtures(model: Any) -> list[Any]:
    """The MLPs of blocks that have experts."""
    return [block.mlp for block in model.model.layers if hasattr(block.mlp, "experts")]
