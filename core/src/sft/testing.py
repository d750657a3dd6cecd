"""What tests of a plugin need: a tiny model, data, small runs, logits. It is a pytest plugin; the ``conftest.py`` at
the top of a package says so, and all fixtures are there::

    pytest_plugins = ["sft.testing"]

A fixture of the same name in a conftest or a test file takes the place of one of these. Beside the fixtures there is
:func:`suite`, the tests that every plugin of a kind should pass::

    TestMyPlugin = suite("my-plugin", learning_rate=1e-2)

Nothing here needs the repository of sft; only this module imports pytest, and nothing in sft imports this module.
"""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sft
from sft import suites
from sft.certify.subject import Subject, an_adapter
from sft.certify.token_loss import token_loss
from sft.conformance import check_family, forward
from sft.emulated_autocast import emulated_autocast
from sft.files import save_tensors, write_json
from sft.kit.about import about, found
from sft.plugins.discovery import canonical, find, installed, with_refined
from sft.training.journal import read_metrics

__all__ = [
    "adapt",
    "base_model",
    "check_family",
    "check_plugin",
    "dataset",
    "emulated_autocast",
    "forward",
    "fresh_logits",
    "load",
    "logits_of",
    "make_model",
    "metrics",
    "needs",
    "paddle",
    "read_metrics",
    "run_settings",
    "suite",
    "token_loss",
    "train",
    "write_data",
]

# --- functions ----------------------------------------------------------------------------------------------


