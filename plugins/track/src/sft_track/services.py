"""Trackers whose log is a service's, or that of its offline mode: ``wandb``, ``mlflow`` and ``swanlab``.

Where it goes, and whether to a network at all, is what each library reads in its own variables of the environment.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

import sft
from sft_track.tracker import Tracker, name_of

if TYPE_CHECKING:
    from sft import Run

PROJECT = "sft"
_LONGEST = 500
"""Characters of a parameter that every store of MLflow takes."""


class WandB(Tracker):
    """Weights & Biases. ``WANDB_MODE=offline`` keeps everything in ``output_dir/wandb``."""

    name = "wandb"
    api_version = ">=1.1,<2"
    summary = "Log to Weights & Biases."
    reference = "https://docs.wandb.ai"
    library = "wandb"
    certify = sft.Trial(environment={"WANDB_MODE": "offline", "WANDB_SILENT": "true"})

    def begin(self, run: Run, earlier: str | None, after: int) -> str:
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=os.environ.get("WANDB_NAME", name_of(run)),
            dir=str(run.output_dir),
            config=run.settings.written(),
            id=earlier,
            resume="allow" if earlier is not None else None,
            reinit="create_new",
        )
        # Its own count of calls only rises; a curve that goes back to a checkpoint needs an axis of its own.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        return str(self._run.id)

    def write(self, step: int, numbers: dict[str, float]) -> None:
        self._run.log({"step": step, **numbers})

    def end(self, status: str, summary: dict[str, Any]) -> None:
        self._run.summary.update(
            {f"result/{key}": value for key, value in {"status": status, **_plain(summary)}.items()}
        )
        self._run.finish(exit_code=0 if status == "finished" else 1)


class MLflow(Tracker):
    """MLflow. ``MLFLOW_TRACKING_URI`` says where (a database, a server), ``MLFLOW_EXPERIMENT_NAME`` in which
    experiment. Of the steps after a resumed run's checkpoint, which are made twice, MLflow has both points."""

    name = "mlflow"
    api_version = ">=1.1,<2"
    summary = "Log to MLflow."
    reference = "https://mlflow.org/docs/latest/"
    library = "mlflow"
    certify = sft.Trial(environment={"MLFLOW_TRACKING_URI": "file:{folder}/mlruns", "MLFLOW_ALLOW_FILE_STORE": "true"})

    def begin(self, run: Run, earlier: str | None, after: int) -> str:
        from mlflow.tracking import MlflowClient

        self._client = MlflowClient()
        if earlier is not None:
            self._client.update_run(earlier, status="RUNNING")
            self._id = earlier
            return earlier
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = self._client.get_experiment_by_name(name)
        experiment = found.experiment_id if found is not None else self._client.create_experiment(name)
        self._id = str(self._client.create_run(experiment, run_name=name_of(run)).info.run_id)
        for key, value in run.settings.written().items():
            self._client.log_param(self._id, key, str(value)[:_LONGEST])
        return self._id

    def write(self, step: int, numbers: dict[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(self._id, metrics=[Metric(name, value, now, step) for name, value in numbers.items()])

    def end(self, status: str, summary: dict[str, Any]) -> None:
        for key, value in _plain(summary).items():
            self._client.set_tag(self._id, f"result.{key}", str(value))
        self._client.set_terminated(self._id, {"finished": "FINISHED", "failed": "FAILED"}.get(status, "KILLED"))


class SwanLab(Tracker):
    """SwanLab. ``SWANLAB_MODE=offline`` keeps everything in ``output_dir/swanlog``."""

    name = "swanlab"
    api_version = ">=1.1,<2"
    summary = "Log to SwanLab."
    reference = "https://docs.swanlab.cn"
    library = "swanlab"
    certify = sft.Trial(environment={"SWANLAB_MODE": "offline"})

    def begin(self, run: Run, earlier: str | None, after: int) -> str:
        import swanlab

        self._run = swanlab.init(
            project=os.environ.get("SWANLAB_PROJECT", os.environ.get("SWANLAB_PROJ_NAME", PROJECT)),
            name=os.environ.get("SWANLAB_EXP_NAME", name_of(run)),
            log_dir=str(run.output_dir / "swanlog"),
            config=run.settings.written(),
            **({"id": earlier, "resume": "allow"} if earlier is not None else {}),
        )
        return str(self._run.id)

    def write(self, step: int, numbers: dict[str, float]) -> None:
        self._run.log(numbers, step=step)

    def end(self, status: str, summary: dict[str, Any]) -> None:
        self._run.config.update({"result": {"status": status, **_plain(summary)}})
        states = {"finished": "success", "failed": "crashed"}
        self._run.finish(state=states.get(status, "aborted"))


def _plain(summary: dict[str, Any]) -> dict[str, Any]:
    """The numbers and texts of a summary."""
    return {key: value for key, value in summary.items() if isinstance(value, (int, float, str))}
