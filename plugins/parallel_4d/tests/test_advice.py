"""What a run that is out of memory is told: settings with which `sft plan` says that it fits."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner

import sft
from sft.testing import needs
from sft_parallel_4d.advice import advice, need


def planned(values: dict[str, Any], typed: str = "") -> int:
    """The peak that `sft plan` gives for one device, with options ``typed`` behind the settings."""
    from sft_parallel_4d.command import command

    line = ["--devices", "1", "--device_memory", "80GiB", "--json"]
    for name, value in values.items():
        line += [f"--{name}", str(value)]
    recompute = [] if "recompute" in typed else ["--recompute", "false"]
    done = CliRunner().invoke(command, [*line, *recompute, *typed.split()], catch_exceptions=False)
    (plan,) = (json.loads(line) for line in done.stdout.splitlines())
    return int(plan["memory"]["peak"])


def test_shells_complete_settings_behind_sft_plan() -> None:
    """As behind `sft run`: by name, those of an asked plugin too, what each can be, and the settings file."""
    from sft_parallel_4d.command import command

    def offered(*words: str) -> list[str]:
        *typed, incomplete = words
        found = ShellComplete(command, {}, "plan", "_PLAN_COMPLETE").get_completions(typed, incomplete)
        return ["FILE" if item.type == "file" else str(item.value) for item in found]

    assert offered("--device") == [
        "--devices",
        "--device_memory",
        "--device-memory",
        "--devices_per_node",
        "--devices-per-node",
        "--device_tflops",
        "--device-tflops",
        "--device_latency",
        "--device-latency",
        "--device",
    ]
    assert offered("--devices", "8", "--per_device_tr") == ["--per_device_train_batch_size"]
    assert offered("--plugin", "parallel-4d", "--tensor_par") == ["--tensor_parallel_degree"]
    assert offered("--bf16", "t") == ["true"]
    assert offered("sett") == ["FILE"]


@pytest.fixture
def values(base_model: Path) -> dict[str, Any]:
    return {"model_name_or_path": str(base_model), "per_device_train_batch_size": 12, "max_length": 64}


@pytest.mark.parametrize("share", [0.97, 0.6, 0.3, 0.01])
def test_what_is_named_fits(values: dict[str, Any], share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a device that has a share of what the run needs; where nothing fits, the least is named."""
    monkeypatch.setattr("sft_parallel_4d.advice._gib", lambda size: f"{size:.0f} B")
    need = planned(values)
    memory = int(share * need)
    text = advice(values, "cpu", memory)
    assert text is not None
    start = rf"by the formulas of sft plan it needs {need} B of the {memory} B here"
    fits = re.fullmatch(start + r"; with (--.*) it needs (\d+) B, and learns the same", text)
    least = re.fullmatch(
        start + r", and (\d+) B even with (--.*): take a smaller model, an adapter, or more devices", text
    )
    if fits is not None:
        typed, size = fits[1], int(fits[2])
        assert size <= 0.9 * memory
        assert "recompute" not in typed or planned(values, typed.replace("--recompute true", "").strip()) > 0.9 * memory
    else:
        assert least is not None
        typed, size = least[2], int(least[1])
        assert size > 0.9 * memory
    assert planned(values, typed) == size
    rows = re.search(r"batch_size (\d+) --gradient_accumulation_steps (\d+)", typed)
    assert rows is None or int(rows[1]) * int(rows[2]) == 12
    assert (fits is None) == (share == 0.01)


def test_where_the_formulas_say_that_it_fits(values: dict[str, Any]) -> None:
    text = advice(values, "cpu", 1 << 40)
    assert text is not None
    assert " GiB here, so look what else has memory; with --per_device_train_batch_size 6 " in text


@needs("lora")
def test_a_run_that_is_out_of_memory_says_it(train: Callable[..., sft.Summary]) -> None:
    """The plugin is not active in it."""

    class Full(sft.Plugin):
        name = "full"
        api_version = 1

        @sft.hookimpl
        def sft_run_started(self, run: sft.Run) -> None:
            assert "parallel-4d" not in run.plugins.names
            raise MemoryError

    message = (
        r"^Out of memory after step 0 \(no memory is left\): by the formulas of sft plan it needs \d+\.\d MiB of the"
    )
    with pytest.raises(sft.SftError, match=message):
        train(plugins=(Full,), plugin=["lora"])


@pytest.mark.parametrize("typed", ["", "--per_device_train_batch_size 3 --gradient_accumulation_steps 4"])
def test_what_a_run_says_that_it_needs_is_the_plan(values: dict[str, Any], typed: str) -> None:
    """On one process, of the plan for one device."""
    pairs = typed.split()
    given = {**values, **{name.removeprefix("--"): value for name, value in zip(pairs[::2], pairs[1::2], strict=True)}}
    assert need(given, "cpu", 2**30) == planned(given)


def test_nothing_is_said_of_a_model_that_is_not_known_on_paper(values: dict[str, Any], tmp_path: Path) -> None:
    """Where a plugin may change it, and does not say on paper how."""
    (tmp_path / "changes.py").write_text(
        "import sft\n\nclass Changes(sft.Plugin):\n    name, api_version = 'changes', 1\n\n"
        "    @sft.hookimpl\n    def sft_adapt_model(self, run, model):\n        pass\n"
    )
    assert need({**values, "plugin": [str(tmp_path / "changes.py")]}, "cpu", 2**30) is None
