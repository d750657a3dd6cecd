"""The pages of the author's kit: what they show is run."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from installing import install
from shown_plugins import SHOWN

import sft
from sft.kit.validate import validated
from sft.testing import needs, read_metrics, write_data

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
Train = Callable[..., sft.Summary]


def replaced(folder: Path, diff: str) -> None:
    """Change a file as a block of the page says: its lines with - become those with +."""
    heading, *lines = diff.splitlines()
    path = folder / heading.removeprefix("--- ")
    old, new = ("\n".join(line[1:] for line in lines if line[:1] in signs) for signs in (" -", " +"))
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1, old
    path.write_text(text.replace(old, new), encoding="utf-8")


@pytest.mark.timeout(300)
@needs("lora")
def test_the_first_plugin_is_made_as_the_page_says(tmp_path: Path) -> None:
    site = tmp_path / "site"
    site.mkdir()
    search = os.pathsep.join([str(site), *filter(None, sys.path[1:])])
    environment = {**os.environ, "PYTHONPATH": search, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    page = (ROOT / "docs" / "first-plugin.md").read_text(encoding="utf-8")
    for language, text in re.findall(r"^```(json|console|diff)\n(.*?)^```", page, re.DOTALL | re.MULTILINE):
        if language == "json":
            (tmp_path / "try.json").write_text(text, encoding="utf-8")
        elif language == "diff":
            replaced(tmp_path / "sft-poly-loss", text)
        else:
            for command, shown in re.findall(r"^\$ (.+)\n((?:[^$].*\n)*)", text, re.MULTILINE):
                if command.startswith("pip install"):
                    install(tmp_path / "sft-poly-loss", site)
                    continue
                line = ["bash", "-c", command.replace("pytest", "python -m pytest -p no:cacheprovider")]
                done = subprocess.run(line, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=110)
                said = done.stdout + done.stderr
                assert done.returncode == 0, f"{command}\n{said}"
                for expected in shown.splitlines():
                    assert expected.partition("…")[0] in said, f"{command} does not say {expected!r}:\n{said}"


def losses(summary: sft.Summary) -> list[float]:
    return [line["loss"] for line in read_metrics(summary.output_dir) if "loss" in line]


def test_the_format_reads_what_the_core_reads_otherwise(
    written: Callable[[str], str], train: Train, tmp_path: Path
) -> None:
    pairs = [("type#1", "A coat."), ("type#2", "Two coats for you.")]
    ours = write_data(tmp_path / "ours", [{"q": q, "a": a} for q, a in pairs])
    usual = write_data(tmp_path / "usual", [{"src": q, "tgt": a} for q, a in pairs])
    plain = train("plain", dataset_name_or_path=str(usual), max_steps=1)
    read = train("read", dataset_name_or_path=str(ours), max_steps=1, plugin=[written("qa-pairs")])
    assert losses(read) == losses(plain)
    write_data(ours, [{"q": "type#1", "a": " "}])
    with pytest.raises(sft.UsageError, match=r"train\.json.*the answer a is empty"):
        train("wrong", dataset_name_or_path=str(ours), plugin=[written("qa-pairs")])


def test_positions_are_half_as_far_apart(
    written: Callable[[str], str], train: Train, base_model: Path, tmp_path: Path
) -> None:
    """As where the model's own config says so."""
    done = train("out", max_steps=1, plugin=[written("twice-as-far")])
    said = shutil.copytree(base_model, tmp_path / "model")
    config = json.loads((said / "config.json").read_text(encoding="utf-8"))
    config.update(rope_scaling={"rope_type": "linear", "factor": 2.0}, max_position_embeddings=256)
    (said / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert losses(done) == losses(train("said", max_steps=1, model_name_or_path=str(said)))
    assert losses(done) != losses(train("plain", max_steps=1))


def test_rows_count_alike(written: Callable[[str], str], train: Train, tmp_path: Path) -> None:
    """The loss of two records is the mean of what each has alone."""
    records = [{"src": "type#1", "tgt": "A coat."}, {"src": "type#2", "tgt": "A coat for you and for your brother."}]
    alone = []
    for number, record in enumerate(records):
        data = write_data(tmp_path / str(number), [record])
        alone += losses(train(f"alone{number}", dataset_name_or_path=str(data), max_steps=1))
    both = {"dataset_name_or_path": str(write_data(tmp_path / "both", records)), "max_steps": 1}
    (alike,) = losses(train("alike", plugin=[written("rows-alike")], **both))
    (usual,) = losses(train("usual", **both))
    assert alike == pytest.approx(np.mean(alone), rel=1e-5)
    assert usual != pytest.approx(alike, rel=1e-3)


def test_the_newest_checkpoint_is_copied(written: Callable[[str], str], train: Train) -> None:
    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    done = train("out", plugin=[written("keeps-one")], **settings)
    newest, copy = done.output_dir / "checkpoint-2", done.output_dir.with_name("out-newest")
    files = [path.relative_to(newest) for path in newest.rglob("*") if path.is_file()]
    assert files
    assert all((copy / file).read_bytes() == (newest / file).read_bytes() for file in files)
    assert not copy.with_suffix(".draft").exists()


@pytest.mark.parametrize("name", SHOWN)
def test_each_is_valid(written: Callable[[str], str], name: str) -> None:
    (findings,) = validated(written(name))
    assert findings.faults == []
