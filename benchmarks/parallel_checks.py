"""What parallel-4d has to keep on several GPUs of one machine, in one command, ``make DEVICE=gpu test-gpu-parallel``.

    python -m benchmarks.parallel_checks --device gpu

makes small models and data, trains them on one GPU and then in every way that one machine can try, and prints a line
for each. Exit code 1: some line is off.

    collectives      each of them, on whole numbers, exactly
    float32, bf16    each plan of parallel_gpu.py, against one GPU; bf16 is O2
    lora             adapters on packed rows under some plans
    experts          a mixture under each plan that shares out its experts, in float32
    resumed          a checkpoint of one plan goes on under another
    killed           kill -9 of a rank, and the others go on with --max_restarts 1
    launchers        two of Paddle's launchers with --nnodes 2, each with half of the GPUs, and sockets between ranks

A line shows how far losses, gradient norms and weights are from those of one GPU: losses and norms no further than 1e-4
(bf16: 1e-2), weights no further than a twentieth (a fifth) of what training has changed. Buckets are of 1 MiB, so that
many are under way at once. With ``--device cpu`` two processes with Paddle's gloo do all of it. ``--only killed,bf16:``
chooses lines.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

import sft
from benchmarks import parallel_gpu
from benchmarks.parallel_gpu import TOLERANCE, TOLERANCE_16, apart, compare, failure, plans, speed, written
from sft.testing import make_model, read_metrics, write_data

LIMIT = 600
"""Seconds after which a run is ended."""
STEPS, SAVED, KILLED = 10, 5, 7
WIDE, NARROW = (1e-4, TOLERANCE, 0.05), (TOLERANCE_16, TOLERANCE_16, 0.2)
"""In float32 and in 16 bits how far losses and norms may be apart, and weights: of the largest value, and of what
training has changed."""
ROOT = Path(__file__).parents[1]
COMMON = {
    **{
        "max_steps": STEPS,
        "logging_steps": 1,
        "do_eval": False,
        "disable_tqdm": True,
        "max_length": 64,
        "src_length": 32,
    },
    **{"learning_rate": 1e-3, "adam_epsilon": 1e-3, "sharding_comm_buffer_size_MB": 1, "parallel_timeout": 120},
    "plugin": ["parallel-4d"],
}
SAVES = {"save_strategy": "steps", "save_steps": SAVED}
KINDS: dict[str, dict[str, Any]] = {
    "float32": SAVES,
    "bf16": {"bf16": True, "fp16_opt_level": "O2", "require_precision": True},
    "lora": {"plugin": ["parallel-4d", "lora", "zero-padding"]},
    "experts": SAVES,
}
KILL = """
import os, signal
from pathlib import Path
import sft


class Kill(sft.Plugin):
    name, api_version = "kill", 1

    @sft.hookimpl
    def sft_step_ended(self, run, record):
        once = Path({once!r})
        if record["step"] == {step} and os.environ.get("PADDLE_TRAINER_ID") == "{rank}" and not once.exists():
            once.touch()
            os.kill(os.getpid(), signal.SIGKILL)
"""
COLLECTIVES = """
import sys
from sft_parallel_4d.launch import start

start(["collectives", sys.argv[1]], int(sys.argv[2]), print, on_cpu=sys.argv[1] == "cpu")
"""
FACTS = """
import json
from sft import runtime
from sft.gpu_facts import gpu_facts

