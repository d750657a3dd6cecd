"""Certifies the project's plugins, or those that are named: writes docs/certified/NAME.json for each.

python tests/certify/all_plugins.py            # all, for hours; docs/certify.md says how long one takes
python tests/certify/all_plugins.py lora vera
python tests/certify/all_plugins.py --quick    # each two once, and each alone: an hour for all

Trackers need libraries that do not go together with those of other plugins, so they are certified, beside all others
too, in an environment that is made for them.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from environments import with_trackers

from sft.plugins.discovery import installed

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs" / "certified"
QUICK = (
    *("declared", "learns", "reloads", "resumes", "merges", "repeats", "changes nothing"),
    *("exports", "options take effect", "works beside"),
)


def in_order() -> list[str]:
    """All plugins, trackers first."""
    return sorted(installed(), key=lambda name: (not tracks(name), name))


def tracks(name: str) -> bool:
    return installed()[name][0].distribution == "sft-track"


def arguments(name: str, quick: bool) -> list[str]:
    """Of `sft certify NAME`; a quick one leaves to the plugins before it what it is beside them."""
    if not quick:
        return []
    names = in_order()
    after = names[names.index(name) + 1 :] or names[:1]
    return [*(f"--check={one}" for one in QUICK), *(f"--beside={other}" for other in after)]


def main(names: list[str], quick: bool) -> int:
    FOLDER.mkdir(exist_ok=True)
    chosen = [name for name in in_order() if not names or name in names]
    failed = [name for name in names if name not in chosen]
    with tempfile.TemporaryDirectory() as place:
        trackers = with_trackers(Path(place)) if any(map(tracks, chosen)) else Path()
        for name in chosen:
            python = trackers if tracks(name) else sys.executable
            line = [str(python), "-m", "sft", "certify", name, "--json", str(FOLDER / f"{name}.json")]
            line += arguments(name, quick)
            done = subprocess.run(line, env={"OMP_NUM_THREADS": "1", **os.environ}, capture_output=True, text=True)
            lines = [*done.stdout.splitlines(), *(done.stderr.splitlines() if done.returncode > 1 else [])]
            print(
                *(one for one in lines if not one.startswith(("holds", "refused", "not tried"))), sep="\n", flush=True
            )
            if done.returncode:
                failed.append(name)
    print(f"{', '.join(failed)} failed" if failed else "all hold")
    return 1 if failed else 0


if __name__ == "__main__":
    given = sys.argv[1:]
    sys.exit(main([one for one in given if one != "--quick"], "--quick" in given))
