"""docs/performance.md and its pictures, from benchmarks/results/*.json: ``python -m benchmarks.page`` writes them anew.

``--check`` says whether they are what the results say.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import charts
from benchmarks.runs import commit, runs

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "performance.md"
RESULTS = ROOT / "benchmarks" / "results"
LABELS = {"sft": "sft", "trl": "TRL + PEFT", "paddlenlp": "PaddleNLP", "transformers": "transformers",
          "bitsandbytes": "bitsandbytes"}  # fmt: skip
THIS_TREE = "this tree"
"""The side of a profile that is the code of the commit that the result names."""
HEAD = """\
# Performance

What `make bench` measured. This page is made from `benchmarks/results/*.json` and says whatever stands there. A row
in which another program is ahead has its factor in **bold**.

Each program runs in an environment of its own, at the versions in `benchmarks/peers/`, in a process that stays up; for
whole runs and start-up each repetition is a program that is started anew. The programs take turns, one repetition each,
so a machine that is slower for a while is slower for all. A figure is the median of the turns, with the quartiles
behind it. A factor is the median of the ratios turn by turn, with their quartiles. Above 1 sft is ahead; where the
quartiles lie on both sides of 1, the two are level. It may differ from the ratio of the two medians, which come from
different turns. Memory is the largest resident memory of the process, its start included.

Below each table stands what was measured together. `-dirty` behind a commit says that files were changed and not
committed.

To reproduce it:

    make bench                                      # everything: two to four hours on two idle cores
    make bench ARGS="steps --case 'lora-*'"         # one benchmark, some of its cases
    make bench ARGS="steps --model DIR --data DIR"  # with a model and records of yours
    make bench ARGS="steps --peer trl"              # beside one other program alone; prints and keeps nothing
    make bench ARGS="steps -- --bf16"               # with more settings of sft run; prints and keeps nothing
    python -m benchmarks.profiling --commit COMMIT  # where a step's seconds go, by the code of COMMIT and by this one

Without `--model` and `--data` the model has SmolLM2-135M's shape (135 million parameters) and random weights, and the
records are drawn from words of the demo, as long as those of AdvertiseGen are in SmolLM2's tokens.
"""
PROFILE = """\
## Where a step's seconds go

A packed row of at most 1,024 tokens, LoRA of rank 8 on every Linear of the blocks, by the code of two commits. Each
operation counts once, at the outermost place at which paddle's profiler sees it; a `GradNode` is the backward pass of
what it is named after. The products with weights are what a step cannot do without: forward, and the gradient of what
goes in. LoRA's A and B are among them, with 2 % of the operations; what gives their own gradients is not. The seconds
that they would take are those at the speed of one product alone, without anything between. A step without the profiler
is the median of three other rows, by their tokens; it may be above the profiled row, which is one row.
"""
MEMORY = """\
## Where its memory goes

The largest share of a LoRA step is what backward needs again. In MiB, by the formulas of `sft plan`
([plan.md](plan.md)), for rows of 1,024 tokens on a model of 135 million parameters; with `--recompute`
activations are 125 and 115, for a second forward pass. `together` is the most at one time; `measured` is the largest
resident memory of the whole process in the training steps above, and `not counted` what is left of it: the interpreter,
paddle and its libraries, the tokenizer, the records, and memory that the allocator keeps. A run that is ready for its
first step holds about 930 MiB in float32 and 675 in bfloat16, of which 522 and 266 are weights; so 410 are not counted
at least. With them the formulas would be at 2,050 and 1,370: in float32 that is more than was measured, since they
reckon with a row that is full and with each part at its largest. By the code of 749bb29 the whole run held 3.5 GiB.
"""
LIMITS = """\
    sft plan --devices 1 --device_memory 24GB --model_name_or_path DIR --dataset_name_or_path DATA --plugin lora \\
        --lora_rank 8 --plugin greedy-zero-padding --max_length 1024 --per_device_train_batch_size 1 --device cpu

`tests/test_memory_of_a_run.py` holds the whole process below 2.0 GiB in float32 and below 1.5 GiB in bfloat16, in
packed rows of 1,024 tokens. Padded batches of four, the last column, are above that: four records, each padded to the
longest, have 1,500 to 2,000 positions there, and activations grow with positions.

