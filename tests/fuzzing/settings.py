"""Settings made up: files of them, and the command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from fuzzing.made_up import as_json, mutated, numbers, objects, words
from fuzzing.trial import Target


def read_settings(name: str) -> Callable[[Path, bytes], Any]:
    def read(folder: Path, content: bytes) -> Any:
        from sft.resolve import resolve
        from sft.settings.files import read_file
        from sft.settings.reading import normalise

        (folder / name).write_bytes(content)
        return resolve(normalise(read_file(folder / name)), ())

    return read


def typed(folder: Path, arguments: list[str]) -> Any:
    from sft.commands.typed import collect
    from sft.resolve import resolve

    return resolve(collect(arguments), ())


def _setting_names() -> list[str]:
    from sft.settings.arguments import core_options

    return [*core_options(), "plugin", "lora", "lora_rank", "lora_target_modules", "nproc", "neftune", "packing"]


def _arguments() -> Any:
    name = st.sampled_from(_setting_names()).map("--{}".format) | words
    return st.lists(name | words | numbers.map(str), max_size=8)


_YAML = b"seed: 1\nplugin: [lora]\nlearning_rate: 1e-4\nlora_target_modules:\n  - q_proj\n  - &a k_proj\n  - *a\n"
_TOML = b'seed = 1\nplugin = ["lora"]\nlearning_rate = 1e-4\n[lora]\nlora_rank = 4\n'


TARGETS: dict[str, Target] = {
    "settings, JSON": Target(objects(_setting_names()).map(as_json), read_settings("s.json")),
    "settings, bytes changed": Target(
        mutated(b'{"seed": 1, "plugin": ["lora"], "lora_rank": 4}'), read_settings("s.json")
    ),
    "settings, YAML": Target(mutated(_YAML), read_settings("s.yaml")),
    "settings, TOML": Target(mutated(_TOML), read_settings("s.toml")),
    "the command line": Target(_arguments(), typed, kept=(["\n"],)),
}
