"""``sft merge``: an adapter folded into its base."""

from __future__ import annotations

from pathlib import Path

import click

from sft.commands.completing import complete_path, complete_plugin
from sft.commands.shared import MODEL, PLUGIN, adapter_names, path_of, print_line, setting_options, typed_values

FORMATS = ("hf", "paddle")


@click.command(name="merge")
@click.option(
    *MODEL,
    required=True,
    shell_complete=complete_path,
    help="The base model: a directory, a weight file in one, or a hub name.",
)
@setting_options("allow_pickle")
@click.option(
    *adapter_names(), required=True, callback=path_of, shell_complete=complete_path,
    help="The adapter: the folder that a run wrote, or any PEFT adapter.",
)  # fmt: skip
@click.option(
    "--output_path", "--output-path", "--merge_model_path", "--merge-model-path", "output", required=True,
    callback=path_of, shell_complete=complete_path, help="Where the merged model is written; must be new or empty.",
)  # fmt: skip
@click.option(
    "--format", "layout", type=click.Choice(FORMATS), default="hf", show_default=True,
    help="hf loads in transformers, paddle in PaddleNLP without conversion; sft reads both.",
)  # fmt: skip
@click.option(
    "--safe_serialization", "--safe-serialization", "safe", type=click.BOOL, default=True, show_default=True,
    help="safetensors; false: Paddle's pickled model_state.pdparams, with --format paddle alone.",
)  # fmt: skip
@click.option(
    "--max_shard_size", "--max-shard-size", "shard", default="2GB", show_default=True,
    help="The largest weight file, such as 500MB or 4GiB; a larger model becomes numbered files and an index.",
)  # fmt: skip
@click.option(
    "--dtype", type=click.Choice(("base", "float32")), default="base", show_default=True,
    help="base: that of each tensor on disk, to which the sum is rounded; float32: nothing is rounded.",
)  # fmt: skip
@click.option("--device", help="Where the arithmetic happens: cpu, gpu or gpu:N.  [default: paddle's choice]")
@click.option(
    *PLUGIN,
    multiple=True,
    shell_complete=complete_plugin,
    help="A quantizer, where the adapter does not name it; no:NAME leaves one out.",
)
def command(
    model: str,
    allow_pickle: str | None,
    adapter: str,
    output: str,
    layout: str,
    safe: bool,
    shard: str,
    dtype: str,
    device: str | None,
    plugins: tuple[str, ...],
) -> None:
    """Fold an adapter into its base model.

    Weights are streamed, at most one file of them in memory: float32 arithmetic, and on disk the
    base's dtype (float32 over a quantized base, or with --dtype float32).
    """
    from sft.inference.merge import merge
    from sft.models.shards import WeightFormat, parse_size
    from sft.voice import Printer

    allowed = typed_values({"allow_pickle": allow_pickle}).get("allow_pickle", False)
    form = WeightFormat(layout, safe, parse_size(shard), dtype)
    changed = merge(model, Path(adapter), Path(output), Printer("stdout"), plugins, form, device, allowed)
    print_line(f"merged {changed} tensors; written to {output}")