## On another machine

Factors depend on the processor. On two cores of an Intel Xeon with AMX, by the code of 301ae56, whose page has the
whole tables, LoRA in packed rows was 1.97 times as fast as TRL both in float32 (quartiles 1.66 to 2.26) and in
bfloat16 (1.87 to 2.36), and full fine-tuning 1.23 to 1.54 times. Answers in float32 were level with transformers,
with one prompt and with 16. Attention over one document of 32,768 tokens took 35 s, beside 26 s of torch's.

## On a GPU

Nothing above was measured on a GPU, and what stands here is proved on a CPU alone: `make DEVICE=gpu test-gpu` tries it,
and ends with a table. With `bf16` frozen weights are held in 16 bits. A quantized matrix is dequantized whole; RMSNorm,
rotary embedding, SwiGLU and softmax cross-entropy are paddle's fused operations; chunks of logits follow the GPU's
memory; packed 16-bit rows have FlashMask where the GPU has kernels for it, and version 3 where that agrees with version
2; with `deterministic` paddle keeps version 2 for rows without a mask and for wide heads. A line says which computes.
Where tensor parallelism shares the vocabulary out, cross-entropy is several operations. AdamW steps all tensors of a
group in one call, small gradients are copied together for the norm, and between processes tensors travel in buckets.
On one device there is no flat buffer for optimizer, norm and collectives, by decision: AdamW's one call needs none,
one that stays would be cut loose by whatever replaces a tensor, and copying a large matrix into one of the moment
takes longer than the call that it saves ([decision 35](decisions/0035-gpu.md)).

Python waits for the GPU once a step, for the loss and the norm, and in mixtures of experts once a layer besides. Not
among these are the five arrays of a micro-batch that are copied to the device (six with FlashMask): each copy blocks,
and comes behind the kernels that are queued. `tests/test_device_calls.py` counts both.
"""
PARTS = {"float32": (522, 9, 19, 1017, 100, 1642), "bfloat16": (266, 9, 19, 596, 98, 958)}
"""MiB by ``sft plan``: weights, gradients, AdamW, activations, logits, together."""


def write(results: Path = RESULTS) -> None:
    """Write the page and the pictures."""
    PAGE.write_text(page(results), encoding="utf-8")
    for name, picture in pictures(results).items():
        (results / name).write_text(picture, encoding="utf-8")


def outdated(results: Path = RESULTS) -> list[str]:
    """The files that are not what the results say."""
    wanted = {PAGE: page(results), **{results / name: text for name, text in pictures(results).items()}}
    wrong = [path for path, text in wanted.items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    return [str(path.relative_to(ROOT)) for path in wrong]


def read(results: Path) -> dict[str, dict[str, Any]]:
    """What stands in the results by benchmark, in the benchmarks' order, with each one's title and text; without cases
    where it has not been measured."""
    from benchmarks.__main__ import NAMES

    found = {}
    for name in NAMES:
        path, module = results / f"{name}.json", importlib.import_module(f"benchmarks.{name}")
        measured = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"cases": {}}
        found[name] = {"title": module.TITLE, "text": module.TEXT, **measured}
    return found


def page(results: Path) -> str:
    lines = [HEAD]
    for name, found in read(results).items():
        lines += [f"## {found['title']}", "", found["text"], "", FIGURES, *figures(name, found), END, ""]
    profiled = results / "profile.json"
    shown = ["Not measured yet: `python -m benchmarks.profiling` does it."]
    if profiled.is_file():
        shown = profile(json.loads(profiled.read_text(encoding="utf-8"))["cases"])
    lines += [PROFILE, FIGURES, *shown, END, "", MEMORY, FIGURES, *memory(steps_of(results)), END, "", LIMITS]
    return "\n".join(lines).rstrip() + "\n"


FIGURES, END = "<!-- figures -->", "<!-- end -->"
"""What stands between them is copied into the page's translation (docs/generate.py)."""


