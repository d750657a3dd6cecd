"""From a name on the hub to a parquet file on this machine."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sft

_NAME = re.compile(r"hf://(?P<place>[^@#]+)(@(?P<revision>[\w./+-]+))?(#(?P<config>[\w./+-]+))?")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
DEV = ("dev", "validation")
"""What a data set may call its dev split; the first that it has counts."""


@dataclass(frozen=True)
class Named:
    """``hf://PLACE@REVISION#CONFIG``: a data set of the hub, or a folder; revision and config may be left out."""

    name: str
    place: str
    revision: str | None
    config: str | None

    @classmethod
    def of(cls, name: str) -> Named:
        """Raises :class:`sft.UsageError` for what is no such name."""
        match = _NAME.fullmatch(name)
        is_folder = match is not None and match["place"].startswith(("/", "./", "../", "~"))
        if match is None or not (is_folder or _HUB_NAME.fullmatch(match["place"])):
            raise sft.UsageError(
                f"{name} is no name of a data set; it is hf://owner/name, with @revision and #config behind it if you "
                "like, or hf:// before the path of a folder (hf:///data, hf://./data)."
            )
        place = match["place"]
        if is_folder:
            place = str(Path(place).expanduser().resolve())
            if match["revision"]:
                raise sft.UsageError(f"{name}: a folder has no revision; leave @{match['revision']} out.")
            if not Path(place).is_dir():
                raise sft.UsageError(f"{name}: there is no folder {place}; correct the path.")
        return cls(name, place, match["revision"], match["config"])


def open_split(named: Named, split: str, say: Callable[[str], None]) -> list[Path]:
    """The file that holds ``split``; no file where there is no dev split. Raises :class:`sft.UsageError`."""
    builder = _builder(named)
    known = list(builder.info.splits or ())
    wanted = next((name for name in (DEV if split == "dev" else (split,)) if name in known), None)
    if wanted is None:
        if split == "dev":
            return []
        raise sft.UsageError(
            f"{named.name} has no split {split}; it has {', '.join(known)}; name one of them by split, in a "
            "settings file."
        )
    path = Path(builder.cache_dir) / f"sft-{wanted}.parquet"
    if not path.is_file():
        say(f"{named.name}: writing its split {wanted} to {path}")
        _write(builder.as_dataset(split=wanted), path)
    return [path]


def _builder(named: Named) -> Any:
    """The data set, read into the cache of the library."""
    import datasets

    try:
        builder = datasets.load_dataset_builder(named.place, named.config, revision=named.revision)
        builder.download_and_prepare()
    except Exception as error:  # of a connection, of names, of files; each has several classes
        cause = " ".join(str(error).split()) or type(error).__name__
        raise sft.UsageError(
            f"{named.name} cannot be opened ({cause}); check the name and the connection, or give a folder."
        ) from error
    return builder


def _write(found: Any, path: Path) -> None:
    """Under its name there is a whole file, whoever else writes it now."""
    try:
        handle, staging = tempfile.mkstemp(dir=path.parent, prefix=".sft-", suffix=".parquet")
        os.close(handle)
        try:
            found.to_parquet(staging)
            os.replace(staging, path)
        finally:
            Path(staging).unlink(missing_ok=True)
    except OSError as error:
        raise sft.UsageError(
            f"{path} cannot be written ({error.strerror or error}); make room, or set HF_HOME."
        ) from error
