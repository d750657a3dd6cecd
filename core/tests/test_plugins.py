"""Plugins that are active together: what they need and exclude, the order of calls, hooks that they publish."""

from __future__ import annotations

import subprocess
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from toy_plugins import Publisher, active, plugin, refusal

import sft
from sft import hookspecs
from sft.fine_tune import prepare_run
from sft.plugins.registry import Plugins
from sft.settings.reading import build

Distribute = Callable[..., None]
Command = Callable[..., subprocess.CompletedProcess[str]]


# --- plugins that need or exclude each other ----------------------------------------------------------------


class Base(sft.Plugin):
    name = "base"
    api_version = 1


class Refinement(sft.Plugin):
    name = "refinement"
    api_version = 1
    requires = ("base",)


class Rival(sft.Plugin):
    name = "rival"
    api_version = 1
    conflicts = ("base",)


def test_requires() -> None:
    assert refusal(extra=(Refinement,)) == (
        "Plugin refinement refines base, which is not active; add --plugin base or leave refinement out."
    )
    assert active(extra=(Refinement, Base)).names == ["base", "refinement"]


@pytest.mark.parametrize("pair", [(Base, Rival), (Rival, Base)])
def test_conflicts(pair: tuple[type, type]) -> None:
    message = refusal(extra=pair)
    assert message.startswith("Plugins rival (given directly as Rival) and base (given directly as Base) cannot work")
    assert active(extra=(Rival,)).names == ["rival"]


def test_two_providers_of_a_single_seam_name_both_distributions(distribute: Distribute) -> None:
    body = "sft_collator = sft.hookimpl(lambda self, run: 1 / 0)"
    distribute("sft-test-one", plugin("one", body), {"one": "Tool"}, version="1.1")
    distribute("sft-test-two", plugin("two", body), {"two": "Tool"}, version="2.2")
    assert refusal("one", "two") == (
        "Plugins one (sft-test-one 1.1) and two (sft-test-two 2.2) both provide sft_collator, which has one place; "
        "leave one out."
    )
    assert active("one").provider("sft_collator") == "one"
    assert active("two").provider("sft_collator") == "two"
    assert active().provider("sft_collator") is None


def test_the_conflict_comes_before_model_and_data_are_looked_at(distribute: Distribute, tmp_path: Path) -> None:
    body = "sft_quantizer = sft.hookimpl(lambda self, run: 1 / 0)"
    for number in ("one", "two"):
        distribute(f"sft-test-{number}", plugin(number, body), {number: "Tool"})
    values = {"plugin": ["one", "two"], "model_name_or_path": "missing", "dataset_name_or_path": "missing"}
    with pytest.raises(sft.UsageError, match="both provide sft_quantizer"):
        prepare_run({**values, "output_dir": str(tmp_path / "out")}, (), print)


def test_an_unknown_hook() -> None:
    class Typo(sft.Plugin):
        name = "typo"
        api_version = 1

        @sft.hookimpl
        def sft_chek(self, run: Any) -> None: ...

    message = refusal(extra=(Typo,))
    assert message.startswith("Plugin typo (given directly as ")
    assert (
        "implements a hook that no active plugin publishes (unknown hook 'sft_chek'; did you mean sft_check?); upgrade"
    ) in message


def test_a_wrong_argument() -> None:
    class Wrong(sft.Plugin):
        name = "wrong"
        api_version = 1

        @sft.hookimpl
        def sft_check(self, run: Any, weather: Any) -> None: ...

    message = refusal(extra=(Wrong,))
    assert message.startswith("Plugin wrong (given directly as ")
    assert "does not fit the hooks" in message
    assert "sft_check" in message
    assert "weather" in message


def test_fewer_arguments_are_fine() -> None:
    calls = []

    class Short(sft.Plugin):
        name = "short"
        api_version = 1

        @sft.hookimpl
        def sft_step_ended(self, record: Any) -> None:
            calls.append(record)

    active(extra=(Short,)).hook.sft_step_ended(run=None, record={"step": 1})
    assert calls == [{"step": 1}]


# --- the order of calls -------------------------------------------------------------------------------------


