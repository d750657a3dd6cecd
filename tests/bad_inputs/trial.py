"""Trying one broken input: what must hold of each of them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from bad_inputs.case import RUN_OF_LORA, Case, make_good
from bad_inputs.server import Server, Typed

LONGEST = 2000
"""Characters of a message, at most."""
SPARES = ("done",)


def prepare(server: Server, folder: Path) -> None:
    """Make the folder that each case begins with a copy of."""
    make_good(folder)
    done = server.type(folder, Case("", base={**RUN_OF_LORA, "max_steps": "2"}).command)
    assert done.code == 0, done


def attempt(server: Server, good: Path, folder: Path, case: Case, flushes: bool = False) -> tuple[Typed, list[str]]:
    """Type the command of ``case`` in ``folder``, a copy of ``good``; what came of it, and what is wrong with that.
    ``flushes``: see :meth:`Server.type`."""
    shutil.copytree(good, folder, symlinks=True)
    for change in case.changes:
        change(folder)
    before = everything_below(folder)
    typed = server.type(folder, case.command, case.stdin, case.seconds, case.privileged, case.site, flushes)
    wrong = []
    if typed.code != 2:
        wrong.append(f"exit code {typed.code}")
    if "Traceback" in typed.err + typed.out:
        wrong.append("a traceback")
    *before_it, message = typed.err.removesuffix("\n").split("\n")
    if not message.startswith("sft: ") or not typed.err.endswith("\n") or "sft: " in "".join(before_it):
        wrong.append("not one sentence, and nothing after it")
    if case.command[:1] == ["run"] and before_it:
        wrong.append(f"{len(before_it)} lines before it")
    if not message.isprintable() or len(message) > LONGEST:
        wrong.append(f"{len(message)} characters, or not all of them can be printed")
    at = 0
    for part in case.says.split("…"):
        found = typed.err.find(part, at)
        if found < 0:
            wrong.append(f"does not say {part!r}")
        at = max(found, at)
    after = everything_below(folder)
    changed = sorted(path for path in {*before, *after} if before.get(path) != after.get(path))
    if changed:
        wrong.append(f"wrote {', '.join(changed)}")
    return typed, wrong


def everything_below(folder: Path) -> dict[str, bytes | str]:
    """Each file below ``folder``, and what it holds. Modules that Python compiles are not of this matter."""
    found: dict[str, bytes | str] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if "__pycache__" in name:
            continue
        if path.is_symlink():
            found[name] = os.readlink(path)
        elif not path.is_file():
            found[name] = "no file"
        else:
            found[name] = path.read_bytes()
    return found
