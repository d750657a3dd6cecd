"""Certifies the project's plugins, or those that are named: writes docs/certified/NAME.json for each.

python tests/certify/all_plugins.py            # all, some four minutes each on two cores
python tests/certify/all_plugins.py lora vera
python tests/certify/all_plugins.py --quick    # each two once, and each alone: half an hour for all
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from sft.plugins.discovery import installed

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs" / "certified"
QUICK = ("declared", "learns", "reloads", "resumes", "repeats", "options take effect", "works beside")


def arguments(name: str, quick: bool) -> list[str]:
    """Of `sft certify NAME`; a quick one leaves to the plugins after it what is beside them."""
    if not quick:
        return []
    after = [other for other in installed() if other > name] or [next(iter(installed()))]
    return [*(f"--check={one}" for one in QUICK), *(f"--beside={other}" for other in after)]


def main(names: list[str], quick: bool) -> int:
    FOLDER.mkdir(exist_ok=True)
    failed = []
    for name in names or installed():
        report = FOLDER / f"{name}.json"
        line = [sys.executable, "-m", "sft", "certify", name, "--json", str(report), *arguments(name, quick)]
        done = subprocess.run(line, env={"OMP_NUM_THREADS": "1", **os.environ}, capture_output=True, text=True)
        lines = (done.stdout or done.stderr).strip().splitlines()
        print(*(one for one in lines if not one.startswith(("holds", "refused", "not tried"))), sep="\n", flush=True)
        if done.returncode:
            failed.append(name)
    print(f"{', '.join(failed)} failed" if failed else "all hold")
    return 1 if failed else 0


if __name__ == "__main__":
    given = sys.argv[1:]
    sys.exit(main([one for one in given if one != "--quick"], "--quick" in given))
