"""What the scripts share that make reference files with torch and transformers (fixtures/…/make_*.py). No test needs
it, and sft does not know these packages: ``pip install torch transformers peft``.

Import it before torch and transformers: it keeps them from the network and from the GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", CUDA_VISIBLE_DEVICES="")

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

MODELS = Path(__file__).resolve().parents[1] / "fixtures" / "models"
"""The base models of all reference files."""


def main(description: str, cases: Iterable[str], here: Path, make: Callable[[str, Path], None]) -> None:
    """Make every case in a folder of its own, which ``make(name, folder)`` gets empty: in ``here``, or in ``--out``."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--out", type=Path, default=here, help="folder for the cases (default: that of the script)")
    out = parser.parse_args().out
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    for name in cases:
        shutil.rmtree(out / name, ignore_errors=True)
        (out / name).mkdir(parents=True)
        make(name, out / name)


def check(right: bool, message: str) -> None:
    if not right:
        raise SystemExit(message)


def load(folder: Path, **settings: Any) -> Any:
    """A model in float32 (unless ``dtype`` says otherwise), eval, eager attention."""
    settings.setdefault("dtype", torch.float32)
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", **settings).eval()


def run(model: Any, input_ids: torch.Tensor) -> torch.Tensor:
    """Logits [B, S, V], without padding."""
    with torch.no_grad():
        return model(input_ids=input_ids, use_cache=False).logits


def largest(first: torch.Tensor, second: torch.Tensor) -> float:
    """The largest difference."""
    return (first.double() - second.double()).abs().max().item()


def neutralise(folder: Path, base: str) -> None:
    """Take out of what PEFT has saved where ``base`` was on this machine, and what has no order or no content."""
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = base
    config["target_modules"] = sorted(config["target_modules"])
    if config.get("modules_to_save"):
        config["modules_to_save"] = sorted(config["modules_to_save"])
    path.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
    (folder / "README.md").unlink(missing_ok=True)  # the model card, with nothing in it


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
