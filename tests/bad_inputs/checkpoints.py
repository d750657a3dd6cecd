"""Broken checkpoints that a run is to go on from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from bad_inputs.case import (
    ON_FROM_DONE,
    Case,
    Change,
    each,
    edit,
    link,
    mode,
    moved,
    nested,
    of_json,
    of_tensors,
    pipe,
    remove,
    write,
)

FOLDER = "done/checkpoint-1"
STATE, OPTIMIZER = f"{FOLDER}/trainer/state.json", f"{FOLDER}/trainer/optimizer.safetensors"
ADAPTER = f"{FOLDER}/adapter_model.safetensors"


def on(says: str, *changes: Change, **settings: str) -> Case:
    return Case(says, changes, settings, ON_FROM_DONE)


def sealed(folder: Path) -> None:
    """The manifest of the checkpoint is written anew, as if nothing had been changed."""
    from sft.training.manifest import NAME, write_manifest

    (folder / FOLDER / NAME).unlink()
    write_manifest(folder / FOLDER)


def state(says: str, **values: Any) -> Case:
    """state.json has these values, and the manifest says so too."""
    return on(says, of_json(STATE, **values), sealed)


FIELDS = (
    *("date", "step", "epoch", "seed", "data", "loss_scale", "journal", "before", "evaluation", "best", "settings"),
    *("shaping", "plugins", "in_adapter", "arithmetic", "format"),
)
WRONG: dict[str, Any] = {"a word": "word", "a number": 7, "a list": [1], "null": None}
KIND = {"a word": "a str", "a number": "an int", "a list": "a list", "null": "a NoneType"}
SAYS: dict[tuple[str, str], str] = {
    **{("format", what): "was written by another version of sft" for what in WRONG},
    ("date", "a word"): "state.json holds 'word' as date",
    ("step", "a number"): "its state is that of step 7",
    ("seed", "a number"): "was trained with seed 7",
}

CASES = {
    "not there": on("done/checkpoint-9 is not a checkpoint of sft", resume_from_checkpoint="done/checkpoint-9"),
    "a folder that is none": on("data is not a checkpoint of sft", resume_from_checkpoint="data"),
    "a file": on("data/train.json is not a checkpoint of sft", resume_from_checkpoint="data/train.json"),
    "a path with NUL": on("resume_from_checkpoint: a\\x00b cannot be used as a path", resume_from_checkpoint="a\0b"),
    "state: not there": on("done/checkpoint-1 is not a checkpoint of sft", remove(STATE)),
    "state: empty": on("done/checkpoint-1 is damaged: trainer/state.json has 0 bytes", write(STATE, "")),
    "state: cut off": on(
        "done/checkpoint-1 is damaged: trainer/state.json has ",
        edit(STATE, lambda old: old[: len(old) // 2]),
    ),
    "state: a list": on("done/checkpoint-1 is damaged: trainer/state.json has 2 bytes", write(STATE, "[]")),
    "state: an empty object": on("done/checkpoint-1 is damaged: trainer/state.json has 2 bytes", write(STATE, "{}")),
    "state: not UTF-8": on("done/checkpoint-1 is damaged: trainer/state.json has 1 bytes", write(STATE, b"\xff")),
    "state: nested 100,000 deep": on(
        "done/checkpoint-1 is damaged: trainer/state.json has 200,000 bytes", write(STATE, nested())
    ),
    "state: a named pipe": on("done/checkpoint-1 is not a checkpoint of sft", pipe(STATE)),
    "state: a link to a device": on("done/checkpoint-1 is not a checkpoint of sft", link(STATE, "/dev/zero")),
    "state: a link to a state": on(
        "done/checkpoint-1 is damaged: trainer/state.json is a link, and none of its files",
        moved(STATE, "away.json"),
    ),
    "manifest: a link": on(
        "done/checkpoint-1 is damaged: trainer/manifest.json is a link, and none of its files",
        moved(f"{FOLDER}/trainer/manifest.json", "away.json"),
    ),
    "trainer: a link": on(
        "done/checkpoint-1 is damaged: trainer is a link, and none of its files", moved(f"{FOLDER}/trainer", "away")
    ),
    "adapter: a link": on(
        "done/checkpoint-1 is damaged: adapter_model.safetensors is a link, and none of its files",
        moved(ADAPTER, "away.safetensors"),
    ),
    "state: no permission": on(
        "done/checkpoint-1/trainer/state.json cannot be read (Permission denied), so nobody can tell whether",
        mode(STATE, 0),
    ),
    **{
        f"state: {field} {what}": state(
            SAYS.get((field, what), f"state.json holds {KIND[what]} as {field}"), **{field: value}
        )
        for field in FIELDS
        for what, value in WRONG.items()
        if (field, what) != ("epoch", "a number")
    },
    "state: data an empty object": state("trainer/state.json is not complete: data.fingerprint is missing", data={}),
    "state: journal an empty object": state(
        "trainer/state.json is not complete: journal.window is missing", journal={}
    ),
    "state: step below 0": state("done/checkpoint-1 is damaged: its state is that of step -1", step=-1),
    "state: step 10**30": state(
        "done/checkpoint-1 is damaged: its state is that of step 1000000000000000000000000000000", step=10**30
    ),
    "optimizer: not there": on(
        "done/checkpoint-1 is damaged: trainer/optimizer.safetensors is missing", remove(OPTIMIZER)
    ),
    "optimizer: empty": on(
        "done/checkpoint-1 is damaged: trainer/optimizer.safetensors has 0 bytes", write(OPTIMIZER, b"")
    ),
    "optimizer: cut off": on(
        "done/checkpoint-1 is damaged: trainer/optimizer.safetensors has 27,119 bytes",
        edit(OPTIMIZER, lambda old: old[:-1]),
    ),
    "optimizer: one bit": on(
        "done/checkpoint-1 is damaged: trainer/optimizer.safetensors is not what was written",
        edit(OPTIMIZER, lambda old: old[:-1] + bytes([old[-1] ^ 1])),
    ),
    "optimizer: no permission": on(
        "done/checkpoint-1/trainer/optimizer.safetensors cannot be read (Permission denied), so nobody can te",
        mode(OPTIMIZER, 0),
    ),
    "optimizer: other tensors": on(
        "done/checkpoint-1 is damaged: trainer/optimizer.safetensors has 76 bytes",
        of_tensors(OPTIMIZER, lambda found: {"x": np.ones(3, np.float32)}),
    ),
    "optimizer: other shapes": on(
        "done/checkpoint-1 is damaged: trainer/optimizer.safetensors has 11,992 bytes",
        of_tensors(OPTIMIZER, each(lambda array: array.reshape(-1)[:1])),
    ),
    "adapter: not there": on("done/checkpoint-1 is damaged: adapter_model.safetensors is missing", remove(ADAPTER)),
    "adapter: cut off": on(
        "done/checkpoint-1 is damaged: adapter_model.safetensors has 10,903 bytes", edit(ADAPTER, lambda old: old[:-1])
    ),
    "adapter: one bit": on(
        "done/checkpoint-1 is damaged: adapter_model.safetensors is not what was written",
        edit(ADAPTER, lambda old: old[:-1] + bytes([old[-1] ^ 1])),
    ),
    "adapter: other shapes": on(
        "done/checkpoint-1 is damaged: adapter_model.safetensors has 5,480 bytes",
        of_tensors(ADAPTER, each(lambda array: array[:1])),
    ),
    "plugins: cut off": on(
        "done/checkpoint-1 is damaged: trainer/plugins.safetensors has 15 bytes",
        edit(f"{FOLDER}/trainer/plugins.safetensors", lambda old: old[:-1]),
    ),
    "other data": on(
        "done/checkpoint-1 was trained on other tokens, so its place in the data means nothing here",
        write("data/train.json", '{"src": "a", "tgt": "b"}\n' * 20),
    ),
    "another seed": on("done/checkpoint-1 was trained with seed 42 and 8", seed="7"),
    "another rank": on(
        "done/checkpoint-1 was trained with lora_rank 2 of plugin lora, and this run has 3", lora_rank="3"
    ),
    "another plugin": on(
        "done/checkpoint-1 was trained with plugins lora, and this run has vera", plugin="vera", lora_rank=None
    ),
    "fewer steps than it has made": on(
        "done/checkpoint-2 is after step 2 and this run ends at step 1",
        max_steps="1",
        resume_from_checkpoint="done/checkpoint-2",
    ),
}
