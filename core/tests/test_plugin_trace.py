"""What the environment does with plugins: ``SFT_TRACE_PLUGINS`` shows their calls, ``SFT_DISABLE_PLUGINS`` leaves them
out."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from typing import Any

import pytest
from toy_plugins import Publisher, active, plugin, refusal, toy

import sft
from sft.plugins import trace
from sft.plugins.discovery import installed, left_out, strange_requests

Distribute = Callable[..., None]


def traced(*plugins: type) -> tuple[Any, list[str], trace.Trace]:
    lines: list[str] = []
    found = active(extra=plugins)
    watching = trace.Trace(lines.append)
    watching.watch(found.manager)
    return found, lines, watching


def plain(lines: list[str]) -> list[str]:
    return [re.sub(r" +", " ", re.sub(r"[\d.,]+ ms", "N ms", line)) for line in lines]


# --- SFT_TRACE_PLUGINS --------------------------------------------------------------------------------------


def test_each_call_in_order_with_who_answers() -> None:
    first = toy("first", sft_check=lambda self, run: None, sft_quantizer=lambda self, run: None)
    second = toy("second", sft_check=lambda self, run: None)
    found, lines, watching = traced(first, second)
    found.hook.sft_check(run=None)
    found.hook.sft_launch(run=None)
    found.hook.sft_quantizer(run=None)
    assert plain(lines) == [
        "sft_check first (N ms), second (N ms)",
        "sft_launch nobody",
        "sft_quantizer first (N ms)",
    ]
    watching.end()
    sums = sorted(plain(lines)[3:])
    assert sums[0] in (
        "in all: first N ms (sft_check 1 call, N ms; sft_quantizer 1 call, N ms)",
        "in all: first N ms (sft_quantizer 1 call, N ms; sft_check 1 call, N ms)",
    )
    assert sums[1:] == ["in all: second N ms (sft_check 1 call, N ms)"]


def test_answers_errors_and_calls_within_calls() -> None:
    def within(self: Any, run: Any, model: Any) -> None:
        for rank in range(3):
            found.hook.base_factor(rank=rank)

    def fails(self: Any, run: Any) -> None:
        raise sft.UsageError("no")

    refinement = toy("refinement", base_factor=lambda self, rank: 2.0 * rank)
    found, lines, watching = traced(
        Publisher, refinement, toy("outer", sft_adapt_model=within, sft_check=fails, sft_state=lambda self, run: {})
    )
    found.hook.sft_adapt_model(run=None, model=None)
    found.hook.sft_state(run=None)
    with pytest.raises(sft.UsageError):
        found.hook.sft_check(run=None)
    assert plain(lines) == [
        " base_factor refinement: 0.0 (N ms)",
        " base_factor 2 more calls (N ms)",
        "sft_adapt_model outer (N ms)",
        "sft_state outer: dict (N ms)",
        "sft_check outer: raises UsageError (N ms)",
    ]
    lines.clear()
    found.ask("refinement", "base_factor", rank=1)  # one plugin alone
    watching.end()
    assert plain(lines)[0] == "base_factor refinement: 2.0 (N ms)"


def test_the_time_is_that_of_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(100))
    monkeypatch.setattr("sft.plugins.trace.time.perf_counter", lambda: next(clock))
    found, lines, _ = traced(toy("slow", sft_check=lambda self, run: next(clock) and None))
    found.hook.sft_check(run=None)  # begins at 0; the plugin's part from 1 to 3
    assert lines == ["sft_check                slow (2,000.0 ms)"]


def test_a_wrapper_counts_nothing_twice() -> None:
    def around(self: Any, run: Any) -> Any:
        return (yield)

    wrapper = type(
        "Around",
        (sft.Plugin,),
        {"name": "around", "api_version": 1, "sft_check": sft.hookimpl(around, wrapper=True)},
    )
    found, lines, _ = traced(wrapper, toy("inner", sft_check=lambda self, run: None))
    found.hook.sft_check(run=None)
    assert plain(lines) == ["sft_check inner (N ms), around around it"]


def test_the_environment_asks_for_it(
    train: Callable[..., sft.Summary], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train("without", max_steps=1, do_eval=False)
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("SFT_TRACE_PLUGINS", "1")
    train("traced", (toy("seen", sft_step_ended=lambda self, run, record: None),), max_steps=1, do_eval=False)
    trace._of_process().end()
    lines = plain(capsys.readouterr().err.splitlines())
    assert [line for line in lines if "seen" in line] == [
        "trace: sft_step_ended seen (N ms)",
        "trace: in all: seen N ms (sft_step_ended 1 call, N ms)",
    ]
    order = [line.split()[1] for line in lines]
    assert order.index("sft_check") < order.index("sft_run_started") < order.index("sft_step_ended")


# --- SFT_DISABLE_PLUGINS ------------------------------------------------------------------------------------


def test_what_is_left_out_is_as_if_it_were_not_installed(
    distribute: Distribute, monkeypatch: pytest.MonkeyPatch, train: Callable[..., sft.Summary]
) -> None:
    distribute("sft-test-tool", plugin("tool"), {"tool": "Tool"}, {"device.cpu": "Tool"})
    assert left_out() is None
    monkeypatch.setenv("SFT_DISABLE_PLUGINS", "Tool, fast_cpu,nothing")
    assert "tool" not in installed()
    assert strange_requests() == {}
    assert refusal("tool") == (
        "Plugin tool is left out by SFT_DISABLE_PLUGINS; take it out of that variable of the environment."
    )
    said: list[str] = []
    train("out", max_steps=1, do_eval=False, say=said.append)
    (note,) = [line for line in said if "SFT_DISABLE" in line]
    out = r"leaves out (fast-cpu, )?tool, and names (fast-cpu, )?nothing, which is not installed"
    assert re.fullmatch(f"note: SFT_DISABLE_PLUGINS {out}", note)


def test_a_star_leaves_out_all(
    monkeypatch: pytest.MonkeyPatch, sft_command: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    monkeypatch.setenv("SFT_DISABLE_PLUGINS", "*")
    assert installed() == {}
    done = sft_command("plugins")
    assert (done.returncode, done.stdout[:52]) == (0, "No plugin is installed; SFT_DISABLE_PLUGINS leaves o")
    assert done.stderr.startswith("note: SFT_DISABLE_PLUGINS leaves out ")
