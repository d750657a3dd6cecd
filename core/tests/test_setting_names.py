"""Names of settings: how they are spelled, those that nobody declares, and those that two plugins have."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, make_dataclass

import pytest
from toy_settings import First, Twin, built

import sft
from sft.settings.reading import normalise


def test_dashes_are_underscores() -> None:
    assert normalise({"learning-rate": 1, "max_steps": 2}) == {"learning_rate": 1, "max_steps": 2}


def test_a_name_written_in_both_ways_is_given_twice() -> None:
    with pytest.raises(sft.UsageError, match=r"^Setting max_steps is given twice; keep one of them\.$"):
        normalise({"max-steps": 1, "max_steps": 2})


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("learning_rat", "learning_rate"),
        ("max_lenght", "max_length"),
        ("save_step", "save_steps"),
        ("frist_rank", "first_rank"),
    ],
)
def test_an_unknown_name_gets_a_suggestion(wrong: str, right: str) -> None:
    with pytest.raises(sft.UsageError, match=f"^Unknown setting {wrong}; did you mean {right}\\?$"):
        built({wrong: 1}, First)


def test_an_unknown_name_without_a_neighbour_says_where_the_names_are() -> None:
    with pytest.raises(sft.UsageError, match=r"^Unknown setting zzz; `sft run --help` lists the settings"):
        built({"zzz": 1})


def test_a_setting_of_an_inactive_plugin_names_the_plugin(distribute: Callable[..., None]) -> None:
    distribute("sft-test-blur", "raise RuntimeError('imported')", {"blur-image": "Blur"})
    with pytest.raises(sft.UsageError, match=r"^Unknown setting blur_width; .* add --plugin blur-image\.$"):
        built({"blur_width": 1})


def test_a_switch_is_suggested_by_its_own_name(distribute: Callable[..., None]) -> None:
    distribute("sft-test-blur", "raise RuntimeError('imported')", {"blur-image": "Blur"})
    with pytest.raises(sft.UsageError, match=r"^Unknown setting blur_imge; did you mean blur_image\?$"):
        built({"blur_imge": "true"})


TRACKERS = """
    from dataclasses import dataclass
    import sft

    @dataclass
    class {name}Options:
        {setting}: str | None = sft.option(None, "a place")

    class {name}(sft.Plugin):
        name = "tracker-{plugin}"
        api_version = 1
        Options = {name}Options
