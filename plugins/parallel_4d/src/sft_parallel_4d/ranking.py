"""Plans in order: those that fit first, the quickest of them first, by the time that a step is expected to take."""

from __future__ import annotations

from dataclasses import dataclass

from sft_parallel_4d.communication import Volume, busiest
from sft_parallel_4d.machines import Machine
from sft_parallel_4d.memory import Calculator, Memory
from sft_parallel_4d.plans import Plan
from sft_parallel_4d.timing import Time, loads, time_of


@dataclass(frozen=True)
class Answer:
    """A plan and what it needs: memory of its fullest rank, what its busiest rank sends, and the time of a step."""

    plan: Plan
    memory: Memory
    volume: Volume
    time: Time
    fits: bool

    @property
    def seconds(self) -> float:
        """Of a step."""
        return self.time.total


def ranked(calculator: Calculator, plans: list[Plan], machine: Machine) -> list[Answer]:
    """All ``plans``, best first; those that do not fit come last, the smallest of them first."""
    answers = []
    for plan in plans:
        memory = calculator.fullest(plan)
        time = time_of(plan, loads(calculator, plan, machine))
        answers.append(Answer(plan, memory, busiest(calculator, plan), time, memory.peak <= machine.memory))
    return sorted(answers, key=lambda a: (not a.fits, a.seconds if a.fits else a.memory.peak, a.memory.peak))
