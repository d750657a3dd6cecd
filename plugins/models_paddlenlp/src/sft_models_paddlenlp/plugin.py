"""The plugin ``paddlenlp-models``: which families it serves, told from a config alone."""

from __future__ import annotations

from typing import Any

import sft


class PaddleNLPModels(sft.Plugin):
    """Lets sft train models of families that PaddleNLP 3.0.0b4 has and the decoder does not."""

    name = "paddlenlp-models"
    api_version = 1
    summary = "Qwen 1, ChatGLM2 and 3, and DeepSeek-V2, through PaddleNLP's classes."
    reference = "https://github.com/PaddlePaddle/PaddleNLP (3.0.0b4)"
    conflicts = ("parallel-4d",)  # which divides the decoder's layers alone

    @sft.hookimpl
    def sft_model_family(self, config: dict[str, Any]) -> sft.Family | None:
        """The family of a ``config.json``, where it is one of these."""
        from sft_models_paddlenlp.families import FAMILIES

        kind = config.get("model_type")
        return FAMILIES.get(kind) if isinstance(kind, str) else None
