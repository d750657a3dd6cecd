"""What `sft report` says of a run, against what the run wrote, and against recounts of its data."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from data_reports import turns_of
from toy_plugins import providing, toy

import sft
from sft.commands.cli import cli
from sft.data.batches import assemble
from sft.data.encoding import encode
from sft.data.tokenizer import Tokenizer
from sft.run_report import pictures, words
from sft.run_report.curves import curves_of, moments_of, thinned
from sft.run_report.page import page
from sft.seams import Example
from sft.testing import read_metrics

Train = Callable[..., sft.Summary]
EVIL = '<script>alert(1)</script></style><img src=x onerror="alert(2)">\x1b[2J\u202egnp'


class Threes:
    """Three records a row, in the order of the data."""

    packs = True

    def __init__(self, run: sft.Run) -> None:
        self.pad_id = run.tokenizer.pad_id

    def rows(self, lengths: np.ndarray, rng: np.random.Generator | None) -> list[tuple[int, ...]]:
        return [tuple(range(start, min(start + 3, len(lengths)))) for start in range(0, len(lengths), 3)]

    def batch(self, rows: Any) -> sft.Batch:
        return assemble(rows, self.pad_id)


Packing = providing("sft_collator", Threes, "packing")


@pytest.fixture(scope="module")
def reported() -> dict[str, Any]:
    """A run for all tests that only look: its folder and its summary."""
    return {}


@pytest.fixture
def run(reported: dict[str, Any], train: Train, tmp_path: Path) -> sft.RunReport:
    if not reported:
        reported["folder"] = tmp_path / "out"
        reported["summary"] = train(
            "out",
            (Packing,),
            **{"max_steps": 4, "logging_steps": 1, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
            **{"evaluation_strategy": "steps", "eval_steps": 2, "num_samples": 2, "max_new_tokens": 4, "seed": 7},
        )
    return sft.read_run(reported["folder"])


def test_curves_are_the_lines_that_were_written(run: sft.RunReport, reported: dict[str, Any]) -> None:
    lines = read_metrics(reported["folder"])
    steps, evaluations = ([one for one in lines if key in one] for key in ("loss", "eval_loss"))
    expected = {
        ("loss", "train"): [(one["step"], one["loss"]) for one in steps],
        ("loss", "dev"): [(one["step"], one["eval_loss"]) for one in evaluations],
        ("learning_rate", "train"): [(one["step"], one["learning_rate"]) for one in steps],
        ("grad_norm", "train"): [(one["step"], one["grad_norm"]) for one in steps],
        ("tokens_per_second", "train"): [(one["step"], one["tokens"] / one["seconds"]) for one in steps],
        ("memory_mib", "train"): [(one["step"], one["peak_memory_mib"]) for one in steps],
        ("padding", "train"): [
            (one["step"], one["padding_tokens"] / (one["padding_tokens"] + one["tokens"])) for one in steps
        ],
        ("accuracy", "dev"): [(one["step"], one["eval_accuracy"]) for one in evaluations],
    }
    found = {(one.chart, one.name): list(zip(one.steps, one.values, strict=True)) for one in run.curves}
    assert found == expected
    assert [step for step, _ in found["loss", "dev"]] == [0, 2, 4]
    assert run.moments.tokens == np.cumsum([one["tokens"] for one in steps]).tolist()
    assert (run.status, run.step, run.total_steps, run.error) == ("finished", 4, 4, None)


def test_rows_are_those_of_the_data(run: sft.RunReport, dataset: Path, base_model: Path) -> None:
    """By an encoding of the test's own: what is in each row, which tokens are learned, and how much is padding."""
    records = [json.loads(line) for line in (dataset / "train.json").read_text().splitlines()]
    data = encode([turns_of(one) for one in records], Tokenizer(base_model), 1024, 2048)
    assert run.packs
    assert [row.step for row in run.rows] == [1] * 4 + [2] * 4 + [3] * 2 + [4] * 4  # of three steps a pass
    numbers = [one.record for row in run.rows for one in row.documents]
    assert numbers == [*range(1, 31), *range(1, 13)]
    for row in run.rows:
        for one in row.documents:
            learned = data[one.record - 1].labels != -100
            assert np.repeat(np.arange(len(one.spans)) % 2 == 1, one.spans).tolist() == learned.tolist()
    # Micro-batches of two rows are as wide as the wider one.
    for pair in zip(run.rows[::2], run.rows[1::2], strict=True):
        assert {row.width for row in pair} == {max(row.tokens for row in pair)}


