"""The optimizers' plugins: what each is called, its settings, and which class steps."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import sft
from sft_optimizers.options import AdafactorOptions, AdamW8bitOptions, LionOptions, MuonOptions

if TYPE_CHECKING:
    from sft import Optimizer, ParameterGroup, Run

ADAM = ("adam_beta1", "adam_beta2", "adam_epsilon")
"""AdamW's settings of the core."""


class LionPlugin(sft.Plugin):
    """Lion: steps of one size along the sign of an average. A third to a tenth of AdamW's learning rate, and three to
    ten times its weight decay."""

    name = "lion"
    api_version = ">=1.1,<2"
    summary = "Lion instead of AdamW: the sign of an average of gradients; half of the state."
    reference = "arXiv 2302.06675"
    Options = LionOptions

    @sft.hookimpl
    def sft_optimizer(self, run: Run, groups: list[ParameterGroup]) -> Optimizer:
        from sft_optimizers.lion import Lion

        return Lion(groups, self.options.lion_beta1, self.options.lion_beta2)

    @sft.hookimpl(optionalhook=True)
    def parallel_outline(self, outline: Any, hook: Any) -> None:
        outline.steps(lambda shape, where: 4 * math.prod(shape))


class AdafactorPlugin(sft.Plugin):
    """Adafactor: of a matrix's squared gradients it keeps row and column averages alone. The learning rate is the
    schedule's, as transformers' trainer has it."""

    name = "adafactor"
    api_version = ">=1.1,<2"
    summary = "Adafactor instead of AdamW: a row and a column of state for each matrix."
    reference = "arXiv 1804.04235"
    Options = AdafactorOptions

    @sft.hookimpl
    def sft_optimizer(self, run: Run, groups: list[ParameterGroup]) -> Optimizer:
        from sft_optimizers.adafactor import Adafactor

        return Adafactor(groups, self.options)

    @sft.hookimpl(optionalhook=True)
    def parallel_outline(self, outline: Any, hook: Any) -> None:
        average = 0 if self.options.adafactor_beta1 is None else 4

        def state(shape: tuple[int, ...], where: str) -> int:
            squares = math.prod(shape)
            if len(shape) > 1:
                squares = math.prod(shape[:-1]) + math.prod((*shape[:-2], shape[-1]))
            return 8 + 4 * squares + average * math.prod(shape)

        outline.steps(state, wholes=True)


class AdamW8bitPlugin(sft.Plugin):
    """AdamW whose moments have 8 bits in blocks of 256 values, but for embeddings and small parameters, as in
    bitsandbytes."""

    name = "adamw-8bit"
    api_version = ">=1.1,<2"
    summary = "AdamW with moments of 8 bits, in blocks: a quarter of the state."
    reference = "arXiv 2110.02861"
    reads = ADAM
    Options = AdamW8bitOptions

    @sft.hookimpl
    def sft_optimizer(self, run: Run, groups: list[ParameterGroup]) -> Optimizer:
        from sft.parallel import whole_shape
        from sft_optimizers.adamw_8bit import AdamW8bit

        shape = run.model.architecture
        head = None if shape.tied else getattr(getattr(run.model, "lm_head", None), "weight", None)
        # By the whole parameter's size and its name, so that it does not depend on how processes divide the model.
        coded = {
            name
            for name, parameter in run.strategy.parameters(run.model)
            if math.prod(whole_shape(parameter)) >= self.options.adamw_8bit_min_size
            and (name.startswith(f"{shape.block_names}.") or parameter is head)
        }
        return AdamW8bit(groups, run.settings.training, coded)

    @sft.hookimpl(optionalhook=True)
    def parallel_outline(self, outline: Any, hook: Any) -> None:
        least = self.options.adamw_8bit_min_size

        def state(shape: tuple[int, ...], where: str) -> int:
            size = math.prod(shape)
            return 8 + (2 * size + 8 * -(-size // 256) if where in ("block", "head") and size >= least else 8 * size)

        outline.steps(state)


class MuonPlugin(sft.Plugin):
    """Muon for the matrices of the transformer blocks: each step is orthogonalised, times 0.2·√max(rows, columns), so
    that AdamW's learning rate and weight decay fit. Embeddings, lm_head and vectors are stepped by AdamW."""

    name = "muon"
    api_version = ">=1.1,<2"
    summary = "Muon for the blocks' matrices (orthogonalised steps), AdamW for the rest."
    reference = "https://kellerjordan.github.io/posts/muon/, arXiv 2502.16982"
    reads = ADAM
    Options = MuonOptions

    @sft.hookimpl
    def sft_optimizer(self, run: Run, groups: list[ParameterGroup]) -> Optimizer:
        from sft_optimizers.muon import Muon

        blocks = f"{run.model.architecture.block_names}."
        matrices = {
            name
            for name, parameter in run.strategy.parameters(run.model)
            if name.startswith(blocks) and len(parameter.shape) == 2
        }
        return Muon(groups, run.settings.training, matrices, self.options.muon_momentum, self.options.muon_steps)

    @sft.hookimpl(optionalhook=True)
    def parallel_outline(self, outline: Any, hook: Any) -> None:
        def state(shape: tuple[int, ...], where: str) -> int:
            return 4 * math.prod(shape) if where == "block" and len(shape) == 2 else 8 * math.prod(shape) + 8

        outline.steps(state, wholes=True)
