"""Finished runs of several techniques: measured again, asked and talked with, as a user does."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import sft
from sft.commands.cli import cli
from sft.inference.evaluate import evaluate_finished
from sft.inference.open import load_for_inference

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "core" / "src" / "sft" / "demo" / "model"
DATA = ROOT / "core" / "src" / "sft" / "demo" / "data"
SETTINGS = {"max_length": 128, "per_device_eval_batch_size": 4, "eval_with_do_generation": True, "max_new_tokens": 12}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty train and six dev records of the demo."""
    folder = tmp_path_factory.mktemp("data")
    for name, number in (("train.json", 20), ("dev.json", 6)):
        lines = (DATA / name).read_text(encoding="utf-8").splitlines()[:number]
        (folder / name).write_text("\n".join(lines), encoding="utf-8")
    return folder


def quiet(text: str) -> None:
    pass


def run(data: Path, out: Path, *plugins: str, **settings: Any) -> dict[str, Any]:
    """Two steps; the record of the last evaluation."""
    values = {
        "plugin": list(plugins),
        "model_name_or_path": str(MODEL),
        "dataset_name_or_path": str(data),
        "output_dir": str(out),
        "max_steps": 2,
        "learning_rate": 3e-3,
        "disable_tqdm": True,
        **SETTINGS,
    }
    sft.run({**values, **settings}, say=quiet)
    return [line for line in map(json.loads, (out / "metrics.jsonl").open()) if "eval_loss" in line][-1]


def again(data: Path, adapter: Path, *plugins: str) -> dict[str, Any]:
    values = {"model_name_or_path": str(MODEL), "dataset_name_or_path": str(data)}
    return evaluate_finished({**values, **SETTINGS}, adapter, quiet, plugins)


def scores(record: dict[str, Any]) -> dict[str, float]:
    return {key: value for key, value in record.items() if key.startswith("eval_") and key != "eval_seconds"}


@pytest.mark.parametrize(
    "plugins",
    [("lora",), *(pytest.param(names, marks=pytest.mark.slow) for names in (("vera", "nf4"), ("lora", "int8")))],
    ids="-".join,
)
def test_an_adapter_has_the_numbers_of_its_run(data: Path, tmp_path: Path, plugins: tuple[str, ...]) -> None:
    """The quantizer and its options are those of the run beside it."""
    record = scores(run(data, tmp_path / "out", *plugins))
    assert scores(again(data, tmp_path / "out")) == record
    if plugins[1:]:
        assert scores(again(data, tmp_path / "out", f"no:{plugins[1]}")) != record


def test_packing_is_for_the_loss_alone(data: Path, tmp_path: Path) -> None:
    """Packed rows and padded ones have the same loss up to rounding, and the same answers."""
    record = scores(run(data, tmp_path / "out", "lora", "zero-padding", "flashmask"))
    for plugins in ((), ("flashmask",)):
        found = scores(again(data, tmp_path / "out", *plugins))
        assert found["eval_loss"] == pytest.approx(record["eval_loss"], rel=1e-5)
        assert {k: v for k, v in found.items() if "rouge" in k or "bleu" in k} == {
            k: v for k, v in record.items() if "rouge" in k or "bleu" in k
        }


def test_answers_of_a_quantized_adapter_do_not_depend_on_the_batch(data: Path, tmp_path: Path) -> None:
    from sft.data.questions import encode_prompt
    from sft.models.generation import answers
    from sft.settings.arguments import GenerationArguments

    run(data, tmp_path / "out", "lora", "nf4", eval_with_do_generation=False)
    model, tokenizer = load_for_inference(str(MODEL), tmp_path / "out", quiet)
    records = [json.loads(line) for line in (data / "dev.json").open()]
    ids = [encode_prompt([sft.Turn("user", record["src"])], tokenizer) for record in records]
    generation = GenerationArguments(max_new_tokens=16)
    alone = [answers(model, tokenizer, [prompt], generation, 0)[0] for prompt in ids]
    assert answers(model, tokenizer, ids, generation, 0) == alone