def test_the_mask_that_is_drawn_is_causal_attention_within_each_document(run: sft.RunReport) -> None:
    assert run.mask is not None
    documents = run.rows[run.mask.row].documents
    lengths = [one.tokens for one in documents]
    width = run.rows[run.mask.row].width
    of = np.concatenate([np.repeat(np.arange(len(lengths)), lengths), -1 - np.arange(width - sum(lengths))])
    expected = (of[:, None] == of[None, :]) & (np.arange(width)[:, None] >= np.arange(width)[None, :])
    drawn = pictures.mask(run.mask, documents)
    assert f'viewBox="0 0 {width} {width}"' in drawn
    found = np.zeros((width, width), int)
    for kind, corners in re.findall(r'<polygon class="(\w+)" points="([^"]*)"', drawn):
        points = np.array([tuple(map(float, corner.split(","))) for corner in corners.split()])
        found += _inside(points, width)
        assert (kind == "padding") == (points[:, 0].min() >= sum(lengths))
    assert found.tolist() == expected.astype(int).tolist()  # and nothing is drawn twice


def _inside(points: np.ndarray, width: int) -> np.ndarray:
    """Which cells of a square lie in a polygon, by how often a ray from within each crosses its edges."""
    y, x = np.mgrid[:width, :width]
    x, y = x + 0.5, y + 0.75
    crossed = np.zeros((width, width), bool)
    for (x1, y1), (x2, y2) in zip(points, np.roll(points, -1, axis=0), strict=True):
        if y1 != y2:
            crossed ^= ((y1 > y) != (y2 > y)) & (x < (x2 - x1) * (y - y1) / (y2 - y1) + x1)
    return crossed


def test_answers_are_kept_before_during_and_after(run: sft.RunReport, reported: dict[str, Any]) -> None:
    samples = reported["summary"].samples
    assert [one.prompt for one in run.answers] == [one["prompt"] for one in samples]
    for one, sample in zip(run.answers, samples, strict=True):
        assert one.reference == sample["reference"]
        assert [(given.when, given.step) for given in one.given] == [("before", 0), ("during", 2), ("after", 4)]
        assert (one.given[0].text, one.given[-1].text) == (sample["before"], sample["after"])
    texts = [json.loads(line)["answer"] for line in (reported["folder"] / "samples-2.jsonl").read_text().splitlines()]
    assert [one.given[1].text for one in run.answers] == texts


def test_what_trains_is_told_by_layer(run: sft.RunReport) -> None:
    found = {one.name: one.trained for one in run.layers}
    assert sum(sum(parts.values()) for parts in found.values()) == run.trained == run.total
    assert {"model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm"} <= set(found)
    assert found["model.layers.0"] == found["model.layers.1"]
    assert found["model.layers.0"].keys() >= {"self_attn.q_proj", "mlp.down_proj", "input_layernorm"}
    names = [name for name, _ in pictures.alike(run.layers)]
    assert "model.layers.0 to 1 (2 alike)" in names


def test_settings_are_those_that_were_given(run: sft.RunReport, reported: dict[str, Any]) -> None:
    assert run.changed["seed"] == 42
    assert run.changed["learning_rate"] == 5e-5
    given = {"max_steps", "logging_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "seed"}
    assert given <= set(run.changed) < set(run.settings)
    assert "weight_decay" not in run.changed


def test_the_run_leaves_the_page_and_the_same_as_json(run: sft.RunReport, reported: dict[str, Any]) -> None:
    folder = reported["folder"]
    values = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert values == {"made_by": "sft report", "runs": [json.loads(json.dumps(run.as_json()))]}
    assert (folder / "report.html").read_text(encoding="utf-8") == page([run])


def test_a_page_holds_all_and_asks_for_nothing(run: sft.RunReport) -> None:
    written = page([run])
    shown = re.sub(r"<script.*?</script>|<style.*?</style>", "", written, flags=re.DOTALL)
    for name in ("Overview", "Curves", "Answers", "Rows", "Trained parameters", "Data and events", "Settings"):
        assert f"{name}</h2>" in shown
    for text in (run.answers[0].prompt, run.answers[0].given[1].text, "seed", str(run.machine["cpu"]), "numpy"):
        assert words.value(text) in shown or pictures.text(text) in shown
    assert not re.search(r'(?:src|href)="(?!#)|url\(|@import|style="| on\w+="', shown)
    policy = re.findall(r'Content-Security-Policy" content="([^"]*)"', written)[0]
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    assert policy.count("sha256-") == 3  # the style, the library with the charts, the page's own


def test_what_a_folder_says_is_text_on_the_page(tmp_path: Path) -> None:
    folder = written(
        tmp_path / "evil",
        status="failed",
        error=EVIL,
        settings={"run_name": EVIL, "learning_rate": 1.0},
        plugins={EVIL: EVIL},
        parameters={"trained": 1, "total": 2, "layers": {EVIL: {EVIL: 1}}},
        without_effect=[[EVIL, EVIL]],
    )
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 1.0, f"toy/{EVIL}": 1.0}) + "\n")
    (folder / "samples-1.jsonl").write_text(json.dumps({"prompt": EVIL, "answer": EVIL, "reference": EVIL}) + "\n")
    (folder / "bad_records.jsonl").write_text(json.dumps({"split": EVIL, "file": EVIL, "reason": EVIL}) + "\n")
    both = page([sft.read_run(folder), sft.read_run(folder)])
    for found in (page([sft.read_run(folder)]), both):
        assert "alert(1)" in found
        assert "<script>alert" not in found
        assert "</style><img" not in found
        assert "<img" not in found
        assert "\x1b" not in found
        assert "\u202e" not in found


