"""The page of a run, or of several side by side. It needs nothing else: no network, no other file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

from sft.foreign_text import harmless
from sft.pages import document, table, text
from sft.run_report import pictures, words
from sft.run_report.curves import number_of
from sft.run_report.library import charts, report_page
from sft.run_report.value import Answers, RunReport

MADE_BY = "sft report"


def page(runs: Sequence[RunReport]) -> str:
    """The page, as HTML."""
    names = " · ".join(run.name for run in runs)
    parts = [(name, pieces) for name, make in _SECTIONS.items() if (pieces := list(make(runs)))]
    links = "".join(f'<a href="#{_mark(name)}">{name}</a>' for name, _ in parts)
    body: list[str] = []
    for name, pieces in parts:
        body += [f'<section aria-labelledby="{_mark(name)}"><h2 id="{_mark(name)}">{name}</h2>', *pieces, "</section>"]
    (script, style), (own_script, own_style) = charts(), report_page()
    return document(
        MADE_BY,
        f"{names} · {MADE_BY}",
        body,
        above=f'{_header(runs, names)}<nav aria-label="Parts of this page">{links}</nav>\n',
        below=f"<footer>{text(_ends(runs))}</footer>\n",
        style=style + own_style,
        scripts=[script, own_script],
        data={"runs": [_drawn(run) for run in runs]},
    )


def _drawn(run: RunReport) -> dict[str, Any]:
    """What the charts need of a run."""
    curves = [{**asdict(one), "chart": harmless(one.chart), "name": harmless(one.name)} for one in run.curves]
    return {"name": harmless(run.name), "moments": asdict(run.moments), "curves": curves}


def _header(runs: Sequence[RunReport], names: str) -> str:
    pieces = [f"<header><h1>{text(names)}</h1>"]
    if len(runs) == 1:
        run = runs[0]
        pieces.append(f'<span class="status {text(run.status)}">{text(run.status)}</span>')
        pieces.append(f"<p>{text(words.sentence(run))}</p>")
    pieces.append("</header>")
    for run in runs:
        if run.error is not None:
            name = f"{run.name}: " if len(runs) > 1 else ""
            pieces.append(f'<p class="error">{text(name + run.error)}</p>')
    return "".join(pieces)


# --- the parts, each from all runs ---------------------------------------------------------------------------


def _overview(runs: Sequence[RunReport]) -> Iterator[str]:
    if len(runs) == 1:
        tiles = (
            f"<div><dt>{text(label)}</dt><dd>{text(value)}<small>{text(before)}</small></dd></div>"
            for label, value, before in words.figures(runs[0])
        )
        yield f'<dl class="tiles">{"".join(tiles)}</dl>'
        return
    figures = [{label: (value, before) for label, value, before in words.figures(run)} for run in runs]
    labels = list(dict.fromkeys(label for one in figures for label in one))
    rows = [
        ["figure", *(run.name for run in runs)],
        ["status", *(f"{run.status} {words.sentence(run)}" for run in runs)],
    ]
    rows += [[label, *(" · ".join(filter(None, one.get(label, ("–", "")))) for one in figures)] for label in labels]
    yield _compared(rows)


def _differences(runs: Sequence[RunReport]) -> Iterator[str]:
    if len(runs) == 1:
        return
    for title, found in (
        ("Settings", words.differences(runs)),
        ("Plugins, versions and machines", words.other_differences(runs)),
    ):
        yield f"<h3>{title}</h3>"
        if found:
            rows = [[name, *map(words.value, values)] for name, values in found.items()]
            yield _compared([["setting", *(run.name for run in runs)], *rows])
        else:
            yield '<p class="note">They are the same in all runs.</p>'


def _curves(runs: Sequence[RunReport]) -> Iterator[str]:
    if not any(run.curves for run in runs):
        return
    yield (
        '<p class="note">Move over a chart to read all of them at that step, drag to zoom all of them, click twice for '
        "the whole run. A name in a legend hides its curve.</p>"
        '<div id="charts"><noscript><p>The charts need JavaScript, which this browser has switched off.</p></noscript>'
        "</div>"
    )
    for run in runs:
        if run.evaluations:
            yield f"<details><summary>{_of('Evaluations', run, runs)}</summary>{_evaluations(run)}</details>"


def _evaluations(run: RunReport) -> str:
    keys = dict.fromkeys(key for line in run.evaluations for key, value in line.items() if number_of(value) is not None)
    keys.pop("step", None)
    heads = ["step", *(key.removeprefix("eval_") for key in keys)]
    rows = [[f"{line['step']:,}", *(_figure(line.get(key)) for key in keys)] for line in run.evaluations]
    return _figures(heads, rows)


def _answers(runs: Sequence[RunReport]) -> Iterator[str]:
    asked: dict[tuple[str, str], list[tuple[RunReport, Answers]]] = {}
    for run in runs:
        for one in run.answers:
            asked.setdefault((one.prompt, one.reference), []).append((run, one))
    if not asked:
        return
    yield '<div class="answers">'
    for (prompt, reference), answered in asked.items():
        rows = [f'<dt>reference</dt><dd class="reference">{text(reference)}</dd>'] if reference else []
        on_the_way: list[str] = []
        for run, one in answered:
            for given in one.given:
                when = given.when if given.when != "during" else f"step {given.step:,}"
                label = when if len(runs) == 1 else f"{run.name}: {when}"
                told = f'<dt>{text(label)}</dt><dd class="{given.when}">{text(given.text)}</dd>'
                (on_the_way if given.when == "during" else rows).append(told)
        said = f"{len(on_the_way)} answer{'s' * (len(on_the_way) != 1)} on the way"
        folded = f"<details><summary>{said}</summary><dl>{''.join(on_the_way)}</dl></details>" if on_the_way else ""
        yield f"<article><h3>{text(prompt)}</h3><dl>{''.join(rows)}</dl>{folded}</article>"
    yield "</div>"


def _rows(runs: Sequence[RunReport]) -> Iterator[str]:
    widest = max((row.width for run in runs for row in run.rows), default=0)
    for run in runs:
        if not run.rows:
            continue
        if len(runs) > 1:
            yield f"<h3>{text(run.name)}</h3>"
        tokens, width = sum(row.tokens for row in run.rows), sum(row.width for row in run.rows)
        count = len(run.rows)
        first = "The first row that was trained" if count == 1 else f"The first {count} rows that were trained"
        shares = "Several records share a row." if run.packs else "Each record has a row."
        yield f'<p class="note">{first}, {tokens / max(1, width):.1%} full. {shares}</p>'
        yield _key()
        drawn = "".join(
            f"<span>{number}</span>{pictures.row(row, number, widest)}<span>{pictures.of_row(row)}</span>"
            for number, row in enumerate(run.rows, start=1)
        )
        if run.mask is None or not 0 <= run.mask.row < count:
            yield f'<div class="rows">{drawn}</div>'
            continue
        seen = run.rows[run.mask.row]
        yield (
            f'<div class="two"><div class="rows">{drawn}</div><figure><figcaption>Who sees whom in row '
            f"{run.mask.row + 1}: each token, from top to bottom, sees those before it in its own document, from left "
            f"to right.</figcaption>{pictures.mask(run.mask, seen.documents)}</figure></div>"
        )


def _key() -> str:
    box = '<svg aria-hidden="true"><rect class="{}" width="100%" height="100%"/></svg>'
    kinds = {"c0 faint": "read", "c0": "learned", "padding": "padding"}
    return f'<p class="key">{"".join(f"<span>{box.format(kind)}{said}</span>" for kind, said in kinds.items())}</p>'


def _layers(runs: Sequence[RunReport]) -> Iterator[str]:
    for run in runs:
        if not run.layers:
            continue
        parts = list(dict.fromkeys(part for layer in run.layers for part in layer.trained))
        if len(runs) > 1:
            yield f"<h3>{text(run.name)}</h3>"
        if run.trained and run.total:
            yield (
                f'<p class="note">{run.trained:,} of {run.total:,} parameters train '
                f"({100 * run.trained / run.total:.2f} %). A column is a layer.</p>"
            )
        yield pictures.layers(run.layers, parts)
        box = '<svg aria-hidden="true"><rect class="c{}" width="100%" height="100%"/></svg>'
        key = (f"<span>{box.format(n % pictures.PARTS)}{text(part)}</span>" for n, part in enumerate(parts))
        yield f'<p class="key">{"".join(key)}</p>'
        heads = ["layer", *parts, "all"]
        rows = [
            [name, *(f"{layer.trained.get(part, 0):,}" for part in parts), f"{sum(layer.trained.values()):,}"]
            for name, layer in pictures.alike(run.layers)
        ]
        yield f"<details><summary>In numbers</summary>{_figures(heads, rows)}</details>"


def _data(runs: Sequence[RunReport]) -> Iterator[str]:
    for run in runs:
        told = words.events(run)
        if not told:
            continue
        if len(runs) > 1:
            yield f"<h3>{text(run.name)}</h3>"
        yield table(told)
        if run.skipped.records:
            shown = "".join(f"<li>{text(words.of_skipped(one))}</li>" for one in run.skipped.first)
            more = run.skipped.records - len(run.skipped.first)
            rest = f'<p class="note">and {more:,} more, in bad_records.jsonl</p>' if more else ""
            said = f"{run.skipped.records:,} record{'s' * (run.skipped.records != 1)} that cannot be read"
            yield f'<details open><summary>{said}</summary><ul class="plain">{shown}</ul>{rest}</details>'


def _settings(runs: Sequence[RunReport]) -> Iterator[str]:
    for run in runs:
        if len(runs) > 1:
            yield f"<h3>{text(run.name)}</h3>"
        heads, changed = ["setting", "value", "default"], run.changed
        rows = [[name, words.value(run.settings[name]), words.value(changed[name])] for name in changed]
        yield _figures(heads, rows, numbers=False)
        rest = [[name, words.value(value)] for name, value in run.settings.items() if name not in changed]
        listed = _figures(["setting", "value"], rest, numbers=False)
        yield f"<details><summary>{len(rest)} settings that have their defaults</summary>{listed}</details>"


def _machine(runs: Sequence[RunReport]) -> Iterator[str]:
    for run in runs:
        if len(runs) > 1:
            yield f"<h3>{text(run.name)}</h3>"
        plugins = [f"{name} ({origin})" for name, origin in run.plugins.items()]
        versions = [f"{name} {version}" for name, version in run.packages.items()]
        started = [("started", [run.started])] if run.started else []
        yield table([*started, ("plugins", plugins or ["none"]), ("versions", versions), *words.machine(run)])
        if run.arithmetic:
            told = [(name.replace("_", " "), [words.value(value)]) for name, value in run.arithmetic.items()]
            yield f"<details><summary>{_of('Arithmetic', run, runs)}</summary>{table(told)}</details>"


_SECTIONS: dict[str, Callable[[Sequence[RunReport]], Iterator[str]]] = {
    "Overview": _overview,
    "What differs": _differences,
    "Curves": _curves,
    "Answers": _answers,
    "Rows": _rows,
    "Trained parameters": _layers,
    "Data and events": _data,
    "Settings": _settings,
    "Plugins, versions, machine": _machine,
}


# --- pieces --------------------------------------------------------------------------------------------------


def _mark(name: str) -> str:
    return name.lower().replace(",", "").replace(" ", "-")


def _of(what: str, run: RunReport, runs: Sequence[RunReport]) -> str:
    return text(what if len(runs) == 1 else f"{what} of {run.name}")


def _ends(runs: Sequence[RunReport]) -> str:
    folders = ", ".join(run.folder for run in runs)
    return f"Made by {MADE_BY} from {folders}; the file of JSON that lies beside this page has the same."


def _compared(rows: Sequence[Sequence[str]]) -> str:
    """A table whose first row names the runs."""
    return _figures(rows[0], rows[1:], numbers=False)


def _figures(heads: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: bool = True) -> str:
    """A table with heads; what is wider than the page is moved sideways, by keys too."""
    kind = ' class="n"' if numbers else ""
    top = "".join(f'<th scope="col"{kind if n else ""}>{text(head)}</th>' for n, head in enumerate(heads))
    body = "".join(
        f'<tr><th scope="row">{text(row[0])}</th>{"".join(f"<td{kind}>{text(cell)}</td>" for cell in row[1:])}</tr>'
        for row in rows
    )
    label = text(", ".join(filter(None, heads)))
    return (
        f'<div class="scroll" tabindex="0" role="group" aria-label="Table of {label}"><table class="figures">'
        f"<thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _figure(value: Any) -> str:
    if number_of(value) is None:
        return ""
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.4f}" if abs(value) >= 1e-3 or value == 0 else f"{value:.2e}"
