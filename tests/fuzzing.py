"""What is fuzzed: for each reader of what strangers wrote, how its input is made up, and how it is read.

A reader gives a value, or refuses its input with an error of sft in one sentence, in a limited time. Examples are drawn
the same way each time, but for ``make test-reliability``, which draws ten times as many, at random, and shows how to
repeat one that fails. An example that once failed is ``kept``, and tried each time.
"""

from __future__ import annotations

import json
import shutil
import struct
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from bad_inputs.case import MODELS, RECORD
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from reliability.figures import WHOLE

import sft

FEW, MANY = 10, 10_000 if WHOLE else 300
"""Examples of each target: by default, and in the slow tier."""
SECONDS = 10.0
"""The longest that an example may take; a machine with other work to do is not to fail for it."""
LONGEST = 3000
"""Characters of a message, at most."""


@dataclass(frozen=True)
class Target:
    """A reader: ``read`` gets a folder that :meth:`prepare` has filled, and an example."""

    examples: Any
    read: Callable[[Path, Any], Any]
    prepare: Callable[[Path], Any] = lambda folder: None
    kept: tuple[Any, ...] = field(default_factory=tuple)


def fuzz(target: Target, count: int) -> int:
    """Try ``count`` examples, and those that are kept; how many have been tried."""
    tried = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        target.prepare(folder)

        @settings(
            max_examples=count,
            derandomize=not WHOLE,
            print_blob=True,
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(target.examples)
        def check(made_up: Any) -> None:
            nonlocal tried
            tried += 1
            attempt(target, folder, made_up)

        for one in target.kept:
            check = example(one)(check)
        check()
    return tried


def attempt(target: Target, folder: Path, made_up: Any) -> None:
    """What must hold of each example."""
    began = time.monotonic()
    try:
        target.read(folder, made_up)
    except sft.UsageError as error:
        message = str(error)
        assert message, "it is refused without a word"
        assert "\n" not in message, message
        assert len(message) < LONGEST, message[:500]
    assert time.monotonic() - began < SECONDS


# --- how input is made up -----------------------------------------------------------------------------------

words = st.text(max_size=20) | st.sampled_from(["", "auto", "none", "~x", "a\0b", "\ud800", "\x1b[31m", "../x", "/"])
# paddle makes subnormal numbers 0 in its process, and hypothesis does not draw what is not there.
numbers = (
    st.integers()
    | st.floats(allow_subnormal=False)
    | st.sampled_from([0, -1, 2**31, 2**63, 10**30, 10**400, 1e308, 1e-320])
)
scalars = st.none() | st.booleans() | numbers | words
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(words, inner, max_size=4), max_leaves=8
)


def objects(names: Iterable[str], usual: Any = values) -> Any:
    """JSON objects that have some of the ``names``, and perhaps others."""
    return st.dictionaries(st.sampled_from(sorted(names)) | words, usual, max_size=6)


def as_json(value: Any) -> bytes:
    return json.dumps(value).encode("utf-8", "surrogatepass")


