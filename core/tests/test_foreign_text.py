"""What is not ours moves no cursor, forges no line, and secrets are written nowhere."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import sft
from sft import facts
from sft.commands import shared
from sft.commands.cli import cli
from sft.errors import LONGEST
from sft.foreign_text import harmless, is_secret, masked, without_secrets
from sft.options import convert, option, options_of
from sft.progress import Progress
from sft.voice import Printer, Voice

HOSTILE = "\x1b]0;title\x07\x1b[2J\x9b31m\r\x08\x7f\u202egnp\u202c\u2066x\u2069\u200e\ufeff\u2028\ud800"
OBEYED = [chr(code) for code in (*range(32), *range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A))]
TOKEN = "hf_" + "Ab1" * 12
SECRETS = {
    f"token {TOKEN} refused": "token *** refused",
    "https://user:pa55@host/x": "https://***@host/x",
    "https://oauth2:abcdef@host": "https://***@host",
    "s3://key@bucket": "s3://***@bucket",
    "https://host/x?a=1&token=abc&b=2": "https://host/x?a=1&token=***&b=2",
    "https://host/x?X-Amz-Signature=abc": "https://host/x?X-Amz-Signature=***",
    "Authorization: Bearer abcdefghijklmnop": "Authorization: Bearer ***",
    "sk-" + "a1B2" * 8: "***",
    "ghp_" + "a1B2" * 8: "***",
    "AKIA" + "A1B2" * 4: "***",
    "a b@c d, 1 = 2, https://host/a@b, half_life": "a b@c d, 1 = 2, https://host/a@b, half_life",
}


def test_nothing_is_left_that_a_terminal_obeys() -> None:
    for text in (harmless(HOSTILE), sft.shown(HOSTILE, 1000)):
        assert not set(text) & {*OBEYED} - {"\n", "\t"}
        assert text.encode()
    assert harmless("\x1b[2J\u202e") == "\\x1b[2J\\u202e"
    assert sft.shown("a\nb\tc\r") == "a\\nb\\tc\\x0d"
    plain = "你好\u3000，\xa0naïve 👩\u200d🚀 नमस्ते\nb\tc"
    assert harmless(plain) == plain


def test_long_text_is_cut() -> None:
    assert sft.shown("x" * 10**6) == "x" * 199 + "…"
    assert len(str(sft.UsageError("\x1b" * 10**6))) == LONGEST


def test_messages_cannot_be_forged() -> None:
    error = sft.UsageError(f"The key a\ndone: 1 step{HOSTILE} is unknown.")
    assert str(error).splitlines()[1].startswith("  done: 1 step")
    assert not set(str(error)) & {*OBEYED} - {"\n"}
    assert str(sft.SftError(str(error))) == str(error)


def test_what_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    Printer("stderr")(f"note: {HOSTILE} https://me:secret@host")
    said = capsys.readouterr().err
    assert not set(said) & {*OBEYED} - {"\n"}
    assert "me:secret" not in said


NAME = "a\ndone: all is lost\x1b[2J\r\tb"
SHOWN = r"a\ndone: all is lost\x1b[2J\x0d\tb"
"""The name of a folder, and how it is shown."""


@pytest.mark.parametrize("voiced", ["printer", "voice", "callable", "json"])
def test_a_line_of_a_run_is_one_line(voiced: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Whoever says it; and a text of several lines has as many as we have made."""
    said: list[str] = []
    voices = {
        "printer": Printer("stdout"),
        "voice": Voice(Printer("stdout"), "warning"),
        "callable": said.append,
        "json": Voice(Printer("stdout"), "info", as_json=True),
    }
    progress = Progress(voices[voiced])
    heard: list[str] = []
    progress.ears.append(heard.append)
    progress.say(f"note: written to {NAME}")
    progress.tell("note", {"text": NAME}, f"chat template: {NAME}", "warning")
    progress.tell("summary", {}, ["done:", f"  {NAME}", *facts.lines_of([("written to", [NAME])])], "warning")
    lines = [f"note: written to {SHOWN}", f"chat template: {SHOWN}", "done:", f"  {SHOWN}", f"  written to  {SHOWN}"]
    assert "\n".join(heard).split("\n") == lines
    printed = capsys.readouterr().out.splitlines() if voiced != "callable" else "\n".join(said).split("\n")
    if voiced == "json":
        assert [json.loads(line).get("text") for line in printed] == [lines[0], NAME, None]
    else:
        assert printed == lines


