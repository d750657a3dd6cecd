"""What was trained is what another process computes: from the adapter folder over the base, and merged into it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sft
from sft.plugins.discovery import installed
from sft.testing import load, needs

KINDS: dict[str, list[str]] = {
    "lora": [],
    "rslora": ["rslora"],
    "pissa": ["pissa"],
    "rslora-pissa": ["rslora", "pissa"],
}
CASES = {
    **KINDS,
    **{f"{name}-nf4": [*plugins, "nf4"] for name, plugins in KINDS.items()},
    "rslora-pissa-int8": ["rslora", "pissa", "int8"],
    "dora-rslora": ["dora", "rslora"],
}

ELSEWHERE = """
import sys
from pathlib import Path
import numpy as np
from sft.inference.merge import merge
from sft.testing import forward, load
model, folder, *cases = sys.argv[1:]
ids = np.load(Path(folder) / "ids.npy")
for case in cases:
    adapter, merged = Path(folder) / case, Path(folder) / f"{case}-merged"
    np.save(adapter / "loaded.npy", forward(load(model, adapter), ids))
    merge(model, adapter, merged, lambda text: None)
    np.save(merged / "loaded.npy", forward(load(merged), ids))
"""


@pytest.fixture(scope="module")
def trained(
    paddle: Any,
    models: Path,
    dataset: Path,
    input_ids: np.ndarray,
    logits_of: Callable[..., Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, dict[str, np.ndarray]]:
    """All cases trained here; then, in one process that has trained nothing, loaded, merged, and loaded again."""
    folder, base = tmp_path_factory.mktemp("fresh"), str(models / "llama-tied-gqa")
    np.save(folder / "ids.npy", input_ids)
    found: dict[str, np.ndarray] = {}

    class Look(sft.Plugin):
        name = "look"
        api_version = 1

        @sft.hookimpl
        def sft_run_ended(self, run: sft.Run, summary: sft.Summary) -> None:
            found[run.output_dir.name] = logits_of(run.model, input_ids)

    for name, plugins in CASES.items():
        if not set(plugins) <= set(installed()):
            continue
        settings = {
            "plugin": ["lora", *plugins],
            "model_name_or_path": base,
            "dataset_name_or_path": str(dataset),
            "output_dir": str(folder / name),
            "lora_rank": 4,
            "learning_rate": 1e-2,
            "max_steps": 3,
            "do_eval": False,
            "disable_tqdm": True,
        }
        sft.run(settings, plugins=(Look,), say=lambda text: None)
    line = [sys.executable, "-c", ELSEWHERE, base, str(folder), *found]
    done = subprocess.run(line, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder, found


@pytest.mark.parametrize("case", [pytest.param(name, marks=needs(*plugins)) for name, plugins in CASES.items()])
def test_trap_another_process_computes_what_was_trained(
    trained: tuple[Path, dict[str, np.ndarray]],
    models: Path,
    input_ids: np.ndarray,
    logits_of: Callable[..., Any],
    case: str,
) -> None:
    """Within 1e-5 of the largest logit, of which what was learned is a thousand times more."""
    folder, found = trained
    largest = np.abs(found[case]).max()
    for place in (folder / case, folder / f"{case}-merged"):
        assert np.abs(np.load(place / "loaded.npy") - found[case]).max() < 1e-5 * largest, place.name
    quantizer = [name for name in CASES[case] if name in ("nf4", "int8")]
    plain = load(models / "llama-tied-gqa", None, quantizer)
    assert np.abs(logits_of(plain, input_ids) - found[case]).max() > 1e-2 * largest
