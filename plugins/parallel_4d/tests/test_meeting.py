"""How often tensor ranks meet in a block: once in attention and once in the MLP, forward and backward."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sft import Batch
from sft_parallel_4d.topology import Axis

BLOCKS, LENGTH = 4, 6


class Alone(Axis):
    """The first of two processes, where the other has the same: what they do together is written down."""

    def __init__(self) -> None:
        super().__init__(0, None)
        self.size = 2
        self.met: Counter[str] = Counter()

    def sum(self, tensor: Any) -> Any:
        self.met["sum"] += tensor.ndim == 3
        return tensor

    def gather(self, tensor: Any, dimension: int) -> Any:
        import paddle

        self.met["gather"] += tensor.ndim == 3
        return paddle.concat([tensor, tensor], axis=dimension)

    def sum_own(self, tensor: Any, dimension: int, spoil: bool = False) -> Any:
        self.met["sum_own"] += tensor.ndim == 3
        return self.own(tensor, dimension)


@pytest.mark.parametrize(("model_type", "keys"), [("llama", 4), ("llama", 1), ("phi3", 4)])
@pytest.mark.parametrize("sequence", [False, True])
def test_ranks_meet_once_in_attention(
    config_of: Callable[..., Path], model_type: str, keys: int, sequence: bool
) -> None:
    import paddle

    from sft.models.config import read_config
    from sft.models.decoder import CausalLM
    from sft.models.families.known import family_of
    from sft.parallel import hidden_states
    from sft_parallel_4d.tensor import TensorParallel

    folder = config_of(model_type, num_key_value_heads=keys, num_hidden_layers=BLOCKS)
    values = read_config(folder)
    with paddle.LazyGuard():
        model = CausalLM(family_of(values, folder).architecture(values, folder))
    axis = Alone()
    tensor = TensorParallel(axis, sequence, axis)
    tensor.divide(model)
    for parameter in model.parameters():
        if not parameter._is_initialized():
            parameter.initialize()
    tensor.connect(model)
    tensor.meeting.active = True
    ids = np.arange(LENGTH)[None]
    batch = Batch(ids, ids, ids, np.full((1, 1, LENGTH, 1), LENGTH, np.int32), ((LENGTH,),))
    hidden = hidden_states(model, batch)
    embedding = 1  # of whose rows each process has some
    ends = 1  # where the sequence is put together again, or divided
    forward = {"sum": embedding, "gather": 2 * BLOCKS + ends, "sum_own": 2 * BLOCKS}
    assert axis.met == Counter(forward if sequence else {"sum": embedding + 2 * BLOCKS})
    axis.met.clear()
    hidden.sum().backward()
    backward = {"gather": 2 * BLOCKS + ends, "sum_own": 2 * BLOCKS}
    assert axis.met == Counter(backward if sequence else {"sum": 2 * BLOCKS})
