"""Pictures of a run that stand still, as SVG that a style colours: rows with their documents, who sees whom in a row,
and how many parameters of each layer train."""

from __future__ import annotations

from collections.abc import Sequence

from sft.pages import text
from sft.run_report.value import Document, Layer, Mask, Row

DOCUMENTS, PARTS = 6, 10
"""Documents that follow each other, and parts of a layer, have so many colours in turn (classes ``c0`` and so on)."""
_SVG = '<svg role="img"'


def row(one: Row, number: int, widest: int) -> str:
    """A row of a batch: its documents from left to right, what is learned of them stronger, and its padding. Rows of
    ``widest`` tokens fill the width."""
    pieces, at = [], 0
    for count, document in enumerate(one.documents):
        pieces.append(f'<g class="c{count % DOCUMENTS}"><title>{text(_of_document(document))}</title>')
        for part, tokens in enumerate(document.spans):
            if tokens:
                kind = ' class="learned"' if part % 2 else ""
                pieces.append(f'<rect x="{at}" y="0" width="{tokens}" height="1"{kind}/>')
                at += tokens
        pieces.append("</g>")
        if count + 1 < len(one.documents):
            pieces.append(f'<line x1="{at}" x2="{at}" y1="0" y2="1"/>')
    if at < one.width:
        label = f"{one.width - at:,} tokens of padding"
        pieces.append(
            f'<rect class="padding" x="{at}" y="0" width="{one.width - at}" height="1"><title>{label}</title></rect>'
        )
    said = f"row {number}: {of_row(one)}"
    return (
        f'{_SVG} class="row" viewBox="0 0 {widest} 1" preserveAspectRatio="none" aria-label="{said}">'
        f"{''.join(pieces)}</svg>"
    )


def of_row(one: Row) -> str:
    """A row in words."""
    count = len(one.documents)
    padding = one.width - one.tokens
    return f"{count} document{'s' * (count != 1)}, {one.tokens:,} tokens{f' + {padding:,} padding' if padding else ''}"


def mask(of: Mask, documents: Sequence[Document]) -> str:
    """Who sees whom: a square of tokens, from top to bottom those that look, from left to right those that are seen."""
    size = sum(count for _, count in of.ends)
    edges, at = [], 0
    for document in documents:
        at += document.tokens
        edges.append(at)
    pieces, first, number = [], 0, 0
    for end, count in of.ends:
        while number < len(edges) - 1 and first >= edges[number]:
            number += 1
        kind = "padding" if not edges or first >= edges[-1] else f"c{number % DOCUMENTS}"
        last = first + count
        points = [(first, first), (last, last), *([(last, end)] if end > last else []), (first, max(end, last))]
        corners = " ".join(f"{x},{y}" for x, y in points)
        said = f"tokens {first + 1:,} to {last:,} are seen by themselves and those after them, up to {end:,}"
        pieces.append(f'<polygon class="{kind}" points="{corners}"><title>{said}</title></polygon>')
        first = last
    said = f"attention mask of a row of {len(documents)} documents: each token sees those before it in its own document"
    return f'{_SVG} class="mask" viewBox="0 0 {size} {size}" aria-label="{said}">{"".join(pieces)}</svg>'


def layers(of: Sequence[Layer], parts: Sequence[str]) -> str:
    """A column for each layer, as high as what trains in it, in the colours of the parts."""
    most = max(1, *(sum(one.trained.values()) for one in of))
    pieces = []
    for place, one in enumerate(of):
        top = 100.0
        said = ", ".join(f"{part} {count:,}" for part, count in one.trained.items())
        pieces.append(f"<g><title>{text(f'{one.name}: {said}')}</title>")
        for part, count in one.trained.items():
            height = 100 * count / most
            top -= height
            pieces.append(
                f'<rect class="c{parts.index(part) % PARTS}" x="{place + 0.08:.2f}" width="0.84" y="{top:.3f}" '
                f'height="{height:.3f}"/>'
            )
        pieces.append("</g>")
    said = f"trained parameters of {len(of)} layers, at most {most:,} in one"
    return (
        f'{_SVG} class="layers" viewBox="0 0 {max(len(of), 8)} 100" preserveAspectRatio="none" aria-label="{said}">'
        f"{''.join(pieces)}</svg>"
    )


def alike(of: Sequence[Layer]) -> list[tuple[str, Layer]]:
    """Layers that follow each other and train the same, under one name."""
    groups: list[list[Layer]] = []
    for one in of:
        if groups and groups[-1][0].trained == one.trained:
            groups[-1].append(one)
        else:
            groups.append([one])
    return [(_named(group), group[0]) for group in groups]


def _named(group: Sequence[Layer]) -> str:
    first, last = group[0].name, group[-1].name.rpartition(".")[2]
    return first if len(group) == 1 else f"{first} to {last} ({len(group)} alike)"


def _of_document(one: Document) -> str:
    name = "a document" if one.record is None else f"record {one.record:,}"
    return f"{name}: {one.tokens:,} tokens, {sum(one.spans[1::2]):,} of them learned"
