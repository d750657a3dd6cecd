"""What README, docs and examples show is what works."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from chinese_pages import sections
from safetensors.numpy import load_file

import sft
from sft import hookspecs
from sft.inference.export import export
from sft.models.families.known import FAMILIES
from sft.options import options_of
from sft.plugins.registry import Plugins
from sft.settings.arguments import core_options
from sft.testing import token_loss

ROOT = Path(__file__).resolve().parent.parent


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)


def names_of(code: str) -> dict[str, Any]:
    """What a block of Python makes, as in a file of its own."""
    names: dict[str, Any] = {"__name__": "page"}
    exec(compile(code, "page", "exec", dont_inherit=True), names)
    return names


def example(output: Path, **changes: Any) -> dict[str, Any]:
    """The settings of examples/lora.json, from whatever folder, without measuring."""
    values = json.loads((ROOT / "examples" / "lora.json").read_text(encoding="utf-8"))
    values.update({name: str(ROOT / values[name]) for name in ("model_name_or_path", "dataset_name_or_path")})
    return {**values, "output_dir": str(output), "do_eval": False, "num_samples": 0, **changes}


def test_readme_python_runs_as_shown(tmp_path: Path) -> None:
    (code,) = blocks("README.md", "python")
    assert '"output_dir": "out"' in code
    code = code.replace('"output_dir": "out"', f'"output_dir": {str(tmp_path / "out")!r}')
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    before, after = map(float, done.stdout.split()[-2:])
    assert after < before
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("page", ["README.md", "README_zh.md", "docs/tutorial.md", "docs/data.md"])
def test_commands_in_documents_name_real_settings(page: str) -> None:
    known = {*core_options(), *options_of(next(iter(Plugins.load(["lora"], hookspecs)))[1].Options), "plugin", "help"}
    known |= {"lora_path", "output_path", "prompt", "show", "find", "html", "json"}  # of merge, generate, data, …
    commands = " ".join(blocks(page, "bash"))
    assert "sft run" in commands
    for name in re.findall(r"--([a-z_]+)", commands):
        assert name in known, f"{page} shows --{name}"


def test_the_clock_of_the_page_ends_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = names_of(blocks("docs/control.md", "python")[0])["Clock"]
    monkeypatch.setattr(clock, "seconds", 0.0)
    monkeypatch.setattr(clock, "between", 0.0)
    summary = sft.run(example(tmp_path / "out", max_steps=3), plugins=[clock], say=lambda _: None)
    assert summary.stopped_early == {"step": 1, "reason": "0 seconds are over"}
    assert (tmp_path / "out" / "checkpoint-1").is_dir()


def test_the_padding_of_the_page_is_measured_and_figures_of_steps_are_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    padding = names_of(blocks("docs/control.md", "python")[1])["Padding"]
    sft.run(example(tmp_path / "out", max_steps=2, logging_steps=1), plugins=[padding], say=lambda _: None)
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    shares = [line["padding_tokens"] / (line["padding_tokens"] + line["tokens"]) for line in lines]
    assert [line["padding/share"] for line in lines] == pytest.approx(shares)
    assert capsys.readouterr().out.splitlines() == [f"{line['step']} {line['padding/share']}" for line in lines]
    monkeypatch.chdir(tmp_path)
    figures = names_of(blocks("docs/replay.md", "python")[0])
    for name in ("loss", "grad_norm"):
        assert figures[name].tolist() == [line[name] for line in lines]


def test_the_archive_of_the_page_holds_the_model(tmp_path: Path) -> None:
    (code,) = blocks("docs/export.md", "python")
    (tmp_path / "npz.py").write_text(code, encoding="utf-8")
    model, npz = ROOT / "core" / "tests" / "fixtures" / "models" / "llama-untied", str(tmp_path / "npz.py")
    shutil.copytree(model, tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model.parent / "llama-tied-gqa" / name, tmp_path / "model" / name)
    export(str(tmp_path / "model"), None, "npz", tmp_path / "out", lambda text: None, [npz])
    stored, written = load_file(model / "model.safetensors"), np.load(tmp_path / "out" / "model.npz")
    assert sorted(written) == sorted(stored)
    for name in stored:
        np.testing.assert_array_equal(written[name], stored[name])


def test_chinese_readme_shows_the_same_code() -> None:
    for language in ("bash", "python"):
        ours, theirs = (
            [re.sub(r"#.*", "", block) for block in blocks(page, language)] for page in ("README.md", "README_zh.md")
        )
        assert ours == theirs


def test_the_table_of_models_has_every_family() -> None:
    text = (ROOT / "docs/models.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)) == sorted(["model_type", *FAMILIES])


@cache
def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    headings = (section.heading.lower() for section in sections(page.read_text(encoding="utf-8")))
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("folder", [".", "docs", "docs/zh", "docs/decisions", "plugins/*", "examples/*"])
def test_links_lead_somewhere(folder: str) -> None:
    lost = []
    for page in sorted(ROOT.glob(f"{folder}/*.md")):
        text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
        for target, anchor in re.findall(r"\]\((?!http|mailto)([^)#]*)#?([^)]*)\)", text):
            path = page.parent / target if target else page
            if not path.exists() or (anchor and anchor not in anchors(path)):
                lost.append(f"{page.relative_to(ROOT)} links to {target}#{anchor}")
    assert lost == []


def test_each_complaint_names_a_test_that_is_there() -> None:
    rows = re.findall(
        r"^\|.*\| `([^`|]+)::(\w+)` \|$", (ROOT / "docs" / "why.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert len(rows) >= 17
    for path, test in rows:
        assert f"\ndef {test}(" in (ROOT / path).read_text(encoding="utf-8"), f"{path} has no {test}"


def test_pages_name_files_that_are_there() -> None:
    """A file is named by its path from some folder on; PaddleNLP's are not ours."""
    paths = [str(path.relative_to(ROOT)) for path in ROOT.glob("**/*.py") if ".venv" not in path.parts]
    pages = [
        *ROOT.glob("*.md"),
        *(page for folder in ("docs", "examples", "plugins") for page in ROOT.glob(f"{folder}/**/*.md")),
    ]
    gone = [
        (str(page.relative_to(ROOT)), name)
        for page in pages
        for name in re.findall(r"`([\w./]+\.py)`", page.read_text(encoding="utf-8"))
        if name != "run_finetune.py" and not any(f"/{path}".endswith(f"/{name}") for path in paths)
    ]
    assert gone == []


