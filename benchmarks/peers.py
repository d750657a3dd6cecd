"""An environment of its own for each program that sft is compared with, made from a file of pinned versions."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
ENVIRONMENTS = ROOT / ".venv-benchmarks"


def python_of(peer: str) -> str:
    """The Python of the environment that ``peers/<peer>.txt`` describes. It is made where there is none, or an old one.

    Raises RuntimeError with pip's last line if that fails.
    """
    wanted = Path(__file__).parent / "peers" / f"{peer}.txt"
    digest = hashlib.sha256(wanted.read_bytes() + sys.version.encode()).hexdigest()
    folder = ENVIRONMENTS / peer
    python, mark = folder / "bin" / "python", folder / "made-from"
    if mark.is_file() and mark.read_text(encoding="utf-8") == digest:
        return str(python)
    print(f"Installing {peer} into {folder.relative_to(ROOT)}: some minutes.", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    for command in (
        [sys.executable, "-m", "venv", str(folder)],
        [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r", str(wanted)],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            lines = (done.stderr or done.stdout).strip().splitlines() or ["(it said nothing)"]
            raise RuntimeError(f"{peer} could not be installed: {lines[-1]}")
    mark.write_text(digest, encoding="utf-8")
    return str(python)
