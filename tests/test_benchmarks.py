"""The tools of the benchmarks: turns, figures, pictures, and the page that shows the results. Nothing is measured."""

from __future__ import annotations

import importlib
import itertools
import json
import math
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from benchmarks import attention, charts, figures, materials, packing, page, peers, precision, startup, steps
from benchmarks.bench import Bench, told
from benchmarks.turns import Side, SideError, alternate

ROOT = Path(__file__).parent.parent
PROGRAM = """
import sys
from benchmarks.turns import Turns, serve
turns = Turns()
print("a library says something")
turns.ready("pytest", threads=2)
log = open(sys.argv[1], "a", buffering=1)
def repeat(order):
    print("and something else")
    log.write(sys.argv[2] + "\\n")
    if order == "fall":
        raise ValueError("over it fell")
    return {"seconds": 3.0, "doubled": 2 * order}
serve(turns, repeat)
"""


@pytest.fixture
def start(tmp_path):
    started = []

    def side(name: str) -> Side:
        command = [sys.executable, "-c", PROGRAM, str(tmp_path / "order"), name]
        started.append(Side(name, command, tmp_path / f"{name}.log", ROOT))
        return started[-1]

    yield side
    for one in started:
        one.end()


def test_sides_take_turns_and_each_begins_some(start, tmp_path: Path) -> None:
    found = alternate([start("a"), start("b")], turns=3, order=21, warm=1, pause=0)
    assert (tmp_path / "order").read_text().split() == ["a", "b", "b", "a", "a", "b", "b", "a"]
    assert [len(turns) for turns in found.values()] == [3, 3]
    assert all(turn["doubled"] == 42 and turn["seconds"] == 3.0 for turn in found["b"])
    assert all(1 < turn["peak_mib"] < 1000 for turn in found["a"])
    assert "a library says something" in (tmp_path / "a.log").read_text()


def test_a_side_that_ends_says_why(start) -> None:
    side = start("a")
    assert side.facts["versions"]["pytest"] == pytest.__version__
    assert side.facts["threads"] == 2
    with pytest.raises(SideError, match=r"a ended \(exit code 1\).*ValueError: over it fell") as error:
        side.turn("fall")
    assert error.value.side == "a"


def test_a_side_that_takes_too_long_is_stopped(tmp_path: Path) -> None:
    with pytest.raises(SideError, match=r"killed: it took more than 0 seconds"):
        Side("slow", [sys.executable, "-c", "import time; time.sleep(60)"], tmp_path / "log", limit=0.2)


def test_medians_and_quartiles_are_numpys() -> None:
    values = np.random.default_rng(0).lognormal(3, 1, 12).round(2).tolist()
    found = figures.summary(values)
    wanted = np.percentile(values, [25, 50, 75])
    assert [found["low"], found["median"], found["high"]] == pytest.approx(wanted, rel=1e-3)
    assert figures.summary([7.0])["low"] == 7.0


def test_a_ratio_above_one_means_ahead_in_speed_and_in_seconds() -> None:
    assert figures.ratio([8.0, 10, 12], [4.0, 5, 6], more_is_better=True)["ratio"] == 2
    assert figures.ratio([4.0, 5, 6], [8.0, 10, 12], more_is_better=False)["ratio"] == 2
    behind = figures.ratio([2.0, 2, 2], [2.0, 4, 8], more_is_better=True)
    assert (behind["low"], behind["ratio"], behind["high"]) == (0.375, 0.5, 0.75)


def test_a_ratio_is_that_of_turns_and_lies_between_its_quartiles() -> None:
    """The ratio of the medians, 4 / 3, would lie outside of them."""
    found = figures.ratio([2.0, 4, 9], [2.0, 4.5, 3], more_is_better=True)
    assert found == {"ratio": 1.0, "low": 0.9444, "high": 2.0}


