"""Requests: every way of asking for a plugin, by its name, by settings, and by commands."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import make_dataclass
from typing import Any

import pytest
from toy_plugins import active, plugin
from toy_plugins import refusal as refused

import sft
from sft.plugins.requests import by_device, choose_plugins, requests
from sft.resolve import resolve
from sft.settings.arguments import core_options

Distribute = Callable[..., None]
Command = Callable[..., subprocess.CompletedProcess[str]]

# Choosing imports nothing, so these plugins need not even be importable.
BROKEN = "raise RuntimeError('imported')"


@pytest.fixture
def tools(distribute: Distribute) -> None:
    """Two plugins that only their names request, and three that share the setting ``grind_algo``."""
    distribute("sft-test-tools", BROKEN, {"big-saw": "Saw", "Drill_Bit": "Drill"})
    distribute(
        "sft-test-grinders",
        BROKEN,
        {"fine": "Fine", "coarse": "Coarse", "polish": "Polish"},
        {
            "value.grind_algo.fine4": "Fine",
            "value.grind_algo.Coarse8": "Coarse",
            "setting.use_polish": "Polish",
            "number.polish_degree": "Polish",
            "environment.SFT_TEST_WORKERS": "Polish",
        },
    )


def chosen(**values: Any) -> tuple[list[str], dict[str, Any]]:
    return choose_plugins(values, core_options())


def refusal(**values: Any) -> str:
    with pytest.raises(sft.UsageError) as caught:
        chosen(**values)
    return str(caught.value)


@pytest.mark.usefixtures("tools")
class TestByName:
    def test_nothing_is_active_because_it_is_installed(self) -> None:
        assert chosen(seed=1) == ([], {"seed": 1})

    @pytest.mark.parametrize("name", ["big-saw", "big_saw", "Big-Saw", " big-saw "])
    def test_spelling(self, name: str) -> None:
        assert chosen(plugin=[name]) == (["big-saw"], {})

    @pytest.mark.parametrize("name", ["drill-bit", "drill_bit", "Drill_Bit"])
    def test_spelling_of_the_entry_point(self, name: str) -> None:
        assert chosen(plugin=name) == (["drill-bit"], {})

    @pytest.mark.parametrize("plugin", [["fine", "big-saw", "fine"], "fine,big-saw", "fine, big_saw,"])
    def test_several_in_the_order_of_the_request(self, plugin: Any) -> None:
        assert chosen(plugin=plugin)[0] == ["fine", "big-saw"]

    @pytest.mark.parametrize("plugin", [["no:fine", "fine"], "fine,no:fine", ["fine", "NO:Fine"], ["no:fine"]])
    def test_no_wins_wherever_it_stands(self, plugin: Any) -> None:
        assert chosen(plugin=plugin)[0] == []

    def test_what_cannot_be_switched_off(self) -> None:
        assert refusal(plugin="no:coars") == (
            "Plugin coars, which no:coars switches off, is not installed; did you mean no:coarse?"
        )

    def test_an_unknown_name_is_kept_for_the_error(self) -> None:
        assert chosen(plugin=["nothing-like-it"])[0] == ["nothing-like-it"]

    @pytest.mark.parametrize("plugin", [3, None, {"fine": True}, ["fine", 3]])
    def test_what_is_no_list_of_names(self, plugin: Any) -> None:
        assert refusal(plugin=plugin) == f"plugin: expected a name or a list of names, got {plugin!r}."


@pytest.mark.usefixtures("tools")
class TestByOwnSetting:
    @pytest.mark.parametrize("value", [True, "true", "True", "yes", "on", "1"])
    def test_on(self, value: Any) -> None:
        assert chosen(big_saw=value, seed=1) == (["big-saw"], {"seed": 1})

    @pytest.mark.parametrize("value", [False, None, 0, "false", "no", "off", "0"])
    def test_off(self, value: Any) -> None:
        assert chosen(big_saw=value, seed=1) == ([], {"seed": 1})

    @pytest.mark.parametrize("value", [3, "maybe", ""])
    def test_neither(self, value: Any) -> None:
        assert refusal(big_saw=value) == (
            f"big_saw: expected true or false (it switches plugin big-saw), got {value!r}."
        )

    def test_off_by_name_wins(self) -> None:
        assert chosen(big_saw=True, plugin="no:big_saw") == ([], {})

    def test_on_by_name_and_off_by_setting_is_refused(self) -> None:
        message = refusal(big_saw=False, plugin="big-saw")
        assert message == "Plugin big-saw is requested and its switch is false; keep one of them."


@pytest.mark.usefixtures("tools")
class TestByOtherSettings:
    def test_kinds_are_read_from_metadata(self) -> None:
        assert requests("setting")["use_polish"] == ["polish"]
        assert requests("adapter").get("use_polish") is None

    @pytest.mark.parametrize(("value", "on"), [(True, True), ("true", True), ("1", True), (False, False), ("0", False)])
    def test_a_switch_of_another_name(self, value: Any, on: bool) -> None:
        assert chosen(use_polish=value) == (["polish"] if on else [], {})

    @pytest.mark.parametrize("value", ["", "anything", 2])
    def test_a_switch_is_true_or_false(self, value: Any) -> None:
        assert refusal(use_polish=value) == (
            f"use_polish: expected true or false (it switches plugin polish), got {value!r}."
        )

    @pytest.mark.parametrize("value", [2, "0.5", 16.0, "-3"])
    def test_a_number_that_does_something(self, value: Any) -> None:
        assert chosen(polish_degree=value) == (["polish"], {"polish_degree": value})

    @pytest.mark.parametrize("value", [0, 1, -1, "1", "0.0", None, "none", ""])
    def test_a_number_that_does_nothing_is_taken_away_when_nobody_is_there_to_read_it(self, value: Any) -> None:
        assert chosen(polish_degree=value) == ([], {})

    def test_a_number_is_left_for_the_plugin_that_is_there(self) -> None:
        assert chosen(polish_degree=1, plugin="polish") == (["polish"], {"polish_degree": 1})

    def test_what_is_no_number(self) -> None:
        assert refusal(polish_degree="high") == "polish_degree: expected a number, got 'high'."

    @pytest.mark.parametrize(
        ("value", "plugin"), [("fine4", "fine"), ("FINE4", "fine"), ("coarse8", "coarse"), ("Coarse8", "coarse")]
    )
    def test_the_value_decides(self, value: str, plugin: str) -> None:
        assert chosen(grind_algo=value) == ([plugin], {"grind_algo": value})

    def test_a_value_that_nobody_knows(self) -> None:
        message = refusal(grind_algo="fine5")
        assert message.startswith("grind_algo: expected one of ")
        assert set(message.partition("one of ")[2].partition(", got ")[0].split(", ")) == {"fine4", "coarse8"}
        assert message.endswith(", got 'fine5'.")

    @pytest.mark.parametrize(
        ("value", "plugins"),
        [("fine4 slow", ["fine"]), ("slow, FINE4", ["fine"]), ("coarse8,fine4", ["coarse", "fine"])],
    )
    def test_any_word_of_the_value_may_ask(self, value: str, plugins: list[str]) -> None:
        """What the other words mean is for the plugin to say, which gets the whole value."""
        assert chosen(grind_algo=value) == (plugins, {"grind_algo": value})

    def test_words_of_which_none_asks(self) -> None:
        assert refusal(grind_algo="fine5 slow").endswith(", got 'fine5 slow'.")

    @pytest.mark.parametrize("value", [None, "none", "", False])
    def test_no_value(self, value: Any) -> None:
        assert chosen(grind_algo=value) == ([], {})

    def test_off_by_name_takes_the_setting_too(self) -> None:
        assert chosen(grind_algo="fine4", plugin="no:fine") == ([], {})

    def test_a_name_and_a_value_ask_once(self) -> None:
        assert chosen(grind_algo="fine4", plugin="fine")[0] == ["fine"]


@pytest.mark.usefixtures("tools")
class TestByEnvironment:
    @pytest.mark.parametrize(("value", "on"), [("2", True), ("16", True), ("1", False), ("0", False), ("", False)])
    def test_a_number_above_one(self, monkeypatch: pytest.MonkeyPatch, value: str, on: bool) -> None:
        monkeypatch.setenv("SFT_TEST_WORKERS", value)
        assert chosen(seed=1) == (["polish"] if on else [], {"seed": 1})

    @pytest.mark.parametrize("value", ["many", "-2", "2.5"])
    def test_what_is_no_count_asks_for_nothing(self, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
        monkeypatch.setenv("SFT_TEST_WORKERS", value)
        assert chosen() == ([], {})

    def test_without_the_variable(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("SFT_TEST_WORKERS", raising=False)
        assert chosen() == ([], {})

    def test_its_options_are_left_to_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("SFT_TEST_WORKERS", "2")
        assert chosen(polish_degree=1, plugin="fine") == (["polish", "fine"], {"polish_degree": 1})

    def test_off_by_name_wins(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("SFT_TEST_WORKERS", "2")
        assert chosen(plugin="no:polish") == ([], {})


def test_a_setting_of_the_core_is_never_taken_for_a_plugins(distribute: Distribute) -> None:
    distribute("sft-test-seed", BROKEN, {"seed": "Seed"}, {"number.max_steps": "Seed"})
    assert chosen(seed=3, max_steps=-1) == ([], {"seed": 3, "max_steps": -1})


def test_requests_without_a_plugin_of_the_same_object_ask_for_nothing(distribute: Distribute) -> None:
    distribute("sft-test-lost", BROKEN, {"lost": "Lost"}, {"setting.find_me": "Other"})
    assert "find_me" not in requests("setting")


# --- settings that a plugin named no: does not read ---------------------------------------------------------


@pytest.mark.usefixtures("tools")
@pytest.mark.parametrize(
    ("setting", "value", "plugin"),
    [
        ("grind_algo", "fine4", "fine"),
        ("use_polish", True, "polish"),
        ("polish_degree", 4, "polish"),
        ("big_saw", "true", "big-saw"),
    ],
)
def test_a_setting_whose_plugin_is_switched_off_by_name_is_told(setting: str, value: Any, plugin: str) -> None:
    _, active, without_effect = resolve({setting: value, "plugin": f"no:{plugin}"}, ())
    assert {*active.names} <= {*by_device({})}
    assert without_effect == [(f"{setting} {value}", f"no:{plugin} switches that off")]


@pytest.mark.usefixtures("tools")
@pytest.mark.parametrize(("setting", "value"), [("grind_algo", "none"), ("use_polish", False), ("polish_degree", 1)])
def test_one_that_asks_for_nothing_is_not_told(setting: str, value: Any) -> None:
    assert resolve({setting: value, "plugin": "no:polish,no:fine,no:coarse"}, ())[2] == []


# --- settings of the same name as another plugin's request ---------------------------------------------------


@pytest.mark.usefixtures("tools")
@pytest.mark.parametrize("aliased", [False, True], ids=["its name", "its alias"])
@pytest.mark.parametrize(
    ("setting", "kind", "given"),
    [
        ("polish_degree", int, 0),
        ("polish_degree", int, 1),
        ("polish_degree", int, -1),
        ("grind_algo", str, "none"),
    ],
)
def test_an_active_plugin_reads_its_own_setting(setting: str, kind: type, given: Any, aliased: bool) -> None:
    """Though another plugin, which is installed and not active, might have been asked for by that name."""
    option = sft.option(kind(7), "x", aliases=(setting,) if aliased else ())
    options = make_dataclass("Options", [("depth" if aliased else setting, kind, option)])
    owner = type("Owner", (sft.Plugin,), {"name": "owner", "api_version": 1, "Options": options})
    settings, plugins, without_effect = resolve({setting: given, "plugin": []}, (owner,))
    assert {*plugins.names} - {*by_device({})} == {"owner"}
    assert vars(settings.options["owner"]) == {"depth" if aliased else setting: given}
    assert without_effect == []


# --- commands -----------------------------------------------------------------------------------------------

GREETER = """
    import click
    import sft

    class Greeter(sft.Plugin):
        name = "greeter"
        api_version = 1

        @sft.hookimpl
        def sft_commands(self, cli):
            @cli.command(name="greet")
            @click.argument("who")
            def greet(who):
                click.echo(f"hello {who}")
