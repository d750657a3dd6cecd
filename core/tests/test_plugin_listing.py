"""``sft plugins``, ``info`` and ``validate``: what plugins declare, and whether that holds."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from toy_plugins import plugin

from sft.commands.cli import cli
from sft.errors import SftError
from sft.kit.about import about, all_plugins, find_plugin, found, ties
from sft.kit.validate import validated

Distribute = Callable[..., None]

GOOD = """
    from dataclasses import dataclass

    import sft

    @dataclass
    class Options:
        tool_size: int = sft.option(3, "how large it is", aliases=("tool_width",))

    class Tool(sft.Plugin):
        "Does nothing much."

        name = "tool"
        api_version = ">=1.1,<2"
        summary = "Nothing much."
        reference = "arXiv 0000.00000"
        requires = ("lora",)
        conflicts = ("vera",)
        Options = Options

        @sft.hookimpl
        def lora_scaling(self, alpha: float, rank: int) -> float:
            return alpha
"""


@pytest.fixture
def ask(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[str, str | None]]:
    """What `sft plugins …` prints in this process, and the sentence that it ends with, if it fails."""

    def run(*arguments: str) -> tuple[str, str | None]:
        failed = None
        try:
            cli.main(["plugins", *arguments], standalone_mode=False)
        except SftError as error:
            failed = str(error)
        return capsys.readouterr().out, failed

    return run


def row(name: str) -> Any:
    return about(find_plugin(name), found())


# --- the list -----------------------------------------------------------------------------------------------


def test_a_row_says_what_a_plugin_is_needs_and_excludes(distribute: Distribute, ask: Callable[..., Any]) -> None:
    distribute("sft-test-tool", GOOD, {"tool": "Tool"}, {"setting.use_tool": "Tool"}, version="2.3")
    text, failed = ask()
    assert failed is None
    lines = text.splitlines()
    at = next(number for number, line in enumerate(lines) if line.startswith("tool "))
    assert re.fullmatch(r"tool +refines lora +sft-test-tool 2\.3", lines[at])
    assert [line.strip() for line in lines[at + 1 : at + 3]] == [
        "Nothing much.",
        "needs lora; not with vera; also requested by setting use_tool",
    ]
    vera = next(number for number, line in enumerate(lines) if line.startswith("vera "))
    assert "not with lora, tool" in lines[vera + 2]  # whichever of the two says so


def test_the_same_as_json(distribute: Distribute, ask: Callable[..., Any]) -> None:
    distribute("sft-test-tool", GOOD, {"tool": "Tool"}, {"setting.use_tool": "Tool"}, version="2.3")
    rows = {value["name"]: value for value in map(json.loads, ask("--json")[0].splitlines())}
    assert rows["tool"] == {
        "name": "tool",
        "origin": "sft-test-tool 2.3",
        "distribution": "sft-test-tool",
        "version": "2.3",
        "kinds": ["refines lora"],
        "summary": "Nothing much.",
        "reference": "arXiv 0000.00000",
        "api_version": ">=1.1,<2",
        "requires": ["lora"],
        "conflicts": ["vera"],
        "supersedes": [],
        "also_requested_by": ["setting use_tool"],
        "hooks": ["lora_scaling"],
        "publishes": [],
        "options": [{"name": "tool_size", "default": 3, "help": "how large it is", "aliases": ["tool_width"]}],
        "shapes": True,
        "fault": None,
    }
    assert json.loads(ask("info", "tool", "--json")[0]) == rows["tool"]


def test_our_own_are_of_the_kinds_that_they_are() -> None:
    kinds = {one.name: one.kinds for one in all_plugins()}
    expected = {"lora": ("adapter",), "nf4": ("quantizer",), "flashmask": ("attention",), "pissa": ("refines lora",)}
    expected |= {"parallel-4d": ("parallel", "command"), "neftune": ("change",), "fast-cpu": ("kernels",)}
    assert {name: kinds.get(name) for name in expected if name in kinds} == {
        name: kind for name, kind in expected.items() if name in kinds
    }
    assert all(one.fault is None for one in all_plugins())


def test_one_that_only_watches_shapes_nothing(distribute: Distribute) -> None:
    body = "@sft.hookimpl\n        def sft_step_ended(self, run, record):\n            pass"
    source = plugin("tool", f"observes = True\n        {body}") + "\n" + plugin("asks", body).replace("Tool", "Asks")
    distribute("sft-test-tool", source, {"tool": "Tool", "asks": "Asks"})
    assert (row("tool").kinds, row("tool").shapes) == (("observer",), False)
    assert (row("asks").kinds, row("asks").shapes) == (("events",), False)  # it may ask the run to stop


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import no_such_module", "cannot be imported (ModuleNotFoundError: No module named 'no_such_module')"),
        ("raise SystemExit", "cannot be imported (SystemExit"),
        (plugin("tool", "requires = 3"), "is not well formed: requires is 3"),
        (plugin("tool").replace("api_version = 1", "api_version = 7"), "is written for plugin API 7"),
    ],
)
def test_a_broken_one_is_a_row_that_says_why(
    distribute: Distribute, ask: Callable[..., Any], source: str, reason: str
) -> None:
    distribute("sft-test-broken", source, {"tool": "Tool"})
    text, failed = ask()
    assert failed is None
    assert re.search(rf"^tool +broken +sft-test-broken 1\.0\n +Plugin tool.*{re.escape(reason)}", text, re.MULTILINE)
    assert reason in ask("info", "tool")[0]


def test_two_of_one_name_are_two_rows(distribute: Distribute) -> None:
    distribute("sft-test-one", plugin("tool"), {"tool": "Tool"}, version="1.1")
    distribute("sft-test-two", plugin("tool"), {"tool": "Tool"}, version="2.2")
    faults = {one.origin: one.fault for one in all_plugins() if one.name == "tool"}
    assert (
        faults["sft-test-one 1.1"] == "sft-test-two 2.2 provides a plugin of this name too; pip uninstall one of them."
    )
    assert len(faults) == 2


def test_who_reads_one_kind_of_adapter_alike_is_told(distribute: Distribute) -> None:
    source = plugin("one") + "\n" + plugin("two").replace("class Tool", "class Two")
    claims = {"adapter.TOY": "Tool", "adapter.TOY ": "Two", "adapter.OTHER": "Tool"}
    distribute("sft-test-one", source, {"one": "Tool", "two": "Two"}, claims)
    assert ties(all_plugins()) == [
        "adapters of TOY are read by one and by two; choose with --plugin NAME or --plugin no:NAME"
    ]


# --- info ---------------------------------------------------------------------------------------------------


def test_info_says_everything(distribute: Distribute, ask: Callable[..., Any]) -> None:
    distribute("sft-test-tool", GOOD, {"tool": "Tool"})
    text, _ = ask("info", "TOOL")
    assert text.splitlines()[:3] == ["tool: refines lora (sft-test-tool 1.0)", "  Nothing much.", ""]
    for line in (
        "  reference               arXiv 0000.00000",
        "  API                     >=1.1,<2 (this sft has 1.1)",
        "  needs                   lora",
        "  implements              lora_scaling",
        "    --tool_size N  [3]\n        how large it is",
    ):
        assert line in text


def test_info_of_a_file_and_of_what_is_not_there(tmp_path: Path, ask: Callable[..., Any]) -> None:
    path = tmp_path / "my_tool.py"
    path.write_text(textwrap.dedent(GOOD))
    assert ask("info", str(path))[0].startswith(f"tool: refines lora (the file {path})\n")
    text, failed = ask("info", "lra")
    assert (text, failed[:33]) == ("", "Plugin lra is not installed (inst")
    assert failed.endswith("; did you mean lora?")


# --- validate -----------------------------------------------------------------------------------------------


def faults(distribute: Distribute, source: str, **members: str) -> list[tuple[str, str]]:
    distribute("sft-test-tool", source, {"tool": "Tool"})
    (findings,) = validated("tool")
    return findings.faults


def test_what_holds_is_valid(distribute: Distribute, ask: Callable[..., Any]) -> None:
    distribute("sft-test-tool", GOOD, {"tool": "Tool"})
    text, failed = ask("validate", "tool", "--json")
    value = json.loads(text)
    assert (failed, value["valid"], value["faults"]) == (None, True, [])
    assert [note["text"] for note in value["notes"]] == [
        "its distribution has no description; add one to its pyproject.toml."
    ]


@pytest.mark.parametrize(
    ("old", "new", "check", "said"),
    [
        ('api_version = ">=1.1,<2"', 'api_version = ">=3,<4"', "declaration", "is written for plugin API >=3,<4"),
        ("lora_scaling(self, alpha: float, rank: int)", "lora_scaling(self, alpha, ranks)", "hooks", "ranks"),
        ("def lora_scaling", "def lora_scalng", "hooks", "did you mean lora_scaling?"),
        ("alpha: float", "alpha: str", "arguments", "lora_scaling takes alpha as str, and the hook says float."),
        ("-> float", "-> list", "arguments", "lora_scaling returns list, and the hook says float."),
        (
            "tool_size: int",
            "seed: int",
            "settings",
            "seed is a setting of the core; give it a name of its own, such as",
        ),
        ("tool_size: int", "lora: int", "settings", "lora switches a plugin on, so it would never get a value"),
        ('("tool_width",)', '("max_length",)', "settings", "max_length is a setting of the core"),
        ('"how large it is"', '""', "settings", "tool_size has no help"),
        ('summary = "Nothing much."', "", "words", "it has no summary"),
        ('conflicts = ("vera",)', "certify = {}", "certify", "certify of plugin tool is {}, not an sft.Trial"),
        (
            'conflicts = ("vera",)',
            'certify = sft.Trial(options={"tool_depth": 2})',
            "certify",
            "certify has a value for option tool_depth, which the plugin has not",
        ),
        ("    import sft\n", "    import sft\n    import datasets\n", "import", "importing it imports datasets"),
        ("class Tool", "sum(n for n in range(40_000_000))\n\n    class Tool", "import", "0.5 s are allowed"),
    ],
)
@pytest.mark.slow
def test_what_does_not_hold(distribute: Distribute, old: str, new: str, check: str, said: str) -> None:
    assert old in GOOD
    found = faults(distribute, GOOD.replace(old, new))
    assert [one for one, _ in found] == [check]
    assert said in found[0][1]


def test_a_fault_is_said_and_ends_with_exit_code_1(
    distribute: Distribute, ask: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sft.kit.validate._import", lambda asked: ())  # takes a process
    distribute("sft-test-tool", GOOD.replace("tool_size: int", "lora_rank: int"), {"tool": "Tool"})
    text, failed = ask("validate", "tool")
    assert text.splitlines()[:2] == [
        "tool (sft-test-tool 1.0): 1 fault",
        "  fault, settings: lora_rank is a setting of plugin lora, which it requires; call it tool_lora_rank.",
    ]
    assert failed == "tool: something is wrong, see above."


@pytest.mark.slow
def test_our_own_are_valid(ask: Callable[..., Any]) -> None:
    text, failed = ask("validate")
    assert failed is None, text
