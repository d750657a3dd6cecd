"""Plugin ``lora``: low-rank adaptation (arXiv 2106.09685)."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import sft
from sft import UsageError
from sft_peft_lora import hooks
from sft_peft_lora.choice import check, chosen
from sft_peft_lora.names import EMBEDDING, HEAD, OUTER, wanted
from sft_peft_lora.options import LoraOptions

if TYPE_CHECKING:
    from sft import AdapterFiles, AdapterMerger, Run, Target

EVERY = [".+"]
"""A pattern that routers of experts match too, which are adapted where they are named."""
BEGINS = (
    *("lora_rank", "lora_alpha", "lora_target_modules", "lora_exclude_modules", "lora_layers_to_transform"),
    *("lora_rank_pattern", "lora_alpha_pattern"),
)
"""Settings of how a new adapter begins."""


class Lora(sft.Plugin):
    """y = x·W + s·dropout(x)·A·B with W frozen, A Kaiming-uniform, B zero, s = α/r, on every target Linear."""

    name = "lora"
    api_version = ">=1.1,<2"
    summary = "Low-rank adapters beside frozen Linear layers (LoRA)."
    reference = "arXiv 2106.09685"
    Options = LoraOptions
    paddlenlp: ClassVar[dict[str, sft.Foreign]] = {
        "use_quick_lora": sft.Foreign("it changes the speed of PaddleNLP's code, not the result", kind="true or false")
    }
    demo: ClassVar[dict[str, Any]] = {"lora_rank": 8, "lora_alpha": 32, "learning_rate": 0.01}
    hookspecs = hooks

    def __init__(self, options: LoraOptions) -> None:
        super().__init__(options)
        self.layers: dict[str, Any] = {}
        """The adapted layers by their target's Hugging Face name."""
        self.targets: list[str] = []
        """Names of all layers that could have been adapted."""
        self.form: Any = None
        """What a refinement's layers are beyond LoRA's: :class:`sft_peft_lora.hooks.LoraForm`, or None."""
        self._layer_class: Any = None
        self.alphas: dict[str, float] = {}
        """α of each adapted layer; its own scaling follows from it, and may be said otherwise by a refinement."""

    @sft.hookimpl
    def sft_check(self, run: Run) -> None:
        self.form = run.hook.lora_form()
        if self.options.lora_path is None:
            check(self.options)
            return
        folder = Path(self.options.lora_path).expanduser()
        if not (folder / "adapter_config.json").is_file():
            raise UsageError(f"lora_path {self.options.lora_path} holds no adapter (no adapter_config.json).")
        if folder.resolve().is_relative_to(run.output_dir.resolve()):
            raise UsageError(f"lora_path {self.options.lora_path} lies in output_dir, where it would be overwritten.")
        for name in BEGINS:
            if name in run.settings.given:
                raise UsageError(f"{name} does nothing beside lora_path, whose adapter decides; leave one of them out.")
        for hook in ("lora_scaling", "lora_default_alpha", "lora_initialize"):
            if (plugin := run.plugins.provider(hook)) is not None:
                raise UsageError(
                    f"Plugin {plugin} decides how a new adapter begins ({hook}), and lora_path brings one that has "
                    "begun; leave one of them out."
                )
        from sft_peft_lora.files import LoraFolder

        LoraFolder(folder, self.form)  # one that cannot be read is refused before data is

    @sft.hookimpl
    def sft_adapt_model(self, run: Run, model: Any) -> None:
        options = self.options
        if options.lora_path is not None:
            folder = Path(options.lora_path).expanduser()
            sft.check_continued(run, folder)
            self._adapt_from(model, folder, lambda one: dict(run.strategy.whole([("", one)]))[""])
        else:
            blocks, outer = wanted(options.lora_target_modules, model.architecture.tied)
            found = [] if blocks is None else sft.target_layers(model, blocks)
            found += self._outer(model, outer, run.plugins)
            self.targets = [target.name for target in sft.target_layers(model, EVERY)] + outer
            choice = chosen([target.name for target in found], options)
            adapted = [target for target in found if target.name in choice]
            for rank in sorted({rank for rank, _ in choice.values()}):
                self._check_rank(rank, [target for target in adapted if choice[target.name][0] == rank])
            for target in adapted:
                rank, given = choice[target.name]
                alpha = self.alphas[target.name] = self._alpha(run.hook, rank, given)
                layer = self._wrap(model, target, rank, _scaling(run.hook, rank, alpha))
                rng = run.rng(target.name)
                if not run.hook.lora_initialize(layer=layer, name=target.name, rng=rng):
                    (initialize_embedding if target.name == EMBEDDING else initialize)(layer, rng)
                if hasattr(layer, "begin") and not run.resumes:  # a checkpoint brings what it would set
                    layer.begin(run.strategy.linear_weight(target.layer))
        ranks, scalings = (sorted({getattr(one, key) for one in self.layers.values()}) for key in ("rank", "scaling"))
        run.say(f"lora: {len(self.layers)} layers, {_span('rank', ranks)}, {_span('scaling', scalings)}")

    @sft.hookimpl(optionalhook=True)
    def parallel_outline(self, outline: Any, hook: Any) -> None:
        form = hook.lora_form()
        if self.options.lora_path is not None:
            from sft_peft_lora.files import LoraFolder

            pairs = LoraFolder(Path(self.options.lora_path).expanduser(), form).pairs
            ranks = {name: a.shape[1] for name, (a, _) in pairs.items()}
        else:
            blocks, outer = wanted(self.options.lora_target_modules, outline.tied)
            found = [] if blocks is None else [linear.name for linear in outline.targets(blocks)]
            ranks = {name: rank for name, (rank, _) in chosen([*found, *outer], self.options).items()}
        for name in OUTER:
            if name in ranks:
                outline.exclude("the embedding or lm_head is adapted", "pipeline", "stage3")
                rows = "vocabulary" if name == EMBEDDING else None
                sizes = outline.vocabulary, outline.hidden
                inputs, outputs = sizes if name == EMBEDDING else sizes[::-1]
                outline.share(f"{name}.lora_A", (inputs, ranks[name]), (rows, None))
                outline.share(f"{name}.lora_B", (ranks[name], outputs), (None, None if rows else "vocabulary"))
        for linear in outline.targets():
            if linear.name not in ranks:
                continue
            rank = ranks[linear.name]
            linear.add("lora_A", (linear.in_features, rank), ("in", None))
            linear.add("lora_B", (rank, linear.out_features), (None, "out"))
            lengths = {"in": linear.in_features, "out": linear.out_features, None: rank}
            for name, (_, sides) in ({} if form is None else form.tensors).items():
                linear.add(name, tuple(lengths[side] for side in sides), sides)
            # x·A, and with dropout its input too.
            linear.kept += rank + (linear.in_features if self.options.lora_dropout else 0)

    @sft.hookimpl
    def sft_export_adapter(self, run: Run, model: Any) -> AdapterFiles:
        from sft_peft_lora.files import adapter_files, with_tied_head

        pairs = {}
        for name, layer in self.layers.items():
            pairs[name] = run.hook.lora_export(layer=layer) or (layer.lora_A.numpy(), layer.lora_B.numpy())
        scalings = {name: layer.scaling for name, layer in self.layers.items()}
        base, modules = str(run.settings.model.model_name_or_path), sft.module_names(self.layers, self.targets)
        further = {
            name: {attribute: getattr(layer, attribute).numpy() for attribute in layer.further}
            for name, layer in self.layers.items()
        }
        dropout = self.options.lora_dropout
        files = adapter_files(pairs, modules, self.alphas, scalings, base, dropout, self.form, further)
        return with_tied_head(files) if EMBEDDING in pairs and model.architecture.tied else files

    @sft.hookimpl
    def sft_state(self, run: Run) -> dict[str, Any]:
        return {"scalings": {name: layer.scaling for name, layer in self.layers.items()}}

    @sft.hookimpl
    def sft_restore(self, run: Run, state: dict[str, Any]) -> None:
        """Scalings come from options, from refinements and from the folder in ``lora_path``, of which options alone are
        compared when a run goes on; ranks and targets show in the shapes of what trains."""
        before = state.get("scalings", {})
        for name, layer in self.layers.items():
            if before.get(name, layer.scaling) != layer.scaling:
                whose = f"lora_path {self.options.lora_path}" if self.options.lora_path else "this version of lora"
                raise UsageError(
                    f"The checkpoint was trained with the scaling {before[name]:g} of {name}, and {whose} has "
                    f"{layer.scaling:g} now; put that back as it was, or start a new run."
                )

    @sft.hookimpl
    def sft_import_adapter(self, model: Any, folder: Path, hook: Any) -> bool:
        self.form = hook.lora_form()
        self._adapt_from(model, folder)
        return True

    @sft.hookimpl
    def sft_adapter_merger(self, folder: Path, hook: Any) -> AdapterMerger:
        from sft_peft_lora.files import LoraMerger

        return LoraMerger(folder, hook.lora_form())

    @sft.hookimpl
    def sft_adapter_updates(self, folder: Path, hook: Any) -> dict[str, tuple[Any, Any]] | None:
        from sft_peft_lora.files import LoraFolder

        form = hook.lora_form()
        if form is not None:
            return None
        adapter = LoraFolder(folder)
        return {name: (a, adapter.scaling(name) * b) for name, (a, b) in adapter.pairs.items()}

    # --- the parts ------------------------------------------------------------------------------------------

    def _check_rank(self, rank: int, targets: list[Target]) -> None:
        widest = max(max(target.in_features, target.out_features) for target in targets)
        if rank > widest:
            setting = "lora_rank" if rank == self.options.lora_rank else "lora_rank_pattern:"
            raise UsageError(
                f"{setting} {rank} is more than the {widest} dimensions of the widest layer that it adapts, and an "
                "update has no higher rank than its layer; lower it."
            )

    def _alpha(self, hook: Any, rank: int, given: float | None) -> float:
        if given is not None:
            return float(given)
        provided = hook.lora_default_alpha(rank=rank)
        return float(provided) if provided is not None else 2.0 * rank

    def _outer(self, model: Any, names: list[str], plugins: Any) -> list[Target]:
        """The embedding and the head, as far as ``names`` has them, which no refinement knows."""
        if not names:
            return []
        for hook in ("lora_form", "lora_initialize", "lora_export"):
            if (plugin := plugins.provider(hook)) is not None:
                raise UsageError(
                    f"lora_target_modules names {names[0]}, and plugin {plugin} refines Linears of the blocks alone "
                    f"({hook}); leave one of them out."
                )
        return [target for target in sft.vocabulary_layers(model) if target.name in names]

    def _wrap(self, model: Any, target: Target, rank: int, scaling: float) -> Any:
        from sft_peft_lora.layer import layer_class
        from sft_peft_lora.vocabulary import TiedHead, layer_of

        if self._layer_class is None:
            self._layer_class = layer_class(self.form)
        dropout = self.options.lora_dropout
        sizes = target.in_features, target.out_features
        layer = layer_of(target.name, self._layer_class)(target.layer, *sizes, rank, scaling, dropout)
        target.replace(layer)
        if target.name == EMBEDDING and model.architecture.tied:
            (head,) = (other for other in sft.vocabulary_layers(model) if other.name == HEAD)
            head.replace(TiedHead(head.layer, layer, dropout))
        self.layers[target.name] = layer
        return layer

    def _adapt_from(self, model: Any, folder: Path, whole: Callable[[Any], Any] = lambda one: one) -> None:
        """Adapt ``model`` with the pairs of an adapter folder; every pair must find its layer, and fit it. ``whole``
        gives the whole of a parameter, of which a process may hold a part."""
        from sft_peft_lora.files import LoraFolder

        adapter = LoraFolder(folder, self.form)
        targets = {target.name: target for target in sft.target_layers(model, EVERY)}
        if any(name in OUTER for name in adapter.pairs):
            targets.update({target.name: target for target in sft.vocabulary_layers(model)})
            adapter.check_outer(model.architecture.tied, "the model")
        self.targets = [name for name in targets if name != HEAD or not model.architecture.tied]
        for name, (a, b) in adapter.pairs.items():
            target = targets.get(name)
            if target is None or (target.in_features, target.out_features) != (a.shape[0], b.shape[1]):
                raise UsageError(f"The adapter in {folder} has weights for {name}, which do not fit this model.")
            adapter.check_matrix(name, partial(_in_file, name, target.layer, whole))
            layer = self._wrap(model, target, a.shape[1], adapter.scaling(name))
            self.alphas[name] = adapter.alpha(name)
            layer.lora_A.set_value(a)
            layer.lora_B.set_value(b)
            for attribute, values in adapter.further[name].items():
                getattr(layer, attribute).set_value(values)


