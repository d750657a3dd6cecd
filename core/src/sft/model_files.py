"""The files of a model, a tokenizer or an adapter in a folder that somebody else made: how their names end, and that
none is a link to what lies elsewhere."""

from __future__ import annotations

from pathlib import Path

from sft.errors import UsageError
from sft.foreign_text import shown
from sft.hub_names import in_cache

PICKLED = (".pdparams", ".bin")
"""Names of pickled weight files end so: Paddle's, and torch's."""
READ = (".json", ".jinja", ".txt", ".model", ".safetensors", *PICKLED)
"""What is read of such a folder ends so."""


def check_links(folder: Path) -> None:
    """Refuse links in the folder of a model, a tokenizer or an adapter that lead out of it: such a folder comes from
    somebody, who has no say in what else is opened on this machine, or copied into results.

    The hub's cache holds files once, and links to them; these are what they seem. Raises :class:`UsageError`.
    """
    home = in_cache(folder.resolve())
    within = home[0] if home is not None else folder.resolve()
    try:
        paths = list(folder.iterdir())
    except OSError:  # whoever reads a file of it says what is wrong
        return
    for path in paths:
        if not path.is_symlink() or not path.name.endswith(READ):
            continue
        target = path.resolve()
        is_blob = target.parent.name == "blobs" and target.parent.parent.name.startswith("models--")
        if not target.is_relative_to(within) and not is_blob:
            raise UsageError(
                f"{shown(path)} is a link that leads out of its folder, to {shown(target)}; copy the file there if you "
                "trust it, or give the folder where it lies."
            )
