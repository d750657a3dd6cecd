"""``python -m benchmarks.profiling [-- SETTINGS of sft run]``: where the seconds of a training step go.

One packed row of LoRA on the model of the benchmarks (or ``--model DIR --data DIR``), as ``sft run`` trains it. The
third step runs under paddle's profiler. Each of its operations counts once, at the outermost place at which it is seen:
a step of several operations with a gradient of its own (an RMSNorm, say) is one row forward and one backward. What is
left is Python between operations. Beside it stands what the products of the step would take at the speed of the
machine's own matrix product, alone.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import steps
from benchmarks.bench import Bench, parted

STEP = 3
PIECES = (
    *("rms_norm", "rotate", "swiglu", "geglu", "linear", "low_rank_linear", "attention", "product", "cross_entropy"),
)
PHASES = {"Forward", "Backward", "backward", "Optimization Step", "Gradient Backward"}


def outermost(node: Any, layers: set[str]) -> Iterator[tuple[str, float]]:
    """Names and milliseconds of the outermost operations below ``node``; calls of ``layers`` are none."""
    for child in node.children_node:
        name = str(child.name)
        if name in PHASES or name in layers or name.startswith("ProfileStep"):
            yield from outermost(child, layers)
        else:
            yield name.removeprefix("Global_").partition(" pybind")[0], (child.end_ns - child.start_ns) / 1e6


def speed_of_products(rows: int, wide: int, narrow: int) -> float:
    """GFLOP a second of paddle's float32 product [rows, narrow] · [narrow, wide], the best of twenty."""
    import paddle

    x, weight = paddle.randn([rows, narrow]), paddle.randn([narrow, wide])
    best = 1e9
    for _ in range(20):
        began = time.perf_counter()
        paddle.matmul(x, weight)
        best = min(best, time.perf_counter() - began)
    return 2e-9 * rows * wide * narrow / best


def gflop(shape: Any, tokens: int, targets: int, parameters: int) -> float:
    """Of the products of a step whose weights are frozen: forward, and the gradient of what goes in."""
    linears = parameters - shape.vocabulary * shape.hidden * (1 if shape.tied else 2)
    return 2 * 2e-9 * (linears * tokens + shape.vocabulary * shape.hidden * targets)


def main() -> None:
    words, more = parted(sys.argv[1:])
    parser = argparse.ArgumentParser(
        "python -m benchmarks.profiling", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path)
    parser.add_argument("--data", type=Path)
    given = parser.parse_args(words)
    import sft

    found: dict[str, Any] = {}

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
            if run.step + 1 == STEP:
                self.profiler.start()
            self.began = time.perf_counter()

        @sft.hookimpl
        def sft_step_ended(self, run: sft.Run, record: dict[str, Any]) -> None:
            seconds = time.perf_counter() - self.began
            if run.step == STEP - 1:
                found.update(seconds=seconds)  # of a step without the profiler, which costs a little itself
            if run.step == STEP:
                self.profiler.stop()
                found.update(profiled=seconds, record=record, counts=Counter(), milliseconds=Counter())
                layers = {type(layer).__name__ for layer in run.model.sublayers(include_self=True)}
                for root in self.profiler.profiler_result.get_data().values():
                    for name, spent in outermost(root, layers):
                        found["counts"][name] += 1
                        found["milliseconds"][name] += spent
                shape, total = run.model.architecture, sum(int(p.size) for p in run.model.parameters())
                found["gflop"] = gflop(shape, record["tokens"], record["target_tokens"], total)
                found["speed"] = speed_of_products(record["tokens"], shape.inner, shape.hidden)

    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(Path(scratch), None, given.model, given.data, settings=sft.collect(more))
        options = {"model": str(bench.model), "data": str(bench.records(200)), "out": f"{scratch}/out", "kind": "lora",
                   "packed": True, "dtype": "float32", "settings": bench.settings}  # fmt: skip
        sft.run({**steps.sft_settings(options), "max_steps": STEP}, plugins=[Profiled])
    show(found)


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


def show(found: dict[str, Any]) -> None:
    record, total = found["record"], 1000 * found["profiled"]
    limit = found["gflop"] / found["speed"]
    print(
        f"\na step: {found['seconds']:.2f} s ({found['profiled']:.2f} s with the profiler), {record['tokens']:,} "
        f"tokens, {record['target_tokens']:,} targets\nits products with frozen weights: {found['gflop']:.0f} GFLOP; "
        f"at {found['speed']:.0f} GFLOP/s of one product alone: {limit:.2f} s\n"
    )
    print(f"{'operation':<40} {'calls':>6} {'ms':>8} {'share':>6}")
    rows = found["milliseconds"].most_common()
    for name, spent in rows[:24]:
        print(f"{name:<40} {found['counts'][name]:>6} {spent:>8.0f} {100 * spent / total:>5.1f} %")
    rest = sum(spent for _, spent in rows[24:])
    print(f"{f'{max(0, len(rows) - 24)} others':<40} {'':>6} {rest:>8.0f} {100 * rest / total:>5.1f} %")
    between = total - sum(spent for _, spent in rows)
    print(f"{'between operations':<40} {'':>6} {between:>8.0f} {100 * between / total:>5.1f} %")


if __name__ == "__main__":
    main()
