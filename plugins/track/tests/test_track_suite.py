"""What every plugin of its kind promises, of these; each where its library is installed."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from sft.testing import suite

pytestmark = pytest.mark.slow


def where_installed(library: str) -> type:
    """The suite of a tracker, which has the name of its library."""
    return pytest.mark.skipif(find_spec(library) is None, reason=f"{library} is not installed")(suite(library))


TestTensorboard = where_installed("tensorboard")
TestVisualdl = where_installed("visualdl")
TestWandb = where_installed("wandb")
TestMlflow = where_installed("mlflow")
TestSwanlab = where_installed("swanlab")
