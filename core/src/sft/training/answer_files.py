"""The files in a run's folder that hold the model's answers: ``samples-STEP.jsonl`` to the sample prompts, and
``generations-STEP.jsonl`` to the dev prompts. One JSON object a line: prompt, answer, reference."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from sft.data.questions import Question
from sft.files import write_text

SAMPLES, GENERATIONS = "samples", "generations"
PATTERNS = tuple(f"{kind}-*.jsonl" for kind in (SAMPLES, GENERATIONS))


def file_of(folder: Path, kind: str, step: int) -> Path:
    """Where the answers after ``step`` are."""
    return folder / f"{kind}-{step}.jsonl"


def files_of(folder: Path, kind: str) -> list[tuple[int, Path]]:
    """The files of one kind that are there, each with its step, in ascending order."""
    found = [(path.stem.split("-")[1], path) for path in folder.glob(f"{kind}-*.jsonl")]
    return sorted((int(step), path) for step, path in found if step.isascii() and step.isdigit())


def write_answers(path: Path, questions: Sequence[Question], texts: Sequence[str]) -> None:
    """Write what the model answers to each of the ``questions``."""
    lines = [
        {"prompt": question.prompt, "answer": text, "reference": question.reference}
        for question, text in zip(questions, texts, strict=True)
    ]
    write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
