"""The families that PaddleNLP's classes serve: what reads the config of each, and what builds its model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sft
from sft_models_paddlenlp import readers
from sft_models_paddlenlp.readers import PaddleNLPShape


def _build(name: str) -> Callable[[Any], Any]:
    """Makes the model of class ``name``; the module of it, which imports paddlenlp, is imported when it is called."""

    def build(shape: PaddleNLPShape) -> Any:
        from sft_models_paddlenlp import models

        return getattr(models, name)(shape)

    return build


FAMILIES = {
    "qwen": sft.Family("qwen", "QWenLMHeadModel", readers.qwen, build=_build("Qwen"), upright=("wte.weight",)),
    "chatglm": sft.Family(
        "chatglm",
        "ChatGLMForConditionalGeneration",
        readers.chatglm,
        build=_build("ChatGLM"),
        upright=("word_embeddings.weight",),
    ),
    "deepseek_v2": sft.Family("deepseek_v2", "DeepseekV2ForCausalLM", readers.deepseek_v2, build=_build("DeepseekV2")),
}
