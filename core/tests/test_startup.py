"""Starting: what `sft` and plugins import before there is a need, how long that takes, and a missing Paddle."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from sft.plugins.discovery import installed

Distribute = Callable[..., None]

HEAVY = ("paddle", "paddlenlp", "numpy", "tokenizers", "safetensors", "huggingface_hub", "jinja2", "rich", "yaml")
TOOL = """
    from dataclasses import dataclass
    import sft

    @dataclass
    class ToolOptions:
        tool_size: int = sft.option(1, "a size")

    class Tool(sft.Plugin):
        name = "tool"
        api_version = 1
        Options = ToolOptions
"""
# Runs the command line like the console script, then says which modules that has imported.
TYPED = """
import json, sys
from sft.commands.cli import main
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
finally:
    print("\\n" + json.dumps(sorted(sys.modules)))
"""


@pytest.fixture
def python(site: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run Python code in a process of its own."""

    def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": str(site)}
        line = [sys.executable, "-c", code, *arguments]
        return subprocess.run(line, capture_output=True, text=True, env=environment, cwd=site.parent, timeout=60)

    return run


Python = Callable[..., subprocess.CompletedProcess[str]]


def imported(done: subprocess.CompletedProcess[str]) -> set[str]:
    assert done.returncode == 0, done.stderr
    return {name.partition(".")[0] for name in json.loads(done.stdout.splitlines()[-1])}


COMMANDS = [
    (),
    ("--help",),
    ("--version",),
    ("plugins",),
    ("plugins", "--json"),
    ("run", "--help"),
    ("run", "--plugin", "tool", "--help"),
    ("generate", "--help"),
    ("merge", "--help"),
    ("demo", "--help"),
    ("init", "--help"),
    ("completion", "bash"),
    ("data", "--help"),
    ("replay", "--help"),
    ("blame", "--help"),
    ("report", "--help"),
]


@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_help_and_lists_import_nothing_heavy(
    distribute: Distribute, python: Python, arguments: tuple[str, ...]
) -> None:
    distribute("sft-test-tool", TOOL, {"tool": "Tool"})
    names = imported(python(TYPED, *arguments))
    assert "click" in names
    assert names.isdisjoint(HEAVY)


def test_the_package_itself_imports_nothing_heavy(python: Python) -> None:
    names = imported(python("import json, sys, sft; print(json.dumps(sorted(sys.modules)))"))
    assert "sft" in names
    assert names.isdisjoint({*HEAVY, "click"})


def test_settings_are_checked_before_paddle_is_imported(python: Python) -> None:
    code = TYPED.replace("assert not end.code, end.code", "assert end.code == 2")
    names = imported(python(code, "run", "--learning_rate", "fast"))
    assert names.isdisjoint({"paddle", "paddlenlp"})


@pytest.mark.parametrize(
    "arguments", [("--help",), ("plugins",), ("run", "--help"), ("run", "--plugin", "tool", "--help")], ids=" ".join
)
def test_help_and_lists_are_instant(distribute: Distribute, python: Python, arguments: tuple[str, ...]) -> None:
    distribute("sft-test-tool", TOOL, {"tool": "Tool"})
    limit = 0.6 if arguments == ("plugins",) else 0.3  # the list imports every plugin, and there are forty
    assert least_below(limit, lambda: seconds_of(python, *arguments)) < limit


def least_below(limit: float, measure: Callable[[], float]) -> float:
    """The first of three measurements that is below ``limit``, or the least of them: a busy machine adds some."""
    least = measure()
    for _ in range(2):
        if least < limit:
            break
        least = min(least, measure())
    return least


def seconds_of(python: Python, *arguments: str) -> float:
    """Time from start to end of ``sft ...``, without what other processes of a busy machine take from it."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    assert python("from sft.commands.cli import main; main()", *arguments).returncode == 0
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    return min(wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


PLUGIN_IMPORT = """
import json, sys, time
import dataclasses, math, pathlib, sft
from importlib.metadata import entry_points
found = [entry for entry in entry_points(group="sft.plugins") if entry.name == sys.argv[1]]
began = time.process_time()
found[0].load()
seconds = time.process_time() - began
print(json.dumps([seconds]))
print(json.dumps(sorted(sys.modules)))
"""


@pytest.mark.parametrize(
    "name", sorted({item.entry.name for items in installed().values() for item in items} | {"tool"})
)
def test_a_plugin_is_imported_in_an_instant_and_without_paddle(
    distribute: Distribute, python: Python, name: str
) -> None:
    distribute("sft-test-tool", TOOL, {"tool": "Tool"})

    def seconds() -> float:
        done = python(PLUGIN_IMPORT, name)
        assert imported(done).isdisjoint({"paddle", "paddlenlp", "numpy"})
        return float(json.loads(done.stdout.splitlines()[0])[0])

    assert least_below(0.02, seconds) < 0.02


# --- no Paddle ----------------------------------------------------------------------------------------------

# Python looks for a module of this name at its start.
HIDE_PADDLE = """
import importlib.machinery, sys

class WithoutPaddle(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name == "paddle" else super().find_spec(name, path, target)

sys.meta_path[:] = [WithoutPaddle if f is importlib.machinery.PathFinder else f for f in sys.meta_path]
"""


def test_without_paddle_a_run_says_what_to_install(models: Path, site: Path, tmp_path: Path, python: Python) -> None:
    (site / "sitecustomize.py").write_text(HIDE_PADDLE)
    hidden = "import importlib.util; print(importlib.util.find_spec('paddle'), importlib.util.find_spec('click'))"
    assert python(hidden).stdout.startswith("None ModuleSpec(")

    (tmp_path / "train.json").write_text('{"src": "a", "tgt": "b"}\n')
    model, out = models / "llama-tied-gqa", tmp_path / "out"
    arguments = ["--model_name_or_path", model, "--dataset_name_or_path", tmp_path, "--output_dir", out]
    done = python("from sft.commands.cli import main; main()", "run", *map(str, arguments))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "sft: PaddlePaddle is not installed; pip install 'sft-core[cpu]' for CPUs or 'sft-core[gpu]' for NVIDIA GPUs.\n"
    )
    assert not out.exists()


def test_without_paddle_help_and_lists_work(site: Path, python: Python) -> None:
    (site / "sitecustomize.py").write_text(HIDE_PADDLE)
    for arguments in (("--help",), ("plugins",), ("run", "--help")):
        done = python("from sft.commands.cli import main; main()", *arguments)
        assert (done.returncode, done.stderr) == (0, "")