runtime.prepare()
runtime.use_device("gpu")
print(json.dumps(gpu_facts()))
"""


@dataclass(frozen=True)
class Trained:
    """A run to hold against that of one GPU: of which kind, and what else there is to say of it."""

    kind: str
    folder: Path
    note: str = ""


class Checks:
    """Those of ``gpus`` devices; what they write is below ``scratch``."""

    def __init__(self, scratch: Path, gpus: int, device: str) -> None:
        self.gpus, self.device = gpus, device
        self._scratch, self._count = scratch, 0
        self._known: dict[tuple[str, str], Path] = {}
        self._moved: dict[str, float] = {}
        shape = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4}
        dense = make_model(scratch / "dense", num_hidden_layers=max(4, 2 * gpus), **shape)
        self._models = dict.fromkeys(KINDS, dense) | {"experts": mixture(scratch / "experts", **shape)}
        self._data = words(scratch / "data")
        some = {f"stage3x{gpus}", f"tp{gpus}+sequence", f"pp{gpus}", f"cp{gpus}"}
        every = plans(gpus)
        self.plans = {
            "float32": every,
            "bf16": every,
            "lora": {name: plan for name, plan in every.items() if name in some},
            "experts": {name: plan for name, plan in plans(gpus, True).items() if name not in every},
        }

    def rows(self) -> dict[str, Callable[[], Trained | str]]:
        """By name: what makes a run, or says that all is well. Whoever finds it not so raises :class:`RuntimeError`."""
        found: dict[str, Callable[[], Trained | str]] = {"collectives": self.collectives}
        for kind, chosen in self.plans.items():
            for plan in chosen:
                found[f"{kind}: {plan}"] = lambda kind=kind, plan=plan: Trained(kind, self.trained(kind, plan))
        all_of = self.gpus
        one = ["one", f"stage1x{all_of}", f"tp{all_of}+sequence", f"pp{all_of}", f"stage3x{all_of}", f"cp{all_of}"]
        one += [f"stage2x{all_of} offload", f"pp{all_of}x2", "one"]
        for kind, chain in (("float32", one), ("experts", ["one", *self.plans["experts"], "one"])):
            group = "resumed" if kind == "float32" else f"resumed {kind}"
            for old, new in pairwise(chain):
                found[f"{group}: {old} → {new}"] = lambda kind=kind, old=old, new=new: self.resumed(kind, old, new)
        for plan, rank in ((f"dp{all_of}", all_of - 1), (f"stage3x{all_of}", 0)):
            found[f"killed: rank {rank} of {plan}"] = lambda plan=plan, rank=rank: self.killed(plan, rank)
        for plan in (f"dp{all_of}", f"stage3x{all_of}"):
            found[f"launchers: {plan}"] = lambda plan=plan: self.launchers(plan)
        return found

    def trained(self, kind: str, plan: str) -> Path:
        """The folder of a run, which is made once."""
        if (kind, plan) not in self._known:
            self._known[kind, plan] = self._train(kind, plan)
        return self._known[kind, plan]

    def resumed(self, kind: str, old: str, new: str) -> Trained:
        begun = self.trained(kind, old)
        folder = self._train(kind, new, resume_from_checkpoint=str(begun / f"checkpoint-{SAVED}"))
        if read_metrics(folder)[:SAVED] != read_metrics(begun)[:SAVED]:  # with the seconds that each step took
            raise RuntimeError("it has begun anew")
        return Trained(kind, folder)

    def killed(self, plan: str, rank: int) -> Trained:
        path = self._new("kill").with_suffix(".py")
        once = path.with_suffix(".once")
        path.write_text(KILL.format(once=str(once), step=KILLED, rank=rank), encoding="utf-8")
        folder = self._train("float32", plan, plugin=["parallel-4d", str(path)], max_restarts=1)
        events = sft.read_report(folder).get("of_plugins", {}).get("parallel-4d", {}).get("restarts", [])
        if [(event["lost"], event["from_step"]) for event in events] != [([rank], SAVED)]:
            known = [{name: event[name] for name in ("lost", "from_step")} for event in events]
            raise RuntimeError(f"of rank {rank}, killed after step {KILLED}, its run remembers {known}")
        return Trained("float32", folder, note=f"{events[0]['of'] - 1 - events[0]['left_out']} went on")

    def launchers(self, plan: str) -> Trained:
        """As on two machines. NCCL is kept from the memory of the one that it is, so that it takes its sockets."""
        data_ranks, settings = self._settings("float32", plan)
        folder = self._new("launchers")
        path = written(folder, data_ranks, settings)
        with socket.socket() as free:
            free.bind(("", 0))
            port = free.getsockname()[1]
        command = [sys.executable, "-m", "paddle.distributed.launch", "--master", f"127.0.0.1:{port}", "--nnodes", "2"]
        command += ["--nproc_per_node", str(self.gpus // 2), "--max_restart", "0", "-m", "sft", "run", str(path)]
        started = []
        for number in range(2):
            own = self._new("launcher")
            own.mkdir()
            with (own / "said").open("wb") as said:
                one = subprocess.Popen(command, cwd=own, env=self._half(number), stdout=said, stderr=said)
            started.append((own, one))
        deadline = time.monotonic() + LIMIT
        try:
            for own, one in started:
                if one.wait(max(0, deadline - time.monotonic())):
                    said = "\n".join(
                        path.read_text("utf-8", "replace") for path in (own / "said", *own.glob("log/work*"))
                    )
                    raise failure(one.returncode, said)
        except subprocess.TimeoutExpired as late:
            raise RuntimeError(f"not done after {LIMIT} s") from late
        finally:
            for _, one in started:
                one.terminate()  # it ends what it has started
                try:
                    one.wait(60)
                except subprocess.TimeoutExpired:
                    one.kill()
        return Trained("float32", folder)

    def collectives(self) -> str:
        """Which tests/gpu/collectives.py holds to numpy."""
        path = os.pathsep.join(filter(None, [str(ROOT / "tests" / "gpu"), os.environ.get("PYTHONPATH")]))
        command = [sys.executable, "-c", COLLECTIVES, self.device, str(self.gpus)]
        environment = {**os.environ, "PYTHONPATH": path}
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LIMIT)
        except subprocess.TimeoutExpired as late:
            raise RuntimeError(f"not done after {LIMIT} s") from late
        types = [line.partition(":")[0] for line in done.stdout.splitlines() if "are exact" in line]
        if done.returncode or len(types) != (5 if self.device == "gpu" else 3):
            raise RuntimeError((done.stderr.strip().splitlines() or [f"exact are {types} alone"])[-1])
        return f"exact: {', '.join(types)}"

    def held(self, run: Trained) -> tuple[tuple[float, float, float], bool]:
        """How far losses, gradient norms and weights of ``run`` are from one GPU's, and whether that is too far."""
        losses, weights, share = NARROW if run.kind == "bf16" else WIDE
        distances = compare(self.trained(run.kind, "one"), run.folder)
        limits = (losses, losses, min(weights, share * self.moved(run.kind)))
        return distances, not all(value <= limit for value, limit in zip(distances, limits, strict=True))

    def moved(self, kind: str) -> float:
        """How far training on one GPU has moved half of the tensors at least, of their largest value. Adapters begin as
        nearly nothing."""
        if kind == "lora":
            return 1.0
        if kind not in self._moved:
            self._moved[kind] = float(np.median(apart(self._models[kind], self.trained(kind, "one"))))
        return self._moved[kind]

    def _train(self, kind: str, plan: str, **more: Any) -> Path:
        data_ranks, settings = self._settings(kind, plan)
        processes = 1 if plan == "one" else self.gpus
        return parallel_gpu.train(self._new(kind), processes, data_ranks, {**settings, **more}, LIMIT)

    def _settings(self, kind: str, plan: str) -> tuple[int, dict[str, Any]]:
        """How many data ranks, and the settings of a run."""
        data_ranks, changes = (1, {}) if plan == "one" else self.plans[kind][plan]
        places = {"model_name_or_path": str(self._models[kind]), "dataset_name_or_path": str(self._data)}
        rows = parallel_gpu.ROWS_PER_GPU * self.gpus
        return data_ranks, {**COMMON, **places, "device": self.device, "rows": rows, **KINDS[kind], **changes}

    def _new(self, name: str) -> Path:
        self._count += 1
        return self._scratch / f"{self._count}-{name}"

    def _half(self, number: int) -> dict[str, str]:
        """What launcher ``number`` finds in its environment: half of the devices."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PADDLE_")}
        visible = environment.pop("CUDA_VISIBLE_DEVICES", "") or ",".join(map(str, range(self.gpus)))
        if self.device == "gpu":
            half = self.gpus // 2
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(visible.split(",")[number * half :][:half])
        environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", "")])
        own = {"NCCL_P2P_DISABLE": "1", "NCCL_SHM_DISABLE": "1", "NVIDIA_TF32_OVERRIDE": "0"}
        return {**environment, **own, "SFT_LAUNCH_TOKEN": "of this check", "OMP_NUM_THREADS": "1"}


def words(folder: Path) -> Path:
    """Records of several lengths, whose answers nobody can guess."""
    rng, some = np.random.default_rng(0), "a coat for you in red or blue and green with wool of Bergen".split()
    counts = rng.integers(1, 20, (64, 2))
    return write_data(
        folder, [{"src": " ".join(rng.choice(some, a)), "tgt": " ".join(rng.choice(some, b))} for a, b in counts]
    )


def mixture(folder: Path, experts: int = 4, **shape: Any) -> Path:
    """A Mixtral of four layers: a Llama, of whose MLP each layer has several."""
    more = {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "tie_word_embeddings": False}
    more |= {"num_local_experts": experts, "num_experts_per_tok": 2, "sliding_window": None}
    make_model(folder, num_hidden_layers=4, **shape, **more)
    names = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
    tensors: dict[str, np.ndarray] = {}
    rng = np.random.default_rng(1)
    for name, values in load_file(folder / "model.safetensors").items():
        block, _, matrix = name.partition(".mlp.")
        if not matrix:
            tensors[name] = values
            continue
        gate = rng.standard_normal((experts, shape["hidden_size"]), np.float32)
        tensors[f"{block}.block_sparse_moe.gate.weight"] = gate / np.float32(np.sqrt(shape["hidden_size"]))
        for expert in range(experts):
            own = f"{block}.block_sparse_moe.experts.{expert}.{names[matrix.split('.')[0]]}.weight"
            tensors[own] = rng.permutation(values.ravel()).reshape(values.shape)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def lines(checks: Checks, wanted: list[str]) -> Iterator[tuple[str, bool]]:
    """Each row of the table, and whether it is good."""
    rows, shown = checks.rows(), set[str]()
    for name in wanted:
        try:
            found = rows[name]()
            if isinstance(found, str):
                yield f"{name:44}{found}", True
                continue
            distances, off = checks.held(found)
            if found.kind not in shown:
                shown.add(found.kind)
                moved = "" if found.kind == "lora" else f"{checks.moved(found.kind):.1e}"
                one = speed(checks.trained(found.kind, "one"))
                yield (
                    "{:44}{:>10}{:>10}{:>10}{:>12,.0f}{:>9,}".format(f"{found.kind}: one", "", "moved", moved, *one),
                    True,
                )
            figures = "".join(f"{value:>10.1e}" for value in distances)
            rate, peak = speed(found.folder)
            note = "  APART" if off else f"  {found.note}".rstrip()
            yield f"{name:44}{figures}{rate:>12,.0f}{peak:>9,}{note}", not off
        except RuntimeError as error:  # one with which sft refuses a plan too: these models are made to suit all
            yield f"{name:44}FAILED: {error}", False


def devices(kind: str) -> tuple[int, str]:
    """How many there are, and a line about them; :class:`sft.UsageError` where there is none."""
    if kind == "cpu":
        return 2, "CPUs, and Paddle's gloo"
    done = subprocess.run([sys.executable, "-c", FACTS], capture_output=True, text=True)  # this process takes no GPU
    if done.returncode:
        raise sft.UsageError(done.stderr.strip().rpartition("\n")[2].rpartition("Error: ")[2])
    facts = json.loads(done.stdout.strip().rpartition("\n")[2])
    return facts["count"], ", ".join(f"{name} {value}" for name, value in facts.items())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("gpu", "cpu"), default="gpu")
    parser.add_argument("--gpus", type=int, choices=(2, 4, 8), help="so many; unset: all, but a power of two, up to 8")
    parser.add_argument("--only", default="", help="lines, or what they begin with, separated by commas")
    given = parser.parse_args()
    try:
        count, told = devices(given.device)
    except sft.UsageError as error:
        parser.error(str(error))
    gpus = given.gpus or max((some for some in (2, 4, 8) if some <= count), default=2)
    if gpus > count and given.device == "gpu":
        parser.error(f"{gpus} GPUs are needed, and this machine has {count}.")
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        checks = Checks(Path(scratch), gpus, given.device)
        names = list(checks.rows())
        begins = tuple(part.strip() for part in given.only.split(",") if part.strip())
        unknown = [part for part in begins if not any(name.startswith(part) for name in names)]
        if unknown:
            parser.error(f"--only: no line begins with {', '.join(unknown)}; there are {', '.join(names)}")
        wanted = [name for name in names if not begins or name.startswith(begins)]
        print(f"{told}\n{'':44}{'loss':>10}{'norm':>10}{'weights':>10}{'tokens/s':>12}{'MiB':>9}", flush=True)
        off = 0
        for line, good in lines(checks, wanted):
            off += not good
            print(line, flush=True)
    print(f"{len(wanted)} checks on {gpus} devices in {time.monotonic() - began:.0f} s: {off or 'none'} off")
    return 1 if off else 0


if __name__ == "__main__":
    sys.exit(main())
