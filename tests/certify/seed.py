"""Puts each fault of ``seeded_faults`` into a copy of its plugin and certifies that: what is caught, and by what.

    python tests/certify/seed.py                 # all of them; writes docs/certify.json
    python tests/certify/seed.py lora-merge-sign # these alone; the figures of the others stay there
    python tests/certify/seed.py --anew          # all of them by all checks, about an hour on two cores

A fault is tried by the check that caught it the last time, and by all others only where that one misses it now.

The copy stands before the installed package on PYTHONPATH, so that each process that certify starts has it too.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from seeded_faults import FAULTS
from seeded_faults.fault import Fault

ROOT = Path(__file__).parents[2]
FIGURES = ROOT / "docs" / "certify.json"


def seeded(fault: Fault, folder: Path) -> Path:
    """A copy of the fault's package in ``folder``, with the fault in it; ``folder``."""
    package = fault.module.partition("/")[0]
    spec = importlib.util.find_spec(package)
    assert spec is not None, f"{package} is not installed"
    assert spec.origin is not None
    shutil.copytree(Path(spec.origin).parent, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    path = folder / fault.module
    text = path.read_text(encoding="utf-8")
    for old, new in fault.edits:
        assert old in text, f"{fault.name}: {fault.module} has no {old!r} any more"
        text = text.replace(old, new)
    compile(text, fault.module, "exec")
    path.write_text(text, encoding="utf-8")
    return folder


def tried(fault: Fault, *arguments: str) -> dict[str, Any]:
    """What `sft certify` says of the plugin with the fault: the first case that fails, or None."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = seeded(fault, Path(name) / "src")
        report = Path(name) / "report.json"
        line = [sys.executable, "-m", "sft", "certify", fault.plugin, "--first-failure", "--json", str(report)]
        before = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, "PYTHONPATH": before, "OMP_NUM_THREADS": "1"}
        # In a folder where nothing lies: Python looks there first.
        command = [*line, *arguments]
        done = subprocess.run(command, env=environment, cwd=name, capture_output=True, text=True, timeout=1800)
        assert report.exists(), f"{fault.name}: sft certify ended with {done.stderr.strip()[-500:]}"
        rows = json.loads(report.read_text(encoding="utf-8"))["rows"]
    return _figures(fault, next((row for row in rows if row["status"] == "fails"), None), began)


def _figures(fault: Fault, row: dict[str, Any] | None, began: float) -> dict[str, Any]:
    caught = None if row is None else {key: row[key] for key in ("check", "case", "said")}
    return {"plugin": fault.plugin, "wrong": fault.wrong, "caught": caught, "seconds": round(time.monotonic() - began)}


def tried_again(fault: Fault, before: dict[str, Any]) -> dict[str, Any]:
    """By the check, and beside the plugin, that caught it before; or by all of them."""
    known = before.get(fault.name, {}).get("caught")
    if known is not None:
        beside = [f"--beside={known['case']}"] if known["check"] == "works beside" else []
        figures = tried(fault, f"--check={known['check']}", *beside)
        if figures["caught"] is not None:
            return figures
    return tried(fault)


def main(names: list[str], anew: bool) -> int:
    before = json.loads(FIGURES.read_text(encoding="utf-8")) if FIGURES.exists() else {}
    chosen = [fault for fault in FAULTS if not names or fault.name in names]
    with ThreadPoolExecutor(int(os.environ.get("SFT_SEED_JOBS", "2"))) as pool:
        found = {}
        again = pool.map(partial(tried_again, before={} if anew else before), chosen)
        for fault, figures in zip(chosen, again, strict=True):
            found[fault.name] = figures
            _keep({**before, **found})
            caught = figures["caught"]
            by = f"{caught['check']} ({caught['case']}): {caught['said']}" if caught else "MISSED"
            print(f"{fault.name} [{figures['seconds']} s]: {by}", flush=True)
    missed = [name for name, figures in found.items() if figures["caught"] is None]
    print(f"{len(found) - len(missed)} of {len(found)} caught; missed: {', '.join(missed) or 'none'}")
    return 1 if missed else 0


def _keep(figures: dict[str, Any]) -> None:
    ordered = {fault.name: figures[fault.name] for fault in FAULTS if fault.name in figures}
    FIGURES.write_text(json.dumps(ordered, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    given = sys.argv[1:]
    sys.exit(main([one for one in given if one != "--anew"], "--anew" in given))
