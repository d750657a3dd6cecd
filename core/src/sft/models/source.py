"""Where a model comes from: a local directory or a hub name, and the weight files in it, read tensor by tensor."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.errors import UsageError
from sft.models.families import Family

if TYPE_CHECKING:
    import numpy as np

_PATTERNS = ["*.json", "*.jinja", "*.txt", "*.model", "*.safetensors"]


def find_model(name_or_path: str) -> Path:
    """The local directory of a model; a hub name (``owner/name``) is downloaded with ``huggingface_hub``."""
    return _find(name_or_path, _PATTERNS)


def find_config(name_or_path: str) -> Path:
    """A local directory with a model's ``config.json``; of a hub name nothing else is downloaded."""
    return _find(name_or_path, ["config.json"])


def _find(name_or_path: str, patterns: list[str]) -> Path:
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return path
    looks_like_path = path.is_absolute() or name_or_path.startswith((".", "~")) or name_or_path.count("/") != 1
    if looks_like_path or path.exists():
        kind = "is not a directory" if path.exists() else "does not exist"
        raise UsageError(f"Model {name_or_path} {kind}; give model_name_or_path a model directory or a hub name.")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name_or_path, allow_patterns=patterns))
    except Exception as error:
        cause = " ".join(str(error).split())[:200] or type(error).__name__
        raise UsageError(
            f"Model {name_or_path} is not a directory here and could not be downloaded from the hub ({cause}); "
            "check the name and the connection, or give a local directory."
        ) from error


class Weights:
    """The tensors of a model directory by name, in the files' own layout; each is read when it is asked for.

    ``layout`` is "hf" (Linear weights [out, in], names ``model.…``) or "paddle" ([in, out], ``llama.…``).
    """

    def __init__(self, folder: Path, family: Family) -> None:
        self.folder = folder
        self._where: dict[str, Path] = {}
        self._handles: dict[Path, Any] = {}
        self._pickled: dict[str, Any] = {}
        files = self._files()
        for path in files:
            if path.suffix == ".safetensors":
                for name in self._open(path).keys():  # noqa: SIM118  (no dict)
                    self._where[name] = path
            else:
                self._load_pdparams(path)
        paddle = any(name.startswith(family.prefix + ".") for name in self)
        self.layout = "paddle" if paddle else "hf"

    def __iter__(self) -> Iterator[str]:
        return iter(sorted([*self._where, *self._pickled]))

    def __contains__(self, name: object) -> bool:
        return name in self._where or name in self._pickled

    def shape(self, name: str) -> list[int]:
        if name in self._pickled:
            return list(self._pickled[name].shape)
        return list(self._open(self._where[name]).get_slice(name).get_shape())

    def read_stored(self, name: str) -> np.ndarray:
        """One tensor in the file's layout and dtype (bfloat16 as ``ml_dtypes`` has it)."""
        import ml_dtypes
        import numpy as np

        if name in self._pickled:
            array = np.asarray(self._pickled[name])
        else:
            # A handle of its own: an open one keeps every page of the file that was ever read in memory.
            array = np.asarray(_safetensors(self._where[name]).get_tensor(name))
        # paddle has no bfloat16 in numpy: its files, and PaddleNLP's safetensors, say uint16 for the same bits.
        return array.view(ml_dtypes.bfloat16) if array.dtype == np.uint16 else array

    def read(self, name: str) -> np.ndarray:
        """One tensor as float32, in the file's layout."""
        import numpy as np

        return self.read_stored(name).astype(np.float32, copy=False)

    def read_part(self, name: str, where: tuple[slice, ...]) -> np.ndarray:
        """What is at ``where`` of a tensor as float32, in the file's layout; nothing else is read."""
        import ml_dtypes
        import numpy as np

        if name in self._pickled:
            array = self._pickled[name]
        else:
            array = _safetensors(self._where[name]).get_slice(name)
        part = np.asarray(array[where])
        return (part.view(ml_dtypes.bfloat16) if part.dtype == np.uint16 else part).astype(np.float32, copy=False)

    def read_corner(self, name: str, size: int) -> np.ndarray:
        """The first ``size`` values along each dimension of a tensor as float32, in the file's layout."""
        return self.read_part(name, tuple(slice(size) for _ in self.shape(name)))

    def _files(self) -> list[Path]:
        for index in ("model.safetensors.index.json", "model_state.pdparams.index.json"):
            if (self.folder / index).is_file():
                try:
                    names = json.loads((self.folder / index).read_text(encoding="utf-8"))["weight_map"].values()
                except (ValueError, KeyError, TypeError, AttributeError) as error:
                    raise UsageError(
                        f"{self.folder / index} is not an index of weights ({error}); replace it."
                    ) from error
                files = [self.folder / name for name in dict.fromkeys(names)]
                missing = [path.name for path in files if not path.is_file()]
                if missing:
                    raise UsageError(f"{self.folder} lacks {', '.join(missing)}, named by {index}; copy it there.")
                return files
        for name in ("model.safetensors", "model_state.pdparams"):
            if (self.folder / name).is_file():
                return [self.folder / name]
        raise UsageError(
            f"{self.folder} has no weights; it needs model.safetensors (or its shards and index), "
            "or Paddle's model_state.pdparams."
        )

    def _open(self, path: Path) -> Any:
        if path not in self._handles:
            self._handles[path] = _safetensors(path)
        return self._handles[path]

    def _load_pdparams(self, path: Path) -> None:
        import paddle

        self._pickled.update(paddle.load(str(path), return_numpy=True))


def _safetensors(path: Path) -> Any:
    from safetensors import safe_open

    try:
        return safe_open(str(path), framework="numpy")
    except Exception as error:
        raise UsageError(f"{path} is not a readable safetensors file ({error}); copy it again.") from error
