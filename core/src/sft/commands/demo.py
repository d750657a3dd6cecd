"""``sft demo``: the main job on the model and data that the package carries."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from sft.commands.completing import complete_plugin
from sft.commands.shared import PLUGIN, print_line
from sft.commands.summary import tell_summary
from sft.errors import UsageError
from sft.plugins.discovery import import_plugin, with_refined
from sft.plugins.requests import by_name, requests
from sft.progress import Progress
from sft.voice import Printer

FOLDER = Path(__file__).parent.parent / "demo"
DEFAULT = "sft-demo"


@click.command(name="demo")
@click.option("--output_dir", "--output-dir", default=DEFAULT, show_default=True, help="Where the run is written.")
@click.option(
    *PLUGIN,
    multiple=True,
    shell_complete=complete_plugin,
    help="A plugin that has a demo, where several have one; no:NAME leaves one out.",
)
def command(output_dir: str, plugins: tuple[str, ...]) -> None:
    """Fine-tune the tiny embedded model in a minute or two, and show its answers before and after.

    A plugin that is installed may bring its own settings for it; without one, all parameters train.
    """
    from sft.fine_tune import run

    settings = demo_settings(output_dir, plugins)
    print_line(f"$ {command_line(settings)}")
    print_line("")
    summary = run(settings)
    click.echo(f"\ntrain loss by step\n{curve(losses(Path(output_dir) / 'metrics.jsonl'))}")
    tell_summary(summary, Progress(Printer("stdout")))
    is_adapter = (Path(output_dir) / "adapter_config.json").is_file()
    model = f"{settings['model_name_or_path']} --adapter_path {output_dir}" if is_adapter else output_dir
    print_line("")
    print_line(f'next: sft generate --model_name_or_path {model} --prompt "type#dress*color#green*style#elegant"')


def demo_settings(output_dir: str, plugins: Sequence[str] = ()) -> dict[str, Any]:
    """The demo's settings: they stand in the package, as a user's would in a file, and an installed plugin that claims
    the command ``demo`` adds its own (:attr:`sft.Plugin.demo`). ``plugins`` choose among several."""
    settings: dict[str, Any] = {"plugin": []}
    settings |= json.loads((FOLDER / "settings.json").read_text(encoding="utf-8"))
    name = _shown(plugins)
    if name is not None:
        settings |= {**getattr(import_plugin(name), "demo", {}), "plugin": with_refined(name)}
    settings["model_name_or_path"] = str(FOLDER / "model")
    settings["dataset_name_or_path"] = str(FOLDER / "data")
    settings["output_dir"] = output_dir
    # The default folder is the demo's own, so that the demo can be run again.
    settings["overwrite_output_dir"] = output_dir == DEFAULT
    return settings


def _shown(plugins: Sequence[str]) -> str | None:
    """The plugin that the demo shows: the one that is asked for, or the first that has a demo and is not left out."""
    having = requests("command").get("demo", [])
    asked, left_out = by_name(plugins)
    for name in asked:
        if name not in having:
            raise UsageError(f"Plugin {name} has no demo; those that have one are {', '.join(having) or 'none'}.")
    if len(asked) > 1:
        raise UsageError(f"The demo shows one plugin, and {' and '.join(asked)} are asked for; leave one of them out.")
    return next((name for name in asked or having if name not in left_out), None)


def command_line(settings: dict[str, Any]) -> str:
    """What a user would type for the same run."""
    words = [f"--plugin {name}" for name in settings["plugin"]]
    words += [f"--{name} {value}" for name, value in settings.items() if name != "plugin" and value is not False]
    return " ".join(["sft run", *words])


def losses(path: Path) -> list[float]:
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def curve(values: list[float], width: int = 60, height: int = 8) -> str:
    """A loss curve in text: means over equal stretches of steps, highest at the top."""
    columns = min(width, len(values))
    edges = [round(index * len(values) / columns) for index in range(columns + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    low, high = min(means), max(means)
    span = (high - low) or 1.0
    rows = []
    for row in range(height, 0, -1):
        label = high if row == height else low if row == 1 else None
        bar = "".join("█" if (mean - low) / span * height >= row - 0.5 or row == 1 else " " for mean in means)
        rows.append(f"{'' if label is None else f'{label:.3f}':>8} ┤{bar}".rstrip())
    return "\n".join(rows)
