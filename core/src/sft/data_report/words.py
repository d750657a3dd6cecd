"""The figures of a report in words: what the terminal and the page say alike. Texts of data are in none of them but
places, which are harmless already or made so here."""

from __future__ import annotations

from sft.data.encoded import Counts
from sft.data_report.value import DataReport, Duplicates, NearDuplicates, RowCount, SetCounts, ShownRecord, Split
from sft.facts import Fact
from sft.foreign_text import shown


def heading(report: DataReport) -> list[Fact]:
    settings = ", ".join(f"{name} {_value(value)}" for name, value in report.settings.items() if value is not None)
    return [
        ("data", [shown(report.dataset)]),
        ("model", [shown(report.model)]),
        ("template", [shown(report.chat_template)]),
        ("settings", [settings]),
    ]


def of_split(split: Split, max_length: int) -> list[Fact]:
    """What the records of train or dev data are, and what became of them."""
    counts = Counts.of(split.counts)
    formats = ", ".join(f"{number:,} of {shown(name)}" for name, number in split.formats.items())
    files = f"{len(split.files)} file{'s' * (len(split.files) != 1)}, {_size(split.bytes)}"
    facts: list[Fact] = [
        ("records", [f"{counts.records:,} in {files}: {formats}"]),
        ("turns", [", ".join(f"{number:,} {shown(role)}" for role, number in split.turns.items())]),
        (
            "tokens",
            [f"{counts.tokens:,} read, {counts.target_tokens:,} of them learned ({_share(split.trained_share)})"],
        ),
        ("became", [", ".join(counts.events()) or "nothing is cut, dropped or rewritten"]),
    ]
    if split.sets:
        facts.append(("sets", [_of_set(name, one) for name, one in split.sets.items()]))
    if split.first_skipped is not None:
        facts.append(("skipped", [f"the first: {shown(split.first_skipped, 600)}"]))
    if split.lengths is not None:
        found, over = split.lengths, split.over_long
        share = _share(over / sum(bar.records for bar in found.bars))
        facts.append(
            (
                "lengths",
                [
                    f"mean {found.mean:,.1f}, median {found.median:,}, 90 % up to {found.percentile_90:,}, "
                    f"99 % up to {found.percentile_99:,}, longest {found.longest:,} tokens, before any is cut",
                    f"{over:,} longer than max_length {max_length:,} ({share})",
                ],
            )
        )
    return facts


def below_lengths(report: DataReport, name: str) -> list[Fact]:
    """Which records of the split ``name`` are alike; of train data how rows are filled, of dev data what is in both."""
    split = report.splits[name]
    facts: list[Fact] = [("duplicates", _duplicates(split.duplicates, "equal to an earlier record"))]
    if split.near_duplicates is not None:
        facts.append(("near ones", _near(split.near_duplicates)))
    if name == "train" and report.rows is not None:
        facts.append(_of_rows(report.rows))
    if name == "dev" and report.overlap is not None:
        facts.append(("overlap", _duplicates(report.overlap, "of these records are in the training data too")))
    return facts


def of_record(record: ShownRecord) -> str:
    parts = f" in {len(record.rows)} rows" if len(record.rows) > 1 else ""
    return f"{record.split}: {shown(record.place, 600)}: {record.tokens:,} tokens{parts}, {record.learned:,} learned"


def of_search(report: DataReport) -> str | None:
    """How many records have what was looked for."""
    if report.searched is None:
        return None
    what = shown(repr(report.searched))
    if not report.found:
        return f"no record has {what}"
    here = f", {len(report.records):,} of them here" if len(report.records) != report.found else ""
    return f"{report.found:,} record{'s have' if report.found != 1 else ' has'} {what}{here}"


def _of_rows(rows: RowCount) -> Fact:
    each = f"{rows.records / max(1, rows.rows):.2f} records a row, " if rows.packs else ""
    lines = [
        f"{rows.rows:,} a pass by {shown(rows.collator)}, {each}{rows.padding_tokens:,} tokens of padding "
        f"({_share(rows.padding)}) in batches of {rows.batch_size:,}; {rows.steps:,} step{'s' * (rows.steps != 1)}"
    ]
    if rows.window is not None:
        lines.append(f"shuffled and packed {rows.window:,} records at a time")
    return ("rows", lines)


def _of_set(name: str, one: SetCounts) -> str:
    weight = "" if one.weight is None else f", weight {one.weight:g}"
    counts = Counts.of(one.counts)
    return f"{shown(name)}: {counts.records:,} records of {shown(one.format)}{weight}, {counts}"


def _duplicates(found: Duplicates, what: str) -> list[str]:
    return [
        f"{found.records:,} {what}",
        *(f"{shown(pair.record, 300)} = {shown(pair.earlier, 300)}" for pair in found.first),
    ]


def _near(found: NearDuplicates) -> list[str]:
    sample = f"a sample of {found.sampled:,} of " if found.sampled < found.of else ""
    return [
        f"{found.records:,} are {100 * found.threshold:g} % or more like an earlier one, among {sample}{found.of:,} "
        "different records (MinHash)",
        *(f"{shown(pair.record, 300)} ≈ {shown(pair.earlier, 300)} ({_share(pair.likeness)})" for pair in found.first),
    ]


def _value(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _share(share: float) -> str:
    return f"{100 * share:.1f} %"


def _size(size: int) -> str:
    return f"{size / 1e6:,.1f} MB" if size >= 100_000 else f"{size / 1e3:,.1f} kB"