@pytest.mark.slow
def test_folders_with_a_name_of_several_lines(
    dataset: Path, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No line of a run, a report or a replay begins with what is in a name, and no name moves the cursor."""
    monkeypatch.setenv("COLUMNS", "1000")
    out, model, data = (tmp_path / f"{what} {NAME}" for what in ("out", "model", "data"))
    shutil.copytree(models / "llama-tied-gqa", model)
    shutil.copytree(dataset, data)
    (data / "own.jinja").write_text("{% generation %}{{ messages[-1].content }}{% endgeneration %}")
    sft.run(
        {
            **{"model_name_or_path": str(model), "dataset_name_or_path": str(data), "output_dir": str(out)},
            **{"chat_template": str(data / "own.jinja"), "max_steps": 2, "save_strategy": "steps", "save_steps": 1},
            **{"num_samples": 1, "disable_tqdm": True, "max_new_tokens": 3},
        }
    )
    for line in (
        ["report", str(out)],
        ["data", "--model_name_or_path", str(model), "--dataset_name_or_path", str(data)],
        ["replay", str(out), "--step", "1"],
    ):
        cli.main(line, standalone_mode=False)
    shown = "".join(capsys.readouterr())
    assert not [line for line in shown.split("\n") if line.startswith("done: all is lost")]
    assert not set(shown) & {*OBEYED} - {"\n", "\t"}
    assert shown.count(SHOWN) > 5
    said = (out / "sft.log").read_text(encoding="utf-8")
    assert not [line for line in said.split("\n") if "done: all is lost" in line and SHOWN not in line]


@pytest.mark.parametrize("terminal", [True, False])
def test_answers(terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A program gets an answer as it is, a terminal a harmless one."""
    monkeypatch.setattr("sys.stdout.isatty", lambda: terminal, raising=False)
    shared.put_out("a\x1b[2J\nb")
    assert capsys.readouterr().out == ("a\\x1b[2J\nb\n" if terminal else "a\x1b[2J\nb\n")


@pytest.mark.parametrize("text", SECRETS)
def test_secrets_by_their_form(text: str) -> None:
    assert masked(text) == masked(masked(text)) == SECRETS[text]
    assert str(sft.SftError(text)) == SECRETS[text]


def test_secrets_by_their_name() -> None:
    for name in (
        "hub_token",
        "token",
        "apiKey",
        "WANDB_API_KEY",
        "db_password",
        "client-secret",
        "hfToken",
        "auth_key",
        "Authorization",
        "session_cookie",
    ):
        assert is_secret(name), name
    for name in ("pad_token", "eos_token", "max_new_tokens", "tokenizer_name_or_path", "key", "save_tokens", "monkey"):
        assert not is_secret(name), name
    given = {
        "a": {"hub_token": "x", "urls": ("https://u:p@h", "b"), "pad_token": "<pad>"},
        "password": None,
        "token": 3,
    }
    assert without_secrets(given) == {
        "a": {"hub_token": "***", "urls": ["https://***@h", "b"], "pad_token": "<pad>"},
        "password": None,
        "token": 3,
    }


class Uploader(sft.Plugin):
    """A plugin as a third party may write it, with a secret among its options, nested too."""

    name = "uploader"
    api_version = 1

    @dataclasses.dataclass
    class Options:
        upload_token: str | None = sft.option(None, "for the place where results go")
        upload_urls: list[str] | None = sft.option(None, "where they go")

    @sft.hookimpl
    def sft_collator(self, run: sft.Run) -> None:
        """Makes it one of those whose options checkpoints hold, to be compared at a resume."""

    @sft.hookimpl
    def sft_run_started(self, run: sft.Run) -> None:
        run.say(f"uploading to {self.options.upload_urls}")

    @sft.hookimpl
    def sft_run_ended(self, run: sft.Run, summary: sft.Summary) -> None:
        raise ValueError(f"https://me:{SECRET}@host refuses {TOKEN}")


SECRET = "geheimnis"


def test_no_file_of_a_run_has_a_secret(train: Any, tmp_path: Path) -> None:
    settings = {"upload_token": SECRET, "upload_urls": [f"https://me:{SECRET}@host", "b"]}
    with pytest.raises(sft.PluginError, match=r"https://\*\*\*@host refuses \*\*\*"):
        train(plugins=(Uploader,), max_steps=1, save_strategy="steps", save_steps=1, do_eval=False, **settings)
    record = json.loads((tmp_path / "out" / "run.json").read_text(encoding="utf-8"))
    assert record["settings"]["upload_token"] == "***"
    assert record["settings"]["upload_urls"] == ["https://***@host", "b"]
    written = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert any(path.name == "state.json" for path in written)
    for path in written:
        assert SECRET.encode() not in path.read_bytes(), path
        assert TOKEN.encode() not in path.read_bytes(), path


def test_a_secret_with_a_wrong_value_is_not_shown() -> None:
    @dataclasses.dataclass
    class Options:
        hub_token: str | None = option(None, "a token", choices=("a",))
        depth: int = option(1, "a number")

    declared = options_of(Options)
    with pytest.raises(sft.UsageError, match=r"got \*\*\*\."):
        convert(declared["hub_token"], "geheim")
    with pytest.raises(sft.UsageError, match=r"got '\\x1bx'"):
        convert(declared["depth"], "\x1bx")
