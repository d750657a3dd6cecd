"""Loading: from files to a model in memory, beside transformers, bitsandbytes and PaddleNLP."""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from benchmarks.turns import Turns, serve

if TYPE_CHECKING:
    from benchmarks.bench import Bench

TITLE = "Loading"
TEXT = """\
Seconds from the files of a model (float32, in the system's cache) to its weights in memory, as float32, as bfloat16, or
quantized to NF4 with double quantization on the way; libraries are imported before. Imports count in the memory."""


def cases() -> dict[str, str]:
    return {kind: f"as {kind}" for kind in ("float32", "bfloat16", "NF4")}


def measure(bench: Bench, case: str) -> dict[str, Any]:
    options = {"model": str(bench.model), "kind": case}
    sides = {
        "sft": lambda: bench.side(__name__, "sft", **options),
        "transformers": lambda: bench.side(__name__, "transformers", "trl", **options),
        "paddlenlp": lambda: bench.side(__name__, "paddlenlp", "paddlenlp", **options),
    }
    if case == "NF4":
        del sides["paddlenlp"]  # which has no 4 bits on a CPU
    return bench.compare(sides, lambda turn: turn["seconds"], turns=7, unit="seconds", more_is_better=False)


def serve_loader(turns: Turns, load: Callable[[], Any], *packages: str) -> None:
    def repeat(_: Any) -> dict[str, Any]:
        gc.collect()
        began = time.perf_counter()
        model = load()
        seconds = time.perf_counter() - began
        del model
        return {"seconds": seconds}

    turns.ready(*packages)
    serve(turns, repeat)


def sft_side(options: dict[str, Any]) -> None:
    turns = Turns()
    import sft

    sft.prepare()
    from sft.inference.open import load_adapted, settings_for, use
    from sft.progress import Progress

    plugins = ["nf4"] if options["kind"] == "NF4" else []
    given: dict[str, Any] = {"model_name_or_path": options["model"], "device": "cpu"}
    if plugins:
        given["qlora_weight_double_quant"] = True
    if options["kind"] == "bfloat16":
        given["bf16"] = True
    settings, active = settings_for(None, plugins, given, ("sft generate", ("sft_quantizer", "sft_kernels")))
    precision, progress = use(settings, print), Progress(print)

    def load() -> Any:
        source = sft.open_model(options["model"], active)
        return load_adapted(source, settings, active, None, precision, progress)

    serve_loader(turns, load, "sft-core", "paddlepaddle")


def transformers_side(options: dict[str, Any]) -> None:
    turns = Turns()
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    if options["kind"] == "NF4":
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )
        more = {"dtype": torch.float32, "quantization_config": config}
    else:
        more = {"dtype": getattr(torch, options["kind"])}
    packages = ("torch", "transformers", *(["bitsandbytes"] if options["kind"] == "NF4" else []))

    def load() -> Any:
        model = AutoModelForCausalLM.from_pretrained(options["model"], **more)
        for parameter in model.parameters():  # the file may only have been mapped: one value of each page reads it
            parameter.detach().flatten()[:: 4096 // parameter.element_size()].float().sum()
        return model

    serve_loader(turns, load, *packages)


def paddlenlp_side(options: dict[str, Any]) -> None:
    turns = Turns()
    from paddlenlp.transformers import LlamaForCausalLM

    def load() -> Any:
        return LlamaForCausalLM.from_pretrained(options["model"], convert_from_torch=True, dtype=options["kind"])

    serve_loader(turns, load, "paddlenlp", "paddlepaddle")


SIDES = {"sft": sft_side, "transformers": transformers_side, "paddlenlp": paddlenlp_side}

if __name__ == "__main__":
    SIDES[sys.argv[1]](json.loads(sys.argv[2]))