IN_TERMINAL = """
import fcntl, signal, termios
signal.signal(signal.SIGINT, signal.default_int_handler)  # children of a background job are deaf to it
fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # so that Ctrl-C typed there becomes a signal here
from sft.commands.cli import main
main()
"""


class Terminal:
    """``sft ...`` in a terminal of its own."""

    def __init__(self, *arguments: str) -> None:
        self.own, theirs = pty.openpty()
        line = [sys.executable, "-c", IN_TERMINAL, *arguments]
        self.process = subprocess.Popen(line, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True)
        os.close(theirs)
        self.text = ""

    def until(self, *wanted: str, seconds: float = 60) -> str:
        """Wait until one of ``wanted`` has been shown since the last call; the first of them."""
        end = time.monotonic() + seconds
        pattern = re.compile("|".join(map(re.escape, wanted)))
        while not (found := pattern.search(self.text)) and time.monotonic() < end:
            self._read()
        assert found, self.text
        self.text = self.text[found.end() :]
        return found[0]

    def more(self, characters: int, seconds: float = 60) -> None:
        """Wait until that many characters have been shown since the last call."""
        end = time.monotonic() + seconds
        while len(self.text) < characters and time.monotonic() < end:
            self._read()
        assert len(self.text) >= characters

    def _read(self) -> None:
        if select.select([self.own], [], [], 0.1)[0]:
            try:
                self.text += os.read(self.own, 65536).decode(errors="replace")
            except OSError:
                pass

    def type(self, text: str) -> None:
        os.write(self.own, text.encode())


def test_a_chat_in_a_terminal() -> None:
    """Answers appear, Ctrl-C stops one and not the chat, Ctrl-D ends it.

    Each Ctrl-C is answered by one of two lines, and a prompt follows. An answer (at this temperature any characters)
    may hold "> ", so a prompt is waited for only behind such a line.
    """
    stopped, line = "(stopped)\r\n", "(/exit or Ctrl-D leaves)\r\n"
    terminal = Terminal("chat", "--model_name_or_path", str(MODEL), "--max_new_tokens", "400", "--top_k", "0",
                        "--temperature", "9")  # fmt: skip
    try:
        terminal.until("Ctrl-C stops.\r\n")
        terminal.until("> ")
        for _ in range(5):  # on a busy machine an answer may be complete before Ctrl-C arrives
            terminal.type("type#bag\n")
            terminal.until("type#bag\r\n")
            terminal.more(5)  # characters of the answer
            terminal.type("\x03")
            shown = terminal.until(stopped, line)
            terminal.until("> ")
            if shown == stopped:
                break
        assert shown == stopped
        for _ in range(20):  # at once after the last key, which may still be on its way to the screen
            terminal.type("half a line")
            terminal.until("half a line")
            terminal.type("\x03")
            terminal.until(line)
            terminal.until("> ")
        terminal.type("\x04")
        assert terminal.process.wait(timeout=30) == 0
    finally:
        terminal.process.kill()
        os.close(terminal.own)


def test_the_guide_shows_what_works(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command of docs/answers.md, typed in this process; a pipe is its standard input."""
    run(data, tmp_path / "out", "lora", eval_with_do_generation=False)
    (tmp_path / "prompts.txt").write_text("type#bag\ntype#coat\n")
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "answers.md").read_text(encoding="utf-8")
    commands = [line for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    shown = []
    for command in commands:
        piped, _, line = command.rpartition(" | ")
        words = shlex.split(line.replace("MODEL", str(MODEL)).replace("DATA", str(data)))
        assert words[0] == "sft"
        given = " ".join(shlex.split(piped)[1:]) or "type#bag"
        result = CliRunner().invoke(cli, words[1:], input=f"{given}\n", standalone_mode=False, catch_exceptions=False)
        shown.append(result.stdout.splitlines())
    assert set(json.loads(shown[0][0])) >= {"eval_loss", "eval_ppl", "eval_accuracy"}
    assert [len(lines) for lines in shown] == [1, 1, 6, 2, 1, 1]
    assert all(text for lines in shown for text in lines)
