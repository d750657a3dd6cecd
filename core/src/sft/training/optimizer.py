"""AdamW over named parameter groups, the learning-rate schedule, and optimizer state by structured names."""

from __future__ import annotations

import math
from collections import Counter
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import paddle

from sft.distributed.place import beside
from sft.errors import SftError, UsageError
from sft.models.layers import trainable
from sft.seams import ParameterGroup
from sft.settings.arguments import TrainingArguments

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


def learning_rate(step: int, total: int, training: TrainingArguments) -> float:
    """The rate of optimizer step ``step`` (from 1) of ``total``: linear warm-up, then the schedule's decay.

    As in PaddleNLP and Hugging Face: the factor is (step-1)/warmup while warming up; "linear" and "cosine" (of half a
    wave) reach 0 after the last step, "polynomial" reaches ``lr_end``; "constant" has no warm-up.
    """
    peak, kind, done = training.learning_rate, training.lr_scheduler_type, step - 1
    warmup = training.warmup_steps or math.ceil(total * training.warmup_ratio)
    if kind == "constant":
        return peak
    if done < warmup:
        return peak * done / warmup
    progress = (done - warmup) / max(1, total - warmup)
    if kind == "polynomial":
        return (peak - training.lr_end) * max(0.0, 1.0 - progress) ** training.power + training.lr_end
    shape = {
        "constant_with_warmup": 1.0,
        "linear": max(0.0, 1.0 - progress),
        "cosine": max(0.0, 0.5 * (1.0 + math.cos(2.0 * math.pi * training.num_cycles * min(1.0, progress)))),
    }
    return peak * shape[kind]


def clip_factor(norm: float, max_norm: float) -> float:
    """The factor that scales gradients of global norm ``norm`` down to ``max_norm`` (0: no clipping)."""
    return max_norm / norm if max_norm and norm > max_norm else 1.0


