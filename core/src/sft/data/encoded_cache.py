"""Data kept encoded on disk (``encoded_cache``): what was encoded in the same way before is read, not encoded again.

Each file has the name of everything that shapes what is in it, so none is ever out of date: it is found, or it is
another one. It holds the arrays and what a run says of them, and it is checked when it is read.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sft.data.bad_records import BadRecord, Place
from sft.data.encoded import Counts, Encoded
from sft.data.sources import size_of
from sft.errors import UsageError
from sft.files import STAGING, make_folder, replaced, save_tensors, state_of

if TYPE_CHECKING:
    from sft.data.learned import Learned
    from sft.data.tokenizer import Tokenizer
    from sft.plugins.registry import Plugins
    from sft.progress import Progress

_ARRAYS = ("ids", "trained", "offsets", "dropped", "further", "beside")
_CHUNK = 1 << 22
_HERE = Path(__file__).parent
_STALE = 3600.0
"""Seconds after which what another process has begun to write is taken for left over."""


class Kept(NamedTuple):
    """Encoded data, and the name of the format that its records were in."""

    data: Encoded
    format: str


class EncodedCache:
    """The encoded data of ``folder``, for runs that encode with this tokenizer, these lengths and these plugins, and
    that learn the same of it."""

    def __init__(
        self,
        folder: Path,
        plugins: Plugins,
        tokenizer: Tokenizer,
        lengths: tuple[int, int, str | None],
        learned: Learned,
        positions: int,
        progress: Progress,
    ) -> None:
        """``lengths`` are src_length, max_length and truncation; a model that reads no more than ``positions`` tokens
        refuses longer records."""
        self._folder, self._progress, self._positions = folder, progress, positions
        self._shape = {
            "encoder": _digest_of_files([*_HERE.glob("*.py"), _HERE.parent / "conversations.py"]),
            "versions": {name: version(name) for name in ("sft-core", "tokenizers", "jinja2")},
            "tokenizer": tokenizer.fingerprint(),
            "lengths": lengths,
            "learned": asdict(learned),
            "formats": list(_formats(plugins)),
        }
        make_folder(folder)

    def place(self, files: list[Path], shape: Sequence[Any] = ()) -> _Place:
        """Where the encoded content of ``files``, as they are now, is kept; ``shape`` says which of their records there
        are, and how they are read (:attr:`sft.data.sets.DataSet.shape`)."""
        seen = [state_of(path) for path in files]
        with self._progress.task("looking for encoded data", "MiB", size_of(files), of_units=False) as task:
            digests, done = [], 0
            for path in files:
                digest = hashlib.sha256()
                for part in _parts(path):
                    digest.update(part)
                    done += len(part)
                    task.advance(len(part) >> 20, done)
                digests.append((path.suffix, digest.hexdigest()))
        key = hashlib.sha256(json.dumps([self._shape, digests, [*shape]], sort_keys=True).encode()).hexdigest()
        return _Place(self._folder / f"{key[:32]}.safetensors", key, files, seen)

    def read(self, place: _Place, skips: bool = False) -> Kept | None:
        """What is kept there; None where nothing is, or nothing that this run can use. ``skips``: whether it may hold
        records that were skipped because they cannot be read."""
        if not place.path.is_file():
            return None
        try:
            kept = _read(place)
        except Exception as error:  # whatever else may have been put there
            cause = " ".join(str(error).split()) or type(error).__name__
            self._progress.say(f"note: {place.path} cannot be used ({cause}); the data is encoded anew")
            return None
        if kept.data.longest > self._positions:
            return None  # encoding it again says which record is too long
        if kept.data.bad and not skips:
            return None  # or what is wrong with the first
        return kept

    def check_writable(self) -> None:
        """Refuse a folder in which nothing can be kept, before data is encoded that it does not hold."""
        if not os.access(self._folder, os.W_OK | os.X_OK):
            raise UsageError(
                f"encoded_cache {self._folder} is not writable, and does not hold this data; give another folder, or "
                "leave encoded_cache out."
            )

    def write(self, place: _Place, kept: Kept) -> None:
        """Keep it, unless the files have changed since. A disk that is full does not stop a run."""
        if [state_of(path) for path in place.files] != place.seen:
            self._progress.say("note: the data has changed while it was read, so it is not kept encoded")
            return
        data = kept.data
        arrays = {name: getattr(data, name) for name in _ARRAYS}
        if data.weights is not None:
            arrays["weights"] = data.weights
        numbers = {path: number for number, path in enumerate(place.files)}
        bad = [(numbers[at.path], at.line, at.number, reason) for at, reason in kept.data.bad]
        said = {"format": kept.format, "counts": asdict(kept.data.counts), "bad": bad}
        text = json.dumps(said, ensure_ascii=False)
        metadata = {"key": place.key, "said": text, "digest": _seal(kept.data, place.key, text)}
        try:
            for path in place.path.parent.glob(f"{STAGING}*"):
                if time.time() - path.stat().st_mtime > _STALE:
                    path.unlink(missing_ok=True)
            with replaced(place.path) as staging:
                save_tensors(staging, arrays, metadata)
        except OSError as error:
            cause = error.strerror or " ".join(str(error).split())
            self._progress.say(f"note: the encoded data could not be kept in {self._folder} ({cause})")


class _Place(NamedTuple):
    path: Path
    key: str
    files: list[Path]
    seen: list[tuple[int, int, int] | None]
    """What :func:`sft.files.state_of` said of the files before they were read."""


def _read(place: _Place) -> Kept:
    from safetensors import safe_open

    with safe_open(place.path, framework="np") as file:
        metadata = file.metadata() or {}
        if metadata.get("key") != place.key:
            raise ValueError("it holds something else")
        data = Encoded(**{name: file.get_tensor(name) for name in _ARRAYS})
        data.weights = file.get_tensor("weights") if "weights" in file.keys() else None  # noqa: SIM118
    if _seal(data, place.key, metadata["said"]) != metadata["digest"]:
        raise ValueError("it is damaged")
    said = json.loads(metadata["said"])
    data.counts = Counts(**said["counts"])  # another object would compute the digest of the data again
    data.bad = [BadRecord(Place(place.files[file], *at), reason) for file, *at, reason in said["bad"]]
    return Kept(data, said["format"])


def _seal(data: Encoded, key: str, said: str) -> str:
    arrays = [data.ids, data.trained, data.offsets] + ([] if data.weights is None else [data.weights])
    shapes = [(str(array.dtype), array.shape) for array in arrays]
    shapes += [(name, getattr(data, name).tolist()) for name in ("dropped", "further", "beside")]
    return hashlib.sha256(json.dumps([data.fingerprint(), shapes, key, said]).encode()).hexdigest()


def _parts(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            while part := file.read(_CHUNK):
                yield part
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror}); check the path and its permissions.") from error


def _formats(plugins: Plugins) -> Iterator[list[Any]]:
    """What distinguishes the plugins that say what is in a record, in the order in which they are asked."""
    for name in plugins.behind("sft_record_format"):
        if name in plugins.direct:
            raise UsageError(
                f"encoded_cache cannot tell one version of plugin {name} from another, which reads records and is "
                f"{plugins.origin(name)}; install it as a distribution, or leave encoded_cache out."
            )
        plugin = plugins.manager.get_plugin(name)
        options = getattr(plugin, "options", None)
        yield [name, plugins.origin(name), None if options is None else asdict(options), _source(plugin)]


def _source(plugin: Any) -> str:
    """A digest of the code that a plugin comes with: its version stays while its author works on it."""
    module = sys.modules[plugin.__name__ if inspect.ismodule(plugin) else type(plugin).__module__]
    package = sys.modules[module.__name__.partition(".")[0]]
    folders = [Path(folder) for folder in getattr(package, "__path__", ())]
    return _digest_of_files(
        [path for folder in folders for path in folder.rglob("*.py")] or [Path(str(module.__file__))]
    )


def _digest_of_files(paths: Iterable[Path]) -> str:
    return hashlib.sha256(b"".join(hashlib.sha256(path.read_bytes()).digest() for path in sorted(paths))).hexdigest()
