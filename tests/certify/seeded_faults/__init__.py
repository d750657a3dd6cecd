"""Faults, each put into a copy of one of the project's plugins, that `sft certify` must catch.

They were written from the texts of the techniques, and from what went wrong in other trainers, before the first check
was: a fault says what is wrong with the technique, not which check would see it. ``tests/certify/seed.py`` puts one
in, certifies the plugin, and says what caught it; docs/certify.md has the table.
"""

from __future__ import annotations

from seeded_faults.fault import Fault
from seeded_faults.of_adapters import NEFTUNE, VERA
from seeded_faults.of_computing import ATTENTION, KERNELS, PARALLEL
from seeded_faults.of_lora import LORA
from seeded_faults.of_parts import PACKING, QUANTIZERS
from seeded_faults.of_training import EVENTS, EXPORTS, OBJECTIVES, OPTIMIZERS

FAULTS: tuple[Fault, ...] = (
    *(*LORA, *VERA, *NEFTUNE, *PACKING, *QUANTIZERS, *ATTENTION, *KERNELS, *PARALLEL),
    *(*OPTIMIZERS, *OBJECTIVES, *EVENTS, *EXPORTS),
)
