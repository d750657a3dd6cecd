"""``sft evaluate``: loss, perplexity, accuracy and answers of a finished model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from sft.commands.completing import complete_path
from sft.commands.shared import GENERATION, SEED, TEMPLATE, model_options, path_of, say, setting_options, typed_values


@click.command(name="evaluate")
@model_options("An attention, or a quantizer where the adapter does not name it; repeatable, no:NAME leaves one out.")
@setting_options(
    *("dataset_name_or_path", "src_length", "max_length", "truncation", "per_device_eval_batch_size", "chat_template"),
    *("enable_thinking", "train_on", "train_on_thoughts"),
    *("on_bad_record", "on_bad_record_limit", "eval_with_do_generation"),
    *GENERATION,
    chat_template=TEMPLATE,
    on_bad_record="what a record does that cannot be read: stop, or skip: it is counted, and the first is named",
    dataset_name_or_path="a folder with dev data (dev.json), or one file; several with commas, each is measured",
    train_on="what is measured: all answers, the last_answer alone, or everything that the model reads",
    train_on_thoughts="thoughts (<think> …) in the answers that are measured: all, those that are not_empty, or none",
    eval_with_do_generation="answer the prompts too, and score the answers (BLEU-4, ROUGE-1, -2, -L, each 0 to 1)",
    seed=SEED,
)
@click.option(
    "--generations",
    callback=path_of,
    shell_complete=complete_path,
    help="File for the answers: a JSON object with prompt, answer and reference a line.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON on standard output, and nothing else.")
def command(
    model: str,
    adapter: str | None,
    plugins: tuple[str, ...],
    generations: str | None,
    as_json: bool,
    **settings: Any,
) -> None:
    """Measure a finished model, with or without an adapter, on dev data: what a run measures at its end.

    Loss (mean over target tokens, in nats), perplexity (its exponential) and accuracy (share of target tokens that
    are the likeliest token). Where src_length, max_length, truncation, train_on, train_on_thoughts and enable_thinking
    are not given, they are those of the run that wrote the adapter or model, if it tells, so that its own numbers come
    out.
    """
    from sft.errors import UsageError
    from sft.inference.evaluate import evaluate_finished
    from sft.training.progress import figures

    if settings["dataset_name_or_path"] is None:
        raise UsageError("dataset_name_or_path is not set; add --dataset_name_or_path VALUE.")
    values = {"model_name_or_path": model, **typed_values(settings)}
    answers = Path(generations).expanduser() if generations else None
    record = evaluate_finished(values, Path(adapter) if adapter else None, say, plugins, answers)
    if as_json:
        click.echo(json.dumps(record, allow_nan=False))
    else:
        click.echo(figures(record).replace("  ", "\n"))
