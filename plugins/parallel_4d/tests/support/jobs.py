"""What ranks of the parallel tests run: whole trainings, some of them damaged on purpose."""

from __future__ import annotations

import hashlib
import os
from typing import Any

import numpy as np

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
    moves the matrix a little after it. ``keys``: in step 4 it has other keys of the tokens of rank 0, with which it
    shares rows."""

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


def attend_in_shares(heads: int, kept: int) -> list[float]:
    """One rank of attention over rows whose tokens all share: how far its output and gradients are from those of whole
    rows in float64, relative to the largest value of each."""
    import math

    import paddle
    from paddle import distributed
    from paddle.distributed import fleet

    from sft.models.attention import DefaultAttention
    from sft_parallel_4d.context import RowsAttention
    from sft_parallel_4d.topology import Axis

    strategy = fleet.DistributedStrategy()
    strategy.hybrid_configs = {"dp_degree": distributed.ParallelEnv().world_size}
    fleet.init(is_collective=True, strategy=strategy)
    group = fleet.get_hybrid_communicate_group().get_data_parallel_group()
    axis = Axis(group.rank, group)
    rng, (rows, length, size) = np.random.default_rng(0), (2, 24, 8)
    given = [rng.standard_normal((rows, length, count, size)) for count in (heads, kept, kept, heads)]
    ends = np.minimum(np.repeat([5, 17, 24], [5, 12, 7]), np.arange(length) + 6).astype(np.int32)
    ends = np.broadcast_to(ends[None, None, :, None], (rows, 1, length, 1)).copy()
    places = np.arange(length)
    seen = (places[:, None] >= places) & (places[:, None] < ends[0, 0, :, 0])

    def formula(q: Any, k: Any, v: Any) -> Any:
        q, k, v = (x.transpose([0, 2, 1, 3]) for x in (q, k, v))
        k, v = (x.unsqueeze(2).expand([rows, kept, heads // kept, length, size]).reshape(q.shape) for x in (k, v))
        scores = paddle.matmul(q, k, transpose_y=True) / math.sqrt(size) + paddle.to_tensor(np.where(seen, 0.0, -1e30))
        return paddle.matmul(paddle.nn.functional.softmax(scores, axis=-1), v).transpose([0, 2, 1, 3])

    def found(attend: Any, arrays: list[Any]) -> list[np.ndarray]:
        tensors = [paddle.to_tensor(array, stop_gradient=False) for array in arrays[:3]]
        out = attend(*tensors)
        (out * paddle.to_tensor(arrays[3])).sum().backward()
        return [one.numpy() for one in (out, *(tensor.grad for tensor in tensors))]

    attention = RowsAttention(DefaultAttention(), axis)
    attention.active = True
    mask = attention.mask(ends)
    own = [array[:, axis.rank :: axis.size].astype(np.float32) for array in given]
    shares = found(lambda *three: attention.attend(*three, mask), own)
    wholes = [whole[:, axis.rank :: axis.size] for whole in found(formula, given)]
    return [float(np.abs(one - all_).max() / np.abs(all_).max()) for one, all_ in zip(shares, wholes, strict=True)]


def train_each(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """One rank of several runs, one after the other."""
    import paddle
    from paddle import distributed

    for settings in runs:
        sft.run(settings, say=lambda text: None)
        if distributed.is_initialized():  # or a rank would ask for the next run at the one that is about to end
            distributed.all_reduce(paddle.zeros([1]))
    return {"process": os.getpid()}


def schedules(chunks: int, counts: list[int]) -> list[dict[str, Any]]:
    """One stage of a pipeline whose parts each multiply by a trained 2, of steps of so many micro-batches, of 1, 2, 3 …
    values: of each step the losses, the gradients, what evaluation gives, and this rank's transfers."""
    import groups
    import paddle
    from group_jobs import start
    from paddle import distributed

    from sft_parallel_4d.fleet import Schedule

    transfers: list[tuple[str, int]] = []

    def recorded(kind: str) -> Any:
        own = getattr(groups.ProcessGroup, kind)

        def method(self: Any, tensor: Any, other: int, sync_op: bool = True) -> Any:
            transfers.append((kind, other))
            return own(self, tensor, other, sync_op)

        return method

    for kind in ("send", "recv"):
        setattr(groups.ProcessGroup, kind, recorded(kind))
    start(pp_degree=distributed.get_world_size())
    stages, rank = distributed.get_world_size(), distributed.get_rank()
    factors = [paddle.create_parameter([1], "float32") for _ in range(chunks)]
    for factor in factors:
        factor.set_value(paddle.full([1], 2.0))
    coming: list[Any] = []
    losses: list[float] = []

    def forward(chunk: int, received: Any) -> Any:
        size = next(coming[chunk])
        assert (received is None) == (rank == chunk == 0)
        values = paddle.ones([size]) if received is None else received
        assert values.shape == [size]
        out = values * factors[chunk]
        if rank == stages - 1 and chunk == chunks - 1:
            losses.append(float(out.sum()))
            return out.sum()
        return out

    def backward(chunk: int, output: Any, gradient: Any) -> None:
        assert (gradient is None) == (rank == stages - 1 and chunk == chunks - 1)
        paddle.autograd.backward([output], [gradient])

    schedule = Schedule(stages, chunks, forward, backward)
    found: list[dict[str, Any]] = []
    for count in counts:
        shapes = [[micro + 1] for micro in range(count)]
        coming[:] = [iter([size for (size,) in shapes]) for _ in range(chunks)]
        transfers.clear()
        losses.clear()
        schedule.train(shapes, "float32")
        step = {"transfers": list(transfers), "losses": list(losses), "gradients": [float(f.grad) for f in factors]}
        for factor in factors:
            factor.clear_gradient()
        coming[:] = [iter([size for (size,) in shapes]) for _ in range(chunks)]
        losses.clear()
        with paddle.no_grad():
            schedule.measure(shapes, "float32")
        found.append({**step, "measured": list(losses)})
    return found
