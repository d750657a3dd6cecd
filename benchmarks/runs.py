"""Which rows of a table came from which run: one line a run, with its machine, versions, commit and time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Case = Mapping[str, Any]
DIRTY = "-dirty"


@dataclass
class Run:
    """Cases that one machine has measured on one day, by one commit's code and with one version of each package."""

    machine: str
    commit: str
    day: str
    versions: dict[str, dict[str, str]] = field(default_factory=dict)
    """By side and package; a case may have sides and packages that others have not."""
    cases: list[Case] = field(default_factory=list)

    def takes(self, case: Case) -> bool:
        """Whether ``case`` is of this run; if so it is added."""
        if (self.machine, self.commit, self.day) != (hardware(case), commit(case), case["date"][:10]):
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
        times = sorted({case["date"].split()[1] for case in self.cases})
        loads = sorted({case["load_before"] for case in self.cases})
        facts = [
            self.machine,
            *packages,
            f"commit {self.commit}{changed}, {self.day} {span(times)} UTC, load {span(loads)} before it began",
        ]
        return f"**{rows}**: {'; '.join(facts)}"


def runs(cases: Mapping[str, Case]) -> list[Run]:
    """The runs that have measured ``cases``, in the order of their first ones."""
    found: list[Run] = []
    for case in cases.values():
        if not any(run.takes(case) for run in found):
            found.append(Run(hardware(case), commit(case), case["date"][:10]))
            found[-1].takes(case)
    return found


def hardware(case: Case) -> str:
    machine = case["machine"]
    return (
        f"{machine['processor']}, {machine['cores']} cores ({', '.join(machine['instructions'])}), "
        f"{machine['memory_gib']} GiB, {machine['system']}; {case['model']}"
    )


def commit(case: Case) -> str:
    return str(case["commit"]).removesuffix(DIRTY)


def versions(case: Case) -> dict[str, dict[str, str]]:
    """Those of the sides that have said them."""
    return {name: side["versions"] for name, side in case["sides"].items() if side.get("versions")}


def span(values: list[Any]) -> str:
    return str(values[0]) if len(values) == 1 else f"{values[0]} to {values[-1]}"
