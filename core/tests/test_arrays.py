"""Arrays in the memory of tensors, and copies between layouts and types: the same bits as numpy's."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from sft import arrays, dnnl

BITS = {np.dtype(np.float32): np.uint32, np.dtype(np.float16): np.uint16, np.dtype(ml_dtypes.bfloat16): np.uint16}


def any_bits(shape: tuple[int, int], dtype: Any) -> np.ndarray:
    """NaNs of all kinds, infinities and the smallest numbers are among them."""
    dtype = np.dtype(dtype)
    drawn = np.random.default_rng(0).integers(0, 1 << 8 * dtype.itemsize, shape, BITS[dtype])
    return drawn.view(dtype)


@pytest.fixture(params=["as found", "numpy"])
def mover(paddle: Any, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """What turns matrices: oneDNN where this build of paddle has it, and numpy."""
    if request.param == "numpy":
        monkeypatch.setattr(arrays, "_onednn", lambda: None)


def test_onednn_turns_matrices_where_there_is_one(paddle: Any) -> None:
    assert (arrays._onednn() is None) == (dnnl.library() is None)


@pytest.mark.usefixtures("mover")
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("turned", [True, False])
@pytest.mark.parametrize("part", [64, 1 << 20])
def test_a_copy_has_every_bit(monkeypatch: pytest.MonkeyPatch, dtype: Any, turned: bool, part: int) -> None:
    monkeypatch.setattr(arrays, "PART", part)
    source = any_bits((83, 71), dtype)
    whole = np.zeros((71, 90) if turned else (83, 90), dtype)
    bits = BITS[np.dtype(dtype)]
    arrays.copy_onto(whole[:, : 83 if turned else 71], source.T if turned else source)
    expected = np.zeros(whole.shape, bits)
    expected[:, : 83 if turned else 71] = (source.T if turned else source).view(bits)
    np.testing.assert_array_equal(whole.view(bits), expected)


@pytest.mark.usefixtures("mover")
@pytest.mark.parametrize("source", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("target", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_values_are_rounded_to_the_nearest(source: Any, target: Any) -> None:
    """Values in the range of all types, and numbers so small that the processor's own rounding makes them zero."""
    values = np.random.default_rng(0).standard_normal((90, 70)).astype(source)
    if target != np.float16:
        values[0] = np.float32(1e-39)
    found = np.empty((70, 90), target)
    arrays.copy_onto(found, values.T)
    np.testing.assert_array_equal(found, values.astype(np.float32).astype(target).T)


@pytest.mark.usefixtures("mover")
def test_either_side_may_be_the_one_that_is_turned(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, turn = [], arrays._turn
    monkeypatch.setattr(arrays, "_turn", lambda *given: calls.append(turn(*given)))
    source = any_bits((83, 71), np.float32)
    for turns in (True, False):
        target = np.zeros((71, 83), np.float32)
        arrays.copy_onto(*((target, source.T) if turns else (target.T, source)))
        np.testing.assert_array_equal(target.view(np.uint32), source.T.view(np.uint32))
    assert len(calls) == (2 if arrays._onednn() is not None else 0)


def test_shapes_must_be_the_same(paddle: Any) -> None:
    with pytest.raises(ValueError, match=r"\[2, 3\] for \[3, 2\]"):
        arrays.copy_onto(np.zeros((3, 2)), np.zeros((2, 3)))


def test_an_array_is_the_memory_of_its_tensor(paddle: Any) -> None:
    for dtype in ("float32", "bfloat16", "uint8"):
        tensor = paddle.zeros([2, 3], dtype)
        array = arrays.array_of(tensor)
        array[1, 2] = 3
        assert tensor.astype("float32").numpy().tolist() == [[0, 0, 0], [0, 0, 3]]
    assert arrays.array_of(paddle.zeros([0, 3])).shape == (0, 3)


@pytest.mark.parametrize("change", [True, False])
def test_a_parameter_gets_its_value_in_place(paddle: Any, change: bool) -> None:
    """One that has none yet gets memory of its own; what shares the memory of one that has sees the new value."""
    from sft.distributed.whole import set_value

    values = np.random.default_rng(0).standard_normal((60, 80)).astype(np.float32)
    with paddle.LazyGuard():
        parameter = paddle.nn.Layer().create_parameter([80, 60], dtype="bfloat16")
    if change:
        set_value(parameter, np.zeros((80, 60), np.float32))
        before = arrays.array_of(parameter)
    set_value(parameter, values.T)
    held = before if change else arrays.array_of(parameter)
    np.testing.assert_array_equal(held, values.astype(ml_dtypes.bfloat16).T)
    assert not parameter.stop_gradient
