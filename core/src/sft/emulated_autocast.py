"""What automatic casts to 16 bits do on a GPU, done on a CPU: ``sft.testing.emulated_autocast``."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock


@contextlib.contextmanager
def emulated_autocast(dtype: str) -> Iterator[list[Any]]:
    """Within it a CPU does what automatic casts to ``dtype`` ("bfloat16", "float16") do on a GPU, where paddle has none
    on CPU: products (``paddle.matmul``, ``paddle.einsum``, ``F.linear``) have their factors rounded, are summed in
    float32, and their result is rounded; ``paddle.amp.auto_cast(enable=False)`` switches that off. Yields a list of the
    rounded factors, two for each product, which a GPU would keep for backward."""
    import paddle
    from paddle.nn import functional

    on, factors = [True], list[Any]()

    def narrow(x: Any) -> Any:
        return x.astype(dtype) if isinstance(x, paddle.Tensor) and x.is_floating_point() else x

    def rounding(operation: Callable[..., Any]) -> Callable[..., Any]:
        def compute(*arguments: Any, **more: Any) -> Any:
            if not on[-1]:
                return operation(*arguments, **more)
            narrowed = [narrow(one) for one in arguments]
            factors.extend(one for one in narrowed if isinstance(one, paddle.Tensor))
            wide = [one.astype("float32") if isinstance(one, paddle.Tensor) else one for one in narrowed]
            with switched(False):
                return operation(*wide, **more).astype(dtype)

        return compute

    def lifted(operation: Callable[..., Any]) -> Callable[..., Any]:
        """For what has no kernel for 16 bits on CPU."""

        def compute(*arguments: Any, **more: Any) -> Any:
            types = {one.dtype for one in arguments if isinstance(one, paddle.Tensor)}
            if not types & {paddle.bfloat16, paddle.float16}:
                return operation(*arguments, **more)
            wide = [one.astype("float32") if isinstance(one, paddle.Tensor) else one for one in arguments]
            return operation(*wide, **more).astype(types.pop() if len(types) == 1 else "float32")

        return compute

    @contextlib.contextmanager
    def switched(enable: bool = True, *_: Any, **__: Any) -> Iterator[None]:
        on.append(enable)
        try:
            yield
        finally:
            on.pop()

    with contextlib.ExitStack() as stack:

        def put(owner: Any, name: str, new: Any) -> None:
            stack.enter_context(mock.patch.object(owner, name, new))

        for owner, name in (
            (paddle, "matmul"),
            (paddle, "einsum"),
            (functional, "linear"),
            (paddle.Tensor, "matmul"),
            (paddle.Tensor, "__matmul__"),
        ):
            put(owner, name, rounding(getattr(owner, name)))
        for owner, name in ((paddle, "roll"), (functional, "swiglu"), (paddle.Tensor, "__add__")):
            put(owner, name, lifted(getattr(owner, name)))
        put(paddle.amp, "auto_cast", switched)
        put(paddle, "is_autocast_enabled", lambda: on[-1])
        put(paddle, "get_autocast_dtype", lambda: dtype)
        yield factors
