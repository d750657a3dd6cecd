"""Files that are complete or not there: whatever stops the process, a reader never sees half of one."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.errors import UsageError
from sft.small_files import read_object

if TYPE_CHECKING:
    import numpy as np

STAGING = ".staging-"
_REFUSALS = (errno.EINVAL, errno.EBADF, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
"""What network disks answer to what they do not do. What is written is all the same there when they say so."""
_NOT_ALLOWED = (errno.EPERM, errno.EACCES, errno.EROFS, errno.EISDIR)


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A file to write, which takes the place of ``path`` in one step when the block ends well, else vanishes. Several
    threads and processes may do so at once; one of them is the last."""
    staging = path.with_name(f"{STAGING}{threading.get_native_id()}-{path.name}")
    try:
        yield staging
        _finish(staging)
        os.replace(staging, path)
        sync(path.parent)
    finally:
        staging.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replace ``path`` in one step."""
    with replaced(path) as staging:
        staging.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_report(folder: Path) -> dict[str, Any]:
    """``run.json`` of a run directory; empty where there is none, or none that can be read."""
    try:
        return read_object(folder / "run.json")
    except UsageError:
        return {}


def save_tensors(path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> None:
    """A safetensors file of arrays, whatever their order in memory; raises :class:`OSError` where it cannot be
    written."""
    import ml_dtypes  # noqa: F401  (teaches numpy bfloat16)
    import numpy as np
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    # The library writes an array's memory as it lies: what is transposed or sliced would come back scrambled.
    laid_out = {name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}
    try:
        save_file(laid_out, str(path), metadata=dict(metadata or {}) or None)
    except SafetensorError as error:
        raise OSError(f"{path.name} could not be written: {error}") from error
    if metadata is not None and len(metadata) > 1:
        _sort_metadata(path)


def can_write(dtype: Any) -> bool:
    """Whether :func:`save_tensors` can write arrays of a numpy ``dtype``, tried with an empty one."""
    import ml_dtypes  # noqa: F401  (teaches numpy bfloat16)
    import numpy as np
    from safetensors.numpy import save

    try:
        save({"x": np.empty(0, dtype)})
    except Exception:
        return False
    return True


def _sort_metadata(path: Path) -> None:
    """The library writes metadata in an order that differs from process to process; equal content is equal bytes."""
    with path.open("r+b") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        stream.seek(8)
        stream.write(text.ljust(size))


def staging_of(folder: Path) -> Path:
    """The name that ``folder`` has while it is filled."""
    return folder.with_name(f"{STAGING}{folder.name}")


def check_free(folder: Path) -> None:
    """:class:`UsageError` if ``folder`` already holds something."""
    if (folder.is_dir() and any(folder.iterdir())) or folder.is_file():
        raise UsageError(f"{folder} already exists and is not empty; choose another place or remove it.")


@contextlib.contextmanager
def staged_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, which takes the name ``folder`` in one step when the block ends well, else vanishes.

    Raises :class:`UsageError` if ``folder`` already holds something.
    """
    check_free(folder)
    staging = staging_of(folder)
    discard(staging)
    make_folder(staging)
    try:
        yield staging
        for path in sorted(staging.rglob("*"), key=lambda path: (path.is_dir(), str(path))):  # files, then folders
            _finish(path)
        sync(staging)
        if folder.is_dir():
            folder.rmdir()
        os.rename(staging, folder)
        sync(folder.parent)
    finally:
        discard(staging)


@contextlib.contextmanager
def publish(folder: Path, keys: Sequence[str] = (), kinds: Sequence[str] = ()) -> Iterator[Path]:
    """A folder to fill, whose files move into ``folder`` at the end, each replacing its namesake in one step.

    Files of ``folder`` that match ``kinds`` are of an older result, and go unless they are replaced. Nobody reads a
    mixture of the two: ``keys`` are files without which no reader takes the folder for a result; they go before
    anything else changes, and come when all is there, in the reverse order.
    """
    staging = folder / f"{STAGING}result"
    discard(staging)
    staging.mkdir(parents=True)
    order = {name: number for number, name in enumerate(keys)}
    try:
        yield staging
        written = sorted(staging.iterdir(), key=lambda path: (-order.get(path.name, len(order)), path.name))
        for path in written:
            _finish(path)
        older = {path for kind in (*keys, *kinds) for path in folder.glob(kind)}
        for path in sorted(older, key=lambda path: (order.get(path.name, len(order)), path.name)):
            if path.name in order or not (staging / path.name).exists():
                path.unlink()
                sync(folder)
        for path in written:
            if path.name in order:
                sync(folder)
            os.replace(path, folder / path.name)
        sync(folder)
    finally:
        discard(staging)


def remove_folder(folder: Path) -> None:
    """Remove a folder so that no half of it is ever found under its name."""
    doomed = folder.with_name(f"{STAGING}removed-{folder.name}")
    discard(doomed)
    os.rename(folder, doomed)
    sync(folder.parent)
    discard(doomed)


def remove_leftovers(folder: Path) -> None:
    """Delete what a stopped process left unfinished in ``folder``."""
    for path in folder.glob(f"{STAGING}*"):
        discard(path)


def discard(path: Path) -> None:
    """Remove a file, a folder, or a link (and not what it leads to), if it is there; what resists stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def make_folder(folder: Path) -> None:
    """Make a folder and those above it; :class:`UsageError` where that is not possible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{folder} cannot be made ({error.strerror}); choose another place.") from error


def state_of(path: Path) -> tuple[int, int, int] | None:
    """What changes when a file is written to, or another one takes its place; None where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def is_own_file(path: Path, written: Path) -> bool:
    """Whether ``path`` is the file ``written``, may be changed, and is no link to a file that somebody else keeps."""
    try:
        found = path.lstat()
        return os.path.samestat(found, written.stat()) and found.st_nlink == 1 and os.access(path, os.W_OK)
    except FileNotFoundError:
        return False


def _finish(path: Path) -> None:
    """On disk, and readable by those whom the user's umask lets read (safetensors writes for its owner alone)."""
    if path.is_file():
        mask = os.umask(0)
        os.umask(mask)
        try:
            path.chmod(0o666 & ~mask)
        except OSError as error:
            if error.errno not in (*_REFUSALS, *_NOT_ALLOWED):
                raise
    sync(path)


def sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk, as far as its file system can."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError as error:
        if path.is_dir() and error.errno in (*_REFUSALS, *_NOT_ALLOWED):
            return
        raise
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _REFUSALS and not (path.is_dir() and error.errno in _NOT_ALLOWED):
            raise
    finally:
        os.close(handle)
