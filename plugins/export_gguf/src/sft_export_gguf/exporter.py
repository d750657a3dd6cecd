"""The plugin: what it is asked for, and what it writes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import sft
from sft_export_gguf.types import TYPES


@dataclass
class GgufOptions:
    """How numbers are kept."""

    gguf_type: str | None = sft.option(
        None,
        "type of the matrices, those with a q in blocks of 32 values; unset: the model's own; q4_k_m and other K types "
        "are made of an f16 file by llama-quantize of llama.cpp",
        choices=TYPES,
    )
    gguf_system: str | None = sft.option(None, "system prompt that the Modelfile gives the model, with --to ollama")


class Gguf(sft.Plugin):
    """Writes a finished model as one GGUF file for llama.cpp (``--to gguf``), with a Modelfile for Ollama (``--to
    ollama``), or its adapter alone (``--to gguf-lora``)."""

    name = "gguf"
    api_version = ">=1.1,<2"
    summary = "Write a finished model as one GGUF file, for llama.cpp and Ollama."
    reference = "https://github.com/ggml-org/ggml/blob/master/docs/gguf.md"
    Options = GgufOptions
    certify = sft.Trial(options={"gguf_system": "You sell coats."})

    @sft.hookimpl
    def sft_export(self, model: sft.FinishedModel, to: str, folder: Path) -> list[Path] | None:
        if to not in ("gguf", "gguf-lora", "ollama"):
            return None
        from sft_export_gguf.adapter import write_adapter
        from sft_export_gguf.modelfile import modelfile
        from sft_export_gguf.writing import write

        if to != "ollama" and self.options.gguf_system is not None:
            raise sft.UsageError(
                f"gguf_system does nothing with --to {to}, which has no place for it; use --to ollama."
            )
        if to == "gguf-lora":
            write_adapter(folder / "adapter.gguf", model, self.options.gguf_type)
            return [folder / "adapter.gguf"]
        path, beside = folder / "model.gguf", folder / "Modelfile"
        text = modelfile(model, path.name, self.options.gguf_system) if to == "ollama" else None
        write(path, model, self.options.gguf_type)
        if text is None:
            return [path]
        beside.write_text(text, encoding="utf-8")
        return [path, beside]
