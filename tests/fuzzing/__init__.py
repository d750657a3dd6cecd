"""What is fuzzed: for each reader of what strangers wrote, how its input is made up, and how it is read.

A reader gives a value, or refuses its input with an error of sft in one sentence, in a limited time. Examples are drawn
the same way each time, but for ``make test-reliability``, which draws ten times as many, at random, and shows how to
repeat one that fails. An example that once failed is ``kept``, and tried each time.
"""

from __future__ import annotations

from fuzzing import adapters, checkpoints, data, models, settings
from fuzzing.trial import Target

TARGETS: dict[str, Target] = {
    name: target
    for module in (data, settings, models, adapters, checkpoints)
    for name, target in module.TARGETS.items()
}