def test_learning_is_not_measured_on_random_weights(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """A call without a model leaves what was kept of a real one alone."""
    from benchmarks import __main__, precision

    before = (page.RESULTS / "precision.json").read_bytes()
    monkeypatch.setattr(sys, "argv", ["benchmarks", "precision"])
    assert __main__.main() == 0
    said = capsys.readouterr().out
    assert said.count("left out: random weights learn nothing that counts: give --model and --data") == len(
        precision.cases()
    )
    assert (page.RESULTS / "precision.json").read_bytes() == before


def test_results_have_the_ratios_of_their_turns() -> None:
    """As far as the four digits say that are kept of a value."""
    for path in page.RESULTS.glob("*.json"):
        for case in json.loads(path.read_text(encoding="utf-8"))["cases"].values():
            for name, kept in case.get("ratios", {}).items():
                ours, theirs = (case["sides"][side]["values"] for side in ("sft", name))
                assert kept == pytest.approx(figures.ratio(ours, theirs, case["more_is_better"]), rel=2e-3)


def test_results_themselves_do_not_make_a_commit_dirty(tmp_path: Path) -> None:
    def git(*words: str) -> None:
        subprocess.run(["git", "-c", "user.name=A", "-c", "user.email=a@b.c", *words], cwd=tmp_path, check=True)

    written = [tmp_path / "benchmarks/results/steps.json", tmp_path / "docs/performance.md"]
    for path in (*written, tmp_path / "code.py"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("1")
    assert figures.commit(tmp_path.parent) == "unknown"
    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "-m", "all")
    clean = figures.commit(tmp_path)
    assert re.fullmatch("[0-9a-f]{7,}", clean)
    for path in written:
        path.write_text("2")
    (tmp_path / "new").write_text("not the repository's")
    assert figures.commit(tmp_path) == clean
    (tmp_path / "code.py").write_text("2")
    assert figures.commit(tmp_path) == f"{clean}-dirty"


def test_the_exponent_of_a_power_law_is_found() -> None:
    sizes = [1024.0 * 2**power for power in range(6)]
    factor, exponent = figures.power_law(sizes, [3e-7 * size**1.7 for size in sizes])
    assert (factor, exponent) == pytest.approx((3e-7, 1.7))
    noise = np.exp(np.random.default_rng(1).normal(0, 0.05, 6))
    _, noisy = figures.power_law(sizes, [size**2 * error for size, error in zip(sizes, noise, strict=True)])
    assert noisy == pytest.approx(np.polyfit(np.log(sizes), 2 * np.log(sizes) + np.log(noise), 1)[0])


def elements(picture: str, tag: str) -> list[ElementTree.Element]:
    return list(ElementTree.fromstring(picture).iter(f"{{http://www.w3.org/2000/svg}}{tag}"))


def test_bars_are_as_long_as_their_values() -> None:
    picture = charts.bars("A < B", {"one": {"x": (3, 4, 5), "y": (1, 2, 3)}, "two": {"x": (7, 8, 10)}})
    lengths = [float(bar.get("width", 0)) for bar in elements(picture, "rect") if bar.get("height") == "14"]
    assert lengths == pytest.approx([4 * 42, 2 * 42, 8 * 42])
    words = [text.text for text in elements(picture, "text")]
    assert {"A < B", "one", "two", "x", "y", "4", "2", "8"} == set(words)


def test_a_power_law_is_a_straight_line_over_logarithmic_axes() -> None:
    picture = charts.lines("law", "tokens", "seconds", {"a": {x: x**1.5 for x in (1000.0, 2000.0, 8000.0, 32000.0)}})
    points = [(float(mark.get("cx", 0)), float(mark.get("cy", 0))) for mark in elements(picture, "circle")]
    slopes = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in pairwise(points)]
    assert len(points) == 4
    assert max(slopes) - min(slopes) < 0.01
    assert all(math.isfinite(value) for point in points for value in point)


def test_the_page_shows_what_the_results_say_and_its_pictures_exist() -> None:
    assert page.outdated() == [], "run python -m benchmarks.page"
    for name in re.findall(r"\]\((\.\./benchmarks/[^)]+)\)", page.PAGE.read_text(encoding="utf-8")):
        assert (page.PAGE.parent / name).is_file(), name


def test_a_row_where_a_peer_is_ahead_is_marked_and_a_peer_that_fell_is_named() -> None:
    side = {"median": 2.0, "low": 1.0, "high": 3.0, "values": [1.0, 2.0, 3.0], "peak_mib": 1500}
    case = {
        "what": "LoRA",
        "unit": "tokens/s",
        "sides": {"sft": side, "trl": side, "paddlenlp": {"failed": "no wheel | no joy"}},
        "ratios": {"trl": {"ratio": 0.5, "low": 0.4, "high": 0.6}},
    }
    head, _, ours, theirs, fallen = page.table({"lora": case})
    assert head == "| | | tokens/s | sft is ahead by | peak MiB |"
    assert ours == "| LoRA | sft | 2 (1–3) |  | 1,500 |"
    assert theirs == "|  | TRL + PEFT | 2 (1–3) | **0.50** (0.40–0.60) | 1,500 |"
    assert fallen == "|  | PaddleNLP | did not run: no wheel / no joy |  |  |"


