"""Distributions as pip would install them, and processes that find them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


def pyproject(package: Path) -> dict[str, Any]:
    """What ``pyproject.toml`` of ``package`` says. Skips the test where Python cannot read it."""
    tomllib = pytest.importorskip("tomllib")
    return tomllib.loads((package / "pyproject.toml").read_text(encoding="utf-8"))


def install(package: Path, site: Path) -> None:
    """What ``pip install --target SITE --no-deps PACKAGE`` does, without building a wheel."""
    project = pyproject(package)["project"]
    for source in (package / "src").iterdir():
        if source.suffix == ".py":
            shutil.copy(source, site)
        elif (source / "__init__.py").exists():
            shutil.copytree(source, site / source.name)
    info = site / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir()
    fields = {"Name": project["name"], "Version": project["version"], "Summary": project["description"]}
    lines = ["Metadata-Version: 2.1", *(f"{name}: {value}" for name, value in fields.items())]
    (info / "METADATA").write_text("\n".join(lines) + "\n", encoding="utf-8")
    lines = []
    for group, points in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {target}" for name, target in points.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")


def python(folder: Path, site: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python in a process of its own, in ``folder``, which finds what is installed in ``site``."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), *filter(None, sys.path[1:])])}
    line = [sys.executable, *arguments]
    return subprocess.run(line, capture_output=True, text=True, env=environment, cwd=folder, timeout=110)