def recorder(name: str, order: int, calls: list[str]) -> type:
    class Recorder(sft.Plugin):
        api_version = 1

        @sft.hookimpl
        def sft_check(self, run: Any) -> None:
            calls.append(self.name)

    Recorder.name, Recorder.order = name, order
    return Recorder


@pytest.mark.parametrize(
    ("requested", "called"),
    [
        ([("a", 0), ("b", 0), ("c", 0)], ["a", "b", "c"]),
        ([("c", 0), ("b", 0), ("a", 0)], ["c", "b", "a"]),
        ([("a", 5), ("b", -5), ("c", 0)], ["b", "c", "a"]),
        ([("a", 5), ("b", 0), ("c", 5), ("d", 0)], ["b", "d", "a", "c"]),
    ],
)
def test_order_then_request(requested: list[tuple[str, int]], called: list[str]) -> None:
    calls: list[str] = []
    plugins = active(extra=tuple(recorder(name, order, calls) for name, order in requested))
    plugins.hook.sft_check(run=None)
    assert calls == called == plugins.names


def chain(name: str, requires: tuple[str, ...] = (), order: int = 0) -> type:
    members = {"name": name, "api_version": 1, "requires": requires, "order": order}
    return type(name.title(), (sft.Plugin,), members)


@pytest.mark.parametrize(
    ("requested", "called"),
    [
        ([chain("c", ("b",)), chain("b", ("a",)), chain("a")], ["a", "b", "c"]),
        ([chain("x"), chain("b", ("a",)), chain("y"), chain("a"), chain("z")], ["x", "y", "a", "b", "z"]),
        ([chain("b", ("A_1",)), chain("a-1")], ["a-1", "b"]),
        # A plugin's own order counts among those that may come next, and never against what it requires.
        ([chain("b", ("a",), order=-5), chain("a"), chain("c")], ["a", "b", "c"]),
        ([chain("b", ("a",)), chain("a", order=5), chain("c")], ["c", "a", "b"]),
        ([chain("d", ("a", "c")), chain("c", ("a",)), chain("a")], ["a", "c", "d"]),
    ],
)
def test_a_plugin_comes_after_what_it_requires(requested: list[type], called: list[str]) -> None:
    assert active(extra=tuple(requested)).names == called


def test_plugins_that_require_each_other_are_refused() -> None:
    ring = (chain("c", ("a",)), chain("a", ("b",)), chain("b", ("c",)), chain("alone"), chain("user", ("a",)))
    assert refusal(extra=ring) == "Plugins c and a and b require each other; upgrade them."
    assert refusal(extra=(chain("self", ("self",)),)) == "Plugin self requires itself; upgrade it."


# --- published hooks ----------------------------------------------------------------------------------------


def doubler(called: str) -> type:
    class Doubler(sft.Plugin):
        api_version = 1
        requires = ("base",)

        @sft.hookimpl
        def base_factor(self, rank: int) -> float:
            return 2.0 * rank

    Doubler.name = called
    return Doubler


def test_a_plugin_publishes_hooks_for_its_refinements() -> None:
    assert active(extra=(Publisher,)).hook.base_factor(rank=3) is None
    assert active(extra=(Publisher, doubler("doubler"))).hook.base_factor(rank=3) == 6.0
    assert active(extra=(doubler("doubler"), Publisher)).hook.base_factor(rank=3) == 6.0


def test_a_refinement_without_what_it_refines() -> None:
    assert "refines base, which is not active" in refusal(extra=(doubler("doubler"),))

    class Careless(sft.Plugin):
        name = "careless"
        api_version = 1

        @sft.hookimpl
        def base_factor(self, rank: int) -> float:
            return 0.0

    assert "unknown hook 'base_factor'" in refusal(extra=(Careless,))


def test_a_published_single_hook_has_one_place_too() -> None:
    message = refusal(extra=(Publisher, doubler("first"), doubler("second")))
    assert message.startswith("Plugins first (")
    assert " and second (" in message
    assert "both provide base_factor" in message


