"""Parts of docs/certify.md and docs/influence.md: figures that were measured, and are kept beside the pages."""

from __future__ import annotations

import json
from collections import Counter

from making.project import DOCS
from making.readme import reports
from making.regions import filled
from sft.certify.certify import CHECKS
from sft.certify.report import HELD, NOT_TRIED, REFUSED


def certify_page() -> str:
    """docs/certify.md with its tables made anew: of the checks, and of the faults."""
    checks = ["| check | what must hold |", "|---|---|"]
    checks += [f"| {one.name} | {one.sentence} |" for one in CHECKS]
    faults = json.loads((DOCS / "certify.json").read_text(encoding="utf-8"))
    general = {one.name for one in CHECKS}
    caught = [one for one in faults.values() if one["caught"]]
    own = sum(one["caught"]["check"] not in general for one in caught)
    said = [
        f"**{len(caught)} of {len(faults)} are caught** ({len(caught) / len(faults):.0%}), {len(caught) - own} of them "
        f"by the checks above and {own} by the plugin's own formula.",
        "",
        "| fault | plugin | what is wrong | caught by |",
        "|---|---|---|---|",
    ]
    for name, fault in faults.items():
        found = fault["caught"]
        by = "**missed**"
        if found:
            case = f" ({found['case']})" if found["case"] else ""
            by = f"{found['check']}{case}" if found["check"] in general else f"its own formula: {found['check']}"
        said.append(f"| {name} | `{fault['plugin']}` | {fault['wrong']} | {by} |")
    regions = {"checks": checks, "faults": said, "reports": whole_reports()}
    return filled((DOCS / "certify.md").read_text(encoding="utf-8"), regions)


def whole_reports() -> list[str]:
    """What the reports of every check have, and how long each took."""
    rows = ["| plugin | cases | holds | refused | not tried | minutes |", "|---|--:|--:|--:|--:|--:|"]
    for name, report in reports().items():
        if report.get("whole"):
            counts = Counter(row["status"] for row in report["rows"])
            told = " | ".join(str(counts[status]) for status in (HELD, REFUSED, NOT_TRIED))
            rows.append(f"| `{name}` | {len(report['rows'])} | {told} | {report['seconds'] / 60:.1f} |")
    return rows


def influence_page() -> str:
    """docs/influence.md with what scripts/leave_one_out.py has measured."""
    found = json.loads((DOCS / "influence.json").read_text(encoding="utf-8"))
    out, planted = found["left out"], found["planted"]
    rows = {
        name: out[key] for name, key in (("`tracin`", "tracin"), ("`adam`", "adam"), ("another seed", "other seed"))
    }
    tables = {
        "left-out": [
            "| runs | records | answers | score | rank correlation | 95 % interval |",
            "|---|---|---|---|---|---|",
            *(
                f"| {out['runs']} | {out['records']} | {out['answers']} | {name} | {one['mean']:.2f} "
                f"| {one['low']:.2f} – {one['high']:.2f} |"
                for name, one in rows.items()
            ),
        ],
        "planted": [
            "| facts | records of each | other records | passes | `tracin` | `adam` |",
            "|---|---|---|---|---|---|",
            f"| {planted['facts']} | {planted['records each']} | {planted['others']} | {planted['passes']:,} "
            f"| {planted['tracin']:.0%} | {planted['adam']:.0%} |",
        ],
    }
    return filled((DOCS / "influence.md").read_text(encoding="utf-8"), tables)
