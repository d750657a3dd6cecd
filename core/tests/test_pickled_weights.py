"""Pickled weights: a model brings tensors and never code, and nothing of it is read beyond its folder."""

from __future__ import annotations

import http.server
import json
import os
import pickle
import shutil
import threading
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import click.testing
import numpy as np
import pytest
from model_folders import TOLERANCE, largest_difference, own_logits, reference
from safetensors.numpy import load_file, save_file

import sft
from sft.inference.open import load_for_inference
from sft.models.adapter_folder import read_adapter

CASE = "llama-tied-gqa"
COMMANDS = ("run", "generate", "evaluate", "merge")


class Evil:
    """Writes a file as soon as somebody unpickles it; ``os.mkdir`` stands for whatever an author likes."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.proof),)


@pytest.fixture
def hostile(variant: Callable[..., Path], tmp_path: Path) -> Iterator[Path]:
    """A model folder without weights, and the test that nothing was run: ``tmp_path/proof`` is not there."""
    folder = variant(CASE)
    (folder / "model.safetensors").unlink()
    yield folder
    assert not (tmp_path / "proof").exists(), "the model's code was run"


@pytest.fixture
def opened(paddle: Any, dataset: Path, tmp_path: Path) -> Callable[..., Any]:
    """``opened(command, model, *arguments)``: the command of that name typed in this process; errors are raised."""
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}'
    )
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    zeros = {f"{name}A.weight": np.zeros((2, 32), np.float32), f"{name}B.weight": np.zeros((32, 2), np.float32)}
    save_file(zeros, adapter / "adapter_model.safetensors")

    def run(command: str, model: str | Path, *arguments: str) -> click.testing.Result:
        line = ["--model_name_or_path", str(model), *arguments]
        if command in ("run", "evaluate"):
            line += ["--dataset_name_or_path", str(dataset)]
        if command == "run":
            line += ["--output_dir", str(tmp_path / "out"), "--max_steps", "1", "--do_eval", "false"]
        if command == "generate":
            line += ["--prompt", "coat", "--max_new_tokens", "2"]
        if command == "merge":
            line += ["--lora_path", str(adapter), "--output_path", str(tmp_path / "merged")]
        return click.testing.CliRunner().invoke(
            import_module(f"sft.commands.{command}").command, line, standalone_mode=False, catch_exceptions=False
        )

    return run


def write_index(folder: Path, names: Any, index: str = "model.safetensors.index.json") -> None:
    (folder / index).write_text(json.dumps({"weight_map": names}))


# --- a model that brings code -------------------------------------------------------------------------------


def by_text_file(folder: Path, proof: Path) -> None:
    (folder / "merges.txt").write_bytes(pickle.dumps(Evil(proof)))
    write_index(folder, {"x": "merges.txt"})


def by_pdparams(folder: Path, proof: Path) -> None:
    (folder / "model_state.pdparams").write_bytes(pickle.dumps(Evil(proof)))


def by_bin(folder: Path, proof: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(proof)))


def by_index_of_pdparams(folder: Path, proof: Path) -> None:
    (folder / "a.pdparams").write_bytes(pickle.dumps(Evil(proof)))
    write_index(folder, {"x": "a.pdparams"}, "model_state.pdparams.index.json")


def by_relative_path(folder: Path, proof: Path) -> None:
    (folder.parent / "outside.bin").write_bytes(pickle.dumps(Evil(proof)))
    write_index(folder, {"x": "../outside.bin"})


def by_absolute_path(folder: Path, proof: Path) -> None:
    (folder.parent / "outside.safetensors").write_bytes(pickle.dumps(Evil(proof)))
    write_index(folder, {"x": str(folder.parent / "outside.safetensors")})


HOSTILE: dict[str, tuple[Callable[[Path, Path], None], str]] = {
    "text-file": (
        by_text_file,
        r"names 'merges\.txt' as a file of weights, where only the name of a \.safetensors file",
    ),
    "pdparams": (
        by_pdparams,
        r"weights in model_state\.pdparams alone, a pickle, .* allow_pickle true .* with PaddleNLP: Auto",
    ),
    "bin": (
        by_bin,
        r"weights in pytorch_model\.bin alone, a pickle, .*convert it to safetensors with transformers: Auto",
    ),
    "index-of-pdparams": (by_index_of_pdparams, r"weights in model_state\.pdparams\.index\.json alone"),
    "relative-path": (by_relative_path, r"names '\.\./outside\.bin' as a file of weights"),
    "absolute-path": (by_absolute_path, r"names '/.*/outside.* as a file of weights"),
}


@pytest.mark.parametrize("way", HOSTILE)
@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_runs_what_a_model_brings(
    opened: Callable[..., Any], hostile: Path, tmp_path: Path, command: str, way: str
) -> None:
    if command == "merge":
        pytest.importorskip("sft_peft_lora")
    make, message = HOSTILE[way]
    make(hostile, tmp_path / "proof")
    with pytest.raises(sft.UsageError, match=message) as caught:
        opened(command, hostile)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("way", ["allowed", "named"])
def test_pickles_that_the_user_asks_for_run_nothing_either(
    opened: Callable[..., Any], hostile: Path, tmp_path: Path, command: str, way: str
) -> None:
    if command == "merge":
        pytest.importorskip("sft_peft_lora")
    by_pdparams(hostile, tmp_path / "proof")
    model = [hostile, "--allow_pickle"] if way == "allowed" else [hostile / "model_state.pdparams"]
    with pytest.raises(
        sft.UsageError, match=r"model_state\.pdparams calls posix\.mkdir, where weights have nothing but"
    ):
        opened(command, *model)


@pytest.mark.parametrize(
    "names", [{"x": 1}, {"x": None}, {"x": ["a.safetensors"]}, ["x"], None, {"x": "\ud800"}, {"x": ""}]
)
def test_an_index_of_other_types_is_a_sentence(paddle: Any, hostile: Path, names: Any) -> None:
    write_index(hostile, names)
    with pytest.raises(sft.UsageError, match=r"index\.json (names .* as a file of weights|is not an index of weights)"):
        load_for_inference(str(hostile), None, print)


@pytest.mark.parametrize("name", ["model_state.pdparams", "pytorch_model.bin"])
def test_an_index_that_is_allowed_stays_in_its_folder(paddle: Any, hostile: Path, tmp_path: Path, name: str) -> None:
    suffix = Path(name).suffix
    (tmp_path / f"outside{suffix}").write_bytes(pickle.dumps({}))
    write_index(hostile, {"x": f"../outside{suffix}"}, f"{name}.index.json")
    with pytest.raises(sft.UsageError, match=rf"names '\.\./outside\{suffix}' as a file of weights"):
        load_for_inference(str(hostile), None, print, allow_pickle=True)


# --- the hub ------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Path], list[str]]]:
    """``hub(folder)``: a server on this machine whose model ``some/model`` is ``folder``; what was fetched."""
    import huggingface_hub.constants as constants

    fetched: list[str] = []
    served: list[Path] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            if self.path.startswith("/api/models/some/model"):
                files = [{"rfilename": path.name} for path in sorted(served[0].iterdir())]
                content = json.dumps({"id": "some/model", "sha": "c" * 40, "siblings": files}).encode()
            else:
                name = self.path.rpartition("/")[2]
                fetched.append(name)
                content = (served[0] / name).read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("X-Repo-Commit", "c" * 40)
            self.send_header("ETag", f'"{hash(self.path) & (2**63 - 1):x}"')
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    for name, value in {
        "ENDPOINT": address,
        "HUGGINGFACE_CO_URL_TEMPLATE": address + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_HUB_OFFLINE": False,
    }.items():
        monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr(f"huggingface_hub.file_download.{name}", value, raising=False)

    def serve(folder: Path) -> list[str]:
        served[:] = [folder]
        return fetched

    yield serve
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("way", ["text-file", "pdparams", "relative-path"])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_hostile_hub_repository_runs_nothing(
    opened: Callable[..., Any], hub: Any, hostile: Path, tmp_path: Path, command: str, way: str
) -> None:
    if command == "merge":
        pytest.importorskip("sft_peft_lora")
    make, message = HOSTILE[way]
    make(hostile, tmp_path / "proof")
    fetched = hub(hostile)
    if way == "pdparams":  # it is not even fetched
        message = r"has no weights; it needs model\.safetensors .* with allow_pickle true"
    with pytest.raises(sft.UsageError, match=message):
        opened(command, "some/model")
    assert "config.json" in fetched
    assert "model_state.pdparams" not in fetched


def test_the_hubs_links_are_followed_and_its_pickles_fetched_where_they_are_allowed(
    paddle: Any, hub: Any, hostile: Path, models: Path, tmp_path: Path
) -> None:
    """A snapshot's files are links to ../../blobs."""
    shutil.copyfile(models / CASE / "model.safetensors", hostile / "model.safetensors")
    fetched = hub(hostile)
    model, tokenizer = load_for_inference("some/model", None, lambda text: None)
    assert (tokenizer.folder / "model.safetensors").is_symlink()
    input_ids, expected = reference(models / CASE)
    assert largest_difference(own_logits(model, input_ids), expected) < TOLERANCE

    (hostile / "model.safetensors").unlink()
    by_pdparams(hostile, tmp_path / "proof")
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(sft.UsageError, match=r"model_state\.pdparams calls posix\.mkdir"):
        load_for_inference("some/model", None, lambda text: None, allow_pickle=True)
    assert "model_state.pdparams" in fetched


