"""Make everything that ``sft demo`` ships: ``make_demo.py WORK_FOLDER`` (minutes to most of an hour).

It writes the plain corpus, trains the tokenizer, draws an untrained model, trains all of its parameters with
``sft run`` and no plugin, and puts the result, stored as float16, and the demo data set into the package.
It does not choose the demo's LoRA settings: ``settings.json`` is written by hand.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import corpus
import init_model
import numpy as np
import tokenizer
from safetensors.numpy import load_file, save_file

PACKAGE = Path(__file__).resolve().parents[2] / "core" / "src" / "sft" / "demo"
MOST_PARAMETERS, MOST_BYTES = 3_000_000, 8_000_000
SETTINGS = {
    "max_length": 128,
    "per_device_train_batch_size": 32,
    "gradient_accumulation_steps": 1,
    "max_steps": 2200,
    "learning_rate": 3e-3,
    "adam_beta2": 0.98,
    "lr_scheduler_type": "cosine",
    "warmup_ratio": 0.05,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "evaluation_strategy": "steps",
    "eval_steps": 200,
    "per_device_eval_batch_size": 40,
    "logging_steps": 20,
    "save_strategy": "no",
    "overwrite_output_dir": True,
    "seed": 1,
}


def prepare(work: Path) -> tuple[Path, Path]:
    """Write the corpora, the tokenizer and the untrained model; return the folders of model and corpus."""
    base, model = work / "corpus", work / "init"
    train, dev = corpus.base_corpus()
    demo_train, demo_dev = corpus.demo_corpus()
    corpus.write(base, train, dev)
    corpus.write(PACKAGE / "data", demo_train, demo_dev)
    if rare := corpus.uncovered(train, demo_train):
        print("words of the demo's copy that are rare in the base corpus:", rare)
    trained = tokenizer.train([base / "train.json", PACKAGE / "data" / "train.json"])
    tokenizer.write(trained, model)
    print(f"{trained.get_vocab_size()} tokens, {init_model.write(model):,} parameters")
    return model, base


def pretrain(model: Path, data: Path, output: Path, settings: dict[str, object]) -> None:
    """Train all parameters with ``sft run``; the trained directory is ``output``."""
    beside = Path(sys.executable).with_name("sft")
    command = str(beside) if beside.exists() else shutil.which("sft")
    if command is None:
        raise SystemExit("There is no `sft` command here: install the project first (pip install -e core).")
    paths = {"model_name_or_path": model, "dataset_name_or_path": data, "output_dir": output}
    words = [word for key, value in {**paths, **settings}.items() for word in (f"--{key}", str(value))]
    print("sft run", *words, flush=True)
    started = time.monotonic()
    subprocess.run([command, "run", *words], check=True)
    print(f"trained in {time.monotonic() - started:.0f} s")


def ship(trained: Path, untrained: Path, target: Path) -> None:
    """Store the trained weights as float16 in ``target``, beside the tokenizer and the configuration."""
    names = set(init_model.shapes())
    tensors = {key: value for key, value in load_file(trained / "model.safetensors").items() if key in names}
    if missing := names - tensors.keys():
        raise SystemExit(f"{trained} lacks {sorted(missing)}")
    halves = {key: np.ascontiguousarray(value.astype(np.float16)) for key, value in tensors.items()}
    for key, value in halves.items():
        if value.shape != init_model.shapes()[key] or not np.isfinite(value).all():
            raise SystemExit(f"{key} has shape {value.shape} or holds a number that float16 cannot")
    if sum(value.size for value in halves.values()) > MOST_PARAMETERS:
        raise SystemExit(f"the model has more than {MOST_PARAMETERS:,} parameters")
    target.mkdir(parents=True, exist_ok=True)
    weights = target / "model.safetensors"
    save_file(halves, str(weights), metadata={"format": "pt"})
    os.chmod(weights, 0o644)
    if weights.stat().st_size > MOST_BYTES:
        raise SystemExit(f"{weights} is larger than {MOST_BYTES:,} bytes")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copyfile(untrained / name, target / name)
    config = json.loads((untrained / "config.json").read_text(encoding="utf-8")) | {"torch_dtype": "float16"}
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    print(f"{target}: {weights.stat().st_size:,} bytes")


def main() -> None:
    """Prepare, train, ship."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path, help="a folder for the corpus, the untrained model and the run")
    parser.add_argument("--max_steps", type=int, help="train for fewer steps, to try the script out")
    parser.add_argument("--prepare-only", action="store_true", help="stop before training")
    arguments = parser.parse_args()
    model, data = prepare(arguments.work)
    if arguments.prepare_only:
        return
    settings = SETTINGS | ({"max_steps": arguments.max_steps} if arguments.max_steps else {})
    output = arguments.work / "run"
    pretrain(model, data, output, settings)
    ship(output, model, PACKAGE / "model")


if __name__ == "__main__":
    main()
