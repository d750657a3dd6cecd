"""Where a model comes from: a local directory or a hub name, and the weight files in it, read tensor by tensor."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.errors import UsageError
from sft.files import state_of
from sft.foreign_text import quoted, shown
from sft.hub_names import is_hub_name, split
from sft.model_files import PICKLED, check_links
from sft.models.families.family import Family
from sft.models.reals import check_finite, check_reals, check_type, with_bfloat16
from sft.models.safe_file import SafeFile, replaced
from sft.models.stacked import Part, is_stack, parts_of
from sft.small_files import is_there, read_object

if TYPE_CHECKING:
    import numpy as np

_INDEX = ".index.json"
_SAFE = ("model.safetensors.index.json", "model.safetensors")
_UNSAFE = (
    *("model_state.pdparams.index.json", "model_state.pdparams"),
    *("pytorch_model.bin.index.json", "pytorch_model.bin"),
)
_PATTERNS = ["*.json", "*.jinja", "*.txt", "*.model", "*.safetensors"]


@dataclass(frozen=True)
class ModelFolder:
    """Where a model is, and which of its weight files may be read."""

    path: Path
    file: str | None = None
    """The weight file, or the index of such, that the user named; it is read even if it is pickled."""
    allow_pickle: bool = False
    """Whether pickled weights are read although nobody named them."""


def find_model(name_or_path: str, allow_pickle: bool = False) -> ModelFolder:
    """The local directory of a model; a hub name (``owner/name``, or ``owner/name@revision``) is downloaded with
    ``huggingface_hub``.

    ``name_or_path`` may also be a weight file in such a directory, or an index of weight files.
    """
    path = Path(name_or_path).expanduser()
    if path.is_file() and path.name.endswith((".safetensors", *PICKLED, _INDEX)):
        check_links(path.parent)
        return ModelFolder(path.parent, path.name, allow_pickle)
    patterns = [*_PATTERNS, *(f"*{suffix}" for suffix in PICKLED if allow_pickle)]
    return ModelFolder(_find(name_or_path, patterns), None, allow_pickle)


def find_tokenizer(name_or_path: str) -> Path:
    """A local directory with a tokenizer; of a hub name no weights are downloaded."""
    return _find(name_or_path, [pattern for pattern in _PATTERNS if pattern != "*.safetensors"])


def find_config(name_or_path: str) -> Path:
    """A local directory with a model's ``config.json``; of a hub name nothing else is downloaded."""
    path = Path(name_or_path).expanduser()
    return find_model(name_or_path).path if path.is_file() else _find(name_or_path, ["config.json"])


def _find(name_or_path: str, patterns: list[str]) -> Path:
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        check_links(path)
        return path
    if not is_hub_name(name_or_path):
        kind = "is not a directory" if path.exists() else "does not exist"
        raise UsageError(
            f"Model {shown(name_or_path)} {kind}; give model_name_or_path a model directory or a hub name."
        )
    from huggingface_hub import snapshot_download

    name, revision = split(name_or_path)
    try:
        found = Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except Exception as error:
        cause = _first_sentences(error)
        raise UsageError(
            f"Model {name_or_path} is not a directory here and could not be downloaded from the hub ({cause}); "
            "check the name and the connection, or give a local directory."
        ) from error
    check_links(found)
    return found


def _first_sentences(error: Exception) -> str:
    """What an error says, in whole sentences and few of them: the hub's go on over several lines."""
    sentences = re.split(r"(?<=[.!?]) ", " ".join(str(error).split()) or type(error).__name__)
    kept = sentences[0]
    for sentence in sentences[1:]:
        if len(kept) + len(sentence) > 250:
            break
        kept += " " + sentence
    return textwrap.shorten(kept, 500, placeholder=" …").rstrip(".")


