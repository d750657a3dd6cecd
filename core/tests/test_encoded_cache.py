"""Data kept encoded: found where everything that shapes it is the same, checked, and no different from new."""

from __future__ import annotations

import datetime
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from timeless import timeless

import sft
from sft.data import encoded_cache
from sft.data.encoded import Counts, Encoded
from sft.data.encoded_cache import EncodedCache, Kept
from sft.data.jinja_template import written_dates
from sft.data.learned import Learned
from sft.data.tokenizer import Tokenizer
from sft.files import read_report
from sft.progress import Progress
from sft.resolve import resolve

DATA = Encoded(
    np.arange(7, dtype=np.int32),
    np.arange(7) % 2 > 0,
    np.array([0, 3, 7], np.int64),
    Counts(records=3, records_dropped=1, tokens=5, target_tokens=3),
)


class Cache:
    """A cache of one data file and one tokenizer, with what it has said."""

    def __init__(self, folder: Path, models: Path) -> None:
        self.folder, self.said = folder / "cache", list[str]()
        self.tokenizer = folder / "tokenizer"
        shutil.copytree(models / "qwen2-untied", self.tokenizer)
        self.files = [folder / "train.json"]
        self.files[0].write_text("one\ntwo\n")

    def open(
        self,
        lengths: tuple[int, int] = (10, 20),
        positions: int = 100,
        now: datetime.datetime | None = None,
        template: str | None = None,
        learned: Learned = Learned(),  # noqa: B008  (it never changes)
        enable_thinking: bool | None = None,
        **settings: Any,
    ) -> EncodedCache:
        plugins = resolve(settings, ())[1]
        tokenizer = Tokenizer(self.tokenizer, now, template, enable_thinking)
        return EncodedCache(self.folder, plugins, tokenizer, lengths, learned, positions, Progress(self.said.append))

    def name(self, **changes: Any) -> str:
        return self.open(**changes).place(self.files).path.name

    def filled(self) -> Path:
        cache = self.open()
        place = cache.place(self.files)
        cache.write(place, Kept(DATA, "src/tgt"))
        return place.path

    def read(self, **changes: Any) -> Kept | None:
        cache = self.open(**changes)
        return cache.read(cache.place(self.files))


@pytest.fixture
def cache(tmp_path: Path, models: Path) -> Cache:
    return Cache(tmp_path, models)


def test_what_is_kept_is_found_again(cache: Cache) -> None:
    assert cache.read() is None
    path = cache.filled()
    kept = cache.read()
    assert kept is not None
    assert kept.format == "src/tgt"
    assert kept.data.counts == DATA.counts
    assert kept.data.fingerprint() == DATA.fingerprint()
    for name in ("ids", "trained", "offsets"):
        expected, found = getattr(DATA, name), getattr(kept.data, name)
        assert (found.dtype, found.tolist()) == (expected.dtype, expected.tolist())
    assert sorted(load_file(path)) == ["beside", "dropped", "further", "ids", "offsets", "trained"]
    assert list(cache.folder.iterdir()) == [path]
    assert cache.said == []


def test_weights_are_kept_too(cache: Cache) -> None:
    weights = np.where(DATA.trained, 0.5, 0).astype(np.float32)
    data = Encoded(DATA.ids, DATA.trained, DATA.offsets, DATA.counts, weights=weights)
    assert data.fingerprint() != DATA.fingerprint()
    place = cache.open().place(cache.files)
    cache.open().write(place, Kept(data, "src/tgt"))
    kept = cache.read()
    assert kept is not None
    assert kept.data.weights is not None
    assert (kept.data.weights.dtype, kept.data.weights.tolist()) == (weights.dtype, weights.tolist())
    assert kept.data.fingerprint() == data.fingerprint()
    tensors, metadata = load_file(place.path), {}
    with safe_open(place.path, framework="np") as file:
        metadata = file.metadata()
    save_file({**tensors, "weights": 2 * tensors["weights"]}, place.path, metadata)
    assert cache.read() is None
    assert "it is damaged" in cache.said[-1]


# --- what it is found by ------------------------------------------------------------------------------------


