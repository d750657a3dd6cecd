"""Adapters made up: their config, and the metadata of their weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from fuzzing.made_up import as_json, numbers, objects, values
from fuzzing.trial import Target

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

    from sft.models.adapter_folder import base_plugins, read_adapter, read_saved

    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    save_file({name: np.ones((2, 32), np.float32)}, str(folder / "adapter_model.safetensors"), metadata)
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    return base_plugins(folder), read_adapter(folder), read_saved(folder)


TARGETS: dict[str, Target] = {
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
}
