"""What docs/plugins.md promises of the plugin."""

import numpy as np
import pytest
from safetensors.numpy import load_file

from sft_last_blocks import LastBlocks


@pytest.mark.parametrize("blocks", [1, 2])
def test_the_last_blocks_train_and_nothing_else(train, base_model, tmp_path, blocks):
    train(plugins=(LastBlocks,), plugin=["last-blocks"], blocks=blocks)
    before = load_file(base_model / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    changed = {name.split(".")[2] for name in before if not np.array_equal(before[name], after[name])}
    assert changed == {str(number) for number in range(2 - blocks, 2)}
