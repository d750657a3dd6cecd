"""Files that are complete or not there, whatever goes wrong while they are written."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sft
from sft import files


def tree(folder: Path) -> dict[str, str | None]:
    """Every path under ``folder``: a file's text, None for a folder."""
    return {
        str(path.relative_to(folder)): path.read_text(encoding="utf-8") if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


class CutOffError(Exception):
    """The end of the process, as it were."""


# --- single files -------------------------------------------------------------------------------------------


def test_text_replaces_what_was_there(tmp_path: Path) -> None:
    files.write_text(tmp_path / "a.txt", "first, and longer")
    files.write_text(tmp_path / "a.txt", "好")
    assert tree(tmp_path) == {"a.txt": "好"}


def test_json_is_readable_by_people(tmp_path: Path) -> None:
    files.write_json(tmp_path / "a.json", {"b": [1, "好"], "a": None})
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == (
        '{\n  "b": [\n    1,\n    "好"\n  ],\n  "a": null\n}\n'
    )


def test_a_value_that_is_no_json_leaves_the_old_file(tmp_path: Path) -> None:
    files.write_json(tmp_path / "a.json", {"kept": True})
    with pytest.raises(TypeError):
        files.write_json(tmp_path / "a.json", {"set": {1, 2}})
    assert json.loads((tmp_path / "a.json").read_text()) == {"kept": True}
    assert list(tree(tmp_path)) == ["a.json"]


def test_a_write_that_is_cut_off_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files.write_text(tmp_path / "a.txt", "old")

    def fsync(handle: int) -> None:
        raise CutOffError

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(CutOffError):
        files.write_text(tmp_path / "a.txt", "new")
    monkeypatch.undo()
    assert (tmp_path / "a.txt").read_text() == "old"
    files.remove_leftovers(tmp_path)
    assert tree(tmp_path) == {"a.txt": "old"}


# --- whole folders ------------------------------------------------------------------------------------------


def test_a_folder_appears_when_it_is_complete(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "folder"
    with files.staged_folder(target) as staging:
        (staging / "a").write_text("1")
        (staging / "inner").mkdir()
        (staging / "inner" / "b").write_text("2")
        assert not target.exists()
        assert staging.parent == target.parent  # a rename does not cross file systems
    assert tree(tmp_path) == {"deep": None, "deep/folder": None, "deep/folder/a": "1", "deep/folder/inner": None} | {
        "deep/folder/inner/b": "2"
    }


def test_everything_is_on_the_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files in inner folders too: after a power cut a named folder must not hold empty files."""
    synced: list[str] = []
    order: list[str] = []
    own_sync, own_rename = files.sync, os.rename

    def sync(path: Path) -> None:
        synced.append(path.name)
        order.append("sync")
        own_sync(path)

    def rename(source: Any, target: Any) -> None:
        assert set(synced) == {"a", "inner", "b", ".staging-folder"}
        order.append("rename")
        own_rename(source, target)

    monkeypatch.setattr(files, "sync", sync)
    monkeypatch.setattr(os, "rename", rename)
    with files.staged_folder(tmp_path / "folder") as staging:
        (staging / "a").write_text("1")
        (staging / "inner").mkdir()
        (staging / "inner" / "b").write_text("2")
    assert order == ["sync"] * 4 + ["rename", "sync"]  # the last one: the folder that holds the name


def test_a_folder_that_failed_never_was(tmp_path: Path) -> None:
    def fail() -> None:
        with files.staged_folder(tmp_path / "folder") as staging:
            (staging / "a").write_text("1")
            raise CutOffError

    with pytest.raises(CutOffError):
        fail()
    assert tree(tmp_path) == {}


def test_an_empty_folder_may_be_filled(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with files.staged_folder(tmp_path / "folder") as staging:
        (staging / "a").write_text("1")
    assert tree(tmp_path) == {"folder": None, "folder/a": "1"}


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_is_there_already_is_not_replaced(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "target"
    if kind == "folder":
        target.mkdir()
        (target / "mine").write_text("0")
    else:
        target.write_text("0")
    before = tree(tmp_path)
    with pytest.raises(sft.UsageError, match="already exists and is not empty"), files.staged_folder(target):
        pytest.fail("the block must not run")
    assert tree(tmp_path) == before


def test_a_stale_staging_folder_is_begun_anew(tmp_path: Path) -> None:
    (tmp_path / ".staging-folder").mkdir()
    (tmp_path / ".staging-folder" / "half").write_text("?")
    with files.staged_folder(tmp_path / "folder") as staging:
        (staging / "a").write_text("1")
    assert tree(tmp_path) == {"folder": None, "folder/a": "1"}


# --- into a folder that is in use ---------------------------------------------------------------------------


def test_published_files_replace_their_namesakes_alone(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    (tmp_path / "other").write_text("kept")
    with files.publish(tmp_path) as staging:
        (staging / "a").write_text("new")
        (staging / "b").write_text("2")
        assert (tmp_path / "a").read_text() == "old"
        assert not (tmp_path / "b").exists()
    assert tree(tmp_path) == {"a": "new", "b": "2", "other": "kept"}


def test_nothing_is_published_when_it_failed(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")

    def fail() -> None:
        with files.publish(tmp_path) as staging:
            (staging / "a").write_text("new")
            raise CutOffError

    with pytest.raises(CutOffError):
        fail()
    assert tree(tmp_path) == {"a": "old"}


# --- removing -----------------------------------------------------------------------------------------------


def test_a_folder_that_could_not_be_removed_whole_has_lost_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half a checkpoint under a checkpoint's name would be resumed from."""
    folder = tmp_path / "checkpoint-3"
    folder.mkdir()
    (folder / "a").write_text("1")
    with monkeypatch.context() as patch:
        patch.setattr(files.shutil, "rmtree", lambda path, ignore_errors=False: None)
        files.remove_folder(folder)
    assert tree(tmp_path) == {".staging-removed-checkpoint-3": None, ".staging-removed-checkpoint-3/a": "1"}
    folder.mkdir()
    files.remove_folder(folder)  # the one that was left does not stand in the way
    assert tree(tmp_path) == {}


def test_leftovers_are_removed_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / ".staging-checkpoint-3").mkdir()
    (tmp_path / ".staging-checkpoint-3" / "a").write_text("1")
    (tmp_path / ".staging-run.json").write_text("{")
    (tmp_path / ".hidden").write_text("kept")
    (tmp_path / "checkpoint-1").mkdir()
    files.remove_leftovers(tmp_path)
    assert tree(tmp_path) == {".hidden": "kept", "checkpoint-1": None}


def test_a_link_is_removed_and_what_it_leads_to_is_kept(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a").write_text("1")
    for name in ("checkpoint-3", ".staging-removed-checkpoint-2"):
        (tmp_path / name).symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    files.remove_folder(tmp_path / "checkpoint-3")
    files.remove_leftovers(tmp_path)
    assert tree(tmp_path) == {"elsewhere": None, "elsewhere/a": "1"}


# --- disks that cannot do everything ------------------------------------------------------------------------


@pytest.fixture
def refusing(monkeypatch: pytest.MonkeyPatch) -> Any:
    """From the call on, chmod, and fsync of files or folders, answer with an error."""

    def refuse(sync: int | None, chmod: int | None, folders_alone: bool = False) -> None:
        own = os.fsync

        def fsync(handle: int) -> None:
            if sync is not None and (os.path.isdir(f"/proc/self/fd/{handle}") or not folders_alone):
                raise OSError(sync, os.strerror(sync))
            own(handle)

        def change_mode(path: Path, mode: int) -> None:
            if chmod is not None:
                raise OSError(chmod, os.strerror(chmod), str(path))

        monkeypatch.setattr(os, "fsync", fsync)
        monkeypatch.setattr(Path, "chmod", change_mode)

    return refuse


@pytest.mark.parametrize(
    ("sync", "chmod", "folders_alone"),
    [
        (errno.EINVAL, errno.EPERM, False),
        (errno.ENOTSUP, errno.ENOSYS, False),
        (errno.EBADF, errno.EACCES, False),
        (errno.EACCES, None, True),
        (errno.EISDIR, None, True),
    ],
    ids=lambda value: errno.errorcode.get(value, "") if value else "",
)
def test_what_a_network_disk_refuses_is_lived_with(
    tmp_path: Path, refusing: Any, sync: int, chmod: int | None, folders_alone: bool
) -> None:
    refusing(sync, chmod, folders_alone)
    files.write_text(tmp_path / "a.txt", "1")
    with files.staged_folder(tmp_path / "folder") as staging:
        (staging / "b").write_text("2")
    with files.publish(tmp_path / "folder") as staging:
        (staging / "b").write_text("3")
    assert tree(tmp_path) == {"a.txt": "1", "folder": None, "folder/b": "3"}


@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC, errno.EDQUOT], ids=errno.errorcode.get)
def test_what_is_lost_is_an_error(tmp_path: Path, refusing: Any, error: int) -> None:
    files.write_text(tmp_path / "a.txt", "old")
    refusing(error, None)
    with pytest.raises(OSError, match=os.strerror(error)):
        files.write_text(tmp_path / "a.txt", "new")
    with pytest.raises(OSError, match=os.strerror(error)), files.staged_folder(tmp_path / "folder") as staging:
        (staging / "b").write_text("2")
    assert tree(tmp_path) == {"a.txt": "old"}


# --- tensors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int64"])
def test_tensors_come_back_as_they_were_however_they_lie_in_memory(tmp_path: Path, dtype: str) -> None:
    import ml_dtypes  # noqa: F401  (teaches numpy bfloat16)
    from safetensors.numpy import load_file

    plain = np.arange(24).reshape(4, 6).astype(dtype)
    given = {
        "plain": plain,
        "transposed": plain.T,
        "fortran": np.asfortranarray(plain),
        "strided": plain[::2, 1::2],
        "slice": plain[:, 2:5],
        "reversed": plain[::-1],
        "axes": plain.reshape(2, 3, 4).transpose(2, 0, 1),
        "repeated": np.broadcast_to(plain[0], (3, 6)),
        "number": np.asarray(plain[1, 1]),
        "empty": plain[:0].T,
    }
    files.save_tensors(tmp_path / "x.safetensors", given)
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == given.keys()
    for name, tensor in given.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape, name
        assert found[name].tolist() == tensor.tolist(), name
