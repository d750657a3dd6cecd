"""``sft generate``: answers to prompts."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from sft.commands.shared import ADAPTER, MODEL, PLUGIN
from sft.errors import UsageError


@click.command(name="generate")
@click.option(*MODEL, required=True, help="The model: a directory or a hub name.")
@click.option(*ADAPTER, help="An adapter for it.")
@click.option(*PLUGIN, multiple=True, help="A quantizer, where run.json does not name it; no:NAME leaves one out.")
@click.option("--prompt", multiple=True, help="A prompt (repeatable). Without one, each line of standard input is one.")
@click.option("--max_new_tokens", "--max-new-tokens", default=128, show_default=True, type=click.IntRange(1))
@click.option("--top_k", "--top-k", default=1, show_default=True, type=click.IntRange(0), help="1 is greedy.")
@click.option("--top_p", "--top-p", default=1.0, show_default=True, type=click.FloatRange(0, 1, min_open=True))
@click.option("--temperature", default=1.0, show_default=True, type=click.FloatRange(0, min_open=True))
@click.option("--seed", default=42, show_default=True, type=click.IntRange(0))
def command(
    model: str,
    adapter: str | None,
    plugins: tuple[str, ...],
    prompt: tuple[str, ...],
    max_new_tokens: int,
    top_k: int,
    top_p: float,
    temperature: float,
    seed: int,
) -> None:
    """Answer prompts, through the model's chat template where it has one. Answers go to standard output."""
    from sft.adapters import load_for_inference
    from sft.models.generation import answer
    from sft.seams import Turn
    from sft.settings import GenerationArguments, check_draw

    generation = GenerationArguments(max_new_tokens=max_new_tokens, top_k=top_k, top_p=top_p, temperature=temperature)
    check_draw(generation)
    prompts = list(prompt) or [line.rstrip("\n") for line in sys.stdin if line.strip()]
    if not prompts:
        raise UsageError("There is no prompt; give --prompt TEXT or lines on standard input.")
    say = lambda text: click.echo(text, err=True)  # noqa: E731
    loaded, tokenizer = load_for_inference(model, Path(adapter) if adapter else None, say, plugins)

    for text in prompts:
        click.echo(answer(loaded, tokenizer, [Turn("user", text)], generation, seed))
