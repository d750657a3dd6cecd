"""On a GPU: where paddle's kernels can compute, which version of them does, and what happens where none can.

There is no GPU here. A stand-in for paddle's kernels computes by the blockwise implementation; ``make test-gpu`` runs
the real ones.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sft_attn_flashmask import gpu
from sft_attn_flashmask.backends import FlashAttention, FlashMask


@pytest.fixture
def device(paddle: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    monkeypatch.setattr(gpu, "on_gpu", lambda: True)
    monkeypatch.delenv(gpu.FLAG, raising=False)
    return lambda capability: monkeypatch.setattr(gpu, "capability", lambda: capability)


@pytest.mark.parametrize(
    ("capability", "dtype", "size", "cap", "why"),
    [
        (80, "bfloat16", 128, None, None),
        (89, "float16", 64, None, None),
        (90, "bfloat16", 256, None, None),
        (80, "bfloat16", 256, None, None),
        (86, "bfloat16", 192, None, None),
        (90, "bfloat16", None, None, None),
        (86, "bfloat16", 256, None, "none for heads of 256 on a GPU of compute capability 8.6"),
        (90, "bfloat16", 288, None, "none for heads of 288"),
        (90, "bfloat16", 20, None, "none for heads of 20"),
        (75, "float16", 64, None, "need a GPU of compute capability 8.0, and this one has 7.5"),
        (90, "float32", 64, None, "compute in 16 bits, and this run in float32"),
        (90, "bfloat16", 64, 50.0, "know no cap"),
    ],
)
def test_a_gpu_that_cannot_leaves_attention_to_the_core(
    device: Any, capability: int, dtype: str, size: int | None, cap: float | None, why: str | None
) -> None:
    device(capability)
    said: list[str] = []
    run: Any = SimpleNamespace(say=said.append, precision=SimpleNamespace(dtype=dtype))
    shape = SimpleNamespace(attention_cap=cap, **({} if size is None else {"head_size": size}))
    for plugin in (FlashMask(), FlashAttention()):
        backend = plugin.sft_attention_backend(run=run, config=shape)
        assert (backend is None) == (why is not None)
    if why is None:
        assert not said
    else:
        assert len(said) == 2
        assert said[0].startswith("flashmask: paddle's kernels ")
        assert why in said[0]
        assert said[0].endswith("; attention is the core's own")


ENDS = np.full((1, 1, 300, 1), 300, np.int32)


@pytest.fixture
def kernels(paddle: Any, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Stand-ins for versions 2 and 3, which give a fake query their number; ``third`` changes what version 3 gives."""
    from sft_attn_flashmask.blockwise import attention
    from sft_attn_flashmask.masks import column_masks

    state: dict[str, Any] = {"third": lambda y: y, "flags": {gpu.FLAG: 2, gpu.ONE_ORDER: False}}
    monkeypatch.setattr(paddle, "get_flags", lambda names: {name: state["flags"][name] for name in names})
    monkeypatch.setattr(paddle, "set_flags", state["flags"].update)  # builds for CPUs do not know this one

    def compute(query: Any, key: Any, value: Any, indices: Any | None) -> Any:
        version = state["flags"][gpu.FLAG]
        if not hasattr(query, "numpy"):
            return version
        y = attention(query, key, value, None if indices is None else column_masks(indices.numpy()))
        return state["third"](y) if version == 3 else y

    monkeypatch.setattr(gpu, "compute", compute)
    return state


def attend(backend: Any, dtype: str = "bfloat16", size: int = 16, masked: bool = False) -> Any:
    there = SimpleNamespace(is_gpu_place=lambda: True)
    tensor = SimpleNamespace(place=there, dtype=f"paddle.{dtype}", shape=[1, 300, 4, size])
    return backend.attend(tensor, tensor, tensor, backend.mask(ENDS if masked else None))


def backend_of(said: list[str], dtype: str) -> Any:
    run: Any = SimpleNamespace(say=said.append, precision=SimpleNamespace(dtype=dtype))
    return FlashMask().sft_attention_backend(run=run, config=SimpleNamespace(attention_cap=None, head_size=16))


def wrong(y: Any) -> Any:
    raise RuntimeError("FlashAttention 3 is not compiled in\nof this build")


@pytest.mark.parametrize(
    ("third", "version", "line"),
    [
        (lambda y: y, 3, "by version 3 of FlashAttention"),
        (lambda y: y * 1.05, 2, "by version 2, as version 3 differs by 0.05"),
        (lambda y: y * float("nan"), 2, "by version 2, as version 3 differs by nan"),
        (wrong, 2, "by version 2, as version 3 fails (of this build)"),
    ],
    ids=["right", "wrong", "nan", "missing"],
)
def test_version_3_proves_itself_on_hopper(
    paddle: Any, monkeypatch: pytest.MonkeyPatch, device: Any, kernels: Any, third: Any, version: int, line: str
) -> None:
    real, said = gpu.compare, list[str]()
    monkeypatch.setattr(gpu, "compare", lambda dtype, *kind: real("float32", *kind))  # a CPU multiplies no 16 bits
    device(90)
    kernels["third"] = third
    backend = backend_of(said, "bfloat16")
    assert [attend(backend) for _ in range(3)] == [version] * 3
    assert said == [f"attention: bfloat16 heads of 16 without a mask are computed {line}"]
    assert kernels["flags"][gpu.FLAG] == 2
    assert attend(backend, masked=True) == version
    assert said[1:] == [f"attention: bfloat16 heads of 16 with a mask are computed {line}"]
    assert attend(backend, size=32) == version
    assert len(said) == 3


@pytest.mark.parametrize(
    ("size", "masked", "version"), [(16, True, 3), (16, False, 2), (136, True, 2)], ids=["rows", "one", "wide"]
)
def test_version_3_is_not_said_to_compute_what_paddle_gives_to_version_2(
    monkeypatch: pytest.MonkeyPatch, device: Any, kernels: Any, size: int, masked: bool, version: int
) -> None:
    """Where ``deterministic`` asks for sums in one order; compared, version 2 would be equal to itself."""
    real, said = gpu.compare, list[str]()
    monkeypatch.setattr(gpu, "compare", lambda dtype, *kind: real("float32", *kind))
    device(90)
    kernels["flags"][gpu.ONE_ORDER] = True
    assert attend(backend_of(said, "bfloat16"), size=size, masked=masked) == version
    (line,) = said
    assert ("by version 3" in line) == (version == 3)
    assert line.endswith("deterministic asks for one") == (version == 2)


def test_other_gpus_and_the_users_choice_keep_the_version_that_is_set(
    paddle: Any, monkeypatch: pytest.MonkeyPatch, device: Any, kernels: Any
) -> None:
    said: list[str] = []
    device(80)
    assert attend(backend_of(said, "bfloat16")) == 2
    device(90)
    monkeypatch.setenv(gpu.FLAG, "2")
    assert attend(backend_of(said, "bfloat16")) == 2
    assert not said


def test_flashmask_wishes_to_be_active_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from sft.plugins.requests import by_device

    assert "flashmask" in by_device({"device": "gpu:1"})
    assert "flashmask" not in by_device({"device": "cpu"})
    assert "flashmask" not in by_device({"device": "gpu", "plugin": ["no:flashmask"]})
