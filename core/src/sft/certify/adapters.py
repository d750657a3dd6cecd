"""What a plugin must keep whose runs write an adapter: where it begins, what trains, its files, reading, merging."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from sft.certify.checking import check
from sft.certify.comparing import FailedError, NotTriedError, close, refused
from sft.certify.lab import Lab, logits_of, no_others, quiet
from sft.certify.runs import DEFAULTS, main_run, settings_of, variants
from sft.context import Run
from sft.files import save_tensors
from sft.inference.merge import merge
from sft.inference.open import load_for_inference
from sft.models.adapter_folder import PREFIX
from sft.models.layers import target_layers
from sft.models.loading import build_model, open_model
from sft.plugins.discovery import import_plugin
from sft.plugins.marks import hooks_of
from sft.tensor_files import open_tensors, read_tensors

ADAPTER, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def _adapts(lab: Lab) -> bool:
    return lab.subject.adapts()


def _begins(lab: Lab) -> bool:
    """Whether the subject has to do with where the model begins."""
    return _adapts(lab) and lab.subject.has(*_ABOUT_LAYERS, *_published(lab))


_ABOUT_LAYERS = ("sft_adapt_model", "sft_export_adapter", "sft_quantizer")


def _published(lab: Lab) -> list[str]:
    """The hooks that its company publishes."""
    return [hook for name in lab.subject.company for hook in hooks_of(getattr(import_plugin(name), "hookspecs", None))]


@check("The adapted model begins as its base, in training too.", _begins, variants)
def begins_as_its_base(lab: Lab, case: str) -> None:
    def look(run: Run) -> list[np.ndarray]:
        return [logits_of(run.model), logits_of(run.model, as_it_trains=True)]

    given = settings_of(lab, case)
    base = _held(lab, given)
    evaluated, training = lab.run(started=look, **given).started
    close(evaluated, base, "logits before the first step")
    close(training, base, "logits of the model in training before the first step")


def _held(lab: Lab, given: dict[str, Any]) -> Any:
    """Logits of the base, as the quantizer of the run holds it where there is one."""
    options = {key: value for key, value in given.items() if lab.subject.has("sft_quantizer")}
    requested = [*([lab.subject.request] if lab.subject.has("sft_quantizer") else []), *no_others()]
    return logits_of(load_for_inference(str(lab.model()), None, quiet, requested, **options)[0])


@check("All that trains learns, and nothing else changes.", _adapts, variants)
def trains_what_it_should(lab: Lab, case: str) -> None:
    held: dict[str, Any] = {}

    def note(run: Run) -> dict[str, tuple[bool, bytes]]:
        held["model"] = run.model
        return _digests(run.model)

    outcome = lab.run(started=note, **settings_of(lab, case))
    before, after = outcome.started, _digests(held["model"])
    asleep = [name for name, (trains, digest) in before.items() if trains and after[name][1] == digest]
    moved = [name for name, (trains, digest) in before.items() if not trains and after[name][1] != digest]
    if asleep:
        raise FailedError(f"{asleep[0]} is as it was after three steps")
    if moved:
        raise FailedError(f"{moved[0]} is frozen and has changed")
    base = [name for name, (trains, _) in before.items() if trains and _is_of_base(lab, name)]
    if base:
        raise FailedError(f"{base[0]}, a weight of the base, trains")


def _is_of_base(lab: Lab, name: str) -> bool:
    plain = {one for one, _ in build_model(open_model(lab.model(), weights=False)).named_parameters()}
    return name in plain or name.replace(".base.", ".") in plain


def _digests(model: Any) -> dict[str, tuple[bool, bytes]]:
    """For each parameter and each other tensor of its layers: whether it trains, and a digest."""
    import paddle

    found = dict(model.named_parameters())
    known = {id(one) for one in found.values()}
    for path, layer in model.named_sublayers(include_self=True):
        for key, value in vars(layer).items():
            if isinstance(value, paddle.Tensor) and id(value) not in known:
                found[f"{path}.{key}"] = value
    parameters = dict(model.named_parameters())
    return {
        name: (name in parameters and not one.stop_gradient, hashlib.blake2b(one.numpy().tobytes()).digest())
        for name, one in found.items()
    }


@check("Folded into its base, the adapter computes the same.", _adapts, variants)
def merges(lab: Lab, case: str) -> None:
    outcome = main_run(lab, case)
    close(lab.merged(outcome), outcome.logits, "logits")


# --- the files ----------------------------------------------------------------------------------------------


@check(
    "The adapter's files are in PEFT's layout: names, [out, in], target_modules, the values of options.",
    _adapts,
    variants,
)
def is_in_pefts_layout(lab: Lab, case: str) -> None:
    outcome, linears = main_run(lab, case), _linears(lab)
    config = json.loads((outcome.folder / CONFIG).read_text(encoding="utf-8"))
    tensors = read_tensors(outcome.folder / ADAPTER)
    adapted: dict[str, list[np.ndarray]] = {}
    for name, tensor in tensors.items():
        if not name.startswith("base_model."):
            raise FailedError(f"tensor {name} does not begin with base_model.")
        owner = max((one for one in linears if name.startswith(f"{PREFIX}{one}.")), key=len, default=None)
        if owner is None and name.startswith(f"{PREFIX}model.layers."):
            raise FailedError(f"tensor {name} belongs to no Linear of the model")
        if owner is not None:
            adapted.setdefault(owner, []).append(tensor)
    for key in ("peft_type", "task_type", "base_model_name_or_path", "target_modules"):
        if not config.get(key):
            raise FailedError(f"{CONFIG} does not say {key}")
    meant = {one for one in linears if any(one == m or one.endswith(f".{m}") for m in config["target_modules"])}
    if meant != set(adapted):
        wrong = sorted(meant ^ set(adapted))
        raise FailedError(f"target_modules and tensors do not agree about {wrong[0]}")
    for owner, found in adapted.items():
        inputs, outputs = linears[owner]
        for tensor in found:
            if tensor.ndim == 2 and tensor.shape[1] != inputs and tensor.shape[0] != outputs:
                raise FailedError(f"a tensor of {owner} is {tensor.shape}, and PEFT's are [out, in]")
    _values_are_written(config, settings_of(lab, case))


def _values_are_written(config: dict[str, Any], given: dict[str, Any]) -> None:
    """Options that the config has under their own name, or under it without its first word."""
    for name, value in given.items():
        for key in (name, name.partition("_")[2]):
            if key in config and key != "target_modules" and config[key] != value:
                raise FailedError(f"{name} is {value}, and {CONFIG} says {key} {config[key]}")


def _linears(lab: Lab) -> dict[str, tuple[int, int]]:
    """(in, out) of each Linear of the tiny model, lm_head among them."""
    source = open_model(lab.model(), weights=False)
    found = {one.name: (one.in_features, one.out_features) for one in target_layers(build_model(source))}
    shape = source.architecture
    return {**found, "lm_head": (shape.hidden, shape.vocabulary)}


Change = Callable[[dict[str, Any], dict[str, np.ndarray]], None]


def _lost(config: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
    del tensors[_of_a_layer(tensors)]


def _foreign(config: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
    block = {name: tensor for name, tensor in tensors.items() if ".layers.0." in name}
    tensors.update({name.replace(".layers.0.", ".layers.7."): tensor for name, tensor in block.items()})


def _unknown(config: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
    tensors[_of_a_layer(tensors).rpartition(".layers.")[0] + ".layers.0.self_attn.q_proj.unheard_of"] = np.ones(
        3, np.float32
    )


def _cut(config: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
    name = _of_a_layer(tensors)
    tensors[name] = np.ascontiguousarray(tensors[name][:-1])


def _of_a_layer(tensors: dict[str, np.ndarray]) -> str:
    return next(name for name in sorted(tensors) if ".layers.0." in name)


def _says(**values: Any) -> Change:
    def change(config: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
        config.update(values)

    return change


_DAMAGED: dict[str, Change] = {
    "a tensor is missing": _lost,
    "a layer that the model does not have": _foreign,
    "a tensor that nobody knows": _unknown,
    "a tensor that is too short": _cut,
    "bias all": _says(bias="all"),
    "modules_to_save without their tensors": _says(modules_to_save=["lm_head"]),
    "fan_in_fan_out": _says(fan_in_fan_out=True),
}


def _reads(lab: Lab) -> bool:
    return lab.subject.has("sft_import_adapter", "sft_adapter_merger")


def _damages(lab: Lab) -> Iterator[str]:
    return iter(_DAMAGED)


@check(
    "An adapter that is damaged, of another model, or more than the plugin reads is refused in a sentence.",
    _reads,
    _damages,
)
def refuses_what_it_cannot_read(lab: Lab, case: str) -> str:
    outcome = main_run(lab, DEFAULTS)
    folder = lab.place("damaged")
    shutil.copytree(outcome.folder, folder, ignore=shutil.ignore_patterns("checkpoint-*"))
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    tensors, metadata = dict(read_tensors(folder / ADAPTER)), _metadata(folder / ADAPTER)
    _DAMAGED[case](config, tensors)
    (folder / CONFIG).write_text(json.dumps(config), encoding="utf-8")
    save_tensors(folder / ADAPTER, tensors, metadata)
    reading, said = lab.reading(), ""
    if lab.subject.has("sft_import_adapter"):
        said = refused(lambda: load_for_inference(str(lab.model()), folder, quiet, reading), "reading it")
    if lab.subject.has("sft_adapter_merger"):
        place = lab.place("merged")
        said = refused(lambda: merge(str(lab.model()), folder, place, quiet, lab.subject.files), "merging it") or said
    return said


def _metadata(path: Path) -> dict[str, str]:
    return dict(open_tensors(path).metadata() or {})


@check("A process of its own that has the files alone computes the same.", _adapts)
def reloads_in_another_process(lab: Lab, case: str) -> None:
    outcome = main_run(lab, DEFAULTS)
    folder = lab.work / "alone"
    if lab.extra:
        raise NotTriedError("the plugin is not installed, and another process does not have it")
    folder.mkdir(exist_ok=True)
    for name in (CONFIG, ADAPTER):
        shutil.copyfile(outcome.folder / name, folder / name)
    found = lab.work / "alone.npy"
    line = [sys.executable, "-c", _ALONE, str(lab.model()), str(folder), str(found), *lab.reading()]
    done = subprocess.run(line, capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise FailedError(done.stderr.strip().rpartition("\n")[2])
    close(np.load(found), outcome.logits, "logits")


_ALONE = """
import sys
from pathlib import Path
import numpy as np
from sft.certify.lab import logits_of
from sft.inference.open import load_for_inference
model, adapter, found, *plugins = sys.argv[1:]
np.save(found, logits_of(load_for_inference(model, Path(adapter), lambda text: None, plugins)[0]))
"""


CHECKS = (
    begins_as_its_base,
    trains_what_it_should,
    merges,
    is_in_pefts_layout,
    refuses_what_it_cannot_read,
    reloads_in_another_process,
)