def _in_file(name: str, layer: Any, whole: Callable[[Any], Any]) -> Any:
    """The matrix of the embedding or the head as files have it, float32 [V, hidden]."""
    matrix = whole(layer.weight).astype("float32").numpy()
    return matrix if name == EMBEDDING else matrix.T


def _span(what: str, values: list[Any]) -> str:
    """ "rank 8", or "ranks 4 to 16"."""
    if len(values) == 1:
        return f"{what} {values[0]:g}"
    return f"{what}s {values[0]:g} to {values[-1]:g}"


def _scaling(hook: Any, rank: int, alpha: float) -> float:
    provided = hook.lora_scaling(rank=rank, alpha=alpha)
    return float(provided) if provided is not None else alpha / rank


def initialize_embedding(layer: Any, rng: Any) -> None:
    """B from N(0, 1), A zero, as PEFT begins with an embedding: each token gets a row of A of its own."""
    layer.lora_B.set_value(rng.standard_normal((layer.rank, layer.out_features)).astype("float32"))


def initialize(layer: Any, rng: Any) -> None:
    """A from U(-1/√in, 1/√in) (Kaiming-uniform with a = √5), B zero: the adapted model begins as its base."""
    bound = 1.0 / math.sqrt(layer.in_features)
    layer.lora_A.set_value(rng.uniform(-bound, bound, (layer.in_features, layer.rank)).astype("float32"))