def test_everything_that_shapes_the_encoding_gives_another_place(
    cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [cache.name(), cache.name(lengths=(11, 20)), cache.name(lengths=(10, 21))]
    (tmp_path / "other.jinja").write_text("{{ messages }}")
    names += [cache.name(template=template) for template in ("none", str(tmp_path / "other.jinja"))]
    content = cache.files[0].read_bytes()
    cache.files[0].write_bytes(content.replace(b"two", b"tow"))
    names.append(cache.name())
    cache.files[0].write_bytes(content)
    names += [cache.name(learned=learned) for learned in (Learned("last_answer"), Learned(thoughts="none"))]
    (tmp_path / "thinks.jinja").write_text("{{ messages }}{{ enable_thinking }}")
    thinks = str(tmp_path / "thinks.jinja")
    names += [cache.name(template=thinks, enable_thinking=value) for value in (None, True, False)]
    (tmp_path / "more.json").write_text("three\n")
    cache.files.append(tmp_path / "more.json")
    names.append(cache.name())
    cache.files.reverse()
    names.append(cache.name())
    cache.files = [cache.files[1].rename(tmp_path / "train.csv")]
    names.append(cache.name())
    cache.files = [cache.files[0].rename(tmp_path / "train.json")]
    path = cache.tokenizer / "tokenizer.json"
    vocabulary = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**vocabulary, "normalizer": {"type": "Lowercase"}}), encoding="utf-8")
    names.append(cache.name())
    path.write_text(json.dumps(vocabulary), encoding="utf-8")
    monkeypatch.setattr(encoded_cache, "version", lambda name: "9")
    names.append(cache.name())
    monkeypatch.undo()
    read: list[Path] = []
    monkeypatch.setattr(encoded_cache, "_digest_of_files", lambda paths: read.extend(paths) or "another encoder")
    names.append(cache.name())
    assert {path.name for path in read} > {"encoding.py", "jinja_template.py", "conversations.py"}
    assert len(set(names)) == len(names) == 17


def test_what_does_not_shape_the_encoding_gives_the_same_place(cache: Cache, tmp_path: Path) -> None:
    name = cache.name()
    assert cache.name(positions=7) == name
    assert cache.name(now=datetime.datetime(1999, 1, 1)) == name  # the template does not write it
    cache.files = [shutil.copy(cache.files[0], tmp_path / "elsewhere.json")]
    os.utime(cache.files[0], (1, 1))
    assert cache.name() == name


FORMATS = """
    from dataclasses import dataclass
    import sft

    @dataclass
    class Options:
        question_key: str = sft.option("question", "key of the question")

    class Reader(sft.Plugin):
        name = "reader"
        api_version = 1
        Options = Options

        @sft.hookimpl
        def sft_record_format(self, record):
            return None

    class Refines(sft.Plugin):
        name = "refines"
        api_version = 1
        requires = ("reader",)
"""


def test_plugins_that_read_records_count(cache: Cache, distribute: Callable[..., None], site: Path) -> None:
    distribute("reader-dist", FORMATS, {"reader": "Reader", "refines": "Refines"})
    names = [
        cache.name(),
        cache.name(plugin=["reader"]),
        cache.name(plugin=["reader"], question_key="q"),
        cache.name(plugin=["reader", "refines"]),
    ]
    with (site / "reader_dist.py").open("a") as file:  # its author works on it
        file.write("# better\n")
    names.append(cache.name(plugin=["reader"]))
    assert len(set(names)) == 5


def test_a_plugin_without_a_version_is_refused(train: Callable[..., Any], tmp_path: Path) -> None:
    class Reads(sft.Plugin):
        name = "reads"
        api_version = 1

        @sft.hookimpl
        def sft_record_format(self, record: dict[str, Any]) -> list[sft.Turn] | None:
            return None

    with pytest.raises(sft.UsageError, match=r"cannot tell one version of plugin reads from another.* leave encoded"):
        train(plugins=(Reads,), max_steps=1, encoded_cache=str(tmp_path / "cache"))


DAYS = [datetime.datetime(2026, 11, 25, 9), datetime.datetime(2026, 11, 25, 17), datetime.datetime(2026, 11, 26, 9)]


@pytest.mark.parametrize(
    ("template", "different"),
    [
        ("{{ strftime_now('%Y') }}", 1),
        ('{%- if strftime_now is defined %}{{ strftime_now("%d %b") }}{% endif %}', 2),
        ("{{ strftime_now('%d') }}{{ strftime_now( '%H' ) }}", 3),
        ("{% set form = '%Y' %}{{ strftime_now(form) }}", 3),
        ("{% set say = strftime_now %}{{ say('%Y') }}", 3),
        ("{{ messages }}", 1),
    ],
)
def test_a_date_counts_as_far_as_a_template_writes_it(template: str, different: int) -> None:
    assert len({tuple(written_dates(template, day)) for day in DAYS}) == different


# --- what is not as it should be ----------------------------------------------------------------------------


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def other_counts(path: Path) -> None:
    """Of the same length, so that everything else is as it was."""
    path.write_bytes(path.read_bytes().replace(b'records\\": 3', b'records\\": 4'))


def empty(path: Path) -> None:
    path.write_bytes(b"")


def foreign(path: Path) -> None:
    encoded_cache.save_tensors(path, {"weight": np.zeros(3)})


@pytest.mark.parametrize("damage", [cut, flip, other_counts, empty, foreign])
def test_what_is_damaged_or_foreign_is_named_and_replaced(cache: Cache, damage: Callable[[Path], None]) -> None:
    path = cache.filled()
    before = path.read_bytes()
    damage(path)
    assert path.read_bytes() != before
    assert cache.read() is None
    (said,) = cache.said
    assert said.startswith(f"note: {path} cannot be used (")
    assert said.endswith("); the data is encoded anew")
    assert "\n" not in said
    cache.filled()
    assert path.read_bytes() == before


