"""One broken input: what differs from a run that succeeds, and what must be said of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

MODELS = Path(__file__).parent.parent.parent / "core" / "tests" / "fixtures" / "models"
RECORD = '{"src": "What is a river?", "tgt": "Water."}\n'
SETTINGS = {"model_name_or_path": "model", "dataset_name_or_path": "data", "output_dir": "out", "max_steps": "1"}
"""These succeed in the folder that :func:`make_good` makes: each case is refused for what it changes."""
LORA = {**SETTINGS, "plugin": "lora", "lora_rank": "2"}
RUN_OF_LORA = {**LORA, "output_dir": "done", "save_strategy": "steps", "save_steps": "1"}
"""What wrote the folder ``done``: a finished run, with an adapter and a checkpoint."""
ON_FROM_DONE = {**RUN_OF_LORA, "output_dir": "out", "max_steps": "2", "resume_from_checkpoint": "done/checkpoint-1"}

Change = Callable[[Path], None]


@dataclass(frozen=True)
class Case:
    """A broken input. The command is typed in a copy of the good folder after ``changes`` have been made there."""

    says: str
    """What the message must contain; of several parts with … between them, all, in this order."""
    changes: tuple[Change, ...] = ()
    settings: Mapping[str, str | None] = field(default_factory=dict)
    """Settings that differ; None takes one away."""
    base: Mapping[str, str] = field(default_factory=lambda: SETTINGS)
    typed: tuple[str, ...] | None = None
    """The whole command instead, without the word sft."""
    stdin: bytes = b""
    seconds: float = 20.0
    """The longest that it may take; a machine with other work to do is not to fail for it."""
    privileged: bool = False
    site: str = ""
    """A folder in which Python finds what is installed, too."""

    @property
    def command(self) -> list[str]:
        if self.typed is not None:
            return list(self.typed)
        given = {**self.base, **self.settings}
        return ["run", *(part for name, value in given.items() if value is not None for part in (f"--{name}", value))]


def make_good(folder: Path) -> None:
    """A model and a data set of 20 records."""
    shutil.copytree(MODELS / "llama-tied-gqa", folder / "model", ignore=shutil.ignore_patterns("*reference*"))
    (folder / "data").mkdir()
    (folder / "data" / "train.json").write_text(RECORD * 20, encoding="utf-8")


# --- changes ------------------------------------------------------------------------------------------------


def write(path: str, content: bytes | str) -> Change:
    data = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content

    def change(folder: Path) -> None:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).unlink(missing_ok=True)
        (folder / path).write_bytes(data)

    return change


def remove(path: str) -> Change:
    def change(folder: Path) -> None:
        if (folder / path).is_dir():
            shutil.rmtree(folder / path)
        else:
            (folder / path).unlink()

    return change


def directory(path: str) -> Change:
    """A folder where a file is expected."""

    def change(folder: Path) -> None:
        (folder / path).unlink(missing_ok=True)
        (folder / path).mkdir(parents=True)

    return change


def link(path: str, target: str) -> Change:
    """A link, such as to a device that gives zeros without end."""

    def change(folder: Path) -> None:
        (folder / path).unlink(missing_ok=True)
        (folder / path).symlink_to(target)

    return change


def moved(path: str, to: str) -> Change:
    """What was at ``path`` lies elsewhere, and a link leads to it."""

    def change(folder: Path) -> None:
        (folder / path).rename(folder / to)
        (folder / path).symlink_to((folder / to).absolute())

    return change


def pipe(path: str) -> Change:
    """A named pipe, which nobody ever writes to."""

    def change(folder: Path) -> None:
        import os

        (folder / path).unlink(missing_ok=True)
        os.mkfifo(folder / path)

    return change


def socket(path: str) -> Change:
    """A socket, which nobody listens at: what is no file and no pipe, and needs no privileges to make."""

    def change(folder: Path) -> None:
        import os
        import socket

        (folder / path).unlink(missing_ok=True)
        place = os.open(folder, os.O_RDONLY)  # the names of sockets are short
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(f"/proc/self/fd/{place}/{path}")
        os.close(place)

    return change


def mode(path: str, bits: int) -> Change:
    return lambda folder: (folder / path).chmod(bits)


def edit(path: str, make: Callable[[bytes], bytes]) -> Change:
    """The file's bytes are changed."""
    return lambda folder: write(path, make((folder / path).read_bytes()))(folder) and None


def of_json(path: str, **values: Any) -> Change:
    """Values of a JSON object are replaced; what is ``...`` is taken out."""

    def change(folder: Path) -> None:
        file = folder / path
        found = {**(json.loads(file.read_text()) if file.is_file() else {}), **values}
        file.write_text(json.dumps({key: value for key, value in found.items() if value is not ...}))

    return change


def of_numbers(path: str, **values: str) -> Change:
    """Numbers of a JSON object are replaced by others, which stand there as they are written here: to a process whose
    denormals are zero 1e-320 is 0."""

    def change(folder: Path) -> None:
        of_json(path, **values)(folder)
        found = (folder / path).read_text()
        for value in values.values():
            found = found.replace(json.dumps(value), value)
        (folder / path).write_text(found)

    return change


def of_tensors(path: str, make: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]) -> Change:
    """The tensors of a safetensors file are changed, and its metadata kept."""

    def change(folder: Path) -> None:
        from safetensors import safe_open

        with safe_open(str(folder / path), framework="numpy") as file:
            metadata = file.metadata()
        save_file(make(dict(load_file(str(folder / path)))), str(folder / path), metadata)

    return change


def each(make: Callable[[np.ndarray], np.ndarray], part: str = "") -> Callable[..., dict[str, np.ndarray]]:
    """For :func:`of_tensors`: all tensors whose names have ``part`` in them are changed by ``make``."""
    return lambda found: {name: np.asarray(make(array)) if part in name else array for name, array in found.items()}


def nested(depth: int = 100_000) -> str:
    """JSON of lists within lists."""
    return "[" * depth + "]" * depth
