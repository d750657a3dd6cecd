"""Packing: how full rows are, and how fast they are filled, beside TRL's best-fit-decreasing and PaddleNLP's greedy."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from benchmarks.turns import Turns, serve

if TYPE_CHECKING:
    from benchmarks.bench import Bench

TITLE = "Packing"
TEXT = """\
Records a second, and the share of the rows' tokens that is padding. 50,000 log-normal lengths, mean about 298, at most
2,048, in rows of 2,048. sft decides from lengths alone; so does PaddleNLP here (its dense masks, which come next, are
left out), while TRL's function also moves the tokens. "sft next-fit" is plugin zero-padding."""
RECORDS = 50_000
CAPACITY = 2048
GROUP = 4096


def cases() -> dict[str, str]:
    return {"log-normal": "log-normal lengths"}


def measure(bench: Bench, case: str) -> dict[str, Any]:
    import numpy as np

    drawn = np.random.default_rng(0).lognormal(5.305, 0.9, RECORDS)
    path = str(bench.scratch / "lengths.npy")
    lengths = np.clip(drawn, 1, CAPACITY).astype(np.int64)
    np.save(path, lengths)
    total = int(lengths.sum())

    def also(found: list[dict[str, Any]]) -> dict[str, Any]:
        rows = found[0]["rows"]
        return {"rows": f"{rows:,}", "padding": f"{100 * (1 - total / (rows * CAPACITY)):.2f} %"}

    return bench.compare(
        {
            "sft": lambda: bench.side(__name__, "sft", lengths=path),
            "sft next-fit": lambda: bench.side(__name__, "sft next-fit", lengths=path),
            "trl": lambda: bench.side(__name__, "trl", "trl", lengths=path),
            "paddlenlp": lambda: bench.side(__name__, "paddlenlp", "paddlenlp", lengths=path),
        },
        lambda turn: RECORDS / turn["seconds"],
        turns=9,
        unit="records/s",
        more_is_better=True,
        also=also,
    )


def serve_packer(turns: Turns, pack: Callable[[], int], *packages: str) -> None:
    """``pack()`` gives the number of rows."""

    def repeat(_: Any) -> dict[str, Any]:
        began = time.perf_counter()
        rows = pack()
        return {"seconds": time.perf_counter() - began, "rows": rows}

    turns.ready(*packages)
    serve(turns, repeat)


def sft_side(options: dict[str, Any]) -> None:
    turns = Turns()
    import numpy as np

    from sft_data_packing.packers import best_fit_decreasing

    lengths = np.load(options["lengths"]).tolist()

    def pack() -> int:
        groups = range(0, len(lengths), GROUP)
        return sum(len(best_fit_decreasing(lengths[start : start + GROUP], CAPACITY)) for start in groups)

    serve_packer(turns, pack, "sft-data-packing")


def next_fit_side(options: dict[str, Any]) -> None:
    turns = Turns()
    import numpy as np

    from sft_data_packing.packers import next_fit

    lengths = np.load(options["lengths"]).tolist()
    serve_packer(turns, lambda: len(next_fit(lengths, CAPACITY)), "sft-data-packing")


def trl_side(options: dict[str, Any]) -> None:
    turns = Turns()
    import datasets
    import numpy as np
    import pyarrow as pa
    from trl import pack_dataset

    datasets.disable_progress_bars()
    datasets.disable_caching()
    ends = np.concatenate([[0], np.cumsum(np.load(options["lengths"]))])
    column = pa.LargeListArray.from_arrays(pa.array(ends), pa.array(np.zeros(ends[-1], np.int32)))
    data = datasets.Dataset(pa.table({"input_ids": column}))
    serve_packer(turns, lambda: len(pack_dataset(data, CAPACITY, "bfd")), "trl", "datasets")


def paddlenlp_side(options: dict[str, Any]) -> None:
    turns = Turns()
    import numpy as np
    from paddlenlp.datasets.zero_padding_dataset import generate_greedy_packs

    records = [{"input_ids": range(length)} for length in np.load(options["lengths"]).tolist()]

    def pack() -> int:  # over 500 records, as ZeroPaddingMapDataset does
        groups = [generate_greedy_packs(records[at : at + 500], CAPACITY) for at in range(0, len(records), 500)]
        return sum(bool(row) for group in groups for row in group)

    serve_packer(turns, pack, "paddlenlp")


SIDES = {"sft": sft_side, "sft next-fit": next_fit_side, "trl": trl_side, "paddlenlp": paddlenlp_side}

if __name__ == "__main__":
    SIDES[sys.argv[1]](json.loads(sys.argv[2]))
