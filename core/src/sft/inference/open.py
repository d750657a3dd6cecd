"""Opening a model after training: the plugins that an adapter's folder asks for, the base, and the adapter over it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft import hookspecs, runtime
from sft.data.tokenizer import Tokenizer
from sft.distributed.whole import WholeModel
from sft.errors import UsageError
from sft.models.adapter_folder import base_plugins, check_base, cure_of, plugin_files, read_adapter_config
from sft.models.loading import ModelSource, open_model
from sft.models.vocabulary import grown_as
from sft.options import options_of
from sft.plugins.discovery import canonical, installed, with_refined
from sft.plugins.files import name_of, with_files
from sft.plugins.marks import hooks_of, implements
from sft.plugins.registry import Plugins
from sft.plugins.requests import by_device, by_name, choose_plugins, choose_reader
from sft.progress import Progress
from sft.settings.arguments import Settings, check_precision, long_name
from sft.settings.reading import build

if TYPE_CHECKING:
    from sft.precision import Precision


def settings_for(
    adapter: Path | None,
    requested: Sequence[str] = (),
    given: Mapping[str, Any] | None = None,
    uses: tuple[str, Sequence[str]] | None = None,
) -> tuple[Settings, Plugins]:
    """Settings and started plugins of what is done with a model after training.

    The plugins are those that read ``adapter`` or changed the base that it was trained over, with the options of that
    time, and those ``requested`` by name. The settings are those ``given`` by name, and the defaults. ``uses``: a
    command, and the hooks that it calls; a plugin that is requested and has no part in it is refused.
    """
    asked, files = with_files({"plugin": list(requested)})
    requested, from_files = asked["plugin"], {name_of(plugin): plugin for plugin in files}
    trained = _base_of(adapter, from_files) if adapter is not None else {}
    names = list(trained)
    named = {key: value for key, value in (given or {}).items() if key == "dataset_name_or_path"}
    names = choose_plugins({**named, "plugin": [*names, *requested]}, named)[0]
    readers: list[str] = []
    if adapter is not None:
        reader = _reader(adapter, requested, from_files)
        readers = [*_needed(from_files[reader]), reader] if reader in from_files else with_refined(reader)
        for name in by_name(requested)[1].intersection(readers):
            raise UsageError(
                f"Plugin {reader} reads {adapter} and refines {name}, which no:{name} leaves out; take that away."
            )
        names += [name for name in readers if name not in names]
    computes = uses is None or "sft_kernels" in uses[1]
    wishes = by_device({**(given or {}), "plugin": list(requested)}) if computes else []
    active = Plugins.load(names, hookspecs, files, wishes=wishes)
    active.readers = readers
    values = dict(given or {})
    for name, plugin in active:
        if name in trained and getattr(plugin, "Options", None) is not None:
            own = trained[name]
            keys = {key: long_name(name, key) for key in options_of(plugin.Options) if key in own}
            values.update({long: own[key] for key, long in keys.items() if not {key, long} & values.keys()})
    settings = build(values, active)
    _check_precision(settings)
    active.start(settings.options)
    if uses is not None:
        _refuse_idle(active, requested, *uses)
    return settings, active


def _base_of(adapter: Path, files: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The plugins that changed the base of ``adapter``, with their options; each is installed, or one of the ``files``
    that the user gives."""
    trained = base_plugins(adapter)
    for name in trained:
        if name not in installed() and name not in files:
            raise UsageError(
                f"{adapter} was trained over a base that plugin {name} changes, which is not installed; "
                f"{cure_of(adapter, name)}."
            )
    return trained


def _reader(adapter: Path, requested: Sequence[str], files: Mapping[str, Any]) -> str:
    """The plugin that reads ``adapter``: one of the ``files`` that the user gives, which has no metadata to claim a
    folder with, or else one that claims it."""
    config = read_adapter_config(adapter)
    reading = [name for name, plugin in files.items() if any(implements(plugin, hook) for hook in _READING)]
    if len(reading) > 1:
        raise UsageError(f"Plugins {' and '.join(reading)} both read adapters; leave one of them out.")
    if reading:
        return reading[0]
    unread = [f"plugin {name}: {cure_of(adapter, name)}" for name in plugin_files(adapter)]
    if unread and not any(name in files for name in plugin_files(adapter)):
        raise UsageError(f"{adapter} is a {config['peft_type']} adapter of {' and '.join(unread)}.")
    return choose_reader(adapter, config, requested)


_READING = ("sft_import_adapter", "sft_adapter_merger")


def _needed(plugin: Any) -> list[str]:
    """What a plugin of a file ``requires``, and what that requires."""
    return [one for name in getattr(plugin, "requires", ()) for one in with_refined(canonical(name))]


def _check_precision(settings: Settings) -> None:
    """Refuse settings of a precision that contradict each other, or do nothing."""
    training = settings.training
    check_precision(training)
    for name in ("fp16_opt_level", "require_precision"):
        if name in settings.given and not (training.bf16 or training.fp16):
            raise UsageError(f"{name} does nothing, for neither bf16 nor fp16 is set; add one, or leave it out.")


