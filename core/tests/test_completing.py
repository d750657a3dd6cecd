"""Completion: what is offered for a word, and that bash, zsh and fish offer it."""

from __future__ import annotations

import os
import pty
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from click.shell_completion import BashComplete

from sft.commands.cli import COMMANDS, cli
from sft.plugins.discovery import installed
from sft.settings.arguments import SCHEDULES, core_options

TOOL = """
    from dataclasses import dataclass
    import sft

    @dataclass
    class Options:
        tool_size: int = sft.option(1, "a size")
        tool_kind: str = sft.option("plain", "a kind", choices=("plain", "purl"))

    class Tool(sft.Plugin):
        name = "tool"
        api_version = 1
        Options = Options
"""


def offered(*words: str) -> list[str]:
    """What is offered for the last of the words; a file is shown as ``FILE``."""
    *typed, incomplete = words
    found = BashComplete(cli, {}, "sft", "_SFT_COMPLETE").get_completions(typed, incomplete)
    return ["FILE" if item.type == "file" else str(item.value) for item in found]


@pytest.fixture(autouse=True)
def tool(distribute: Callable[..., None]) -> None:
    distribute("toy-tool", TOOL, {"tool": "Tool"})


def test_commands() -> None:
    assert set(COMMANDS) <= set(offered(""))
    assert offered("comp") == ["completion"]
    assert offered("completion", "") == ["bash", "zsh", "fish"]


def test_settings_by_name() -> None:
    """Those of the core; with a plugin, that plugin's too; with dashes where dashes are typed."""
    names = [f"--{name}" for name in (*core_options(), "plugin")]
    assert set(names) <= set(offered("run", "--"))
    assert offered("run", "--learning_") == ["--learning_rate"]
    assert offered("run", "--learning-") == ["--learning-rate"]
    assert offered("run", "--tool_") == []
    assert offered("run", "--plugin", "tool", "--tool_") == ["--tool_size", "--tool_kind"]
    assert offered("data", "--plugin", "tool", "--tool_s") == ["--tool_size"]
    assert set(offered("data", "--")) >= {"--html", "--find", "--max_length"}


def test_values() -> None:
    assert set(offered("run", "--lr_scheduler_type", "")) >= set(SCHEDULES)
    assert offered("run", "--lr_scheduler_type", "cos")[0] == "cosine"
    assert offered("run", "--bf16", "t") == ["true"]
    assert offered("run", "--save-strategy", "e") == ["epoch"]
    assert offered("run", "--json_logs", "") == ["true", "false", "stderr"]
    assert offered("run", "--plugin", "tool", "--tool_kind", "pu") == ["purl"]
    assert offered("run", "--learning_rate", "") == []
    assert offered("generate", "--bf16", "t") == ["true"]


def test_files() -> None:
    for words in (
        ("run", ""),
        ("run", "exam"),
        ("run", "--output_dir", "o"),
        ("run", "--plugin", "./m"),
        ("evaluate", "--model_name_or_path", "m"),
        ("merge", "--adapter_path", ""),
        ("init", ""),
        ("replay", "o"),
        ("replay", "out", "--html", ""),
        ("blame", ""),
        ("report", "one", "o"),
        ("report", "--html", ""),
        ("data", "--html", ""),
    ):
        assert offered(*words) == ["FILE"], words


def test_plugins() -> None:
    assert offered("run", "--plugin", "") == list(installed())
    assert "tool" in offered("run", "--plugin", "too")
    assert offered("run", "--plugin", "no:too") == ["no:tool"]
    for words in (("plugins", "info"), ("plugins", "validate"), ("certify",), ("generate", "--plugin")):
        assert offered(*words, "too") == ["tool"], words


def test_what_makes_no_sense_offers_what_is_known(tmp_path: Path) -> None:
    assert offered("run", str(tmp_path / "none.yaml"), "--learning_") == ["--learning_rate"]
    assert offered("run", "--plugin", "nobody", "--learning_") == ["--learning_rate"]


BASH = """
source "$1"
COMP_WORDS=(sft run --plugin too); COMP_CWORD=3; COMPREPLY=()
compopt() { :; }
_sft_completion sft
echo "${COMPREPLY[@]}"
"""
FISH = """
source $argv[1]
complete -C "sft run --plugin too"
"""


@pytest.fixture
def command(site: Path, tmp_path: Path) -> Path:
    """The console script ``sft``, in a folder of its own."""
    path = tmp_path / "bin" / "sft"
    path.parent.mkdir()
    path.write_text(
        f"#!/bin/sh\nPYTHONPATH={site} exec {sys.executable} -c "
        '\'import sys; sys.argv[0] = "sft"; from sft.commands.cli import main; main()\' "$@"\n'
    )
    path.chmod(0o755)
    return path


@pytest.fixture
def script(command: Path, tmp_path: Path) -> Callable[[str], tuple[str, dict[str, str]]]:
    """What `sft completion SHELL` prints, as a file; and an environment that has the command. Skips without SHELL."""

    def write(shell: str) -> tuple[str, dict[str, str]]:
        if shutil.which(shell) is None:
            pytest.skip(f"{shell} is not installed")
        path = tmp_path / f"script.{shell}"
        path.write_bytes(subprocess.run([command, "completion", shell], capture_output=True, check=True).stdout)
        changes = {"PATH": f"{command.parent}:{os.environ['PATH']}", "HOME": str(tmp_path), "TERM": "xterm"}
        return str(path), {**os.environ, **changes}

    return write


Script = Callable[[str], tuple[str, dict[str, str]]]


@pytest.mark.slow
@pytest.mark.parametrize(("shell", "program"), [("bash --norc", BASH), ("fish --no-config", FISH)])
def test_a_shell_completes_the_name_of_a_plugin(tmp_path: Path, script: Script, shell: str, program: str) -> None:
    line = shell.split()
    path, environment = script(line[0])
    (tmp_path / "program").write_text(program)
    done = subprocess.run(
        [*line, str(tmp_path / "program"), path], capture_output=True, text=True, env=environment, timeout=60
    )
    assert done.stdout.split() == ["tool"], done.stderr


@pytest.mark.slow
def test_zsh_completes_the_name_of_a_plugin(script: Script) -> None:
    """In a terminal, for its functions work in its line editor alone."""
    path, environment = script("zsh")
    master, slave = pty.openpty()
    shell = subprocess.Popen(["zsh", "-f", "-i"], stdin=slave, stdout=slave, stderr=slave, env=environment)
    os.close(slave)
    seen = b""

    def shown_within(seconds: float, text: bytes) -> bool:
        nonlocal seen
        ends = time.monotonic() + seconds
        while text not in seen and time.monotonic() < ends:
            if select.select([master], [], [], 0.2)[0]:
                seen += os.read(master, 4096)
        return text in seen

    try:
        os.write(master, f"autoload -Uz compinit; compinit -D; source {path}; print REA''DY\n".encode())
        assert shown_within(30, b"READY"), seen
        os.write(master, b"sft run --plugin too\t")
        assert shown_within(30, b"--plugin tool"), seen
    finally:
        shell.kill()
        shell.wait()
        os.close(master)
