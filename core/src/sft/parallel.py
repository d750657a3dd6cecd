"""What a parallel strategy (:class:`sft.ParallelStrategy`) is written with: marks on what it divides, the places where
processes meet while a model computes, and the pieces of training that it puts in an order of its own.

docs/strategies.md shows how they go together. Importing this module imports paddle.
"""

from __future__ import annotations

from sft.distributed.meeting import Exchange, Meeting, Vocabulary, by_expert
from sft.distributed.parts import (
    Part,
    copy_place,
    is_elsewhere,
    mark_owner,
    mark_part,
    mark_stage,
    mark_sums,
    owner_of,
    part_of,
    stage_of,
    whole_shape,
)
from sft.distributed.pieces import Piece
from sft.distributed.whole import set_value
from sft.models.forward import hidden_states
from sft.models.layers import linear_features
from sft.seams import ReadsTogether
from sft.training.report import close_report
from sft.training.strategy import SingleProcess, squared_gradients, sum_of_squares

__all__ = [
    "Exchange",
    "Meeting",
    "Part",
    "Piece",
    "ReadsTogether",
    "SingleProcess",
    "Vocabulary",
    "by_expert",
    "close_report",
    "copy_place",
    "hidden_states",
    "is_elsewhere",
    "linear_features",
    "mark_owner",
    "mark_part",
    "mark_stage",
    "mark_sums",
    "owner_of",
    "part_of",
    "set_value",
    "squared_gradients",
    "stage_of",
    "sum_of_squares",
    "whole_shape",
]