def test_what_nothing_is_compared_with_has_no_factor_and_one_turn_has_no_spread() -> None:
    side = {**figures.summary([2.5]), "peak_mib": 1500, "also": {"after 100": 3.5}}
    case = {"what": "LoRA", "unit": "dev loss", "sides": {"sft": side, "sft bfloat16": side}, "ratios": {}}
    assert page.table({"lora": case}) == [
        "| | | dev loss | peak MiB | after 100 |",
        "|---|---|--:|--:|--:|",
        "| LoRA | sft | 2.5 | 1,500 | 3.5 |",
        "|  | sft bfloat16 | 2.5 | 1,500 | 3.5 |",
    ]


def test_rows_stand_with_the_run_that_they_came_from() -> None:
    machine = {"processor": "P", "cores": 2, "instructions": ["avx2"], "memory_gib": 8, "system": "Linux"}

    def case(what: str, time: str, commit: str, load: float = 0.5, **packages: str) -> dict[str, Any]:
        sides: dict[str, Any] = {"sft": {"versions": {"paddlepaddle": "3.3.1"}}, "trl": {}}
        sides |= {"trl": {"versions": packages}} if packages else {}
        return {"what": what, "sides": sides, "machine": machine, "model": "M", "commit": commit,
                "date": f"2026-11-{time} UTC", "load_before": load}  # fmt: skip

    first = case("a", "26 06:27", "c1", torch="2")
    same = [case("b", "26 06:40", "c1-dirty", 1.5, torch="2", peft="0.21"), case("c", "26 06:31", "c1-dirty")]
    others = [case("newer torch", "26 07:00", "c1", torch="3"), case("a day later", "27 07:00", "c1")]
    past_midnight = {"1": case("late", "27 23:50", "c2"), "2": case("early", "28 00:10", "c2")}
    others += [{**first, "what": "another machine", "machine": {**machine, "cores": 4}}]
    found = page.provenance(dict(enumerate([first, *others[:1], *same, *others[1:]])))
    assert found[0] == (
        "- **a; b; c**: P, 2 cores (avx2), 8 GiB, Linux; M; sft with paddlepaddle 3.3.1; TRL + PEFT with torch 2 peft "
        "0.21; commit c1-dirty, 2026-11-26 06:27 to 06:40 UTC, load 0.5 to 1.5 before it began"
    )
    assert [line.partition("**:")[0] for line in found[1:]] == [f"- **{one['what']}" for one in others]
    (night,) = page.provenance(past_midnight)
    assert "; commit c2, 2026-11-27 23:50 to 2026-11-28 00:10 UTC, load 0.5 before" in night
    (alone,) = page.provenance({"a": first})
    assert alone.startswith("- **All rows**: P, 2 cores")
    assert alone.endswith("commit c1, 2026-11-26 06:27 UTC, load 0.5 before it began")


def test_a_line_that_stops_early_has_no_point_there_and_says_why() -> None:
    def side(exponent: float, **seconds: float) -> dict[str, Any]:
        points = {tokens: figures.summary([value]) for tokens, value in seconds.items()}
        return {"points": points, "exponent": exponent, "peak_mib": 1500, "versions": {"torch": "2"}}

    theirs = {**side(2.0, **{"1024": 0.5}), "stopped": "at 2,048 tokens: too much memory"}
    machine = {"processor": "P", "cores": 2, "instructions": [], "memory_gib": 8, "system": "Linux"}
    case = {
        "what": "4 documents",
        "unit": "seconds",
        "sides": {"sft": side(1.5, **{"1024": 1.0, "2048": 2.83}), "transformers": theirs},
        **{"machine": machine, "date": "2026-11-26 06:27 UTC", "commit": "C", "load_before": 0.1, "model": "M"},
    }
    assert page.curves({"4": case})[2:] == [
        "| 4 documents | sft | 1 | 2.83 | 1.5 | 1,500 |",
        "|  | transformers | **0.5** | – | 2.0 | 1,500 |",
    ]
    assert "- transformers stopped at 2,048 tokens: too much memory" in page.provenance({"4": case})
    (picture,) = page.pictures_of("attention", {"title": "Attention", "cases": {"4": case}}).values()
    assert len(elements(picture, "circle")) == 3