def _refuse_idle(plugins: Plugins, requested: Sequence[str], what: str, hooks: Sequence[str]) -> None:
    """Refuse a plugin that is ``requested`` by name, implements none of the ``hooks`` that ``what`` calls, and does
    not read the adapter. One of a file, which no metadata brings, may refine whoever reads it."""
    published = {
        hook for name, one in plugins if name in plugins.readers for hook in hooks_of(getattr(one, "hookspecs", None))
    }
    for name, plugin in plugins:
        refines = name in plugins.files and any(implements(plugin, hook) for hook in published)
        if name in plugins.readers or refines:
            continue
        if name in map(canonical, requested) and not any(implements(plugin, hook) for hook in hooks):
            raise UsageError(f"Plugin {name} has no part in {what}; leave it out.")


def trained_template(adapter: Path | None) -> str | None:
    """The tokenizer folder whose chat template an adapter was trained with; None where it does not say."""
    return str(adapter) if adapter is not None and (adapter / "tokenizer.json").is_file() else None


def tokenizer_of(source: ModelSource, settings: Settings, adapter: Path | None) -> Tokenizer:
    """The tokenizer of a model, with the chat template that is set, or else that of the adapter's run, or the
    model's own, and with the tokens that the run added, for which ``source`` gets rows."""
    template = settings.data.chat_template or trained_template(adapter)
    new, thinks = grown_as(adapter, source), settings.data.enable_thinking
    return Tokenizer(source.folder, chat_template=template, enable_thinking=thinks, new_tokens=new)


@dataclass
class Opened:
    """A model that answers or is measured: in evaluation mode, with the adapter over it if there is one."""

    model: Any
    tokenizer: Tokenizer
    precision: Precision
    """In which it computes; its ``autocast()`` is around each use of the model."""


@contextlib.contextmanager
def opened(settings: Settings, plugins: Plugins, adapter: Path | None, say: Callable[[str], None]) -> Iterator[Opened]:
    """The model that ``settings`` name, as a run would open it: with what plugins change in its config, on the device
    and in the precision that are set. Afterwards paddle has its device of before."""
    with runtime.restored(settings.training.device):
        yield _open(settings, plugins, adapter, say)


def load_for_inference(
    model: str, adapter: Path | None, say: Callable[[str], None], requested: Sequence[str] = (), **given: Any
) -> tuple[Any, Tokenizer]:
    """A model, with an adapter over it if one is given, and its tokenizer; a quantizer may be ``requested``, and
    settings ``given`` by name, such as ``chat_template``."""
    settings, plugins = settings_for(adapter, requested, {"model_name_or_path": model, **given})
    found = _open(settings, plugins, adapter, say)
    return found.model, found.tokenizer


def _open(settings: Settings, plugins: Plugins, adapter: Path | None, say: Callable[[str], None]) -> Opened:
    runtime.require_paddle()
    model = settings.model
    source = open_model(model.place, plugins, model.allow_pickle)
    tokenizer = tokenizer_of(source, settings, adapter)
    say(runtime.prepare())
    with Progress(say) as progress:
        precision = use(settings, progress.say)
        return Opened(load_adapted(source, settings, plugins, adapter, precision, progress), tokenizer, precision)


def use(settings: Settings, say: Callable[[str], None]) -> Precision:
    """Let paddle compute on the device that is set; the precision that is set, or what the device can."""
    from sft.training.precision import choose_precision

    if settings.training.device is not None:
        runtime.use_device(settings.training.device)
    return choose_precision(settings.training, settings.given, True, say)


def load_adapted(
    source: ModelSource,
    settings: Settings,
    plugins: Plugins,
    adapter: Path | None,
    precision: Precision,
    progress: Progress,
) -> Any:
    """The model of ``source`` as the quantizer among ``plugins`` holds it, with the adapter over it if one is given."""
    from sft.models.kernels import use_kernels
    from sft.models.layers import held_by, sizes
    from sft.models.loading import load_model
    from sft.models.rows_in_files import rows_for_base
    from sft.models.saved_layers import put, tied_once
    from sft.models.setup import kernels_for
    from sft.models.token_rows import put_rows

    quantizer = plugins.hook.sft_quantizer(run=None)
    loaded = load_model(source, quantizer, precision, progress=progress)
    _, total = sizes(dict(loaded.named_parameters()), loaded)
    progress.say(f"model: {total:,} parameters{held_by(plugins.provider('sft_quantizer'), loaded)}")
    if adapter is not None:
        check_base(adapter, source, plugins, settings.options, progress.say)
        plugins.hook.sft_import_adapter(model=loaded, folder=adapter, hook=plugins.hook)
        put(dict(loaded.named_parameters()), tied_once(adapter, source), source, WholeModel().store, adapter)
        put_rows(loaded, rows_for_base(adapter, source), source.architecture.tied)
    use_kernels(loaded, kernels_for(plugins, None, precision))
    loaded.eval()
    return loaded
