"""``sft why RUN --prompt TEXT [--answer TEXT]``: the training records that taught an answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

import sft
from sft import UsageError
from sft_influence.tracing import METHODS

METHOD = METHODS[0]


def _names(name: str) -> tuple[str, ...]:
    return (f"--{name}", f"--{name.replace('_', '-')}", name)


@click.command(name="why", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("run", metavar="RUN")
@click.option("--prompt", metavar="TEXT", help="What was asked.")
@click.option("--answer", metavar="TEXT", help="What was answered.  [default: what the last checkpoint answers]")
@click.option(
    "--answers", metavar="FILE",
    help="Several: a file of records (.json, .jsonl, .csv, .parquet), of each of which the last answer is meant, or of "
    "prompts, one a line.",
)  # fmt: skip
@click.option("--top", type=click.IntRange(1), metavar="N", default=10, show_default=True,
              help="So many helpful and so many harmful records.")  # fmt: skip
@click.option("--method", type=click.Choice(METHODS), default=METHOD, show_default=True,
              help="tracin: products of gradients; adam: each value as AdamW's second moments scale it.")  # fmt: skip
@click.option("--checkpoints", metavar="N,M,…", help="The steps of the checkpoints to look at.  [default: all]")
@click.option("--sample", type=click.IntRange(1), metavar="N", help="Look at N records, drawn by the run's seed.  "
              "[default: all]")  # fmt: skip
@click.option(*_names("model_name_or_path"), metavar="TEXT", help="Where the run's model is now.")
@click.option(*_names("dataset_name_or_path"), metavar="TEXT", help="Where its data is now.")
@click.option("--device", metavar="TEXT", help="cpu, gpu or gpu:N.  [default: the run's]")
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON on standard output, and nothing else.")
@click.option("--html", metavar="FILE", help="Write it as one page.")
def command(
    run: str, prompt: str | None, answer: str | None, answers: str | None, top: int, method: str,
    checkpoints: str | None, sample: int | None, as_json: bool, html: str | None, **settings: str | None,
) -> None:  # fmt: skip
    """Name the training records that taught a run its answer.

    RUN is the folder of a run that has kept checkpoints. Each of its records goes forward and backward alone, once for
    each checkpoint near which it was learned, and its gradient is multiplied with that of the answer (TracInCP, arXiv
    2002.08484). How many passes that takes is said first; --sample and --checkpoints make it fewer.

    A score is what the steps on a record took off the answer's loss, to first order: above 0 the record helped, below 0
    it harmed.
    """
    if (prompt is None) == (answers is None):
        both = "are both given; leave one of them out" if prompt is not None else "are both missing; give one of them"
        raise UsageError(f"--prompt and --answers {both}.")
    if answer is not None and prompt is None:
        raise UsageError("--answer belongs to --prompt; the records of --answers have their own.")
    target = None if html is None else Path(html).expanduser()
    from sft_influence.account import Asked, Wanted, account
    from sft_influence.page import MADE_BY, page

    if target is not None:
        sft.check_html(target, MADE_BY)
    wanted = Wanted(method, _steps(checkpoints), sample, top)
    given = {name: value for name, value in settings.items() if value is not None}
    with sft.reopened(Path(run).expanduser(), settings=given) as opened:
        asked: list[Asked] = [*opened.asked(Path(answers).expanduser())] if answers is not None else []
        if prompt is not None:
            asked = [([sft.Turn("user", prompt)], None if answer is None else sft.Turn("assistant", answer))]
        if not asked:
            raise UsageError(f"{answers} asks nothing; give a file of records, or of prompts, one a line.")
        found = account(opened, asked, wanted)
        if target is not None:
            target.write_text(page(found), encoding="utf-8")
            opened.run.say(f"written to {target}")
    _print(found, as_json, target is not None)


def _print(found: Any, as_json: bool, written: bool) -> None:
    if as_json:
        click.echo(json.dumps(found.as_json(), allow_nan=False))
    elif not written:
        from sft_influence.terminal import lines

        for line in lines(found):
            click.echo(line)


def _steps(text: str | None) -> list[int] | None:
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and len(part) < 10 for part in parts):
        raise UsageError(f"--checkpoints: expected steps with commas between them, such as 100,200, got {text!r}.")
    return [int(part) for part in parts]
