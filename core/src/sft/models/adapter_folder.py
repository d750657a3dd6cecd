"""An adapter's folder in PEFT's layout: reading it, and whether a base is the one that it was trained over.

A run writes into the adapter's file what it was trained over: a fingerprint of the weights, and the plugins that
changed the base, with their options. Whoever reads an adapter compares that here: inference, merging, a run that goes
on from an adapter, and a run that resumes.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.errors import UsageError
from sft.foreign_text import quoted, shown, without_secrets
from sft.model_files import check_links
from sft.models.families.family import Family
from sft.models.families.known import FAMILIES
from sft.models.fingerprint import fingerprint, has_fingerprint
from sft.models.grown import EMBEDDING, HEAD
from sft.models.loading import ModelSource, open_model
from sft.models.reals import check_reals
from sft.plugins.discovery import cure
from sft.plugins.requests import requests
from sft.seams import AdapterFiles
from sft.small_files import read_object, why
from sft.tensor_files import open_tensors, read_tensors

if TYPE_CHECKING:
    import numpy as np

    from sft.plugins.registry import Plugins

FINGERPRINT = "sft.base"
"""Where adapter_model.safetensors keeps the fingerprint of the weights that it was trained over."""
QUANTIZER = "sft.quantizer"
"""Where it keeps the plugin that quantized them, with its options: they travel with the file."""
PREFIX = "base_model.model."
"""What PEFT puts before the name of a layer."""
RENAMED = "sft.renamed"
"""Where it keeps what layers are called in its files and here, as pairs of parts of names, where that differs."""
FILES = "sft.plugin_files"
"""Where it keeps the names of files from which plugins were read that made the adapter or changed its base."""
DELTA = "token_adapter.trainable_tokens_delta"
"""What PEFT calls the rows of some tokens, after the name of their layer."""
CONFIG = "sft.config"
"""Where it keeps the plugins that read the base's family or changed its config, with their options."""


# --- reading ------------------------------------------------------------------------------------------------


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """``adapter_config.json`` of an adapter folder; :class:`UsageError` if there is none, or it is not an adapter's."""
    path = folder / "adapter_config.json"
    if folder.is_dir():
        check_links(folder)
    if not path.is_file():
        raise UsageError(f"{folder} holds no adapter (no adapter_config.json); give the folder that a run wrote.")
    values = read_object(path, "copy the adapter again")
    if not isinstance(values.get("peft_type"), str) or not values["peft_type"]:
        raise UsageError(f"{path} names no peft_type, so it is not an adapter's config.")
    modules = values.get("target_modules")
    if isinstance(modules, list) and not all(isinstance(name, str) for name in modules):
        raise UsageError(f"{path} must give target_modules as names, not {quoted(modules)}; copy the adapter again.")
    return values


def read_adapter(folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Config and tensors of an adapter folder in PEFT's layout, as they stand in the files, but for the names of layers
    that are called otherwise here than in Hugging Face's files (Mixtral's experts), and without the layers that were
    trained whole (``modules_to_save``) and rows of tokens (``trainable_token_indices``), with which the core deals.
    Tensors are of any float dtype, [out, in] if they belong to a Linear. Raises :class:`UsageError` where a file is
    missing, damaged, or holds no finite numbers."""
    config, tensors = _read(folder, "adapter")
    return {**config, **{key: None for key in _OF_THE_CORE if key in config}}, tensors


def read_saved(folder: Path) -> tuple[dict[str, np.ndarray], bool]:
    """The tensors of layers that were trained whole beside the adapter in ``folder``, by structured name, in the files'
    layout; and whether its config says that embedding and head were kept one matrix. None of a folder whose reader has
    files of its own."""
    if not (folder / "adapter_model.safetensors").is_file():
        return {}, False
    config, saved = _read(folder, "whole")
    tied = config.get("ensure_weight_tying") is True
    return {name[len(PREFIX) :]: tensor for name, tensor in saved.items()}, tied


def read_rows_tensors(folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The config of the adapter in ``folder``, and what its file has of rows of tokens, as it stands there. Nothing
    of a folder whose reader has files of its own."""
    return _read(folder, "rows") if (folder / "adapter_model.safetensors").is_file() else ({}, {})


