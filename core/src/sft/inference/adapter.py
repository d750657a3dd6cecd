"""Adapter folders after a run: finding the plugin that reads one, loading it over a base, merging it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft import hookspecs, runtime
from sft.data.tokenizer import Tokenizer
from sft.errors import UsageError
from sft.models.loading import find_usable_model
from sft.options import options_of
from sft.plugins.discovery import canonical, installed, with_refined
from sft.plugins.registry import Plugins, implements
from sft.plugins.requests import choose, choose_reader, requests
from sft.progress import Progress
from sft.settings.arguments import Settings, build
from sft.training.base import base_plugins, options_of_plugin, trained_over

if TYPE_CHECKING:
    import numpy as np

    from sft.context import Run
    from sft.models.loading import ModelSource
    from sft.models.shards import WeightFormat


def read_config(folder: Path) -> dict[str, Any]:
    """``adapter_config.json`` of an adapter folder; :class:`UsageError` if it is none."""
    path = folder / "adapter_config.json"
    if not path.is_file():
        raise UsageError(f"{folder} holds no adapter (no adapter_config.json); give the folder that a run wrote.")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UsageError(f"{path} is not valid JSON ({error}); copy the adapter again.") from error
    if not isinstance(values, dict) or not values.get("peft_type"):
        raise UsageError(f"{path} names no peft_type, so it is not an adapter's config.")
    return values


def read_adapter(folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Config and tensors of an adapter folder in PEFT's layout, as they stand in the files."""
    import ml_dtypes  # noqa: F401  (teaches numpy bfloat16)
    from safetensors.numpy import load_file

    config = read_config(folder)
    path = folder / "adapter_model.safetensors"
    if not path.is_file():
        pickled = [
            file.name for file in (folder / "adapter_model.bin", folder / "adapter_model.pdparams") if file.exists()
        ]
        found = f" and {pickled[0]} is a pickle, which is not read" if pickled else ""
        raise UsageError(
            f"{folder} has no adapter_model.safetensors{found}; write it with PEFT: "
            "PeftModel.from_pretrained(BASE, DIR).save_pretrained(DIR)."
        )
    try:
        return config, load_file(str(path))
    except Exception as error:
        raise UsageError(f"{path} is not a readable safetensors file ({error}); copy it again.") from error


def plugins_for(folder: Path | None, requested: Sequence[str] = ()) -> Plugins:
    """The plugins of :func:`settings_for`."""
    return settings_for(folder, requested)[1]


def settings_for(
    folder: Path | None, requested: Sequence[str] = (), given: Mapping[str, Any] | None = None
) -> tuple[Settings, Plugins]:
    """What a model needs after training, started: the reader of the adapter in ``folder`` with what it refines, the
    quantizer that it was trained over, with its options, and what is ``requested`` by name. The
    settings are those ``given`` by name, and the defaults."""
    trained = base_plugins(folder) if folder is not None else {}
    names = list(trained)
    for name in names:
        if name not in installed():
            raise UsageError(
                f"{folder} was trained over a base that plugin {name} changes, which is not installed; pip install the "
                "distribution that provides it."
            )
    names = choose({"plugin": [*names, *requested]}, ())[0]
    readers: list[str] = []
    if folder is not None:
        readers = with_refined(choose_reader(folder, read_config(folder), requested))
        names += [name for name in readers if name not in names]
    active = Plugins.load(names, hookspecs)
    active.readers = readers
    values = dict(given or {})
    for name, plugin in active:
        if name in trained and getattr(plugin, "Options", None) is not None:
            own = trained[name]
            values.update({key: own[key] for key in options_of(plugin.Options) if key in own and key not in values})
    settings = build(values, active)
    active.start(settings.options)
    return settings, active


def refuse_idle(plugins: Plugins, requested: Sequence[str], hooks: Sequence[str], what: str) -> None:
    """Refuse a plugin that is ``requested`` by name, implements none of the ``hooks`` that ``what`` calls, and does
    not read the adapter."""
    for name, plugin in plugins:
        if name in plugins.readers:
            continue
        if name in map(canonical, requested) and not any(implements(plugin, hook) for hook in hooks):
            raise UsageError(f"Plugin {name} has no part in {what}; leave it out.")


def trained_template(adapter: Path | None) -> str | None:
    """The tokenizer folder whose chat template an adapter was trained with; None where it does not say."""
    return str(adapter) if adapter is not None and (adapter / "tokenizer.json").is_file() else None


def merge(
    model: str,
    adapter: Path,
    output: Path,
    say: Callable[[str], None],
    requested: Sequence[str] = (),
    form: WeightFormat | None = None,
    device: str | None = None,
    allow_pickle: bool = False,
) -> int:
    """Write ``model`` with ``adapter`` folded in to ``output`` in ``form`` (by default safetensors in Hugging Face
    layout); the number of merged tensors.

    Where the adapter was trained over a quantized base, it is folded into that: weights are quantized and read back.
    ``device`` (cpu, gpu, gpu:N; by default paddle's choice) is where the arithmetic happens. ``allow_pickle``: the
    base's weights may be pickled.
    """
    plugins = plugins_for(adapter, requested)
    refuse_idle(plugins, requested, ("sft_model_config", "sft_quantizer", "sft_adapter_merger"), "sft merge")
    runtime.require_paddle()
    place, _ = find_usable_model(model, allow_pickle)
    tokenizer = Tokenizer(place.path, chat_template=trained_template(adapter))
    if output.exists() and (output.is_file() or any(output.iterdir())):
        raise UsageError(f"{output} already exists and is not empty; choose another place or remove it.")
    with runtime.restored(device):
        runtime.exact_products()
        say(runtime.prepare())
        if device is not None:
            runtime.use_device(device)

        from sft.models.loading import open_model
        from sft.models.saving import write_merged

        source = open_model(place, plugins)
        check_base(adapter, source, say)
        merger = plugins.hook.sft_adapter_merger(folder=adapter)
        with Progress(say) as progress:
            return write_merged(output, source, merger, tokenizer, plugins.hook.sft_quantizer(run=None), form, progress)