def test_a_profile_says_each_share_and_what_the_products_alone_would_take() -> None:
    rows = [[f"operation {number}", 2, 100.0 - number] for number in range(14)]
    side = {
        "tokens": 1000,
        "targets": 600,
        "seconds": 1.9,
        "profiled": 2.0,
        "gflop": 500.0,
        "speed": 250.0,
        "rows": rows,
    }
    found = page.shares(side, 12)
    assert sum(share for *_, share in found) == pytest.approx(100)
    assert found[0] == ("operation 0", 2, 100.0, 5.0)
    assert found[12:] == [("2 others", 4, 175.0, 8.75), ("between operations", "", 2000 - 1309, pytest.approx(34.55))]
    assert "takes 1.90 s (2.00 s with the profiler)" in page.of_step(side)
    assert "500 GFLOP, would take 2.00 s at 250 GFLOP/s" in page.of_step(side)


def measured(bench: Bench, name: str, case: str) -> dict[str, Any]:
    """What comes out of a case, measured once and without any peer."""
    module = importlib.import_module(f"benchmarks.{name}")
    assert case in module.cases()
    result = module.measure(bench, case)
    json.dumps(result)
    assert all(side == "sft" or side.startswith("sft ") for side in result["sides"])
    assert "sft" in "\n".join(getattr(module, "told", told)(result))
    return result


def test_our_side_of_a_benchmark_is_measured_alone(tmp_path: Path) -> None:
    result = measured(Bench(tmp_path, turns=1, peers=("none",)), "packing", "log-normal")
    greedy, next_fit = (result["sides"][name] for name in ("sft", "sft next-fit"))
    assert greedy["also"] == {"rows": "7,278", "padding": "0.12 %"}
    assert next_fit["also"] == {"rows": "8,466", "padding": "14.14 %"}
    assert result["ratios"] == {}


def test_a_peer_that_cannot_be_installed_is_left_out_with_its_reason(tmp_path: Path, monkeypatch) -> None:
    def no_wheel(peer: str) -> str:
        raise RuntimeError(f"{peer} could not be installed: no wheel")

    monkeypatch.setattr(peers, "python_of", no_wheel)
    result = packing.measure(Bench(tmp_path, turns=1, peers=("trl",)), "log-normal")
    assert result["sides"]["trl"] == {"failed": "trl could not be installed: no wheel"}
    assert result["sides"]["sft"]["median"] > 0


@pytest.mark.parametrize(
    ("program", "failed"),
    [
        ("#!/bin/sh\nexit 3\n", " --help ended with exit code 3"),
        ("#!/no/such/python\n", " does not start (No such file or directory)"),
    ],
    ids=["ends early", "does not start"],
)
def test_a_peer_whose_program_fails_is_left_out_with_its_reason(
    tmp_path: Path, monkeypatch, program: str, failed: str
) -> None:
    (tmp_path / "trl").write_text(program)
    (tmp_path / "trl").chmod(0o755)
    monkeypatch.setattr(peers, "python_of", lambda peer: str(tmp_path / "python"))
    result = startup.measure(Bench(tmp_path, turns=1), "help")
    assert result["sides"]["trl"] == {"failed": f"{tmp_path / 'trl'}{failed}"}
    assert result["sides"]["sft"]["median"] > 0


def test_steps_are_measured_in_each_kind_layout_and_type() -> None:
    wanted = itertools.product(("lora", "full", "qlora"), ("packed", "padded"), ("float32", "bfloat16"))
    assert set(steps.cases()) == {"-".join(one) for one in wanted}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "case", "figure"),
    [
        ("steps", "lora-packed-float32", "tokens/s"),
        ("steps", "qlora-packed-bfloat16", "tokens/s"),
        ("steps", "full-padded-float32", "tokens/s"),
        ("end_to_end", "lora-padded-float32", "seconds"),
        ("generation", "16-float32", None),
        ("quantizing", "quantize", "digest of codes"),
        ("loading", "NF4", None),
        ("loading", "bfloat16", None),
        ("startup", "help", None),
        ("startup", "ready", None),
    ],
)
def test_our_side_of_each_benchmark_is_measured(tmp_path: Path, name: str, case: str, figure: str | None) -> None:
    model = materials.write_model(tmp_path / "model", layers=1)
    data = materials.write_records(tmp_path / "data", 8, model)
    bench = Bench(tmp_path, turns=1, given_model=model, given_data=data, peers=("none",))
    ours = measured(bench, name, case)["sides"]["sft"]
    assert ours["median"] > 0
    assert 10 < ours["peak_mib"] < 8000
    assert figure is None or ours["also"][figure]