class Optimizer:
    """AdamW (arXiv 1711.05101) over parameters that it knows by structured name, in few calls of paddle's fused kernel.

    For a 16-bit parameter it updates a float32 master copy and rounds that, so that small updates add up. Parameters
    may lie on the host while the run computes on a GPU: then their state is there too, and they are stepped there.
    """

    def __init__(self, groups: list[ParameterGroup], training: TrainingArguments) -> None:
        self.parameters = {name: p for group in groups for name, p in group.parameters.items()}
        self._stepped = {name: _master(p) for name, p in self.parameters.items()}
        self._groups, self._training = groups, training
        self._state: dict[str, dict[str, Any]] = {}
        """By kind of tensor, then by name; made when it is first needed."""
        self._ages: dict[str, tuple[float, int]] = {}
        """Of each name the β₁ᵗ that it began with, and its steps since then: what is of one age is stepped together."""

    @paddle.no_grad()
    def step(self, rate: float, factor: float = 1.0) -> None:
        """Apply the gradients, each times ``factor``, at learning rate ``rate``, and clear them."""
        if not self.parameters:  # all that trains is in other processes
            return
        with self._beside():
            self._step(rate, factor)
        self.clear()

    def _beside(self) -> AbstractContextManager[None]:
        """Within it paddle computes where the parameters are."""
        return beside(next(iter(self._stepped.values()))) if self._stepped else nullcontext()

    def _step(self, rate: float, factor: float) -> None:
        self._make_state()
        gradients = {n: _aligned(p.grad.astype("float32")) for n, p in self.parameters.items() if p.grad is not None}
        if factor != 1.0:
            scaled, inverse = list(gradients.values()), paddle.full([1], 1.0 / factor)
            for start in range(0, len(scaled), TENSORS):  # paddle's loss scaling, many in a call: it divides
                paddle._C_ops.check_finite_and_unscale_(scaled[start : start + TENSORS], inverse)
        for group in self._groups:
            together: dict[tuple[float, int], list[str]] = {}
            for name in group.parameters:
                if name in gradients:
                    together.setdefault(self._ages[name], []).append(name)
            for (began, steps), names in together.items():
                self._apply(names, gradients, rate * group.learning_rate, group.weight_decay)
                self._ages.update(dict.fromkeys(names, (began, steps + 1)))
        for name in gradients:
            if self._stepped[name] is not self.parameters[name]:
                paddle.assign(self._stepped[name].astype(self.parameters[name].dtype), self.parameters[name])

    def _apply(self, names: list[str], gradients: dict[str, Any], rate: float, decay: float) -> None:
        """One step of parameters that have been stepped equally often."""
        training = self._training
        first, second, power1, power2 = ([tensors[name] for name in names] for tensors in self._state.values())
        paddle._C_ops.fused_adam_(
            [self._stepped[name] for name in names],
            [gradients[name] for name in names],
            paddle.full([1], rate),
            *(first, second, None),
            *(power1, power2),
            *(None, None),  # master copies of its own, and whether to skip
            *(training.adam_beta1, training.adam_beta2, training.adam_epsilon),
            CHUNK,
            decay,
            *(True, False, False, False),  # decoupled decay; no masters, no shared powers of β, no AMSGrad
        )

    def _make_state(self) -> None:
        if self._state:
            return
        betas = {"beta1_pow_acc": self._training.adam_beta1, "beta2_pow_acc": self._training.adam_beta2}
        self._state = {
            kind: {name: paddle.zeros_like(stepped) for name, stepped in self._stepped.items()}
            for kind in ("moment1", "moment2")
        }
        for kind, beta in betas.items():  # on the host, which passes them to the kernel
            value = np.array([beta], np.float32)
            self._state[kind] = {name: paddle.to_tensor(value, place=paddle.CPUPlace()) for name in self._stepped}
        self._ages = dict.fromkeys(self._stepped, (betas["beta1_pow_acc"], 0))

    def clear(self) -> None:
        """Clear the gradients."""
        for parameter in self.parameters.values():
            parameter.clear_gradient(False)  # set_to_zero, which paddle ignores by name: it would keep zeros

    def state(self) -> dict[str, np.ndarray]:
        """``NAME.moment1`` and so on for every parameter, by structured name; ``NAME.master`` where there is one."""
        state = {f"{name}.{kind}": t.numpy() for kind, tensors in self._state.items() for name, t in tensors.items()}
        masters = {f"{name}.master": p.numpy() for name, p in self._stepped.items() if p is not self.parameters[name]}
        return {**state, **masters}

    @paddle.no_grad()
    def load(self, state: dict[str, np.ndarray]) -> None:
        """Restore what :meth:`state` returned, for the same parameters."""
        with self._beside():
            self._load(state)

    def _load(self, state: dict[str, np.ndarray]) -> None:
        self._make_state()
        expected = self.state()
        if set(expected) != set(state):
            odd = sorted(set(expected) ^ set(state))[0]
            raise SftError(f"The checkpoint's optimizer state does not fit this run (first difference: {odd}).")
        for kind, tensors in self._state.items():
            for name, tensor in tensors.items():
                tensor.set_value(state[f"{name}.{kind}"])
        for name, stepped in self._stepped.items():
            self._ages[name] = (float(state[f"{name}.beta1_pow_acc"].reshape(-1)[0]), 0)
            if stepped is not self.parameters[name]:
                stepped.set_value(state[f"{name}.master"])


CHUNK = 1 << 16
"""Values that a block of a GPU steps at a time, as paddle's own default is."""
TENSORS = 4096
"""Tensors that are scaled in a call. A GPU's kernel has a number for each in its shared memory, which holds 6,143."""


def _aligned(gradient: Any) -> Any:
    """``gradient``, from where four values of a GPU's memory can be read at a time. paddle's fused AdamW reads so, and
    looks whether it can at all its tensors but these, which may be views of a buffer."""
    return gradient if gradient.data_ptr() % 16 == 0 else gradient.clone()


def _master(parameter: Any) -> Any:
    """The tensor that AdamW updates for ``parameter``: itself if it is float32, else a float32 copy."""
    if parameter.dtype == paddle.float32:
        return parameter
    copy = paddle.base.framework.EagerParamBase.from_tensor(parameter.astype("float32"))
    copy.stop_gradient = False
    return copy


def make_optimizer(run: CoreRun) -> Optimizer:
    """AdamW over the trainable parameters, in the groups as plugins have changed them."""
    parameters = trainable(run.model)
    groups = default_groups(parameters, run.settings.training.weight_decay)
    run.hook.sft_parameter_groups(run=run, groups=groups)
    check_groups(groups, parameters)
    return Optimizer(run.strategy.share(groups), run.settings.training)
