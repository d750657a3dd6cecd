"""Training steps: ``sft run`` beside TRL's SFTTrainer with PEFT and beside PaddleNLP's Trainer.

Each side is the trainer that its users start, with data set, collator, optimizer and clipping; it is stopped between
steps until its turn comes. A turn is one optimizer step, with the making of its batch.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.turns import Turns

if TYPE_CHECKING:
    from benchmarks.bench import Bench

TITLE = "Training steps"
TEXT = """\
Target tokens a second of an optimizer step, its batch included. Packed: one row of at most 1,024 tokens a step. Padded:
four records a step, each padded to the longest. LoRA has rank 8 on every Linear of the blocks, QLoRA the same on NF4
weights with double quantization. With bfloat16, full fine-tuning keeps float32 weights on both sides (autocast). TRL
packs with `bfd` and runs without gradient checkpointing, which is faster than its default."""
LENGTH = 1024
RANK = 8
ENDLESS = 100_000
KINDS = {"lora": "LoRA", "full": "full", "qlora": "QLoRA"}


def cases() -> dict[str, str]:
    return {
        f"{kind}-{layout}-{dtype}": f"{words}, {layout}, {dtype}"
        for kind, words in KINDS.items()
        for layout in ("packed", "padded")
        for dtype in ("float32", "bfloat16")
        if layout == "packed" or kind == "lora"
    }


def measure(bench: Bench, case: str) -> dict[str, Any]:
    from benchmarks.bench import python_of

    kind, layout, dtype = case.split("-")
    model, data = str(bench.model), str(bench.records(2000))

    def options(side: str) -> dict[str, Any]:
        out = str(bench.new_folder(f"out-{side}"))
        return {"model": model, "data": data, "out": out, "kind": kind, "packed": layout == "packed", "dtype": dtype}

    name = __name__
    sides = {
        "sft": lambda: bench.side(name, "sft", **options("sft"), settings=bench.settings),
        "trl": lambda: bench.side(name, "trl", python_of("trl"), **options("trl")),
    }
    return bench.compare(
        sides,
        lambda turn: turn["targets"] / turn["seconds"],
        turns=7,
        unit="target tokens/s",
        more_is_better=True,
        also=lambda found: {"tokens/s": round(sum(t["tokens"] for t in found) / sum(t["seconds"] for t in found), 1)},
    )


def sft_settings(options: dict[str, Any]) -> dict[str, Any]:
    """What ``sft run`` is given."""
    plugins = [
        *(["lora"] if options["kind"] != "full" else []),
        *(["nf4"] if options["kind"] == "qlora" else []),
        *(["greedy-zero-padding"] if options["packed"] else []),
    ]
    return {
        "plugin": plugins,
        "model_name_or_path": options["model"],
        "dataset_name_or_path": options["data"],
        "output_dir": options["out"],
        "device": "cpu",
        "max_length": LENGTH,
        "per_device_train_batch_size": 1 if options["packed"] else 4,
        "learning_rate": 5e-5 if options["kind"] == "full" else 3e-4,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "do_eval": False,
        "disable_tqdm": True,
        **({"lora_rank": RANK} if options["kind"] != "full" else {}),
        **({"qlora_weight_double_quant": True} if options["kind"] == "qlora" else {}),
        **({"bf16": True} if options["dtype"] == "bfloat16" else {}),
        **options["settings"],
    }


def sft_side(options: dict[str, Any]) -> None:
    turns = Turns()
    import os

    import sft

    class Turnstile(sft.Plugin):
        name = "turnstile"
        api_version = 1

        @sft.hookimpl
        def sft_run_started(self, run: Any) -> None:
            turns.ready("paddlepaddle", "numpy", threads=os.environ.get("OMP_NUM_THREADS"), plugins=plugins_of(run))
            turns.begin()

        @sft.hookimpl
        def sft_step_ended(self, run: Any, record: dict[str, Any]) -> None:
            turns.done(tokens=record["tokens"], targets=record["target_tokens"], loss=record["loss"])
            turns.begin()

    def plugins_of(run: Any) -> list[str]:
        return [name for name in run.settings.plugin if name != "turnstile"]

    sft.run({**sft_settings(options), "max_steps": ENDLESS}, plugins=[Turnstile])


def trl_trainer(options: dict[str, Any], **more: Any) -> Any:
    """TRL's trainer on the same work. ``more`` goes into its settings."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
    from trl import SFTConfig, SFTTrainer

    torch.manual_seed(0)
    lines = Path(options["data"], "train.json").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    data = Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": record["src"]}],
                "completion": [{"role": "assistant", "content": record["tgt"]}],
            }
            for record in records
        ]
    )
    kind, sixteen = options["kind"], options["dtype"] == "bfloat16"
    dtype = torch.bfloat16 if sixteen else torch.float32
    quantized = {}
    if kind == "qlora":
        quantized["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    model = AutoModelForCausalLM.from_pretrained(
        options["model"], dtype=torch.float32 if kind == "full" else dtype, **quantized
    )
    settings = {
        "output_dir": options["out"],
        "per_device_train_batch_size": 1 if options["packed"] else 4,
        "max_length": LENGTH,
        "packing": options["packed"],
        "learning_rate": 5e-5 if kind == "full" else 3e-4,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": sixteen,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        **more,
    }
    lora = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear")

    class Counting(SFTTrainer):
        """Counts what a step is given."""

        counted = (0, 0)

        def training_step(self, model: Any, inputs: Any, *others: Any, **named: Any) -> Any:
            mask = inputs.get("attention_mask")
            tokens = inputs["input_ids"].numel() if mask is None else int(mask.sum())
            self.counted = (tokens, int((inputs["labels"] != -100).sum()))
            return super().training_step(model, inputs, *others, **named)

    return Counting(
        model=model,
        processing_class=AutoTokenizer.from_pretrained(options["model"]),
        train_dataset=data,
        peft_config=None if kind == "full" else lora,
        args=SFTConfig(**settings),
    )


def trl_side(options: dict[str, Any]) -> None:
    turns = Turns()
    import torch
    from transformers import TrainerCallback

    trainer = trl_trainer(options, max_steps=ENDLESS)

    class Turnstile(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            turns.ready("torch", "transformers", "trl", "peft", threads=torch.get_num_threads())
            turns.begin()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            tokens, targets = trainer.counted
            turns.done(tokens=tokens, targets=targets)
            turns.begin()

    trainer.add_callback(Turnstile())
    trainer.train()


SIDES = {"sft": sft_side, "trl": trl_side}

if __name__ == "__main__":
    SIDES[sys.argv[1]](json.loads(sys.argv[2]))
