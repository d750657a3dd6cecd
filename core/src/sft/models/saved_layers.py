"""Layers that train whole beside an adapter (`modules_to_save`), and are saved with it as PEFT saves them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sft.distributed.parts import copy_marks, is_elsewhere, whole_shape
from sft.errors import UsageError
from sft.foreign_text import quoted, shown
from sft.models.adapter_folder import PREFIX, read_saved
from sft.models.grown import EMBEDDING, HEAD
from sft.models.rows_in_files import read_rows, read_rows_and_wholes
from sft.models.saving import model_tensors
from sft.patterns import matches
from sft.seams import AdapterFiles

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np

    from sft.context import CoreRun
    from sft.models.loading import ModelSource

_TIED = {name.rpartition(".")[0] for name in (EMBEDDING, HEAD)}


def with_parameters(model: Any) -> dict[str, Any]:
    """The layers that have parameters of their own, by structured name."""
    named: Iterable[tuple[str, Any]] = model.named_sublayers()
    return {path: layer for path, layer in named if any(p is not None for p in layer._parameters.values())}


def let_train(run: CoreRun, layers: Mapping[str, Any]) -> list[str]:
    """Let those of ``layers`` train that the run's ``modules_to_save`` names, and those that the adapter has from which
    the run goes on, with the values that they have there. ``layers`` are those of the model before it was adapted
    (:func:`with_parameters`). The structured names of the parameters.

    Raises :class:`UsageError` for a name that meets no layer, and for a layer that is adapted too.
    """
    names, added = list(run.settings.model.modules_to_save), False
    rows_train = run.settings.model.trainable_token_indices or (run.continued is not None and read_rows(run.continued))
    if run.exports_adapter and run.source.growth is not None and not rows_train:  # means alone know nothing
        added = True
        names += [name for name in ("embed_tokens", "lm_head") if name not in names]
    stored = {} if run.continued is None else tied_once(run.continued, run.source)
    paths = {*chosen(layers, names), *(name.rpartition(".")[0] for name in stored)}
    if not paths:
        return []
    if run.source.architecture.tied and paths & _TIED:
        paths |= _TIED & {*layers}
    now, here = dict(run.model.named_sublayers()), sorted(paths & {*layers})
    for path in here:
        if now.get(path) is not layers[path]:
            why = "new_tokens" if added and not run.settings.model.modules_to_save else "modules_to_save"
            raise UsageError(
                f"{path} is adapted, and {why} lets it train whole; leave it out there, or out of the layers that are "
                "adapted."
            )
    for path in here:
        for attribute, parameter in list(layers[path]._parameters.items()):
            if parameter is not None and parameter.stop_gradient:
                _release(run.model, layers[path], attribute, run.precision.weights)
    trained = {id(p) for path in here for p in layers[path]._parameters.values() if p is not None}
    parameters = dict(run.strategy.parameters(run.model))
    put(parameters, stored, run.source, run.strategy.store, run.continued)
    found = [name for name, parameter in parameters.items() if id(parameter) in trained]
    more = f" and {len(found) - 4} more" if len(found) > 4 else ""
    run.say(f"modules_to_save: {', '.join(found[:4])}{more} {'trains' if len(found) == 1 else 'train'} whole")
    return found


def chosen(paths: Iterable[str], names: Sequence[str]) -> list[str]:
    """Those of the layers' ``paths`` that ``names`` choose: a plain name is the last part of a path, anything else a
    regular expression over all of it."""
    paths, found = list(paths), []
    for name in names:
        plain = re.fullmatch(r"\w+", name) is not None
        met = [p for p in paths if (p.rpartition(".")[2] == name if plain else matches(name, p, "modules_to_save"))]
        if not met:
            kinds = ", ".join(dict.fromkeys(path.rpartition(".")[2] for path in paths))
            raise UsageError(f"modules_to_save: {quoted(name)} meets no layer that has weights; there are {kinds}.")
        found += met
    return list(dict.fromkeys(found))


def _release(model: Any, layer: Any, attribute: str, dtype: str) -> None:
    """Let a parameter train, wide enough for it; where it is another layer's too, it stays one."""
    import paddle

    held = wide = layer._parameters[attribute]
    if str(held.dtype).rpartition(".")[2] != dtype:
        if held._is_initialized():
            wide = layer.create_parameter(list(held.shape), dtype=dtype)
            wide.set_value(held.detach().astype(dtype))
        else:
            with paddle.LazyGuard():
                wide = layer.create_parameter(list(held.shape), dtype=dtype)
        copy_marks(held, wide)
        for other in model.sublayers():
            for key, parameter in other._parameters.items():
                if parameter is held:
                    other._parameters[key] = wide
    wide.stop_gradient = False


