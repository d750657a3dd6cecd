"""What a plugin must declare: an API version of its own, a name, and marks on what it means to be hooks."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import pytest
from toy_plugins import Publisher, active, refusal

import sft
from sft.plugins.discovery import import_plugin

Distribute = Callable[..., None]


def toy(**members: Any) -> type:
    return type("Toy", (sft.Plugin,), {"name": "toy", "api_version": 1, **members})


WHO = "Plugin toy (given directly as Toy)"


# --- the API version ----------------------------------------------------------------------------------------


def test_a_plugin_says_itself_which_api_it_is_written_for() -> None:
    class Old(sft.Plugin):
        name = "toy"

    Old.__qualname__ = "Toy"
    assert refusal(extra=(Old,)) == (
        f"{WHO} does not say for which plugin API it is written; add api_version = '>=1.1,<2' to it, once "
        "it fits docs/plugins.md."
    )


def test_an_installed_one_and_a_module_too(distribute: Distribute) -> None:
    distribute("sft-test-old", "import sft\nclass Old(sft.Plugin):\n    name = 'old'\n", {"old": "Old"})
    distribute("sft-test-module", "name = 'as-module'", {"as-module": ""})
    for name in ("old", "as-module"):
        assert "does not say for which plugin API it is written" in refusal(name)


@pytest.mark.parametrize("version", ["1", True, 1.0, (1,), "one", ">=1;<2"])
def test_what_is_no_range(version: Any) -> None:
    assert refusal(extra=(toy(api_version=version),)) == (
        f"{WHO} is not well formed: api_version is {version!r}, not a range of versions; write api_version = "
        "'>=1.1,<2', once it fits docs/plugins.md."
    )


@pytest.mark.parametrize("version", ["", ">=1", "!=2", ">=1,!=3"])
def test_a_range_without_an_end_promises_what_nobody_knows(version: str) -> None:
    assert refusal(extra=(toy(api_version=version),)) == (
        f"{WHO} is not well formed: api_version is {version!r}, a range without an end, which would fit an API that "
        "nobody knows yet; write api_version = '>=1.1,<2', once it fits docs/plugins.md."
    )


@pytest.mark.parametrize("version", [1, ">=1,<2", ">=1.1,<2", "~=1.0", "==1.*", ">=1,<9,!=2.3"])
def test_ranges_that_this_api_is_in(version: Any) -> None:
    assert active(extra=(toy(api_version=version),)).names == ["toy"]


@pytest.mark.parametrize("version", [0, 2, ">=1.2,<2", ">=2,<3", "<1.1", "==1.0"])
def test_one_of_another_api_is_refused_also_as_a_class(version: Any) -> None:
    message = refusal(extra=(toy(api_version=version),))
    assert message.startswith(f"{WHO} is written for plugin API {version}, and this sft has 1.1; install versions of")


def test_a_newer_sft_refuses_the_plugins_of_today(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the declaration is for: it stays in the plugin while the core moves on."""
    active("lora")
    monkeypatch.setattr("sft.plugins.api.API_VERSION", "2.0")
    monkeypatch.setattr("sft.plugins.api._MAJOR", 2)
    assert "and this sft has 2.0" in refusal("lora")
    assert "is written for plugin API 1, and this sft has 2.0" in refusal(extra=(toy(),))
    assert "and this sft has 2.0" in refusal(extra=(toy(api_version=">=1.1,<2"),))


