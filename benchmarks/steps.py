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
    from collections.abc import Callable

    from benchmarks.bench import Bench
    from benchmarks.turns import Side

TITLE = "Training steps"
TEXT = """\
Target tokens a second of an optimizer step, its batch included. Packed: one row of at most 1,024 tokens a step. Padded:
four records a step, each padded to the longest. LoRA has rank 8 on every Linear of the blocks, QLoRA the same on NF4
weights with double quantization. With bfloat16, full fine-tuning keeps float32 weights on both sides (autocast). TRL
packs with `bfd` and runs without gradient checkpointing, which is faster than its default. PaddleNLP has only float32
on a CPU and no 4 bits there; it packs with its greedy zero padding, which makes dense masks, and gets the threads and
the path of MKL that sft chooses."""
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
    }


def measure(bench: Bench, case: str) -> dict[str, Any]:
    # Single turns spread by a quarter on a machine that is shared; the case by which people choose is measured finer.
    turns = 21 if case.startswith("lora-packed") else 7
    return bench.compare(
        sides(bench, __name__, case, bench.records(400)),
        lambda turn: turn["targets"] / turn["seconds"],
        turns=turns,
        unit="target tokens/s",
        more_is_better=True,
        also=lambda found: {"tokens/s": round(sum(t["tokens"] for t in found) / sum(t["seconds"] for t in found), 1)},
    )


def sides(bench: Bench, module: str, case: str, data: Path) -> dict[str, Callable[[], Side]]:
    """The sides that do ``case`` on the records in ``data``; their programs are those of ``module``."""
    kind, layout, dtype = case.split("-")

    def start(name: str, peer: str | None, **more: Any) -> Callable[[], Side]:
        def side() -> Side:
            work = {"kind": kind, "packed": layout == "packed", "dtype": dtype, **more}
            places = {"model": str(bench.model), "data": str(data), "out": str(bench.new_folder("out"))}
            return bench.side(module, name, peer, **work, **places)

        return side

    found = {"sft": start("sft", None, settings=bench.settings), "trl": start("trl", "trl")}
    if dtype == "float32" and kind != "qlora":
        found["paddlenlp"] = start("paddlenlp", "paddlenlp")
    return found


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
    packages = ("torch", "transformers", "trl", "peft")
    train_in_turns(trainer, TrainerCallback, turns, *packages, threads=torch.get_num_threads())


def train_in_turns(trainer: Any, callback: type, turns: Turns, *packages: str, **facts: Any) -> None:
    """Train, each step in its turn. ``callback`` is the class that the trainer's library has for those."""

    class Turnstile(callback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            turns.ready(*packages, **facts)
            turns.begin()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            tokens, targets = trainer.counted
            turns.done(tokens=tokens, targets=targets)
            turns.begin()

    trainer.add_callback(Turnstile())
    trainer.train()


def paddlenlp_trainer(options: dict[str, Any], **more: Any) -> Any:
    """PaddleNLP's trainer on the same work, as its run_finetune.py sets it up. ``more`` goes into its settings."""
    import numpy as np
    from paddlenlp.datasets import ZeroPaddingMapDataset
    from paddlenlp.peft import LoRAConfig, LoRAModel
    from paddlenlp.trainer import Trainer, TrainingArguments
    from paddlenlp.transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(options["model"], convert_from_torch=True, dtype="float32")
    if options["kind"] == "lora":
        targets = [f".*{name}_proj.*" for name in ("q", "k", "v", "o", "gate", "up", "down")]
        model = LoRAModel(model, LoRAConfig(target_modules=targets, r=RANK, lora_alpha=2 * RANK, dtype="float32"))
        model.mark_only_lora_as_trainable()
    records, padding = encoded(Path(options["model"]), Path(options["data"]))
    if options["packed"]:
        records = ZeroPaddingMapDataset(records, None, LENGTH, greedy_zero_padding=True)

    def collate(batch: list[dict[str, Any]]) -> dict[str, Any]:
        if options["packed"]:
            (row,) = batch
            found = {key: np.asarray(row[key])[None] for key in ("input_ids", "labels", "position_ids")}
            return {**found, "attention_mask": row["attention_mask"][None]}
        width = max(len(record["input_ids"]) for record in batch)

        def padded(key: str, filler: int) -> np.ndarray:
            return np.asarray([record[key] + [filler] * (width - len(record[key])) for record in batch])

        seen = np.asarray([[1] * len(one["input_ids"]) + [0] * (width - len(one["input_ids"])) for one in batch])
        return {"input_ids": padded("input_ids", padding), "labels": padded("labels", -100), "attention_mask": seen}

    class Counting(Trainer):
        counted = (0, 0)

        def training_step(self, model: Any, inputs: Any, *others: Any, **named: Any) -> Any:
            mask = inputs["attention_mask"]
            tokens = inputs["input_ids"].size if options["packed"] else mask.sum()
            self.counted = (int(tokens), int((inputs["labels"] != -100).sum()))
            return super().training_step(model, inputs, *others, **named)

    settings = {
        "output_dir": options["out"],
        "per_device_train_batch_size": 1 if options["packed"] else 4,
        "learning_rate": 5e-5 if options["kind"] == "full" else 3e-4,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "device": "cpu",
        "disable_tqdm": True,
        **more,
    }
    return Counting(model=model, args=TrainingArguments(**settings), train_dataset=records, data_collator=collate)


def encoded(model: Path, data: Path) -> tuple[list[dict[str, list[int]]], int]:
    """The records as PaddleNLP's models want them (labels are shifted), through the model's template; the padding."""
    import jinja2
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    settings = json.loads((model / "tokenizer_config.json").read_text(encoding="utf-8"))
    template = jinja2.Template(settings["chat_template"])
    end = tokenizer.token_to_id(settings["eos_token"])
    found = []
    for line in (data / "train.json").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        text = template.render(messages=[{"role": "user", "content": record["src"]}], add_generation_prompt=True)
        prompt = tokenizer.encode(text, add_special_tokens=False).ids
        answer = [*tokenizer.encode(record["tgt"], add_special_tokens=False).ids, end]
        ids = [*prompt, *answer][: LENGTH + 1]
        labels = [*[-100] * len(prompt), *answer][: LENGTH + 1]
        found.append({"input_ids": ids[:-1], "labels": labels[1:], "position_ids": list(range(len(ids) - 1))})
    return found, tokenizer.token_to_id(settings["pad_token"])


def paddlenlp_side(options: dict[str, Any]) -> None:
    turns = Turns()
    import os

    from paddlenlp.trainer import TrainerCallback

    trainer = paddlenlp_trainer(options, max_steps=ENDLESS)
    threads = os.environ.get("OMP_NUM_THREADS")
    train_in_turns(trainer, TrainerCallback, turns, "paddlepaddle", "paddlenlp", threads=threads)


SIDES = {"sft": sft_side, "trl": trl_side, "paddlenlp": paddlenlp_side}

if __name__ == "__main__":
    SIDES[sys.argv[1]](json.loads(sys.argv[2]))
