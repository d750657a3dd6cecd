"""What goes wrong in one rank of a run: functions that a rank calls by name (``processes.run_ranks``)."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from processes import die

import sft


def train_and_die(settings: dict[str, Any], rank: int, step: int) -> None:
    """One rank of a run of which ``rank`` is killed after ``step``."""
    killing = type("Killing", (Kill,), {"rank": rank, "step": step})
    sft.run(settings, plugins=[killing], say=lambda text: None)


class Kill(sft.Plugin):
    name = "kill"
    api_version = 1
    rank: int
    step: int

    @sft.hookimpl
    def sft_step_ended(self, run: sft.Run, record: dict[str, Any]) -> None:
        from paddle import distributed

        if record["step"] == self.step and distributed.get_rank() == self.rank:
            die()


def train_and_ruin(settings: dict[str, Any], rank: int, name: str) -> None:
    """One rank of a run in which ``rank`` has a value that is not finite in parameter ``name`` after the first step."""
    sft.run(settings, plugins=[type("Ruining", (Ruin,), {"rank": rank, "parameter": name})], say=lambda text: None)


class Ruin(sft.Plugin):
    name = "ruin"
    api_version = 1
    rank: int
    parameter: str

    @sft.hookimpl
    def sft_step_ended(self, run: sft.Run, record: dict[str, Any]) -> None:
        from paddle import distributed

        if record["step"] == 1 and distributed.get_rank() == self.rank:
            parameter = dict(run.model.named_parameters())[self.parameter]
            values = parameter.numpy()
            values[1, 1] = np.nan
            parameter.set_value(values)


def train_with_a_bad_step(settings: dict[str, Any], rank: int, step: int) -> None:
    """One rank of a run in which the loss of a ``step`` is not a number in ``rank``."""
    from paddle import distributed

    from sft.training import objective

    own, at = objective.target_loss, [0]

    class Steps(sft.Plugin):
        name = "steps"
        api_version = 1

        @sft.hookimpl
        def sft_step_ended(self, run: sft.Run, record: dict[str, Any]) -> None:
            at[0] = record["step"]

    def loss(*arguments: Any) -> Any:
        found = own(*arguments)
        return found * float("nan") if at[0] == step - 1 and distributed.get_rank() == rank else found

    objective.target_loss = loss
    sft.run(settings, plugins=[Steps], say=print)


def train_on_full_disk(settings: dict[str, Any], temporary: str) -> None:
    """One rank of a run whose folder has no room for weights; there is some in the folder of ``temporary`` files."""
    import tempfile

    import safetensors.numpy

    own, tempfile.tempdir = safetensors.numpy.save_file, temporary

    def save_file(tensors: Any, path: str, **more: Any) -> None:
        if str(settings["output_dir"]) in str(path):
            raise OSError(28, "No space left on device", path)
        own(tensors, path, **more)

    safetensors.numpy.save_file = save_file
    sft.run(settings, say=lambda text: None)


def train_and_lose_the_disk(settings: dict[str, Any], temporary: str, what: str) -> None:
    """One rank of a run of two steps: after the first, a file stands in place of its folder (``what``: "journal"), or
    that has no room for what "main" writes of a checkpoint or what "other" does; there is some in the folder of
    ``temporary`` files."""
    import shutil
    import tempfile

    import safetensors.numpy

    own, tempfile.tempdir = safetensors.numpy.save_file, temporary

    def save_file(tensors: Any, path: str, **more: Any) -> None:
        if str(settings["output_dir"]) in str(path) and (what == "main" or "optimizer-00001" in str(path)):
            raise OSError(28, "No space left on device", path)
        own(tensors, path, **more)

    class Lose(sft.Plugin):
        name = "lose"
        api_version = 1

        @sft.hookimpl
        def sft_step_ended(self, run: sft.Run) -> None:
            if what != "journal":
                safetensors.numpy.save_file = save_file

        @sft.hookimpl
        def sft_logged(self, run: sft.Run) -> None:
            if what == "journal" and run.step == 1 and run.strategy.is_main:
                shutil.rmtree(run.output_dir)
                run.output_dir.touch()

    sft.run(settings, plugins=[Lose], say=lambda text: None)


def stand_still(settings: dict[str, Any], rank: int, hook: str) -> None:
    """One rank of a run in which ``rank`` does not come back from a ``hook``."""

    def stand(self: Any) -> None:
        from paddle import distributed

        if distributed.get_rank() == rank:
            time.sleep(60)

    members = {"name": "stand", "api_version": 1, hook: sft.hookimpl(stand)}
    sft.run(settings, plugins=[type("Stand", (sft.Plugin,), members)], say=print)