def written(folder: Path, **record: Any) -> Path:
    """The folder of a run that somebody has made up."""
    folder.mkdir()
    record = {"status": "finished", "settings": {}, **record}
    (folder / "run.json").write_text(json.dumps(record), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metrics.jsonl", b'{"step": 1, "loss": 2.0}\n{"step": 2, "lo'),
        ("metrics.jsonl", b'[1]\n{"loss": 1.0}\n{"step": "a"}\n\xff\xfe\n{"step": 1, "loss": NaN, "eval_loss": "x"}\n'),
        ("metrics.jsonl", b'{"step": 1, "eval_loss": 1.0, "eval_sets": {"a": 3}}\n{"step": 1, "loss": true}\n'),
        ("rows.json", b'{"rows": [{"step": 1}], "mask": 3, "packs": 1}'),
        ("rows.json", b"[]"),
        ("samples-1.jsonl", b'{"prompt": 1}\n{"answer'),
        ("samples-x.jsonl", b"{}"),
        ("bad_records.jsonl", b'{"split": 1}\n{"spl'),
    ],
)
def test_a_file_that_is_broken_costs_what_it_says_and_no_more(tmp_path: Path, name: str, content: bytes) -> None:
    folder = written(tmp_path / "out", settings={"seed": 3}, data={"train": {"records": 5}})
    (folder / name).write_bytes(content)
    run = sft.read_run(folder)
    assert (run.changed, run.counts) == ({"seed": 42}, {"train": {"records": 5}})
    assert "</html>" in page([run])


@pytest.mark.parametrize(
    "record",
    [
        {
            "result": 3,
            "plugins": [],
            "packages": None,
            "machine": "x",
            "parameters": {"layers": {"a": 1, "b": {"c": "d"}}},
        },
        {"changed": 4, "without_effect": [1, ["a", 2]], "data": {"train": 5}, "total_steps": -1, "started": 7},
        {"result": {"samples": [1, {"before": 2}], "data": {"train": {"records": "x"}}, "skipped_steps": "y"}},
    ],
)
def test_a_run_json_of_other_shapes_is_read_as_far_as_it_goes(tmp_path: Path, record: dict[str, Any]) -> None:
    assert "</html>" in page([sft.read_run(written(tmp_path / "out", **record))])


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(sft.UsageError, match=r"is no folder; give the output_dir of a run\."):
        sft.read_run(tmp_path / "nowhere")
    with pytest.raises(sft.UsageError, match=r"holds no run of sft"):
        sft.read_run(tmp_path)


def test_a_run_that_has_failed_says_so_on_its_page(train: Train, tmp_path: Path) -> None:
    def fails(self: Any, record: dict[str, Any]) -> None:
        if record["step"]:
            raise sft.SftError("the cause")

    bad = toy("bad", sft_evaluated=fails)
    with pytest.raises(sft.SftError, match="the cause"):
        train("out", (bad,), max_steps=2, evaluation_strategy="steps", eval_steps=1)
    run = sft.read_run(tmp_path / "out")
    assert (run.status, run.error, run.step, run.total_steps) == ("failed", "the cause", 1, 2)
    found = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert '<p class="error">the cause</p>' in found
    assert "after step 1 of 2" in found


def test_a_run_that_was_killed_has_died(tmp_path: Path) -> None:
    assert sft.read_run(written(tmp_path / "out", status="running")).status == "died"


