"""Values of a ``config.json``, checked as they are read; Hugging Face's names and defaults, of versions 4 and 5."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sft.errors import UsageError
from sft.foreign_text import quoted
from sft.models.rotary import KINDS, Rotary
from sft.precision import LARGEST, SMALLEST

SLIDING, FULL = "sliding_attention", "full_attention"
_BY_LENGTH = ("llama3", "yarn", "longrope")
_LISTS = ("short_factor", "long_factor")
_NUMBERS = (
    *("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    *("attention_factor", "beta_fast", "beta_slow"),
)
_WEIGHTS = ("mscale", "mscale_all_dim")
_NEEDED = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
    "longrope": _LISTS,
}


class Values:
    """``values`` of the config of ``where``, for a reader of a family. Each method takes a name and what stands for it
    where it is missing; without that it must be there. Null is as good as missing, but for numbers. ``values[name]`` is
    a value as it stands, or None.

    Attributes:
        where: The model's folder, as messages name it.
    """

    def __init__(self, values: Mapping[str, Any], where: Any) -> None:
        self._values = values
        self.where = where

    def __getitem__(self, name: str) -> Any:
        return self._values.get(name)

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def having(self, **more: Any) -> Values:
        """These values, and ``more``."""
        return Values({**self._values, **more}, self.where)

    def count(self, name: str, default: int | None = None, least: int = 1, most: int = 2**31 - 1) -> int:
        """A whole number from ``least`` to ``most``; ``default`` where it is missing, which None refuses."""
        value = self._given(name, default)
        if isinstance(value, int) and value > most:
            raise self.wrong(name, f"a whole number of at most {most:,}")
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise self.wrong(name, "a whole number above 0" if least == 1 else f"a whole number, {least} or more")
        return value

    def number(self, name: str, default: float) -> float:
        """A number above 0, which float32 can hold; ``default`` where it is missing."""
        value = self._values.get(name, default)
        if not _is_positive(value):
            raise self.wrong(name, "a number above 0")
        return self._in_float32(name, value)

    def optional(self, name: str, default: float | None = None) -> float | None:
        """A number above 0, which float32 can hold, or null; ``default`` where it is missing."""
        value = self._values.get(name, default)
        if value is not None and not _is_positive(value):
            raise self.wrong(name, "a number above 0 or null")
        return None if value is None else self._in_float32(name, value)

    def _in_float32(self, name: str, value: float) -> float:
        if not SMALLEST <= value <= LARGEST:
            raise self.wrong(name, f"a number from {SMALLEST:.2g} to {LARGEST:.2g}, which is what float32 holds", value)
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """A switch: true or false."""
        value = self._given(name, default)
        if not isinstance(value, bool):
            raise self.wrong(name, "true or false")
        return value

    def word(self, name: str, known: Mapping[str, str], default: str) -> str:
        """What ``known`` says of a word."""
        value = self._given(name, default)
        if not isinstance(value, str) or value not in known:
            raise self.wrong(name, f"one of {', '.join(known)}")
        return known[value]

    def window(self, default: int | None = None) -> int | None:
        """``sliding_window``, in tokens; null is none, and ``default`` where it is missing."""
        return (
            self.count("sliding_window", default) if self._values.get("sliding_window", default) is not None else None
        )

    def kinds(self, count: int, otherwise: Sequence[str]) -> list[str]:
        """``layer_types`` of ``count`` layers; ``otherwise`` where the config has none."""
        value = self._values.get("layer_types")
        if value is None:
            return list(otherwise)
        if not isinstance(value, list) or len(value) < count or any(kind not in (SLIDING, FULL) for kind in value):
            raise self.wrong("layer_types", f"{count} words, each {SLIDING} or {FULL}")
        return value[:count]

    def layers(self, name: str) -> list[int]:
        """A list of numbers of layers; none where it is missing."""
        value = self._given(name, [])
        if not isinstance(value, list) or not all(isinstance(one, int) for one in value):
            raise self.wrong(name, "a list of whole numbers")
        return value

    def refuse(self, *names: str) -> None:
        """Refuse a switch that is on and would compute something that the decoder does not."""
        for name in names:
            if self._values.get(name):
                raise UsageError(
                    f"{self.where}: {name} = {self._values[name]!r} is not computed here; use a model without it."
                )

    def rotary(
        self,
        size: int,
        positions: int,
        base: float,
        kind: str | None = None,
        share: float | None = None,
        **more: Any,
    ) -> Rotary:
        """The rotary embedding of heads of ``size``, in a model whose longest document has ``positions`` tokens; of
        layers of ``kind``, where the config tells kinds apart.

        ``base`` is the family's default, and ``share`` that of the part of a head that turns; None: the family turns
        whole heads, and a config that says otherwise is refused. ``rope_parameters`` is what transformers 5 writes,
        ``rope_scaling`` and ``rope_theta`` what came before; PaddleNLP has words of its own. ``more`` are further
        fields of :class:`Rotary`.
        """
        scaling = self._values.get("rope_scaling") or self._values.get("rope_parameters") or {}
        if not isinstance(scaling, dict):
            raise self.wrong("rope_scaling", "an object or null", scaling)
        if kind is not None and isinstance(scaling.get(kind), dict):
            scaling = scaling[kind]
        if any(isinstance(value, dict) for value in scaling.values()):
            raise UsageError(
                f"{self.where}: rotary settings by layer type are not known of this family; use another model."
            )
        scaling = dict(scaling)
        if self._values.get("rope_scaling_type"):
            scaling = {
                **{key: scaling[key] for key in ("rope_theta", "partial_rotary_factor") if key in scaling},
                "type": self._values["rope_scaling_type"],
                "factor": self._values.get("rope_scaling_factor", 1.0),
            }
        word = scaling.pop("rope_type", None) or scaling.pop("type", None) or "default"
        scaling.pop("type", None)
        word = "longrope" if word == "su" else word
        if not isinstance(word, str) or word not in KINDS:
            raise UsageError(f"{self.where}: rotary scaling {quoted(word)} is not known; known are {', '.join(KINDS)}.")
        theta = _first(scaling.pop("rope_theta", None), self._values.get("rope_theta"), base)
        turning = _first(
            scaling.pop("partial_rotary_factor", None), self._values.get("partial_rotary_factor"), share, 1.0
        )
        if not _is_number(theta) or theta <= 1:
            raise self.wrong("rope_theta", "a number above 1", theta)
        if not _is_number(turning) or not 0 < turning <= 1:
            raise self.wrong("partial_rotary_factor", "a number above 0, at most 1", turning)
        if share is None and turning != 1:
            raise UsageError(
                f"{self.where}: partial_rotary_factor = {turning!r} is not computed in this family, which turns whole "
                "heads; use a model without it."
            )
        turned = int(size * turning)
        if turned % 2 or turned < 2:
            raise UsageError(
                f"{self.where}: rotary embedding turns pairs of dimensions, and config.json gives {turned} of the "
                f"{size} of a head to it; correct head_dim or partial_rotary_factor."
            )
        # Phi-3 keeps it beside the other parameters, where it counts first.
        if word in _BY_LENGTH and self._values.get("original_max_position_embeddings") is not None:
            scaling["original_max_position_embeddings"] = self.count("original_max_position_embeddings")
        self._check_scaling(word, scaling, turned)
        found = Rotary(float(theta), turned, positions, word, scaling, **more)
        self._check_angles(found)
        return found

    def _check_angles(self, rotary: Rotary) -> None:
        """Refuse numbers that are well each for itself, and together give angles that are none."""
        try:
            with np.errstate(all="ignore"):
                computed = [rotary.frequencies(length) for length in (1, rotary.positions + 1)]
            are_numbers = all(np.isfinite(angles).all() and 0 < scale < np.inf for angles, scale in computed)
        except (ArithmeticError, ValueError):
            are_numbers = False
        if not are_numbers:
            raise UsageError(
                f"{self.where}: what config.json says of the rotary embedding ({rotary.kind}, base {rotary.base:g}, "
                f"{dict(rotary.values)}) gives no angles that are numbers; correct it."
            )

    def _check_scaling(self, word: str, scaling: Mapping[str, Any], size: int) -> None:
        for name in _NEEDED.get(word, ()):
            value = scaling.get(name)
            if name in _LISTS:
                if not isinstance(value, list) or len(value) != size // 2 or not all(map(_is_positive, value)):
                    raise self.wrong(f"rope_scaling.{name}", f"a list of {size // 2} numbers above 0", value)
            elif not _is_positive(value):
                raise self.wrong(f"rope_scaling.{name}", "a number above 0", value)
        for name in _NUMBERS:
            value = scaling.get(name)
            if value is not None and not _is_positive(value):
                raise self.wrong(f"rope_scaling.{name}", "a number above 0", value)
        for name in _WEIGHTS:
            value = scaling.get(name)
            if value is not None and not (_is_number(value) and value >= 0):
                raise self.wrong(f"rope_scaling.{name}", "a number, 0 or more", value)
        if not isinstance(scaling.get("truncate", True), bool):
            raise self.wrong("rope_scaling.truncate", "true or false", scaling["truncate"])

    def wrong(self, name: str, expected: str, value: Any = None) -> UsageError:
        """What to raise for a value that is not as ``expected``."""
        found = self._values.get(name) if value is None else value
        return UsageError(f"{self.where}: config.json must give {name} as {expected}, not {quoted(found)}.")

    def _given(self, name: str, default: Any) -> Any:
        value = self._values.get(name)
        return default if value is None else value


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _is_positive(value: Any) -> bool:
    return _is_number(value) and value > 0


def _first(*values: Any) -> Any:
    """The first that is not null."""
    return next(value for value in values if value is not None)
