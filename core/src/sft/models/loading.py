"""Building a model and streaming its weights in, one tensor at a time; a quantizer may stand in for its Linears.

Where several processes share the model, a strategy says what of it this one holds, and nothing else is read.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.distributed.parts import copy_marks, is_elsewhere, part_of, whole_shape
from sft.distributed.whole import Stored, WholeModel
from sft.errors import PluginError, UsageError
from sft.hub_names import commit_of, is_hub_name
from sft.models.architecture import Architecture, ModelShape
from sft.models.config import OF_THE_WEIGHTS, read_config, with_one_spelling
from sft.models.families.family import Family, LanguageModel
from sft.models.families.known import family_of
from sft.models.grown import EMBEDDING, HEAD, GrownTensor, Growth
from sft.models.layers import Target, target_layers
from sft.models.source import ModelFolder, Weights, find_config, find_model, weight_files
from sft.models.stacked import Part
from sft.plugins.calls import checked, checking
from sft.precision import FLOAT32, Precision
from sft.progress import Progress
from sft.small_files import is_there, read_bytes

if TYPE_CHECKING:
    import numpy as np

    from sft.plugins.registry import Plugins
    from sft.seams import ParallelStrategy, Quantizer


_ROWS = 64
"""So many rows of two matrices are compared."""


@dataclass
class ModelSource:
    """A model directory whose config has been read and checked; no weight has been touched."""

    place: ModelFolder
    values: dict[str, Any]
    """``config.json``, with what plugins changed in it."""
    family: Family
    architecture: ModelShape
    changed_by: tuple[str, ...] = ()
    """The plugins without which its config means something else: what read its family (``sft_model_family``), and those
    that changed the config (``sft_model_config``)."""
    generation: bytes | None = None
    """``generation_config.json`` as it stands, if there is one; it goes with the weights."""
    growth: Growth | None = None
    """The vocabulary that it has instead of its files' own (:meth:`grow`)."""
    parts: dict[str, Part] = field(default_factory=dict)
    """The matrices of experts that its files have stacked, by name; known once the files have been opened."""

    @property
    def folder(self) -> Path:
        return self.place.path

    def grow(self, rows: int, ids: Sequence[int]) -> None:
        """Let its vocabulary have so many ``rows``, of which those of ``ids`` are new; see :class:`Growth`."""
        before = self.architecture.vocabulary
        if self.family.build is not None:
            raise UsageError(
                f"{self.folder} is of a plugin's family, whose vocabulary does not grow here; leave new_tokens out."
            )
        self.values = {**self.values, "vocab_size": rows}
        self.architecture = self.family.architecture(self.values, self.folder)
        self.growth = Growth(before, rows, tuple(ids))

    def weights(self) -> Weights:
        """The tensors in its files, of a tied matrix only the embedding; raises :class:`UsageError` where there are
        none that may be read, and where the config calls a head the embedding that is another matrix."""
        weights = Weights(self.place, self.family)
        self.parts = weights.parts
        names = ("model.embed_tokens.weight", "lm_head.weight")
        if self.architecture.tied and weights.layout == "hf" and all(name in weights for name in names):
            embedding, head = (weights.read_grid(name, _ROWS) for name in names)
            if embedding.shape != head.shape or not (embedding == head).all():
                raise UsageError(
                    f"{self.folder}: config.json says that lm_head is the embedding (tie_word_embeddings), and the "
                    "files hold another lm_head.weight; set tie_word_embeddings false to use it."
                )
        if self.architecture.tied:  # some writers store the matrix twice
            layout = weights.layout
            weights.unread |= {name for name in weights if self.family.from_file(name, layout) == "lm_head.weight"}
        return weights

    def to_file(self, name: str, layout: str = "hf") -> str:
        """A parameter's name → its tensor's in a file of ``layout``. Files with stacked experts are transformers 5's,
        which has one name for a part in all families: ours."""
        return name if self.parts and layout == "hf" else self.family.to_file(name, layout)


def open_model(
    name_or_path: str | Path,
    plugins: Plugins | None = None,
    allow_pickle: bool = False,
    run: Any = None,
    weights: bool = True,
) -> ModelSource:
    """The one door to a model: its ``config.json`` is read, changed by ``plugins`` (``sft_model_config``) and checked.

    ``name_or_path`` is a directory, a weight file in one, or a hub name. A config that cannot be computed is refused
    before weights are downloaded, and weights that may not be read (see ``find_model``) before paddle is imported; with
    ``weights`` false nobody looks for them. ``run`` is what the hook gets, and its ``source`` is set. Raises
    :class:`UsageError`.
    """
    name = str(name_or_path)
    folder = find_config(name)
    values = read_config(folder)
    family, reader = _family(values, folder, plugins)
    architecture = family.architecture(values, folder)
    place = ModelFolder(folder)
    if weights:
        # Of the hub, the state whose config has been read: somebody may have written to it since.
        place = find_model(commit_of(folder) or name if is_hub_name(name) else name, allow_pickle)
        weight_files(place)
    generation = place.path / "generation_config.json"
    kept = read_bytes(generation) if is_there(generation) else None
    source = ModelSource(place, values, family, architecture, reader, kept)
    if run is not None:
        run.source = source
    if plugins is None:
        return source
    for plugin in plugins.implementing("sft_model_config"):
        _let_change(source, plugin, plugins, run)
    return source


