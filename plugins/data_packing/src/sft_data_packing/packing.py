"""Plugins ``zero-padding`` and ``greedy-zero-padding``: rows of several records instead of padding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import sft

if TYPE_CHECKING:
    from sft import DataCollator, Run


_ANSWERED = {"eval_packing": sft.Foreign("dev data is packed as training data is", ("", "none", "null"))}


class ZeroPadding(sft.Plugin):
    """Consecutive records are concatenated while they fit into a row of ``max_length``."""

    name = "zero-padding"
    api_version = 1
    summary = "Consecutive records share a row (next-fit)."
    reference = "PaddleNLP, zero padding"
    paddlenlp: ClassVar[dict[str, sft.Foreign]] = _ANSWERED

    @sft.hookimpl
    def sft_collator(self, run: Run) -> DataCollator:
        from sft_data_packing.collators import NextFitCollator

        capacity, pad_id = run.settings.data.max_length, run.tokenizer.pad_id
        return NextFitCollator(capacity, pad_id, lambda text: run.say(f"{self.name}: {text}"))


@dataclass
class GreedyOptions:
    packing_group_size: int = sft.option(4096, "records that are packed together, best-fit-decreasing", minimum=1)


class GreedyZeroPadding(sft.Plugin):
    """Best-fit-decreasing packing within groups of records."""

    name = "greedy-zero-padding"
    api_version = 1
    summary = "Records share a row by best-fit-decreasing within groups."
    reference = "Johnson 1973, best-fit-decreasing; PaddleNLP, greedy zero padding"
    supersedes = ("zero-padding",)
    paddlenlp: ClassVar[dict[str, sft.Foreign]] = _ANSWERED
    Options = GreedyOptions

    @sft.hookimpl
    def sft_collator(self, run: Run) -> DataCollator:
        from sft_data_packing.collators import BestFitCollator

        capacity, pad_id = run.settings.data.max_length, run.tokenizer.pad_id
        group = self.options.packing_group_size
        return BestFitCollator(capacity, pad_id, group, lambda text: run.say(f"{self.name}: {text}"))
