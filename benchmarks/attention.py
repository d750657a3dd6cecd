"""Attention: how its cost grows with a row's tokens, and what it costs that a row holds several documents."""

from __future__ import annotations

import json
import os
import sys
import time
from typing import TYPE_CHECKING, Any

from benchmarks.turns import PAUSE, SideError, Turns, alternate, serve

if TYPE_CHECKING:
    from benchmarks.bench import Bench
    from benchmarks.turns import Side

TITLE = "Attention"
TEXT = """\
Seconds of one layer's attention, forward and backward, with 9 heads (3 of keys and values) of size 64 in float32, over
a row of equally long documents that do not see each other. sft computes what a run computes with; transformers hands
torch's `scaled_dot_product_attention` a dense mask, or none where the row is one document. Masks are made before, since
they serve all layers. The exponent e of seconds ~ tokensᵉ is fitted to all points of a line; a peer's figure in bold is
ahead. A side that would take more than half of the machine's memory stops there."""
TOKENS = (1024, 2048, 4096, 8192, 16384, 32768)
DOCUMENTS = (1, 4, 16, 64)
HEADS, GROUPS, SIZE = 9, 3, 64


def cases() -> dict[str, str]:
    return {str(count): f"{count} document{'s' if count > 1 else ''}" for count in DOCUMENTS}


def measure(bench: Bench, case: str) -> dict[str, Any]:
    from benchmarks import figures, materials

    begun = figures.moment()
    limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    model = materials.write_model(bench.scratch / "one-layer", layers=1)
    options = {"model": str(model), "data": str(materials.write_records(bench.scratch / "few", 20, model))}
    out = str(bench.new_folder("out"))
    sides = [bench.side(__name__, "sft", memory=limit, out=out, settings=bench.settings, **options)]
    failed: dict[str, str] = {}
    try:
        try:
            if bench.wants("transformers"):
                sides.append(bench.side(__name__, "transformers", "trl", memory=limit))
        except RuntimeError as error:
            failed["transformers"] = str(error)
        facts = {side.name: side.facts for side in sides}
        points: dict[str, dict[str, Any]] = {side.name: {} for side in sides}
        peaks: dict[str, int] = {}
        for tokens in TOKENS:
            for name, turns in turns_of(sides, {"tokens": tokens, "documents": int(case)}, bench, failed).items():
                points[name][str(tokens)] = figures.summary([turn["seconds"] for turn in turns])
                peaks[name] = turns[-1]["peak_mib"]
    finally:
        for side in sides:
            side.end()
    kept: dict[str, Any] = {}
    for name, found in points.items():
        if len(found) < 2:
            continue
        _, exponent = figures.power_law([float(x) for x in found], [point["median"] for point in found.values()])
        kept[name] = {"points": found, "exponent": round(exponent, 2), "peak_mib": peaks[name], **facts[name]}
        if name in failed:
            kept[name]["stopped"] = failed[name]
    for name, reason in failed.items():
        kept.setdefault(name, {"failed": reason})
    return {"unit": "seconds", "more_is_better": False, **begun, "machine": figures.machine(), "sides": kept}


def turns_of(
    sides: list[Side], order: dict[str, int], bench: Bench, failed: dict[str, str]
) -> dict[str, list[dict[str, Any]]]:
    """The turns of one point; a side that ends is taken out of ``sides``, and the others have their turns again."""
    turns = 1 if order["tokens"] > 16384 else 2 if order["tokens"] > 8192 else 5
    while sides:
        try:
            return alternate(sides, bench.turns or turns, order, warm=1 if turns > 2 else 0, pause=PAUSE)
        except SideError as error:
            failed[error.side] = f"at {order['tokens']:,} tokens: {error}"
            print(f"  {failed[error.side]}", flush=True)
            sides[:] = [side for side in sides if side.name != error.side]
    return {}


def told(result: dict[str, Any]) -> list[str]:
    """For the terminal."""
    lines = []
    for name, side in result["sides"].items():
        if "failed" in side:
            lines.append(f"  {name:<13} did not run: {side['failed']}")
            continue
        seconds = ", ".join(f"{int(tokens):,}: {point['median']:.4g}" for tokens, point in side["points"].items())
        lines.append(f"  {name:<13} seconds by tokens {seconds}; exponent {side['exponent']}, {side['peak_mib']:,} MiB")
    return lines


def sft_side(options: dict[str, Any]) -> None:
    turns = Turns()
    import numpy as np
    import paddle

    import sft
    from sft.models.forward import RowReading

    def batch_of(tokens: int, documents: int) -> sft.Batch:
        each = tokens // documents
        places = np.arange(tokens) % each
        ends = (np.arange(tokens) // each + 1) * each
        ids = np.zeros((1, tokens), np.int64)
        return sft.Batch(ids, ids, places[None], ends.astype(np.int32).reshape(1, 1, -1, 1), ((each,) * documents,))

    class Turnstile(sft.Plugin):
        name = "turnstile"
        api_version = 1

        @sft.hookimpl
        def sft_run_started(self, run: Any) -> None:
            model = run.model

            def repeat(order: dict[str, int]) -> dict[str, Any]:
                tokens = order["tokens"]
                reading = RowReading(model.architecture, batch_of(**order), model.attention, model.kernels)
                query, key, value = (paddle.randn([1, tokens, heads, SIZE]) for heads in (HEADS, GROUPS, GROUPS))
                for tensor in (query, key, value):
                    tensor.stop_gradient = False
                slope = paddle.ones([1, tokens, HEADS, SIZE])
                began = time.perf_counter()
                reading.attend(0, query, key, value).reshape(slope.shape).backward(slope)
                float(key.grad.sum())
                return {"seconds": time.perf_counter() - began}

            turns.ready("paddlepaddle", plugins=[name for name in run.plugins.names if name != "turnstile"])
            serve(turns, repeat)

    from benchmarks.steps import sft_settings

    work = {"kind": "lora", "packed": True, "dtype": "float32", **options}
    sft.run({**sft_settings(work), "max_steps": 1}, plugins=[Turnstile])


def transformers_side(_: dict[str, Any]) -> None:
    turns = Turns()
    import torch

    def repeat(order: dict[str, int]) -> dict[str, Any]:
        tokens, documents = order["tokens"], order["documents"]
        query, key, value = (
            torch.randn(1, heads, tokens, SIZE, requires_grad=True) for heads in (HEADS, GROUPS, GROUPS)
        )
        mask = None
        if documents > 1:
            places = torch.arange(tokens)
            number = places // (tokens // documents)
            mask = ((number[:, None] == number) & (places[:, None] >= places))[None, None]
        slope = torch.ones(1, HEADS, tokens, SIZE)
        began = time.perf_counter()
        wide_key, wide_value = (x.repeat_interleave(HEADS // GROUPS, dim=1) for x in (key, value))
        out = torch.nn.functional.scaled_dot_product_attention(
            query, wide_key, wide_value, attn_mask=mask, is_causal=mask is None
        )
        out.backward(slope)
        assert key.grad is not None
        float(key.grad.sum())
        return {"seconds": time.perf_counter() - began}

    turns.ready("torch", "transformers", threads=torch.get_num_threads())
    serve(turns, repeat)


SIDES = {"sft": sft_side, "transformers": transformers_side}

if __name__ == "__main__":
    SIDES[sys.argv[1]](json.loads(sys.argv[2]))