def test_notes_of_a_run_are_on_its_page(train: Train, tmp_path: Path) -> None:
    speaks = toy("speaks", sft_step_ended=lambda self, run: run.say("note: the sky is grey\nand low"))
    train("out", (speaks,), max_steps=2)
    run = sft.read_run(tmp_path / "out")
    assert run.notes == ["the sky is grey"]
    assert "<br>the sky is grey" in page([run]) or "<td>the sky is grey" in page([run])


def test_a_run_in_its_folder_is_running(train: Train, tmp_path: Path) -> None:
    found: list[sft.RunReport] = []
    looks = toy("looks", sft_step_ended=lambda self, run: found.append(sft.read_run(run.output_dir)))
    train("out", (looks,), max_steps=2, logging_steps=1)
    assert [(one.status, one.step, one.total_steps) for one in found] == [("running", 0, 2), ("running", 1, 2)]


def test_a_report_that_cannot_be_written_does_not_cost_the_run(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sft.run_report.written.page", fails)
    said: list[str] = []
    assert train("out", say=said.append, max_steps=1).steps == 1
    assert said[-1].startswith(
        "note: the run's report could not be written ([Errno 28] No space left on device); sft re"
    )
    assert not list((tmp_path / "out").glob("report.*"))


def test_the_best_model_answers_last(train: Train, tmp_path: Path) -> None:
    """The learning rate grows, so that the first evaluation is the best one."""
    rises = toy("rises", sft_schedule=lambda self, run, total: lambda step: 1e-3 if step == 1 else 1.0)
    saves = {"save_strategy": "steps", "save_steps": 1, "evaluation_strategy": "steps", "eval_steps": 1}
    summary = train("out", (rises,), max_steps=2, load_best_model_at_end=True, num_samples=1, max_new_tokens=3, **saves)
    (one,) = sft.read_run(tmp_path / "out").answers
    assert [given.when for given in one.given] == ["before", "during", "during", "after"]
    assert one.given[-1].text == one.given[1].text == summary.samples[0]["after"]
    assert one.given[2].text != one.given[-1].text


# --- several runs --------------------------------------------------------------------------------------------


def test_of_several_runs_the_settings_that_differ_are_told(tmp_path: Path) -> None:
    shared = {"seed": 1, "learning_rate": 1e-3, "run_name": None}
    one = written(tmp_path / "a", settings={**shared, "output_dir": "a"}, packages={"numpy": "1"})
    other = written(
        tmp_path / "b",
        settings={**shared, "output_dir": "b", "learning_rate": 2e-3, "rank": 4},
        packages={"numpy": "2"},
    )
    runs = [sft.read_run(folder) for folder in (one, other)]
    assert words.differences(runs) == {"learning_rate": [1e-3, 2e-3], "rank": [None, 4]}
    assert words.other_differences(runs) == {"version of numpy": ["1", "2"]}
    done = CliRunner().invoke(cli, ["report", str(one), str(other), "--html", str(tmp_path / "both.html")])
    assert (done.exit_code, done.stdout) == (0, "")
    assert json.loads((tmp_path / "both.json").read_text())["differ"]["rank"] == [None, 4]
    found = (tmp_path / "both.html").read_text(encoding="utf-8")
    assert '<th scope="row">learning_rate</th><td>0.001</td><td>0.002</td>' in found


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    runs = [sft.read_run(written(folder)) for folder in (tmp_path / "out", tmp_path / "x" / "out")]
    assert [run.name for run in words.apart(runs)] == [str(tmp_path / "out"), str(tmp_path / "x" / "out")]
    assert [run.name for run in words.apart(runs[:1])] == ["out"]


def test_a_page_takes_no_other_files_place(tmp_path: Path) -> None:
    folder = written(tmp_path / "out")
    for name in ("mine.html", "page.json"):
        (tmp_path / name).write_text("mine")
    for name in ("mine.html", "page.html"):
        done = CliRunner().invoke(cli, ["report", str(folder), "--html", str(tmp_path / name)])
        assert isinstance(done.exception, sft.UsageError)
    assert (tmp_path / "mine.html").read_text() == (tmp_path / "page.json").read_text() == "mine"
    for _ in range(2):  # but its own
        assert CliRunner().invoke(cli, ["report", str(folder)]).exit_code == 0
    printed = CliRunner().invoke(cli, ["report", str(folder), "--json"]).stdout
    assert json.loads(printed) == json.loads((folder / "report.json").read_text(encoding="utf-8"))


# --- pieces --------------------------------------------------------------------------------------------------


def test_a_long_curve_keeps_its_spikes() -> None:
    values = np.random.default_rng(0).normal(size=100_000)
    values[[31_234, 77_777]] = 50.0, -50.0
    steps, kept = thinned(list(range(1, 100_001)), values.tolist(), 2000)
    assert len(steps) <= 2002
    assert (steps[0], steps[-1]) == (1, 100_000)
    assert steps == sorted(set(steps))
    assert {31_235, 77_778} <= set(steps)
    assert [values[step - 1] for step in steps] == kept
    # Each stretch still reaches as far up and down.
    for start in range(0, 100_000, 5_000):
        inside = [value for step, value in zip(steps, kept, strict=True) if start < step <= start + 5_000]
        stretch = values[start : start + 5_000]
        assert (min(inside), max(inside)) == (stretch.min(), stretch.max())


def test_each_dev_set_and_each_number_of_a_plugin_has_a_curve() -> None:
    lines = [
        {"step": 0, "eval_loss": 2.0, "eval_sets": {"a": {"eval_loss": 1.0}, "b": {"eval_loss": 3.0}}},
        {"step": 1, "loss": 4.0, "tokens": 6, "seconds": 0.0, "padding_tokens": 2, "toy/rate": 0.5},
        {"step": 1, "eval_loss": 1.0, "eval_toy/rate": 0.25, "eval_bleu4": 0.125, "eval_objective": 9.0},
    ]
    found = {(one.chart, one.name): (one.steps, one.values) for one in curves_of(lines)}
    assert found == {
        ("loss", "train"): ([1], [4.0]),
        ("loss", "dev"): ([0, 1], [2.0, 1.0]),
        ("loss", "dev a"): ([0], [1.0]),
        ("loss", "dev b"): ([0], [3.0]),
        ("padding", "train"): ([1], [0.25]),
        ("objective", "dev"): ([1], [9.0]),
        ("answers", "bleu4"): ([1], [0.125]),
        ("toy/rate", "train"): ([1], [0.5]),
        ("toy/rate", "dev"): ([1], [0.25]),
    }
    assert moments_of(lines).tokens == [6]


def test_steps_that_have_no_line_have_a_curve_too(train: Train, tmp_path: Path) -> None:
    found: list[dict[str, Any]] = []
    watches = toy("watches", sft_step_ended=lambda self, record: found.append(record))
    train("out", (watches,), max_steps=4, logging_steps=4, do_eval=False)
    run = sft.read_run(tmp_path / "out")
    for chart, key in (("loss", "loss"), ("grad_norm", "grad_norm")):
        curve = run.curve(chart, "each step")
        assert curve is not None
        assert (curve.steps, curve.values) == ([1, 2, 3, 4], [record[key] for record in found])
    assert run.curve("loss", "train") is not None
    assert run.skipped_steps == 0


def test_the_chart_library_is_uplot_as_it_was_published() -> None:
    """Its bytes are those of the npm package ``uplot`` of that version."""
    import hashlib

    from sft.run_report import library

    folder = Path(library.__file__).parent / "assets" / "uplot"
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    assert library.UPLOT == "1.6.32"
    assert found == {
        "uPlot.iife.min.js": "19c8d4c6ad88929a79f4ae49d6f7161566dfd0ba3d15cc495e974f787eb78f1f",
        "uPlot.min.css": "df630c6a8d6f8eeaff264b50f73ce5b114f646ffd9a0bb74f049b0a00135fa04",
        "LICENSE": "8f989229699b4fe2f1a0432d0e9edc338a8a911e250e2d1b01ecd770a5f5b1bd",
    }


def test_rows_of_pairs_name_their_record_twice() -> None:
    """A record that is two documents (``beside``), and a collator that makes other documents than it was given."""
    from sft.data.encoded import Counts, Encoded
    from sft.training.first_rows import _records

    data = Encoded(
        np.arange(12, dtype=np.int32), np.ones(12, bool), np.array([0, 3, 6, 12]), Counts(), beside=np.array([1])
    )
    assert _records(data, (0, 1), 3) == [1, 1, 2]
    assert _records(data, (0, 1), 2) == [None, None]


def test_an_example_without_a_target_has_one_span() -> None:
    from sft.training.first_rows import _spans

    example = Example(np.arange(5), np.array([-100, -100, 4, 5, -100]))
    assert _spans(example.labels != -100) == [2, 2, 1]
    assert _spans(np.ones(3, bool)) == [0, 3]
    assert _spans(np.zeros(3, bool)) == [3]
