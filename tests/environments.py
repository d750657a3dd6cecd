"""Environments with wheels of this project and nothing else of it. What these need of other projects is that of the
Python that runs the tests, by links: a fresh environment takes a second and no network."""

from __future__ import annotations

import importlib.metadata as metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Iterable
from pathlib import Path

import pytest
from installing import pyproject
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
OURS = ("sft-", "paddle-sft")


def build_wheels(packages: Iterable[Path], folder: Path, scratch: Path) -> Path:
    """A wheel of each of ``packages`` in ``folder``, built from copies; ``folder``. Skips the test where a build needs
    what is not installed."""
    copies = []
    for package in packages:
        needed = pyproject(package)["build-system"]["requires"]
        for one in map(Requirement, needed):
            if not _holds(one):
                pytest.skip(f"{one}, with which pip builds {package.name}, is not installed")
        leave = shutil.ignore_patterns("tests", "__pycache__", "build", "*.egg-info", "*.so")
        copies.append(str(shutil.copytree(package, scratch / package.name, ignore=leave)))
    line = [*PIP, "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", str(folder)]
    done(subprocess.run([*line, *copies], capture_output=True, text=True, timeout=600))
    return folder


class Environment:
    """A fresh environment in ``folder`` that finds the packages of other projects which ``needed``, distributions of
    this project's as pip takes them (``sft-core[cpu]``), depend on, and no other packages."""

    def __init__(self, folder: Path, needed: Iterable[str], wheels: Path) -> None:
        venv.create(folder, with_pip=False)
        self.python, self.wheels = folder / "bin" / "python", wheels
        (self.site,) = folder.glob("lib/python*/site-packages")
        shared = folder / "shared"
        shared.mkdir()
        brought = (
            {"setuptools"} if sys.version_info < (3, 12) else set()
        )  # with every environment, and paddle relies on it
        for name in sorted(_closure(needed, wheels) | brought):
            for top in {Path(file).parts[0] for file in metadata.files(name) or ()} - {"..", "__pycache__"}:
                origin = Path(str(metadata.distribution(name).locate_file(top)))
                if origin.exists() and not (shared / top).exists():
                    (shared / top).symlink_to(origin)
        (self.site / "shared.pth").write_text(f"{shared}\n", encoding="utf-8")

    def install(self, *requirements: str) -> None:
        """From the wheels, with all that they need: pip finds no index."""
        self._pip("install", "--no-index", "--find-links", str(self.wheels), *requirements)

    def uninstall(self, *distributions: str) -> None:
        self._pip("uninstall", "--yes", *distributions)

    def _pip(self, command: str, *arguments: str) -> None:
        line = [*PIP, "--python", str(self.python), command, "--quiet", *arguments]
        done(subprocess.run(line, capture_output=True, text=True, timeout=120, env=_bare(), cwd=self.site))

    def sft(self, *arguments: str, code: int = 0) -> str:
        """What ``sft ARGUMENTS`` prints, in the folder of the environment, where it has to end with ``code``."""
        line = [str(self.python.with_name("sft")), *arguments]
        ended = subprocess.run(
            line, capture_output=True, text=True, timeout=120, env=_bare(), cwd=self.python.parents[1]
        )
        return done(ended, code)

    def files(self) -> set[str]:
        """Everything in its own site-packages, by path, without bytecode."""
        return {
            path.relative_to(self.site).as_posix()
            for path in self.site.rglob("*")
            if path.is_file() and "__pycache__" not in path.parts
        }


TRACKERS = ("tensorboard", "visualdl", "wandb", "mlflow-skinny", "swanlab")  # skinny: without servers


def with_trackers(folder: Path) -> Path:
    """The Python of an environment in ``folder`` with the libraries of trackers, the newest that pip finds, over what
    is installed here: they want another protobuf than paddlenlp leaves. Skips the test where pip reaches no index."""
    venv.create(folder / "trackers", with_pip=False)
    python = folder / "trackers" / "bin" / "python"
    (own,) = folder.glob("trackers/lib/python*/site-packages")
    here = sysconfig.get_path("purelib")
    (own / "here.pth").write_text(f"import site; site.addsitedir({here!r})\n", encoding="utf-8")
    line = [*PIP, "--python", str(python), "install", "--quiet", *TRACKERS]
    ended = subprocess.run(line, capture_output=True, text=True, timeout=800)
    if ended.returncode and (unreached := _UNREACHED.search(ended.stderr)):
        pytest.skip(f"pip reaches no index, so the libraries of trackers cannot be installed: {unreached[0]}")
    done(ended)
    return python


_UNREACHED = re.compile(r"(NewConnectionError|ConnectTimeoutError|NameResolutionError|ProxyError|Read timed out).*")
"""What pip says of an index that does not answer; of one that has no such package it says something else."""


def done(ended: subprocess.CompletedProcess[str], code: int = 0) -> str:
    """All that a process printed, after a look at how it ended."""
    said = ended.stdout + ended.stderr
    assert ended.returncode == code, said
    return said


def _bare() -> dict[str, str]:
    """The environment of processes without what shows them other packages than their own."""
    hidden = {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "SFT_DISABLE_PLUGINS", "PIP_CONFIG_FILE"}
    return {**{key: value for key, value in os.environ.items() if key not in hidden}, "PIP_REQUIRE_VIRTUALENV": "false"}


def _closure(needed: Iterable[str], wheels: Path) -> set[str]:
    """The names of all distributions of other projects that ``needed`` depend on, directly or not."""
    waiting, seen, found = [Requirement(text) for text in needed], set[tuple[str, str]](), set[str]()
    while waiting:
        one = waiting.pop()
        name = canonicalize_name(one.name)
        ours = name.startswith(OURS)
        if not ours:
            found.add(name)
            if not _holds(one):
                pytest.skip(f"{one}, which {', '.join(needed)} needs, is not installed")
        for extra in ("", *one.extras):
            if (name, extra) not in seen:
                seen.add((name, extra))
                texts = _requirements_of_wheel(name, wheels) if ours else metadata.requires(name) or []
                requirements = map(Requirement, texts)
                waiting += [r for r in requirements if r.marker is None or r.marker.evaluate({"extra": extra})]
    return found


def _requirements_of_wheel(name: str, wheels: Path) -> list[str]:
    (wheel,) = wheels.glob(f"{name.replace('-', '_')}-*.whl")
    (info,) = metadata.distributions(path=[str(wheel)])
    return info.requires or []


def _holds(requirement: Requirement) -> bool:
    try:
        return requirement.specifier.contains(metadata.version(requirement.name), prereleases=True)
    except metadata.PackageNotFoundError:
        return requirement.marker is not None and not requirement.marker.evaluate({"extra": ""})
