"""What ranks of the parallel tests run: whole trainings, some of them damaged on purpose."""

from __future__ import annotations

import hashlib
import os
from typing import Any

import sft
from sft.distributed.parts import is_elsewhere, part_of


def train(settings: dict[str, Any], damage: str | None = None) -> dict[str, Any]:
    """One rank of a run: the lines it said, its answers, and a digest of each parameter, or part of one, that it ends
    with. ``damage``: a kind of :class:`Damage`, which a matrix may follow."""
    said: list[str] = []
    copies: dict[str, str] = {}
    watch = type("Watching", (Watch,), {"copies": copies})
    kind, _, matrix = (damage or "").partition(" ")
    harm = [type("Harming", (Damage,), {"kind": kind, "matrix": matrix or Damage.matrix})] if damage else []
    summary = sft.run(settings, plugins=[watch, *harm], say=said.append)
    return {"process": os.getpid(), "said": said, "copies": copies, "samples": summary.samples}


def train_in_16_bits(settings: dict[str, Any]) -> dict[str, Any]:
    """:func:`train`, on any processor."""
    from no_onednn import stand_in

    stand_in()
    return train(settings)


def draw(settings: dict[str, Any]) -> dict[str, Any]:
    """One rank of a run that draws a number in each micro-batch: the draws, and whose records the rank read."""
    found: dict[str, Any] = {"process": os.getpid(), "draws": []}
    sft.run(settings, plugins=[type("Drawing", (Draw,), {"found": found})], say=lambda text: None)
    return found


class Watch(sft.Plugin):
    name = "watch"
    api_version = 1
    copies: dict[str, str]

    @sft.hookimpl
    def sft_run_ended(self, run: sft.Run, summary: sft.Summary) -> None:
        for name, parameter in run.model.named_parameters():
            if not is_elsewhere(parameter) and parameter._is_initialized():
                part = part_of(parameter)
                key = name if part is None else f"{name}, part {part.index}"
                self.copies[key] = hashlib.sha256(parameter.numpy().tobytes()).hexdigest()


class Draw(sft.Plugin):
    name = "draw"
    api_version = 1
    found: dict[str, Any]

    @sft.hookimpl
    def sft_run_started(self, run: sft.Run) -> None:
        self.found["data_rank"] = run.strategy.data_rank

    @sft.hookimpl
    def sft_micro_batch(self, run: sft.Run, batch: sft.Batch) -> None:
        import paddle

        self.found["draws"].append(float(paddle.rand([1])))


def modes(settings: dict[str, Any]) -> dict[str, Any]:
    """One rank of a run: whether experts were in the mode of training when they computed, and attention likewise."""
    found: dict[str, set[bool]] = {"experts": set(), "attention": set()}

    class Look(sft.Plugin):
        name = "look"
        api_version = 1

        @sft.hookimpl
        def sft_run_started(self, run: sft.Run) -> None:
            def note(kind: str) -> Any:
                return lambda layer, _: found[kind].add(layer.training)

            for block in run.model.model.layers:
                block.self_attn.register_forward_pre_hook(note("attention"))
                for expert in block.mlp.experts:
                    expert.register_forward_pre_hook(note("experts"))

    sft.run(settings, plugins=[Look], say=lambda text: None)
    return {"process": os.getpid(), **{kind: sorted(seen) for kind, seen in found.items()}}


def count(settings: dict[str, Any]) -> dict[str, Any]:
    """One rank of a run that counts what goes into its micro-batches."""
    found: dict[str, Any] = {"process": os.getpid(), "batches": 0, "rows": 0, "tokens": 0}
    sft.run(settings, plugins=[type("Counting", (Count,), {"found": found})], say=lambda text: None)
    return found


class Count(sft.Plugin):
    name = "count"
    api_version = 1
    found: dict[str, Any]

    @sft.hookimpl
    def sft_micro_batch(self, run: sft.Run, batch: sft.Batch) -> None:
        self.found["batches"] += 1
        self.found["rows"] += len(batch.lengths)
        self.found["tokens"] += batch.tokens


