"""Certifies the project's plugins, or those that are named: writes docs/certified/NAME.json for each.

python tests/certify/all_plugins.py            # all, some three minutes each on two cores
python tests/certify/all_plugins.py lora vera
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from sft.plugins.discovery import installed

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs" / "certified"


def main(names: list[str]) -> int:
    FOLDER.mkdir(exist_ok=True)
    failed = []
    for name in names or installed():
        report = FOLDER / f"{name}.json"
        line = [sys.executable, "-m", "sft", "certify", name, "--json", str(report)]
        done = subprocess.run(line, env={"OMP_NUM_THREADS": "1", **os.environ}, capture_output=True, text=True)
        lines = (done.stdout or done.stderr).strip().splitlines()
        print(
            "\n".join(["", *(one for one in lines if not one.startswith(("holds", "refused", "not tried")))]),
            flush=True,
        )
        if done.returncode:
            failed.append(name)
    print(f"{', '.join(failed)} failed" if failed else "all hold")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
