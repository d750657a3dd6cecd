"""``python -m benchmarks [NAME ...]``: run benchmarks (all, if none is named) and keep what they measure.

    python -m benchmarks                            all of them: two to four hours
    python -m benchmarks steps --case 'lora-*'      some cases of one
    python -m benchmarks steps -- --bf16            with more settings of sft run; nothing is kept

Results go to benchmarks/results/NAME.json, each case for itself, and docs/performance.md is written anew from them.
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib
import os
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import page
from benchmarks.bench import RESULTS, Bench, LeftOutError, describe, keep, parted, told

NAMES = ("steps", "end_to_end", "packing", "quantizing", "attention", "generation", "loading", "startup", "precision")


def main() -> int:
    words, more = parted(sys.argv[1:])
    parser = argparse.ArgumentParser(
        "python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"one or several of {', '.join(NAMES)}")
    parser.add_argument("--case", default="*", help="only the cases that this pattern matches")
    parser.add_argument("--turns", type=int, help="turns that count, instead of each benchmark's own number")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME", help="only this peer; repeatable")
    parser.add_argument("--model", type=Path, help="a model directory, instead of random weights")
    parser.add_argument(
        "--data",
        type=Path,
        help="a directory with train.json (src and tgt), whose first records are taken instead of made ones",
    )
    parser.add_argument("--results", type=Path, help="where results go; with this, docs/performance.md stays as it is")
    given = parser.parse_args(words)
    unknown = [name for name in given.names if name not in NAMES]
    if unknown:
        parser.error(f"there is no benchmark {unknown[0]}; there are {', '.join(NAMES)}")
    import sft

    settings = sft.collect(more)
    own = given.results is None and not settings and given.turns is None and not given.peer
    load, cores = os.getloadavg()[0], len(os.sched_getaffinity(0))
    if load > cores / 2:
        print(f"The machine is busy: {load:.1f} processes wanted its {cores} cores in the last minute.", flush=True)
    bad = 0
    for name in given.names or NAMES:
        module = importlib.import_module(f"benchmarks.{name}")
        chosen = {case: what for case, what in module.cases().items() if fnmatch.fnmatch(case, given.case)}
        if not chosen and given.names:
            parser.error(f"{name} has no case {given.case}; it has {', '.join(module.cases())}")
        for case, what in chosen.items():
            print(f"{name} {case}: {what}", flush=True)
            began = time.monotonic()
            with tempfile.TemporaryDirectory() as scratch:
                bench = Bench(Path(scratch), given.turns, given.model, given.data, tuple(given.peer), settings)
                try:
                    result = module.measure(bench, case)
                except LeftOutError as reason:
                    print(f"  left out: {reason}", flush=True)
                    continue
                except RuntimeError as error:
                    print(f"  FAILED: {error}", flush=True)
                    bad += 1
                    continue
            print(*getattr(module, "told", told)(result), sep="\n", flush=True)
            facts = {"what": what, "model": describe(given.model, given.data), "took": round(time.monotonic() - began)}
            result = {**facts, **result}
            if own:
                keep(RESULTS, name, module.cases(), case, result)
                page.write(RESULTS)
            elif given.results is not None:
                keep(given.results, name, module.cases(), case, result)
    if not own and given.results is None:
        print("Nothing was kept: --turns, --peer and settings make other figures. --results DIR keeps them there.")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
