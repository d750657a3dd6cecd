"""sft.testing, the kit for plugin authors: it needs nothing of this repository, and sft does not need it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sft
from sft.testing import forward, make_model, needs, read_metrics, write_data

CORE = Path(sft.__file__).parent
EXAMPLE = Path(__file__).parent.parent / "examples" / "third_party_plugin"


def test_nothing_in_sft_imports_the_kit_or_pytest() -> None:
    imports = re.compile(r"^\s*(from|import)\s+(sft\.testing|pytest)\b|from sft import .*\btesting\b", re.MULTILINE)
    found = [path.relative_to(CORE).as_posix() for path in CORE.rglob("*.py") if imports.search(path.read_text())]
    assert found == ["testing.py"]


@pytest.mark.slow
@needs("vera", "nf4")  # which its plugin refuses
def test_a_third_party_tests_its_plugin_with_the_kit(tmp_path: Path) -> None:
    """In a folder that knows nothing of this repository, with the packages that are installed."""
    shutil.copytree(EXAMPLE, tmp_path / "plugin")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path / "plugin" / "src"), *sys.path[1:]])}
    line = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests"]
    done = subprocess.run(line, capture_output=True, text=True, env=environment, cwd=tmp_path / "plugin", timeout=110)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^4 passed", done.stdout, re.MULTILINE)


@pytest.mark.parametrize("config", [{}, {"num_hidden_layers": 3, "tie_word_embeddings": False, "hidden_size": 64}])
def test_a_made_model_is_a_model(paddle: Any, tmp_path: Path, config: dict[str, Any]) -> None:
    """sft and PaddleNLP's own loader compute the same with it, and its tokens tell each other apart."""
    from paddlenlp.transformers import AutoModelForCausalLM

    from sft.inference.open import load_for_inference

    folder = make_model(tmp_path / "model", **config)
    ids = np.arange(4, 24)[None]
    model, tokenizer = load_for_inference(str(folder), None, lambda text: None)
    theirs = AutoModelForCausalLM.from_pretrained(str(folder), dtype="float32", convert_from_torch=True)
    theirs.eval()
    logits = forward(model, ids)
    assert logits.shape == (1, 20, 2048)
    with paddle.no_grad():
        expected = theirs(paddle.to_tensor(ids))[0].numpy()
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5 * np.abs(logits).max())
    assert np.ptp(logits, axis=-1).min() > 1
    assert tokenizer.chat_template is not None
    assert tokenizer.decode(tokenizer.encode("A coat for you.")) == "A coat for you."


def test_a_seed_makes_a_model(tmp_path: Path) -> None:
    first, again, other = (make_model(tmp_path / str(n), seed) for n, seed in enumerate((0, 0, 1)))
    read = [(folder / "model.safetensors").read_bytes() for folder in (first, again, other)]
    assert read[0] == read[1] != read[2]


def test_a_skip_names_the_plugins_that_are_missing() -> None:
    here, missing = needs("lora", "Greedy_Zero_Padding").mark, needs("lora", "no-such", "none-either").mark
    assert here.args == (False,)
    assert (missing.args, missing.kwargs["reason"]) == ((True,), "not installed: no-such, none-either")


def test_data_and_metrics(tmp_path: Path) -> None:
    records = [{"src": "Größe", "tgt": "a"}, {"src": "b", "tgt": "c"}]
    write_data(tmp_path, records)
    assert [path.name for path in tmp_path.iterdir()] == ["train.json"]
    assert [json.loads(line) for line in (tmp_path / "train.json").read_text("utf-8").splitlines()] == records
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5, "seconds": 0.1}\n')
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 2.5, "seconds": 0.1}]
    assert read_metrics(tmp_path, same=True) == [{"step": 1, "loss": 2.5}]