def test_a_file_of_other_data_under_the_name_is_not_taken(cache: Cache) -> None:
    path = cache.filled()
    cache.files[0].write_text("three\n")
    path.rename(cache.open().place(cache.files).path)
    assert cache.read() is None
    assert "it holds something else" in cache.said[0]


def test_data_that_changes_while_it_is_read_is_not_kept(cache: Cache) -> None:
    opened = cache.open()
    place = opened.place(cache.files)
    cache.files[0].write_text("one\ntwo\nthree\n")
    opened.write(place, Kept(DATA, "src/tgt"))
    assert list(cache.folder.iterdir()) == []
    assert cache.said == ["note: the data has changed while it was read, so it is not kept encoded"]


def test_a_full_disk_stops_nothing(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, *_: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(encoded_cache, "save_tensors", full)
    cache.filled()
    assert cache.said == [
        f"note: the encoded data could not be kept in {cache.folder} (No space left on device)",
    ]
    assert list(cache.folder.iterdir()) == []


def test_what_a_killed_process_left_goes_with_time(cache: Cache) -> None:
    cache.folder.mkdir()
    old, new = (cache.folder / f".staging-{number}-x.safetensors" for number in (1, 2))
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (1, 1))
    path = cache.filled()
    assert sorted(cache.folder.iterdir()) == [new, path]


def test_records_that_are_too_long_for_a_model_are_encoded_again_to_be_named(cache: Cache) -> None:
    cache.filled()
    assert cache.read(positions=3) is not None
    assert cache.read(positions=2) is None


# --- in a run -----------------------------------------------------------------------------------------------


def test_a_run_with_kept_data_is_the_run_without(
    train: Callable[..., Any], metrics: Callable[..., Any], tmp_path: Path
) -> None:
    kept = {"encoded_cache": str(tmp_path / "cache")}
    said: dict[str, list[str]] = {}
    summaries = {}
    for name, cache in (("plain", {}), ("new", kept), ("again", kept)):
        said[name] = []
        summaries[name] = train(
            name, max_steps=3, save_strategy="steps", save_steps=2, src_length=20, say=said[name].append, **cache
        )
        said[name] = timeless(said[name], tmp_path / name)
    assert said["plain"] == said["new"]
    extra = [line for line in said["again"] if line not in said["plain"]]
    assert [line.split(" from ")[0] for line in extra] == ["train data is read encoded", "dev data is read encoded"]
    assert [line for line in said["again"] if line not in extra] == said["plain"]
    assert len(list((tmp_path / "cache").iterdir())) == 2
    states = {name: json.loads((tmp_path / name / "checkpoint-2/trainer/state.json").read_text()) for name in said}
    for name in ("new", "again"):
        assert summaries[name].data == summaries["plain"].data
        assert read_report(tmp_path / name)["result"]["data"] == summaries["plain"].data
        assert states[name]["data"] == states["plain"]["data"]
        assert metrics(tmp_path / name, same=True) == metrics(tmp_path / "plain", same=True)
    # A checkpoint goes on whether the data is kept or not, without a word about it.
    resumed: list[str] = []
    train("plain", max_steps=4, src_length=20, resume_from_checkpoint="auto", say=resumed.append, **kept)
    assert not any("encoded_cache was" in line for line in resumed)


def test_a_folder_that_is_not_writable_is_refused_where_it_does_not_hold_the_data(
    train: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"max_steps": 1, "encoded_cache": str(tmp_path / "cache")}
    train("filled", **settings)
    access = os.access  # the tests may be run by root, who is refused nothing
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path / "cache" and access(path, mode))
    said: list[str] = []
    train("read", say=said.append, **settings)
    assert len([line for line in said if "is read encoded from" in line]) == 2
    with pytest.raises(sft.UsageError, match=r"^encoded_cache .*cache is not writable, and does not hold this data;"):
        train("other", max_length=9, **settings)


def test_nothing_is_kept_where_nobody_asks(
    train: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(EncodedCache, "__init__", lambda *_: pytest.fail("a cache"))
    monkeypatch.setattr("sft.data.reading._WORTH_KEEPING", 0.0)
    said: list[str] = []
    train(max_steps=1, say=said.append)
    assert any(line.startswith("encoding train data took 0:00:0") and "--encoded_cache FOLDER" in line for line in said)


def test_a_stream_is_not_kept_and_says_so(train: Callable[..., Any], tmp_path: Path) -> None:
    said: list[str] = []
    train(max_steps=1, lazy=True, do_eval=False, encoded_cache=str(tmp_path / "cache"), say=said.append)
    assert any("streamed from 1 file" in line and "not kept in encoded_cache" in line for line in said)
    assert list((tmp_path / "cache").iterdir()) == []
