"""What each library has kept of a run that failed and went on, read with the library's own reader."""

from __future__ import annotations

import importlib.util
import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import sft
from sft.testing import read_metrics

Train = Callable[..., sft.Summary]
Curve = list[tuple[int, float]]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def needs(library: str) -> pytest.MarkDecorator:
    missing = importlib.util.find_spec(library) is None
    return pytest.mark.skipif(missing, reason=f"not installed: {library} (tests/test_tracker_libraries.py has all)")


class Fails(sft.Plugin):
    name = "fails"
    api_version = 1

    @sft.hookimpl
    def sft_step_ended(self, run: sft.Run, record: dict[str, Any]) -> None:
        if run.step == 4:
            raise sft.SftError("the power went off")


@pytest.fixture
def resumed(train: Train, tmp_path: Path) -> Callable[[str], list[str]]:
    """Make a run that is logged, fails two steps after its checkpoint of step 2, and goes on from there, so that step 3
    is made, and logged, twice; what was said."""

    def make(tracker: str) -> list[str]:
        said: list[str] = []
        settings = {"save_strategy": "steps", "save_steps": 2, "report_to": tracker, "run_name": "blue"}
        with pytest.raises(sft.SftError, match="the power went off"):
            train("out", (Fails,), say=said.append, **settings)
        train("out", resume_from_checkpoint="auto", say=said.append, **settings)
        assert [line for line in said if "only watches" in line] == []
        return said

    return make


def expected(tmp_path: Path, key: str, twice: bool = False) -> Curve:
    """The curve of the run, or what of it was logged: step 3 of training came twice, to the same last bit."""
    curve = [(line["step"], line[key]) for line in read_metrics(tmp_path / "out") if key in line]
    return [one for one in curve for _ in range(2 if twice and one[0] == 3 else 1)]


def same(found: Curve, wanted: Curve) -> bool:
    """float32 is what these libraries keep."""
    return [step for step, _ in found] == [step for step, _ in wanted] and all(
        value == pytest.approx(other, rel=1e-6) for (_, value), (_, other) in zip(found, wanted, strict=True)
    )


def leveldb_log(content: bytes, header: int = 7, block: int = 32768) -> Iterator[bytes]:
    """The records of a file in LevelDB's log format, as wandb writes it; the library has no reader of its own."""
    at, parts = header, list[bytes]()
    while at + 7 <= len(content):
        if block - at % block < 7:  # the rest of a block that has no room for a record's head
            at += block - at % block
            continue
        _, length, kind = struct.unpack_from("<IHB", content, at)
        parts.append(content[at + 7 : at + 7 + length])
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield b"".join(parts)
            parts.clear()


@needs("tensorboard")
def test_tensorboard(resumed: Callable[[str], Any], tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    resumed("tensorboard")
    (folder,) = (tmp_path / "out" / "tensorboard").iterdir()
    log = EventAccumulator(str(folder)).Reload()
    for tag, key in (("train/loss", "loss"), ("eval/loss", "eval_loss"), ("train/tokens", "tokens")):
        assert same([(event.step, event.value) for event in log.Scalars(tag)], expected(tmp_path, key))
    texts = {tag: log.Tensors(tag)[-1].tensor_proto.string_val[0].decode() for tag in log.Tags()["tensors"]}
    assert '"learning_rate": 0.001' in texts["settings"]
    assert json.loads(texts["result"].strip("`json\n"))["status"] == "finished"


@needs("visualdl")
def test_visualdl(resumed: Callable[[str], Any], tmp_path: Path) -> None:
    from visualdl import LogReader

    resumed("visualdl")
    (folder,) = (tmp_path / "out" / "visualdl").iterdir()
    logs = [LogReader(file_path=str(path)) for path in sorted(folder.iterdir())]
    for tag, key in (("train/loss", "loss"), ("eval/loss", "eval_loss")):
        points = [(point.id, point.value) for log in logs for point in log.get_data("scalar", tag)]
        assert same(sorted(points), expected(tmp_path, key, twice=True))
    texts = [record.text.encoded_text_string for log in logs for record in log.get_data("text", "result")]
    assert json.loads(texts[-1])["status"] == "finished"


@needs("wandb")
def test_wandb(resumed: Callable[[str], Any], tmp_path: Path) -> None:
    from wandb.proto import wandb_internal_pb2

    resumed("wandb")
    curve: Curve = []
    ids, summary = set(), {}
    for path in sorted((tmp_path / "out" / "wandb").glob("offline-run-*/*.wandb"), key=lambda one: one.stat().st_mtime):
        for data in leveldb_log(path.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "run":
                ids.add((record.run.run_id, record.run.display_name, record.run.project))
            for item in record.summary.update:
                summary["/".join(item.nested_key) or item.key] = json.loads(item.value_json)
            values = {"/".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
            if "train/loss" in values:
                curve.append((int(values["step"]), float(values["train/loss"])))
    assert same(curve, expected(tmp_path, "loss", twice=True))
    assert len(ids) == 1  # one run, which is synchronised as one
    assert next(iter(ids))[1:] == ("blue", "sft")
    assert summary["result/status"] == "finished"


@needs("mlflow")
def test_mlflow(resumed: Callable[[str], Any], tmp_path: Path) -> None:
    from mlflow.tracking import MlflowClient

    resumed("mlflow")
    client = MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("sft").experiment_id])
    for tag, key in (("train/loss", "loss"), ("eval/loss", "eval_loss")):
        points = [(metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, tag)]
        assert same(sorted(points), expected(tmp_path, key, twice=True))
    assert (run.info.status, run.info.run_name) == ("FINISHED", "blue")
    assert run.data.params["learning_rate"] == "0.001"
    assert run.data.tags["result.steps"] == "4"


@needs("swanlab")
def test_swanlab(resumed: Callable[[str], Any], tmp_path: Path) -> None:
    """Its offline log is for `swanlab sync`; that both parts have one name is what makes them one run there."""
    resumed("swanlab")
    folders = list((tmp_path / "out" / "swanlog").glob("run-*"))
    assert len({folder.name.rpartition("-")[2] for folder in folders}) == 1
    content = b"".join(path.read_bytes() for folder in folders for path in folder.glob("*.swanlab"))
    assert b"train/loss" in content
    assert b"eval/loss" in content
