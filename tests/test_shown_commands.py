"""Command lines of the pages, typed in this process: MODEL and DATA are the demo's, and a run takes two steps."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from chinese_pages import sections
from click.testing import CliRunner

from sft.commands.cli import cli
from sft.testing import needs, read_metrics

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "core" / "src" / "sft" / "demo"
LORA = {"plugin": ["lora"], "model_name_or_path": "MODEL", "dataset_name_or_path": "DATA", "max_length": 256}
PLUGIN = """\
from dataclasses import dataclass

import sft


@dataclass
class Options:
    my_option: int = sft.option(1, "a number", minimum=1)


class Mine(sft.Plugin):
    name = "mine"
    api_version = ">=1,<2"
    Options = Options

    @sft.hookimpl
    def sft_check(self, run):
        print("my option is", self.options.my_option)
"""
REST = (
    "--plugin lora --model_name_or_path MODEL --dataset_name_or_path with_bad.json --output_dir rest "
    "--overwrite_output_dir"
)
"""What … stands for in a command line."""
PAGES = {
    "README.md": [],
    "docs/tutorial.md": [],
    "docs/data.md": ["sft run mix.yaml"],
    "docs/export.md": ["sft run settings.json --output_dir out"],
    "docs/influence.md": ["sft run settings.json --output_dir out --save_strategy steps --save_steps 1"],
    "docs/kit.md": [],
    "docs/plan.md": [],
    "docs/replay.md": ["sft run settings.json --output_dir out"],
    "docs/report.md": [f"sft run settings.json --output_dir {name}" for name in ("out", "out-a", "out-b")],
}
"""The pages, and what has to be typed before."""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the reader of a page is: a model and data are there under the names that the pages give them."""
    monkeypatch.chdir(tmp_path)
    model = tmp_path / "MODEL"
    shutil.copytree(DEMO / "model", model)
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    (model / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 4096}), encoding="utf-8")
    (tmp_path / "HuggingFaceTB").mkdir()
    (tmp_path / "HuggingFaceTB" / "SmolLM2-135M-Instruct").symlink_to(model)
    (record,) = code("docs/tutorial.md", "json")
    for name in ("DATA", "data/ads", "more"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "train.json").write_text(record * 8, encoding="utf-8")
        (tmp_path / name / "dev.json").write_text(record * 2, encoding="utf-8")
    shutil.copy(tmp_path / "more" / "train.json", tmp_path / "held_out.json")
    (tmp_path / "with_bad.json").write_text(record * 39 + '{"src": "no answer"}\n', encoding="utf-8")
    json_blocks = code("docs/data.md", "json")
    chat = next(text for text in json_blocks if text.startswith('{"messages"'))
    (tmp_path / "chats.json").write_text(chat * 8, encoding="utf-8")
    (template,) = (text for text in json_blocks if text.startswith('{"conversation"'))
    (tmp_path / "pairs.json").write_text(template, encoding="utf-8")
    (mix,) = code("docs/data.md", "yaml")
    # The set in the page that names a format is one of Alpaca's.
    for name in ("train.json", "dev.json"):
        (tmp_path / "more" / name).write_text('{"instruction": "Say hello.", "output": "Hello!"}\n' * 8)
    rest = {**LORA, "output_dir": "mixed"}
    del rest["dataset_name_or_path"]
    (tmp_path / "mix.yaml").write_text(
        f"{mix}\n" + "".join(f"{key}: {json.dumps(value)}\n" for key, value in rest.items())
    )
    (tmp_path / "settings.json").write_text(json.dumps({**LORA, "output_dir": "kept"}))
    (tmp_path / "lora.json").write_text(json.dumps({**LORA, "output_dir": "with-mine"}))
    (tmp_path / "asked.jsonl").write_text(record * 2, encoding="utf-8")
    (tmp_path / "my_plugin.py").write_text(PLUGIN)
    published = json.loads((ROOT / "core" / "tests" / "fixtures" / "published.json").read_text(encoding="utf-8"))
    (tmp_path / "meta-llama" / "Meta-Llama-3-70B").mkdir(parents=True)
    config = published["meta-llama/Meta-Llama-3-8B"]["config"]
    (tmp_path / "meta-llama" / "Meta-Llama-3-70B" / "config.json").write_text(json.dumps(config))
    return tmp_path


def code(page: str, *languages: str) -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return [block for section in sections(text) for language, block in section.code if language in languages]


def lines_of(page: str) -> list[str]:
    """The command lines of a page, each whole; tests/test_new_plugin.py types those about a new plugin."""
    text = "\n".join(code(page, "bash", "")).replace("\\\n", " ")
    return [line for line in text.splitlines() if re.match(r"sft (?!plugins)\w", line)]


def typed(line: str) -> str:
    words = shlex.split(line.replace("…", REST).replace("/tmp/", "").replace("--step 120", "--step 2"), comments=True)[
        1:
    ]
    if words[0] == "run":
        words += ["--max_steps", "2"]
    result = CliRunner().invoke(cli, words, input="type#bag\n", standalone_mode=False, catch_exceptions=False)
    assert result.exit_code == 0, f"{line}\n{result.output}"
    return result.output


@pytest.mark.slow
@needs("lora", "parallel-4d", "why")
@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_shows_is_typed(page: str, folder: Path) -> None:
    shown = lines_of(page)
    assert shown
    said = [typed(line) for line in [*PAGES[page], *shown]]
    assert all(said)
    for line in shown:
        if "--output_path" in line:
            written = folder / line.partition("--output_path ")[2].split()[0]
            assert (written / "model.safetensors").is_file(), line
    if page == "docs/data.md":
        assert len((folder / "rest" / "bad_records.jsonl").read_text(encoding="utf-8").splitlines()) == 1
        report = json.loads((folder / "mixed" / "run.json").read_text(encoding="utf-8"))
        assert sorted(report["data"]["train"]["sets"]) == ["chats", "more"]
    if page == "docs/kit.md":
        assert "my option is 3" in said[0]
    if page == "docs/replay.md":
        names: dict[str, Any] = {}
        (program,) = code(page, "python")
        exec(program, names)
        assert names["loss"].tolist() == [line["loss"] for line in read_metrics(folder / "out") if "loss" in line]
    if page == "docs/report.md":
        (last,) = code(page, "")
        assert said[0].endswith(last)
        (program,) = code(page, "python")
        printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
        assert printed.startswith("finished 2 2\n")
        assert len(printed.splitlines()) > 3
    if page == "docs/plan.md":
        assert "legal plans" in said[0]