def figures(name: str, found: Mapping[str, Any]) -> list[str]:
    """Pictures, table and provenance of a benchmark."""
    if not found["cases"]:
        return [f"Not measured yet: `make bench ARGS={name}` does it."]
    lines = [f"![{found['title']}](../benchmarks/results/{one})" for one in pictures_of(name, found)]
    return [*lines, "", *(curves if name == "attention" else table)(found["cases"]), "", *provenance(found["cases"])]


def table(cases: Mapping[str, Mapping[str, Any]]) -> list[str]:
    more = list(dict.fromkeys(key for case in cases.values() for side in case["sides"].values()
                              for key in side.get("also", {})))  # fmt: skip
    units = sorted({case["unit"] for case in cases.values()})
    figure = units[0] if len(units) == 1 else "median"
    compared = any(case["ratios"] for case in cases.values())
    heads = ["", "", figure, *(["sft is ahead by"] if compared else []), "peak MiB", *more]
    rows = [f"|{'|'.join(f' {head} ' if head else ' ' for head in heads)}|", "|---|---|" + "--:|" * (len(heads) - 2)]
    for case in cases.values():
        what = case["what"]
        for name, side in case["sides"].items():
            label = LABELS.get(name, name)
            if "failed" in side:
                cells = [f"did not run: {side['failed'].replace('|', '/')}", *[""] * (len(heads) - 3)]
            else:
                unit = "" if len(units) == 1 else f" {case['unit']}"
                spread = "" if len(side["values"]) == 1 else f" ({number(side['low'])}–{number(side['high'])})"
                ahead = [factor(case["ratios"].get(name))] if compared else []
                extra = (str(side.get("also", {}).get(key, "")) for key in more)
                cells = [f"{number(side['median'])}{unit}{spread}", *ahead, f"{side['peak_mib']:,}", *extra]
            rows.append(f"| {' | '.join([what, label, *cells])} |")
            what = ""
    return rows


def curves(cases: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The table of a benchmark whose sides have a line of points each."""
    sizes = list(dict.fromkeys(x for case in cases.values() for side in case["sides"].values()
                               for x in side.get("points", {})))  # fmt: skip
    rows = [f"| | |{''.join(f' {int(size):,} |' for size in sizes)} exponent | peak MiB |"]
    rows.append("|---|---|" + "--:|" * (len(sizes) + 2))
    for case in cases.values():
        what = case["what"]
        ours = case["sides"]["sft"].get("points", {})
        for name, side in case["sides"].items():
            label = LABELS.get(name, name)
            if "failed" in side:
                rows.append(f"| {what} | {label} | did not run: {side['failed'].replace('|', '/')} |")
                continue
            cells = []
            for size in sizes:
                point = side["points"].get(size)
                text = "–" if point is None else number(point["median"])
                ahead = point is not None and size in ours and point["median"] < ours[size]["median"]
                cells.append(f"**{text}**" if ahead else text)
            rows.append(f"| {what} | {label} | {' | '.join(cells)} | {side['exponent']} | {side['peak_mib']:,} |")
            what = ""
    return rows


def profile(cases: Mapping[str, Mapping[str, Any]]) -> list[str]:
    lines = [""]
    by_commit = {
        key: {
            **case,
            "sides": {commit(case) if name == THIS_TREE else name: side for name, side in case["sides"].items()},
        }
        for key, case in cases.items()
    }
    for case in by_commit.values():
        for name, side in case["sides"].items():
            lines += [f"**{case['what']}, commit {name}**: {of_step(side)}.", "", "| operation | calls | ms | share |"]
            lines.append("|---|--:|--:|--:|")
            lines += [f"| `{row[0]}` | {row[1]} | {row[2]:,.0f} | {row[3]:.1f} % |" for row in shares(side, 12)]
            lines.append("")
    return [*lines, *provenance(by_commit)]


def steps_of(results: Path) -> dict[str, Any]:
    """What has been measured of training steps, by case."""
    return dict(read(results)["steps"]["cases"])


def memory(steps: Mapping[str, Any]) -> list[str]:
    """What a LoRA step's memory is made of, beside what was measured."""
    rows = ["| | weights | gradients | AdamW | activations | logits | together | not counted | measured | padded |"]
    rows.append("|---|" + "--:|" * 9)
    for dtype, parts in PARTS.items():
        packed, padded = (
            steps[key]["sides"]["sft"]["peak_mib"] if key in steps else None
            for key in (f"lora-{layout}-{dtype}" for layout in ("packed", "padded"))
        )
        found = [*parts, None if packed is None else packed - parts[-1], packed, padded]
        rows.append(f"| {dtype} | {' | '.join('' if one is None else f'{one:,}' for one in found)} |")
    return ["", *rows, ""]


def of_step(side: Mapping[str, Any]) -> str:
    """What a profile says of the step as a whole."""
    limit = side["gflop"] / side["speed"]
    return (
        f"a step of {side['tokens']:,} tokens, {side['targets']:,} of them targets, takes {side['seconds']:.2f} s "
        f"({side['profiled']:.2f} s with the profiler); its products with weights, {side['gflop']:.0f} GFLOP, "
        f"would take {limit:.2f} s at {side['speed']:.0f} GFLOP/s"
    )


def shares(side: Mapping[str, Any], most: int) -> list[tuple[str, int | str, float, float]]:
    """The operations that take longest, with their calls, milliseconds and shares in percent of the profiled step; then
    all others, and what lies between operations."""
    total, rows = 1000 * side["profiled"], side["rows"]
    rest = sum(row[2] for row in rows[most:])
    found: list[tuple[str, int | str, float]] = [(name, calls, spent) for name, calls, spent in rows[:most]]
    if rows[most:]:
        found.append((f"{len(rows) - most} others", sum(row[1] for row in rows[most:]), rest))
    found.append(("between operations", "", total - sum(row[2] for row in rows)))
    return [(name, calls, spent, 100 * spent / total) for name, calls, spent in found]


def factor(ratio: Mapping[str, float] | None) -> str:
    if ratio is None:
        return ""
    text = f"{ratio['ratio']:.2f}"
    return f"{f'**{text}**' if ratio['ratio'] < 1 else text} ({ratio['low']:.2f}–{ratio['high']:.2f})"


def number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:g}"


