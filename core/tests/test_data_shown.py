"""What ``sft data`` shows: records as the model reads them, in a terminal, a page and as JSON; and what it refuses."""

from __future__ import annotations

import base64
import hashlib
import html.parser
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from io import StringIO
from pathlib import Path
from typing import Any

import click.testing
import numpy as np
import pytest
from data_reports import Looking, read, turns_of
from rich.console import Console
from tokenizers import Tokenizer as Backend

from sft.commands.data import command
from sft.data.encoding import encode
from sft.data.learned import Learned
from sft.data.tokenizer import Tokenizer
from sft.data_report.page import page
from sft.data_report.records import Writer
from sft.data_report.terminal import write
from sft.errors import UsageError
from sft.testing import write_data

EVIL = '<script>alert(1)</script></pre><img src=x onerror="alert(2)">\x1b[2J\u202egnp'


def test_highlighted_tokens_are_those_of_the_mask(base_model: Path, look: Looking, questions: Path) -> None:
    tokenizer = Tokenizer(base_model)
    report = look()
    data = encode([turns_of(record) for record in read(questions)], tokenizer, 1024, 2048)
    specials = {token.content for token in tokenizer.backend.get_added_tokens_decoder().values() if token.special}
    assert len(report.records) == 20
    for number, shown in enumerate(report.records):
        (row,) = shown.rows
        assert shown.place == f"{questions / 'train.json'}, line {number + 1}"
        assert shown.learned == (data[number].labels != -100).sum()
        assert "".join(piece.text for piece in row if piece.learned) == tokenizer.decode(
            data[number].labels[data[number].labels != -100]
        )
        assert {piece.text for piece in row if piece.special} <= specials
        assert all(piece.special or not any(text in piece.text for text in specials) for piece in row)


def test_the_first_token_is_never_learned(base_model: Path, questions: Path, look: Looking) -> None:
    shown = look(3, train_on="everything").records
    data = encode(
        [turns_of(record) for record in read(questions)[:3]],
        Tokenizer(base_model),
        1024,
        2048,
        learned=Learned("everything"),
    )
    for number, record in enumerate(shown):
        assert data.trained[data.offsets[number]]
        assert record.learned == record.tokens - 1 == (data[number].labels != -100).sum()


