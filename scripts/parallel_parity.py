"""What plans learn apart from one process, and what a rank sends and waits for in a step, in two trees: a table.

    git worktree add --detach ../before 1cf8e461
    python scripts/parallel_parity.py ../before

trains small models for five steps on CPU processes, once with the code of ``../before`` and once with that of this
tree, in process groups of its tests, and prints the figures of both; without ``../before``, of this one alone. What
they mean says docs/parallel.md. A plan that a tree's tests do not know has no figures there.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
SUPPORT = "plugins/parallel_4d/tests/support"
PACKED_LORA = {"plugin": ["lora", "greedy-zero-padding", "flashmask"], "lora_rank": 4}
WHATS: dict[str, dict[str, Any]] = {"full": {}, "LoRA, packed": PACKED_LORA, "VeRA": {"plugin": ["vera"]}}
ROWS = {
    **{"data 2": "dp2", "stage 1, of 2": "stage1", "stage 1, of 2, wide": "stage1 wide", "stage 2, of 2": "stage2"},
    **{"stage 3, of 2": "stage3", "stage 3, of 2, wide": "stage3 wide"},
    **{"stage 1, offload": "stage1-offload", "stage 2, offload": "stage2-offload", "tensor 2": "tp2"},
    **{
        "tensor 2, offload": "tp2-offload",
        "tensor 2, sequence": "tp2-sequence",
        "pipeline 2": "pp2",
        "data 2 × stage 1 of 2": "dp2-stage1",
    },
    **{"tensor 2 × data 2": "tp2-dp2", "tensor 2 × pipeline 2": "tp2-pp2", "pipeline 2 × data 2": "pp2-dp2"},
    **{"pipeline 2, interleaved": "pp2-virtual", "context 2": "cp2", "experts 2": "ep2 mixture"},
    "tensor 2 × stage 3 of 2": "tp2-stage3",
}  # a plan of the tests each, and a model, if it is not the small one
STEP = 3  # of five: neither the first, before which things are made, nor the last, after which they are saved
Figures = dict[str, float]
Found = dict[str, dict[str, Figures]]  # by row and technique


def sent(event: dict[str, Any]) -> float:
    """Bytes that a rank sends for it, on average, where ranks stand in a ring."""
    others = len(event["group"]) - 1
    share = others / (others + 1)
    shares = {"send": 1, "recv": 0, "all_reduce": 2 * share, "all_gather": others}
    return float(event["bytes"] * shares.get(event["what"], share))


def rank(settings: dict[str, Any], tree: str) -> Figures:
    """One rank of a run: what it sent in a step, and how often Python waited for the device."""
    import groups
    import recording

    # A tree without experts has no all-to-all.
    recording.COLLECTIVES = tuple(name for name in recording.COLLECTIVES if hasattr(groups.ProcessGroup, name))
    if importlib.util.find_spec("sft_parallel_4d.offload") is None:
        recording.Recorder.watch_host = lambda self: None  # type: ignore[method-assign]
    found = recording.record(settings)
    files = [str(getattr(sys.modules[n], "__file__", None) or tree) for n in sys.modules if n.startswith("sft")]
    assert all(Path(file).is_relative_to(tree) for file in files), f"{files} are not all of {tree}"
    events = [event for event in found["events"] if event["step"] == STEP and "bytes" in event]
    calls, waits = (event["what"] != "recv" for event in events), (w.startswith(f"{STEP} ") for w in found["waits"])
    return {"calls": sum(calls), "bytes": sum(map(sent, events)), "waits": sum(waits)}


def models(folder: Path) -> None:
    """A small Llama, a wide one (12 MiB a matrix), and a mixture of the core's fixtures with rows for their tokens."""
    from safetensors.numpy import load_file, save_file

    from sft.testing import make_model

    make_model(folder / "small", num_hidden_layers=4)
    make_model(folder / "wide", hidden_size=1024, intermediate_size=3072)
    words = json.loads((make_model(folder / "mixture") / "config.json").read_text())["vocab_size"]
    fixture = ROOT / "core/tests/fixtures/families/qwen2-moe"
    config = json.loads((fixture / "config.json").read_text()) | {"vocab_size": words}
    tensors = load_file(fixture / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = np.resize(tensors[name], (words, tensors[name].shape[1]))
    (folder / "mixture" / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "mixture" / "model.safetensors", {"format": "pt"})


def apart(one: Path, other: Path) -> Figures:
    """The greatest difference of a step's loss, relative to it, and of a saved tensor, relative to its greatest."""
    from trainings import weights

    from sft.testing import read_metrics

    losses = zip(*([line["loss"] for line in read_metrics(folder)] for folder in (one, other)), strict=True)
    tensors, theirs = weights(one), weights(other)
    assert set(tensors) == set(theirs)
    far = (float(np.abs(tensors[name] - theirs[name]).max() / np.abs(tensors[name]).max()) for name in tensors)
    return {"losses": max(abs(a - b) / a for a, b in losses), "weights": max(far)}


def measure(tree: Path, rows: Sequence[str] = tuple(ROWS), whats: Sequence[str] = tuple(WHATS)) -> Found:
    """The figures of each row whose plan the tests of ``tree`` know. Modules are those that this process imports."""
    import trainings
    from processes import run_ranks

    from sft.testing import write_data

    plans, found = getattr(trainings, "ALL", trainings.PLANS), Found()
    with tempfile.TemporaryDirectory() as temporary:
        models(folder := Path(temporary))
        records = [{"src": f"say {n} " * (1 + n % 3), "tgt": " ".join("01234"[: n % 5 + 1])} for n in range(40)]
        runs = trainings.Trainings(folder, folder / "small", write_data(folder, records, records[:2]))
        for row, what in product(rows, whats):
            name, _, model = ROWS[row].partition(" ")
            if name in plans and (what == "full" or model != "wide"):  # adapters of wide models are small too
                quiet = {"do_eval": False, "evaluation_strategy": "no"}
                settings = {**quiet, **WHATS[what], "model_name_or_path": str(folder / (model or "small"))}
                values = runs.settings(plans[name], **settings)
                ranks = run_ranks(plans[name].processes, "parallel_parity:rank", values, str(tree), timeout=200)
                most = {key: max(rank.value[key] for rank in ranks) for key in ranks[0].value}
                found.setdefault(row, {})[what] = most | apart(runs.one(**settings), Path(values["output_dir"]))
    return found


def table(trees: Sequence[Found]) -> str:
    """Of each row and figure the techniques' values (one, where they are equal), before → after."""
    shown = {"losses": "losses, 1e-7", "weights": "weights, 1e-7", "calls": "sends", "bytes": "kB", "waits": "waits"}
    scales = {"losses": 1e7, "weights": 1e7, "bytes": 1e-3}
    lines = [f"| | {' | '.join(shown.values())} |", "|---" * (1 + len(shown)) + "|"]

    def cell(found: dict[str, Figures] | None, key: str) -> str:
        numbers = [scales.get(key, 1.0) * figures[key] for figures in (found or {}).values()]
        texts = [f"{n:.1f}" if key in scales and n < 99.95 else f"{n:.0f}" for n in numbers] or ["–"]
        return " / ".join(texts if len(set(texts)) > 1 else texts[:1])

    for row in trees[-1]:
        cells = (" → ".join(cell(tree.get(row), key) for tree in trees) for key in shown)
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join(lines)


def measured_in(tree: Path) -> Found:
    """:func:`measure` in a process that imports what it measures from ``tree``."""
    folders = [tree / SUPPORT, tree / "core/src", *sorted(tree.glob("plugins/*/src")), ROOT / SUPPORT]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, folders))}
    told = subprocess.check_output([sys.executable, __file__, "--measure", str(tree)], env=environment)
    return Found(json.loads(told))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measure(Path(sys.argv[2]))))
    else:
        print(table([measured_in(tree) for tree in (*(Path(folder).resolve() for folder in sys.argv[1:]), ROOT)]))
