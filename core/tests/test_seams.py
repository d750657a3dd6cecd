"""Every seam and event of a run, through toy plugins given to ``sft.run``: each is asked, obeyed, and in its turn."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import sft
from sft import hookspecs
from sft.data.batches import assemble

Train = Callable[..., sft.Summary]
Metrics = Callable[..., list[dict[str, Any]]]


def providing(hook: str, given: Any, called: str = "toy") -> type[sft.Plugin]:
    """A plugin whose one hook returns what ``given`` makes of the run."""

    def answer(self: sft.Plugin, run: sft.Run) -> Any:
        return given(run)

    return type("Toy", (sft.Plugin,), {"name": called, hook: sft.hookimpl(answer)})


def steps_of(folder: Path, metrics: Metrics) -> list[dict[str, Any]]:
    return [line for line in metrics(folder, same=True) if "loss" in line]


# --- the collator -------------------------------------------------------------------------------------------


class Pairs:
    """Two records a row."""

    def __init__(self, run: sft.Run) -> None:
        self.pad_id = run.tokenizer.pad_id

    def rows(self, lengths: np.ndarray, rng: np.random.Generator | None) -> list[tuple[int, ...]]:
        order = np.arange(len(lengths)) if rng is None else rng.permutation(len(lengths))
        return [tuple(int(index) for index in order[start : start + 2]) for start in range(0, len(order), 2)]

    def batch(self, rows: Any) -> sft.Batch:
        return assemble(rows, self.pad_id)


Packing = providing("sft_collator", Pairs, "packing")


def test_a_collator_that_packs_changes_rows_and_not_what_is_learned(
    train: Train, metrics: Metrics, tmp_path: Path
) -> None:
    """All records in one step, so that both runs see the same ones: as 30 padded rows, and as 15 packed ones."""
    settings = {"per_device_train_batch_size": 30, "max_steps": 2, "max_grad_norm": 0}
    padded = train("padded", **settings)
    packed = train("packed", (Packing,), **settings)
    for one, other in zip(*(steps_of(tmp_path / name, metrics) for name in ("packed", "padded")), strict=True):
        assert one["tokens"] == other["tokens"]
        assert one["target_tokens"] == other["target_tokens"]
        assert one["padding_tokens"] < other["padding_tokens"]
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
    assert packed.eval_loss_before == pytest.approx(padded.eval_loss_before, rel=1e-5)
    assert packed.eval_loss_after == pytest.approx(padded.eval_loss_after, rel=1e-4)


# --- the attention backend ----------------------------------------------------------------------------------


class Backend:
    """The default backend, counting its calls."""

    def __init__(self, run: sft.Run, packed: bool = True) -> None:
        from sft.models.attention import DefaultAttention

        self.own, self.packed, self.calls = DefaultAttention(), packed, 0

    def attend(self, query: Any, key: Any, value: Any, startend_row_indices: Any) -> Any:
        self.calls += 1
        return self.own.attend(query, key, value, startend_row_indices)


class Attention(sft.Plugin):
    name = "attention"
    packs = True

    @sft.hookimpl
    def sft_attention_backend(self, run: sft.Run, config: Any) -> Any:
        assert config is run.source.config
        run.backend = Backend(run, self.packs)  # type: ignore[attr-defined]
        return run.backend  # type: ignore[attr-defined]

    @sft.hookimpl
    def sft_run_ended(self, run: sft.Run, summary: sft.Summary) -> None:
        run.say(f"attention was asked {run.backend.calls} times")  # type: ignore[attr-defined]


class PlainAttention(Attention):
    name = "plain-attention"
    packs = False


def test_an_attention_backend_computes_training_and_evaluation(train: Train, metrics: Metrics, tmp_path: Path) -> None:
    """2 layers × (3 steps of 2 micro-batches + 2 evaluations of 7 records in batches of 4)."""
    said: list[str] = []
    settings = {
        "max_steps": 3,
        "per_device_train_batch_size": 3,
        "gradient_accumulation_steps": 2,
        "per_device_eval_batch_size": 4,
    }
    train("with", (Attention,), say=said.append, num_samples=1, max_new_tokens=3, **settings)
    train("without", **settings)
    assert f"attention was asked {2 * (3 * 2 + 2 * 2)} times" in said
    assert metrics(tmp_path / "with", same=True) == metrics(tmp_path / "without", same=True)


def test_a_backend_that_cannot_keep_documents_apart_refuses_packing(train: Train, tmp_path: Path) -> None:
    message = "Plugin packing packs several records into a row, and attention backend plain-attention"
    with pytest.raises(sft.UsageError, match=message):
        train("out", (Packing, PlainAttention))
    assert not (tmp_path / "out").exists()


def test_such_a_backend_is_welcome_where_nothing_is_packed(train: Train) -> None:
    assert train("out", (PlainAttention,), max_steps=1).steps == 1


# --- the parallel strategy ----------------------------------------------------------------------------------


def test_a_parallel_strategy_is_asked_for_everything_that_crosses_processes(
    train: Train, metrics: Metrics, tmp_path: Path
) -> None:
    calls: list[Any] = []

    def strategy(run: sft.Run) -> Any:
        from sft.training.strategy import SingleProcess

        class Noting(SingleProcess):
            def wrap(self, model: Any) -> Any:
                calls.append(("wrap", model is run.model))
                return model

            def backward(self, model: Any, batches: Any, loss_scale: float) -> float:
                calls.append(("backward", sum(batch.target_tokens for batch in batches) * loss_scale))
                return super().backward(model, batches, loss_scale)

            def sum(self, values: Any) -> list[float]:
                calls.append(("sum", len(values)))
                return super().sum(values)

            def clip(self, parameters: Any, max_norm: float) -> float:
                calls.append(("clip", max_norm))
                return super().clip(parameters, max_norm)

        return Noting(run)

    train("with", (providing("sft_parallel_strategy", strategy),), max_steps=2, max_grad_norm=0.7)
    train("without", max_steps=2, max_grad_norm=0.7)
    step = [("sum", 3), ("backward", pytest.approx(1.0)), ("sum", 1), ("clip", 0.7)]
    assert calls == [("sum", 2), ("wrap", True), *step, *step, ("sum", 2)]
    assert metrics(tmp_path / "with", same=True) == metrics(tmp_path / "without", same=True)


def test_ranks_share_the_rows_of_a_step(train: Train) -> None:
    """Each of two ranks, run one after the other, reads every second row of what one process would read."""

    def rows_of(rank: int, world: int) -> list[list[tuple[int, ...]]]:
        seen: list[list[tuple[int, ...]]] = []

        def strategy(run: sft.Run) -> Any:
            from sft.training.strategy import SingleProcess

            class Rank(SingleProcess):
                data_rank, data_world = rank, world

                def backward(self, model: Any, batches: Any, loss_scale: float) -> float:
                    assert all(len(batch.input_ids) <= 2 for batch in batches)
                    rows = [(batch, row) for batch in batches for row in range(len(batch.input_ids))]
                    seen.append([tuple(batch.input_ids[row, : batch.lengths[row][0]]) for batch, row in rows])
                    return super().backward(model, batches, loss_scale)

            return Rank(run)

        train(
            f"{rank}-of-{world}",
            (providing("sft_parallel_strategy", strategy),),
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2 // world,
            num_train_epochs=1,
            do_eval=False,
        )
        return seen

    whole, first, second = rows_of(0, 1), rows_of(0, 2), rows_of(1, 2)
    assert [len(rows) for rows in whole] == [4] * 7 + [2]
    for together, one, other in zip(whole, first, second, strict=True):
        assert one == together[0::2]
        assert other == together[1::2]


# --- model, quantizer, adapter ------------------------------------------------------------------------------


def test_the_config_can_be_changed_before_any_layer_exists(train: Train, models: Path, tmp_path: Path) -> None:
    """Against a model directory that says the same."""

    class Epsilon(sft.Plugin):
        name = "epsilon"

        @sft.hookimpl
        def sft_model_config(self, run: sft.Run, config: Any) -> None:
            assert not hasattr(run, "model")
            config.rms_norm_eps = 0.5

    folder = tmp_path / "model"
    folder.mkdir()
    for path in (models / "llama-tied-gqa").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    found = train("plugin", (Epsilon,), max_steps=1)
    expected = train("directory", max_steps=1, model_name_or_path=str(folder))
    plain = train("plain", max_steps=1)
    assert found.eval_loss_before == expected.eval_loss_before
    assert abs(found.eval_loss_before - plain.eval_loss_before) > 1e-2


class Scaling(sft.Plugin):
    """A toy adapter: y = base(x) ⊙ (1 + v) on every v_proj; only the vectors train, and only they are kept."""

    name = "scaling"

    def __init__(self, options: Any = None) -> None:
        super().__init__(options)
        self.layers: dict[str, Any] = {}

    @sft.hookimpl
    def sft_adapt_model(self, run: sft.Run, model: Any) -> None:
        assert all(parameter.stop_gradient for parameter in model.parameters())  # the base comes frozen
        for target in sft.target_layers(model, ["v_proj"]):
            self.layers[target.name] = scaled(target.layer, target.out_features)
            target.replace(self.layers[target.name])

    @sft.hookimpl
    def sft_export_adapter(self, run: sft.Run, model: Any) -> sft.AdapterFiles:
        tensors = {f"base_model.model.{name}.v": layer.v.numpy() for name, layer in self.layers.items()}
        return sft.AdapterFiles({"peft_type": "SCALING"}, tensors)


def scaled(base: Any, size: int) -> Any:
    import paddle

    class Scaled(paddle.nn.Layer):
        def __init__(self) -> None:
            super().__init__()
            self.base = base
            self.v = self.create_parameter([size], default_initializer=paddle.nn.initializer.Constant(0.0))

        def forward(self, x: Any) -> Any:
            return self.base(x) * (1 + self.v)

    return Scaled()


def test_an_adapter_trains_and_is_all_that_is_written(train: Train, models: Path, tmp_path: Path) -> None:
    said: list[str] = []
    summary = train("out", (Scaling,), say=said.append, learning_rate=3e-2)
    plain = train("plain", max_steps=1)
    out = tmp_path / "out"
    assert summary.eval_loss_before == plain.eval_loss_before
    assert summary.eval_loss_after < summary.eval_loss_before - 0.05
    assert summary.trainable_parameters == 2 * 16
    assert f"model: {summary.total_parameters:,} parameters, 32 train (0.12 %)" in said
    assert summary.total_parameters == plain.total_parameters + 32
    assert sorted(path.name for path in out.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "chat_template.jinja",
        "metrics.jsonl",
        "run.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert json.loads((out / "adapter_config.json").read_text()) == {"peft_type": "SCALING"}
    written = load_file(out / "adapter_model.safetensors")
    assert list(written) == [f"base_model.model.model.layers.{n}.self_attn.v_proj.v" for n in (0, 1)]
    assert all(tensor.shape == (16,) and tensor.all() for tensor in written.values())


class Halves:
    """A toy quantizer: every Linear of the blocks in float16."""

    def __init__(self, run: sft.Run) -> None:
        assert not hasattr(run, "model")

    def quantize(self, name: str, weight: np.ndarray, bias: np.ndarray | None) -> Any:
        import paddle

        class Half(paddle.nn.Layer):
            def __init__(self) -> None:
                super().__init__()
                self.in_features, self.out_features = weight.shape
                self.register_buffer("codes", paddle.to_tensor(weight.astype(np.float16)))

            def dequantize(self) -> Any:
                return self.codes.astype("float32")

            def forward(self, x: Any) -> Any:
                return paddle.matmul(x, self.dequantize())

        assert bias is None
        return Half()


def test_a_quantizer_and_an_adapter_work_together(train: Train, models: Path, tmp_path: Path) -> None:
    """Against a model whose file holds the rounded weights."""
    from safetensors.numpy import save_file

    folder = tmp_path / "model"
    folder.mkdir()
    for path in (models / "llama-tied-gqa").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("_proj.weight"):
            tensors[name] = tensor.astype(np.float16).astype(np.float32)
    save_file(tensors, folder / "model.safetensors")
    settings = {"max_steps": 2, "learning_rate": 3e-2}
    found = train("quantized", (Scaling, providing("sft_quantizer", Halves)), **settings)
    expected = train("rounded", (Scaling,), model_name_or_path=str(folder), **settings)
    assert found.eval_loss_before == pytest.approx(expected.eval_loss_before, rel=1e-6)
    assert found.eval_loss_after == pytest.approx(expected.eval_loss_after, rel=1e-5)
    linears = sum(tensor.size for name, tensor in tensors.items() if name.endswith("_proj.weight"))
    assert found.total_parameters == expected.total_parameters - linears


def test_a_plugin_may_choose_what_trains(train: Train, models: Path, tmp_path: Path) -> None:
    class Norms(sft.Plugin):
        name = "norms"

        @sft.hookimpl
        def sft_adapt_model(self, run: sft.Run, model: Any) -> None:
            for name, parameter in model.named_parameters():
                parameter.stop_gradient = "layernorm" not in name

    train("out", (Norms,), max_steps=2)
    before = load_file(models / "llama-tied-gqa" / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    changed = {name for name, tensor in before.items() if np.any(after[name] != tensor)}
    assert changed == {name for name in before if "layernorm" in name}


def test_a_run_in_which_nothing_trains_is_refused(train: Train, tmp_path: Path) -> None:
    class Frozen(sft.Plugin):
        name = "frozen"

        @sft.hookimpl
        def sft_adapt_model(self, run: sft.Run, model: Any) -> None:
            for parameter in model.parameters():
                parameter.stop_gradient = True

    with pytest.raises(sft.UsageError, match="Nothing trains"):
        train("out", (Frozen,))
    assert not (tmp_path / "out").exists()


# --- optimizer, data, checks --------------------------------------------------------------------------------


def test_parameter_groups_are_what_the_optimizer_uses(train: Train, models: Path, tmp_path: Path) -> None:
    """Matrices stand still at rate 0, vectors move by rate × factor: AdamW's first step is that long."""

    class Rates(sft.Plugin):
        name = "rates"

        @sft.hookimpl
        def sft_parameter_groups(self, run: sft.Run, groups: list[sft.ParameterGroup]) -> None:
            assert [group.name for group in groups] == ["decay", "no_decay"]
            groups[0].learning_rate, groups[1].learning_rate = 0.0, 4.0

    train("out", (Rates,), max_steps=1, learning_rate=1e-3)
    before = load_file(models / "llama-tied-gqa" / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in before.items():
        moved = np.abs(after[name] - tensor)
        if tensor.ndim > 1:
            assert not moved.any()
        else:
            np.testing.assert_allclose(moved, 4e-3, rtol=1e-2)


def test_a_plugin_that_loses_a_parameter_is_found_out(train: Train, tmp_path: Path) -> None:
    class Losing(sft.Plugin):
        name = "losing"

        @sft.hookimpl
        def sft_parameter_groups(self, run: sft.Run, groups: list[sft.ParameterGroup]) -> None:
            groups.pop()

    with pytest.raises(sft.UsageError, match=r"Parameter .*norm.* is in 0 optimizer groups"):
        train("out", (Losing,))
    assert not (tmp_path / "out").exists()


class Questions(sft.Plugin):
    name = "questions"

    @sft.hookimpl
    def sft_record_format(self, record: dict[str, Any]) -> list[sft.Turn] | None:
        if "question" not in record:
            return None
        if not record["answer"]:
            raise ValueError('"answer" is empty')
        return [sft.Turn("user", record["question"]), sft.Turn("assistant", record["answer"], trains=True)]


def test_a_record_format_is_read_beside_the_cores_own(train: Train, metrics: Metrics, tmp_path: Path) -> None:
    pairs = [("What is red?", "A colour."), ("Hello", "Good day to you"), ("type#coat", "A coat.")]
    own = [{"src": source, "tgt": target} for source, target in pairs]
    other = [{"question": source, "answer": target} for source, target in pairs]
    said: list[str] = []
    for name, records in (("own", own), ("other", other)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps(record) for record in records))
        data = str(tmp_path / f"{name}.jsonl")
        train(name, (Questions,), dataset_name_or_path=data, max_steps=2, say=said.append)
    assert metrics(tmp_path / "other", same=True) == metrics(tmp_path / "own", same=True)
    told = [line for line in said if line.startswith("train data: 3 records of ")]
    assert [line.split(",")[0].partition(" of ")[2] for line in told] == ["src/tgt", "the format of plugin questions"]


