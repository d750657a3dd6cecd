"""Paths that lead nowhere, or where nothing may be written."""

from __future__ import annotations

from bad_inputs.case import LORA, Case, Change, directory, link, mode, write


def output(says: str, path: str, *changes: Change, **settings: str) -> Case:
    return Case(says, changes, {"output_dir": path, **settings})


CASES = {
    "output_dir: a file": output("output_dir data/train.json: data/train.json is a file", "data/train.json"),
    "output_dir: below a file": output(
        "output_dir data/train.json/out: data/train.json is a file", "data/train.json/out"
    ),
    "output_dir: the model": output(
        "output_dir model contains model_name_or_path model, which would be overwritten", "model"
    ),
    "output_dir: above the model": output(
        "output_dir . contains model_name_or_path model, which would be overwritten", "."
    ),
    "output_dir: the data": output(
        "output_dir data contains dataset_name_or_path data, which would be overwritten", "data"
    ),
    "output_dir: with NUL": output("output_dir: a\\x00b cannot be used as a path", "a\0b"),
    "output_dir: half of a surrogate pair": output(
        "output_dir: 'a\\udc80\\ud800b' is not UTF-8 text", "a\udc80\ud800b"
    ),
    "output_dir: 5,000 letters": output(
        "output_dir: aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
        "a" * 5000,
    ),
    "output_dir: 5,000 folders": output(
        "output_dir: a/a/a/a/a/a/a/a/a/a/a/a/a/a/a/a/a/a/a/a/a/a/a/a/a/a/a/a/a/a/a/a/a/a/a/a/a/a/a/a/a/a/a/a",
        "a/" * 5000,
    ),
    "output_dir: of a user who is not there": output(
        "output_dir: ~nosuchuser/out cannot be used as a path", "~nosuchuser/out"
    ),
    "output_dir: empty": output("output_dir is not set", ""),
    "output_dir: a link to itself": output(
        "output_dir: loop/out cannot be used as a path", "loop/out", link("loop", "loop")
    ),
    "output_dir: not writable": output(
        "output_dir locked/out: locked is not writable", "locked/out", directory("locked"), mode("locked", 0o500)
    ),
    "output_dir: not to be entered": output(
        "output_dir: locked/out cannot be used as a path", "locked/out", directory("locked"), mode("locked", 0)
    ),
    "output_dir: not writable itself": output(
        "output_dir locked: locked is not writable", "locked", directory("locked"), mode("locked", 0o500)
    ),
    "output_dir: in /proc": output("output_dir /proc/out: /proc is not writable", "/proc/out"),
    "output_dir: a device": output("output_dir /dev/null: /dev/null is a file", "/dev/null"),
    "output_dir: with a newline": output(
        "output_dir data/train.json/a b: data/train.json is a file", "data/train.json/a\nb"
    ),
    "output_dir: another run": output("output_dir done already holds a run", "done"),
    "output_dir: someone else's model": output(
        "output_dir taken holds model.safetensors, which are no run's of sft and would be overwritten",
        "taken",
        write("taken/model.safetensors", b"precious"),
    ),
    "model: with NUL": Case(
        "model_name_or_path: a\\x00b cannot be used as a path", settings={"model_name_or_path": "a\0b"}
    ),
    "model: 5,000 letters": Case(
        "model_name_or_path: aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
        settings={"model_name_or_path": "a" * 5000},
    ),
    "model: of a user who is not there": Case(
        "model_name_or_path: ~nosuchuser/model cannot be used as a path",
        settings={"model_name_or_path": "~nosuchuser/model"},
    ),
    "model: half of a surrogate pair": Case(
        "model_name_or_path: 'a\\udc80b' is not UTF-8 text", settings={"model_name_or_path": "a\udc80b"}
    ),
    "model: a link to itself": Case(
        "model_name_or_path: loop cannot be used as a path", (link("loop", "loop"),), {"model_name_or_path": "loop"}
    ),
    "data: with NUL": Case(
        "dataset_name_or_path: a\\x00b cannot be used as a path", settings={"dataset_name_or_path": "a\0b"}
    ),
    "data: 5,000 letters": Case(
        "dataset_name_or_path: aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
        settings={"dataset_name_or_path": "a" * 5000},
    ),
    "data: of a user who is not there": Case(
        "dataset_name_or_path: ~nosuchuser/data cannot be used as a path",
        settings={"dataset_name_or_path": "~nosuchuser/data"},
    ),
    "tokenizer: with NUL": Case(
        "tokenizer_name_or_path: a\\x00b cannot be used as a path", settings={"tokenizer_name_or_path": "a\0b"}
    ),
    "template: with NUL": Case("chat_template: a\\x00b cannot be used as a path", settings={"chat_template": "a\0b"}),
    "template: 5,000 letters": Case(
        "chat_template: aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
        settings={"chat_template": "a" * 5000},
    ),
    "adapter: with NUL": Case(
        "lora_path: a\\x00b cannot be used as a path", base=LORA, settings={"lora_path": "a\0b", "lora_rank": None}
    ),
    "adapter: of a user who is not there": Case(
        "lora_path: ~nosuchuser/a cannot be used as a path",
        base=LORA,
        settings={"lora_path": "~nosuchuser/a", "lora_rank": None},
    ),
    "encoded_cache: a file": Case("data/train.json cannot be made", settings={"encoded_cache": "data/train.json"}),
    "encoded_cache: with NUL": Case(
        "encoded_cache: a\\x00b cannot be used as a path", settings={"encoded_cache": "a\0b"}
    ),
    "encoded_cache: not writable": Case(
        "locked/cache cannot be made", (directory("locked"), mode("locked", 0o500)), {"encoded_cache": "locked/cache"}
    ),
    "settings file: with NUL": Case("Settings file a\\x00b.json cannot be read", typed=("run", "a\0b.json")),
    "settings file: 5,000 letters": Case(
        "Settings file aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
        typed=("run", "a" * 5000 + ".json"),
    ),
    "generate: adapter with NUL": Case(
        "adapter: a\\x00b cannot be used as a path",
        typed=("generate", "--model_name_or_path", "model", "--adapter_path", "a\0b", "--prompt", "a"),
    ),
    "generate: prompts with NUL": Case(
        "file: a\\x00b cannot be used as a path",
        typed=("generate", "--model_name_or_path", "model", "--prompts_file", "a\0b"),
    ),
    "generate: model with NUL": Case(
        "model_name_or_path: a\\x00b cannot be used as a path",
        typed=("generate", "--model_name_or_path", "a\0b", "--prompt", "a"),
    ),
}
