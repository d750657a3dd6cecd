"""Finding plugins: what is listed, what is imported, and every way in which one cannot be loaded."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from toy_plugins import active, plugin, refusal

import sft
from sft.plugins.discovery import installed

Distribute = Callable[..., None]
Command = Callable[..., subprocess.CompletedProcess[str]]


# --- listing ------------------------------------------------------------------------------------------------


MARKED = """
    import pathlib
    pathlib.Path({marker!r}).write_text("imported")
"""


@pytest.mark.parametrize(
    "arguments", [(), ("--help",), ("plugins", "--help"), ("run", "--help"), ("run",), ("run", "--x", "1")]
)
def test_what_is_not_requested_is_not_imported(
    distribute: Distribute, sft_command: Command, tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    marker = tmp_path / "marker"
    source = MARKED.format(marker=str(marker)) + plugin("marked")
    distribute("sft-test-marked", source, {"marked": "Tool"}, {"command.mark": "Tool", "setting.mark": "Tool"})
    sft_command(*arguments)
    assert not marker.exists()


def test_what_is_requested_is_imported(distribute: Distribute, sft_command: Command, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    distribute("sft-test-marked", MARKED.format(marker=str(marker)) + plugin("marked"), {"marked": "Tool"})
    assert sft_command("run", "--plugin", "marked", "--help").returncode == 0
    assert marker.exists()


def test_listing_in_process_loads_no_module(distribute: Distribute) -> None:
    distribute("sft-test-tool", plugin("tool"), {"tool": "Tool"})
    assert [item.origin for item in installed()["tool"]] == ["sft-test-tool 1.0"]
    assert "sft_test_tool" not in sys.modules
    active("tool")
    assert "sft_test_tool" in sys.modules


def test_a_path_that_python_searches_twice_lists_once(
    distribute: Distribute, site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    distribute("sft-test-tool", plugin("tool"), {"tool": "Tool"})
    monkeypatch.syspath_prepend(site)
    assert sys.path.count(str(site)) == 2
    assert len(installed()["tool"]) == 1


def test_a_broken_plugin_that_is_not_requested_disturbs_nothing(distribute: Distribute, sft_command: Command) -> None:
    distribute("sft-test-broken", "import no_such_module", {"broken": "Tool"}, {"command.broken": "Tool"})
    distribute("sft-test-tool", plugin("tool"), {"tool": "Tool"})
    for arguments in (("--help",), ("plugins",), ("run", "--help"), ("run", "--plugin", "tool", "--help")):
        done = sft_command(*arguments)
        assert (done.returncode, done.stderr) == (0, ""), arguments
    done = sft_command("run", "--plugin", "tool")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("sft: model_name_or_path is not set;")


# --- what cannot be loaded ----------------------------------------------------------------------------------


def test_missing(distribute: Distribute) -> None:
    distribute("sft-test-tool", plugin("sharpener"), {"sharpener": "Tool"})
    message = refusal("sharpner")
    assert message.startswith("Plugin sharpner is not installed (installed: ")
    assert "sharpener" in message.partition("(installed: ")[2].partition(")")[0].split(", ")
    assert message.endswith("; did you mean sharpener?")


@pytest.mark.parametrize(
    ("name", "extras", "hint"),
    [
        ("loom", ("loom", "sharpenr"), "pip install 'paddle-sft[loom]' brings it."),
        ("sharpenr", ("loom", "sharpenr"), "pip install 'paddle-sft[sharpenr]' brings it."),  # and not the one near it
        ("looms", ("loom",), "did you mean loom (pip install 'paddle-sft[loom]' brings it)?"),
        ("xyz", ("loom",), "pip install the distribution that provides it."),
        (
            "xyz",
            (),
            "pip install 'paddle-sft[xyz]' brings it if it is one of the project's; of another, pip install its "
            "distribution.",
        ),
        ("x'; y", (), "pip install the distribution that provides it."),
    ],
)
def test_what_brings_one_that_is_missing(
    distribute: Distribute, monkeypatch: pytest.MonkeyPatch, name: str, extras: tuple[str, ...], hint: str
) -> None:
    distribute("sft-test-tool", plugin("sharpener"), {"sharpener": "Tool"})
    monkeypatch.setattr("sft.plugins.discovery.extras", lambda: extras)
    assert refusal(name).endswith(f"); {hint}")


def test_a_setting_of_one_that_is_missing_says_what_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sft.settings.reading.extras", lambda: ("loom", "loom-wide"))
    monkeypatch.setattr("sft.plugins.discovery.extras", lambda: ("loom", "loom-wide"))
    for setting, name in (("loom", "loom"), ("loom_wide_warp", "loom-wide"), ("loom_wide.warp", "loom-wide")):
        with pytest.raises(sft.UsageError) as caught:
            sft.run({setting: True}, say=lambda _: None)
        cure = f"if it belongs to plugin {name}, pip install 'paddle-sft[{name}]' brings it."
        assert str(caught.value) == f"Unknown setting {setting}; {cure}"


@pytest.mark.parametrize(
    ("source", "cause"),
    [
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("raise OSError('two\\nlines')", "OSError: two lines"),
        ("def f(:", "SyntaxError: "),
        ("value = 1", "AttributeError: module 'sft_test_broken' has no attribute 'Tool'"),
    ],
)
def test_a_failing_import_names_distribution_version_cause_and_cure(
    distribute: Distribute, source: str, cause: str
) -> None:
    distribute("sft-test-broken", source, {"broken": "Tool"}, version="0.4")
    message = refusal("broken")
    assert message.startswith(f"Plugin broken of sft-test-broken 0.4 cannot be imported ({cause}")
    assert message.endswith("; pip install --upgrade --force-reinstall sft-test-broken, or leave the plugin out.")


def test_a_plugin_of_two_distributions_names_both(distribute: Distribute) -> None:
    distribute("sft-test-one", "1 / 0", {"tool": "Tool"}, version="1.1")
    distribute("sft-test-two", "1 / 0", {"tool": "Tool"}, version="2.2")
    message = refusal("tool")
    assert message.startswith("Plugin tool is provided twice, by sft-test-")
    assert "sft-test-one 1.1 (sft_test_one:Tool)" in message
    assert "sft-test-two 2.2 (sft_test_two:Tool)" in message
    assert message.endswith("pip uninstall one of them.")


def test_another_api_version(distribute: Distribute) -> None:
    distribute("sft-test-old", plugin("old", "api_version = 0"), {"old": "Tool"})
    message = refusal("old")
    assert message == (
        "Plugin old (sft-test-old 1.0) is written for plugin API 0, and this sft has 1.1; install versions of sft-core "
        "and of the plugin that go together."
    )


@pytest.mark.parametrize(
    ("source", "declared"), [(plugin("other"), "'other'"), ("class Tool: pass", "None"), ("Tool = 3", "None")]
)
def test_a_name_that_differs_from_the_entry_point(distribute: Distribute, source: str, declared: str) -> None:
    distribute("sft-test-tool", source, {"tool": "Tool"})
    assert refusal("tool").startswith(f"Plugin tool of sft-test-tool 1.0 names itself {declared};")
