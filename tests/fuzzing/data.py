"""Data made up: records, and the tokenizers and chat templates that they are written with."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from bad_inputs.case import RECORD
from hypothesis import strategies as st

from fuzzing.made_up import as_json, mutated, objects, values, words
from fuzzing.models import BASE
from fuzzing.trial import Target

_CALL = {"function": {"name": "f", "arguments": json.dumps({"x": 1})}}
RECORDS = (
    RECORD * 2
    + '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]}\n'
    + '{"messages": [{"role": "user", "content": "a", "train": false}, '
    + '{"role": "assistant", "content": "b", "loss": true, "loss_scale": 0.5}], "weight": 2}\n{"text": "a"}\n'
    + '{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "c"}\n'
    + '{"instruction": "a", "input": "b", "output": "c", "history": [["d", "e"]]}\n'
    + json.dumps(
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "a"}]},
                {"role": "assistant", "content": None, "reasoning_content": "b", "tool_calls": [{"id": "c", **_CALL}]},
                {"role": "tool", "tool_call_id": "c", "content": "2"},
            ],
            "tools": [{"type": "function", "function": {"name": "f"}}],
        }
    )
    + "\n"
    + json.dumps(
        {
            "conversations": [
                {"from": "human", "value": "a"},
                {"from": "function_call", "value": json.dumps(_CALL["function"])},
                {"from": "observation", "value": "b"},
            ],
            "tools": json.dumps([{"name": "f"}]),
        }
    )
    + "\n"
).encode()
_KEYS = (
    *("src", "tgt", "context", "messages", "conversations", "instruction", "input", "output", "history", "system"),
    *("role", "content", "from", "value", "weight", "tools", "functions", "tool_calls", "function_call", "function"),
    *("name", "arguments", "id", "tool_call_id", "reasoning_content", "thinking", "type", "text"),
    *("train", "training", "train_detail", "loss", "loss_scale"),
)


def read_records(name: str) -> Callable[[Path, bytes], Any]:
    def read(folder: Path, content: bytes) -> Any:
        from sft.data.finding import find_files
        from sft.data.formats import Formats
        from sft.data.sources import read as records

        (folder / name).write_bytes(content)
        # Each is read as the first of its data, or all but those of one format would be refused for that.
        return [Formats(_no_plugins()).turns(record) for record in records(find_files(folder, "train"))]

    return read


@cache
def _no_plugins() -> Any:
    from sft.resolve import resolve

    return resolve({}, ())[1]


def read_tokenizer(folder: Path, files: dict[str, bytes]) -> Any:
    from sft.data.tokenizer import Tokenizer

    for name, content in files.items():
        (folder / name).write_bytes(content)
    tokenizer = Tokenizer(folder)
    return tokenizer.encode("hello"), tokenizer.marks, tokenizer.stop_ids, tokenizer.fingerprint()


_TOKENIZER_CONFIG = objects(
    ("eos_token", "bos_token", "pad_token", "unk_token", "chat_template", "content", "add_bos_token"),
    st.sampled_from(["<|im_end|>", "<|endoftext|>"]) | values,
)


_PIECES = (
    *("{% for m in messages %}", "{% endfor %}", "{{ m.content }}", "{{ m.role }}", "{{ m['content'] | trim }}"),
    *("{% if add_generation_prompt %}", "{% endif %}", "{% else %}", "{% generation %}", "{% endgeneration %}"),
    *("{{ eos_token }}", "{{ bos_token }}", "<|im_end|>", "\n", "{{ messages[0].content }}", "{% break %}"),
    *("{{ raise_exception('x') }}", "{{ messages | tojson }}", "{% set x = messages %}", "{{ x }}", "{{ loop.index }}"),
    *("{{ messages[0].__class__ }}", "{{ strftime_now('%d') }}", "{{ 1 / 0 }}", "{% macro f() %}", "{% endmacro %}"),
    *("{{ f() }}", "{{ '\\ud800' }}", "{# ", " #}", "{% raw %}", "{% endraw %}", "{{", "}}", "{%", "%}"),
    *("{{ range(10) | list }}", "{{ 'a' * 10 }}", "{{ m.content[:1] }}", "{{ messages | length }}", "{% continue %}"),
)
templates = st.lists(st.sampled_from(_PIECES) | words, max_size=12).map("".join)


def read_template(folder: Path, text: str) -> Any:
    from sft.conversations import Conversation, ToolCall, Turn
    from sft.data.encoding import encode
    from sft.data.questions import encode_prompt
    from sft.data.tokenizer import Tokenizer
    from sft.errors import UsageError

    (folder / "t.jinja").write_bytes(text.encode("utf-8", "surrogatepass"))
    tokenizer = Tokenizer(BASE, chat_template=str(folder / "t.jinja"))
    turns = [Turn("system", "Be brief."), Turn("user", "a"), Turn("assistant", "b", trains=True)]
    turns += [Turn("user", "What is a river?"), Turn("assistant", "It is water.", trains=True)]
    encode([Conversation(turns, "here")], tokenizer, 64, 64)
    calls = [Turn("assistant", "", True, 2, "why", (ToolCall("f", {"x": 1}),)), Turn("tool", "2", name="f")]
    with suppress(UsageError):  # what a template does not take is refused
        encode([Conversation([turns[1], *calls], "here", [{"function": {"name": "f"}}])], tokenizer, 64, 64)
    return encode_prompt(turns[:-1], tokenizer)


def read_pairs(folder: Path, value: Any) -> Any:
    from sft.conversations import Conversation, Turn
    from sft.data.encoding import encode
    from sft.data.tokenizer import Tokenizer

    (folder / "t.json").write_bytes(as_json(value))
    tokenizer = Tokenizer(BASE, chat_template=str(folder / "t.json"))
    turns = [Turn("user", "What is a river?"), Turn("assistant", "It is water.", trains=True)]
    return encode([Conversation(turns, "here")], tokenizer, 64, 64)


TARGETS: dict[str, Target] = {
    "records, bytes changed": Target(mutated(RECORDS), read_records("train.json")),
    "records, made up": Target(
        st.lists(objects(_KEYS) | values, max_size=3).map(lambda found: b"\n".join(map(as_json, found))),
        read_records("train.json"),
    ),
    "an array of records": Target(
        mutated(b"[" + b", ".join(RECORDS.split(b"\n")[:-1]) + b"]"), read_records("train.json")
    ),
    "CSV": Target(mutated(b'src,tgt\na,b\n"c, d",e\n'), read_records("train.csv")),
    "tokenizer_config.json": Target(
        _TOKENIZER_CONFIG.map(lambda found: {"tokenizer_config.json": as_json(found)}),
        read_tokenizer,
        lambda folder: [shutil.copy(BASE / name, folder) for name in ("tokenizer.json", "config.json")],
        kept=({"tokenizer_config.json": b'{"bos_token": "\\ud800"}'},),
    ),
    "tokenizer.json": Target(
        mutated((BASE / "tokenizer.json").read_bytes()).map(lambda found: {"tokenizer.json": found}),
        read_tokenizer,
        lambda folder: [shutil.copy(BASE / name, folder) for name in ("tokenizer_config.json", "config.json")],
    ),
    "chat templates": Target(templates, read_template),
    "PaddleNLP's templates": Target(
        objects(("system", "conversation", "query"), st.lists(templates, min_size=2, max_size=2) | templates | values),
        read_pairs,
    ),
}
