"""Answers: tokens a second of ``sft generate``'s decoding beside transformers' ``generate``."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

from benchmarks.turns import Turns, serve

if TYPE_CHECKING:
    from benchmarks.bench import Bench

TITLE = "Generation"
TEXT = """\
Tokens a second of greedy answers of 128 tokens each, to one prompt and to 16 together. The prompts have from 24 to 48
tokens, so the batch is padded. No answer ends early. In bfloat16 sft holds the weights a second time while it answers
several prompts, in the layout of oneDNN's products of few rows ([decision 31](decisions/0031-sixteen-bits.md))."""
TOKENS = 128
LENGTH = 48


def cases() -> dict[str, str]:
    return {
        f"{prompts}-{dtype}": f"{prompts} prompt{'s' if prompts > 1 else ''}, {dtype}"
        for prompts in (1, 16)
        for dtype in ("float32", "bfloat16")
    }


def measure(bench: Bench, case: str) -> dict[str, Any]:
    prompts, dtype = case.split("-")
    options = {"model": str(bench.model), "dtype": dtype}
    return bench.compare(
        {
            "sft": lambda: bench.side(__name__, "sft", settings=bench.settings, **options),
            "transformers": lambda: bench.side(__name__, "transformers", "trl", **options),
        },
        lambda turn: turn["tokens"] / turn["seconds"],
        turns=7,
        unit="tokens/s",
        more_is_better=True,
        order=prompts_of(int(prompts)),
    )


def prompts_of(count: int) -> list[list[int]]:
    """Token ids from 10 to 1,999, from ``LENGTH`` tokens down to half as many."""
    import numpy as np

    sizes = np.linspace(LENGTH, LENGTH // 2, count).round().astype(int)
    return [np.random.default_rng(row).integers(10, 2000, size).tolist() for row, size in enumerate(sizes)]


def sft_side(options: dict[str, Any]) -> None:
    turns = Turns()
    from sft.inference.open import opened, settings_for
    from sft.models.generation import answers

    class Endless:
        """A tokenizer in whose eyes no token ends an answer, and which decodes to the ids."""

        pad_id = 0
        stop_ids: frozenset[int] = frozenset()

        def decode(self, tokens: Any, skip_special_tokens: bool = False) -> str:
            return " ".join(map(str, tokens))

    given = {"model_name_or_path": options["model"], "max_new_tokens": TOKENS, **options["settings"]}
    plugins = given.pop("plugin", [])
    if options["dtype"] == "bfloat16":
        given["bf16"] = True
    uses = ("sft generate", ("sft_kernels",))
    settings, active = settings_for(None, plugins, {"device": "cpu", **given}, uses)
    with opened(settings, active, None, print) as found, found.precision.autocast():

        def repeat(prompts: list[list[int]]) -> dict[str, Any]:
            texts = answers(found.model, Endless(), prompts, settings.generation, seed=0)  # type: ignore[arg-type]
            return {"tokens": sum(len(text.split()) for text in texts), "end": [text.split()[-1] for text in texts]}

        turns.ready("paddlepaddle", plugins=list(active.names))
        serve(turns, repeat)


def transformers_side(options: dict[str, Any]) -> None:
    turns = Turns()
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(options["model"], dtype=getattr(torch, options["dtype"])).eval()
    model.generation_config.eos_token_id = None
    settings = {"max_new_tokens": TOKENS, "do_sample": False, "pad_token_id": 0}

    def repeat(prompts: list[list[int]]) -> dict[str, Any]:
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
        seen = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        with torch.no_grad():
            answers = model.generate(ids, attention_mask=seen, **settings)[:, width:]
        return {"tokens": answers.numel(), "end": [str(token) for token in answers[:, -1].tolist()]}

    turns.ready("torch", "transformers", threads=torch.get_num_threads())
    serve(turns, repeat)


SIDES = {"sft": sft_side, "transformers": transformers_side}

if __name__ == "__main__":
    SIDES[sys.argv[1]](json.loads(sys.argv[2]))
