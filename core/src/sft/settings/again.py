"""The settings of a run as somebody would give them to have its steps, or its model, again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sft.dataset_names import named_sets, scheme_of
from sft.errors import UsageError
from sft.files import read_report
from sft.foreign_text import MASK, shown
from sft.options import options_of
from sft.plugins.discovery import import_plugin, installed
from sft.plugins.files import read_plugin_file
from sft.plugins.marks import implements
from sft.plugins.requests import by_device, requests
from sft.settings.arguments import core_options, long_name

ITS_OWN = ("output_dir", "overwrite_output_dir", "resume_from_checkpoint", "report_to", "run_name")
"""Settings that say where a run writes and is logged, or with what it begins."""


def report_of(folder: Path) -> dict[str, Any]:
    """``run.json`` of the run that ``folder`` holds. Raises :class:`UsageError` where it holds none."""
    report = read_report(folder)
    written = report.get("settings")
    if not isinstance(written, dict) or not isinstance(written.get("plugin"), list):
        what = "holds no run (no run.json with its settings)" if folder.is_dir() else "is no folder"
        raise UsageError(f"{shown(folder)} {what}; give the output_dir of a run.")
    return report


def check_data_is_there(folder: Path, written: Mapping[str, Any], moved: Mapping[str, Any]) -> None:
    """Refuse the run of ``folder`` if its data are no longer where they were, as its settings are ``written``, and say
    how to tell where they are; ``moved`` are settings by which the user has."""
    if "dataset_name_or_path" in moved:
        return
    for one in named_sets(written["dataset_name_or_path"]):
        if scheme_of(one.path) is None and not Path(one.path).expanduser().exists():
            raise UsageError(
                f"{folder} was trained on {shown(one.path)}, which is not there (a relative path is looked for from "
                "where you are); say where the data are with --dataset_name_or_path."
            )


def settings_again(
    report: Mapping[str, Any], plugins: Iterable[Any] = (), written: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The settings in ``report``, a ``run.json``, or those that were ``written`` of an earlier stretch of the run: what
    was typed, or differs from its default, and the plugins that have a part in what one process computes. ``plugins``
    are classes that no distribution provides.

    Plugins that only watch stay out, and those that divide a run among processes. One that came by itself, since it
    wishes to be active on that device, does so again where it can, and stays out if the run did not have it. Secrets
    are masked in a run.json, so they are not there.
    """
    written = report["settings"] if written is None else written
    files, origins = report.get("plugin_files", {}), report.get("plugins", {})
    given, direct = set(report.get("given", ())), {plugin.name for plugin in plugins}
    usual = {name: option.default for name, option in core_options().items()}
    if "given" not in report and report.get("precision", {}).get("frozen") == "float32" and written.get("bf16"):
        del usual["fp16_opt_level"]  # typed O1 keeps frozen weights in float32, and looks like the default here
    device = str({**report.get("machine", {}), **report.get("arithmetic", {})}.get("device", "cpu")).partition(":")[0]
    came, comes = requests("device").get(device, []), by_device({"device": written.get("device")})
    names: list[str] = []
    left = {*ITS_OWN, "plugin"}
    for name in written["plugin"]:
        if name in direct:
            continue
        if str(origins.get(name, "")).startswith("given directly"):
            raise UsageError(
                f"The run was trained with plugin {name}, a class that a Python program gave to sft.run, which nobody "
                "finds here; put it into a file (--plugin ./FILE.py) or a distribution, and train with it."
            )
        if name not in origins and name not in installed():
            continue  # it has gone since, and did not shape what is learned: a resume would have been refused
        path = str(files[name]["path"]) if name in files else None
        plugin = import_plugin(name) if path is None else read_plugin_file(path)
        own = options_of(plugin.Options) if getattr(plugin, "Options", None) is not None else {}
        stays = not (getattr(plugin, "observes", False) or implements(plugin, "sft_parallel_strategy"))
        if stays and name not in came and name not in comes:
            names.append(path or name)
        for key, option in own.items():
            for spelling in (key, long_name(name, key)):
                usual[spelling] = option.default
                left |= set() if stays else {spelling}
    values = {
        name: value
        for name, value in written.items()
        if name not in left
        and value is not None
        and MASK not in str(value)
        and (name in given or name not in usual or usual[name] != value)
    }
    return {**values, "plugin": [*names, *(f"no:{name}" for name in comes if name not in written["plugin"])]}
