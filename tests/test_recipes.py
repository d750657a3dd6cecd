"""Plugins that pages show, in use; those of the kit's pages are in test_kit_pages.py."""

from __future__ import annotations

import fcntl
import json
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from installing import install, python
from shown_plugins import SHOWN, blocks

import sft
from sft.inference.export import export
from sft.inference.merge import merge
from sft.testing import check_plugin, needs, read_metrics

pytestmark = pytest.mark.slow

Train = Callable[..., sft.Summary]


@pytest.fixture
def site(tmp_path: Path) -> Callable[[str, str], Path]:
    """A folder in which the plugin of a name is installed, with the metadata that a page shows of it."""

    def make(name: str, page: str) -> Path:
        module = f"sft_{name.replace('-', '_')}"
        (metadata,) = (text for text in blocks(page, "toml") if module in text)
        source = tmp_path / "package" / "src"
        source.mkdir(parents=True)
        (source / f"{module}.py").write_text(SHOWN[name], encoding="utf-8")
        project = f'[project]\nname = "sft-{name}"\nversion = "1.0"\ndescription = "{name}"\n\n{metadata}'
        if '"sft.plugins"' not in metadata:
            (class_,) = re.findall(r"^class (\w+)\(sft\.Plugin\)", SHOWN[name], re.MULTILINE)
            project += f'\n[project.entry-points."sft.plugins"]\n{name} = "{module}:{class_}"\n'
        (source.parent / "pyproject.toml").write_text(project, encoding="utf-8")
        (tmp_path / "site").mkdir()
        install(source.parent, tmp_path / "site")
        return tmp_path / "site"

    return make


def losses(summary: sft.Summary) -> list[float]:
    return [line["loss"] for line in read_metrics(summary.output_dir) if "loss" in line]


def tensors_of(folder: Path, file: str = "model.safetensors") -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return load_file(folder / file)


def quiet(text: str) -> None: ...


# --- adapters -----------------------------------------------------------------------------------------------


def norm_of(difference: dict[str, np.ndarray]) -> float:
    return float(np.sqrt(sum(np.square(one.astype(np.float64)).sum() for one in difference.values())))


@needs("lora", "gguf")
def test_half_of_an_adapter_is_folded_in_and_exported(
    written: Callable[[str], str], train: Train, base_model: Path, tmp_path: Path
) -> None:
    reader = pytest.importorskip("gguf").GGUFReader
    done = train("out", plugin=["lora"], max_steps=3)
    base, half = str(base_model), written("at-half")
    for name, plugins in (("whole", []), ("half", [half])):
        merge(base, done.output_dir, tmp_path / name, quiet, plugins)
        export(base, done.output_dir, "gguf-lora", tmp_path / f"gguf-{name}", quiet, plugins)
    stored, whole, halved = (tensors_of(folder) for folder in (base_model, tmp_path / "whole", tmp_path / "half"))
    changed = [name for name in whole if not np.array_equal(whole[name], stored[name])]
    assert changed
    for name in changed:
        np.testing.assert_allclose(halved[name] - stored[name], (whole[name] - stored[name]) / 2, atol=1e-7)
    pairs = [
        {tensor.name: np.array(tensor.data) for path in folder.glob("*.gguf") for tensor in reader(path).tensors}
        for folder in (tmp_path / "gguf-whole", tmp_path / "gguf-half")
    ]
    assert any(name.endswith("lora_b") for name in pairs[0])
    for name, value in pairs[0].items():
        np.testing.assert_array_equal(pairs[1][name], value / 2 if name.endswith("lora_b") else value)


@needs("lora")
@pytest.mark.timeout(300)
def test_olora_begins_at_the_decomposition_and_keeps_what_an_adapter_must(
    written: Callable[[str], str], train: Train, base_model: Path
) -> None:
    begun: dict[str, Any] = {}

    class Look(sft.Plugin):
        name = "look"
        api_version = 1

        @sft.hookimpl
        def sft_run_started(self, run: sft.Run) -> None:
            begun.update({name: (layer.lora_A.numpy(), layer.lora_B.numpy(), layer.scaling)
                          for name, layer in run.model.named_sublayers() if hasattr(layer, "lora_A")})  # fmt: skip

    train("out", (Look,), plugin=["lora", written("olora")], max_steps=1, lora_rank=4)
    stored = tensors_of(base_model)
    for name, (a, b, scaling) in begun.items():
        q, r = np.linalg.qr(stored[f"{name}.weight"])
        assert scaling == 1.0
        # As HF PEFT has it (peft.tuners.lora.layer, olora_init): lora_B = Q[:, :r], lora_A = R[:r].
        np.testing.assert_allclose(b.T, q[:, :4], atol=1e-5)
        np.testing.assert_allclose(a.T, r[:4], atol=1e-5)
    assert begun
    check_plugin(written("olora"), "begins as its base", "reloads", "merges", "resumes", "is in pefts layout")


@needs("lora")
@pytest.mark.timeout(300)
def test_the_gain_trains_and_keeps_what_an_adapter_must(written: Callable[[str], str], train: Train) -> None:
    gain = written("output-gain")
    done = train("out", plugin=["lora", gain], max_steps=3)
    tensors = tensors_of(done.output_dir, "adapter_model.safetensors")
    assert json.loads((done.output_dir / "adapter_config.json").read_text())["use_output_gain"] is True
    assert all(tensor.any() for name, tensor in tensors.items() if name.endswith("lora_output_gain"))
    check_plugin(gain, "begins as its base", "trains what it should", "reloads", "merges", "resumes")


# --- kernels, launching -------------------------------------------------------------------------------------


