"""Settings files as sft writes them: YAML with comments, which `sft run FILE` reads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.metadata import version
from typing import Any

from sft.foreign_text import MASK, is_secret, shown
from sft.options import options_of
from sft.plugins.registry import Plugins
from sft.plugins.requests import by_name, switches
from sft.resolve import resolve
from sft.settings.arguments import GROUPS, Settings
from sft.settings.checks import check_settings
from sft.settings.names import Names
from sft.settings.paddlenlp import FOREIGN


def resolved(values: Mapping[str, Any]) -> str:
    """The settings of a run, by name as they came, as a file of which the same run comes.

    What was given stands there under its own name and in its own type. All else has its default and is commented out,
    for some settings mean more where they are given. Raises :class:`UsageError` as a run would.
    """
    settings, active, without_effect = resolve(values, ())
    without_effect = [*without_effect, *check_settings(settings, active)]
    names, flat = Names(active), settings.flat()
    lines = [
        f"# The settings of a run, resolved by sft-core {version('sft-core')}. `sft run FILE` reads them back.",
        "# Settings that are commented out have their default.",
    ]
    missing = [name for name in ("model_name_or_path", "dataset_name_or_path", "output_dir") if not flat[name]]
    if missing:
        lines.append(f"# Still to be set: {', '.join(missing)}")
    lines += [f"# Active plugin: {name} ({active.origin(name)})" for name in active.names]
    lines += [f"# Without effect here: {shown(name)} ({reason})" for name, reason in without_effect]
    named, left_out = by_name(values.get("plugin", []))
    if named or left_out:
        # As they were written: a path tells upper from lower case.
        asked = values["plugin"]
        lines += ["", entry("plugin", asked.split(",") if isinstance(asked, str) else list(asked))]
    others = {name: value for name, value in values.items() if name not in names.all() and name != "plugin"}
    lines += [_line(name, _switch(name, value)) for name, value in others.items() if value is not None]
    for title, group in _groups(settings, active, names):
        given = [name for name in group if name in settings.given]
        rest = [name for name in group if name not in settings.given]
        lines += ["", f"# {title}", *(_line(name, flat[name]) for name in given)]
        lines += [commented(entry(name, flat[name])) for name in rest]
    return "\n".join(lines) + "\n"


def _groups(settings: Settings, active: Plugins, names: Names) -> Iterator[tuple[str, list[str]]]:
    for key, cls in GROUPS.items():
        yield f"{key.capitalize()} settings", list(options_of(cls))
    for owner, options in settings.options.items():
        yield f"Settings of plugin {owner}", [names.written(owner, name) for name in options_of(type(options))]


def _switch(name: str, value: Any) -> Any:
    """A plugin's switch, or a setting of PaddleNLP's, as true or false, where it was typed as such a word."""
    words = {"true": True, "false": False}
    return words.get(value.lower(), value) if isinstance(value, str) and name in {*switches(), *FOREIGN} else value


def _line(name: str, value: Any) -> str:
    """A setting that was given. What looks like a secret is not written down."""
    if is_secret(name) and value:
        return f"# {name}: {MASK} (it looks like a secret: add it where it is safe, or give it as --{name})"
    return entry(name, "" if value is None else value)  # given as unset


def entry(name: str, value: Any) -> str:
    """A setting as YAML, on one line unless it is text of several."""
    import yaml

    plain = str(value) if isinstance(value, str) else value  # of no class of our own
    text = yaml.safe_dump([plain], allow_unicode=True, default_flow_style=True, sort_keys=False, width=10**9)
    return f"{name}: {text.strip()[1:-1]}"


def commented(text: str) -> str:
    """``text`` as a comment."""
    return "\n".join(f"# {line}".rstrip() for line in text.split("\n"))
