"""An adapter over another base than the one that it was trained over: readers say so, and a resumed run refuses."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import sft
from sft.inference.merge import merge
from sft.inference.open import load_for_inference
from sft.models.adapter_folder import FINGERPRINT
from sft.testing import needs
from sft.training.manifest import write_manifest

Train = Callable[..., sft.Summary]
OTHER = "note: the adapter was trained over other weights than those of"


@pytest.fixture
def other(base_model: Path, tmp_path: Path) -> Path:
    """A base of the same shapes, in one tensor of which another training has left its mark."""
    folder = tmp_path / "elsewhere" / base_model.name
    shutil.copytree(base_model, folder)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.self_attn.q_proj.weight"
    save_file({**tensors, name: tensors[name] * np.float32(1.01)}, folder / "model.safetensors")
    return folder


@pytest.fixture
def stranger(train: Train, tmp_path: Path) -> Callable[..., Path]:
    """``stranger(name)``: an adapter as PEFT writes it, without a fingerprint, that names its base so."""

    def make(base: str | None) -> Path:
        train("made", max_steps=1, overwrite_output_dir=True)
        folder = tmp_path / "stranger"
        folder.mkdir()
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            shutil.copyfile(tmp_path / "made" / name, folder / name)
        values = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps({**values, "base_model_name_or_path": base}))
        save_file(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.safetensors")
        return folder

    return make


def notes(train: Train, **settings: object) -> list[str]:
    said: list[str] = []
    train("continued", say=said.append, overwrite_output_dir=True, max_steps=1, **settings)
    return [line for line in said if line.startswith("note: the adapter")]


def test_a_run_that_goes_on_from_an_adapter_compares_its_base(train: Train, other: Path, tmp_path: Path) -> None:
    train("first", max_steps=1)
    assert notes(train, lora_path=str(tmp_path / "first")) == []
    (note,) = notes(train, lora_path=str(tmp_path / "first"), model_name_or_path=str(other))
    assert note.startswith(f"{OTHER} {other} (its base was ")


@dataclass
class StretchOptions:
    stretch_factor: float = sft.option(2.0, "how much positions are stretched")


class Stretch(sft.Plugin):
    name = "stretch"
    api_version = 1
    Options = StretchOptions

    @sft.hookimpl
    def sft_model_config(self, run: sft.Run | None, config: Any) -> None:
        config.update(rope_scaling_type="linear", rope_scaling_factor=self.options.stretch_factor)


@pytest.mark.parametrize(
    ("plugins", "more", "option", "before", "now"),
    [
        pytest.param((Stretch,), {}, "stretch_factor", 2.0, 4.0, id="config"),
        pytest.param(
            (), {"plugin": ["lora", "nf4"]}, "qlora_weight_blocksize", 64, 32, id="quantizer", marks=needs("nf4")
        ),
    ],
)
def test_a_run_that_goes_on_from_an_adapter_compares_what_changed_its_base(
    train: Train, tmp_path: Path, plugins: tuple[type, ...], more: dict[str, Any], option: str, before: Any, now: Any
) -> None:
    train("first", plugins, max_steps=1, **more, **{option: before})
    more = {**more, "plugins": plugins, "lora_path": str(tmp_path / "first")}
    assert notes(train, **more, **{option: before}) == []
    (note,) = notes(train, **more, **{option: now})
    if not plugins:  # asked for in another way
        assert notes(train, **{**more, "plugin": "lora", "weight_quantize_algo": "nf4"}, **{option: before}) == []
    name = plugins[0].name if plugins else "nf4"
    assert note == (
        f"note: the adapter was trained over a base that plugin {name} changes with {option} {before}, and here "
        f"with {now}; over this base it means something else"
    )


def corners(folder: Path) -> str:
    """The fingerprint that adapters of earlier versions hold."""
    digest = hashlib.sha256()
    for name, tensor in sorted(load_file(folder / "model.safetensors").items()):
        corner = tensor[:8, :8] if tensor.ndim == 2 else tensor[:8]
        digest.update(name.encode() + b"\0" + np.ascontiguousarray(corner).tobytes())
    return digest.hexdigest()[:32]


def test_an_adapter_with_a_fingerprint_of_the_older_form_is_known(
    train: Train, base_model: Path, other: Path, tmp_path: Path
) -> None:
    """By readers, by a run that goes on from it, and by one that resumes."""
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    train("first", **settings)
    for folder in (tmp_path / "first", tmp_path / "first" / "checkpoint-1"):
        path = folder / "adapter_model.safetensors"
        save_file(load_file(path), path, metadata={"format": "pt", FINGERPRINT: corners(base_model)})
    write_manifest(tmp_path / "first" / "checkpoint-1")
    adapter = str(tmp_path / "first")
    assert notes(train, lora_path=adapter) == []
    (note,) = notes(train, lora_path=adapter, model_name_or_path=str(other))
    assert note.startswith(OTHER)
    settings |= {"resume_from_checkpoint": str(tmp_path / "first" / "checkpoint-1"), "max_steps": 2}
    train("again", **settings)
    with pytest.raises(sft.UsageError, match="was trained over other weights than"):
        train("another", model_name_or_path=str(other), **settings)


def test_an_adapter_without_a_fingerprint_is_told_by_the_base_that_it_names(
    train: Train, other: Path, base_model: Path, stranger: Callable[..., Path]
) -> None:
    """A folder that is here: the weights decide, and not where they are."""
    adapter = stranger(str(base_model))
    assert notes(train, lora_path=str(adapter)) == []
    (note,) = notes(train, lora_path=str(adapter), model_name_or_path=str(other))
    assert note.startswith(f"{OTHER} {other}")
    copy = other.parent / "another-name"
    shutil.copytree(base_model, copy)
    assert notes(train, lora_path=str(adapter), model_name_or_path=str(copy)) == []
    said: list[str] = []
    load_for_inference(str(other), adapter, said.append)
    assert sum(line.startswith(OTHER) for line in said) == 1


@pytest.mark.parametrize(
    ("named", "is_said"), [("some/{}", False), ("/nowhere/{}", False), ("some/other-7b", True), (None, False)]
)
def test_a_base_that_is_not_here_is_told_by_its_name(
    paddle: None, base_model: Path, stranger: Callable[..., Path], named: str | None, is_said: bool
) -> None:
    adapter = stranger(named and named.format(base_model.name.upper()))
    said: list[str] = []
    load_for_inference(str(base_model), adapter, said.append)
    found = [line for line in said if line.startswith("note:")]
    assert found == (
        [
            f"note: the adapter names some/other-7b as its base, and this is {base_model}; if the weights are not the "
            "same, it means something else over these"
        ]
        if is_said
        else []
    )


def test_a_base_that_cannot_be_read_is_told_by_its_name(
    paddle: None, base_model: Path, stranger: Callable[..., Path], tmp_path: Path
) -> None:
    """Whatever stands there: no user's folder, no path at all, a model of tensors that are none of a model's."""
    scalars, eights = tmp_path / "scalars", tmp_path / "eights"
    for folder in (scalars, eights):
        folder.mkdir()
        shutil.copyfile(base_model / "config.json", folder / "config.json")
    save_file({"model.norm.weight": np.zeros((), np.float32)}, scalars / "model.safetensors")
    header = json.dumps({"model.norm.weight": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}}).encode()
    (eights / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    adapter = stranger("some/other-7b")
    config = json.loads((adapter / "adapter_config.json").read_text())
    for named in ("~nosuchuser/x", "a\0b", "x" * 5000, str(scalars), str(eights)):
        (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": named}))
        said: list[str] = []
        load_for_inference(str(base_model), adapter, said.append)
        (note,) = (line for line in said if line.startswith("note:"))
        assert note.startswith(("note: the adapter names ", OTHER)), note


def test_a_base_in_the_hubs_cache_has_the_repositorys_name(
    paddle: None, base_model: Path, stranger: Callable[..., Path], tmp_path: Path
) -> None:
    snapshot = tmp_path / "hub" / "models--some--Tiny-1b" / "snapshots" / "c0ffee"
    shutil.copytree(base_model, snapshot)
    adapter = stranger("some/tiny-1b")
    said: list[str] = []
    load_for_inference(str(snapshot), adapter, said.append)
    assert not any(line.startswith("note:") for line in said)


def test_a_run_does_not_resume_over_another_base(train: Train, base_model: Path, tmp_path: Path) -> None:
    base = tmp_path / base_model.name
    shutil.copytree(base_model, base)
    settings = {"model_name_or_path": str(base), "save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    train("out", **settings)
    tensors = load_file(base / "model.safetensors")
    name = "model.layers.1.self_attn.q_proj.weight"
    save_file({**tensors, name: tensors[name] * np.float32(1.01)}, base / "model.safetensors")
    checkpoint = str(tmp_path / "out" / "checkpoint-2")
    for more in ({}, {"do_train": False}):
        with pytest.raises(
            sft.UsageError, match=r"checkpoint-2 holds an adapter that was trained over other weights than"
        ):
            train("again", resume_from_checkpoint=checkpoint, **{**settings, **more})
    assert not (tmp_path / "again").exists()
    save_file(tensors, base / "model.safetensors")
    train("again", resume_from_checkpoint=checkpoint, **settings)


@pytest.mark.parametrize("training", [True, False], ids=["resumed", "measured"])
def test_a_run_does_not_resume_with_another_scaling(train: Train, tmp_path: Path, training: bool) -> None:
    """That of the adapter in ``lora_path``, which somebody changed there since."""
    train("first", max_steps=1)
    settings = {"lora_path": str(tmp_path / "first"), "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    train("out", **settings)
    path = tmp_path / "first" / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "lora_alpha": 4 * config["lora_alpha"]}))
    again = {**settings, "resume_from_checkpoint": str(tmp_path / "out" / "checkpoint-2"), "do_train": training}
    message = (
        "The checkpoint was trained with the scaling 2 of model.layers.0.mlp.down_proj, and lora_path "
        f"{tmp_path / 'first'} has 8 now; put that back as it was, or start a new run."
    )
    with pytest.raises(sft.UsageError, match=f"^{re.escape(message)}$"):
        train("again", **again)
    assert not (tmp_path / "again").exists()
    path.write_text(json.dumps(config))
    train("again", **again)


def test_a_whole_model_resumes_without_its_base(train: Train, base_model: Path, tmp_path: Path) -> None:
    """All weights are in the checkpoint: the base may be another, and the end is the same."""
    base = tmp_path / base_model.name
    shutil.copytree(base_model, base)
    settings = {
        "model_name_or_path": str(base),
        "plugin": [],
        "save_strategy": "steps",
        "save_steps": 2,
        "max_steps": 4,
    }
    train("out", **settings)
    tensors = load_file(base / "model.safetensors")
    save_file({key: value * np.float32(1.5) for key, value in tensors.items()}, base / "model.safetensors")
    train("again", resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"), **settings)
    expected = load_file(tmp_path / "out" / "model.safetensors")
    found = load_file(tmp_path / "again" / "model.safetensors")
    assert all(np.array_equal(found[key], expected[key]) for key in expected)


def test_an_adapter_that_cannot_be_read_is_refused_before_the_data_is(train: Train, tmp_path: Path) -> None:
    train("first", max_steps=1)
    path = tmp_path / "first" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    (tmp_path / "train.json").write_text("{")
    with pytest.raises(sft.UsageError, match="is not a readable safetensors file"):
        train("continued", lora_path=str(tmp_path / "first"), dataset_name_or_path=str(tmp_path))


@needs("nf4")
def test_readers_compare_what_quantized_the_base(train: Train, base_model: Path, tmp_path: Path) -> None:
    """Left out, or added: generate, chat, evaluate and merge, which all open the adapter through these two."""
    train("plain", max_steps=1)
    train("coded", plugin=["lora", "nf4"], max_steps=1)
    ends = "; over this base it means something else"
    for name, requested, expected in (
        ("plain", [], []),
        ("coded", [], []),
        ("coded", ["no:nf4"], ["a base that plugin nf4 changes, and here it is not active"]),
        ("plain", ["nf4"], ["a base that plugin nf4 had not changed, and here it does"]),
    ):
        told: list[list[str]] = [[], []]
        load_for_inference(str(base_model), tmp_path / name, told[0].append, requested)
        merged = tmp_path / f"merged-{name}-{len(requested)}"
        merge(str(base_model), tmp_path / name, merged, told[1].append, requested)
        notes = [f"note: the adapter was trained over {clause}{ends}" for clause in expected]
        assert [[line for line in said if line.startswith("note:")] for said in told] == [notes, notes]


@needs("nf4")
def test_of_a_strangers_base_nobody_knows_what_changed_it(
    train: Train, base_model: Path, stranger: Callable[..., Path]
) -> None:
    """PEFT's QLoRA adapters do not say: the user names the quantizer, and is not told that it had not been there."""
    said: list[str] = []
    load_for_inference(str(base_model), stranger(str(base_model)), said.append, ["nf4"])
    assert not [line for line in said if line.startswith("note:")]
