"""Settings: PaddleNLP's names and defaults, files, and the command line's merge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from toy_settings import First, FirstOptions, Twin, built

import sft
from sft import hookspecs
from sft.commands.typed import collect
from sft.plugins.registry import Plugins
from sft.plugins.requests import choose_plugins
from sft.settings.arguments import core_options
from sft.settings.files import read_file

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


INDENTED = "begin each setting at the start of its line"
FAULTS = [
    ("seed: 1\n  max_steps: 2\n", "line 2 is indented", INDENTED),
    ("seed: 1\n\tmax_steps: 2\n", "line 2 is indented", INDENTED),
    ("  seed: 1\nmax_steps: 2\n", "line 1 is indented", INDENTED),
    ("plugin:\n  - a\n - b\n", "line 3 is indented otherwise than those above it", "align them"),
    ("run_name: 'it's'\n", "line 1 goes on after its value has ended", "put all of it in quotes that it does not hold"),
    ("seed: 1\n- a\n", "line 2 is not of the form of those above it", "write name: value"),
    ("run_name: |\n  a: b\nhub: a: b\n", "line 3 has a second ': '", "put text that holds one in quotes"),
    ("run_name: >\n  a: b\nseed: @\n", "line 3: found character '@' that cannot start any token", "correct it there"),
    ("seed: 1\nrun_name: a: b\n", "line 2 has a second ': '", "put text that holds one in quotes"),
    ("seed: 1\nmax_steps:2\nlazy: true\n", "line 2 has no ': '", "write name: value"),
    ("plugin: [a\nseed: 1\n", "line 1: a bracket that is not closed, or no comma within", "correct it there"),
    ('seed: 1\nrun_name: "a\n', "line 2: a quotation mark that is not closed", "correct it there"),
    ("seed: 1\nrun_name: 2024-13-45\n", "line 2: month must be in 1..12", "correct it there"),
    ("seed: 1\n\0", "line 2: a character that a text file cannot have, U+0000", "correct it there"),
    ("seed: 1\n---\nseed: 2\n", "line 2 begins another document", "keep one of them"),
    ("seed: 1\nmax_steps: ]\n", "line 2: expected the node content, but found ']'", "correct it there"),
]


@pytest.mark.parametrize(("text", "fault", "cure"), FAULTS, ids=[fault for _, fault, _ in FAULTS])
def test_what_is_wrong_with_yaml_is_said_plainly(tmp_path: Path, text: str, fault: str, cure: str) -> None:
    """The library's own sentences show where, and neither what to do nor the line of an indented setting."""
    path = written(tmp_path, "s.yaml", text)
    with pytest.raises(sft.UsageError) as caught:
        read_file(path)
    assert str(caught.value) == f"Settings file {path} is not valid YAML ({fault}); {cure}."


def test_a_switch_beside_its_table_is_told_what_to_write(tmp_path: Path) -> None:
    for table in ("[first]\nfirst_rank = 4", "first.first_rank = 4", '["first"]\nfirst_rank = 4'):
        path = written(tmp_path, "s.toml", f"seed = 1\nfirst = true\n{table}\n")
        with pytest.raises(sft.UsageError) as caught:
            read_file(path)
        assert str(caught.value) == (
            f"Settings file {path} is not valid TOML (line 2 gives first a value, and line 3 makes a table of it); to "
            'switch a plugin on beside its table, write plugin = ["first"] in place of line 2.'
        )
    values = read_file(written(tmp_path, "s.toml", 'seed = 1\nplugin = ["first"]\n[first]\nfirst_rank = 4\n'))
    assert values == {"seed": 1, "plugin": ["first"], "first.first_rank": 4}


def test_a_broken_file_names_the_line(tmp_path: Path) -> None:
    with pytest.raises(sft.UsageError, match=r"line 2\b"):
        read_file(written(tmp_path, "s.json", '{"seed": 1,\n "max_steps": }'))


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
