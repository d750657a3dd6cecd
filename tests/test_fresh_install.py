"""In an environment of its own, with what pip takes when it is asked for the core and one plugin."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOREIGN = ("paddlenlp", "aistudio-sdk", "datasets", "visualdl")
"""What paddlenlp is, and brings."""


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_core_and_lora_do_without_paddlenlp(tmp_path: Path) -> None:
    """Their versions are the newest that pip finds, numpy 2 among them; the demo, and a run with LoRA, work."""
    environment = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
    pip, sft = environment / "bin" / "pip", environment / "bin" / "sft"

    def done(*line: str | Path) -> str:
        found = subprocess.run([str(part) for part in line], capture_output=True, text=True, timeout=800, cwd=tmp_path)
        assert found.returncode == 0, found.stdout + found.stderr
        return found.stdout

    done(pip, "install", "-q", f"{ROOT}/core[cpu]", ROOT / "plugins" / "peft_lora")
    done(pip, "check")
    packages = {one["name"].lower(): one["version"] for one in json.loads(done(pip, "list", "--format", "json"))}
    assert [name for name in FOREIGN if name in packages] == []
    assert int(packages["numpy"].partition(".")[0]) >= 2
    done(sft, "demo", "--output_dir", tmp_path / "demo")
    demo = ROOT / "core" / "src" / "sft" / "demo"
    line = ["--model_name_or_path", demo / "model", "--dataset_name_or_path", demo / "data", "--max_steps", "3"]
    done(sft, "run", "--plugin", "lora", *line, "--output_dir", tmp_path / "run")
    assert json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))["status"] == "finished"
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()