"""


def test_a_setting_of_one_of_two_twins_is_not_blamed_on_the_other(distribute: Callable[..., None]) -> None:
    for name, setting in (("Csv", "tracker_csv_path"), ("Sqlite", "tracker_path")):
        source = TRACKERS.format(name=name, plugin=name.lower(), setting=setting)
        distribute(f"sft-test-{name.lower()}", source, {f"tracker-{name.lower()}": name})
    for setting, owner in (("tracker_path", "tracker-sqlite"), ("tracker_csv_path", "tracker-csv")):
        with pytest.raises(sft.UsageError) as caught:
            built({setting: 1})
        assert str(caught.value) == (
            f"Unknown setting {setting}; if it belongs to plugin {owner}, add --plugin {owner}."
        )
    with pytest.raises(sft.UsageError, match=r"belongs to plugin tracker-csv or tracker-sqlite, add --plugin NAME\.$"):
        built({"tracker_color": 1})


def test_the_unknown_name_is_reported_before_wrong_values() -> None:
    with pytest.raises(sft.UsageError, match="learning_rat;"):
        built({"learning_rate": "fast", "learning_rat": 1})


def test_a_setting_that_two_plugins_have_is_given_by_its_long_name() -> None:
    settings = built({"first.first_rank": "3", "twin.first_rank": 4}, First, Twin)
    assert (settings.options["first"].first_rank, settings.options["twin"].first_rank) == (3, 4)
    flat = settings.flat()
    assert (flat["first.first_rank"], flat["twin.first_rank"]) == (3, 4)
    assert "first_rank" not in flat
    assert settings.given == {"first.first_rank", "twin.first_rank"}
    del flat["plugin"]
    assert built(flat, First, Twin).options == settings.options
    with pytest.raises(sft.UsageError) as caught:
        built({"first_rank": 3}, First, Twin)
    assert str(caught.value) == (
        "Setting first_rank is one of plugin first and of plugin twin; give --first.first_rank or --twin.first_rank."
    )


def test_a_long_name_is_there_where_the_short_one_does_too() -> None:
    settings = built({"first.first_rank": "3"}, First)
    assert settings.options["first"].first_rank == 3
    assert settings.flat()["first_rank"] == 3
    with pytest.raises(
        sft.UsageError, match=r"^first\.first_rank and first_rank are one setting, which is given twice"
    ):
        built({"first.first_rank": 3, "first_rank": 3}, First)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("first.first_rnk", "Unknown setting first.first_rnk; did you mean first.first_rank?"),
        ("frist.first_rank", "Unknown setting frist.first_rank; did you mean first.first_rank?"),
        ("first.nothing_like_it", "Unknown setting first.nothing_like_it; `sft run --help` lists"),
        ("training.seed", "Unknown setting training.seed; `sft run --help` lists"),
    ],
)
def test_a_long_name_that_nobody_has(name: str, said: str) -> None:
    with pytest.raises(sft.UsageError) as caught:
        built({name: 1}, First, Twin)
    assert str(caught.value).startswith(said)


def test_a_long_name_of_a_plugin_that_is_not_asked_for(distribute: Callable[..., None]) -> None:
    distribute("sft-test-saw", "1 / 0", {"big-saw": "Saw"})
    with pytest.raises(sft.UsageError) as caught:
        built({"big_saw.teeth": 1})
    assert str(caught.value) == (
        "Unknown setting big_saw.teeth; if it belongs to plugin big-saw, add --plugin big-saw."
    )


def test_a_setting_of_the_core_cannot_be_declared_again() -> None:
    @dataclass
    class Options:
        seed: int = sft.option(1, "another seed")

    with pytest.raises(sft.UsageError, match=r"^Setting seed is declared by both the core and plugin twin "):
        built({}, type("Other", (sft.Plugin,), {"name": "twin", "api_version": 1, "Options": Options}))


def aliased(plugin: str, setting: str, *aliases: str) -> type:
    options = make_dataclass("Options", [(setting, int, sft.option(1, "a number", aliases=aliases))])
    return type("Toy", (sft.Plugin,), {"name": plugin, "api_version": 1, "Options": options})


def test_an_alias_cannot_take_a_setting_from_its_owner() -> None:
    thief = aliased("thief", "thief_rate", "learning_rate")
    with pytest.raises(sft.UsageError) as caught:
        built({"learning_rate": "3e-4"}, thief)
    assert str(caught.value) == (
        "Setting learning_rate is declared by both the core and plugin thief (given directly as Toy); leave thief out."
    )
    for name, one, other in (
        ("shared", aliased("one", "a_rate", "shared"), aliased("two", "b_rate", "shared")),
        ("b_rate", aliased("one", "a_rate", "b_rate"), aliased("two", "b_rate")),
        ("b_rate", aliased("one", "b_rate"), aliased("two", "a_rate", "b_rate")),
    ):
        with pytest.raises(sft.UsageError, match=rf"^Setting {name} is one of plugin one and of plugin two; give"):
            built({name: 1}, one, other)
        settings = built({f"one.{name}": 5, f"two.{name}": 6}, one, other)
        assert [list(vars(settings.options[owner]).values()) for owner in ("one", "two")] == [[5], [6]]
        flat = settings.flat()
        assert settings.given <= {*flat}
        del flat["plugin"]
        assert built(flat, one, other).options == settings.options


def test_an_option_is_no_switch_of_a_plugin(distribute: Callable[..., None]) -> None:
    """What a switch is given is a request, which nobody hands on."""
    distribute("sft-test-saw", "1 / 0", {"big-saw": "Saw"}, {"setting.use_saw": "Saw"})
    for name, owner in (("one", "one"), ("big_saw", "big-saw"), ("use_saw", "big-saw")):
        for plugin in (aliased("one", "a_rate", name), aliased("one", name)):
            with pytest.raises(sft.UsageError) as caught:
                built({}, plugin)
            assert str(caught.value) == (
                f"Plugin one (given directly as Toy) has an option {name}, which is the switch of plugin {owner}, so "
                "it would never get a value; upgrade it."
            )