def test_reference_pages_are_current() -> None:
    done = subprocess.run([sys.executable, "docs/generate.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_pictures_are_current() -> None:
    done = subprocess.run([sys.executable, "docs/screenshots.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", ["lora.json", "full.yaml"])
def test_examples_run_as_they_stand(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    text = (ROOT / "examples" / name).read_text(encoding="utf-8")
    values: dict[str, Any] = json.loads(text) if name.endswith(".json") else yaml.safe_load(text)
    summary = sft.run({**values, "output_dir": str(tmp_path / "out"), "max_steps": 3}, say=lambda _: None)
    assert summary.steps == 3
    assert summary.eval_loss_after is not None
    assert summary.eval_loss_before is not None
    assert summary.eval_loss_after < summary.eval_loss_before


def test_plugin_of_the_guide_is_the_example_and_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = ROOT / "examples" / "third_party_plugin" / "src"
    assert blocks("docs/plugins.md", "python")[0] in (folder / "sft_last_blocks.py").read_text(encoding="utf-8")
    monkeypatch.syspath_prepend(str(folder))
    from sft_last_blocks import LastBlocks

    demo = ROOT / "core" / "src" / "sft" / "demo"
    said: list[str] = []
    summary = sft.run(
        {
            "model_name_or_path": str(demo / "model"),
            "dataset_name_or_path": str(demo / "data"),
            "output_dir": str(tmp_path / "out"),
            "max_steps": 2,
            "max_length": 128,
            "blocks": 2,
            "do_eval": False,
        },
        plugins=[LastBlocks],
        say=said.append,
    )
    config = json.loads((demo / "model" / "config.json").read_text(encoding="utf-8"))
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    assert summary.trainable_parameters == 2 * (2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * inner)


def test_the_strategy_of_the_guide_is_the_example() -> None:
    """Which tests/test_third_parties.py runs."""
    (shown,) = blocks("docs/strategies.md", "python")
    source = ROOT / "examples" / "data_parallel_plugin" / "src" / "sft_data_parallel" / "strategy.py"
    assert source.read_text(encoding="utf-8").endswith(f'"""\n\n{shown}')


def test_the_data_guide_shows_each_format(tmp_path: Path) -> None:
    from sft.data.formats import FORMATS, TEXT, Formats
    from sft.data.sources import read

    plugins = Plugins.load([], hookspecs)
    plugins.start({})
    text = (ROOT / "docs/data.md").read_text(encoding="utf-8")
    shown = re.findall(r"### ([^\n]+)\n\n```(json|csv)\n(.*?)```", text, re.DOTALL)
    assert [name for name, _, _ in shown] == list(FORMATS)
    for name, kind, content in shown:
        path = tmp_path / f"train.{kind}"
        path.write_text(content, encoding="utf-8")
        formats = Formats(plugins)
        conversations = [formats.turns(record) for record in read([path])]
        assert formats.name == name
        learned = "A document, of which every token is learned." if name == TEXT else "42."
        assert [turn.content for turn in conversations[0] if turn.trains] == [learned]


def test_the_data_guide_shows_what_is_learned(tmp_path: Path) -> None:
    from sft.data.encoding import encode
    from sft.data.formats import src_tgt
    from sft.data.tokenizer import Tokenizer

    (template,) = (block for block in blocks("docs/data.md", "json") if "conversation" in json.loads(block))
    (tmp_path / "pairs.json").write_text(template, encoding="utf-8")
    tokenizer = Tokenizer(ROOT / "core/src/sft/demo/model", chat_template=str(tmp_path / "pairs.json"))
    text = (ROOT / "docs/data.md").read_text(encoding="utf-8")
    (record,) = re.findall(r"`(\{\"src\": \[.*?\})`", text)
    encoded = encode([src_tgt(json.loads(record))], tokenizer, 100, 100)
    marked, inside = "", False
    for token, trained in zip(encoded.ids, [*encoded.trained[1:], False], strict=True):
        marked += tokenizer.decode([token])
        if trained != inside:
            marked, inside = marked + ("»" if trained else "«"), trained
    assert [marked + "\n"] == blocks("docs/data.md", "text")


def test_the_optimizer_of_its_page_steps_as_it_says() -> None:
    """v ← 0.9 v + g; w ← w - rate · (v + decay · w), by hand in float64."""
    import paddle

    (code,) = blocks("docs/optimizers.md", "python")
    parameter = paddle.create_parameter([3], "float32")
    parameter.set_value(np.array([1, 2, 3], np.float32))
    group = sft.ParameterGroup("all", {"w": parameter}, 1.0, 0.5)
    optimizer = names_of(code)["Momentum"]().sft_optimizer(None, [group])
    value, velocity = np.array([1.0, 2.0, 3.0]), np.zeros(3)
    for gradient in ([1.0, -1.0, 0.5], [0.25, 2.0, -1.0]):
        parameter.grad_ = paddle.to_tensor(np.array(gradient, np.float32))
        optimizer.step(0.1)
        velocity = 0.9 * velocity + gradient
        value = value - 0.1 * (velocity + 0.5 * value)
    np.testing.assert_allclose(parameter.numpy(), value, atol=1e-6, rtol=0)
    assert set(optimizer.state()) == {"w.velocity"}


def test_the_loss_of_the_guide_leaves_out_what_is_known() -> None:
    """Of three tokens the one of probability 0.99 teaches nothing."""
    [block] = [block for block in blocks("docs/objectives.md", "python") if "sft_token_loss" in block]
    made = names_of(block)
    logits = np.log(np.array([[0.99, 0.005, 0.005], [0.5, 0.25, 0.25], [0.1, 0.1, 0.8]], np.float32))
    plugin = made["SkipKnown"](made["KnownOptions"]())
    value, gradient = token_loss(plugin.sft_token_loss(None), logits, np.array([0, 1, 2]))
    assert value == pytest.approx(-np.log(0.25) - np.log(0.8), rel=1e-5)
    assert not gradient[0].any()
    np.testing.assert_allclose(gradient[1], [0.5, -0.75, 0.25], atol=1e-6)