"""


def test_a_command_of_a_plugin(distribute: Distribute, sft_command: Command) -> None:
    distribute("sft-test-greeter", GREETER, {"greeter": "Greeter"}, {"command.greet": "Greeter"})
    done = sft_command("greet", "you")
    assert (done.returncode, done.stdout, done.stderr) == (0, "hello you\n", "")


def test_a_command_of_a_plugin_that_refines_another(distribute: Distribute, sft_command: Command) -> None:
    source = GREETER.replace('name = "greeter"', 'name, requires = "greeter", ("base",)')
    base = 'import sft\n\nclass Base(sft.Plugin):\n    name, api_version = "base", 1\n'
    distribute("sft-test-base", base, {"base": "Base"})
    distribute("sft-test-greeter", source, {"greeter": "Greeter"}, {"command.greet": "Greeter"})
    done = sft_command("greet", "you")
    assert (done.returncode, done.stdout) == (0, "hello you\n"), done.stderr


def test_help_lists_commands_of_plugins_unimported(distribute: Distribute, sft_command: Command) -> None:
    distribute("sft-test-broken", BROKEN, {"broken": "Broken"}, {"command.break": "Broken"})
    done = sft_command("--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "from plugin broken" in done.stdout
    done = sft_command("break")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("sft: Plugin broken of sft-test-broken 1.0 cannot be imported (RuntimeError: imp")


def test_a_command_that_its_plugin_does_not_add(distribute: Distribute, sft_command: Command) -> None:
    source = "import sft\nclass Idle(sft.Plugin):\n    name = 'idle'\n    api_version = 1\n"
    distribute("sft-test-idle", source, {"idle": "Idle"}, {"command.idle": "Idle"})
    done = sft_command("idle")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "sft: Plugin idle (sft-test-idle 1.0) declares the command idle and adds none of that name; upgrade it.\n"
    )


def test_a_command_of_two_plugins(distribute: Distribute, sft_command: Command) -> None:
    for number in ("one", "two"):
        source = GREETER.replace('"greeter"', f'"{number}"')
        distribute(f"sft-test-{number}", source, {number: "Greeter"}, {"command.greet": "Greeter"})
    done = sft_command("greet", "you")
    assert (done.returncode, done.stdout) == (2, "")
    assert "one (sft-test-one 1.0)" in done.stderr
    assert "two (sft-test-two 1.0)" in done.stderr
    assert done.stderr.endswith("; pip uninstall one of them.\n")


def test_a_plugin_cannot_take_a_command_of_the_core(distribute: Distribute, sft_command: Command) -> None:
    distribute("sft-test-run", BROKEN, {"other": "Other"}, {"command.run": "Other"})
    assert "from plugin other" not in sft_command("--help").stdout
    assert sft_command("run").stderr.startswith("sft: model_name_or_path is not set;")


# --- requests that can ask for nothing ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_", "target", "fault"),
    [
        ("settng.use_it", "Tool", "which is of no known kind; did you mean setting.use_it?"),
        ("weather.fine", "Tool", "which is of no known kind; there are setting, value, number, environment, "),
        ("setting", "Tool", "which lacks a part of setting.X."),
        ("value.grind_algo", "Tool", "which lacks a part of value.X.V."),
        ("setting.use_it", "Other", "for sft_test_tool:Other, which is no plugin of its own; add it to sft.plugins."),
    ],
)
def test_a_request_that_can_ask_for_nothing_is_refused_and_listed(
    distribute: Distribute, sft_command: Command, request_: str, target: str, fault: str
) -> None:
    distribute("sft-test-tool", plugin("tool"), {"tool": "Tool"}, {request_: target})
    distribute("sft-test-fine", plugin("fine"), {"fine": "Tool"})
    message = refused("tool")
    assert message.startswith(f"Plugin tool (sft-test-tool 1.0) declares the request {request_!r}")
    assert fault in message
    assert active("fine", "lora").names == ["fine", "lora"]  # those of other distributions are not concerned
    listed = [line for line in sft_command("plugins").stdout.splitlines() if line.startswith("note: ")]
    assert len(listed) == 1
    assert listed[0].startswith(f"note: sft-test-tool declares the request {request_!r}")
    assert fault in listed[0]


NO_COMMAND = (
    "sft: There is no command 'rnu'; `sft --help` lists the commands, and plugins add to them "
    "(pip install 'paddle-sft[all]' brings those of the project).\n"
)


def test_an_unknown_command(sft_command: Command) -> None:
    done = sft_command("rnu")
    assert (done.returncode, done.stderr) == (2, NO_COMMAND)


def test_no_command_shows_the_help(sft_command: Command) -> None:
    done = sft_command()
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == sft_command("--help").stdout
    assert done.stdout.startswith("Usage: ")
