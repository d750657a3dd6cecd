"""Hand results of sft to transformers and PEFT, family by family, and compare the logits.

    python scripts/interop.py --python PYTHON [--out DIR] [FAMILY ...]

PYTHON is an interpreter with torch, transformers and peft; sft's own environment does without them. A FAMILY is a
folder of core/tests/fixtures/families (default: all). For each one transformers makes a tiny checkpoint with that
config, and by the command line sft trains a LoRA adapter over it, merges it, and trains all parameters of another copy.
Then PEFT loads the adapter, and transformers both models. Prints the largest difference of their float32 logits from
sft's, in parts of the largest logit, and exits with 1 where one is above 1e-5.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
FAMILIES = ROOT / "core" / "tests" / "fixtures" / "families"
DEMO = ROOT / "core" / "src" / "sft" / "demo"
LIMIT = 1e-5
SMALL = ["--max_steps", "3", "--max_length", "48", "--per_device_train_batch_size", "4", "--seed", "1"]


def sft(*arguments: Any) -> None:
    command = [str(Path(sys.executable).with_name("sft")), *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout}")


def train(folder: Path, data: Path) -> None:
    """From ``folder/base``: an adapter with its merged model, and a model of which all parameters were trained."""
    common = ["--model_name_or_path", folder / "base", "--dataset_name_or_path", data, *SMALL]
    lora = ["--plugin", "lora", "--learning_rate", "0.02"]
    if folder.name == "qwen2-moe":  # PEFT 0.21 takes its shared expert's Linears for those of others, and drops them
        lora += ["--lora_target_modules", "q_proj,k_proj,v_proj,o_proj"]
    sft("run", *lora, *common, "--output_dir", folder / "adapter")
    places = ["--model_name_or_path", folder / "base", "--adapter_path", folder / "adapter"]
    sft("merge", *places, "--output_path", folder / "merged", "--dtype", "float32")
    sft("run", *common, "--learning_rate", "0.002", "--output_dir", folder / "full")


def own_logits(folder: Path, ids: np.ndarray) -> dict[str, np.ndarray]:
    from sft.testing import forward, load

    models = {"base": (folder / "base", None), "adapter": (folder / "base", folder / "adapter")}
    models |= {name: (folder / name, None) for name in ("merged", "full")}
    return {name: forward(load(*places), ids) for name, places in models.items()}


# --- in the other interpreter -------------------------------------------------------------------------------


def make(families: list[str], out: Path) -> None:
    """A checkpoint of each family, of random weights, with the demo's tokenizer."""
    import torch
    import transformers as hf

    for number, family in enumerate(families):
        values = json.loads((FAMILIES / family / "config.json").read_text(encoding="utf-8"))
        vocabulary = json.loads((DEMO / "model" / "config.json").read_text(encoding="utf-8"))["vocab_size"]
        config = hf.AutoConfig.from_pretrained(FAMILIES / family, vocab_size=vocabulary)
        config.max_position_embeddings = max(values["max_position_embeddings"], 48)
        torch.manual_seed(number)
        model = hf.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for weight in model.parameters():
            with torch.no_grad():
                weight.add_(0.2 * torch.randn_like(weight))
        model.save_pretrained(out / family / "base")
        (out / family / "base" / "generation_config.json").unlink(missing_ok=True)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(DEMO / "model" / name, out / family / "base" / name)


def compare(families: list[str], out: Path) -> None:
    """One line a family; exits with 1 where a difference is too large."""
    import torch
    import transformers as hf
    from peft import PeftModel

    def load(folder: Path) -> Any:
        return hf.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
        ).eval()

    worst = 0.0
    for family in families:
        own, folder = np.load(out / family / "own.npz"), out / family
        ids = torch.from_numpy(own["ids"])
        shown = []
        for name in ("base", "adapter", "merged", "full"):
            model = load(folder / ("base" if name == "adapter" else name))
            if name == "adapter":
                model = PeftModel.from_pretrained(model, folder / "adapter").eval()
            with torch.no_grad():
                logits = model(input_ids=ids, use_cache=False).logits.numpy()
            largest = np.abs(logits).max()
            worst = max(worst, difference := np.abs(logits - own[name]).max() / largest)
            moved = np.abs(own[name] - own["base"]).max() / largest
            shown.append(f"{name} {difference:.1e}" + (f" (moved by {moved:.2f})" if name != "base" else ""))
        print(f"{family:<16} {', '.join(shown)}", flush=True)
    if worst > LIMIT:
        raise SystemExit(f"The largest difference is {worst:.1e}, above {LIMIT:.0e}.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", metavar="FAMILY", nargs="*")
    parser.add_argument("--python", help="an interpreter with torch, transformers and peft")
    parser.add_argument("--out", type=Path, help="keep what is made here")
    parser.add_argument("--stage", choices=("make", "compare"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    families = arguments.families or sorted(path.parent.name for path in FAMILIES.glob("*/config.json"))
    if arguments.stage:
        {"make": make, "compare": compare}[arguments.stage](families, arguments.out)
        return
    if not arguments.python:
        parser.error("give --python, an interpreter with torch, transformers and peft")
    with tempfile.TemporaryDirectory() as scratch:
        out = arguments.out or Path(scratch)
        there = [arguments.python, "-W", "ignore", __file__, *families, "--out", str(out), "--stage"]
        subprocess.run([*there, "make"], check=True)
        for family in families:
            train(out / family, DEMO / "data")
            ids = np.random.default_rng(0).integers(3, 2000, (2, 17))
            np.savez(out / family / "own.npz", ids=ids, **own_logits(out / family, ids))
            print(f"{family} trained", flush=True)
        sys.exit(subprocess.run([*there, "compare"]).returncode)


if __name__ == "__main__":
    main()
