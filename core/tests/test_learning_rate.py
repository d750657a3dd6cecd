"""The learning rate of each step: Hugging Face's schedules."""

from __future__ import annotations

import math

import pytest

from sft.settings.arguments import TrainingArguments

# transformers' schedules multiply the peak rate of optimizer step n by f(n - 1), with w warm-up steps of T:
#   f(s) = s / w                                    while s < w, and after that
#   linear    (T - s) / (T - w)                     get_linear_schedule_with_warmup
#   cosine    (1 + cos(π (s - w) / (T - w))) / 2    get_cosine_schedule_with_warmup
#   polynomial ((1 - e) ((T - s) / (T - w))^p + e)  get_polynomial_decay_schedule_with_warmup, e = lr_end / peak
#   constant_with_warmup 1                          get_constant_schedule_with_warmup
#   constant  1, and no warm-up                     get_constant_schedule
WARM = [0.0, 0.25, 0.5, 0.75]
SCHEDULES = {
    ("linear", 4): [*WARM, 1.0, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6],
    ("cosine", 4): [*WARM, 1.0, (2 + math.sqrt(3)) / 4, 0.75, 0.5, 0.25, (2 - math.sqrt(3)) / 4],
    ("constant_with_warmup", 4): [*WARM, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0],
    ("constant", 4): [1.0] * 10,
    ("linear", 0): [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1],
    ("constant", 0): [1.0] * 10,
}


@pytest.mark.parametrize(("kind", "warmup"), SCHEDULES)
def test_schedules_are_hugging_faces(kind: str, warmup: int) -> None:
    from sft.training.rates import learning_rate

    training = TrainingArguments(learning_rate=3e-4, lr_scheduler_type=kind, warmup_steps=warmup)
    found = [learning_rate(step, 10, training) for step in range(1, 11)]
    assert found == pytest.approx([3e-4 * factor for factor in SCHEDULES[kind, warmup]], rel=1e-12, abs=1e-18)


def test_the_polynomial_schedule_ends_at_its_last_rate() -> None:
    from sft.training.rates import learning_rate

    training = TrainingArguments(
        learning_rate=2.0, lr_scheduler_type="polynomial", warmup_steps=2, power=2.0, lr_end=0.4
    )
    found = [learning_rate(step, 10, training) for step in (1, 2, 3, 7, 11, 20)]
    assert found == pytest.approx([0.0, 1.0, 2.0, 1.6 * 0.25 + 0.4, 0.4, 0.4])


def test_two_whole_waves_of_the_cosine() -> None:
    from sft.training.rates import learning_rate

    training = TrainingArguments(learning_rate=1.0, lr_scheduler_type="cosine", num_cycles=2.0)
    found = [learning_rate(step, 8, training) for step in range(1, 9)]
    assert found == pytest.approx([1.0, 0.5, 0.0, 0.5, 1.0, 0.5, 0.0, 0.5], abs=1e-12)


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_a_decay_would_reach_zero_after_the_last_step(kind: str) -> None:
    from sft.training.rates import learning_rate

    training = TrainingArguments(learning_rate=1.0, lr_scheduler_type=kind)
    assert learning_rate(11, 10, training) == pytest.approx(0.0, abs=1e-15)
    assert learning_rate(15, 10, training) == pytest.approx(0.0, abs=1e-15)


@pytest.mark.parametrize(
    ("steps", "ratio", "warmup"), [(0, 0.4, 4), (0, 0.31, 4), (3, 0.9, 3), (0, 0.0, 0), (0, 1.0, 10)]
)
def test_warm_up_by_ratio_is_rounded_up_and_steps_win(steps: int, ratio: float, warmup: int) -> None:
    from sft.training.rates import learning_rate

    training = TrainingArguments(
        learning_rate=1.0, lr_scheduler_type="constant_with_warmup", warmup_steps=steps, warmup_ratio=ratio
    )
    found = [learning_rate(step, 10, training) for step in range(1, 11)]
    assert found == pytest.approx([min(1.0, step / warmup) if warmup else 1.0 for step in range(10)], rel=1e-12)


def test_warm_up_longer_than_the_run_never_reaches_the_peak() -> None:
    from sft.training.rates import learning_rate

    training = TrainingArguments(learning_rate=1.0, lr_scheduler_type="cosine", warmup_steps=100)
    assert [learning_rate(step, 3, training) for step in (1, 2, 3)] == pytest.approx([0.0, 0.01, 0.02])
