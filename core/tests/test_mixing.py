"""Several data sets in one order: against a plain reimplementation, by proportions, and found again in the middle."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stopped_runs import StoppedError, stopping_when_saved

import sft
from sft.conversations import Turn
from sft.data.feeds import Feed, InTurn, Mixed
from sft.data.mixing import BLOCK, Mix, pass_order
from sft.data.sets import DataSet
from sft.data.stream import Stream
from sft.testing import needs

CASES = [
    pytest.param((0.7, 0.3), (50, 40), False, id="first"),
    pytest.param((0.7, 0.3), (50, 40), True, id="all"),
    pytest.param((5, 1, 2), (3, 4000, 70), True, id="three, more than a block"),
    pytest.param((5, 1, 2), (3, 4000, 70), False, id="three, a few draws"),
]


def plain_passes(weights: tuple[float, ...], sizes: tuple[int, ...], seed: int, until_all: bool) -> Iterator[list[int]]:
    """The sets of each draw, pass after pass, one draw at a time in plain Python."""
    number, uniforms = 0, list[float]()
    while True:
        counts, found = [0] * len(sizes), []
        while not (all if until_all else any)(count >= size for count, size in zip(counts, sizes, strict=True)):
            block, within = divmod(number, BLOCK)
            if not within:
                uniforms = np.random.default_rng([seed, 48, block]).random(BLOCK).tolist()
            uniform = uniforms[within] * sum(weights)
            chosen = 0
            while chosen < len(weights) - 1 and uniform >= sum(weights[: chosen + 1]):
                chosen += 1
            counts[chosen] += 1
            found.append(chosen)
            number += 1
        yield found


@pytest.mark.parametrize(("weights", "sizes", "until_all"), CASES)
def test_passes_are_those_of_a_plain_reimplementation(
    weights: tuple[float, ...], sizes: tuple[int, ...], until_all: bool
) -> None:
    mix, before = Mix(weights, 7, until_all), [0] * len(sizes)
    edges = np.cumsum([0, *sizes])
    seen: list[list[int]] = [[] for _ in sizes]
    passes = plain_passes(weights, sizes, 7, until_all)
    for _ in range(2 if max(sizes) > 1000 and until_all else 4):
        order, before = pass_order(mix, sizes, before)
        sets = np.searchsorted(edges, order, side="right") - 1
        assert sets.tolist() == next(passes)
        for one, record in zip(sets.tolist(), order.tolist(), strict=True):
            seen[one].append(record - int(edges[one]))
    for one, records in enumerate(seen):
        assert before[one] == len(records)
        for start in range(0, len(records), sizes[one]):  # no record again before all others
            part = records[start : start + sizes[one]]
            assert len(set(part)) == len(part)


@pytest.mark.parametrize("until_all", [False, True])
def test_a_pass_ends_with_the_record_that_uses_a_set_up(until_all: bool) -> None:
    sizes = (30, 20, 25)
    order, counts = pass_order(Mix((3.0, 1.0, 1.0), 1, until_all), sizes, [0, 0, 0])
    reached = [count >= size for count, size in zip(counts, sizes, strict=True)]
    assert (all if until_all else any)(reached)
    last = int(np.searchsorted(np.cumsum([0, *sizes]), order[-1], side="right") - 1)
    assert counts[last] == sizes[last]


def test_proportions_are_within_the_binomial_bound() -> None:
    """Five standard deviations, which one seed in two million leaves; and other seeds give other orders."""
    for share in (0.7, 0.02):
        for seed in (1, 2, 3):
            mix, number = Mix((share, 1 - share), seed, False), 10 * BLOCK
            first = sum(int((mix.draws(block) == 0).sum()) for block in range(10))
            assert abs(first - number * share) < 5 * math.sqrt(number * share * (1 - share))
    assert not np.array_equal(Mix((1, 1), 1, False).draws(0), Mix((1, 1), 2, False).draws(0))
    assert not np.array_equal(Mix((1, 1), 1, False).draws(0), Mix((1, 1), 1, False).draws(1))


# --- streams ------------------------------------------------------------------------------------------------

SETS = [DataSet("a", []), DataSet("b", [])]
SIZES = {"a": 11, "b": 7}


def after(one: DataSet, number: int) -> Iterator[Any]:
    """Every third record of a file belongs to the other side of dev_split, and does not come out."""
    for place in range(number + 1, SIZES[one.name] + 1):
        if place % 3:
            yield place, [Turn("user", f"{one.name}{place}")]


def contents(feed: Feed, size: int) -> tuple[list[str], bool]:
    taken = feed.take(size)
    return [turns[0].content for one in taken.by_set for turns in one if isinstance(turns, list)], taken.ends_pass


@pytest.mark.parametrize("mix", [None, Mix((0.6, 0.4), 3, False), Mix((0.6, 0.4), 3, True)])
def test_a_feed_goes_on_from_each_of_its_places(mix: Mix | None) -> None:
    def feed(place: dict[str, Any] | None) -> Feed:
        return InTurn(SETS, after, place) if mix is None else Mixed(SETS, after, mix, place)

    whole = feed(None)
    places, windows = [], []
    for _ in range(20):
        places.append(json.loads(json.dumps(whole.place())))
        windows.append(contents(whole, 3))
    for start, place in enumerate(places):
        again = feed(place)
        assert [contents(again, 3) for _ in range(20 - start)] == windows[start:]


@pytest.mark.parametrize("until_all", [False, True])
def test_a_mixed_stream_draws_as_the_order_of_a_pass(until_all: bool) -> None:
    """The sets of each pass are those of the records in memory, and each set comes in the order of its file."""
    mix, sizes = Mix((0.6, 0.4), 3, until_all), [8, 5]
    feed, before, drawn = Mixed(SETS, after, mix, None), [0, 0], {"a": 0, "b": 0}
    files = {name: [f"{name}{place}" for place in range(1, SIZES[name] + 1) if place % 3] for name in SIZES}
    for _ in range(5):
        order, before = pass_order(mix, sizes, before)
        for number, record in enumerate(order.tolist()):
            ((content,), ends) = contents(feed, 1)
            name = "a" if record < sizes[0] else "b"
            assert content == files[name][drawn[name] % len(files[name])]
            drawn[name] += 1
            assert ends == (number + 1 == len(order))


# --- in a run -----------------------------------------------------------------------------------------------


@pytest.fixture
def two(tmp_path: Path) -> list[dict[str, Any]]:
    """Two sets of 20 and 12 records, of different formats, each with dev data."""
    sets = []
    for name, number, weight in (("a", 20, 0.7), ("b", 12, 0.3)):
        folder = tmp_path / f"set-{name}"
        folder.mkdir()
        for split, many in (("train", number), ("dev", 3)):
            values = [
                {"src": f"type#{n}", "tgt": "A coat" + " for you" * (n % 5)}
                if name == "a"
                else {"instruction": f"write {n}", "output": "be kind" + " be good" * (n % 4)}
                for n in range(many)
            ]
            (folder / f"{split}.json").write_text("".join(json.dumps(value) + "\n" for value in values))
        sets.append({"path": str(folder), "name": name, "weight": weight})
    return sets


KEPT = {"per_device_train_batch_size": 3, "max_steps": 14, "save_strategy": "steps", "save_steps": 1}


@pytest.mark.parametrize(
    "more",
    [
        pytest.param({"stops": (10,), "lazy": True}, id="lazy-short"),
        pytest.param({}, id="whole", marks=pytest.mark.slow),
        pytest.param({"lazy": True}, id="lazy", marks=pytest.mark.slow),
        pytest.param({"mix_until": "all_exhausted"}, id="all", marks=pytest.mark.slow),
        pytest.param({"lazy": True, "mix_until": "all_exhausted"}, id="lazy-all", marks=pytest.mark.slow),
        pytest.param({"plugin": ["zero-padding"]}, id="packed", marks=[pytest.mark.slow, needs("zero-padding")]),
        pytest.param({"lazy": True, "dataset_num_proc": 2}, id="lazy-processes", marks=pytest.mark.slow),
        pytest.param({"dev_split": 0.2, "split": "train"}, id="dev-split", marks=pytest.mark.slow),
    ],
)
def test_two_sets_resume_to_the_same_bits(
    train: Callable[..., sft.Summary],
    metrics: Callable[..., Any],
    two: list[dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    more: dict[str, Any],
) -> None:
    """A pass has some 24 records, so step 5 is in its middle and step 10 in another."""
    monkeypatch.setattr(Stream.__init__, "__defaults__", (7,))
    more = dict(more)
    stops = more.pop("stops", (5, 10))
    if more.pop("split", None):
        for one in two:
            (Path(one["path"]) / "dev.json").unlink()
    settings = {"dataset_name_or_path": two, **KEPT, **more}
    summary = train("whole", **settings)
    assert list(summary.data["train"]["sets"]) == ["a", "b"]
    for after_step in stops:
        name = f"parts-{after_step}"
        with pytest.raises(StoppedError):
            train(name, plugins=(stopping_when_saved(after_step),), **settings)
        resumed = train(name, resume_from_checkpoint="auto", **settings)
        assert metrics(tmp_path / name, same=True) == metrics(tmp_path / "whole", same=True)
        assert resumed.data == summary.data
        weights = [(tmp_path / folder / "model.safetensors").read_bytes() for folder in ("whole", name)]
        assert weights[0] == weights[1]


def test_each_dev_set_has_its_own_loss(
    train: Callable[..., sft.Summary], metrics: Callable[..., Any], two: list[dict[str, Any]], tmp_path: Path
) -> None:
    """Each is what a run with that set alone measures before training, and all together their mean over targets."""
    both = "{path}:0.7,{other}:0.3".format(path=two[0]["path"], other=two[1]["path"])
    summary = train("both", max_steps=1, dataset_name_or_path=both)
    found = metrics(tmp_path / "both")[0]
    assert list(found["eval_sets"]) == list(summary.data["dev"]["sets"]) == ["set-a", "set-b"]
    loss, targets = 0.0, 0
    for one in two:
        alone = train(f"alone-{one['name']}", max_steps=1, dataset_name_or_path=one["path"])
        measured = metrics(tmp_path / f"alone-{one['name']}")[0]
        own = found["eval_sets"][f"set-{one['name']}"]
        assert own == {key: measured[key] for key in own}
        count = alone.data["dev"]["target_tokens"]
        loss, targets = loss + measured["eval_loss"] * count, targets + count
    assert found["eval_loss"] == pytest.approx(loss / targets, rel=1e-12)


@pytest.mark.parametrize("lazy", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_sets_without_weights_follow_each_other(
    train: Callable[..., sft.Summary],
    metrics: Callable[..., Any],
    two: list[dict[str, Any]],
    tmp_path: Path,
    lazy: bool,
) -> None:
    """As one file does that holds them all (both sets in one format here)."""
    folders = [Path(one["path"]) for one in two]
    (folders[1] / "train.json").write_text((folders[0] / "train.json").read_text().replace("coat", "shirt"))
    (tmp_path / "one.json").write_text("".join((folder / "train.json").read_text() for folder in folders))
    same = {"max_steps": 14, "per_device_train_batch_size": 3, "do_eval": False, "lazy": lazy}
    train("one", dataset_name_or_path=str(tmp_path / "one.json"), **same)
    summary = train("several", dataset_name_or_path=",".join(map(str, folders)), **same)
    assert metrics(tmp_path / "one", same=True) == metrics(tmp_path / "several", same=True)
    counts = summary.data["train"]
    assert counts["records"] == sum(one["records"] for one in counts["sets"].values())


def test_other_weights_are_other_data(train: Callable[..., sft.Summary], two: list[dict[str, Any]]) -> None:
    train("out", dataset_name_or_path=two, **{**KEPT, "max_steps": 2})
    changed = [{**one, "weight": 1.0} for one in two]
    with pytest.raises(sft.UsageError, match="was trained on other tokens"):
        train("out", dataset_name_or_path=changed, resume_from_checkpoint="auto", **{**KEPT, "max_steps": 4})


def test_weights_that_make_a_pass_endless_are_refused(
    train: Callable[..., sft.Summary], two: list[dict[str, Any]]
) -> None:
    two[1]["weight"] = 1e-6
    with pytest.raises(sft.UsageError, match="mix_until all_exhausted: it takes some 8,400,012 records"):
        train(dataset_name_or_path=two, mix_until="all_exhausted", max_steps=1)


@pytest.mark.slow
def test_each_set_has_its_own_place_in_the_cache(
    train: Callable[..., sft.Summary], two: list[dict[str, Any]], tmp_path: Path
) -> None:
    heard: list[str] = []
    settings = {"dataset_name_or_path": two, "max_steps": 2, "encoded_cache": str(tmp_path / "cache")}
    first = train("first", **settings)
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) == 4
    again = train("again", say=heard.append, **settings)
    assert sum("is read encoded from" in line for line in heard) == 4
    assert (again.data, again.train_loss_last) == (first.data, first.train_loss_last)
    two[0]["limit"] = 5
    limited = train("limited", **settings)
    assert limited.data["train"]["sets"]["a"]["records"] == 5
