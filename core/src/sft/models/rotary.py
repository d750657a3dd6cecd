"""Rotary position embedding (arXiv 2104.09864): the frequencies of each kind of scaling. The rotation itself is in
``turning.py``; nothing here imports paddle.

The definitions are those of Hugging Face's checkpoints (``rope_parameters``, formerly ``rope_scaling``). Two kinds,
``dynamic`` and ``longrope``, depend on how long a document is; each document counts for itself, so it is read alike
alone, padded and packed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")


@dataclass(frozen=True)
class Rotary:
    """How positions turn the queries and keys of a layer. ``size`` dimensions of each head turn, the first ones;
    pair i by position / ``base``^(2i / size) radians (arXiv 2104.09864, section 3.2.2).

    ``kind`` is one of :data:`KINDS`, ``values`` its parameters by Hugging Face's names. ``positions`` is the model's
    ``max_position_embeddings``. ``interleaved``: dimensions 2i and 2i + 1 turn together, not i and i + size / 2.
    """

    base: float
    size: int
    positions: int
    kind: str = "default"
    values: Mapping[str, Any] = field(default_factory=dict)
    interleaved: bool = False

    @property
    def limit(self) -> int | None:
        """The length up to which documents have one set of frequencies; longer ones have their own. None: no limit."""
        if self.kind == "dynamic":
            return self.positions
        return self._original if self.kind == "longrope" else None

    @property
    def reach(self) -> int:
        """The length of the longest document. Some scalings say how much longer it is than the model's positions."""
        factor = float(self.values.get("factor") or 1.0)
        if self.kind in ("linear", "dynamic"):
            return int(self.positions * factor)
        return max(self.positions, int(self._original * factor)) if self.kind == "yarn" else self.positions

    def frequencies(self, length: int = 0) -> tuple[np.ndarray, float]:
        """The angle of each pair for one position, float64 [size / 2], and the factor of cosines and sines, for a
        document of ``length`` tokens."""
        plain = self._plain(self.base)
        if self.kind == "linear":
            return plain / float(self.values["factor"]), 1.0
        if self.kind == "dynamic":
            return self._dynamic(length), 1.0
        if self.kind == "llama3":
            return self._llama3(plain), 1.0
        if self.kind == "yarn":
            return self._yarn(plain)
        if self.kind == "longrope":
            return self._longrope(plain, length)
        return plain, 1.0

    @property
    def _original(self) -> int:
        return int(self.values.get("original_max_position_embeddings") or self.positions)

    def _plain(self, base: float) -> np.ndarray:
        return np.asarray(base ** -(np.arange(0, self.size, 2, dtype=np.float64) / self.size))

    def _dynamic(self, length: int) -> np.ndarray:
        """NTK-aware scaling: the base grows with the length beyond the model's own positions."""
        factor, longest = float(self.values["factor"]), max(length, self.positions)
        growth = factor * longest / self.positions - (factor - 1.0)
        return self._plain(self.base * growth ** (self.size / (self.size - 2)))

    def _llama3(self, plain: np.ndarray) -> np.ndarray:
        """Long waves are stretched by the factor, short ones stay, those between are mixed."""
        factor, low, high = (float(self.values[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
        turns = self._original * plain / (2 * math.pi)  # how often a pair turns within the original context
        share = np.clip((turns - low) / (high - low), 0.0, 1.0)
        return (1.0 - share) * plain / factor + share * plain

    def _yarn(self, plain: np.ndarray) -> tuple[np.ndarray, float]:
        """arXiv 2309.00071: a ramp over the dimensions between stretched and original frequencies."""
        values, original = self.values, self._original
        factor = float(values["factor"])

        def dimension(turns: float) -> float:
            return self.size * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(self.base))

        low = dimension(float(values.get("beta_fast") or 32))
        high = dimension(float(values.get("beta_slow") or 1))
        if values.get("truncate", True):
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self.size - 1)
        ramp = np.clip((np.arange(self.size // 2) - low) / max(high - low, 1e-3), 0.0, 1.0)
        return plain / factor * ramp + plain * (1.0 - ramp), self._yarn_scale(factor)

    def _yarn_scale(self, factor: float) -> float:
        given = self.values.get("attention_factor")
        if given is not None:
            return float(given)

        def scale(weight: float) -> float:
            return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

        above, below = self.values.get("mscale"), self.values.get("mscale_all_dim")
        return scale(float(above)) / scale(float(below)) if above and below else scale(1.0)

    def _longrope(self, plain: np.ndarray, length: int) -> tuple[np.ndarray, float]:
        """arXiv 2402.13753: each pair has a factor of its own, one list for short documents and one for long ones."""
        original = self._original
        factors = self.values["long_factor" if length > original else "short_factor"]
        given, growth = self.values.get("attention_factor"), self.values.get("factor")
        if growth is None:
            growth = self.positions / original
        scale = 1.0 if growth <= 1 else math.sqrt(1 + math.log(growth) / math.log(original))
        return plain / np.asarray(factors, np.float64), float(given) if given is not None else scale