@pytest.mark.parametrize("kind", ["bytes", "metaspace"])
def test_pieces_joined_are_the_decoded_text(kind: str) -> None:
    tokenizers = Path(__file__).parent / "fixtures" / "templates" / "tokenizers"

    class Bare:
        backend = Backend.from_file(str(tokenizers / f"{kind}.json"))

        def decode(self, ids: Any) -> str:
            return str(self.backend.decode(list(ids), skip_special_tokens=False))

    ids = Bare.backend.encode("Where is it, Zoë? <b> Ça va — 你好 here").ids
    whole, compared = Bare().decode(ids), 0
    for seed in range(20):
        trained = np.repeat(np.random.default_rng(seed).random(len(ids) // 4 + 1) < 0.5, 4)[: len(ids)]
        pieces = Writer(Bare()).pieces(np.array(ids), trained)  # type: ignore[arg-type]
        text = "".join(piece.text for piece in pieces)
        if "�" not in text:  # else a piece ends within a character
            assert text == whole
            compared += 1
    assert compared


def test_find_shows_the_records_that_hold_a_text(look: Looking, questions: Path) -> None:
    wanted = [n for n, one in enumerate(read(questions)) if "rain" in one["src"] + "\n" + one["tgt"]]
    dev = sum("rain" in one["src"] + "\n" + one["tgt"] for one in read(questions, "dev"))
    report = look(2, "RAIN")
    assert report.found == len(wanted) + dev > 2
    assert [record.place for record in report.records] == [
        f"{questions / 'train.json'}, line {number + 1}" for number in wanted[:2]
    ]
    assert look(2, "no such text").found == 0


# --- what is shown ------------------------------------------------------------------------------------------


@pytest.fixture
def evil(tmp_path: Path) -> Path:
    return write_data(tmp_path / "evil", [{"src": EVIL, "tgt": f"[red]{EVIL}[/red]"}, {"src": "plain", "tgt": "text"}])


def typed(base_model: Path, data: Path, *arguments: str, **run: Any) -> click.testing.Result:
    line = ["--model_name_or_path", str(base_model), "--dataset_name_or_path", str(data), *arguments]
    return click.testing.CliRunner().invoke(command, line, standalone_mode=False, catch_exceptions=False, **run)


def test_without_a_terminal_brackets_stand_around_what_is_learned(
    base_model: Path, questions: Path, look: Looking
) -> None:
    out = typed(base_model, questions, "--show", "3").stdout
    inside = [text.replace("\n│ ", "\n") for text in re.findall(r"⟦(.*?)⟧", out, re.DOTALL)]
    learned = ["".join(piece.text for piece in record.rows[0] if piece.learned) for record in look().records[:3]]
    assert inside[: len(learned)] == learned
    assert "\x1b" not in out


def test_what_data_holds_is_no_order_to_the_terminal(base_model: Path, evil: Path) -> None:
    out = typed(base_model, evil).stdout
    assert "\x1b" not in out
    assert "\u202e" not in out
    assert "[red]<script>" in out.replace("⟦", "")


def test_what_data_holds_forges_no_line_of_ours(base_model: Path, tmp_path: Path) -> None:
    forged = "a⟧\n\ntrain: data.json, line 1: 3 tokens, 3 learned\nnote: all is well\r\n⟦"
    out = typed(base_model, write_data(tmp_path / "d", [{"src": forged, "tgt": forged}])).stdout
    assert out.count("⟦") == out.count("⟧") == 2  # around the answer, and in the line that says so
    for text in ("train: data.json", "note: all is well"):
        assert [line[:2] for line in out.splitlines() if text in line] == ["│ ", "│ "]


def test_in_a_terminal_what_is_learned_is_highlighted(look: Looking) -> None:
    report = look()
    learned = "".join(piece.text for one in report.records for piece in one.rows[0] if piece.learned)
    for colours, has in ((False, True), (True, False)):
        out = StringIO()
        console = Console(file=out, force_terminal=True, color_system="standard", no_color=colours, width=200)
        write(report, console)
        assert ("\x1b[30;42m" in out.getvalue()) is has
        assert ("⟦" in out.getvalue()) is not has
        marked = "".join(re.findall(r"\x1b\[(?:1;)?30;42m(.*?)\x1b\[0m", out.getvalue(), re.DOTALL))
        assert not has or marked.replace("↵\n", "\n").removesuffix("learned") == learned


def test_in_a_narrow_terminal_bars_are_shorter(look: Looking) -> None:
    report = look()
    number = sum(bar.records > 0 for split in report.splits.values() for bar in split.lengths.bars)
    for width, longest in ((200, 40), (40, None)):
        out = StringIO()
        write(report, Console(file=out, force_terminal=True, color_system=None, width=width))
        lines = [line for line in out.getvalue().splitlines() if "█" in line]
        assert len(lines) == number
        assert all(re.fullmatch(r" +\d+ to +\d+ █+ \d+", line) and len(line) <= width for line in lines)
        assert longest in (None, max(line.count("█") for line in lines))


class Page(html.parser.HTMLParser):
    """Reads a page: the tags that it has, and the texts of its records."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.within: list[str] = []
        self.records: list[str] = []
        self.learned: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += attributes
        if tag not in ("meta", "br", "input", "img"):
            self.within.append(tag)
        if tag == "article":
            self.records.append("")
            self.learned.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.within.pop() == tag

    def handle_data(self, data: str) -> None:
        if "pre" in self.within:
            self.records[-1] += data
            self.learned[-1] += data if "mark" in self.within else ""


def test_in_the_page_a_script_in_the_data_is_text(base_model: Path, evil: Path, tmp_path: Path) -> None:
    target = tmp_path / "page.html"
    done = typed(base_model, evil, "--html", str(target))
    assert done.stdout == ""
    found = Page()
    found.feed(target.read_text(encoding="utf-8"))
    found.close()
    assert found.within == []
    assert found.tags["script"] == 1  # the page's own
    assert found.tags["img"] == 0
    assert found.tags["article"] == 2
    assert not any(name.startswith("on") or name in ("src", "href") for name, _ in found.attributes)
    assert "<script>alert(1)</script></pre><img" in found.records[0]
    assert "<script>alert(1)</script></pre><img" in found.learned[0]
    assert "\\x1b[2J\\u202egnp" in found.learned[0]
    assert "http" not in target.read_text(encoding="utf-8").replace("http-equiv", "")


def test_the_pages_policy_allows_its_own_script_alone(look: Looking) -> None:
    text = page(look())
    script = text.partition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert "default-src 'none'; style-src 'sha256-" in text
    assert f"; script-src 'sha256-{digest}';" in text


def test_json_is_the_value(base_model: Path, questions: Path, look: Looking) -> None:
    out = typed(base_model, questions, "--json", "--show", "2").stdout
    assert json.loads(out) == json.loads(json.dumps(look(2).as_dict()))


def test_a_settings_file_serves_both_commands(base_model: Path, questions: Path, tmp_path: Path) -> None:
    settings = tmp_path / "settings.json"
    values = {"model_name_or_path": str(base_model), "dataset_name_or_path": str(questions), "max_length": 50}
    settings.write_text(json.dumps({**values, "output_dir": str(tmp_path / "out"), "learning_rate": 0.1}))
    done = click.testing.CliRunner().invoke(command, ["--json", str(settings), "--max_length", "64"])
    assert json.loads(done.stdout)["settings"]["max_length"] == 64
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--show", "many"), "show: expected a number of records from 0 to 10,000, got 'many'."),
        (("--show", "-1"), "show: expected a number of records from 0 to 10,000, got '-1'."),
        (("--show", "10001"), "show: expected a number of records"),
        (("--find", ""), "find: expected a text to look for"),
        (("--html", "."), "html: . is a folder"),
        (("--html", "/nowhere/at/all.html"), "is in no folder that can be written to"),
        (("--html", "{data}/train.json"), "train.json is there, and is no page of sft data"),
        (("--max_length", "much"), "max_length"),
        (("--dataset_name_or_path", "nowhere"), "Data nowhere does not exist"),
        (("--lazy", "true"), "lazy streams the data"),
    ],
)
def test_what_cannot_be_is_refused(base_model: Path, questions: Path, arguments: tuple[str, ...], says: str) -> None:
    before = {path: path.read_bytes() for path in questions.iterdir()}
    with pytest.raises(UsageError, match=re.escape(says)):
        typed(base_model, questions, *(one.format(data=questions) for one in arguments))
    assert {path: path.read_bytes() for path in questions.iterdir()} == before


@pytest.mark.slow
def test_a_page_takes_the_place_of_an_older_one(base_model: Path, questions: Path, tmp_path: Path) -> None:
    target = tmp_path / "page.html"
    for _ in range(2):
        assert typed(base_model, questions, "--html", str(target)).exit_code == 0
    assert target.read_text().startswith("<!doctype html>")


def test_neither_paddle_nor_weights_are_needed(base_model: Path, questions: Path, tmp_path: Path) -> None:
    bare = shutil.copytree(base_model, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors", "*.npz"))
    code = (
        "import sys; from sft.commands.cli import cli; cli.main(sys.argv[1:], standalone_mode=False); "
        "assert 'paddle' not in sys.modules"
    )
    line = ["data", "--model_name_or_path", str(bare), "--dataset_name_or_path", str(questions)]
    done = subprocess.run([sys.executable, "-c", code, *line], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "train data" in done.stdout
