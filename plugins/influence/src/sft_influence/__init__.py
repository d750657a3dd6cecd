"""``sft why``: which training records taught an answer, by their gradients at the checkpoints of the run."""
