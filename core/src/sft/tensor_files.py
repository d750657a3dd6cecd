"""Opening safetensors files, whoever wrote them."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.errors import UsageError
from sft.foreign_text import shown
from sft.small_files import check_plain, why

if TYPE_CHECKING:
    import numpy as np

_NARROW = ("F4", "F6_", "F8_")
_SYSTEM = re.compile(r"(.+?) \(os error \d+\)")
"""How the library says what the system answered."""


def open_tensors(path: Path, cure: str = "copy it again") -> Any:
    """The file as ``safetensors.safe_open`` gives it, with arrays of numpy, bfloat16 and float8 among them.

    Raises :class:`UsageError`, with the ``cure`` where the file is damaged.
    """
    import ml_dtypes  # noqa: F401  (teaches numpy bfloat16)
    from safetensors import safe_open

    check_plain(path, cure=cure)
    try:
        with path.open("rb"):  # the library calls every failure of this a file that is not there
            pass
        return safe_open(str(path), framework="numpy")
    except MemoryError:
        raise
    except Exception as error:
        said = _SYSTEM.search(str(error))
        if isinstance(error, OSError) and (said or error.strerror):
            reason = said[1] if said else error.strerror
            raise UsageError(
                f"{path} cannot be read ({reason}); check the path, its permissions and memory."
            ) from error
        raise UsageError(f"{path} is not a readable safetensors file ({why(error)}); {cure}.") from error


def _check_width(file: Any, name: str, path: Path) -> None:
    """Refuse a tensor of ``file``, which is open and lies at ``path``, of numbers that arrays here cannot have."""
    dtype = file.get_slice(name).get_dtype()
    if dtype.startswith(_NARROW):
        raise UsageError(
            f"{path}: tensor {shown(name)} holds {dtype}, numbers of less than 16 bits, which are codes of a "
            "quantization; get the weights in floating point of 16 bits or more."
        )


def read_tensors(
    path: Path, cure: str = "copy it again", wanted: Callable[[str], bool] = lambda name: True
) -> dict[str, np.ndarray]:
    """All ``wanted`` tensors of a file by name; raises as :func:`open_tensors` does."""
    file = open_tensors(path, cure)
    names = [name for name in file.keys() if wanted(name)]  # noqa: SIM118  (no dict)
    for name in names:
        _check_width(file, name, path)
    try:
        return {name: file.get_tensor(name) for name in names}
    except MemoryError:
        raise
    except Exception as error:
        raise UsageError(f"{path} is not a readable safetensors file ({why(error)}); {cure}.") from error
