"""Every legal combination of the project's plugins trains, saves, resumes and merges; every illegal one is refused."""

from __future__ import annotations

import itertools
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sft
from sft.inference.merge import merge
from sft.testing import forward, load, read_metrics, write_data

MODELS = Path(__file__).parent.parent / "core" / "tests" / "fixtures" / "models"
MODEL = MODELS / "llama-tied-gqa"

ADAPTERS = [
    "lora",
    "lora rslora",
    "lora lora-plus",
    "lora pissa",
    "lora rslora lora-plus",
    "lora pissa rslora",
    "lora pissa lora-plus",
    "lora pissa rslora lora-plus",
    "lora dora",
    "lora dora pissa rslora lora-plus",
    "vera",
]
QUANTIZERS = ["", "nf4", "fp4", "int8", "int4"]
ATTENTION = ["", "flash-attention", "flashmask"]
COLLATORS = ["", "zero-padding", "greedy-zero-padding"]
NOISE = ["", "neftune"]
WITH_ADAPTER = list(itertools.product(ADAPTERS, QUANTIZERS, ATTENTION, COLLATORS, NOISE))
WITHOUT = list(itertools.product([""], [""], ATTENTION, COLLATORS, NOISE))
# The default tier takes each adapter once, with each quantizer at least twice; with the slow tier each pair of choices
# is taken, and another seventh of all combinations. SFT_EVERY_COMBINATION=1 makes that all, in about half an hour.
PAIRS = [
    (adapter, quantizer, ATTENTION[(one + two) % 3], COLLATORS[(one // 3 + two) % 3], NOISE[(one // 2 + two) % 2])
    for one, adapter in enumerate(ADAPTERS)
    for two, quantizer in enumerate(QUANTIZERS)
] + WITHOUT[::7]
FEW = [*(PAIRS[number * len(QUANTIZERS) + number % len(QUANTIZERS)] for number in range(len(ADAPTERS))), PAIRS[-1]]
MORE = [*WITH_ADAPTER, *WITHOUT] if os.environ.get("SFT_EVERY_COMBINATION") else [*WITH_ADAPTER[5::7], *WITHOUT[3::7]]
SLOW = [one for one in dict.fromkeys([*PAIRS, *MORE]) if one not in FEW]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    kinds = ["coat", "shirt", "dress", "skirt"]
    records = [
        {"src": f"type#{kinds[n % 4]}" + "*warm" * (n % 3), "tgt": f"A {kinds[n % 4]}" + " for you" * (n % 4)}
        for n in range(24)
    ]
    return write_data(folder, records)


class StopError(sft.SftError):
    """Raised by a plugin in the middle of a run."""


class Watch(sft.Plugin):
    """Keeps the trained model's logits, and stops the run after ``stop_after`` steps."""

    name = "watch"
    api_version = 1
    stop_after = 0
    logits: Any = None

    @sft.hookimpl
    def sft_checkpoint_saved(self, run: sft.Run, folder: Path) -> None:
        if folder.name == f"checkpoint-{self.stop_after}":
            raise StopError

    @sft.hookimpl
    def sft_run_ended(self, run: sft.Run, summary: sft.Summary) -> None:
        type(self).logits = logits(run.model)


def logits(model: Any) -> np.ndarray:
    """By the default attention, as that of a model that is loaded again: others differ in the last bits."""
    from sft.models.attention import DefaultAttention

    model.eval()
    own, model.attention = model.attention, DefaultAttention()
    try:
        return forward(model, np.array([[3, 5, 7, 9, 11, 13, 2, 4]]))
    finally:
        model.attention = own


def quiet(text: str) -> None:
    pass


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(folder)]


def check(names: list[str], data: Path, work: Path, base: Path = MODEL) -> None:
    """All of it in the folder ``work``, of which nothing is left."""
    try:
        _check(names, data, work, base)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _check(names: list[str], data: Path, work: Path, base: Path) -> None:
    def train(folder: str, stop_after: int = 0, **more: Any) -> np.ndarray:
        watch = type("Watching", (Watch,), {"stop_after": stop_after})
        settings = {
            "plugin": names,
            "model_name_or_path": str(base),
            "dataset_name_or_path": str(data),
            "output_dir": str(work / folder),
            "max_length": 60,
            "per_device_train_batch_size": 2,
            "learning_rate": 5e-3,
            "max_steps": 2,
            "logging_steps": 1,
            "save_strategy": "steps",
            "save_steps": 1,
            "disable_tqdm": True,
        }
        sft.run({**settings, **more}, plugins=[watch], say=quiet)
        return watch.logits

    trained = train("whole")
    assert all(np.isfinite(losses(work / "whole")))
    with pytest.raises(StopError):
        train("parts", stop_after=1)
    train("parts", resume_from_checkpoint="auto")
    assert losses(work / "parts") == losses(work / "whole")
    adapter = any(name in ("lora", "vera") for name in names)
    weights = "adapter_model.safetensors" if adapter else "model.safetensors"
    assert (work / "parts" / weights).read_bytes() == (work / "whole" / weights).read_bytes()
    if not adapter:
        np.testing.assert_array_equal(logits(load(work / "whole")), trained)
        return
    size = np.abs(trained).max()
    assert np.abs(logits(load(base, work / "whole")) - trained).max() < 1e-5 * size
    merge(str(base), work / "whole", work / "merged", quiet)
    assert np.abs(logits(load(work / "merged")) - trained).max() < 1e-5 * size


@pytest.mark.parametrize("choices", FEW, ids=lambda choices: " ".join(" ".join(choices).split()) or "none")
def test_combination(choices: tuple[str, ...], data: Path, tmp_path: Path) -> None:
    check(" ".join(choices).split(), data, tmp_path / "work")


@pytest.mark.parametrize(
    "family", [*(pytest.param(name, marks=pytest.mark.slow) for name in ("qwen2-untied", "mistral-gqa")), "gemma-tied"]
)
@pytest.mark.parametrize(
    "names",
    [
        "lora rslora lora-plus pissa nf4 flashmask greedy-zero-padding neftune",
        "lora int8 flash-attention",
        "vera fp4 zero-padding",
        "flashmask greedy-zero-padding",
    ],
)
def test_combination_in_another_family(names: str, family: str, data: Path, tmp_path: Path) -> None:
    check(names.split(), data, tmp_path / "work", MODELS / family)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_more_combinations(data: Path, tmp_path: Path) -> None:
    for number, choices in enumerate(SLOW):
        names = " ".join(choices).split()
        try:
            check(names, data, tmp_path / str(number))
        except Exception as error:
            raise AssertionError(f"{' '.join(names)}: {error}") from error


def test_the_default_tier_takes_each_choice() -> None:
    for place, choices in enumerate((ADAPTERS, QUANTIZERS, ATTENTION, COLLATORS, NOISE)):
        assert {one[place] for one in FEW} >= {*choices}


def test_the_tiers_together_take_every_pair_of_choices() -> None:
    for one, other in itertools.combinations(range(5), 2):
        wanted = {(choices[one], choices[other]) for choices in WITH_ADAPTER}
        assert {(choices[one], choices[other]) for choices in [*FEW, *SLOW]} >= wanted


ILLEGAL = {
    "lora vera": "cannot work together",
    "pissa": "refines lora",
    "rslora": "refines lora",
    "lora-plus": "refines lora",
    "vera pissa": "refines lora",
    "lora nf4 fp4": "both provide sft_quantizer",
    "lora int8 int4": "both provide sft_quantizer",
    "nf4": "cannot be trained as a whole",
    "int4 neftune": "cannot be trained as a whole",
}


@pytest.mark.parametrize("names", ILLEGAL)
def test_illegal_combination_is_refused_before_weights_are_loaded(
    names: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sft.models import loading

    def untouched(*arguments: Any) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(loading, "load_model", untouched)
    settings = {
        "plugin": names.split(),
        "model_name_or_path": str(MODEL),
        "dataset_name_or_path": str(data),
        "output_dir": str(tmp_path / "out"),
        "max_length": 60,
    }
    with pytest.raises(sft.UsageError, match=ILLEGAL[names]) as caught:
        sft.run(settings, say=quiet)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_an_adapters_two_files_say_what_they_were_trained_over(data: Path, tmp_path: Path) -> None:
    """Without run.json beside them: a copy of the adapter is loaded over the quantized base that it knows."""
    settings = {
        "plugin": ["lora", "nf4"],
        "qlora_weight_blocksize": 32,
        "model_name_or_path": str(MODEL),
        "dataset_name_or_path": str(data),
        "output_dir": str(tmp_path / "out"),
        "max_steps": 1,
        "learning_rate": 5e-3,
    }
    watch = type("Watching", (Watch,), {})
    sft.run(settings, plugins=[watch], say=quiet)
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copyfile(tmp_path / "out" / name, copy / name)
    np.testing.assert_allclose(logits(load(MODEL, copy)), watch.logits, rtol=0, atol=1e-5 * np.abs(watch.logits).max())
    assert np.abs(logits(load(MODEL, copy, ["no:nf4"])) - watch.logits).max() > 1e-2 * np.abs(watch.logits).max()
