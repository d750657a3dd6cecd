"""Starting: what `sft` and plugins import before there is a need, how many calls that takes, and a missing Paddle."""

from __future__ import annotations

import json
import os
import subprocess
import sys
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


# Says how many functions the code between is calling, of Python and of C: what a start costs, on any machine. A
# processor makes about a million a second.
COUNTED = """
import sys
calls = 0
def count(frame, event, argument):
    global calls
    calls += event in ("call", "c_call")
sys.setprofile(count)
try:
    {code}
finally:
    sys.setprofile(None)
    print("\\n" + str(calls))
"""


@pytest.mark.parametrize(
    ("arguments", "most"),
    [
        (("--help",), 300_000),
        (("plugins",), 600_000),  # the list imports every plugin, and there are forty
        (("run", "--help"), 340_000),
        (("run", "--plugin", "tool", "--help"), 340_000),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_help_and_lists_are_instant(
    distribute: Distribute, python: Python, arguments: tuple[str, ...], most: int
) -> None:
    distribute("sft-test-tool", TOOL, {"tool": "Tool"})
    done = python(COUNTED.format(code="from sft.commands.cli import main; main()"), *arguments)
    assert done.returncode == 0, done.stderr
    assert 50_000 < int(done.stdout.splitlines()[-1]) < most


PLUGIN_IMPORT = (
    """
import dataclasses, json, math, pathlib, sys, sft
from importlib.metadata import entry_points
found = [entry for entry in entry_points(group="sft.plugins") if entry.name == sys.argv[1]]
"""
    + COUNTED.format(code="found[0].load()")
    + "print(json.dumps(sorted(sys.modules)))\n"
)


@pytest.mark.parametrize(
    "name", sorted({item.entry.name for items in installed().values() for item in items} | {"tool"})
)
def test_a_plugin_is_imported_in_an_instant_and_without_paddle(
    distribute: Distribute, python: Python, name: str
) -> None:
    distribute("sft-test-tool", TOOL, {"tool": "Tool"})
    done = python(PLUGIN_IMPORT, name)
    assert imported(done).isdisjoint({"paddle", "paddlenlp", "numpy"})
    assert 0 < int(done.stdout.splitlines()[-2]) < 8_000  # 20 ms


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
