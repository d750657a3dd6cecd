"""The next item is made while the one before it is in use."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sft
from sft.data.ahead import one_ahead


class Items:
    """Numbers from 0, and which of them have been made, by which thread."""

    def __init__(self, number: int, fails_at: int | None = None) -> None:
        self.number, self.fails_at = number, fails_at
        self.made: list[tuple[int, str]] = []
        self.ready = threading.Condition()

    def __iter__(self) -> Iterator[int]:
        for item in range(self.number):
            if item == self.fails_at:
                raise sft.UsageError(f"item {item} cannot be made")
            with self.ready:
                self.made.append((item, threading.current_thread().name))
                self.ready.notify_all()
            yield item

    def wait_for(self, number: int) -> None:
        with self.ready:
            assert self.ready.wait_for(lambda: len(self.made) >= number, timeout=10)


def waiting() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "sft-next-batch"]


def test_one_item_is_made_while_another_is_in_use_and_never_two() -> None:
    items = Items(5)
    found = []
    for item in one_ahead(iter(items)):
        items.wait_for(min(item + 2, 5))  # nobody but a thread could make it
        for thread in waiting():
            thread.join(10)
        assert len(items.made) == min(item + 2, 5)
        found.append(item)
    assert found == [0, 1, 2, 3, 4]
    here = threading.current_thread().name
    assert items.made == [(0, here), *((number, "sft-next-batch") for number in range(1, 5))]
    assert not waiting()


def test_nothing_is_made_that_is_not_asked_for() -> None:
    items = Items(5)
    assert list(one_ahead(islice(iter(items), 2))) == [0, 1]
    assert len(items.made) == 2
    assert list(one_ahead(iter(Items(0)))) == []


@pytest.mark.parametrize("at", [0, 1, 3])
def test_an_error_comes_in_the_place_of_its_item(at: int) -> None:
    taken = one_ahead(iter(Items(5, fails_at=at)))
    assert list(islice(taken, at)) == list(range(at))
    with pytest.raises(sft.UsageError, match=f"item {at} cannot be made"):
        next(taken)
    assert not waiting()


def test_no_thread_is_left_where_the_caller_stops() -> None:
    taken = one_ahead(iter(Items(5)))
    next(taken)
    taken.close()
    assert not waiting()


# --- in a run -----------------------------------------------------------------------------------------------


class Failing:
    """A collator whose third batch for training cannot be made; it notes which thread makes each."""

    packs = False

    def __init__(self, pad_id: int) -> None:
        self.pad_id = pad_id
        self.threads: list[str] = []

    def rows(self, lengths: np.ndarray, rng: np.random.Generator | None) -> list[tuple[int, ...]]:
        return [(number,) for number in range(len(lengths))]

    def batch(self, rows: Any) -> sft.Batch:
        self.threads.append(threading.current_thread().name)
        if len(self.threads) == 3:
            raise sft.UsageError("the third batch is one too many")
        return sft.assemble(rows, self.pad_id)


def test_a_collator_that_fails_in_the_thread_ends_the_run_with_its_sentence(
    train: Callable[..., Any], metrics: Callable[..., Any], tmp_path: Path
) -> None:
    made: list[Failing] = []

    class Fails(sft.Plugin):
        name = "fails"
        api_version = 1

        @sft.hookimpl
        def sft_collator(self, run: sft.Run) -> Failing:
            made.append(Failing(run.tokenizer.pad_id))
            return made[0]

    with pytest.raises(sft.UsageError, match=r"^the third batch is one too many$"):
        train(plugins=(Fails,), max_steps=4, do_eval=False)
    assert [line["step"] for line in metrics(tmp_path / "out")] == [1, 2]
    assert made[0].threads == [threading.current_thread().name, "sft-next-batch", "sft-next-batch"]
    for thread in waiting():
        thread.join(10)
    assert not waiting()
