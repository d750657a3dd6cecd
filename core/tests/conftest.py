"""What several test files share, beside the testing kit: models, data, and distributions as pip would install them."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from chat_templates import tokenizer_of  # noqa: F401
from conversations import tokenizer_with  # noqa: F401
from data_reports import look, questions  # noqa: F401
from reported_runs import reported, reported_once  # noqa: F401
from stopped_runs import shared, stopped, whole  # noqa: F401
from terminals import clock, terminal  # noqa: F401
from typed_commands import typed  # noqa: F401

from sft.plugins.discovery import entries
from sft.testing import write_data


@pytest.fixture(scope="session")
def models() -> Path:
    """The folder of the tiny model directories; each has its own reference values."""
    return Path(__file__).parent / "fixtures" / "models"


@pytest.fixture
def variant(models: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of a case; keyword arguments change its config.json, None removes a key."""

    def make(case: str, **changes: Any) -> Path:
        folder = tmp_path / case
        shutil.copytree(models / case, folder)
        config = {**json.loads((folder / "config.json").read_text()), **changes}
        config = {key: value for key, value in config.items() if value is not None}
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return make


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 30 train and 7 dev records, whose prompts and answers differ much in length."""
    garments = ["coat", "shirt", "dress", "skirt", "shoes", "jacket", "sweater"]
    records = []
    for number in range(37):
        garment = garments[number % 7]
        source = f"type#{garment}" + "*warm" * (number % 3)
        records.append({"src": source, "tgt": f"A {garment}" + " for you" * (number % 5) + "."})
    return write_data(tmp_path_factory.mktemp("data"), records[:30], records[30:])


@pytest.fixture(scope="session")
def base_model(models: Path) -> Path:
    return models / "llama-tied-gqa"


@pytest.fixture(scope="session")
def run_settings() -> dict[str, Any]:
    return {"learning_rate": 1e-3, "logging_steps": 1}


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that Python searches for modules and distributions; for a subprocess it is the PYTHONPATH."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    return folder


@pytest.fixture
def distribute(site: Path) -> Iterator[Callable[..., None]]:
    """Install a distribution into ``site``: metadata, and one module named after it.

    ``plugins`` and ``requests`` map what the entry points are called to an object of the module.
    """
    modules = []

    def install(
        distribution: str,
        source: str,
        plugins: Mapping[str, str],
        requests: Mapping[str, str] | None = None,
        version: str = "1.0",
    ) -> None:
        module = distribution.replace("-", "_")
        modules.append(module)
        (site / f"{module}.py").write_text(textwrap.dedent(source), encoding="utf-8")
        info = site / f"{module}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
        lines = []
        for group, declared in (("sft.plugins", plugins), ("sft.requests", requests or {})):
            lines.append(f"[{group}]")
            lines += [f"{name} = {module}" + (f":{target}" if target else "") for name, target in declared.items()]
        (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
        importlib.invalidate_caches()
        entries.cache_clear()

    yield install
    entries.cache_clear()
    for module in modules:
        sys.modules.pop(module, None)


@pytest.fixture
def sft_command(site: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Type ``sft ...`` in a process of its own, which finds what is installed in ``site``."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-c", "from sft.commands.cli import main; main()", *arguments]
        environment = {**os.environ, "PYTHONPATH": str(site)}
        return subprocess.run(line, capture_output=True, text=True, env=environment, cwd=site.parent, timeout=60)

    return run