class Damage(sft.Plugin):
    """Harm that rank 1 does to what it has of one matrix: ``gradient`` leaves its gradient out in step 4, ``weight``
    moves the matrix a little after it, and ``shard`` what the rank keeps of it in pieces. ``keys``: in step 4 it has
    other keys of the tokens of rank 0, with which it shares rows."""

    name = "damage"
    api_version = 1
    kind: str
    matrix = "layers.3.mlp.up_proj.weight"
    step = 4

    @sft.hookimpl
    def sft_run_started(self, run: sft.Run) -> None:
        from paddle import distributed

        if distributed.get_rank() != 1:
            return
        (self._parameter,) = (p for name, p in run.model.named_parameters() if name.endswith(self.matrix))
        self._done = 0
        if self.kind == "keys":
            self._harm(run.model.attention)
        if self.kind == "gradient":
            self._parameter.register_hook(lambda gradient: gradient * float(self._done != self.step - 1))

    @sft.hookimpl
    def sft_step_ended(self, run: sft.Run, record: dict[str, Any]) -> None:
        self._done = record["step"]
        if self.kind == "weight" and self._done == self.step and hasattr(self, "_parameter"):
            self._parameter.set_value(self._parameter + 1e-2)
        if self.kind == "shard" and self._done == self.step and hasattr(self, "_parameter"):
            self._move_piece(run.strategy)

    def _move_piece(self, strategy: Any) -> None:
        import paddle

        piece = strategy._buckets.piece(self._parameter)
        assert piece is not self._parameter, "This rank keeps no piece of it."
        with paddle.no_grad():
            paddle.assign(piece + 1e-2, piece)

    def _harm(self, attention: Any) -> None:
        import paddle

        own = attention._heads

        def heads(query: Any, key: Any, value: Any) -> list[Any]:
            found = own(query, key, value)
            if self._done == self.step - 1:
                place = paddle.arange(found[1].shape[1]).reshape([1, -1, 1, 1])
                found[1] = found[1] * (1 + 0.1 * (place % 2 == 0).astype("float32"))
            return found

        attention._heads = heads


def held(settings: dict[str, Any]) -> dict[str, Any]:
    """One rank of a run: shapes of what it holds of the model, and the lengths of what goes into blocks' norms."""
    found: dict[str, Any] = {"process": os.getpid(), "shapes": {}, "lengths": []}

    class Look(sft.Plugin):
        name = "look"
        api_version = 1

        @sft.hookimpl
        def sft_run_started(self, run: sft.Run) -> None:
            found["shapes"] = {name: list(p.shape) for name, p in run.model.named_parameters()}
            for name, layer in run.model.named_sublayers():
                if name.endswith("post_attention_layernorm"):
                    layer.register_forward_pre_hook(lambda _, inputs: found["lengths"].append(inputs[0].shape[1]))

    sft.run(settings, plugins=[Look], say=lambda text: None)
    return found


def train_normed(settings: dict[str, Any]) -> dict[str, Any]:
    """One rank of a run whose adapter's forward needs norms of whole dimensions, and their gradients."""
    sft.run(settings, plugins=[Normed], say=lambda text: None)
    return {"process": os.getpid()}


def train_unsummed(settings: dict[str, Any], where: str = "") -> dict[str, Any]:
    """One rank of a run whose adapter takes a norm of its part of a dimension for that of the whole: on the targets
    whose names end with ``where``, or in "training" alone. The lines it said."""
    members = {"unsummed": "" if where == "training" else where, "unsummed_training": where == "training"}
    said: list[str] = []
    sft.run(settings, plugins=[type("Unsummed", (Normed,), members)], say=said.append)
    return {"process": os.getpid(), "said": said}


def train_knowing(settings: dict[str, Any]) -> dict[str, Any]:
    """One rank of a run whose adapter, right in all, needs to know the batch. The lines it said."""
    said: list[str] = []
    sft.run(settings, plugins=[type("Knowing", (Normed,), {"knows": True})], say=said.append)
    return {"process": os.getpid(), "said": said}


