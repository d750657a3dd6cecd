"""Settings: PaddleNLP's names and defaults, files, the command line's merge, and names that nobody declares."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, make_dataclass
from pathlib import Path
from typing import Any

import pytest

import sft
from sft import hookspecs
from sft.commands.typed import collect
from sft.plugins.registry import Plugins
from sft.plugins.requests import choose_plugins
from sft.settings.arguments import Settings, core_options
from sft.settings.reading import build, normalise, read_file

# What the section "精调参数介绍" of PaddleNLP's llm/docs/finetune.md gives as defaults of the names that sft has.
# do_eval is not among them: unset means "when there is dev data" here (docs/decisions/0002-settings.md).
DOCUMENTED = {
    "model_name_or_path": None,
    "dataset_name_or_path": None,
    "src_length": 1024,
    "max_length": 2048,
    "top_k": 1,
    "top_p": 1.0,
    "output_dir": None,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "per_device_eval_batch_size": 8,
    "num_train_epochs": 3,
    "learning_rate": 5e-5,
    "warmup_steps": 0,
    "logging_steps": 500,
    "evaluation_strategy": "no",
    "save_strategy": "no",
    "disable_tqdm": False,
    "save_total_limit": None,
}
# Names that only the class reference (paddlenlp.trainer.TrainingArguments) has.
OF_THE_TRAINER = {
    "overwrite_output_dir": False,
    "max_steps": -1,
    "lr_scheduler_type": "linear",
    "warmup_ratio": 0.0,
    "weight_decay": 0.0,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_epsilon": 1e-8,
    "max_grad_norm": 1.0,
    "eval_steps": None,
    "save_steps": 500,
    "resume_from_checkpoint": None,
    "seed": 42,
}


@dataclass
class FirstOptions:
    first_rank: int = sft.option(8, "a rank", minimum=1)


class First(sft.Plugin):
    name = "first"
    api_version = 1
    Options = FirstOptions


class Twin(sft.Plugin):
    name = "twin"
    api_version = 1
    Options = FirstOptions


def built(values: dict[str, Any], *plugins: type) -> Settings:
    return build(values, Plugins.load([], hookspecs, plugins))


@pytest.mark.parametrize(("name", "default"), sorted({**DOCUMENTED, **OF_THE_TRAINER}.items()))
def test_defaults_are_paddlenlps(name: str, default: Any) -> None:
    assert core_options()[name].default == default
    assert built({}).flat()[name] == default


def test_every_setting_has_one_line_of_help() -> None:
    for option in core_options().values():
        assert option.help, option.name
        assert "\n" not in option.help, option.name
        assert not option.help.endswith("."), option.name


def test_values_reach_their_group() -> None:
    settings = built(
        {"src_length": "16", "learning_rate": "3e-4", "seed": 7, "top_p": 0.5, "model_name_or_path": "m"}, First
    )
    assert settings.data.src_length == 16
    assert settings.training.learning_rate == 3e-4
    assert settings.training.seed == 7
    assert settings.generation.top_p == 0.5
    assert settings.model.model_name_or_path == "m"
    assert settings.options["first"] == FirstOptions(8)
    assert settings.plugin == ("first",)


def test_a_tilde_in_output_dir_is_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/somewhere")
    run = sft.Run(built({"output_dir": "~/runs/one"}), Plugins.load([], hookspecs), print)
    assert run.output_dir == Path("/somewhere/runs/one")


def test_flat_settings_can_be_given_again() -> None:
    settings = built({"first_rank": "3", "max_steps": "5", "eval_steps": 2}, First)
    flat = settings.flat()
    assert flat["plugin"] == ["first"]
    assert flat["first_rank"] == 3
    names, left = choose_plugins({**flat, "plugin": []}, core_options())
    assert names == []
    assert built(json.loads(json.dumps(left)), First) == settings


# --- names --------------------------------------------------------------------------------------------------


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


# --- files --------------------------------------------------------------------------------------------------


def written(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("s.json", '{"learning_rate": 3e-4, "plugin": ["first"], "eval_steps": null, "do_eval": true}'),
        ("s.yaml", "learning_rate: 3e-4\nplugin: [first]\neval_steps:\ndo_eval: true\n"),
        ("s.yml", "learning_rate: 0.0003\nplugin:\n  - first\neval_steps: null\ndo_eval: yes\n"),
        ("s.toml", 'learning_rate = 3e-4\nplugin = ["first"]\ndo_eval = true\n'),
    ],
)
def test_json_yaml_and_toml_mean_the_same(tmp_path: Path, name: str, text: str) -> None:
    values = read_file(written(tmp_path, name, text))
    assert values.pop("plugin") == ["first"]
    settings = built(values)
    # YAML 1.1 reads 3e-4, which has no dot, as text.
    assert settings.training.learning_rate == 3e-4
    assert settings.training.eval_steps is None
    assert settings.training.do_eval is True


def test_files_are_utf8(tmp_path: Path) -> None:
    assert read_file(written(tmp_path, "s.json", '{"output_dir": "输出"}')) == {"output_dir": "输出"}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("s.json", '{"seed": 1,}', "is not valid JSON ("),
        ("s.json", "", "is not valid JSON ("),
        ("s.json", '["seed"]', "must hold one object of names and values."),
        ("s.yaml", "seed: [1\nmax_steps: 2\n", "is not valid YAML ("),
        ("s.yaml", "seed: 1\n\tmax_steps: 2\n", "is not valid YAML ("),
        ("s.yaml", "", "must hold one object of names and values."),
        ("s.yaml", "just text", "must hold one object of names and values."),
        ("s.toml", "seed = [1\n", "is not valid TOML ("),
        ("s.toml", "seed = 1\nseed = 2\n", "is not valid TOML ("),
        ("s.ini", "seed = 1", "is none of .yaml, .json and .toml; rename it after what it holds."),
    ],
)
def test_a_broken_file_is_one_sentence_with_its_path(tmp_path: Path, name: str, text: str, message: str) -> None:
    path = written(tmp_path, name, text)
    with pytest.raises(sft.UsageError) as caught:
        read_file(path)
    assert str(caught.value).startswith(f"Settings file {path} {message}")
    assert "\n" not in str(caught.value)


def test_a_table_of_toml_is_what_stands_before_a_dot(tmp_path: Path) -> None:
    """So is a name with a dot in it; a list of tables is a list of objects."""
    text = 'twin.first_rank = 2\n[[dataset_name_or_path]]\npath = "a.json"\nweight = 0.5\n[first]\nfirst_rank = 4\n'
    values = read_file(written(tmp_path, "s.toml", text))
    assert values.pop("dataset_name_or_path") == [{"path": "a.json", "weight": 0.5}]
    assert values == {"twin.first_rank": 2, "first.first_rank": 4}
    assert built(values, First, Twin).options == {"first": FirstOptions(4), "twin": FirstOptions(2)}
    with pytest.raises(sft.UsageError, match=r"^Setting first\.first_rank is given twice; keep one of them\.$"):
        read_file(written(tmp_path, "twice.toml", '"first.first_rank" = 1\n[first]\nfirst_rank = 2\n'))


@pytest.mark.parametrize("text", ['{"seed": 1,\n "max_steps": }', "seed: 1\nmax_steps: ]\n"])
def test_a_broken_file_names_the_line(tmp_path: Path, text: str) -> None:
    path = written(tmp_path, "s.json" if text.startswith("{") else "s.yaml", text)
    with pytest.raises(sft.UsageError, match=r"line 2\b"):
        read_file(path)


def test_a_file_that_is_not_there_or_not_text(tmp_path: Path) -> None:
    (tmp_path / "latin.json").write_bytes('{"output_dir": "é"}'.encode("latin-1"))
    (tmp_path / "folder.json").mkdir()
    for name in ("missing.json", "latin.json", "folder.json"):
        with pytest.raises(sft.UsageError) as caught:
            read_file(tmp_path / name)
        assert str(caught.value).startswith(f"Settings file {tmp_path / name} ")


# --- the command line ---------------------------------------------------------------------------------------


def test_the_command_line_overrides_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, "s.json", '{"max-steps": 5, "seed": 1, "plugin": "a,b"}')
    values = collect([str(path), "--max_steps", "7", "--plugin", "c"])
    assert values == {"max_steps": "7", "seed": 1, "plugin": ["a", "b", "c"]}


def test_the_file_may_come_after_settings(tmp_path: Path) -> None:
    path = written(tmp_path, "s.json", '{"seed": 1}')
    assert collect(["--max_steps", "7", str(path)]) == {"seed": 1, "max_steps": "7"}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--learning-rate", "1e-4"], {"learning_rate": "1e-4"}),
        (["--learning_rate=1e-4"], {"learning_rate": "1e-4"}),
        (["--output_dir=a=b"], {"output_dir": "a=b"}),
        (["--max_steps", "-1"], {"max_steps": "-1"}),
        (["--disable_tqdm"], {"disable_tqdm": "true"}),
        (["--disable_tqdm", "--seed", "1"], {"disable_tqdm": "true", "seed": "1"}),
        (["--seed", "1", "--seed", "2"], {"seed": "2"}),
        (["--eval_steps="], {"eval_steps": ""}),
        (["--plugin", "a,b", "--plugin", "no:c"], {"plugin": ["a", "b", "no:c"]}),
        ([], {}),
    ],
)
def test_arguments(arguments: list[str], expected: dict[str, Any]) -> None:
    assert collect(arguments) == expected


def test_a_second_positional_argument_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, "s.json", "{}")
    with pytest.raises(sft.UsageError, match=r"^Unexpected 'extra'; settings are given as --name value\.$"):
        collect([str(path), "extra"])
