"""Results of runs that PEFT has read (fixtures/make_runs.py): it computes what is computed here, and what runs write
today is of the same form."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import sft
from sft.inference.merge import merge
from sft.testing import load

FIXTURES = Path(__file__).parent / "fixtures"
SPEC = importlib.util.spec_from_file_location("make_runs", FIXTURES / "make_runs.py")
assert SPEC is not None
assert SPEC.loader is not None
MADE = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(MADE)
CASES = sorted(MADE.SETTINGS)


@pytest.mark.parametrize("case", CASES)
def test_peft_computes_what_is_computed_here(
    paddle: Any, models: Path, tmp_path: Path, logits_of: Any, case: str
) -> None:
    folder, base = FIXTURES / "runs" / case, models / MADE.SETTINGS[case][0]
    expected = load_file(folder / "reference.safetensors")
    merge(str(base), folder, tmp_path / "merged", lambda text: None)
    for model, name in ((load(base, folder), "logits"), (load(tmp_path / "merged"), "merged_logits")):
        np.testing.assert_allclose(logits_of(model, expected["input_ids"]), expected[name], atol=1e-4, rtol=0)


@pytest.mark.parametrize("case", CASES)
def test_what_is_written_today_is_of_that_form(tmp_path: Path, case: str) -> None:
    sft.run({**MADE.settings_of(case, tmp_path), "max_steps": 1}, say=lambda text: None)
    folders = FIXTURES / "runs" / case, tmp_path / "out"
    committed, written = (json.loads((folder / "adapter_config.json").read_text()) for folder in folders)
    assert {**written, "base_model_name_or_path": MADE.SETTINGS[case][0]} == committed
    shapes = [load_file(folder / "adapter_model.safetensors") for folder in folders]
    assert {n: t.shape for n, t in shapes[0].items()} == {n: t.shape for n, t in shapes[1].items()}
    assert (folders[0] / "tokenizer.json").read_bytes() == (folders[1] / "tokenizer.json").read_bytes()
