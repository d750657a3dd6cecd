"""``python -m benchmarks.profiling [-- SETTINGS of sft run]``: where the seconds of a training step go.

    python -m benchmarks.profiling                      of this tree, in float32 and bfloat16; nothing is kept
    python -m benchmarks.profiling --commit HEAD~20     of an earlier commit, and of this tree after it; both are kept

A packed row of LoRA on the model of the benchmarks (or ``--model DIR --data DIR``), as ``sft run`` trains it. The last
step runs under paddle's profiler. Each of its operations counts once, at the outermost place at which it is seen: a
step of several operations with a gradient of its own (an RMSNorm, say) is one row forward and one backward. What is
left is Python between operations. Beside it stands what the products of the step would take at the speed of the
machine's own matrix product, alone.

Results go to benchmarks/results/profile.json, and docs/performance.md is written anew from them.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import figures, page, steps
from benchmarks.bench import RESULTS, Bench, describe, keep, parted
from benchmarks.turns import Side, Turns

DTYPES = ("float32", "bfloat16")
STEPS = 5
"""Steps that are run. The first one warms up, the last one is profiled, and those between, of other rows, say what a
token takes."""
PIECES = ("rms_norm", "rotate", "swiglu", "geglu", "linear", "low_rank_linear", "attention", "product", "cross_entropy")
PHASES = {"Forward", "Backward", "backward", "Optimization Step", "Gradient Backward"}


def main() -> None:
    words, more = parted(sys.argv[1:])
    parser = argparse.ArgumentParser(
        "python -m benchmarks.profiling", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--commit", help="profile the code of this commit too, before that of this tree")
    parser.add_argument(
        "--dtype", choices=DTYPES, action="append", help="only this one; of the other an earlier result stays"
    )
    given = parser.parse_args(words)
    import sft

    settings, cases = sft.collect(more), {}
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        bench = Bench(scratch, None, given.model, given.data, settings=settings)
        sources = {} if given.commit is None else {given.commit: installed(given.commit, scratch)}
        for dtype in given.dtype or DTYPES:
            begun, sides = figures.moment(), {}
            for name, source in {**sources, page.THIS_TREE: None}.items():
                sides[name] = of_code(source, bench, dtype)
            for name, side in sides.items():
                # The limit is the machine's; what slowed it down while one side measured it does not count.
                side["speed"] = max(one["speed"] for one in sides.values() if one["narrow"] == side["narrow"])
                print(*told(f"LoRA, packed, {dtype}, {name}", side), "", sep="\n", flush=True)
            cases[dtype] = {"what": f"LoRA, packed, {dtype}", "model": describe(given.model, given.data), **begun,
                            "machine": figures.machine(), "sides": sides}  # fmt: skip
    if given.commit is None or settings:
        print("Nothing was kept: that takes --commit, and no settings.")
        return
    for dtype, case in cases.items():
        keep(RESULTS, "profile", DTYPES, dtype, case)
    page.write(RESULTS)


def installed(commit: str, scratch: Path) -> Path:
    """A folder with the packages of ``commit``, whose native code is built; what they need is that of this tree."""
    archive = subprocess.run(["git", "archive", commit], cwd=figures.ROOT, capture_output=True)
    if archive.returncode:
        sys.exit(archive.stderr.decode().strip())
    tree, packages = scratch / "tree", scratch / "packages"
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as file:
        file.extractall(tree)
    folders = [str(path.parent) for path in (tree / "core/pyproject.toml", *tree.glob("plugins/*/pyproject.toml"))]
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*command, "--target", str(packages), *folders], check=True)
    return packages


def of_code(packages: Path | None, bench: Bench, dtype: str) -> dict[str, Any]:
    """The profile of a step by the code in ``packages``; by that of this tree where it is None."""
    options = {"model": str(bench.model), "data": str(bench.records(200)), "out": str(bench.new_folder("out")),
               "kind": "lora", "packed": True, "dtype": dtype, "settings": bench.settings}  # fmt: skip
    command = [sys.executable, "-m", "benchmarks.profiling", "measure", json.dumps(options)]
    environment = (
        {} if packages is None else {"PYTHONPATH": f"{packages}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    )
    side = Side("the profile", command, bench.new_folder("profile").with_suffix(".log"), figures.ROOT, environment)
    side.end()
    return dict(side.facts)


def measure(options: dict[str, Any]) -> None:
    """In a process of its own: run the steps, and say what was found."""
    turns = Turns()
    import sft

    found: dict[str, Any] = {}
    plain: list[float] = []

    class Profiled(sft.Plugin):
        name = "profiled"
        api_version = 1

        @sft.hookimpl
        def sft_run_started(self, run: sft.Run) -> None:
            import paddle.profiler as profiler

            self.profiler = profiler.Profiler(targets=[profiler.ProfilerTarget.CPU], on_trace_ready=lambda _: None)
            self.began = 0.0
            name_pieces(getattr(run.model, "kernels", None))

        @sft.hookimpl
        def sft_micro_batch(self, run: sft.Run, batch: sft.Batch) -> None:
            if run.step + 1 == STEPS:
                self.profiler.start()
            self.began = time.perf_counter()

        @sft.hookimpl
        def sft_step_ended(self, run: sft.Run, record: dict[str, Any]) -> None:
            seconds = time.perf_counter() - self.began
            if 1 < run.step < STEPS:
                plain.append(seconds / record["tokens"])
            elif run.step == STEPS:
                self.profiler.stop()
                counts: Counter[str] = Counter()
                spent: defaultdict[str, float] = defaultdict(float)
                layers = {type(layer).__name__ for layer in run.model.sublayers(include_self=True)}
                for root in self.profiler.profiler_result.get_data().values():
                    for name, milliseconds in outermost(root, layers):
                        counts[name] += 1
                        spent[name] += milliseconds
                rows = sorted(spent.items(), key=lambda one: -one[1])
                shape, total = run.model.architecture, sum(int(p.size) for p in run.model.parameters())
                found.update(
                    profiled=seconds,
                    narrow=is_narrow(run.model),
                    tokens=record["tokens"],
                    targets=record["target_tokens"],
                    gflop=gflop(shape, record["tokens"], record["target_tokens"], total),
                    speed=speed_of_products(run.model, record["tokens"], shape.inner, shape.hidden),
                    rows=[[name, counts[name], round(value, 2)] for name, value in rows],
                )

    settings = steps.sft_settings(options)
    del settings["lr_scheduler_type"]  # earlier code takes it for a request to the plugins that this tree installs
    sft.run({**settings, "max_steps": STEPS}, plugins=[Profiled])
    turns.ready("paddlepaddle", seconds=statistics.median(plain) * found["tokens"], **found)


def outermost(node: Any, layers: set[str]) -> Iterator[tuple[str, float]]:
    """Names and milliseconds of the outermost operations below ``node``; calls of ``layers`` are none."""
    for child in node.children_node:
        name = str(child.name)
        if name in PHASES or name in layers or name.startswith("ProfileStep"):
            yield from outermost(child, layers)
        else:
            yield name.removeprefix("Global_").partition(" pybind")[0], (child.end_ns - child.start_ns) / 1e6


def is_narrow(model: Any) -> bool:
    """Whether its products are those of 16 bits; of code that has no kernels yet: no."""
    return bool(getattr(getattr(model, "kernels", None), "narrow", False))


def speed_of_products(model: Any, rows: int, wide: int, narrow: int) -> float:
    """GFLOP a second of the product [rows, narrow] · [narrow, wide] as the model computes it, in 16 bits where it does,
    the best of twenty."""
    import paddle

    x, weight = paddle.randn([rows, narrow]), paddle.randn([narrow, wide])
    product = paddle.matmul
    if is_narrow(model):
        product, x, weight = model.kernels.product, x.astype("bfloat16"), weight.astype("bfloat16")
    best = 1e9
    for _ in range(20):
        began = time.perf_counter()
        product(x, weight)
        best = min(best, time.perf_counter() - began)
    return 2e-9 * rows * wide * narrow / best


def gflop(shape: Any, tokens: int, targets: int, parameters: int) -> float:
    """Of a step's products with weights, LoRA's A and B included: forward, and the gradient of what goes in."""
    linears = parameters - shape.vocabulary * shape.hidden * (1 if shape.tied else 2)
    return 2 * 2e-9 * (linears * tokens + shape.vocabulary * shape.hidden * targets)


def name_pieces(kernels: Any) -> None:
    """Let the forward pass of each piece be seen under its name."""
    from paddle.profiler import RecordEvent

    def named(piece: str, plain: Any) -> Any:
        def call(*arguments: Any, **more: Any) -> Any:
            with RecordEvent(piece):
                return plain(*arguments, **more)

        return call

    for piece in PIECES:
        with contextlib.suppress(AttributeError):
            setattr(kernels, piece, named(piece, getattr(kernels, piece)))


def told(what: str, found: dict[str, Any]) -> list[str]:
    """A profile in lines, for the terminal."""
    lines = [f"{what}: {page.of_step(found)}", f"{'operation':<40} {'calls':>6} {'ms':>8} {'share':>6}"]
    for name, calls, spent, share in page.shares(found, 24):
        lines.append(f"{name:<40} {calls:>6} {spent:>8.0f} {share:>5.1f} %")
    return lines


if __name__ == "__main__":
    if sys.argv[1:2] == ["measure"]:
        measure(json.loads(sys.argv[2]))
    else:
        main()
