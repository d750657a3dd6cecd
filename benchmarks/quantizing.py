"""Quantizing: NF4 weights made and read back, beside bitsandbytes on the CPU."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from typing import TYPE_CHECKING, Any

from benchmarks.turns import Turns, serve

if TYPE_CHECKING:
    from benchmarks.bench import Bench

TITLE = "Quantizing"
TEXT = """\
Millions of values a second of a matrix of 4,096 x 4,096: NF4 codes made from float32 with blocks of 64 and double
quantization; float32 [out, in] made of the codes as a training step makes it: by sft in parts that a processor's cache
holds, by bitsandbytes at once. Equal digests mean equal codes."""
SIZE = 4096
CASES = {"quantize": "to NF4, double quantization", "dequantize": "from NF4 to float32"}


def cases() -> dict[str, str]:
    return dict(CASES)


def measure(bench: Bench, case: str) -> dict[str, Any]:
    return bench.compare(
        {
            "sft": lambda: bench.side(__name__, "sft"),
            "bitsandbytes": lambda: bench.side(__name__, "bitsandbytes", "trl"),
        },
        lambda turn: SIZE * SIZE / turn["seconds"] / 1e6,
        turns=9,
        unit="million values/s",
        more_is_better=True,
        order=case,
        also=lambda found: {"digest of codes": found[0]["digest"]},
    )


def weight() -> Any:
    import numpy as np

    return 0.02 * np.random.default_rng(0).standard_normal((SIZE, SIZE), dtype=np.float32)


def digest(codes: Any) -> str:
    return hashlib.sha256(codes.tobytes()).hexdigest()[:8]


def sft_side(_: dict[str, Any]) -> None:
    turns = Turns()
    import sft

    sft.prepare()
    from sft_kernels_cpu.kernels import NativeKernels
    from sft_kernels_cpu.library import native
    from sft_quant_nf4.codes import quantize_blocks
    from sft_quant_nf4.layers import BlockLinear

    values = weight()
    blocks = quantize_blocks(values, "nf4", 64, True)
    layer = BlockLinear(blocks, None)
    if not isinstance(library := native(), str):  # as in a run: without native code the layer's own way
        layer.kernels = NativeKernels(library)

    def repeat(order: str) -> dict[str, Any]:
        began = time.perf_counter()
        if order == "quantize":
            quantize_blocks(values, "nf4", 64, True)
        else:
            for part in layer.parts:
                layer.rows(*part)
        return {"seconds": time.perf_counter() - began, "digest": digest(blocks.codes)}

    turns.ready("sft-quant-nf4", "paddlepaddle")
    serve(turns, repeat)


def bitsandbytes_side(_: dict[str, Any]) -> None:
    turns = Turns()
    import torch
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    values = torch.from_numpy(weight())

    def quantize() -> tuple[Any, Any]:
        found: tuple[Any, Any] = quantize_4bit(values, blocksize=64, compress_statistics=True, quant_type="nf4")
        return found

    codes, state = quantize()

    def repeat(order: str) -> dict[str, Any]:
        began = time.perf_counter()
        if order == "quantize":
            quantize()
        else:
            dequantize_4bit(codes, state)
        return {"seconds": time.perf_counter() - began, "digest": digest(codes.numpy())}

    turns.ready("bitsandbytes", "torch", threads=torch.get_num_threads())
    serve(turns, repeat)


SIDES = {"sft": sft_side, "bitsandbytes": bitsandbytes_side}

if __name__ == "__main__":
    SIDES[sys.argv[1]](json.loads(sys.argv[2]))