def test_what_a_record_format_finds_wrong_gets_file_and_line(train: Train, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text('{"src": "a", "tgt": "b"}\n{"question": "a", "answer": ""}\n')
    with pytest.raises(sft.UsageError, match=r'data\.jsonl, line 2: "answer" is empty'):
        train("out", (Questions,), dataset_name_or_path=str(data))


def test_a_check_comes_before_anything_is_read(train: Train, tmp_path: Path) -> None:
    class Picky(sft.Plugin):
        name = "picky"

        @sft.hookimpl
        def sft_check(self, run: sft.Run) -> None:
            if run.settings.training.seed == 13:
                raise sft.UsageError("seed 13 is unlucky; take another.")

    with pytest.raises(sft.UsageError, match="seed 13 is unlucky"):
        train("out", (Picky,), seed=13, model_name_or_path="/nowhere", dataset_name_or_path="/nowhere")
    with pytest.raises(sft.UsageError, match="Data /nowhere does not exist"):
        train("out", (Picky,), seed=14, model_name_or_path="/nowhere", dataset_name_or_path="/nowhere")


# --- events -------------------------------------------------------------------------------------------------


def recording(events: list[str], skip: tuple[str, ...] = ()) -> type[sft.Plugin]:
    """A plugin that implements every hook by writing its name down."""

    class Recorder(sft.Plugin):
        name = "recorder"

    def note(hook: str) -> Any:
        return sft.hookimpl(lambda self: events.append(hook))

    for hook in ALL_HOOKS:
        if hook not in skip:
            setattr(Recorder, hook, note(hook))
    return Recorder


ALL_HOOKS = [name for name in vars(hookspecs) if name.startswith("sft_")]
ADAPTER_FOLDERS = ("sft_export_adapter", "sft_import_adapter", "sft_adapter_merger", "sft_commands")


def test_hooks_are_called_in_the_order_of_their_page(train: Train) -> None:
    """hookspecs.py promises it, so that reading it explains a run."""
    events: list[str] = []
    settings = {"max_steps": 2, "evaluation_strategy": "steps", "save_strategy": "steps", "save_steps": 1}
    train("out", (recording(events, ADAPTER_FOLDERS),), **settings)
    assert events.count("sft_record_format") == 37
    building = [
        "sft_check",
        "sft_record_format",
        "sft_collator",
        "sft_parallel_strategy",
        "sft_model_config",
        "sft_quantizer",
        "sft_attention_backend",
        "sft_adapt_model",
        "sft_parameter_groups",
    ]
    step = ["sft_micro_batch", "sft_step_ended", "sft_evaluated", "sft_state", "sft_checkpoint_saved"]
    assert [event for index, event in enumerate(events) if event not in events[:index] or event not in building] == [
        *building,
        "sft_evaluated",  # the dev loss before training
        "sft_run_started",
        *step,
        *step,
        "sft_run_ended",
    ]
    assert [name for name in ALL_HOOKS if name in building] == building


def test_events_tell_what_has_happened(train: Train, metrics: Metrics, tmp_path: Path) -> None:
    steps: list[dict[str, Any]] = []
    evaluations: list[dict[str, Any]] = []
    folders: list[Path] = []
    ended: list[sft.Summary] = []

    class Watch(sft.Plugin):
        name = "watch"

        @sft.hookimpl
        def sft_run_started(self, run: sft.Run) -> None:
            assert run.model is not None
            assert run.tokenizer.vocab_size == 320

        @sft.hookimpl
        def sft_step_ended(self, run: sft.Run, record: dict[str, Any]) -> None:
            steps.append(record)

        @sft.hookimpl
        def sft_evaluated(self, run: sft.Run, record: dict[str, Any]) -> None:
            evaluations.append(record)

        @sft.hookimpl
        def sft_checkpoint_saved(self, run: sft.Run, folder: Path) -> None:
            assert (folder / "trainer" / "state.json").is_file()
            assert (folder / "model.safetensors").is_file()
            folders.append(folder)

        @sft.hookimpl
        def sft_run_ended(self, run: sft.Run, summary: sft.Summary) -> None:
            assert (run.output_dir / "model.safetensors").is_file()
            ended.append(summary)

    summary = train("out", (Watch,), num_train_epochs=1, save_strategy="epoch", evaluation_strategy="epoch")
    lines = metrics(tmp_path / "out", same=True)
    keys = {"step", "epoch", "loss", "learning_rate", "grad_norm", "tokens", "target_tokens", "padding_tokens"}
    assert all(set(record) == keys for record in steps)
    assert steps == [line for line in lines if "loss" in line]
    assert [set(record) for record in evaluations] == [
        {"step", "epoch", "eval_loss", "eval_seconds", "eval_tokens"}
    ] * 2
    found = [{key: value for key, value in record.items() if key != "eval_seconds"} for record in evaluations]
    assert found == [line for line in lines if "eval_loss" in line]
    assert folders == [tmp_path / "out" / "checkpoint-4"]
    assert ended == [summary]


def test_an_error_in_a_plugin_is_not_swallowed(train: Train, tmp_path: Path) -> None:
    class Broken(sft.Plugin):
        name = "broken"

        @sft.hookimpl
        def sft_step_ended(self, run: sft.Run, record: dict[str, Any]) -> None:
            raise KeyError("a bug")

    with pytest.raises(KeyError, match="a bug"):
        train("out", (Broken,))
    assert json.loads((tmp_path / "out" / "run.json").read_text())["status"] == "running"
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_each_run_has_instances_of_its_own(train: Train) -> None:
    seen: list[tuple[int, int]] = []

    class Counting(sft.Plugin):
        name = "counting"

        def __init__(self, options: Any = None) -> None:
            super().__init__(options)
            self.steps = 0

        @sft.hookimpl
        def sft_step_ended(self, run: sft.Run, record: dict[str, Any]) -> None:
            self.steps += 1

        @sft.hookimpl
        def sft_run_ended(self, run: sft.Run, summary: sft.Summary) -> None:
            seen.append((self.steps, summary.steps))

    train("one", (Counting,), max_steps=2)
    train("two", (Counting,), max_steps=3)
    assert seen == [(2, 2), (3, 3)]


def test_random_numbers_depend_on_seed_and_name_alone(train: Train) -> None:
    drawn: dict[tuple[int, str], list[float]] = {}

    class Drawing(sft.Plugin):
        name = "drawing"

        @sft.hookimpl
        def sft_run_started(self, run: sft.Run) -> None:
            seed = run.settings.training.seed
            for name in ("a", "b"):
                drawn[seed, name] = run.rng(name).standard_normal(3).tolist()
            run.rng("b").standard_normal(100)
            assert run.rng("a").standard_normal(3).tolist() == drawn[seed, "a"]

    train("one", (Drawing,), max_steps=1, seed=1)
    train("two", (Drawing,), max_steps=1, seed=2)
    assert len({tuple(numbers) for numbers in drawn.values()}) == 4
