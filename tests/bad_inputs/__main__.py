"""``python -m bad_inputs [KIND] [PART OF A NAME]``: what is said of each broken input."""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

from bad_inputs import TABLES
from bad_inputs.server import Server
from bad_inputs.trial import attempt, prepare


def main() -> None:
    wanted, part = (sys.argv[1:] + ["", ""])[:2]
    server = Server()
    with tempfile.TemporaryDirectory() as name:
        good = Path(name) / "good"
        prepare(server, good)
        failures = total = 0
        for kind, cases in TABLES.items():
            for case_name, case in cases.items():
                if wanted in kind and part in case_name:
                    total += 1
                    folder = Path(name) / "case"
                    typed, wrong = attempt(server, good, folder, case)
                    for path in [folder, *folder.rglob("*")]:
                        if not path.is_symlink():
                            path.chmod(0o700)
                    shutil.rmtree(folder)
                    failures += bool(wrong)
                    mark = "BAD" if wrong else "ok "
                    print(f"{mark}  {typed.seconds:5.1f} s {typed.mebibytes:5} MiB  {kind}: {case_name}")
                    print(f"        {typed.err.strip()[-1200:]}")
                    if wrong:
                        print(f"        ### {'; '.join(wrong)}")
    server.close()
    print(f"{total} broken inputs, {failures} of them with something wrong")


main()
