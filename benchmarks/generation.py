"""How fast answers come: tokens a second for one prompt and for several at once, of sft and of transformers.

    python benchmarks/generation.py MODEL [--prompts 1 16] [--tokens 64] [--repeats 5] [--transformers PYTHON]

MODEL is a local directory; both sides read it in float32, choose the likeliest token each time, and never stop early.
Prompts have from half of ``--length`` tokens to all of them, so a batch has padding. ``--transformers`` names a Python
that has torch and transformers (sft's own environment need not have them); turn by turn, each repeat times both sides.
Prints the median tokens a second of each side, and how many of the tokens are the same.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

Answer = Callable[[list[list[int]], int], list[list[int]]]


def prompts_of(count: int, length: int, vocabulary: int) -> list[list[int]]:
    rng = np.random.default_rng(count)
    sizes = np.linspace(length, length // 2, count).round().astype(int)
    return [rng.integers(10, min(vocabulary, 20000), size).tolist() for size in sizes]


def sft_side(folder: str) -> Answer:
    from sft import runtime

    runtime.prepare()
    import paddle

    from sft.models.generation import _decode
    from sft.models.loading import load_model, open_model
    from sft.settings.arguments import GenerationArguments

    model = load_model(open_model(Path(folder)))
    endless: Any = SimpleNamespace(pad_id=0, stop_ids=frozenset())

    def answer(prompts: list[list[int]], tokens: int) -> list[list[int]]:
        answers: list[list[int]] = [[] for _ in prompts]
        with paddle.no_grad():
            for step in _decode(model, endless, prompts, GenerationArguments(max_new_tokens=tokens, top_k=1), seed=0):
                for row, token in step.items():
                    answers[row].append(token)
        return answers

    return answer


def transformers_side(folder: str) -> Answer:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None

    def answer(prompts: list[list[int]], tokens: int) -> list[list[int]]:
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
        seen = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        settings = {"max_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
        with torch.no_grad():
            return model.generate(ids, attention_mask=seen, **settings)[:, width:].tolist()

    return answer


def serve(side: Callable[[str], Answer], folder: str) -> None:
    """Answer what stands on standard input, a JSON line a batch: seconds, and the tokens."""
    answer = side(folder)
    for line in sys.stdin:
        prompts, tokens = json.loads(line)
        began = time.perf_counter()
        answers = answer(prompts, tokens)
        print(json.dumps([time.perf_counter() - began, answers]), flush=True)


class Side:
    """A process that answers for one side."""

    def __init__(self, python: str, name: str, folder: str) -> None:
        command = [python, __file__, folder, "--serve", name]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, prompts: list[list[int]], tokens: int) -> tuple[float, list[list[int]]]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps([prompts, tokens]), file=self._process.stdin, flush=True)
        while line := self._process.stdout.readline():
            if line.startswith("["):
                seconds, answers = json.loads(line)
                return seconds, answers
        raise SystemExit("One side ended; what it printed stands above.")

    def end(self) -> None:
        self._process.communicate("")


SIDES = {"sft": sft_side, "transformers": transformers_side}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--prompts", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--length", type=int, default=48)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--transformers", metavar="PYTHON")
    parser.add_argument("--serve", choices=SIDES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(SIDES[arguments.serve], arguments.model)
        return
    with open(f"{arguments.model}/config.json", encoding="utf-8") as file:
        vocabulary = json.load(file)["vocab_size"]
    sides = {"sft": Side(sys.executable, "sft", arguments.model)}
    if arguments.transformers:
        sides["transformers"] = Side(arguments.transformers, "transformers", arguments.model)
    for count in arguments.prompts:
        prompts = prompts_of(count, arguments.length, vocabulary)
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        answers: dict[str, list[list[int]]] = {}
        for turn in range(arguments.repeats + 1):
            for name, side in sides.items():
                took, answers[name] = side.ask(prompts, arguments.tokens)
                if turn:  # the first is for warming up
                    seconds[name].append(took)
        for name, values in seconds.items():
            rate = count * arguments.tokens / statistics.median(values)
            print(f"{count:>3} prompts  {name:<13} {rate:7.1f} tokens/s (median of {len(values)})")
        if len(sides) == 2:
            ours, theirs = (np.asarray(answers[name]) for name in SIDES)
            rate = statistics.median(seconds["transformers"]) / statistics.median(seconds["sft"])
            print(f"{count:>3} prompts  sft / transformers = {rate:.2f}; {(ours == theirs).mean():.1%} of tokens alike")
    for side in sides.values():
        side.end()


if __name__ == "__main__":
    main()
