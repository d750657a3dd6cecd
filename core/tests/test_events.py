"""Every event of a run, through toy plugins given to ``sft.run``: told in its turn, with what has happened."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from toy_plugins import toy

import sft
from sft import hookspecs

Train = Callable[..., sft.Summary]
Metrics = Callable[..., list[dict[str, Any]]]


def recording(events: list[str], skip: tuple[str, ...] = ()) -> type[sft.Plugin]:
    """A plugin that implements every hook by writing its name down."""

    class Recorder(sft.Plugin):
        name = "recorder"
        api_version = 1

    def note(hook: str) -> Any:
        return sft.hookimpl(lambda self: events.append(hook))

    for hook in ALL_HOOKS:
        if hook not in skip:
            setattr(Recorder, hook, note(hook))
    return Recorder


ALL_HOOKS = [name for name in vars(hookspecs) if name.startswith("sft_")]
ADAPTER_FOLDERS = (
    "sft_export_adapter",
    "sft_import_adapter",
    "sft_adapter_merger",
    "sft_adapter_updates",
    "sft_commands",
)


def test_hooks_are_called_in_the_order_of_their_page(train: Train) -> None:
    """hookspecs.py promises it, so that reading it explains a run."""
    events: list[str] = []
    settings = {"max_steps": 2, "evaluation_strategy": "steps", "save_strategy": "steps", "save_steps": 1}

    class Adapter(recording(events, ADAPTER_FOLDERS)):  # type: ignore[misc]
        """A quantizer is refused without an adapter; this one trains the norms."""

        @sft.hookimpl
        def sft_adapt_model(self, run: sft.Run, model: Any) -> None:
            events.append("sft_adapt_model")
            for name, parameter in model.named_parameters():
                parameter.stop_gradient = "norm" not in name

        @sft.hookimpl
        def sft_export_adapter(self, run: sft.Run, model: Any) -> sft.AdapterFiles:
            norms = {name: p.numpy() for name, p in model.named_parameters() if "norm" in name}
            return sft.AdapterFiles({"peft_type": "NORMS"}, norms)

    train("out", (Adapter,), **settings)
    assert events.count("sft_record_format") == 37
    building = [
        "sft_check",
        "sft_launch",
        "sft_data_source",
        "sft_model_family",
        "sft_model_config",
        "sft_record_format",
        "sft_collator",
        "sft_parallel_strategy",
        "sft_quantizer",
        "sft_attention_backend",
        "sft_adapt_model",
        "sft_kernels",
        "sft_objective",
        "sft_token_loss",
        "sft_parameter_groups",
        "sft_optimizer",
        "sft_schedule",
    ]
    evaluation = ["sft_metrics", "sft_evaluated", "sft_logged"]
    logged = ["sft_micro_batch", "sft_step_ended", "sft_metrics", "sft_logged"]
    step = [*logged, *evaluation, "sft_state", "sft_checkpoint_saved"]
    assert [event for index, event in enumerate(events) if event not in events[:index] or event not in building] == [
        *building,
        "sft_run_record",
        *evaluation,  # before training
        "sft_run_started",
        "sft_state",  # to see that it can be kept
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
        api_version = 1

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
        {"step", "epoch", "eval_loss", "eval_ppl", "eval_accuracy", "eval_seconds", "eval_tokens"}
    ] * 2
    found = [{key: value for key, value in record.items() if key != "eval_seconds"} for record in evaluations]
    assert found == [line for line in lines if "eval_loss" in line]
    assert folders == [tmp_path / "out" / "checkpoint-4"]
    assert ended == [summary]


def test_what_a_plugin_does_to_a_record_is_its_own_affair(train: Train, metrics: Metrics, tmp_path: Path) -> None:
    """The journal, the summary and the choice of the best model are the run's."""

    class Changes(sft.Plugin):
        name = "changes"
        api_version = 1

        @sft.hookimpl
        def sft_step_ended(self, run: sft.Run, record: dict[str, Any]) -> None:
            record.update(loss=0.0, grad_norm=0.0)

        @sft.hookimpl
        def sft_evaluated(self, run: sft.Run, record: dict[str, Any]) -> None:
            record["eval_loss"] = -float(record["step"] == 1)
            record["extra"] = 1

    kept = {"save_strategy": "steps", "save_steps": 1, "evaluation_strategy": "steps", "load_best_model_at_end": True}
    changed, plain = (train(name, plugins, max_steps=2, **kept) for name, plugins in (("one", (Changes,)), ("two", ())))
    assert metrics(tmp_path / "one", same=True) == metrics(tmp_path / "two", same=True)
    assert (changed.eval_loss_before, changed.eval_loss_after) == (plain.eval_loss_before, plain.eval_loss_after)
    assert (tmp_path / "one" / "model.safetensors").read_bytes() == (
        tmp_path / "two" / "model.safetensors"
    ).read_bytes()


def test_an_error_in_a_plugin_is_not_swallowed(train: Train, tmp_path: Path) -> None:
    class Broken(sft.Plugin):
        name = "broken"
        api_version = 1

        @sft.hookimpl
        def sft_step_ended(self, run: sft.Run, record: dict[str, Any]) -> None:
            raise KeyError("a bug")

    told: list[tuple[bool, BaseException]] = []

    class Told(sft.Plugin):
        name = "told"
        api_version = 1

        @sft.hookimpl
        def sft_run_failed(self, run: sft.Run, error: BaseException) -> None:
            told.append((run.model is not None, error))

    with pytest.raises(sft.PluginError, match=r"failed in sft_step_ended \(KeyError: 'a bug'\)") as caught:
        train("out", (Broken, Told))
    assert told == [(True, caught.value)]
    report = json.loads((tmp_path / "out" / "run.json").read_text())
    assert (report["status"], report["error"]) == ("failed", str(caught.value))
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_each_run_has_instances_of_its_own(train: Train) -> None:
    seen: list[tuple[int, int]] = []

    class Counting(sft.Plugin):
        name = "counting"
        api_version = 1

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
        api_version = 1

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


def test_a_run_that_only_measures_ends_too(train: Train) -> None:
    events: list[str] = []
    train("out", (recording(events, (*ADAPTER_FOLDERS, "sft_quantizer", "sft_adapt_model")),), do_train=False)
    assert events[-4:] == ["sft_metrics", "sft_evaluated", "sft_logged", "sft_run_ended"]


def test_each_plugin_has_a_record_of_its_own(train: Train, metrics: Metrics, tmp_path: Path) -> None:
    """What one does with it reaches neither the others nor the journal."""
    seen: list[dict[str, Any]] = []

    def spoiling(called: str) -> type[sft.Plugin]:
        def spoil(self: Any, record: dict[str, Any]) -> None:
            seen.append(dict(record))
            record["loss"] = record["eval_loss"] = "spoilt"
            del record["step"]

        return toy(called, sft_step_ended=spoil, sft_evaluated=spoil)

    train("out", (spoiling("first"), spoiling("second")), max_steps=1)
    assert seen[::2] == seen[1::2]
    written = metrics(tmp_path / "out")
    assert [record["step"] for record in seen[::2]] == [record["step"] for record in written]
    assert "spoilt" not in str([seen, written])
