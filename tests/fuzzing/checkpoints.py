"""Checkpoints made up: their manifest and state.json."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from fuzzing.made_up import as_json, mutated, objects, values, words
from fuzzing.trial import LONGEST, Target


def read_state(folder: Path, content: bytes) -> Any:
    from sft.training.checkpoint_folder import read_state as read

    (folder / "trainer").mkdir(exist_ok=True)
    (folder / "trainer" / "state.json").write_bytes(content)
    return read(folder)


def sealed(folder: Path) -> bytes:
    """A checkpoint of two files, as far as its manifest goes; the manifest."""
    from sft.training.manifest import NAME, write_manifest

    (folder / "trainer").mkdir()
    for name in ("model.safetensors", "trainer/state.json"):
        (folder / name).write_bytes(name.encode())
    write_manifest(folder)
    return (folder / NAME).read_bytes()


def _manifest() -> bytes:
    with tempfile.TemporaryDirectory() as name:
        return sealed(Path(name))


def read_manifest(folder: Path, content: bytes) -> Any:
    """Only the manifest that was written says that the checkpoint is whole."""
    from sft.progress import Progress
    from sft.training.manifest import NAME, damage

    (folder / NAME).write_bytes(content)
    said = damage(folder, Progress(lambda text: None))
    assert (said is None) is (content == _manifest())
    assert said is None or (said.isprintable() and len(said) < LONGEST)
    return said


TARGETS: dict[str, Target] = {
    "a checkpoint's manifest": Target(
        mutated(_manifest())
        | objects(("format", "files"), st.dictionaries(words, objects(("bytes", "sha256"))) | values).map(as_json),
        read_manifest,
        sealed,
        kept=(_manifest(),),
    ),
    "state.json": Target(
        objects(("format", "step", "data", "plugins")).map(as_json) | mutated(b'{"format": 3, "step": 1}'), read_state
    ),
}
