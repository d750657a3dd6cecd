"""What a model, an adapter or a hub name says leads nowhere but into its own folder, and a revision is kept."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import sft
from sft.data.tokenizer import Tokenizer
from sft.hub_names import commit_of, is_hub_name, split
from sft.models import source as sources
from sft.models.adapter_folder import read_adapter
from sft.models.loading import open_model
from sft.settings.arguments import ModelArguments

MODEL = "llama-tied-gqa"
COMMIT = "0123456789abcdef" * 2 + "01234567"
PATHS = (
    *(
        "../x{}",
        "/etc/x{}",
        "a/x{}",
        "..\\x{}",
        "C:x{}",
        "\\\\host\\share\\x{}",
        "x\0{}",
        "x\n{}",
        "\x1b[2Jx{}",
        "x\u202e{}",
    ),
    *("~/x{}", "..", "", "x" * 300 + "{}"),
)


@pytest.fixture
def folder(models: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(models / MODEL, tmp_path / "model"))


@pytest.mark.parametrize("name", PATHS)
def test_an_index_names_files_beside_itself(folder: Path, name: str) -> None:
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": name.format(".safetensors")}}))
    with pytest.raises(sft.UsageError, match="as a file of weights, where only the name of") as caught:
        open_model(folder)
    assert "\x1b" not in str(caught.value)
    assert "\u202e" not in str(caught.value)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"])
def test_links_that_lead_out_of_a_model(folder: Path, name: str, tmp_path: Path) -> None:
    (folder / name).rename(tmp_path / "secret")
    (folder / name).symlink_to("../secret")
    with pytest.raises(
        sft.UsageError, match=r"is a link that leads out of its folder, to .*secret; copy the file there"
    ):
        open_model(folder)
    if name.startswith("tokenizer"):
        with pytest.raises(sft.UsageError, match="is a link that leads out of its folder"):
            Tokenizer(sources.find_tokenizer(str(folder)))


def test_links_that_stay(folder: Path) -> None:
    (folder / "sub").mkdir()
    (folder / "model.safetensors").rename(folder / "sub" / "model.safetensors")
    (folder / "model.safetensors").symlink_to("sub/model.safetensors")
    (folder / "README.md").symlink_to("/etc/hostname")  # nobody reads it
    assert open_model(folder).weights().shape("model.norm.weight")


def test_an_adapter_with_a_link(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("{}")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (adapter / "adapter_model.safetensors").symlink_to("../secret")
    with pytest.raises(sft.UsageError, match="is a link that leads out of its folder"):
        read_adapter(adapter)


@pytest.fixture
def cached(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[tuple[Any, Any]]]:
    """The hub, and its cache as huggingface_hub lays it out; what has been asked of it, with the revision."""
    repository = tmp_path / "models--some-owner--some-model"
    (repository / "blobs").mkdir(parents=True)
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    for path in (models / MODEL).iterdir():
        shutil.copy(path, repository / "blobs" / f"blob-{path.name}")
        (snapshot / path.name).symlink_to(f"../../blobs/blob-{path.name}")
    asked: list[tuple[Any, Any]] = []

    def download(name: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((name, revision))
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    return lambda: asked


def test_weights_come_from_the_state_whose_config_was_read(cached: Callable[[], list[tuple[Any, Any]]]) -> None:
    assert open_model("some-owner/some-model").weights().shape("model.norm.weight")
    assert cached() == [("some-owner/some-model", None), ("some-owner/some-model", COMMIT)]


@pytest.mark.parametrize("given", [{"model_revision": "v1.0"}, {"model_name_or_path": "some-owner/some-model@v1.0"}])
def test_a_run_keeps_the_revision_and_the_commit(
    cached: Callable[[], list[tuple[Any, Any]]],
    train: Callable[..., sft.Summary],
    tmp_path: Path,
    given: dict[str, str],
) -> None:
    train(**{"model_name_or_path": "some-owner/some-model", "max_steps": 1, "do_eval": False, **given})
    assert set(cached()) == {("some-owner/some-model", "v1.0"), ("some-owner/some-model", COMMIT)}
    record = json.loads((tmp_path / "out" / "run.json").read_text(encoding="utf-8"))
    assert record["settings"]["model_name_or_path"] == "some-owner/some-model"
    assert record["settings"]["model_revision"] == "v1.0"
    assert record["hub"]["model"] == f"some-owner/some-model@{COMMIT}"


def test_revisions() -> None:
    assert split("a/b@refs/pr/1") == ("a/b", "refs/pr/1")
    assert ModelArguments("a/b").place == "a/b"
    assert ModelArguments("a/b", "v1").place == ModelArguments("a/b@v1").place == ModelArguments("a/b@v1", "v1").place
    with pytest.raises(sft.UsageError, match="says revision v1, and model_revision v2; leave one of them out"):
        ModelArguments("a/b@v1", "v2")
    with pytest.raises(sft.UsageError, match="expected a branch, a tag or a commit, got"):
        ModelArguments("a/b", "../../x")
    with pytest.raises(sft.UsageError, match="model_revision does nothing for /tmp, which is no name on the hub"):
        assert ModelArguments("/tmp", "v1").place
    assert commit_of(Path("/x/models--a--b/snapshots/v1")) is None
    assert commit_of(Path("/x/a")) is None


@pytest.mark.parametrize(
    "name",
    [
        "../x",
        "a/..",
        "a/../b",
        "a/.b",
        "/a/b",
        "a/b/c",
        "a\\b/c",
        "a/b\0",
        "a/b\n",
        "a/b@../../c",
        "a/b@",
        "a/b@\0",
        "C:/b",
    ],
)
def test_what_is_no_hub_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: pytest.fail("asked the hub"))
    assert not is_hub_name(name)
    with pytest.raises(sft.UsageError, match="does not exist"):
        sources.find_model(name)


def test_a_folder_of_a_template_with_a_link(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("a secret")
    other = tmp_path / "other"
    other.mkdir()
    (other / "chat_template.jinja").symlink_to("../secret")
    with pytest.raises(sft.UsageError, match="is a link that leads out of its folder"):
        Tokenizer(folder, chat_template=str(other))
