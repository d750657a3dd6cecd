"""What a model's class promises: sft's families keep it, so can a plugin's, and what is not kept is said."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toy_families import OwnClass, Reader, toy_model

import sft
from sft.testing import check_family

FAMILIES = Path(__file__).parent / "fixtures" / "families"
CASES = sorted(path.name for path in FAMILIES.iterdir() if path.is_dir())


@pytest.mark.parametrize("case", CASES)
def test_the_decoder_keeps_the_protocol(case: str) -> None:
    check_family(FAMILIES / case)


@pytest.mark.parametrize("plugin", [Reader, OwnClass])
def test_so_does_a_plugins_family(tmp_path: Path, plugin: type) -> None:
    check_family(toy_model(tmp_path / "toy"), plugin)


def sees_everything(model: Any) -> None:
    reading = type(model).hidden_states

    def hidden_states(embedded: Any, given: Any) -> Any:
        return reading(model, embedded + embedded.mean(axis=1, keepdim=True), given)

    model.hidden_states = hidden_states


def forgets_positions(model: Any) -> None:
    own = type(model).hidden_states

    class Shifted:
        """Positions of the whole row, whatever documents are in it."""

        def __init__(self, given: Any, count: int) -> None:
            from sft.models.turning import rotate, tables

            positions = np.broadcast_to(np.arange(count), given.positions.shape)
            rotary = model.architecture.rotaries[0]
            found = tables(rotary, positions * 2, np.full(positions.shape, count))
            self.attend, self.turn = given.attend, lambda x, _: rotate(x, rotary, *found)

    model.hidden_states = lambda embedded, given: own(model, embedded, Shifted(given, embedded.shape[1]))


def goes_around_the_embedding(model: Any) -> None:
    from paddle.nn import functional as F

    model.embed = lambda tokens: F.embedding(tokens, model.get_input_embeddings().weight)


def hides_gradients(model: Any) -> None:
    own = type(model).embed
    model.embed = lambda tokens: own(model, tokens).detach()


def scales_logits(model: Any) -> None:
    own = model.lm_head.forward
    model.lm_head.forward = lambda hidden: own(hidden) * 2.0


def learns_otherwise_with_recompute(model: Any) -> None:
    own = type(model).hidden_states

    def hidden_states(embedded: Any, given: Any) -> Any:
        return own(model, embedded * (2.0 if model.recompute else 1.0), given)

    model.hidden_states = hidden_states


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (sees_everything, "a packed row reads otherwise than alone"),
        (forgets_positions, "an answer over the cache is another"),
        (goes_around_the_embedding, "embed does not call the layer of get_input_embeddings"),
        (hides_gradients, "no gradient reaches the embedding"),
        (scales_logits, "the loss, made with lm_head's matrix, is not that of the logits"),
        (learns_otherwise_with_recompute, "with recompute, the gradient of"),
    ],
)
def test_what_is_not_kept_is_said(tmp_path: Path, fault: Callable[[Any], None], message: str) -> None:
    class Faulty(OwnClass):
        api_version = 1

        def build(self, architecture: Any) -> Any:
            model = super().build(architecture)
            fault(model)
            return model

    with pytest.raises(AssertionError, match=message):
        check_family(toy_model(tmp_path / "toy"), Faulty)


def test_so_are_sizes_and_names(tmp_path: Path) -> None:
    class Elsewhere(OwnClass):
        api_version = 1

        def read(self, values: sft.Values) -> sft.Architecture:
            return dataclasses.replace(super().read(values), block_names="model.blocks")

    with pytest.raises(AssertionError, match=r"no Linear below model\.blocks"):
        check_family(toy_model(tmp_path / "toy"), Elsewhere)
