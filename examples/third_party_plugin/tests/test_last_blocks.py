"""What docs/plugins.md promises of the plugin."""

import numpy as np
import pytest
from safetensors.numpy import load_file

import sft
from sft.testing import needs
from sft_last_blocks import LastBlocks


@pytest.mark.parametrize("blocks", [1, 2])
def test_the_last_blocks_train_and_nothing_else(train, base_model, tmp_path, blocks):
    train(plugins=(LastBlocks,), plugin=["last-blocks"], blocks=blocks)
    before = load_file(base_model / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    changed = {name.split(".")[2] for name in before if not np.array_equal(before[name], after[name])}
    assert changed == {str(number) for number in range(2 - blocks, 2)}


@needs("vera", "nf4")
@pytest.mark.parametrize("others", [["vera"], ["vera", "nf4"]])
def test_a_model_that_others_freeze_is_refused_in_a_sentence(train, others):
    with pytest.raises(sft.UsageError, match="last-blocks trains the model itself, and vera freezes it; leave one"):
        train(plugins=(LastBlocks,), plugin=["last-blocks", *others])
