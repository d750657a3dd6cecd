"""Faults and hostile files that are held by tests beside the code: which ones, how many they are, and that they pass.

The whole form runs them and counts. The short form only looks whether each is there, for they run where they stand.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from reliability.figures import record

ROOT = Path(__file__).resolve().parents[2]
CORE, RANKS = "core/tests", "plugins/parallel_4d/tests"

HELD = {
    "faults": {
        "loss or gradients are not finite: named with their records, stopped or skipped": (
            f"{CORE}/test_not_finite.py",
            f"{CORE}/test_run_output.py::test_a_diverged_run_stops_with_a_sentence_and_valid_lines",
        ),
        "weights are not finite: not saved, not published, not rotated away": (
            f"{CORE}/test_result.py::test_weights_that_are_not_finite_are_not_saved",
            f"{CORE}/test_result.py::test_they_are_no_result",
            f"{CORE}/test_result.py::test_a_model_that_is_not_finite_is_named",
            f"{CORE}/test_adapter_folder.py::test_whoever_reads_a_tensor_looks_for_numbers_that_are_not_finite",
            f"{CORE}/test_resuming_refused.py::test_weights_that_no_training_writes_are_refused",
        ),
        "out of memory": (f"{CORE}/test_out_of_memory.py",),
        "a clock that jumps, in one process and in the lock": (
            f"{CORE}/test_run_output.py::test_a_clock_that_is_set_back_does_not_count",
            f"{CORE}/test_folder_lock.py::test_a_clock_that_jumps_takes_no_folder_from_its_owner",
        ),
        "a process that encodes data dies, or stands still": (
            f"{CORE}/test_processes.py::test_a_process_that_is_killed_is_named_and_the_others_end",
            f"{CORE}/test_processes.py::test_a_process_that_stands_still_is_not_waited_for_without_end",
        ),
        "a rank dies, stands still or never comes": (
            f"{RANKS}/test_watch.py::test_an_error_ends_the_others_with_it",
            f"{RANKS}/test_watch.py::test_an_error_in_the_rank_that_serves_reaches_the_others",
            f"{RANKS}/test_watch.py::test_a_rank_that_was_killed_comes_before_what_followed_from_it",
            f"{RANKS}/test_watch.py::test_the_serving_rank_is_killed",
            f"{RANKS}/test_watch.py::test_a_rank_that_works_for_ever_is_named",
            f"{RANKS}/test_watch.py::test_a_rank_that_stands_still_is_named",
            f"{RANKS}/test_watch.py::test_ranks_that_wait_for_each_other",
            f"{RANKS}/test_watch.py::test_a_rank_that_ended_early_is_named",
            f"{RANKS}/test_watch.py::test_a_rank_that_never_comes_is_named",
            f"{RANKS}/test_launch.py::test_a_rank_is_killed",
            f"{RANKS}/test_launch.py::test_a_rank_stands_still",
            f"{RANKS}/test_elastic.py::test_one_goes_on_where_there_were_two",
        ),
        "the process that started the ranks dies": (
            f"{RANKS}/test_launch.py::test_ranks_end_with_the_process_that_started_them",
            f"{RANKS}/test_launch.py::test_what_a_killed_launch_left_goes_with_the_next_one",
        ),
        "a folder vanishes, or cannot be written to": (
            f"{CORE}/test_result.py::test_a_folder_that_vanishes_is_made_anew",
            f"{CORE}/test_result.py::test_where_it_cannot_be_made_anew_what_was_learned_is_elsewhere",
            f"{CORE}/test_result.py::test_where_no_place_takes_the_weights_that_is_said",
            f"{CORE}/test_result.py::test_a_disk_that_is_full_at_the_end_does_not_cost_the_weights",
            f"{CORE}/test_checkpoint.py::test_a_checkpoint_that_could_not_be_written_is_not_there",
            f"{CORE}/test_folder_lock.py::test_a_folder_that_has_gone_is_an_error",
            f"{CORE}/test_run_log.py::test_where_it_cannot_be_written_the_run_goes_on",
            f"{CORE}/test_run_refused.py::test_a_file_is_no_output",
        ),
        "a disk that refuses fsync, chmod or locks": (
            f"{CORE}/test_files.py::test_what_a_network_disk_refuses_is_lived_with",
            f"{CORE}/test_files.py::test_what_is_lost_is_an_error",
            f"{CORE}/test_folder_lock.py::test_a_disk_without_locks",
        ),
        "a lock that dies with its owner, on this machine and on another one": (f"{CORE}/test_folder_lock.py",),
        "a checkpoint cut off, or with a bit flipped, in each of its files": (f"{CORE}/test_manifest.py",),
        "conversations of 10,000 turns": (
            f"{CORE}/test_long_records.py::test_ten_thousand_turns_take_seconds",
            f"{CORE}/test_sandbox.py::test_conversations_of_10000_turns_are_within_the_limits",
        ),
    },
    "trust": {
        "chat templates without end or measure, or that leave their sandbox": (f"{CORE}/test_sandbox.py",),
        "links and paths that lead out of a model's folder": (f"{CORE}/test_model_places.py",),
        "pickles in weights and adapters": (f"{CORE}/test_pickles.py", f"{CORE}/test_pickled_weights.py"),
        "text that moves the terminal or forges a line, and secrets": (f"{CORE}/test_foreign_text.py",),
        "text that runs in the page of the data": (f"{CORE}/test_data_shown.py",),
        "the socket of parallel runs: no token, a wrong line, a long one": (
            f"{RANKS}/test_watch_board.py::test_the_board_leaves_strangers_alone",
            f"{RANKS}/test_watch_board.py::test_without_the_token_nobody_gets_in",
            f"{RANKS}/test_watch_board.py::test_one_who_has_taken_the_port_is_no_board",
            f"{RANKS}/test_watch_board.py::test_lines_that_no_rank_says",
            f"{RANKS}/test_watch_board.py::test_a_rank_is_connected_once_and_speaks_for_itself",
            f"{RANKS}/test_watch_board.py::test_strangers_keep_no_rank_out",
        ),
        "the pages of sft board": ("plugins/ui_board/tests/test_board_guarded.py",),
    },
}
"""For each row of the table the tests, as a file or as one test in it."""
ALL = [(section, case) for section, cases in HELD.items() for case in cases]


def test_each_is_there() -> None:
    for named in (one for section, case in ALL for one in HELD[section][case]):
        path, _, function = named.partition("::")
        assert re.search(rf"^ *def {function or 'test_'}", (ROOT / path).read_text(encoding="utf-8"), re.M), named


@pytest.mark.slow
@pytest.mark.whole
@pytest.mark.timeout(3600)
@pytest.mark.row("{section}", "{case}")
@pytest.mark.parametrize(("section", "case"), ALL)
def test_they_pass(tmp_path: Path, section: str, case: str) -> None:
    began, named = time.monotonic(), HELD[section][case]
    report = tmp_path / "report.xml"
    line = [sys.executable, "-m", "pytest", "-q", "-m", "not gpu and not browser", f"--junitxml={report}", *named]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    cases = list(ElementTree.parse(report).iter("testcase"))
    failed = [one for one in cases if one.find("failure") is not None or one.find("error") is not None]
    skipped = [one for one in cases if one.find("skipped") is not None]
    ran = len(cases) - len(skipped)
    assert ran, f"none ran: {done.stdout[-3000:]}"
    record(section, case, tests=ran, failed=len(failed), skipped=len(skipped), seconds=time.monotonic() - began)
    assert done.returncode == 0, done.stdout[-3000:]
    assert not skipped, done.stdout[-3000:]
    for one in named:  # pytest itself refuses a name that it does not find
        path, _, function = one.partition("::")
        module = path.removesuffix(".py").replace("/", ".")
        counted = [each for each in cases if (each.get("classname") or "").startswith(module)]
        assert any(function in (each.get("name") or "") for each in counted), f"{one} did not run"