class Normed(sft.Plugin):
    """y = W(x ⊙ u/|u|) ⊙ v/|v| on every Linear, with trainable u [in] and v [out]; |·| is the root mean square."""

    name = "normed"
    api_version = 1
    unsummed: str | None = None
    unsummed_training = False
    knows = False
    batch: Any = None

    @sft.hookimpl
    def sft_micro_batch(self, run: sft.Run, batch: sft.Batch) -> None:
        self.batch = batch

    @sft.hookimpl
    def sft_adapt_model(self, run: sft.Run, model: Any) -> None:
        import paddle

        plugin = self

        def sum_over(layer: Any, side: str, values: Any) -> Any:
            summed = layer.sums or (plugin.unsummed_training and not layer.training)
            return sft.sum_over(layer, side, values) if summed else values

        class Scaled(paddle.nn.Layer):
            sides = {"u": ("in",), "v": ("out",)}

            def __init__(self, base: Any, in_features: int, out_features: int, rng: Any, sums: bool) -> None:
                super().__init__()
                self.sums = sums
                self.base, self.sizes = base, {"u": in_features, "v": out_features}
                for name, size in self.sizes.items():
                    parameter = self.create_parameter([size])
                    parameter.set_value(rng.uniform(0.5, 1.5, size).astype("float32"))
                    setattr(self, name, parameter)

            def unit(self, name: str, side: str) -> Any:
                factor = getattr(self, name)
                return factor * (sum_over(self, side, factor.square().sum()) / self.sizes[name]).rsqrt()

            def forward(self, x: Any) -> Any:
                if plugin.knows and self.training:
                    assert plugin.batch.input_ids is not None
                return self.base(x * self.unit("u", "in")) * self.unit("v", "out")

        self.layers = {}
        for target in sft.target_layers(model):
            sums = self.unsummed is None or not target.name.endswith(self.unsummed)
            layer = Scaled(target.layer, target.in_features, target.out_features, run.rng(target.name), sums)
            self.layers[target.name] = layer
            target.replace(layer)

    @sft.hookimpl
    def sft_export_adapter(self, run: sft.Run, model: Any) -> sft.AdapterFiles:
        tensors = {f"{name}.{key}": getattr(one, key).numpy() for name, one in self.layers.items() for key in "uv"}
        return sft.AdapterFiles({"peft_type": "NORMED"}, tensors)


def train_strange(settings: dict[str, Any]) -> dict[str, Any]:
    """One rank of a run whose adapter does not say how it is divided."""
    sft.run(settings, plugins=[Strange], say=lambda text: None)
    return {"process": os.getpid()}


class Strange(sft.Plugin):
    """A scale of its own on the outputs of one Linear."""

    name = "strange"
    api_version = 1

    @sft.hookimpl
    def sft_adapt_model(self, run: sft.Run, model: Any) -> None:
        import paddle

        class Scaled(paddle.nn.Layer):
            def __init__(self, base: Any, size: int) -> None:
                super().__init__()
                self.base = base
                self.scale = self.create_parameter([size], default_initializer=paddle.nn.initializer.Constant(1.0))

            def forward(self, x: Any) -> Any:
                return self.base(x) * self.scale

        (target,) = sft.target_layers(model, ["model.layers.0.mlp.up_proj"])
        self.layer = Scaled(target.layer, target.out_features)
        target.replace(self.layer)

    @sft.hookimpl
    def sft_export_adapter(self, run: sft.Run, model: Any) -> sft.AdapterFiles:
        return sft.AdapterFiles({"peft_type": "STRANGE"}, {"scale": self.layer.scale.numpy()})


def train_each(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """One rank of several runs, one after the other."""
    import paddle
    from paddle import distributed

    for settings in runs:
        sft.run(settings, say=lambda text: None)
        if distributed.is_initialized():  # or a rank would ask for the next run at the one that is about to end
            distributed.all_reduce(paddle.zeros([1]))
    return {"process": os.getpid()}