def test_wide_norms_compute_what_the_core_computes(written: Callable[[str], str], train: Train, paddle: Any) -> None:
    used: list[Any] = []

    class Look(sft.Plugin):
        name = "look"
        api_version = 1

        @sft.hookimpl
        def sft_run_started(self, run: sft.Run) -> None:
            used.append(run.model.kernels)

    wide = losses(train("wide", (Look,), plugin=[written("wide-norms")]))
    assert wide == pytest.approx(losses(train("plain", plugin=["no:fast-cpu"])), rel=1e-5)
    x, weight = np.random.default_rng(0).standard_normal((2, 5, 64)).astype(np.float32)
    exact = x.astype(np.float64) / np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + 1e-6) * weight[0]
    normed = used[0].rms_norm(paddle.to_tensor(x), paddle.to_tensor(weight[0]), 1e-6, 0.0).numpy()
    np.testing.assert_array_equal(normed, exact.astype(np.float32))


def test_a_run_waits_until_the_other_one_has_ended(written: Callable[[str], str], train: Train, tmp_path: Path) -> None:
    said: list[str] = []
    waits = threading.Event()

    def say(text: str) -> None:
        said.append(text)
        if text.startswith("waiting for another run"):
            waits.set()

    place = tmp_path / "queue.lock"
    settings = {"plugin": [written("one-at-a-time")], "queue_file": str(place), "max_steps": 1}
    with place.open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        done: list[sft.Summary] = []
        run = threading.Thread(target=lambda: done.append(train("out", say=say, **settings)))
        run.start()
        assert waits.wait(30)
        assert not (tmp_path / "out" / "metrics.jsonl").exists()
        fcntl.flock(other, fcntl.LOCK_UN)
        run.join(60)
    assert losses(done[0])
    assert said[0] == f"waiting for another run ({place})"


# --- what needs metadata ------------------------------------------------------------------------------------


def test_the_command_prints_the_losses(site: Callable[[str, str], Path], train: Train, tmp_path: Path) -> None:
    done = train("out", max_steps=2, logging_steps=1)
    place = site("losses", "docs/recipes.md")
    ended = python(tmp_path, place, "-m", "sft", "losses", "out")
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines() == [f"{step} {loss:.4f}" for step, loss in enumerate(losses(done), 1)]
    assert "Print step and loss" in python(tmp_path, place, "-m", "sft", "losses", "--help").stdout


def test_a_run_that_goes_on_is_said_to_need_what_it_took(
    site: Callable[[str, str], Path], train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = site("as-before", "docs/recipes.md")
    monkeypatch.syspath_prepend(str(place))
    monkeypatch.setenv("SFT_DISABLE_PLUGINS", "parallel-4d")
    settings = {"per_device_train_batch_size": 4, "save_strategy": "steps", "save_steps": 1}
    first: list[str] = []
    done = train("out", say=first.append, max_steps=1, **settings)
    assert "  memory " not in "\n".join(first)
    peak = max(line["peak_memory_mib"] for line in read_metrics(done.output_dir) if "loss" in line)
    again: list[str] = []

    class Full(sft.Plugin):
        name = "full"
        api_version = 1

        @sft.hookimpl
        def sft_run_started(self, run: sft.Run) -> None:
            raise MemoryError

    with pytest.raises(sft.SftError, match="_batch_size 2 --gradient_accumulation_steps 2 keeps half"):
        train("out", (Full,), max_steps=2, resume_from_checkpoint="auto", **settings)
    train("out", say=again.append, max_steps=2, resume_from_checkpoint="auto", **settings)
    assert f"  memory      about {peak / 1024:.2f} GiB of " in "\n".join(again)


# --- trackers -----------------------------------------------------------------------------------------------


def test_a_run_says_which_job_it_was(
    written: Callable[[str], str], train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_NODELIST", "PBS_JOBID"):
        monkeypatch.delenv(name, raising=False)
    for job in ("", "4711"):
        if job:
            monkeypatch.setenv("SLURM_JOB_ID", job)
        done = train(f"out{job}", plugin=[written("job-of")], max_steps=1)
        report = json.loads((done.output_dir / "run.json").read_text(encoding="utf-8"))
        assert report.get("of_plugins") == ({"job-of": {"SLURM_JOB_ID": job}} if job else None)


def test_the_shared_log_has_each_line_and_says_where_a_run_goes_on(
    written: Callable[[str], str], train: Train, tmp_path: Path
) -> None:
    log = tmp_path / "all.jsonl"
    settings = {
        "plugin": [written("shared-log")],
        "shared_log_file": str(log),
        "logging_steps": 1,
        "save_strategy": "steps",
    }
    done = train("out", max_steps=2, save_steps=1, **settings)
    lines = [json.loads(text) for text in log.read_text().splitlines()]
    assert [{key: value for key, value in line.items() if key != "run"} for line in lines] == read_metrics(
        done.output_dir
    )
    assert {line["run"] for line in lines} == {str(done.output_dir)}
    train("on", max_steps=2, resume_from_checkpoint=str(done.output_dir / "checkpoint-1"), **settings)
    later = [json.loads(text) for text in log.read_text().splitlines()][len(lines) :]
    assert later[0]["goes_on_from"] == 1
    assert [line["step"] for line in later if "loss" in line] == [2]


def test_report_to_asks_for_the_shared_log(
    site: Callable[[str, str], Path], train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(site("shared-log", "docs/trackers.md")))
    log = tmp_path / "all.jsonl"
    train("out", report_to="shared-log", shared_log_file=str(log), max_steps=1)
    assert log.read_text().count('"loss"') == 1
