"""Each setting that PaddleNLP's document names, changed alone, changes a run as effects.py says."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from effects import EFFECTS, ELSEWHERE, Outcome, make_data, run


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def before(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[dict[str, Any]], Outcome]:
    """The run without the setting; those that several settings compare with are made once."""
    made: dict[str, Outcome] = {}

    def outcome(beside: dict[str, Any]) -> Outcome:
        key = json.dumps(beside, sort_keys=True)
        if key not in made:
            made[key] = run(tmp_path_factory.mktemp("before") / "out", data, **beside)
        return made[key]

    return outcome


@pytest.mark.parametrize("name", EFFECTS)
def test_setting_has_its_effect(
    name: str, data: Path, tmp_path: Path, before: Callable[[dict[str, Any]], Outcome]
) -> None:
    effect = EFFECTS[name]
    changes = dict(effect.changes)
    if name == "dataset_name_or_path":
        other = tmp_path / "other.json"
        other.write_text((data / "dev.json").read_text())
        changes[name] = str(other)
    assert name in {"output_dir", *changes}
    assert effect.check(before(effect.beside), run(tmp_path / "out", data, **{**effect.beside, **changes}))


@pytest.mark.parametrize("name", ELSEWHERE)
def test_the_test_of_a_setting_is_there_and_sets_it(name: str) -> None:
    """By keyword, by name in a dict or a parameter, or typed; a docstring or a comment does not count."""
    path, _, test = ELSEWHERE[name][1].partition("::")
    tree = ast.parse((Path(__file__).parent.parent / path).read_text(encoding="utf-8"))
    (function,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == test)
    keywords = {node.arg for node in ast.walk(function) if isinstance(node, ast.keyword)}
    texts = {node.value for node in ast.walk(function) if isinstance(node, ast.Constant)}
    assert name in keywords or {name, f"--{name}"} & texts