def test_a_newer_minor_version_takes_the_plugins_of_today(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sft.plugins.api.API_VERSION", "1.9")
    assert active("lora", extra=(toy(), type("Two", (toy(api_version=">=1.1,<2"),), {"name": "two"}))).names


# --- what goes ----------------------------------------------------------------------------------------------


class Publishing(sft.Plugin):
    """Publishes a hook that goes."""

    name = "base"
    api_version = 1

    class hookspecs:  # noqa: N801
        @sft.hookspec(warn_on_impl=sft.SftDeprecationWarning("base_old goes with base 2; implement base_new."))
        def base_old(self) -> None:
            """Not for long."""


def test_a_hook_that_goes_warns_once_with_the_name_of_who_implements_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sft.plugins.api._WARNED", set())
    late = toy(base_old=sft.hookimpl(lambda self: None))
    with pytest.warns(sft.SftDeprecationWarning) as warned:
        active(extra=(Publishing, late))
    assert [str(one.message) for one in warned] == [f"{WHO}: base_old goes with base 2; implement base_new."]
    active(extra=(Publishing, late))  # such a warning would be an error here


def test_in_our_tests_such_a_warning_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sft.plugins.api._WARNED", set())
    with pytest.raises(sft.SftDeprecationWarning, match="base_old goes"):
        active(extra=(Publishing, toy(base_old=sft.hookimpl(lambda self: None))))


@pytest.mark.slow
def test_the_command_line_says_it_in_a_note(distribute: Distribute, sft_command: Callable[..., Any]) -> None:
    source = """
        import sft

        class Base(sft.Plugin):
            name = "base"
            api_version = 1

            class hookspecs:
                @sft.hookspec(warn_on_impl=sft.SftDeprecationWarning("base_old goes; implement base_new."))
                def base_old(self):
                    pass

        class Late(sft.Plugin):
            name = "late"
            api_version = 1

            @sft.hookimpl
            def base_old(self):
                pass
    """
    distribute("sft-test-late", source, {"base": "Base", "late": "Late"})
    done = sft_command("run", "--plugin", "base,late")
    assert done.stderr.splitlines()[0] == "note: Plugin late (sft-test-late 1.0): base_old goes; implement base_new."


def test_a_plugin_of_others_does_not_declare_it() -> None:
    source = import_plugin("lora")
    derived = type("Derived", (source,), {"name": "derived"})
    assert "does not say for which plugin API it is written" in refusal(extra=(derived,))
    assert active(extra=(type("Derived", (source,), {"name": "derived", "api_version": 1}),)).names == ["derived"]


def test_a_base_of_the_authors_own_may_declare_it() -> None:
    assert active(extra=(type("Two", (toy(),), {"name": "two"}),)).names == ["two"]


# --- names --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("members", [{}, {"name": None}, {"name": 3}, {"name": " "}])
def test_a_class_without_a_name(members: dict[str, Any]) -> None:
    nameless = type("Nameless", (sft.Plugin,), {"api_version": 1, **members})
    assert refusal(extra=(nameless,)) == (
        "Plugin class Nameless has no name; set name to the text that it is to be requested by."
    )


def test_an_instance_is_no_plugin_class() -> None:
    message = refusal(extra=(toy()(None),))
    assert message.startswith("plugins: expected plugin classes, got <")
    assert message.endswith("; give the class, not an instance.")


def test_two_classes_of_one_name_are_not_one() -> None:
    other = type("Other", (sft.Plugin,), {"name": "Toy", "api_version": 1})
    assert refusal(extra=(toy(), other)) == (
        "Plugin toy is given directly as Toy and as Other; leave one out, or rename it."
    )
    same = toy()
    assert active(extra=(same, same)).names == ["toy"]


@pytest.mark.parametrize("source", ["class Own(sft.Plugin):\n    name = 'toy'\n    api_version = 1\n", "1 / 0"])
def test_a_class_that_takes_the_place_of_an_installed_plugin_is_told(
    distribute: Distribute, train: Callable[..., sft.Summary], source: str
) -> None:
    distribute("sft-test-toy", f"import sft\n{source}", {"toy": "Own"})
    told = "note: plugin toy is given directly as Toy, not that of sft-test-toy 1.0"
    said: list[str] = []
    train("out", (toy(),), plugin=["toy"], max_steps=1, do_eval=False, say=said.append)
    assert said.count(told) == 1
    train("other", (toy(),), max_steps=1, do_eval=False, say=said.append)  # nobody asks for the installed one
    if source != "1 / 0":  # here it is the installed one
        train("same", (import_plugin("toy"),), plugin=["toy"], max_steps=1, do_eval=False, say=said.append)
    assert said.count(told) == 1


# --- relations to others ------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["requires", "conflicts", "supersedes"])
@pytest.mark.parametrize("value", [3, None, "lora", ["b", 3], [None], {"lora": 1}])
def test_relations_are_tuples_of_names(distribute: Distribute, key: str, value: Any) -> None:
    wrong = f"is not well formed: {key} is {value!r}, not a tuple of names; upgrade it."
    assert refusal(extra=(toy(**{key: value}),)) == f"{WHO} {wrong}"
    source = f"import sft\nclass Own(sft.Plugin):\n    name = 'own'\n    api_version = 1\n    {key} = {value!r}\n"
    distribute("sft-test-own", source, {"own": "Own"})
    assert refusal("own") == f"Plugin own (sft-test-own 1.0) {wrong}"


@pytest.mark.parametrize("order", ["x", None, True])
def test_order_is_a_number(order: Any) -> None:
    assert refusal(extra=(toy(order=order),)) == (
        f"{WHO} is not well formed: order is {order!r}, not a number; upgrade it."
    )


# --- hooks without a mark -----------------------------------------------------------------------------------


def unmarked(*args: Any) -> None: ...


def test_a_hook_without_its_mark() -> None:
    assert refusal(extra=(toy(sft_step_ended=unmarked),)) == (
        f"{WHO} has sft_step_ended without @sft.hookimpl, so it is never called; put that above it."
    )


def test_a_misspelt_hook_without_its_mark() -> None:
    message = refusal(extra=(toy(sft_step_end=unmarked),))
    assert message.startswith(f"{WHO} has sft_step_end, and a name that begins with sft_ is that of a hook")
    assert message.endswith("; did you mean sft_step_ended?")
    assert refusal(extra=(toy(sft_helper=unmarked),)).endswith("; give it another name.")


def test_a_published_hook_without_its_mark() -> None:
    assert "has base_factor without @sft.hookimpl" in refusal(extra=(Publisher, toy(base_factor=unmarked)))
    assert "did you mean base_factor?" in refusal(extra=(Publisher, toy(base_facter=sft.hookimpl(lambda self: None))))
    # Without the plugin that publishes it, it is a method like any other.
    assert active(extra=(toy(base_factor=unmarked),)).names == ["toy"]


def test_a_function_of_a_module_without_its_mark() -> None:
    module = types.ModuleType("Toy")
    vars(module).update(name="toy", api_version=1, sft_check=unmarked, sft_folder=types.ModuleType("sft_folder"))
    assert "has sft_check without @sft.hookimpl" in refusal(extra=(module,))
