"""Plugins ``nf4``, ``fp4``, ``int8``, ``int4``: the base model's Linears in 4 or 8 bits (QLoRA, arXiv 2305.14314)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import sft
from sft import UsageError

if TYPE_CHECKING:
    import numpy as np

    from sft import Quantizer, Run


class _Quantizer:
    """The seam's object around one function from a weight [out, in] and a bias to a layer."""

    def __init__(self, make: Callable[[np.ndarray, np.ndarray | None], Any]) -> None:
        self._make = make

    def quantize(self, name: str, weight: np.ndarray, bias: np.ndarray | None) -> Any:
        return self._make(weight.T, bias)


def _say(run: Run | None) -> Callable[[str], None]:
    """Merging and generating quantize without a run, and without a word."""
    return run.say if run is not None else lambda text: None


def _algo(name: str) -> Any:
    return sft.option(None, "PaddleNLP's way of asking for this plugin", choices=(name,))


@dataclass
class BlockOptions:
    qlora_weight_blocksize: int = sft.option(
        64, "values that share an absmax", minimum=2, aliases=("weight_blocksize",)
    )
    qlora_weight_double_quant: bool = sft.option(
        False, "store the absmax in 8 bits too", aliases=("weight_double_quant",)
    )


@dataclass
class Nf4Options(BlockOptions):
    weight_quantize_algo: str | None = _algo("nf4")


@dataclass
class Fp4Options(BlockOptions):
    weight_quantize_algo: str | None = _algo("fp4")


@dataclass
class Int8Options:
    weight_quantize_algo: str | None = _algo("weight_only_int8")


@dataclass
class Int4Options:
    weight_quantize_algo: str | None = _algo("weight_only_int4")
    weight_only_group_size: int | None = sft.option(
        None, "inputs that share a scale; unset: all of a channel", minimum=2
    )


_Held = tuple[str, tuple[int, ...], tuple[str | None, ...], int]
"""A tensor on paper: its name, shape, what divides each dimension, and the bits of a value."""


def _replace_weights(outline: Any, held: Callable[[int, int], list[_Held]]) -> None:
    """On paper: the tensors that are ``held`` for (inputs, outputs), instead of each Linear's weight."""
    for linear in outline.targets():
        linear.remove("weight")
        linear.hold("bias", 32)
        for name, shape, sides, bits in held(linear.in_features, linear.out_features):
            linear.add(name, shape, sides, trains=False, bits=bits)


def _flat(name: str, count: int, bits: int) -> _Held:
    """``count`` values that are divided with the Linear, by its inputs or its outputs."""
    return name, (count,), ("all",), bits


def _scales(outputs: int, groups: int) -> _Held:
    """Divided with the outputs, and with the inputs where these have ``groups``: a channel's one scale stays."""
    return "scales", (outputs, groups), ("out", "all"), 32


class _FourBit(sft.Plugin):
    api_version = 1
    kind: ClassVar[str]
    paddlenlp: ClassVar[dict[str, sft.Foreign]] = {
        "weight_double_quant_block_size": sft.Foreign(
            "blocks of doubly quantized absmax have 256 values", ("256",), "a number"
        )
    }
    reference = "arXiv 2305.14314"

    @sft.hookimpl
    def sft_check(self, run: Run) -> None:
        if self.options.qlora_weight_blocksize % 2:
            raise UsageError("qlora_weight_blocksize must be even: two values share a byte.")

    @sft.hookimpl
    def sft_quantizer(self, run: Run) -> Quantizer:
        from sft_quant_nf4.codes import quantize_blocks
        from sft_quant_nf4.layers import BlockLinear

        size, double = self.options.qlora_weight_blocksize, self.options.qlora_weight_double_quant
        return _Quantizer(lambda weight, bias: BlockLinear(quantize_blocks(weight, self.kind, size, double), bias))

    @sft.hookimpl(optionalhook=True)
    def parallel_outline(self, outline: Any) -> None:
        size, double = self.options.qlora_weight_blocksize, self.options.qlora_weight_double_quant

        def held(inputs: int, outputs: int) -> list[_Held]:
            blocks = -(-inputs * outputs // size)
            absmax = [_flat("absmax", blocks, 32)]
            if double:
                # Divided along a dimension of length 1: whole in every process.
                of_groups = ("double_absmax", (-(-blocks // 256), 1), (None, "all"), 32)
                absmax = [_flat("double_codes", blocks, 8), of_groups]
            return [_flat("codes", -(-blocks * size // 2), 8), *absmax]

        _replace_weights(outline, held)


class Nf4(_FourBit):
    """The 16 quantiles of a normal distribution, an absmax a block."""

    name = kind = "nf4"
    summary = "Hold the base model's Linears in 4-bit NormalFloat."
    Options = Nf4Options


class Fp4(_FourBit):
    """A 4-bit float (sign, two exponent bits, one mantissa bit), an absmax a block."""

    name = kind = "fp4"
    summary = "Hold the base model's Linears in 4-bit floats."
    Options = Fp4Options


class Int8(sft.Plugin):
    """absmax / 127 of each output channel."""

    name = "int8"
    api_version = 1
    summary = "Hold the base model's Linears in 8-bit whole numbers."
    reference = "PaddleNLP, weight_only_int8"
    Options = Int8Options

    @sft.hookimpl
    def sft_quantizer(self, run: Run) -> Quantizer:
        from sft_quant_nf4.codes import quantize_channels
        from sft_quant_nf4.kernels import Kernel
        from sft_quant_nf4.layers import ChannelLinear

        kernel = Kernel(_say(run))
        return _Quantizer(lambda weight, bias: ChannelLinear(quantize_channels(weight, 8, None), bias, kernel))

    @sft.hookimpl(optionalhook=True)
    def parallel_outline(self, outline: Any) -> None:
        _replace_weights(outline, lambda ins, outs: [_flat("codes", ins * outs, 8), _scales(outs, 1)])


class Int4(sft.Plugin):
    """absmax / 7 of each output channel, or of each group of its inputs."""

    name = "int4"
    api_version = 1
    summary = "Hold the base model's Linears in 4-bit whole numbers."
    reference = "PaddleNLP, weight_only_int4"
    Options = Int4Options

    @sft.hookimpl
    def sft_quantizer(self, run: Run) -> Quantizer:
        from sft_quant_nf4.codes import quantize_channels
        from sft_quant_nf4.kernels import Kernel
        from sft_quant_nf4.layers import ChannelLinear

        group, kernel = self.options.weight_only_group_size, Kernel(_say(run))

        def make(weight: np.ndarray, bias: np.ndarray | None) -> Any:
            if group and weight.shape[1] % group:
                raise UsageError(f"weight_only_group_size {group} does not divide {weight.shape[1]} inputs of a layer.")
            return ChannelLinear(quantize_channels(weight, 4, group), bias, kernel)

        return _Quantizer(make)

    @sft.hookimpl(optionalhook=True)
    def parallel_outline(self, outline: Any) -> None:
        group = self.options.weight_only_group_size

        def held(inputs: int, outputs: int) -> list[_Held]:
            codes = _flat("codes", outputs * -(-inputs // 2), 8)
            return [codes, _scales(outputs, inputs // group if group else 1)]

        _replace_weights(outline, held)