def tied_once(folder: Path, source: ModelSource) -> dict[str, np.ndarray]:
    """The whole layers' tensors in an adapter's ``folder``, by structured name in Hugging Face's layout; of a base
    whose head is its embedding, one of the two. Raises :class:`UsageError` where the adapter has them apart."""
    saved, ties = read_saved(folder)
    wholes = {name: whole for name, (_, whole) in read_rows_and_wholes(folder).items() if whole is not None}
    saved, ties = {**saved, **wholes}, ties or EMBEDDING in wholes
    if not source.architecture.tied or not {EMBEDDING, HEAD} & {*saved}:
        return saved
    both = [saved[name] for name in (EMBEDDING, HEAD) if name in saved]
    alike = len(both) == 2 and both[0].shape == both[1].shape and bool((both[0] == both[1]).all())
    if not alike and not (ties and len(both) == 1):
        raise UsageError(
            f"{folder} has an embedding and a head that are apart, and in {source.folder} they are one matrix; train "
            "it with PEFT's ensure_weight_tying, or over a base whose tie_word_embeddings is false."
        )
    return {**{name: value for name, value in saved.items() if name != HEAD}, EMBEDDING: both[0]}


def put(
    parameters: Mapping[str, Any],
    saved: Mapping[str, np.ndarray],
    source: ModelSource,
    store: Callable[[Any, Callable[[tuple[slice, ...]], np.ndarray]], None],
    folder: Path | None,
) -> None:
    """Give parameters, by structured name, the values that they have in the adapter of ``folder``; ``store`` is that of
    :class:`sft.ParallelStrategy`."""
    for name, value in saved.items():
        value = value.T if source.family.is_transposed(name, value.ndim) else value
        parameter = parameters.get(name)
        if parameter is None or tuple(value.shape) != tuple(whole_shape(parameter)):
            there = "x".join(map(str, value.shape))
            here = "none" if parameter is None else "x".join(map(str, whole_shape(parameter)))
            raise UsageError(
                f"The adapter in {folder} has {shown(name)} whole ({there}), which does not fit this model ({here})."
            )
        if not is_elsewhere(parameter):
            store(parameter, value.__getitem__)


def saved_tensors(run: CoreRun) -> dict[str, np.ndarray]:
    """What is saved of the layers that train whole, by the names and in the layout of Hugging Face's files. All
    processes take part."""
    if not run.whole:
        return {}
    parameters = [(name, p) for name, p in run.strategy.parameters(run.model) if name in run.whole]
    return dict(model_tensors(run.strategy.whole(parameters), run.source))


def with_saved(files: AdapterFiles, saved: Mapping[str, np.ndarray], tied: bool) -> AdapterFiles:
    """An adapter's files with those layers, as PEFT writes them; it has a tied matrix twice."""
    if not saved:
        return files
    config: dict[str, Any] = {}
    tensors = dict(saved)
    if tied and EMBEDDING in saved:
        tensors[HEAD], config["ensure_weight_tying"] = saved[EMBEDDING].copy(), True
    layers = sorted({name.rpartition(".")[0] for name in tensors})
    # PEFT takes each for the end of a name.
    config["modules_to_save"] = [path.rpartition(".")[2] if path in _TIED else path for path in layers]
    whole = {PREFIX + name: tensor for name, tensor in tensors.items()}
    return AdapterFiles({**files.config, **config}, {**files.tensors, **whole})


class SavedMerger:
    """A merger that puts the layers that were trained whole in the place of the base's, and leaves the others to the
    adapter's own."""

    def __init__(self, merger: Any, saved: Mapping[str, np.ndarray]) -> None:
        self._merger, self._saved, self._left = merger, saved, set(saved)

    def merge(self, name: str, weight: Any) -> Any:
        """See :class:`sft.AdapterMerger`."""
        import paddle

        if name not in self._saved:
            return self._merger.merge(name, weight)
        value = self._saved[name].astype("float32")
        if tuple(weight.shape) != value.shape:
            raise UsageError(
                f"The adapter's {name} is {'x'.join(map(str, value.shape))} and the model's is "
                f"{'x'.join(map(str, weight.shape))}; it belongs to another model."
            )
        self._left.discard(name)
        return paddle.to_tensor(value)

    def unused(self) -> list[str]:
        """See :class:`sft.AdapterMerger`."""
        return sorted([*self._merger.unused(), *self._left])
