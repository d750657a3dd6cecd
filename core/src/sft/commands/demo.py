"""``sft demo``: the main job on the model and data that the package carries."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import click

from sft.commands.run import report

FOLDER = Path(__file__).parent.parent / "demo"
DEFAULT = "sft-demo"


@click.command(name="demo")
@click.option("--output_dir", "--output-dir", default=DEFAULT, show_default=True, help="Where the run is written.")
def command(output_dir: str) -> None:
    """Fine-tune the tiny embedded model in under a minute, and show its answers before and after."""
    from sft.fine_tune import run

    settings = demo_settings(output_dir)
    click.echo(f"$ {command_line(settings)}\n")
    summary = run(settings)
    click.echo(f"\ntrain loss by step\n{curve(losses(Path(output_dir) / 'metrics.jsonl'))}")
    report(summary)
    click.echo(
        f"\nnext: sft generate --model_name_or_path {settings['model_name_or_path']} --lora_path {output_dir} "
        '--prompt "type#dress*color#green*style#elegant"'
    )


def demo_settings(output_dir: str) -> dict[str, Any]:
    """The demo's settings; they stand in the package, as a user's would in a file."""
    settings: dict[str, Any] = json.loads((FOLDER / "settings.json").read_text(encoding="utf-8"))
    settings["model_name_or_path"] = str(FOLDER / "model")
    settings["dataset_name_or_path"] = str(FOLDER / "data")
    settings["output_dir"] = output_dir
    # The default folder is the demo's own, so that the demo can be run again.
    settings["overwrite_output_dir"] = output_dir == DEFAULT
    return settings


def command_line(settings: dict[str, Any]) -> str:
    """What a user would type for the same run."""
    plugins = " ".join(f"--plugin {name}" for name in settings["plugin"])
    rest = " ".join(f"--{name} {value}" for name, value in settings.items() if name != "plugin" and value is not False)
    return f"sft run {plugins} {rest}"


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
