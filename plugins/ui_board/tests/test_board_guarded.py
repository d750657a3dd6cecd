"""Who does not have the token learns nothing and moves nothing, and what runs hold is text that leads nowhere."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sft.folder_lock import FolderLock
from sft_ui_board import guard
from sft_ui_board.guard import HEADERS, Guard
from sft_ui_board.server import ASSETS
from sft_ui_board.watch import log_of

RunFolder = Callable[..., Path]

ASKED = [("/api/runs", "GET"), ("/api/run?run=out", "GET"), ("/api/ask?run=out&what=stop", "POST"), ("/api/x", "GET")]
FILES = ["/", "/board.js", "/board.css", "/charts.js", "/charts.css"]


def silent(text: str) -> None:
    raise AssertionError(text)


def test_whoever_lacks_the_token_gets_nothing_and_moves_nothing(board: Any, run_folder: RunFolder) -> None:
    folder = run_folder()
    lock = FolderLock(folder, silent)
    wrong = ("b" * 64, "a" * 63, "", "\xe9")
    for given in (None, "", "Bearer", f"Basic {'a' * 64}", *(f"Bearer {token}" for token in wrong)):
        for path, method in ASKED:
            answer = board.ask(path, method, Authorization=given)
            assert (answer.status, list(answer.json)) == (401, ["error"]), (path, given)
    assert not (folder / "STOP").exists()
    assert [board.ask(path, method).status for path, method in ASKED] == [200, 200, 200, 404]
    assert (folder / "STOP").exists()
    lock.release()


def test_tokens_are_compared_in_constant_time(board: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []

    def compare(given: bytes, right: bytes) -> bool:
        compared.append((given, right))
        return False

    monkeypatch.setattr(guard.hmac, "compare_digest", compare)
    assert board.ask("/api/runs").status == 401
    assert compared == [(b"a" * 64, b"a" * 64)]


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8377", "127.0.0.1.evil.example", "localhost.evil", "", "::", "10.0.0.1"]
)
def test_under_another_name_it_does_not_answer(board: Any, host: str) -> None:
    """A name that has been made to lead here (DNS rebinding), whatever else the request has."""
    for path, method in [*ASKED, *((path, "GET") for path in FILES)]:
        answer = board.ask(path, method, Host=host)
        assert (answer.status, answer.text) == (421, '{"error":"The board answers under its own address alone."}')


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost:9000", "LOCALHOST", "[::1]:8377", "[::1]"])
def test_under_its_own_names_it_does(board: Any, host: str) -> None:
    assert board.ask("/api/runs", Host=host).status == 200


def test_where_the_network_reaches_it_an_address_in_digits_is_its_own() -> None:
    async def app(*arguments: Any) -> None: ...

    open_to_all = Guard(app, "t", "0.0.0.0", loopback=False)
    assert all(map(open_to_all.knows, ("192.168.1.7:8377", "[fe80::1]:8377", "localhost", "0.0.0.0:1")))
    assert not any(map(open_to_all.knows, ("evil.example", "192.168.1.7.evil.example", "")))
    named = Guard(app, "t", "Box.lan", loopback=False)
    assert named.knows("box.lan:8377")
    assert not named.knows("box.lan.evil.example:8377")


def test_orders_come_by_post_alone_and_other_pages_may_not_read(board: Any, run_folder: RunFolder) -> None:
    folder = run_folder()
    lock = FolderLock(folder, silent)
    for method in ("GET", "PUT", "DELETE", "OPTIONS"):
        answer = board.ask("/api/ask?run=out&what=stop", method, Origin="http://evil.example")
        assert answer.status == 405
        assert not [name for name in answer.headers if name.startswith("access-control")]
    assert not (folder / "STOP").exists()
    for path in ("/api/runs", "/"):
        answer = board.ask(path, Origin="http://evil.example")
        assert not [name for name in answer.headers if name.startswith("access-control")]
    lock.release()


def test_every_answer_has_the_policy(board: Any, run_folder: RunFolder) -> None:
    run_folder()
    for path in (*FILES, "/api/runs", "/api/run?run=out", "/api/run?run=none", "/none"):
        for given in ({}, {"Host": "evil.example"}, {"Authorization": None}):
            headers = board.ask(path, **given).headers
            assert {name: headers[name] for name in HEADERS} == HEADERS, path
    policy = HEADERS["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "*" not in policy


def test_no_path_leaves_the_folder(board: Any, run_folder: RunFolder, tmp_path_factory: Any, tmp_path: Path) -> None:
    outside = tmp_path_factory.mktemp("outside")
    run_folder("inside")
    secret = run_folder(str(outside / "secret"))  # an absolute path is joined as it is
    (tmp_path / "linked").symlink_to(secret)
    assert [line["id"] for line in board.ask("/api/runs").json["runs"]] == ["inside"]
    for name in ("../outside", str(secret), "linked", "inside/..", "inside/../inside", "", ".", "inside%00", "%2e%2e"):
        answer = board.ask(f"/api/run?run={name}")
        assert (answer.status, list(answer.json)) == (404, ["error"]), name
    assert [board.ask(f"/{path}").status for path in ("../run.json", "inside/run.json", "%2e%2e/run.json")] == [404] * 3


@pytest.mark.parametrize("name", ["sft.log", "metrics.jsonl", "samples-0.jsonl", "run.lock", "STOP"])
def test_a_run_with_links_that_lead_out_is_not_read(
    board: Any, run_folder: RunFolder, tmp_path_factory: Any, name: str
) -> None:
    place = tmp_path_factory.mktemp("outside") / "private"
    place.write_text("private words")
    folder = run_folder()
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(place)
    answer = board.ask("/api/run?run=out")
    assert "private words" not in answer.text
    assert f"{name} in it leads out of RUNS_DIR" in answer.json["fault"]
    assert "report" not in answer.json
    board.ask("/api/ask?run=out&what=stop", "POST")
    assert place.read_text() == "private words"


def test_a_pipe_holds_nothing_up(board: Any, run_folder: RunFolder, tmp_path: Path) -> None:
    folder = run_folder()
    assert board.ask("/api/run?run=out").json["fault"] is None
    for name in ("sft.log", "run.lock"):
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)
    answer = board.ask("/api/run?run=out").json
    assert (answer["status"], "report" in answer) == ("unreadable", False)
    assert "is no plain file" in answer["fault"]


def test_a_log_that_has_become_something_else_meanwhile_is_not_opened(run_folder: RunFolder, tmp_path: Path) -> None:
    folder = run_folder()
    place = folder / "sft.log"
    place.rename(tmp_path / "private")
    place.symlink_to(tmp_path / "private")
    assert log_of(folder) == []
    place.unlink()
    os.mkfifo(place)
    assert log_of(folder) == []


def test_what_runs_hold_is_text(board: Any, run_folder: RunFolder) -> None:
    """It is sent as JSON, which no browser takes for a page, without codes that turn lines round and without secrets;
    and nothing in the page's script makes markup of text."""
    folder = run_folder(status="failed", error="<img src=x onerror=alert(1)> \u202e hf_abcdefghijklmnopqrstuvwx")
    (folder / "sft.log").write_text("<script>alert(1)</script> \x1b[2J\n", encoding="utf-8")
    answer = board.ask("/api/run?run=out")
    assert answer.headers["content-type"] == "application/json"
    assert answer.json["report"]["error"] == "<img src=x onerror=alert(1)> \\u202e ***"
    assert answer.json["log"] == ["<script>alert(1)</script> \\x1b[2J"]
    script = (ASSETS / "board.js").read_text(encoding="utf-8")
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|\beval\b|Function\(", script
    )
    page = (ASSETS / "board.html").read_text(encoding="utf-8")
    assert not re.search(r"<script>|<script [^>]*>[^<]|\son\w+=|style=|https?:", page)
