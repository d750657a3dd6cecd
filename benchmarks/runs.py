"""Which rows of a table came from which run: one line a run, with its machine, versions, commit and time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from benchmarks.figures import DATE

Case = Mapping[str, Any]
DIRTY = "-dirty"
BREAK = timedelta(hours=6)
"""After so long another run begins, even of the same code."""


@dataclass
class Run:
    """Cases that one machine has measured in one sitting, by one commit's code and with one version of each package."""

    machine: str
    commit: str
    versions: dict[str, dict[str, str]] = field(default_factory=dict)
    """By side and package; a case may have sides and packages that others have not."""
    cases: list[Case] = field(default_factory=list)

    def takes(self, case: Case) -> bool:
        """Whether ``case`` is of this run; if so it is added."""
        if (self.machine, self.commit) != (hardware(case), commit(case)):
            return False
        if self.cases and all(abs(began(case) - began(other)) > BREAK for other in self.cases):
            return False
        of_sides = versions(case)
        for side, packages in of_sides.items():
            known = self.versions.get(side, {})
            if any(known.get(name, version) != version for name, version in packages.items()):
                return False
        for side, packages in of_sides.items():
            self.versions.setdefault(side, {}).update(packages)
        self.cases.append(case)
        return True

    def told(self, labels: Mapping[str, str], all_rows: bool) -> str:
        """The run in a line; a case in which something was not committed has its commit's ``-dirty``."""
        rows = "All rows" if all_rows else "; ".join(case["what"] for case in self.cases)
        packages = [
            f"{labels.get(side, side)} with {' '.join(f'{name} {version}' for name, version in found.items())}"
            for side, found in self.versions.items()
        ]
        changed = DIRTY if any(case["commit"].endswith(DIRTY) for case in self.cases) else ""
        times = sorted(map(began, self.cases))
        first, last = times[0], times[-1]
        ended = "" if first == last else f" to {last:{'%H:%M' if first.date() == last.date() else '%Y-%m-%d %H:%M'}}"
        loads = sorted({case["load_before"] for case in self.cases})
        facts = [
            self.machine,
            *packages,
            f"commit {self.commit}{changed}, {first:%Y-%m-%d %H:%M}{ended} UTC, load {span(loads)} before it began",
        ]
        return f"**{rows}**: {'; '.join(facts)}"


def runs(cases: Mapping[str, Case]) -> list[Run]:
    """The runs that have measured ``cases``, in the order of their first ones."""
    found: list[Run] = []
    for case in cases.values():
        if not any(run.takes(case) for run in found):
            found.append(Run(hardware(case), commit(case)))
            found[-1].takes(case)
    return found


def hardware(case: Case) -> str:
    machine = case["machine"]
    return (
        f"{machine['processor']}, {machine['cores']} cores ({', '.join(machine['instructions'])}), "
        f"{machine['memory_gib']} GiB, {machine['system']}; {case['model']}"
    )


def began(case: Case) -> datetime:
    return datetime.strptime(case["date"], DATE)


def commit(case: Case) -> str:
    return str(case["commit"]).removesuffix(DIRTY)


def versions(case: Case) -> dict[str, dict[str, str]]:
    """Those of the sides that have said them."""
    return {name: side["versions"] for name, side in case["sides"].items() if side.get("versions")}


def span(values: list[Any]) -> str:
    return str(values[0]) if len(values) == 1 else f"{values[0]} to {values[-1]}"
