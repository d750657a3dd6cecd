"""``sft merge``: an adapter folded into its base."""

from __future__ import annotations

from pathlib import Path

import click

from sft.commands.shared import ADAPTER, MODEL, PLUGIN


@click.command(name="merge")
@click.option(*MODEL, required=True, help="The base model: a directory or a hub name.")
@click.option(*ADAPTER, required=True, help="The adapter: the folder that a run wrote, or any PEFT adapter.")
@click.option(
    "--output_path", "--output-path", "--merge_model_path", "--merge-model-path", "output", required=True,
    help="Where the merged model is written, in Hugging Face layout; must be new or empty.",
)  # fmt: skip
@click.option(*PLUGIN, multiple=True, help="A quantizer, where run.json does not name it; no:NAME leaves one out.")
def command(model: str, adapter: str, output: str, plugins: tuple[str, ...]) -> None:
    """Fold an adapter into its base model.

    Weights are streamed: float32 arithmetic, the base's dtype on disk. transformers loads the result as it
    is, PaddleNLP with convert_from_torch=True.
    """
    from sft.adapters import merge

    changed = merge(model, Path(adapter), Path(output), click.echo, plugins)
    click.echo(f"merged {changed} tensors; written to {output}")