def provenance(cases: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A line a run, with the cases that came from it; and one for each side that stopped."""
    found = runs(cases)
    lines = [f"- {run.told(LABELS, len(found) == 1)}" for run in found]
    facts: dict[str, list[str]] = {}
    for case in cases.values():
        for name, side in case["sides"].items():
            if "stopped" in side:
                facts.setdefault(f"{LABELS.get(name, name)} stopped {side['stopped']}", []).append(case["what"])
    more = [f"- {fact}" + ("" if len(of) == len(cases) else f" ({'; '.join(of)})") for fact, of in facts.items()]
    return [*lines, *more]


def pictures(results: Path) -> dict[str, str]:
    return {name: text for key, found in read(results).items() for name, text in pictures_of(key, found).items()}


def pictures_of(name: str, found: Mapping[str, Any]) -> dict[str, str]:
    """A picture for each unit: the bars of all sides of all cases; or for each case the lines of its sides."""
    if name == "attention":
        return {
            f"{name}-{key}.svg": charts.lines(
                f"{found['title']}, {case['what']}",
                "tokens",
                case["unit"],
                {
                    f"{LABELS.get(side, side)}, exponent {values['exponent']}": {
                        float(size): point["median"] for size, point in values["points"].items()
                    }
                    for side, values in case["sides"].items()
                    if "points" in values
                },
            )
            for key, case in found["cases"].items()
        }
    by_unit: dict[str, dict[str, dict[str, charts.Spread]]] = {}
    for case in found["cases"].values():
        group = {
            LABELS.get(side, side): (values["low"], values["median"], values["high"])
            for side, values in case["sides"].items()
            if "failed" not in values
        }
        by_unit.setdefault(case["unit"], {})[case["what"]] = group
    return {
        f"{name}{f'-{position}' if position else ''}.svg": charts.bars(f"{found['title']}: {unit}", groups)
        for position, (unit, groups) in enumerate(by_unit.items())
    }


if __name__ == "__main__":
    if "--check" in sys.argv[1:]:
        sys.exit("\n".join(f"{name} is not what benchmarks/results says" for name in outdated()) or 0)
    write()