@st.composite
def mutated(draw: Any, whole: bytes) -> bytes:
    """``whole`` with some bytes changed, taken out, doubled or put in, or cut off."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 6))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        kind = draw(st.sampled_from(["set", "take", "put", "double", "cut"]))
        if kind == "set" and data:
            data[at] = draw(st.integers(0, 255))
        elif kind == "take":
            del data[at : at + draw(st.integers(1, 20))]
        elif kind == "put":
            data[at:at] = draw(
                st.binary(max_size=8) | st.sampled_from([b'"', b"{", b"}", b"[", b"]", b",", b":", b"\n", b"9" * 30])
            )
        elif kind == "double":
            data[at:at] = data[at : at + draw(st.integers(1, 40))] * draw(st.integers(1, 3))
        elif draw(st.booleans()):
            del data[at:]
    return bytes(data)


# --- records, settings --------------------------------------------------------------------------------------

RECORDS = (
    RECORD * 2
    + '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]}\n'
    + '{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "c"}\n'
    + '{"instruction": "a", "input": "b", "output": "c", "history": [["d", "e"]]}\n'
).encode()
_KEYS = (
    *("src", "tgt", "context", "messages", "conversations", "instruction", "input", "output", "history", "system"),
    *("role", "content", "from", "value", "weight", "tools", "tool_calls"),
)


def read_records(name: str) -> Callable[[Path, bytes], Any]:
    def read(folder: Path, content: bytes) -> Any:
        from sft.data.formats import Formats
        from sft.data.sources import find_files
        from sft.data.sources import read as records

        (folder / name).write_bytes(content)
        formats = Formats(_no_plugins())
        return [formats.turns(record) for record in records(find_files(folder, "train"))]

    return read


@cache
def _no_plugins() -> Any:
    from sft.resolve import resolve

    return resolve({}, ())[1]


def read_settings(name: str) -> Callable[[Path, bytes], Any]:
    def read(folder: Path, content: bytes) -> Any:
        from sft.resolve import resolve
        from sft.settings.reading import normalise, read_file

        (folder / name).write_bytes(content)
        return resolve(normalise(read_file(folder / name)), ())

    return read


def typed(folder: Path, arguments: list[str]) -> Any:
    from sft.commands.run import collect
    from sft.resolve import resolve

    return resolve(collect(arguments), ())


def _setting_names() -> list[str]:
    from sft.settings.arguments import core_options

    return [*core_options(), "plugin", "lora", "lora_rank", "lora_target_modules", "nproc", "neftune", "packing"]


def _arguments() -> Any:
    name = st.sampled_from(_setting_names()).map("--{}".format) | words
    return st.lists(name | words | numbers.map(str), max_size=8)


_YAML = b"seed: 1\nplugin: [lora]\nlearning_rate: 1e-4\nlora_target_modules:\n  - q_proj\n  - &a k_proj\n  - *a\n"

# --- models -------------------------------------------------------------------------------------------------

BASE = MODELS / "llama-tied-gqa"
_CONFIG_KEYS = (
    *("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size", "vocab_size"),
    *("num_hidden_layers", "max_position_embeddings", "rms_norm_eps", "rope_theta", "rope_scaling", "rope_parameters"),
    *("tie_word_embeddings", "attention_bias", "mlp_bias", "hidden_act", "hidden_activation", "sliding_window"),
    *("use_sliding_window", "max_window_layers", "layer_types", "sliding_window_pattern", "no_rope_layers"),
    *("num_local_experts", "num_experts", "num_experts_per_tok", "moe_intermediate_size", "decoder_sparse_step"),
    *("mlp_only_layers", "partial_rotary_factor", "query_pre_attn_scalar", "attn_logit_softcapping", "logits_scaling"),
    *("rope_scaling_type", "rope_scaling_factor", "original_max_position_embeddings", "rope_local_base_freq"),
)
_ROPE = objects(
    ("rope_type", "type", "factor", "rope_theta", "low_freq_factor", "high_freq_factor", "short_factor", "long_factor",
     "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "attention_factor", "truncate"),
    numbers | st.sampled_from(["linear", "dynamic", "llama3", "yarn", "longrope", "default"]) | values,
)  # fmt: skip


def _families() -> list[str]:
    from sft.models.families.known import FAMILIES

    return sorted(FAMILIES)


def read_config(folder: Path, changes: dict[str, Any]) -> Any:
    from sft.models.config import hf_config, with_one_spelling
    from sft.models.config import read_config as read
    from sft.models.families.known import family_of

    config = {**json.loads((BASE / "config.json").read_text()), **changes}
    (folder / "config.json").write_bytes(as_json(config))
    found = read(folder)
    family = family_of(found, folder)
    family.architecture(found, folder)
    family.architecture(with_one_spelling(found), folder)
    return hf_config(found, "float32", family)


def read_weights(folder: Path, content: bytes) -> Any:
    from sft.models.families.known import FAMILIES
    from sft.models.source import ModelFolder, Weights

    (folder / "model.safetensors").write_bytes(content)
    weights = Weights(ModelFolder(folder), FAMILIES["llama"])
    return [weights.read(name) for name in weights]


def _tensors() -> bytes:
    import numpy as np
    from safetensors.numpy import save

    return save({"a": np.ones((2, 3), np.float32), "b": np.zeros(4, np.float16)}, {"x": "y"})


@st.composite
def headers(draw: Any) -> bytes:
    """A safetensors file whose header is made up."""
    entry = objects(("dtype", "shape", "data_offsets"), values | st.sampled_from(["F32", "I8", "F8_E4M3", "BOOL"]))
    header = draw(st.dictionaries(words, entry | values, max_size=3))
    text = as_json(header)
    size = draw(st.just(len(text)) | st.integers(0, 2**64 - 1))
    return struct.pack("<Q", size) + text + bytes(draw(st.integers(0, 64)))


def read_index(folder: Path, content: bytes) -> Any:
    from sft.models.source import ModelFolder, weight_files

    (folder / "model.safetensors.index.json").write_bytes(content)
    return weight_files(ModelFolder(folder))


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

# --- templates ----------------------------------------------------------------------------------------------

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
    from sft.data.encoding import encode, encode_prompt
    from sft.data.formats import Conversation
    from sft.data.tokenizer import Tokenizer
    from sft.seams import Turn

    (folder / "t.jinja").write_bytes(text.encode("utf-8", "surrogatepass"))
    tokenizer = Tokenizer(BASE, chat_template=str(folder / "t.jinja"))
    turns = [Turn("system", "Be brief."), Turn("user", "a"), Turn("assistant", "b", trains=True)]
    turns += [Turn("user", "What is a river?"), Turn("assistant", "It is water.", trains=True)]
    encode([Conversation(turns, "here")], tokenizer, 64, 64)
    return encode_prompt(turns[:-1], tokenizer)


def read_pairs(folder: Path, value: Any) -> Any:
    from sft.data.encoding import encode
    from sft.data.formats import Conversation
    from sft.data.tokenizer import Tokenizer
    from sft.seams import Turn

    (folder / "t.json").write_bytes(as_json(value))
    tokenizer = Tokenizer(BASE, chat_template=str(folder / "t.json"))
    turns = [Turn("user", "What is a river?"), Turn("assistant", "It is water.", trains=True)]
    return encode([Conversation(turns, "here")], tokenizer, 64, 64)


# --- adapters, checkpoints ----------------------------------------------------------------------------------

_LORA_KEYS = (
    *("peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "bias"),
    *("target_modules", "init_lora_weights", "modules_to_save", "fan_in_fan_out", "layer_replication"),
)


def with_adapter(folder: Path) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    name = "base_model.model.model.layers.0.self_attn.q_proj"
    halves = {
        f"{name}.lora_A.weight": np.ones((2, 32), np.float32),
        f"{name}.lora_B.weight": np.ones((32, 2), np.float32),
    }
    save_file(halves, str(folder / "adapter_model.safetensors"))


def read_lora(folder: Path, config: dict[str, Any]) -> Any:
    from sft_peft_lora.files import LoraFolder

    (folder / "adapter_config.json").write_bytes(as_json({"peft_type": "LORA", "r": 2, "lora_alpha": 4, **config}))
    adapter = LoraFolder(folder)
    return [adapter.scaling(target) for target in adapter.pairs]


def read_metadata(folder: Path, metadata: dict[str, str]) -> Any:
    import numpy as np
    from safetensors.numpy import save_file

    from sft.models.adapter_folder import base_plugins, read_adapter

    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    save_file({name: np.ones((2, 32), np.float32)}, str(folder / "adapter_model.safetensors"), metadata)
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    return base_plugins(folder), read_adapter(folder)


def read_state(folder: Path, content: bytes) -> Any:
    from sft.training.checkpoint_folder import read_state as read

    (folder / "trainer").mkdir(exist_ok=True)
    (folder / "trainer" / "state.json").write_bytes(content)
    return read(folder)


def sealed(folder: Path) -> bytes:
    """A checkpoint of two files, as far as its manifest goes; the manifest."""
    from sft.training.manifest import NAME, write_manifest

    (folder / "trainer").mkdir()
    for name in ("model.safetensors", "trainer/state.json"):
        (folder / name).write_bytes(name.encode())
    write_manifest(folder)
    return (folder / NAME).read_bytes()


def _manifest() -> bytes:
    with tempfile.TemporaryDirectory() as name:
        return sealed(Path(name))


def read_manifest(folder: Path, content: bytes) -> Any:
    """Only the manifest that was written says that the checkpoint is whole."""
    from sft.progress import Progress
    from sft.training.manifest import NAME, damage

    (folder / NAME).write_bytes(content)
    said = damage(folder, Progress(lambda text: None))
    assert (said is None) is (content == _manifest())
    assert said is None or (said.isprintable() and len(said) < LONGEST)
    return said


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
    "settings, JSON": Target(objects(_setting_names()).map(as_json), read_settings("s.json")),
    "settings, bytes changed": Target(
        mutated(b'{"seed": 1, "plugin": ["lora"], "lora_rank": 4}'), read_settings("s.json")
    ),
    "settings, YAML": Target(mutated(_YAML), read_settings("s.yaml")),
    "the command line": Target(_arguments(), typed, kept=(["\n"],)),
    "config.json": Target(
        objects(_CONFIG_KEYS, numbers | _ROPE | values).flatmap(
            lambda found: st.sampled_from(_families()).map(lambda family: {**found, "model_type": family})
        ),
        read_config,
    ),
    "safetensors, bytes changed": Target(mutated(_tensors()), read_weights),
    "safetensors, header made up": Target(headers(), read_weights),
    "index of weights": Target(
        (objects(("weight_map",), st.dictionaries(words, values, max_size=3) | values)).map(as_json)
        | mutated(b'{"weight_map": {"a": "b.safetensors"}}'),
        read_index,
    ),
    "tokenizer_config.json": Target(
        _TOKENIZER_CONFIG.map(lambda found: {"tokenizer_config.json": as_json(found)}),
        read_tokenizer,
        lambda folder: [shutil.copy(BASE / name, folder) for name in ("tokenizer.json", "config.json")],
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
    "adapter_config.json": Target(
        objects(_LORA_KEYS, numbers | values), read_lora, with_adapter, kept=({"target_modules": [None]},)
    ),
    "an adapter's metadata": Target(
        st.dictionaries(
            st.sampled_from(["sft.quantizer", "sft.config", "sft.renamed", "sft.base"]),
            st.text(max_size=20) | values.map(json.dumps),
            max_size=3,
        ),
        read_metadata,
    ),
    "a checkpoint's manifest": Target(
        mutated(_manifest())
        | objects(("format", "files"), st.dictionaries(words, objects(("bytes", "sha256"))) | values).map(as_json),
        read_manifest,
        sealed,
        kept=(_manifest(),),
    ),
    "state.json": Target(
        objects(("format", "step", "data", "plugins")).map(as_json) | mutated(b'{"format": 3, "step": 1}'), read_state
    ),
}