def test_a_hook_is_published_once() -> None:
    class Copy(sft.Plugin):
        name = "copy"
        api_version = 1
        hookspecs = Publisher.hookspecs

    message = refusal(extra=(Publisher, Copy))
    assert message.startswith("Plugin copy (given directly as ")
    assert "cannot publish its hooks: " in message
    assert "'base_factor'" in message


# --- kinds of plugins ---------------------------------------------------------------------------------------


def test_a_module_is_a_plugin(distribute: Distribute) -> None:
    source = """
        import sft

        name = "as-module"
        api_version = 1
        calls = []

        @sft.hookimpl
        def sft_check(run):
            calls.append(run)
    """
    distribute("sft-test-module", source, {"as-module": ""})
    plugins = active("as-module")
    assert build({}, plugins).options == {}
    plugins.hook.sft_check(run="a run")
    assert sys.modules["sft_test_module"].calls == ["a run"]


def test_help_of_a_module_plugin(distribute: Distribute, sft_command: Command) -> None:
    distribute("sft-test-module", "name = 'as-module'; api_version = 1", {"as-module": ""})
    done = sft_command("run", "--plugin", "as-module", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "Plugin as-module (sft-test-module 1.0)" in done.stdout


def test_a_module_given_directly() -> None:
    module = types.ModuleType("given")
    module.name, module.api_version = "given", 1
    assert active(extra=(module,)).origin("given") == "given directly as given"


@dataclass
class ToolOptions:
    tool_size: int = sft.option(1, "a size", minimum=1)


class Tool(sft.Plugin):
    name = "My_Tool"
    api_version = 1
    Options = ToolOptions


def test_options_reach_a_plugin_whose_name_is_spelled_in_another_way(distribute: Distribute) -> None:
    source = """
        from dataclasses import dataclass
        import sft

        @dataclass
        class ToolOptions:
            tool_size: int = sft.option(1, "a size")

        class Tool(sft.Plugin):
            name = "My_Tool"
            api_version = 1
            Options = ToolOptions

            @sft.hookimpl
            def sft_state(self, run):
                return {"size": self.options.tool_size}
    """
    distribute("sft-test-tool", source, {"my-tool": "Tool"})
    plugins = Plugins.load(["my-tool"], hookspecs)
    plugins.start(build({"tool_size": 7}, plugins).options)
    assert plugins.ask("my-tool", "sft_state", run=None) == {"size": 7}


def test_a_class_given_directly_stands_for_the_installed_one(distribute: Distribute) -> None:
    distribute("sft-test-tool", "1 / 0", {"my-tool": "Tool"})
    plugins = active("my-tool", extra=(Tool,))
    assert plugins.names == ["my-tool"]
    assert plugins.origin("my-tool") == "given directly as Tool"
    assert "my-tool" not in plugins.inactive()


class Stateful(sft.Plugin):
    name = "stateful"
    api_version = 1
    Options = ToolOptions

    @sft.hookimpl
    def sft_state(self, run: Any) -> dict[str, Any]:
        return {"size": self.options.tool_size, "self": id(self)}


class AlsoStateful(sft.Plugin):
    name = "also-stateful"
    api_version = 1

    @sft.hookimpl
    def sft_state(self, run: Any) -> dict[str, Any]:
        return {"also": True}


def test_one_plugin_alone_is_asked() -> None:
    plugins = active(extra=(Stateful, AlsoStateful, Base), options={"stateful": ToolOptions(3)})
    assert plugins.ask("also-stateful", "sft_state", run=None) == {"also": True}
    assert plugins.ask("stateful", "sft_state", run=None)["size"] == 3
    assert plugins.ask("base", "sft_state", run=None) is None


def test_two_sets_in_one_process_are_independent() -> None:
    one = active(extra=(Stateful,), options={"stateful": ToolOptions(1)})
    two = active(extra=(Stateful, AlsoStateful), options={"stateful": ToolOptions(2)})
    (of_one,) = one.hook.sft_state(run=None)
    of_two = two.ask("stateful", "sft_state", run=None)
    assert (of_one["size"], of_two["size"]) == (1, 2)
    assert of_one["self"] != of_two["self"]
    assert len(two.hook.sft_state(run=None)) == 2
    assert len(active().hook.sft_state(run=None)) == 0
