"""What internals.py and offload.py take for granted of paddle's tensors: what fails here is what paddle has changed."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest


@pytest.fixture
def internals(paddle: Any) -> Any:
    from sft_parallel_4d import internals

    return internals


def changed(name: str, what: str) -> str:
    return f"paddle's {name} {what}: sft_parallel_4d/internals.py is built on that (paddle 3.3)."


def trained(paddle: Any, internals: Any, values: Any, dtype: str = "float32") -> Any:
    parameter = internals.parameter_of(paddle.to_tensor(values).astype(dtype))
    parameter.stop_gradient = False
    return parameter


def test_parameters(paddle: Any, internals: Any) -> None:
    value = paddle.ones([2, 3])
    parameter = internals.parameter_of(value)
    assert internals.is_parameter(parameter), changed("EagerParamBase.from_tensor", "makes no parameter")
    assert not internals.is_parameter(value), changed("EagerParamBase", "is what any tensor is")
    assert parameter.data_ptr() == value.data_ptr(), changed("EagerParamBase.from_tensor", "copies")


def test_layers_keep_what_they_have_by_name(paddle: Any) -> None:
    """Adapters, experts and stages put there, and take out, what a process has."""
    layer = paddle.nn.Linear(2, 2)
    layer.inner = paddle.nn.Linear(2, 2)
    layer.register_buffer("kept", paddle.ones([1]))
    for name, held in (("_parameters", ["weight", "bias"]), ("_sub_layers", ["inner"]), ("_buffers", ["kept"])):
        why = changed(f"Layer.{name}", "is no dict by name: what a process does not have would stay in its model")
        assert list(getattr(layer, name, {})) == held, why
    del layer._sub_layers["inner"]
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias"]


def test_an_alias_outlives_the_tensor(paddle: Any, internals: Any) -> None:
    why = changed("_C_ops.reshape", "copies, or goes with its input: gradients would be lost before they are summed")
    one = paddle.arange(6, dtype="float32")
    other = internals.alias(one, [3, 2])
    assert other.data_ptr() == one.data_ptr(), why
    internals.empty(one)
    np.testing.assert_array_equal(other.numpy(), np.arange(6).reshape(3, 2), why)


def test_memory_comes_and_goes(paddle: Any, internals: Any) -> None:
    one, values = trained(paddle, internals, np.ones((2, 3))), paddle.full([2, 3], 5.0)
    internals.empty(one)
    assert not internals.has_memory(one), changed("Tensor._clear_data", "keeps memory: stage 3 would save nothing")
    assert one.shape == [2, 3], changed("Tensor._clear_data", "takes the shape, too")
    internals.share(values, one)
    assert internals.has_memory(one), changed("Tensor._is_initialized", "does not say that there is memory")
    assert one.data_ptr() == values.data_ptr(), changed("Tensor._share_buffer_to", "copies")
    assert one.numpy().tolist() == values.numpy().tolist()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_piece_is_over_its_values(paddle: Any, internals: Any, dtype: str) -> None:
    values = paddle.arange(4, dtype="float32").astype(dtype)
    piece = internals.piece_over(values)
    why = changed("get_tensor()._set_dims", "leaves the shape: what is stepped would be another size than its gradient")
    assert (piece.shape, piece.data_ptr(), piece.stop_gradient) == ([4], values.data_ptr(), False), why
    internals.share(paddle.full([4], 7.0).astype(dtype), piece)  # as an optimizer may do
    internals.put_back(piece, values)
    assert piece.data_ptr() == values.data_ptr()
    assert values.astype("float32").tolist() == [7.0] * 4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_gradient_is_taken_when_backward_has_reached_it(paddle: Any, internals: Any, dtype: str) -> None:
    one, seen = trained(paddle, internals, [[1.0, 2.0]], dtype), list[Any]()
    internals.when_reached(one, lambda: seen.append(internals.taken(one)))
    for factor in (2.0, 3.0):
        (one * factor).sum().backward()
    why = changed("Tensor._register_backward_hook", "calls no more, or before the gradient is there: nothing is summed")
    assert [gradient.tolist() for gradient in seen] == [[2.0, 2.0], [3.0, 3.0]], why
    assert {gradient.dtype for gradient in seen} == {paddle.float32}
    why = changed("Tensor.clear_gradient(False)", "leaves zeros: a rank would hold all gradients, whatever the stage")
    assert one.grad is None, why
    assert internals.taken(one) is None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_gradient_is_given_without_a_copy(paddle: Any, internals: Any, dtype: str) -> None:
    """Also in float32 to a parameter of 16 bits."""
    one, gradient = trained(paddle, internals, [1.0, 2.0], dtype), paddle.to_tensor([3.0, 4.0])
    internals.give(one, gradient)
    why = changed("Tensor.grad_", "copies, or rounds: each step would wait for the device, or lose digits")
    assert (one.grad.data_ptr(), one.grad.dtype) == (gradient.data_ptr(), paddle.float32), why


def test_the_seed_is_known(paddle: Any, internals: Any) -> None:
    paddle.seed(12345)
    paddle.rand([3])
    why = changed("default_cpu_generator().initial_seed", "is not paddle.seed's: dropout would differ between runs")
    assert internals.seed_now() == 12345, why


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("async_offload", ["src_tensor", "async_load"]),
        ("async_reload", ["src_tensor", "async_load"]),
        ("create_async_load", []),
    ],
)
def test_what_copies_to_the_host(paddle: Any, name: str, parameters: list[str]) -> None:
    """By name: without a GPU there is no more to see."""
    from paddle.incubate.tensor import manipulation

    found = getattr(manipulation, name, None)
    assert callable(found), changed(name, "is gone: nothing could be offloaded")
    has = list(inspect.signature(found).parameters)
    assert has == parameters, changed(name, f"takes {has}")


@pytest.mark.parametrize("wait", ["cpu_wait", "cuda_wait"])
def test_what_is_waited_for_of_a_copy(paddle: Any, wait: str) -> None:
    """Only a build for GPUs has such tasks. Paddle's own optimizer waits by the same names."""
    from paddle.optimizer import fusion_utils

    gone = changed(f"task.{wait}", "is gone: a copy would be read before it is there")
    assert f"task.{wait}()" in inspect.getsource(fusion_utils), gone


def test_no_other_module_calls_what_is_not_public() -> None:
    """Of paddle's tensors; fleet.py has those of its buffers, too."""
    from sft_parallel_4d import internals

    private = re.compile(
        r"_C_ops|EagerParamBase|paddle\.base|\.grad_\b|clear_gradient|get_tensor\(|param_storage"
        r"|\._(clear_data|clear_dataptr|is_initialized|register_backward_hook|set_dims|share_buffer_to|slice)\("
    )
    folder = Path(internals.__file__).parent
    found = {path.name for path in folder.glob("*.py") if private.search(path.read_text(encoding="utf-8"))}
    assert found == {"internals.py", "fleet.py"}
