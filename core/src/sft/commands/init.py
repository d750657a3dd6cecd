"""``sft init``: a few questions, and a settings file with comments."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from sft.commands.completing import complete_path
from sft.commands.settings_file import commented, entry
from sft.commands.shared import path_of, print_line, say
from sft.dataset_names import named_sets, scheme_of
from sft.errors import UsageError
from sft.foreign_text import shown
from sft.hub_names import is_hub_name
from sft.kit.about import About, all_plugins
from sft.options import Option, convert
from sft.settings.arguments import core_options

DEFAULT = "sft.yaml"
NONE = "none"
ADAPTER_RATE = 3e-4
"""The learning rate that is proposed where an adapter trains, which takes larger ones than a whole model does."""
WRITTEN = {"logging_steps": 10, "save_strategy": "epoch", "save_total_limit": 2}
"""Settings that are written without a question, since most runs want them."""
OFTEN = (
    *("resume_from_checkpoint", "bf16", "recompute", "gradient_accumulation_steps", "evaluation_strategy"),
    *("dev_split", "num_samples", "lr_scheduler_type", "warmup_ratio", "seed"),
)
"""Settings that are written with their defaults, commented out."""


@click.command(name="init")
@click.argument("file", default=DEFAULT, callback=path_of, shell_complete=complete_path)
def command(file: str) -> None:
    """Ask a few questions and write FILE (by default sft.yaml), a settings file with comments for `sft run FILE`.

    An empty answer takes what stands in brackets. Answers may come from a pipe, one a line. Nothing is written before
    the last answer.
    """
    target = Path(file).expanduser()
    _check(target)
    adapters = [row for row in all_plugins(shapes=False) if "adapter" in row.kinds and not row.fault]
    text = file_text(file, *_asked(adapters))
    try:
        with target.open("x", encoding="utf-8") as stream:
            stream.write(text)
    except FileExistsError:
        _check(target)
        raise
    print_line(f"written to {target}")
    print_line(f"next: sft data {target} shows what the model will see, sft run {target} trains it")


def _check(target: Path) -> None:
    if target.suffix not in (".yaml", ".yml"):
        raise UsageError(f"{shown(target)}: what is written is YAML with comments; give a name that ends in .yaml.")
    if target.exists():
        raise UsageError(f"{shown(target)} already exists; give another name (sft init FILE), or remove it.")
    if not target.parent.is_dir():
        raise UsageError(f"{shown(target)} is in no folder that is there; make it, or give another name.")


def _asked(adapters: Sequence[About]) -> tuple[dict[str, Any], About | None]:
    """The settings that the user gives, and the adapter."""
    declared = core_options()
    try:
        model = _ask("Model (a directory or a hub name)", declared["model_name_or_path"])
        if not Path(model).expanduser().exists() and not is_hub_name(model):
            _note(f"{model} is not there yet")
        data = _ask("Data (a directory with train.json, or a file)", declared["dataset_name_or_path"])
        for one in named_sets(data):
            if not Path(one.path).expanduser().exists() and scheme_of(one.path) is None:
                _note(f"{one.path} is not there yet")
        adapter = _ask_adapter(adapters)
        rate = ADAPTER_RATE if adapter is not None else declared["learning_rate"].default
        values = {
            "model_name_or_path": model,
            "dataset_name_or_path": data,
            "max_length": _ask("Longest record, tokens", declared["max_length"]),
            "per_device_train_batch_size": _ask("Rows in a micro-batch", declared["per_device_train_batch_size"]),
            "num_train_epochs": _ask("Passes over the data", declared["num_train_epochs"]),
            "learning_rate": _ask("Peak learning rate", declared["learning_rate"], rate),
            "output_dir": _ask("Where the run is written", declared["output_dir"], "out"),
        }
    except click.Abort as error:
        click.echo(err=True)  # behind the question
        if isinstance(error.__context__, EOFError):
            raise UsageError(
                "The input ended before the last question was answered; nothing has been written."
            ) from error
        raise
    return values, adapter


def _ask_adapter(adapters: Sequence[About]) -> About | None:
    """Which adapter trains, if any is installed; None: all parameters do."""
    if not adapters:
        return None
    by_name = {row.name: row for row in adapters}
    for row in adapters:
        say(f"  {row.name}: {row.summary}")
    click.echo(f"  {NONE}: All parameters train.", err=True)
    words = Option("adapter", str, adapters[0].name, choices=(*by_name, NONE))
    return by_name.get(_ask("Adapter", words))


def _ask(question: str, option: Option, default: Any = None) -> Any:
    """The answer, checked as the setting is; a person who answers wrongly is asked again."""

    def checked(answer: Any) -> Any:
        try:
            return convert(option, answer)
        except UsageError as error:
            if not sys.stdin.isatty():
                raise
            raise click.UsageError(str(error)) from error

    default = option.default if default is None else default
    return click.prompt(question, default=default, value_proc=checked, err=True)


def _note(text: str) -> None:
    click.echo(f"note: {shown(text)}", err=True)


def file_text(name: str, values: dict[str, Any], adapter: About | None) -> str:
    """The settings file ``name`` with these settings, and the adapter among its plugins."""
    declared = core_options()
    lines = [
        "# A run of sft. Each line is a setting, and what is typed behind the file counts more:",
        f"#   sft run {shown(name)} --learning_rate 1e-4",
        "# `sft run --help` lists all settings, and with --plugin NAME those of a plugin.",
        "",
        "# Plugins: `sft plugins` lists them. Without an adapter all parameters train.",
        entry("plugin", [] if adapter is None else [adapter.name]),
    ]
    for setting, value in {**values, **WRITTEN}.items():
        lines += ["", f"# {declared[setting].help}", entry(setting, value)]
    lines += ["", "# Often set, too; without the # they count.", *(_default(declared[setting]) for setting in OFTEN)]
    if adapter is not None and adapter.options:
        lines += ["", f"# Settings of plugin {adapter.name}", *map(_default, adapter.options)]
    return "\n".join(lines) + "\n"


def _default(option: Option) -> str:
    return f"{commented(entry(option.name, option.default))}  # {option.help}"