@pytest.mark.slow
def test_learning_is_measured_in_both_types(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"STEPS": 4, "TRAINED": 60, "HELD_OUT": 4}.items():
        monkeypatch.setattr(precision, name, value)
    model = materials.write_model(tmp_path / "model", layers=1)
    data = materials.write_records(tmp_path / "data", 64, model)
    sides = measured(Bench(tmp_path, turns=1, given_model=model, given_data=data), "precision", "lora")["sides"]
    one, other = sides["sft"], sides["sft bfloat16"]
    assert one["also"]["after 2"] > one["median"] > 0
    assert other["median"] == pytest.approx(one["median"], rel=0.01)


@pytest.mark.slow
def test_attention_is_measured_over_tokens_and_documents(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(attention, "TOKENS", (256, 1024))
    ours = measured(Bench(tmp_path, turns=2, peers=("none",)), "attention", "4")["sides"]["sft"]
    seconds = [ours["points"][tokens]["median"] for tokens in ("256", "1024")]
    assert ours["exponent"] == pytest.approx(math.log(seconds[1] / seconds[0]) / math.log(4), abs=0.02)


@pytest.mark.slow
def test_the_profile_of_a_step_counts_each_piece_once(tmp_path: Path) -> None:
    model = materials.write_model(tmp_path / "model", layers=2)
    data = materials.write_records(tmp_path / "data", 12, model)
    command = [sys.executable, "-m", "benchmarks.profiling", "--model", str(model), "--data", str(data)]
    command += ["--dtype", "float32"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    _, table = done.stdout.split("operation ", 1)
    rows = [re.split(" {2,}", line) for line in table.partition("\n\n")[0].replace(" %", "").splitlines()[1:]]
    calls = {row[0]: row[1] for row in rows}
    assert (calls["rms_norm"], calls["attention"], calls["swiglu"], calls["rotate"]) == ("5", "2", "2", "4")
    assert sum(float(row[-1]) for row in rows) == pytest.approx(100, abs=2)


@pytest.mark.slow
def test_the_page_says_where_memory_goes_as_the_plan_does(tmp_path: Path) -> None:
    """By the command that stands below the table."""
    model = materials.write_model(tmp_path / "model")
    data = materials.write_records(tmp_path / "data", 8, model)
    shown = re.search(r"^    (sft plan (?:.*\\\n)*.*)$", page.LIMITS, re.MULTILINE)
    assert shown
    words = shown[1].replace("\\\n", " ").replace("DIR", str(model)).replace("DATA", str(data)).split()
    rows: dict[str, tuple[int, ...]] = {}
    again = []
    for name, more in {"float32": [], "bfloat16": ["--bf16"]}.items():
        command = [str(Path(sys.executable).with_name("sft")), *words[1:], *more, "--json"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        plans = {plan["plan"]["recompute"]: plan["memory"] for plan in map(json.loads, done.stdout.splitlines())}
        parts = [plans[False][part] for part in ("weights", "gradients", "optimizer", "activations", "logits", "peak")]
        rows[name] = tuple(round(size / 2**20) for size in parts)
        again.append(f"{plans[True]['activations'] / 2**20:,.0f}")
    assert rows == page.PARTS
    assert f"`--recompute`\nactivations are {' and '.join(again)}, " in page.MEMORY


def test_records_are_as_long_as_they_are_said_to_be(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    shutil.copy(materials.DEMO / "model/tokenizer.json", model)
    materials.write_records(tmp_path / "data", 40, model)
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    lines = (tmp_path / "data/train.json").read_text(encoding="utf-8").splitlines()
    for record, prompt, answer in zip(map(json.loads, lines), *materials.lengths(40), strict=True):
        assert abs(len(tokenizer.encode(record["src"]).ids) - prompt) < 12
        assert abs(len(tokenizer.encode(record["tgt"]).ids) - answer) < 12
    prompts, answers = materials.lengths(20_000)
    assert np.median(prompts - 24) == pytest.approx(79, abs=1)
    assert np.log(answers).std() == pytest.approx(0.226, abs=0.01)
