"""A checkpoint that says ``toy``, and plugins that read it: one for the decoder, one with a class of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.numpy import load_file, save_file

import sft
from sft.testing import make_model

INSTALLED = """
    import toy_families

    class Toy(toy_families.{kind}):
        name = "{name}"
        api_version = 1
"""
"""The source of a distribution with one of them, for ``distribute``."""


def toy_model(folder: Path, **config: Any) -> Path:
    """A Llama under other names of tensors."""
    make_model(folder, model_type="toy", tie_word_embeddings=False, **config)
    path = folder / "model.safetensors"
    save_file({name.replace("model.", "toy."): tensor for name, tensor in load_file(path).items()}, path)
    return folder


class Reader(sft.Plugin):
    """Lets the decoder compute what says ``toy``."""

    name = "toy-reader"
    api_version = 1

    @sft.hookimpl
    def sft_model_family(self, config: dict[str, Any]) -> sft.Family | None:
        if config.get("model_type") != "toy":
            return None
        return sft.Family("toy", "ToyForCausalLM", self.read, renamed=(("toy.", "model."),), build=self.build)

    build: Any = None

    def read(self, values: sft.Values) -> sft.Architecture:
        heads, positions = values.count("num_attention_heads"), values.count("max_position_embeddings")
        size = values.count("hidden_size") // heads
        return sft.Architecture(
            vocabulary=values.count("vocab_size"),
            hidden=values.count("hidden_size"),
            positions=positions,
            blocks=(sft.Block(),) * values.count("num_hidden_layers"),
            tied=values.flag("tie_word_embeddings", False),
            rotaries=(values.rotary(size, positions, 10000.0),),
            inner=values.count("intermediate_size"),
            heads=heads,
            kv_heads=values.count("num_key_value_heads", heads),
            head_size=size,
            norm_epsilon=values.number("rms_norm_eps", 1e-6),
        )


class OwnClass(Reader):
    """The same with a class that is not the decoder's."""

    name = "toy-class"
    api_version = 1

    def build(self, architecture: Any) -> Any:
        import paddle

        from sft.models.decoder import CausalLM

        class Toy(CausalLM):
            pass

        model = Toy(architecture)
        for layer in model.sublayers():
            if type(layer) is sft.Linear:  # as most would write it
                layer.__class__ = paddle.nn.Linear
        return model
