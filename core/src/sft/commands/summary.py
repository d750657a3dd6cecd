"""The end of a run in a few lines; the first is what matters, and alone where a run is to be quiet."""

from __future__ import annotations

from sft.context import Summary
from sft.durations import short
from sft.facts import Fact, lines_of, wrapped
from sft.foreign_text import one_line
from sft.progress import Progress
from sft.run_report.value import PAGE
from sft.voice import LEVELS


def tell_summary(summary: Summary, progress: Progress) -> None:
    """Say what a run has come to, as it says everything else."""
    width = progress.width
    first, *more = wrapped(one_line(headline(summary)), None if width is None else width - 2)
    lines = [first, *(f"  {line}" for line in more)]
    if progress.level == LEVELS[0]:
        page = summary.output_dir / PAGE
        report = ["", f"report: {page}"] if page.is_file() else []
        lines = ["", *lines, *lines_of(facts(summary), width, 12), *answers(summary), *report]
    progress.tell("summary", summary.as_dict(), lines, "warning")


def headline(summary: Summary) -> str:
    """What was learned, how long that took, and where it is."""
    steps = f"{summary.steps:,} step{'s' * (summary.steps != 1)} ({summary.epochs:.2f} epochs)"
    if summary.train_loss_last is None:
        after = summary.eval_loss_after
        loss = "not measured" if after is None else f"{after:.4f}"
        return f"done: dev loss {loss}, after {steps}, measured in {short(summary.seconds)}; {_place(summary)}"
    if summary.eval_loss_after is not None:
        learned = f"dev loss {_fall(summary.eval_loss_before, summary.eval_loss_after)}"
    else:
        learned = f"train loss {_fall(summary.train_loss_first, summary.train_loss_last)}"
    return f"done: {learned}, {steps} in {short(summary.seconds)}; {_place(summary)}"


def _place(summary: Summary) -> str:
    return f"written to {summary.output_dir}"


def facts(summary: Summary) -> list[Fact]:
    """What else there is to know."""
    found: list[Fact] = []
    if summary.stopped_early is not None:
        early = summary.stopped_early
        found.append(("ended early", [f"after step {early['step']}: {early['reason']}"]))
    if summary.train_loss_last is not None and summary.eval_loss_after is not None:
        found.append(("train loss", [_fall(summary.train_loss_first, summary.train_loss_last)]))
    trained, total = summary.trainable_parameters, summary.total_parameters
    found.append(("trained", [f"{trained:,} of {total:,} parameters"]))
    padded = 100 * summary.padding_tokens / max(1, summary.tokens + summary.padding_tokens)
    tokens = (
        f"{summary.tokens:,} in {summary.rows:,} rows ({summary.target_tokens:,} targets), "
        f"{summary.padding_tokens:,} padding ({padded:.1f} %)"
    )
    found.append(("tokens", [tokens]))
    skipped = [
        f"{counts['records_skipped']:,} of {counts['records']:,} {split} records, which cannot be read "
        "(bad_records.jsonl)"
        for split, counts in summary.data.items()
        if counts["records_skipped"]
    ]
    if summary.skipped_steps:
        skipped.append(f"{summary.skipped_steps:,} steps that changed nothing")
    if skipped:
        found.append(("skipped", skipped))
    return [*found, ("peak memory", [f"{summary.peak_memory_mib:,} MiB"])]


def answers(summary: Summary) -> list[str]:
    """The answers to sample prompts, before and after."""
    return [
        line
        for sample in summary.samples
        for text in (
            "",
            f"prompt: {_block(sample['prompt'])}",
            f"  before: {_block(sample['before'])}",
            f"  after:  {_block(sample['after'])}",
        )
        for line in text.split("\n")
    ]


def _block(text: str) -> str:
    """Lines of data or of a model, which cannot be taken for ours."""
    return text.replace("\r\n", "\n").expandtabs(4).replace("\n", "\n    ")


def _fall(before: float | None, after: float | None) -> str:
    if before is None or after is None:
        return "not measured"
    return f"{before:.4f} -> {after:.4f} ({after - before:+.4f})"