_OF_THE_CORE = ("modules_to_save", "trainable_token_indices")
"""Settings of an adapter's config that are no matter of its plugin."""


def _read(folder: Path, kind: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The config, and those tensors that are of a ``kind``: "whole" layers, "rows" of tokens, or the "adapter"'s own;
    only these are read."""
    config = read_adapter_config(folder)
    path = folder / "adapter_model.safetensors"
    if not path.is_file():
        pickled = [
            file.name for file in (folder / "adapter_model.bin", folder / "adapter_model.pdparams") if file.exists()
        ]
        other = f" and {pickled[0]} is a pickle, which is not read" if pickled else ""
        raise UsageError(
            f"{folder} has no adapter_model.safetensors{other}; write it with PEFT: "
            "PeftModel.from_pretrained(BASE, DIR).save_pretrained(DIR)."
        )
    in_file = {name: name for name in open_tensors(path).keys()}  # noqa: SIM118  (no dict)
    for pairs in _pairs(folder):
        config, in_file = _renamed(config, in_file, partial(_replaced, pairs))
    names = config.get("modules_to_save") or []
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise UsageError(
            f"{folder}: adapter_config.json must give modules_to_save as names, not {quoted(names)}; copy the adapter "
            "again."
        )
    kinds = {name: _kind(name, names) for name in in_file}
    if names and "whole" not in kinds.values():
        raise UsageError(
            f"{folder}: adapter_config.json names {shown(names[0])} in modules_to_save, and adapter_model.safetensors "
            "holds no such layer; copy the adapter again."
        )
    chosen = {name: theirs for name, theirs in in_file.items() if kinds[name] == kind}
    tensors = read_tensors(path, wanted={*chosen.values()}.__contains__)
    for name, tensor in tensors.items():
        check_reals(tensor, f"{path}: tensor {shown(name)}")
    return config, {name: tensors[theirs] for name, theirs in chosen.items()}


def _kind(name: str, names: list[str]) -> str:
    """What a tensor belongs to: see :func:`_read`; ``names`` are those of whole layers."""
    if name.startswith(_OF_ROWS):
        return "rows"
    return "whole" if _is_whole(name, names) else "adapter"


_OF_ROWS = tuple(
    f"{PREFIX}{name.removesuffix('.weight')}.{part}."
    for name in (EMBEDDING, HEAD)
    for part in ("token_adapter", "original_module")
)


def _is_whole(name: str, names: list[str]) -> bool:
    """Whether a tensor is one of a whole layer that ``names`` end like, as PEFT reads them."""
    path, _, kind = name.removeprefix(PREFIX).rpartition(".")
    if not name.startswith(PREFIX) or kind not in ("weight", "bias"):
        return False
    # These PEFT saves without a word in the config where the vocabulary has grown.
    return name[len(PREFIX) :] in (EMBEDDING, HEAD) or any(path.endswith(one) for one in names)


def _pairs(folder: Path) -> list[Any]:
    """How names of layers in an adapter's files are called here: as the run that wrote it says, whose model may be of a
    plugin's family; another adapter does not say of which family it is, and no other family has the names of these."""
    said = _metadata(folder).get(RENAMED)
    if said is None:
        return [family.renamed for family in FAMILIES.values() if family.renamed]
    try:
        pairs = [(theirs, ours) for theirs, ours in json.loads(said)]
        if not all(isinstance(word, str) and word for pair in pairs for word in pair):
            raise ValueError("it holds more than pairs of names")
    except (ValueError, TypeError, RecursionError) as error:
        raise UsageError(
            f"{folder}: what adapter_model.safetensors says of its layers' names is damaged ({why(error)}); copy the "
            "adapter again."
        ) from error
    return [pairs]


def _replaced(pairs: Any, name: str) -> str:
    for theirs, ours in pairs:
        name = name.replace(theirs, ours)
    return name


def as_in_files(files: AdapterFiles, family: Family) -> AdapterFiles:
    """An adapter with the names of layers that Hugging Face's files have."""
    if not family.renamed:
        return files
    return AdapterFiles(*_renamed(files.config, files.tensors, partial(family.to_file, layout="hf")))


def _renamed(
    config: Mapping[str, Any], tensors: Mapping[str, Any], rename: Callable[[str], str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """A config and what it has for each tensor, with the names of layers as ``rename`` has them."""

    def beyond(name: str) -> str:
        return PREFIX + rename(name[len(PREFIX) :]) if name.startswith(PREFIX) else rename(name)

    config = dict(config)
    for key in ("target_modules", "modules_to_save"):
        if isinstance(config.get(key), list):
            config[key] = [rename(name) if isinstance(name, str) else name for name in config[key]]
    for key in ("rank_pattern", "alpha_pattern"):
        if isinstance(config.get(key), dict):
            config[key] = {rename(pattern): value for pattern, value in config[key].items()}
    return config, {beyond(name): tensor for name, tensor in tensors.items()}


def _metadata(folder: Path) -> dict[str, str]:
    try:
        return open_tensors(folder / "adapter_model.safetensors").metadata() or {}
    except UsageError:
        return {}  # whoever reads the tensors says what is wrong


def saved_rows(folder: Path) -> int:
    """How many tokens the embedding or head has that is in the adapter's file; 0 where there is none."""
    path = folder / "adapter_model.safetensors"
    if not path.is_file():
        return 0
    file = open_tensors(path)
    known = [PREFIX + name for name in (EMBEDDING, HEAD)]
    known += [f"{start}base_layer.weight" for start in _OF_ROWS]
    names = [name for name in known if name in file.keys()]  # noqa: SIM118
    shapes = [file.get_slice(name).get_shape() for name in names]
    return max((int(shape[0]) for shape in shapes if len(shape) == 2), default=0)


# --- the base -----------------------------------------------------------------------------------------------


def base_metadata(
    base_fingerprint: str, source: ModelSource, plugins: Plugins, options: Mapping[str, Any]
) -> dict[str, str]:
    """What an adapter's file says, as metadata, about the base that it was trained over; ``options`` are the plugins'
    by name."""
    about = {FINGERPRINT: base_fingerprint}
    if source.changed_by:
        about[CONFIG] = json.dumps({name: _values(options, name) for name in source.changed_by})
    if source.family.renamed or source.family.model_type not in FAMILIES:
        about[RENAMED] = json.dumps(source.family.renamed)
    quantizer = plugins.provider("sft_quantizer")
    if quantizer is not None:
        about[QUANTIZER] = json.dumps({"plugin": [quantizer], **_values(options, quantizer)})
    made_by = (*source.changed_by, quantizer, plugins.provider("sft_export_adapter"))
    files = {name: file.path.name for name, file in plugins.files.items() if name in made_by}
    if files:
        about[FILES] = json.dumps(files)
    return about


def plugin_files(folder: Path) -> dict[str, str]:
    """The plugins without a distribution that made the adapter in ``folder``, or changed its base: for each the name of
    its file."""
    try:
        found = dict(json.loads(_metadata(folder).get(FILES, "{}")))
    except (ValueError, TypeError, RecursionError):
        return {}  # it is there for messages alone
    return {str(name): str(file) for name, file in found.items()}


def cure_of(adapter: Path, name: str) -> str:
    """What to do where plugin ``name``, which ``adapter`` needs, is not there."""
    file = plugin_files(adapter).get(name)
    if file is None:
        return cure(name)
    return f"it was the file {shown(file)}, so add --plugin PATH/{shown(file)}"


def base_plugins(folder: Path) -> dict[str, dict[str, Any]]:
    """The plugins that made the base of the adapter in ``folder`` what it is, each with its options: those that changed
    its config, and the quantizer."""
    changed: dict[str, dict[str, Any]] = {}
    metadata = _metadata(folder)
    try:
        changed.update(json.loads(metadata.get(CONFIG, "{}")))
        quantizer = dict(json.loads(metadata.get(QUANTIZER, "{}")))
        changed.update(dict.fromkeys(quantizer.pop("plugin", ()), quantizer))
        if not all(isinstance(name, str) and isinstance(options, dict) for name, options in changed.items()):
            raise TypeError("it holds more than names of plugins and their options")
    except (ValueError, TypeError, RecursionError) as error:
        raise UsageError(
            f"{folder}: what adapter_model.safetensors says of its base's plugins is damaged ({why(error)}); copy the "
            "adapter again."
        ) from error
    return changed


def check_base(
    adapter: Path, source: ModelSource, plugins: Plugins, options: Mapping[str, Any], say: Callable[[str], None]
) -> None:
    """Say so where ``adapter`` was trained over another base than the one here: ``source``, as ``plugins`` with their
    ``options`` change it."""
    expected = _fingerprint_of(adapter)
    for clause in _differences(adapter, expected, source, plugins, options):
        say(f"note: the adapter was trained over {clause}; over this base it means something else")
    named = read_adapter_config(adapter).get("base_model_name_or_path")
    if expected is None and isinstance(named, str) and named and Path(named).name.lower() not in _names(source.folder):
        say(
            f"note: the adapter names {shown(named)} as its base, and this is {source.folder}; if the weights are not "
            "the same, it means something else over these"
        )


def base_differences(adapter: Path, source: ModelSource, plugins: Plugins, options: Mapping[str, Any]) -> list[str]:
    """How the base here differs from the one that ``adapter`` was trained over: clauses that begin with that one. Empty
    where it is the same, or nothing tells: adapters from elsewhere only name their base, and where that is a model here
    the weights are compared."""
    return _differences(adapter, _fingerprint_of(adapter), source, plugins, options)


def _differences(
    adapter: Path, expected: str | None, source: ModelSource, plugins: Plugins, options: Mapping[str, Any]
) -> list[str]:
    """:func:`base_differences`, with the fingerprint that is ``expected``."""
    clauses = []
    if expected is not None and not has_fingerprint(source, expected):
        named = read_adapter_config(adapter).get("base_model_name_or_path")
        clauses.append(f"other weights than those of {source.folder} (its base was {shown(named)})")
    if FINGERPRINT in _metadata(adapter):  # of an adapter from elsewhere nobody knows what changed its base
        clauses += _plugin_differences(base_plugins(adapter), source, plugins, options)
    return clauses


def _plugin_differences(
    there: Mapping[str, Mapping[str, Any]], source: ModelSource, plugins: Plugins, options: Mapping[str, Any]
) -> list[str]:
    """Of the plugins that change the base, those that did ``there`` and do not do it here, or not in the same way, and
    the reverse."""
    quantizer = plugins.provider("sft_quantizer")
    here = {*source.changed_by, *([quantizer] if quantizer is not None else ())}
    asking = {what.partition(".")[0] for what in requests("value")}  # unset where the plugin is asked for by its name
    clauses = []
    for name in sorted({*there} & here):
        for key, value in json.loads(json.dumps(_values(options, name))).items():
            before = there[name].get(key, value)  # an older version of the plugin may not have had it
            if before != value and not (key in asking and None in (before, value)):
                clauses.append(
                    f"a base that plugin {name} changes with {key} {shown(repr(before))}, and here with {value!r}"
                )
    clauses += [f"a base that plugin {name} changes, and here it is not active" for name in sorted({*there} - here)]
    clauses += [f"a base that plugin {name} had not changed, and here it does" for name in sorted(here - {*there})]
    return clauses


def _fingerprint_of(adapter: Path) -> str | None:
    """The fingerprint of the weights that an adapter was trained over, as its file has it, or else of the model that it
    names as its base, where there is one here; None where neither tells."""
    said = _metadata(adapter).get(FINGERPRINT)
    if said is not None or not (adapter / "adapter_config.json").is_file():
        return said
    named = read_adapter_config(adapter).get("base_model_name_or_path")
    if isinstance(named, str) and named:
        with contextlib.suppress(Exception):  # it is a stranger's word: no path, no model any more, or a damaged one
            folder = Path(named).expanduser()
            if folder.is_dir():
                return fingerprint(open_model(folder))
    return None


def _values(options: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The options of a plugin by name."""
    return dict(without_secrets(asdict(options[name]))) if name in options else {}


def _names(folder: Path) -> set[str]:
    """What a model in ``folder`` may be called, in small letters: the folder, and in the hub's cache the repository."""
    folder = folder.resolve()
    cached = [part.rpartition("--")[2] for part in folder.parts if part.startswith("models--")]
    return {name.lower() for name in (folder.name, *cached)}