class Weights:
    """The tensors of a model directory by name, in the files' own layout; each is read when it is asked for.

    ``layout`` is "hf" (Linear weights [out, in], names ``model.…``) or "paddle" ([in, out], ``llama.…``). Where files
    of the decoder's families have the matrices of all experts in one tensor, each is a tensor here, and in ``parts``.
    """

    def __init__(self, place: Path | ModelFolder, family: Family) -> None:
        """Raises :class:`UsageError` where there are none that may be read; see :func:`weight_files`."""
        place = place if isinstance(place, ModelFolder) else ModelFolder(place)
        self._folder = place.path
        index = place.path / (place.file if place.file is not None and place.file.endswith(_INDEX) else _SAFE[0])
        before = state_of(index)
        self._where: dict[str, SafeFile] = {}
        self._pickled: dict[str, Any] = {}
        for path in weight_files(place):
            if path.suffix == ".safetensors":
                file = SafeFile(path)
                self._where.update(dict.fromkeys(file, file))
            else:
                from sft.models.pickles import read_pickled

                self._pickled.update(read_pickled(path))
        if state_of(index) != before:  # it goes before a shard changes, and comes last: see ``files.publish``
            raise replaced(index)
        self.parts: dict[str, Part] = {}
        for name in [*self._where, *self._pickled] if family.build is None else ():
            if is_stack(name, self.shape(name)):
                self.parts.update(parts_of(name, self.shape(name)))
        prefix = family.paddle_prefix
        self.unread = {name for name in (*self._where, *self._pickled) if name.endswith("rotary_emb.inv_freq")}
        """What some writers store beside the weights: it is not among the names that iterating gives."""
        paddle = prefix is not None and any(name.startswith(f"{prefix}.") for name in self)
        self.layout = "paddle" if paddle else "hf"

    def __iter__(self) -> Iterator[str]:
        beside = self.unread | {part.stack for part in self.parts.values()}
        return iter(sorted(name for name in (*self._where, *self._pickled, *self.parts) if name not in beside))

    def __contains__(self, name: object) -> bool:
        return name in self._where or name in self._pickled or name in self.parts

    def shape(self, name: str) -> list[int]:
        if name in self.parts:
            return self.parts[name].shape
        if name in self._pickled:
            return list(self._pickled[name].shape)
        return self._where[name].shape(name)

    def read_stored(self, name: str, where: tuple[slice, ...] = ()) -> np.ndarray:
        """One tensor, or what is at ``where`` of it, in the file's layout and dtype (bfloat16 as ``ml_dtypes`` has it);
        nothing else is read. :class:`UsageError` for what is no weight: see ``reals.py``."""
        # paddle has no bfloat16 in numpy: its files, and PaddleNLP's safetensors, say uint16 for the same bits.
        array = with_bfloat16(self._at(name, where))
        check_reals(array, self._named(name))
        return array

    def read_onto(self, name: str, target: np.ndarray) -> None:
        """Give ``target``, of a tensor's shape, its values, rounded to the dtype of that; checked as they are read."""
        import numpy as np

        from sft.arrays import copy_onto

        if name in self._where:
            check_type(self._where[name].dtype(name), self._named(name))
            with np.errstate(over="ignore"):  # it is an error below
                self._where[name].read_onto(name, target)
            check_finite(target, self._named(name))
        else:
            copy_onto(target, self.read_stored(name))

    def read(self, name: str) -> np.ndarray:
        """One tensor as float32, in the file's layout."""
        return self.read_part(name, ())

    def read_part(self, name: str, where: tuple[slice, ...]) -> np.ndarray:
        """What is at ``where`` of a tensor as float32, in the file's layout; nothing else is read."""
        import numpy as np

        return self.read_stored(name, where).astype(np.float32, copy=False)

    def read_corner(self, name: str, size: int) -> np.ndarray:
        """The first ``size`` values along each dimension of a tensor as float32, in the file's layout."""
        return self.read_part(name, tuple(slice(size) for _ in self.shape(name)))

    def read_grid(self, name: str, places: int) -> np.ndarray:
        """Of a matrix what is at ``places`` even places along each dimension, from the first to the last, and of any
        other tensor all; as float32, in the file's layout. Few rows of the file are read."""
        import numpy as np

        shape = self.shape(name)
        if len(shape) != 2:
            return self.read(name)
        rows, columns = (np.unique(np.linspace(0, size - 1, places).round().astype(int)) for size in shape)
        found = (self.read_part(name, (slice(row, row + 1), slice(None))) for row in map(int, rows))
        return np.stack([row[0, columns] for row in found])

    def _at(self, name: str, where: tuple[slice, ...]) -> np.ndarray:
        """What is at ``where`` of a tensor, or all of it, in the file's dtype."""
        import numpy as np

        if name in self.parts:
            part = self.parts[name]
            found: np.ndarray = self._at(part.stack, part.within(where or (slice(None), slice(None))))[0]
            return found
        if name in self._pickled:
            return np.asarray(self._pickled[name][where])
        check_type(self._where[name].dtype(name), self._named(name))
        return self._where[name].read(name, where)

    def _named(self, name: str) -> str:
        """A tensor as messages name it."""
        stored = self.parts[name].stack if name in self.parts else name
        place = self._where[stored].path if stored in self._where else self._folder
        return f"{place}: tensor {shown(stored)}"


def weight_files(place: ModelFolder) -> list[Path]:
    """The files that hold a model's weights: the named one, or what the folder has under the usual names.

    Pickled ones count only where the user named them or allowed them. An index may name files beside itself, of its own
    kind, and nothing else: it came with the model, and no model has a say in what else is opened on this machine.
    """
    folder = place.path
    if place.file is not None:
        return _expand(folder, place.file)
    for name in (*_SAFE, *(_UNSAFE if place.allow_pickle else ())):
        if is_there(folder / name):
            return _expand(folder, name)
    for name in _UNSAFE:
        if (folder / name).is_file():
            whose, more = ("PaddleNLP", ", safe_serialization=True") if ".pdparams" in name else ("transformers", "")
            raise UsageError(
                f"{folder} has weights in {name} alone, a pickle, which is not read unasked because a pickle can carry "
                f"code; name the file (--model_name_or_path {folder / name}) or set allow_pickle true to have the "
                f"tensors in it read and nothing run, or convert it to safetensors with {whose}: "
                f"AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW{more})."
            )
    raise UsageError(
        f"{folder} has no weights; it needs model.safetensors (or its shards and index), or with allow_pickle true "
        "Paddle's model_state.pdparams or torch's pytorch_model.bin."
    )


def _expand(folder: Path, name: str) -> list[Path]:
    """The weight files that ``name`` stands for: itself, or where it is an index, those that it names."""
    if not name.endswith(_INDEX):
        return [folder / name]
    path = folder / name
    suffix = Path(name.removesuffix(_INDEX)).suffix
    weight_map = read_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UsageError(f"{path} is not an index of weights (it has no weight_map with names of files); replace it.")
    names = list(weight_map.values())
    for named in names:
        if not _is_plain(named) or not named.endswith(suffix) or suffix not in (".safetensors", *PICKLED):
            raise UsageError(
                f"{path} names {quoted(named)} as a file of weights, where only the name of a {suffix} file "
                "beside it may stand; replace the index."
            )
    files = [folder / named for named in dict.fromkeys(names)]
    missing = [file.name for file in files if not is_there(file)]
    if missing:
        raise UsageError(f"{folder} lacks {', '.join(missing)}, named by {name}; copy it there.")
    return files


def _is_plain(name: Any) -> bool:
    """Whether ``name`` is that of a file and no path."""
    return isinstance(name, str) and name.isprintable() and len(name.encode()) < 256 and not set(name) & set("/\\:")