def _let_change(source: ModelSource, name: str, plugins: Plugins, run: Any) -> None:
    """Let plugin ``name`` change the config."""
    source.values = before = with_one_spelling(source.values)
    changed = copy.deepcopy(before)
    plugins.ask(name, "sft_model_config", run=run, config=changed)
    if changed == before:
        return
    who = plugins.who(name)
    for key in OF_THE_WEIGHTS:
        if changed.get(key) != before.get(key):
            raise UsageError(
                f"{who} sets {key} of the model's config to {changed.get(key)!r}, which follows from the weights; "
                "leave the plugin out, or tell its author."
            )
    try:
        json.dumps(changed, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise PluginError(
            f"{who} puts a value into the model's config that JSON does not have ({error}); leave the plugin out, or "
            "tell its author."
        ) from error
    where = f"{source.folder}, as plugin {name} changes it"
    source.values, source.architecture = changed, source.family.architecture(changed, where)
    source.changed_by += (name,)


def _family(values: dict[str, Any], where: Path, plugins: Plugins | None) -> tuple[Family, tuple[str, ...]]:
    """The family of ``values``, a ``config.json``, and the name of the plugin that has it, if a plugin does."""
    offered = {}
    if plugins is not None:
        for name in plugins.implementing("sft_model_family"):
            family = plugins.ask(name, "sft_model_family", config=copy.deepcopy(values))
            if family is not None:
                offered[name] = checked(family, Family, "sft_model_family", plugins.who(name))
    if plugins is None or not offered:
        return family_of(values, where), ()
    family_of(values, where, {plugins.who(name): one for name, one in offered.items()})
    ((name, family),) = offered.items()
    who, kind = plugins.who(name), Architecture if family.build is None else ModelShape
    read = checking(family.read, kind, "sft_model_family's read", who)
    build = family.build and checking(family.build, LanguageModel, "sft_model_family's build", who)
    return replace(family, read=read, build=build), (name,)


def load_model(
    source: ModelSource,
    quantizer: Quantizer | None = None,
    precision: Precision = FLOAT32,
    strategy: ParallelStrategy | None = None,
    progress: Progress | None = None,
) -> Any:
    """The model with weights as ``precision`` has them; with ``quantizer`` its quantized Linears never existed in
    float. With a ``strategy``, what this process holds of it.

    Raises :class:`UsageError` naming the tensors that are missing, left over, or of another shape.
    """
    held = strategy or WholeModel()
    weights = source.weights()
    _check_depth(source, weights)
    model = build_model(source, precision)
    held.divide(model)
    fill(model, source, held, quantizer, progress, weights)
    model.eval()
    return model


def _check_depth(source: ModelSource, weights: Weights) -> None:
    """Refuse more blocks and experts than the files have tensors, before they are built: many take very long."""
    blocks, tensors = source.architecture.blocks, sum(1 for _ in weights)
    experts = sum(block.experts.count if block.experts is not None else 1 for block in blocks)
    if experts > tensors:
        raise UsageError(
            f"{source.folder}: config.json says that there are {len(blocks):,} blocks with {experts:,} MLPs, and the "
            f"files hold {tensors:,} tensors; they do not belong together."
        )


def fill(
    model: Any,
    source: ModelSource,
    strategy: ParallelStrategy | WholeModel,
    quantizer: Quantizer | None = None,
    progress: Progress | None = None,
    weights: Weights | None = None,
) -> None:
    """Stream ``weights``, or those of ``source.folder``, into ``model``; raises as :func:`load_model` does."""
    progress = progress or Progress(lambda text: None)
    weights = weights or source.weights()
    stored = {source.family.from_file(name, weights.layout): name for name in weights}
    if quantizer is not None:
        for target in progress.over(target_layers(model), "quantizing", "Linears"):
            if not is_elsewhere(target.layer):
                _quantize(target, quantizer, weights, stored, source)
    expected = dict(strategy.parameters(model))
    _compare(set(expected), set(stored), source)
    for name, parameter in progress.over(expected.items(), "reading weights", "tensors"):
        tensor: Stored = _Tensor(stored[name], weights, source)
        shape, growth = list(whole_shape(parameter)), source.growth
        if growth is not None and name in (EMBEDDING, HEAD):
            axis = 0 if name == EMBEDDING else 1
            shape[axis] = growth.before
            tensor = GrownTensor(tensor, shape, growth, axis)
        _check_shape(stored[name], tuple(shape), weights, source)
        if not is_elsewhere(parameter):
            strategy.store(parameter, tensor)


def build_model(source: ModelSource, precision: Precision = FLOAT32) -> Any:
    """The model with unallocated parameters."""
    import paddle

    from sft.models.decoder import CausalLM
    from sft.models.kernels import Linear

    before = paddle.get_default_dtype()
    paddle.set_default_dtype(precision.weights)
    try:
        with paddle.LazyGuard():
            build: Callable[[Any], Any] = source.family.build or CausalLM
            model = build(source.architecture)
            for layer in model.sublayers():
                if type(layer) is paddle.nn.Linear:  # of a plugin's class: computed and held as the decoder's are
                    layer.__class__ = Linear
            if precision.frozen != precision.weights:
                _narrow(model, precision.frozen)
            return model
    finally:
        paddle.set_default_dtype(before)


def _narrow(model: Any, dtype: str) -> None:
    """Give ``dtype`` to the matrices that may be narrower than the rest of the model; a tied one stays tied."""
    narrowed: dict[int, Any] = {}
    for layer in model.sublayers():
        if getattr(layer, "narrows", False):
            wide = layer.weight
            if id(wide) not in narrowed:
                narrowed[id(wide)] = layer.create_parameter(list(wide.shape), dtype=dtype)
            layer.weight = narrowed[id(wide)]


def _quantize(
    target: Target, quantizer: Quantizer, weights: Weights, stored: dict[str, str], source: ModelSource
) -> None:
    name = target.name
    original = stored.get(f"{name}.weight")
    if original is None:
        return  # reported with everything else that is missing
    shape = (target.in_features, target.out_features)
    _check_shape(original, shape, weights, source)
    everything = (slice(None), slice(None))
    weight = _Tensor(original, weights, source)(everything)  # a view: quantizers store [out, in], as the file does
    weight = weight.astype("float32", copy=False)
    bias_name = stored.get(f"{name}.bias")
    bias = weights.read(bias_name) if bias_name is not None else None
    layer = quantizer.quantize(target.name, weight, bias)
    if layer is None:
        return
    part = part_of(target.layer)
    if part is not None:  # of the whole layer's codes: the same on however many processes
        if part.fused:
            raise UsageError(
                f"{target.name} holds several matrices in one, and a quantized layer cannot be divided by them; leave "
                "the quantizer or tensor parallelism out."
            )
        if not hasattr(layer, "part"):
            raise UsageError(
                f"{type(layer).__name__}, which stands for {target.name}, cannot be divided among processes; leave the "
                "quantizer out, or give each process whole layers."
            )
        layer = layer.part(part.axis, part.index, part.count)
    copy_marks(target.layer, layer)
    setattr(target.parent, target.attribute, layer)  # nobody asks for the Linear again
    stored.pop(f"{name}.weight")
    stored.pop(f"{name}.bias", None)


@dataclass(frozen=True)
class _Tensor(Stored):
    """A tensor of the files of ``source`` in Paddle's layout."""

    name: str
    weights: Weights
    source: ModelSource

    def __call__(self, where: tuple[slice, ...]) -> np.ndarray:
        found = self.weights.read_stored(self.name, where[::-1] if self._turned else where)
        return found.T if self._turned else found

    def onto(self, target: np.ndarray) -> None:
        self.weights.read_onto(self.name, target.T if self._turned else target)

    @property
    def _turned(self) -> bool:
        dimensions = len(self.weights.shape(self.name))
        return self.weights.layout == "hf" and self.source.family.is_transposed(self.name, dimensions)


def _check_shape(name: str, shape: tuple[int, ...], weights: Weights, source: ModelSource) -> None:
    stored = tuple(weights.shape(name))
    if weights.layout == "hf" and source.family.is_transposed(name, len(stored)):
        stored = stored[::-1]
    if stored != tuple(shape):
        raise UsageError(
            f"{source.folder}: tensor {name} has shape {list(weights.shape(name))}, which does not fit config.json."
        )


def _compare(expected: set[str], stored: set[str], source: ModelSource) -> None:
    for names, what in ((expected - stored, "lacks"), (stored - expected, "holds unknown")):
        if names:
            shown = sorted(source.to_file(name) for name in names)
            more = f" and {len(shown) - 3} more" if len(shown) > 3 else ""
            raise UsageError(
                f"{source.folder} {what} tensors {', '.join(shown[:3])}{more}; weights and config.json do not "
                "belong together."
            )
