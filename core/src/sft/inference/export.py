"""A finished model in another form: ``sft export``. Which forms there are is a matter of plugins (``sft_export``); one,
Hugging Face's folder, is the core's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sft.errors import PluginError, UsageError
from sft.files import check_free, staged_folder
from sft.foreign_text import shown
from sft.inference.finished import finished, opened_source
from sft.inference.open import settings_for
from sft.options import options_of
from sft.plugins.discovery import ALL_OF_PROJECT, import_plugin
from sft.plugins.registry import Plugins
from sft.plugins.requests import by_name, origins, requests
from sft.progress import Progress
from sft.settings.arguments import core_options

OWN = "huggingface"
_HOOKS = ("sft_model_family", "sft_model_config", "sft_quantizer", "sft_adapter_merger", "sft_adapter_updates")


def export(
    model: str,
    adapter: Path | None,
    to: str,
    output: Path,
    say: Callable[[str], None],
    requested: Sequence[str] = (),
    settings: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
) -> list[Path]:
    """Write ``model``, with ``adapter`` folded in if there is one, to the folder ``output`` in the form ``to``; the
    paths of what was written. The folder appears complete under its name or not at all.

    ``requested`` are plugins by name. ``settings`` are the core's, by name, and ``options`` those of the plugins.
    """
    options = dict(options or {})
    for name in sorted(options.keys() & core_options().keys()):
        raise UsageError(f"{name} does nothing in sft export, which does not train; leave it out.")
    writers = _writers(to, requested)
    _check_options(options, to, writers, requested)
    given = {**(settings or {}), **options, "model_name_or_path": model}
    hooks = _HOOKS if to == OWN else (*_HOOKS, "sft_export")
    read, plugins = settings_for(adapter, [*requested, *writers], given, ("sft export", hooks))
    if to != OWN and not plugins.implementing("sft_export"):
        raise UsageError(_unknown(to))
    source = opened_source(read, plugins, adapter)
    check_free(output)
    with finished(read, plugins, adapter, source, "base", say) as whole, staged_folder(output) as staging:
        if to == OWN:
            from sft.models.saving import write_finished

            with Progress(say) as progress:
                write_finished(staging, whole, progress=progress)
            written = sorted(staging.iterdir())
        else:
            written = _written(plugins, to, whole, staging)
            whole.check_adapter()
        return [output / path.relative_to(staging) for path in written]


def _check_options(options: Mapping[str, Any], to: str, writers: Sequence[str], requested: Sequence[str]) -> None:
    """Refuse an option that no plugin has, in the words of this command; where more plugins are requested, they are
    asked when they have been loaded."""
    if requested:
        return
    known = {}
    for name in writers:
        known.update(options_of(declared) if (declared := import_plugin(name).Options) is not None else {})
    spellings = {key for option in known.values() for key in (option.name, *option.aliases)}
    for name in sorted(options.keys() - spellings):
        have = f"its options are {', '.join(sorted(known))}" if known else "it has no options of its own"
        raise UsageError(f"sft export --to {to} has no option {shown(name)}; {have}.")


def _writers(to: str, requested: Sequence[str]) -> list[str]:
    """The plugin that writes the form ``to``, as metadata says (``export.FORM``); none where it is the core's, or where
    the user names plugins that may write it without saying so."""
    claims = requests("export")
    named, off = by_name(list(requested))
    if to == OWN:
        return []
    names = sorted(name for name in claims.get(to, []) if name not in off)
    chosen = [name for name in names if name in named] or names
    if len(chosen) > 1:
        raise UsageError(
            f"{origins(chosen)} both export to {to}; choose with {' or '.join(f'--plugin {name}' for name in chosen)}."
        )
    if claims.get(to) and not chosen:
        raise UsageError(f"What exports to {to} is left out; take away --plugin no:{claims[to][0]}.")
    if not chosen and not named:
        raise UsageError(_unknown(to))
    return chosen


def _unknown(to: str) -> str:
    known = ", ".join([OWN, *sorted(requests("export"))])
    return (
        f"Nothing that is installed exports to {shown(to)} (there are: {known}); take one of these, or pip install the "
        f"distribution of the plugin that does ({ALL_OF_PROJECT})."
    )


def _written(plugins: Plugins, to: str, model: Any, folder: Path) -> list[Path]:
    """What the plugins wrote into ``folder``. A file that is not there, and a tensor that nobody has read, are their
    faults: the result would be another model."""
    for name in plugins.implementing("sft_export"):
        found = plugins.ask(name, "sft_export", model=model, to=to, folder=folder)
        if found is None:
            continue
        for path in found:
            if not path.exists() or not path.resolve().is_relative_to(folder.resolve()):
                raise PluginError(f"{plugins.who(name)} says that it wrote {path}, which is not in {folder}.")
        left = model.unread()
        if left:
            raise PluginError(
                f"{plugins.who(name)} left out {len(left)} of the model's {len(model.names)} tensors, such as "
                f"{left[0]}; tell its author."
            )
        return list(found)
    raise UsageError(_unknown(to))
