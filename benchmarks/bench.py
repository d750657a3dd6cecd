"""What the benchmarks share: the materials, the sides of a comparison, and the form of a result."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from benchmarks import figures, materials, peers
from benchmarks.turns import Restarted, Side, SideError, alternate

RESULTS = Path(__file__).parent / "results"
Value = Callable[[dict[str, Any]], float]
"""From what a side measured in a turn to the figure that counts."""


class LeftOutError(Exception):
    """Not measured, for the reason that it says: what was kept of the case stays."""


@dataclass
class Bench:
    """One call of the benchmarks."""

    scratch: Path
    turns: int | None = None
    given_model: Path | None = None
    given_data: Path | None = None
    peers: tuple[str, ...] = ()
    """The sides beside which sft is measured; empty: all that there are."""
    settings: dict[str, Any] = field(default_factory=dict)
    """More settings of ``sft run``."""
    _numbers: int = 0

    @cached_property
    def model(self) -> Path:
        return self.given_model or materials.write_model(self.scratch / "model")

    def wants(self, side: str) -> bool:
        return not self.peers or side in self.peers or side.partition(" ")[0] == "sft"

    def records(self, count: int) -> Path:
        """A folder with ``train.json`` of so many records: the first ones of the given data, or made here."""
        folder = self.scratch / f"records-{count}"
        if folder.is_dir():
            return folder
        if self.given_data is None:
            return materials.write_records(folder, count, self.model)
        with (self.given_data / "train.json").open(encoding="utf-8") as file:
            lines = list(islice(file, count))
        folder.mkdir()
        (folder / "train.json").write_text("".join(lines), encoding="utf-8")
        return folder

    def new_folder(self, name: str) -> Path:
        self._numbers += 1
        return self.scratch / f"{name}-{self._numbers}"

    def side(self, module: str, name: str, peer: str | None = None, memory: int | None = None, **options: Any) -> Side:
        """Side ``name`` of the benchmark in ``module``, in the environment of ``peer`` (``None``: sft's own)."""
        python = sys.executable if peer is None else peers.python_of(peer)
        command = [python, "-m", module, name, json.dumps(options)]
        environment = paddle_variables() if peer == "paddlenlp" else {}
        log = self.new_folder(name.replace(" ", "-")).with_suffix(".log")
        return Side(name, command, log, figures.ROOT, environment, memory=memory)

    def restarted(self, name: str, start: Callable[[], Side]) -> Restarted:
        """Side ``name``, whose turn is a whole program; what installs its environment comes before the first turn."""
        if name != "sft":
            peers.python_of(name)
        return Restarted(name, start)

    def compare(
        self,
        sides: Mapping[str, Callable[[], Side | Restarted]],
        value: Value,
        *,
        turns: int,
        unit: str,
        more_is_better: bool,
        order: Any = None,
        also: Callable[[list[dict[str, Any]]], dict[str, Any]] | None = None,
        warm: int = 1,
    ) -> dict[str, Any]:
        """Start all sides, let them take turns, and return what is to be kept.

        The first side is sft's; where it ends early the benchmark does. Sides named "sft ..." are sft's too. A peer
        that cannot be installed, or that ends early, is left out with its reason. ``also`` makes further figures of a
        side from all its turns.
        """
        begun = figures.moment()
        sides = {name: start for name, start in sides.items() if self.wants(name)}
        started: list[Side | Restarted] = []
        failed: dict[str, str] = {}
        try:
            for name, start in sides.items():
                try:
                    started.append(start())
                except RuntimeError as error:
                    if not started:
                        raise
                    failed[name] = str(error)
                    print(f"  {name}: {error}", flush=True)
            while True:
                try:
                    measured = alternate(started, self.turns or turns, order, warm)
                    break
                except SideError as error:
                    (out,) = (side for side in started if side.name == error.side)
                    if out is started[0]:
                        raise
                    started.remove(out)
                    failed[out.name] = str(error)
                    print(f"  {error}", flush=True)
        finally:
            for side in started:
                side.end()
        facts = {side.name: side.facts for side in started}  # a side that is restarted knows them by now
        values = {name: [value(turn) for turn in found] for name, found in measured.items()}
        ours, *others = values
        kept: dict[str, Any] = {
            name: {
                **figures.summary(values[name]),
                "peak_mib": found[-1]["peak_mib"],
                **({"also": also(found)} if also else {}),
                **facts[name],
            }
            for name, found in measured.items()
        }
        return {
            "unit": unit,
            "more_is_better": more_is_better,
            **begun,
            "machine": figures.machine(),
            "sides": {name: kept.get(name, {"failed": failed.get(name)}) for name in sides},
            "ratios": {
                name: figures.ratio(values[ours], values[name], more_is_better)
                for name in others
                if not name.startswith("sft ")
            },
        }


def parted(words: list[str]) -> tuple[list[str], list[str]]:
    """The words of a command line before ``--``, and those behind it, which are settings of ``sft run``."""
    at = words.index("--") if "--" in words else len(words)
    return words[:at], words[at + 1 :]


def describe(model: Path | None, data: Path | None) -> str:
    """The model and the records that a user gave, or those that are made, in words."""
    if model is None and data is None:
        return "SmolLM2-135M's shape, random weights"
    weights = "SmolLM2-135M's shape, random weights" if model is None else f"the weights in {model.name}"
    return f"{weights}, {'made records' if data is None else f'the records in {data.name}'}"


def keep(folder: Path, name: str, cases: Iterable[str], case: str, result: dict[str, Any]) -> None:
    """Put a case's result in the place of its earlier one; those of the other ``cases`` stay, in their order."""
    path = folder / f"{name}.json"
    kept = json.loads(path.read_text(encoding="utf-8"))["cases"] if path.is_file() else {}
    kept[case] = result
    whole = {"cases": {one: kept[one] for one in cases if one in kept}}
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(whole, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def paddle_variables() -> dict[str, str]:
    """The threads and the path of MKL that sft chooses, for a PaddleNLP that would not choose them itself."""
    from sft import runtime

    return runtime.variables_to_set(os.environ, runtime.physical_cores(), runtime.cpu_info()["vendor"])


def told(result: Mapping[str, Any]) -> list[str]:
    """A result in lines, for the terminal."""
    lines = []
    for name, side in result["sides"].items():
        if "failed" in side:
            lines.append(f"  {name:<13} did not run: {side['failed']}")
            continue
        spread = f"{side['low']:g} to {side['high']:g}"
        more = "".join(f", {key} {value}" for key, value in side.get("also", {}).items())
        ahead = f", sft is ahead by {result['ratios'][name]['ratio']:.2f}" if name in result["ratios"] else ""
        lines.append(
            f"  {name:<13} {side['median']:>10g} {result['unit']} ({spread}), {side['peak_mib']:,} MiB{more}{ahead}"
        )
    return lines
