"""What run.json says about a GPU; a stand-in for one, since tests hide those that there are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sft import gpu_facts, runtime
from sft.run_report.words import value


def test_of_a_cpu_there_are_none(paddle: Any) -> None:
    assert gpu_facts.gpu_facts() == {}
    assert "gpu" not in runtime.machine()


def test_a_gpu_is_named_with_its_driver_and_libraries(
    paddle: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cuda = paddle.device.cuda
    monkeypatch.setattr(paddle.device, "get_device", lambda: "gpu:1")
    monkeypatch.setattr(cuda, "get_device_name", lambda: "NVIDIA H100")
    monkeypatch.setattr(cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(cuda, "device_count", lambda: 4)
    monkeypatch.setattr(
        paddle, "get_flags", lambda names: dict.fromkeys([names] if isinstance(names, str) else names, 3)
    )
    monkeypatch.setattr(gpu_facts, "DRIVER", tmp_path / "version")
    assert gpu_facts.driver() == "unknown"
    (tmp_path / "version").write_text(
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.14  Thu Feb\nGCC version:\n"
    )
    found = gpu_facts.gpu_facts()
    assert (found["name"], found["compute_capability"], found["count"]) == ("NVIDIA H100", "9.0", 4)
    assert (found["driver"], found["cuda"]) == ("550.54.14", str(paddle.version.cuda()))
    assert runtime.machine()["gpu"] == found
    assert value(found).startswith("name NVIDIA H100, compute capability 9.0, count 4, driver 550.54.14, cuda ")
    assert found["flags"] == {"FLAGS_flash_attn_version": 3, "FLAGS_cudnn_deterministic": 3}