def make_model(folder: Path, seed: int = 0, **config: Any) -> Path:
    """Write a Llama of float32 weights (100,000 of them), drawn from ``seed``, with a tokenizer and a chat template;
    ``folder``.

    ``config`` overrides keys of its ``config.json``, such as ``num_hidden_layers=4``.
    """
    origin = Path(sft.__file__).parent / "demo" / "model"
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(origin / name, folder / name)
    values = json.loads((origin / "config.json").read_text(encoding="utf-8"))
    values.update(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    values.update(num_key_value_heads=2, torch_dtype="float32", max_position_embeddings=128)
    values.pop("head_dim")  # hidden_size / num_attention_heads
    values.update(config)
    write_json(folder / "config.json", values)
    save_tensors(folder / "model.safetensors", _random_weights(values, seed), {"format": "pt"})
    return folder


def _random_weights(values: Mapping[str, Any], seed: int) -> dict[str, np.ndarray]:
    """Every tensor of a Llama in Hugging Face's names and layout ([out, in]); large enough that logits differ."""
    hidden, inner, vocabulary = values["hidden_size"], values["intermediate_size"], values["vocab_size"]
    kept = hidden // values["num_attention_heads"] * values["num_key_value_heads"]
    linears = {
        **{"self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (kept, hidden)},
        **{"self_attn.v_proj": (kept, hidden), "self_attn.o_proj": (hidden, hidden)},
        **{"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner)},
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for block in range(values["num_hidden_layers"]):
        for name, shape in linears.items():
            shapes[f"model.layers.{block}.{name}.weight"] = shape
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"model.layers.{block}.{name}.weight"] = (hidden,)
    shapes["model.norm.weight"] = (hidden,)
    if not values["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocabulary, hidden)
    generator = np.random.default_rng(seed)
    return {
        name: generator.standard_normal(shape, dtype=np.float32) / np.float32(np.sqrt(hidden))
        + np.float32(len(shape) == 1)  # norms scale by about one
        for name, shape in shapes.items()
    }


def write_data(folder: Path, train: Sequence[Mapping[str, Any]], dev: Sequence[Mapping[str, Any]] = ()) -> Path:
    """Write records to ``train.json`` and, if there are any, ``dev.json`` in ``folder``, which is made; ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, records in (("train", train), ("dev", dev)):
        if records:
            lines = (json.dumps(record, ensure_ascii=False) for record in records)
            (folder / f"{name}.json").write_text("\n".join(lines), encoding="utf-8")
    return folder


def needs(*plugins: str) -> pytest.MarkDecorator:
    """A mark for tests and parameters that are skipped, saying why, where one of ``plugins`` is not installed."""
    available = installed()
    missing = [name for name in plugins if canonical(name) not in available]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


def check_plugin(plugin: str | type[sft.Plugin], *checks: str) -> None:
    """Try what `sft certify` tries of ``plugin``: its name, the path of its file, or its class. Minutes; with names of
    ``checks`` (docs/certify.md), these alone. Raises AssertionError with a line for each case that fails::

        def test_it_keeps_what_a_plugin_must() -> None:
            check_plugin("my-plugin", "reloads", "resumes", "options take effect")
    """
    from sft.certify.certify import certify
    from sft.certify.report import line

    name, given = (plugin, ()) if isinstance(plugin, str) else (plugin.name, (plugin,))
    failures = certify(name, plugins=given, only=checks).failures
    assert not failures, "\n".join(map(line, failures))


def load(model: Path | str, adapter: Path | None = None, plugins: Sequence[str] = ()) -> Any:
    """The model of a folder, with an adapter over it if one is given; ``plugins`` may name a quantizer."""
    from sft.inference.open import load_for_inference

    return load_for_inference(str(model), adapter, lambda text: None, plugins)[0]


def suite(plugin: str, /, **settings: Any) -> type:
    """The tests that every plugin of its kind should pass, as a class for a test file; give it a name that begins with
    ``Test``. ``plugin`` is installed, and what it ``requires`` is active with it; ``settings`` are for each run.

    What it declares holds (``sft plugins validate``), and a run with it that stops and goes on is the same to the bit.
    An adapter that is read again, or merged, computes what was trained, whoever refines it; an observer changes
    nothing. A quantizer is tried under the first installed adapter that it goes together with, and skipped where there
    is none. Built on train and base_model.
    """
    rows = {row.name: row for row in found()}
    name = find(canonical(plugin), installed()).name
    company = with_refined(name)
    kinds = {one: about(rows[one], rows.values(), {}, shapes=False).kinds for one in company}
    own = kinds[name]
    lacks = ""
    if "quantizer" in own and "plugin" not in settings:
        try:
            company = [*an_adapter(Subject(name, name, rows[name].plugin)), *company]
        except sft.UsageError as error:
            lacks = str(error)
    settings = {"plugin": company, **settings}

    class Suite:
        def test_what_it_declares_holds(self) -> None:
            suites.check_declared(plugin)

        @pytest.mark.skipif(bool(lacks), reason=lacks)
        def test_a_run_that_stops_and_goes_on_is_the_same(self, train: Callable[..., sft.Summary]) -> None:
            suites.check_resumes(train, **settings)

    if any("adapter" in each for each in kinds.values()):

        def reads(self: Any, train: Callable[..., sft.Summary], base_model: Path) -> None:
            suites.check_reloads(train, base_model, plugin, "adapter" in own, **settings)

        Suite.test_what_is_read_or_merged_computes_what_was_trained = reads  # type: ignore[attr-defined]
    if own == ("observer",):

        def watches(self: Any, train: Callable[..., sft.Summary]) -> None:
            suites.check_changes_nothing(train, plugin, **settings)

        Suite.test_it_changes_nothing = watches  # type: ignore[attr-defined]
    return Suite


# --- fixtures -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def paddle() -> Any:
    """paddle, imported as a run imports it. For tests that touch tensors."""
    from sft import runtime

    runtime.prepare()
    return importlib.import_module("paddle")


@pytest.fixture(scope="session")
def base_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of the model that is trained: what :func:`make_model` writes."""
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 12 train and 4 dev records."""
    records = [{"src": f"type#{n}", "tgt": "A coat" + " for you" * (n % 4) + "."} for n in range(16)]
    return write_data(tmp_path_factory.mktemp("data"), records[:12], records[12:])


@pytest.fixture(scope="session")
def run_settings() -> dict[str, Any]:
    """What ``train`` sets beside model, data and output; a conftest that names a plugin here defines its own."""
    return {"learning_rate": 1e-2, "max_steps": 3}


@pytest.fixture
def train(
    paddle: Any, base_model: Path, dataset: Path, run_settings: dict[str, Any], tmp_path: Path
) -> Callable[..., sft.Summary]:
    """``train(output_dir="out", plugins=(), say=None, **settings)``: run ``sft.run`` quietly; a summary.

    ``output_dir`` is a name in the test's own folder, ``plugins`` are classes that nothing installed provides,
    ``settings`` override ``run_settings``. Built on paddle, base_model, dataset and run_settings.
    """

    def run(
        output_dir: str = "out",
        plugins: tuple[type, ...] = (),
        say: Callable[[str], None] | None = None,
        **settings: Any,
    ) -> sft.Summary:
        defaults = {
            "model_name_or_path": str(base_model),
            "dataset_name_or_path": str(dataset),
            "disable_tqdm": True,
            "output_dir": str(tmp_path / output_dir),
            **run_settings,
        }
        return sft.run({**defaults, **settings}, plugins=plugins, say=say or (lambda text: None))

    return run


@pytest.fixture
def adapt(train: Callable[..., sft.Summary]) -> Callable[..., sft.Run]:
    """``adapt(*plugins, **settings)``: a run that stands before its first step: its model is adapted and has learned
    nothing. Built on train."""

    class ReadyError(sft.SftError):
        pass

    def make(*plugins: type, **settings: Any) -> sft.Run:
        caught: list[sft.Run] = []

        class Catch(sft.Plugin):
            name = "catch"
            api_version = 1

            @sft.hookimpl
            def sft_run_started(self, run: sft.Run) -> None:
                caught.append(run)
                raise ReadyError

        with pytest.raises(ReadyError):
            train("adapted", (*plugins, Catch), overwrite_output_dir=True, do_eval=False, **settings)
        return caught[0]

    return make


@pytest.fixture(scope="session")
def logits_of() -> Callable[..., np.ndarray]:
    """:func:`forward`: ``logits_of(model, input_ids)``."""
    return forward


@pytest.fixture(scope="session")
def metrics() -> Callable[..., list[dict[str, Any]]]:
    """:func:`read_metrics`: ``metrics(folder, same=False)``."""
    return read_metrics


@pytest.fixture
def fresh_logits(tmp_path: Path) -> Callable[..., np.ndarray]:
    """``fresh_logits(model, adapter, input_ids)``: logits of a model directory, with an adapter folder over it or
    None, that a process of its own loads. What a user finds who has the files alone."""

    def compute(model: Path, adapter: Path | None, input_ids: np.ndarray) -> np.ndarray:
        given, found = tmp_path / "ids.npy", tmp_path / "logits.npy"
        np.save(given, input_ids)
        line = [sys.executable, "-c", _FRESH, str(model), str(adapter or ""), str(given), str(found)]
        subprocess.run(line, check=True, capture_output=True, timeout=100)
        return np.asarray(np.load(found))

    return compute


_FRESH = """
import sys
from pathlib import Path
import numpy as np
from sft.testing import forward, load
model, adapter, given, found = sys.argv[1:]
np.save(found, forward(load(model, Path(adapter) if adapter else None), np.load(given)))
"""