def check_base(adapter: Path, source: ModelSource, say: Callable[[str], None]) -> None:
    """Say so if ``adapter`` was trained over other weights than those of ``source``, as far as it tells.

    A run keeps its base's fingerprint in the adapter file. Adapters from elsewhere only name their base: where that is
    a model here, the weights are compared; where it is not, the last part of its name, which copies tend to keep.
    """
    from sft.models.fingerprint import fingerprint, has_fingerprint
    from sft.models.loading import open_model

    named = read_config(adapter).get("base_model_name_or_path")
    expected = trained_over(adapter)
    if expected is None and isinstance(named, str) and named:
        with contextlib.suppress(Exception):  # it is a stranger's word: no path, no model any more, or a damaged one
            expected = fingerprint(open_model(Path(named).expanduser()))
        if expected is None and Path(named).name.lower() not in _names(source.folder):
            say(
                f"note: the adapter names {named} as its base, and this is {source.folder}; if the weights are not the "
                "same, it means something else over these"
            )
    if expected is not None and not has_fingerprint(source, expected):
        say(
            f"note: the adapter was trained over other weights than those of {source.folder} (its base was {named}); "
            "over these it means something else"
        )


def check_continued(run: Run, adapter: Path) -> None:
    """Say so if ``adapter``, from which ``run`` goes on, was trained over another base than the run's: over other
    weights (see :func:`check_base`), or one that other plugins, or plugins with other options, had changed."""
    check_base(adapter, run.source, run.say)
    quantizer = run.plugins.provider("sft_quantizer")
    here = {*run.source.changed_by, *([quantizer] if quantizer is not None else ())}
    trained = base_plugins(adapter)
    there = set(trained)
    asking = {what.partition(".")[0] for what in requests("value")}  # unset where the plugin is asked for by its name
    for name in sorted(there & here):
        for key, value in json.loads(json.dumps(options_of_plugin(run, name))).items():
            before = trained[name].get(key, value)  # an older version of the plugin may not have had it
            if before != value and not (key in asking and None in (before, value)):
                run.say(
                    f"note: the adapter was trained over a base that plugin {name} changes with {key} {before!r}, and "
                    f"this run has {value!r}; over this base it means something else"
                )
    for name in sorted(there - here):
        run.say(
            f"note: the adapter was trained over a base that plugin {name} changes, and this run does without {name}"
        )
    for name in sorted(here - there):
        run.say(
            f"note: plugin {name} changes this run's base, and the adapter was trained over one that it had not changed"
        )


def _names(folder: Path) -> set[str]:
    """What a model in ``folder`` may be called, in small letters: the folder, and in the hub's cache the repository."""
    folder = folder.resolve()
    cached = [part.rpartition("--")[2] for part in folder.parts if part.startswith("models--")]
    return {name.lower() for name in (folder.name, *cached)}


def load_for_inference(
    model: str,
    adapter: Path | None,
    say: Callable[[str], None],
    requested: Sequence[str] = (),
    plugins: Plugins | None = None,
    chat_template: str | None = None,
    allow_pickle: bool = False,
) -> tuple[Any, Tokenizer]:
    """A model, with an adapter over it if one is given, and its tokenizer; a quantizer may be ``requested``.

    ``plugins``: those of :func:`plugins_for`, where the caller needs them too. ``chat_template``: a file, or none;
    unset, that of the adapter's run, else the model's own. ``allow_pickle``: the model's weights may be pickled.
    """
    plugins = plugins or plugins_for(adapter, requested)
    runtime.require_paddle()
    place, _ = find_usable_model(model, allow_pickle)
    tokenizer = Tokenizer(place.path, chat_template=chat_template or trained_template(adapter))
    say(runtime.prepare())

    from sft.models.loading import open_model

    with Progress(say) as progress:
        return load_with(plugins, open_model(place, plugins), adapter, progress), tokenizer


def load_with(plugins: Plugins, source: ModelSource, adapter: Path | None, progress: Progress) -> Any:
    """The model of ``source`` as the quantizer among ``plugins`` holds it, with the adapter over it if one is given."""
    from sft.models.layers import held_by, sizes
    from sft.models.loading import load_model

    loaded, say = load_model(source, plugins.hook.sft_quantizer(run=None), progress=progress), progress.say
    _, total = sizes(dict(loaded.named_parameters()), loaded)
    say(f"model: {total:,} parameters{held_by(plugins.provider('sft_quantizer'), loaded)}")
    if adapter is not None:
        check_base(adapter, source, say)
        plugins.hook.sft_import_adapter(model=loaded, folder=adapter)
    loaded.eval()
    return loaded