def test_the_weights_of_a_hub_model_that_cannot_be_used_are_not_fetched(
    opened: Callable[..., Any], hub: Any, models: Path, variant: Callable[..., Path]
) -> None:
    fetched = hub(variant(CASE, model_type="mamba"))
    for command in ("run", "generate", "evaluate"):
        with pytest.raises(sft.UsageError, match="model_type 'mamba' is not a family"):
            opened(command, "some/model")
    assert set(fetched) == {"config.json"}


# --- weights that are read ----------------------------------------------------------------------------------


def paddle_state(folder: Path) -> dict[str, np.ndarray]:
    """A case's tensors as PaddleNLP names and stores them."""
    found = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        renamed = name.replace("model.", "llama.", 1)
        found[renamed] = np.ascontiguousarray(tensor.T) if name.endswith("_proj.weight") else tensor
    return found


@pytest.mark.parametrize("command", ["run", "generate", "evaluate"])
@pytest.mark.parametrize("way", ["allowed", "named", "index"])
def test_pickled_weights_are_read_where_they_are_asked_for(
    paddle: Any, opened: Callable[..., Any], hostile: Path, models: Path, command: str, way: str
) -> None:
    state = {name: paddle.to_tensor(value) for name, value in paddle_state(models / CASE).items()}
    paddle.save(state, str(hostile / "model_state.pdparams"))
    arguments: list[Any] = {
        "allowed": [hostile, "--allow_pickle", "true"],
        "named": [hostile / "model_state.pdparams"],
        "index": [hostile / "model_state.pdparams.index.json"],
    }[way]
    if way == "index":
        write_index(hostile, dict.fromkeys(state, "model_state.pdparams"), "model_state.pdparams.index.json")
    plain = ["--device", "cpu"] if command == "run" else []
    found, expected = opened(command, *arguments, *plain), None
    if command != "run":
        expected = opened(command, models / CASE)
        assert found.stdout == expected.stdout
        assert found.stdout.strip()


def test_safetensors_win_over_pickles_that_are_allowed(
    paddle: Any, variant: Callable[..., Path], models: Path, tmp_path: Path
) -> None:
    folder = variant(CASE)
    by_pdparams(folder, tmp_path / "proof")
    by_bin(folder, tmp_path / "proof")
    model, _ = load_for_inference(str(folder), None, lambda text: None, allow_pickle=True)
    input_ids, expected = reference(models / CASE)
    assert largest_difference(own_logits(model, input_ids), expected) < TOLERANCE
    assert not (tmp_path / "proof").exists()


def test_a_pickled_adapter_is_refused_with_the_cure(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(sft.UsageError, match=r"adapter_model\.bin is a pickle, which is not read; write it with PEFT"):
        read_adapter(tmp_path)
