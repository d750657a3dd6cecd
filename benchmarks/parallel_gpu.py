"""Does each way of dividing a run learn what one GPU learns, and how fast? For a machine with several GPUs.

    python benchmarks/parallel_gpu.py MODEL_DIR DATA_DIR --gpus 4

trains the same rows on one GPU and then under each plan that the model and the GPUs allow, by ``sft run --nproc``, and
prints one line a plan: how far its losses, gradient norms and saved weights are from those of one GPU, tokens a second
and peak memory of rank 0. A plan that is further away makes the exit code 1: of the largest value, than 1e-3 in float32
(the default; TF32 is switched off), and with ``--bf16``, which is O2, than 1e-2. So does a run that fails, but for the
sentences with which sft refuses a plan that does not suit the model or the settings.

AdamW's epsilon is 1e-3 here: with the usual one a value whose gradient is noise alone moves as far as any other. So is
the learning rate, so that in ten steps weights have moved by more than the tolerance. Compare a mixture in float32: in
16 bits a router's scores are rounded differently under each plan, and a token may go to another expert.

``--only tp2,stage2x4`` chooses plans; settings of ``sft run`` may follow after ``--``, such as ``-- --plugin lora``.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (teaches numpy bfloat16)
import numpy as np
from safetensors.numpy import load_file

import sft
from sft.testing import read_metrics

TOLERANCE, TOLERANCE_16 = 1e-3, 1e-2
"""How far a plan may be from one GPU, of the largest value: in float32, and in bfloat16 with O2."""
ROWS_PER_GPU = 4
REFUSALS = re.compile(
    r"sft: (rank \d+: )?("
    r"(tensor|context) parallel degree \d+ does not divide (attention heads|the intermediate size)"
    r"|tensor parallel degree \d+ (neither divides key/value heads|is more than )"
    r"|\d+ pipeline stages (of \d+ parts each )?are more than \d+ layers"
    r"|expert_parallel_degree \d+ does not divide the experts of a block"
    r"|Plugin \S+ minimises something for which each process needs "
    r"|The optimizer of plugin \S+ steps a parameter as a whole, "
    r"|The embedding or lm_head is adapted, or some of their rows train, "
    r"|\S+ is kept in pieces \(sharding stage3\), "
    r"|\S+ holds several matrices in one, and a quantized layer cannot be divided"
    r"|(qlora_weight_blocksize|weight_only_group_size) \d+ does not divide "
    r")"
)
"""How sft begins to say that a plan does not suit a model, or what ``--`` has asked for."""


class RefusedError(RuntimeError):
    """The plan is none for this model."""


def plans(gpus: int, has_experts: bool = False) -> dict[str, tuple[int, dict[str, Any]]]:
    """By name: how many data ranks, and the settings. What a model does not allow is refused by ``sft run`` itself."""
    found: dict[str, tuple[int, dict[str, Any]]] = {f"dp{gpus}": (gpus, {})}
    for stage in ("stage1", "stage2", "stage3"):
        found[f"{stage}x{gpus}"] = (gpus, {"sharding": stage})
    for stage in ("stage2", "stage3"):
        found[f"{stage}x{gpus} offload"] = (gpus, {"sharding": f"{stage} offload"})
    if has_experts and gpus % 2 == 0:
        half, experts = gpus // 2, {"expert_parallel_degree": 2}
        found[f"dp{gpus}+ep2"] = (gpus, experts)
        found["cp2+ep2" + (f" x dp{half}" if half > 1 else "")] = (half, {**experts, "context_parallel_degree": 2})
        if half > 1:
            found[f"dp2 x stage2x{half}+ep2"] = (gpus, {**experts, "sharding": "stage2"})
    for degree in (n for n in range(2, gpus + 1) if gpus % n == 0):
        left = gpus // degree
        name = f"x dp{left}" if left > 1 else ""
        tensor, pipeline = {"tensor_parallel_degree": degree}, {"pipeline_parallel_degree": degree}
        found[f"tp{degree} {name}".strip()] = (left, tensor)
        found[f"tp{degree}+sequence {name}".strip()] = (left, {**tensor, "sequence_parallel": True})
        found[f"pp{degree} {name}".strip()] = (left, pipeline)
        found[f"pp{degree}x2 {name}".strip()] = (left, {**pipeline, "virtual_pp_degree": 2})
        context = {"context_parallel_degree": degree}
        found[f"cp{degree} {name}".strip()] = (left, context)
        found[f"cp{degree} x stage3x{left}"] = (left, {**context, "sharding": "stage3"})
        if left > 1:
            found[f"tp{degree} x stage1x{left}"] = (left, {**tensor, "sharding": "stage1"})
            found[f"pp{degree} x stage1x{left}"] = (left, {**pipeline, "sharding": "stage1"})
            found[f"tp{degree} x pp{left}"] = (1, {**tensor, "pipeline_parallel_degree": left})
            found[f"cp{degree} x tp{left}"] = (1, {**context, "tensor_parallel_degree": left})
            found[f"cp{degree} x pp{left}"] = (1, {**context, "pipeline_parallel_degree": left})
    return found


def written(folder: Path, data_ranks: int, settings: dict[str, Any]) -> Path:
    """The settings of a run that writes into ``folder``, in a file."""
    rows = settings["rows"]
    values = {key: value for key, value in settings.items() if key != "rows"}
    values.update(output_dir=str(folder), gradient_accumulation_steps=rows // data_ranks, per_device_train_batch_size=1)
    path = folder.with_suffix(".json")
    path.write_text(json.dumps(values))
    return path


def train(folder: Path, processes: int, data_ranks: int, settings: dict[str, Any], limit: float | None = None) -> Path:
    """A run in a folder of its own; raises :func:`failure` if it fails, or after ``limit`` seconds."""
    path = written(folder, data_ranks, {**settings, **({"nproc": processes} if processes > 1 else {})})
    command, environment = [sys.executable, "-m", "sft", "run", str(path)], {**os.environ, "NVIDIA_TF32_OVERRIDE": "0"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=limit)
    except subprocess.TimeoutExpired as late:
        raise RuntimeError(f"not done after {limit:.0f} s") from late
    if done.returncode:
        raise failure(done.returncode, done.stderr or done.stdout)
    return folder


def failure(code: int, printed: str) -> RuntimeError:
    """What a run says that has ended with exit ``code``: a :class:`RefusedError` where sft has refused its plan."""
    lines = printed.strip().splitlines() or [f"no word, exit code {code}"]
    said = ([line for line in lines if line.startswith("sft: ")] or lines)[-1]
    return RefusedError(said) if code == sft.UsageError.exit_code and REFUSALS.match(said) else RuntimeError(said)


def has_experts(model: str) -> bool:
    """As its ``config.json`` says."""
    from sft_parallel_4d.paper import outline

    blocks = outline({"model_name_or_path": model}).outline.architecture.blocks
    return any(block.experts is not None for block in blocks)


def weights(folder: Path) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found.update(load_file(path))
    return found


def compare(one: Path, other: Path) -> tuple[float, float, float]:
    """The greatest relative difference of losses, of gradient norms, and of weights (of the largest of each tensor)."""
    lines, theirs = ([line for line in read_metrics(f) if "loss" in line] for f in (one, other))
    if [line["step"] for line in lines] != [line["step"] for line in theirs]:
        raise RuntimeError(f"{other} has other steps than {one}.")
    loss, norm = (
        float(np.max([abs(a[key] - b[key]) / abs(a[key]) for a, b in zip(lines, theirs, strict=True)]))
        for key in ("loss", "grad_norm")
    )
    return loss, norm, float(np.max(apart(one, other)))  # which a value that is not finite is not lost in


def apart(one: Path, other: Path) -> list[float]:
    """The greatest difference of each saved tensor, relative to the largest value of ``one``'s."""
    tensors, others = weights(one), weights(other)
    if set(tensors) != set(others):
        raise RuntimeError(f"{other} saved other tensors than {one}.")
    found = []
    for name, values in tensors.items():
        wide = values.astype(np.float32)
        largest = float(np.abs(wide).max()) or 1.0
        found.append(float(np.abs(wide - others[name].astype(np.float32)).max()) / largest)
    return found


def speed(folder: Path) -> tuple[float, int]:
    """Tokens a second without the first line, which holds the start, and the peak memory of rank 0 in MiB."""
    lines = [line for line in read_metrics(folder) if "loss" in line]
    timed = lines[1:] or lines
    return sum(line["tokens"] for line in timed) / sum(line["seconds"] for line in timed), lines[-1]["peak_memory_mib"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("--gpus", type=int, required=True)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--max_length", type=int, default=1024)
    parser.add_argument("--only", default="", help="names of plans, separated by commas; see the table")
    parser.add_argument("--bf16", action="store_true", help="train in O2, all weights in bfloat16")
    arguments = sys.argv[1:]
    end = arguments.index("--") if "--" in arguments else len(arguments)
    given = parser.parse_args(arguments[:end])
    settings: dict[str, Any] = {
        "model_name_or_path": given.model,
        "dataset_name_or_path": given.data,
        "max_steps": given.steps,
        "logging_steps": 1,
        "max_length": given.max_length,
        "src_length": given.max_length // 2,
        "do_eval": False,
        "disable_tqdm": True,
        "rows": ROWS_PER_GPU * given.gpus,
        "learning_rate": 1e-3,
        "adam_epsilon": 1e-3,
        **({"bf16": True, "fp16_opt_level": "O2", "require_precision": True} if given.bf16 else {}),
        **sft.collect(arguments[end + 1 :]),
    }
    tolerance = TOLERANCE_16 if given.bf16 else TOLERANCE
    chosen = plans(given.gpus, has_experts(given.model))
    wanted = [name.strip() for name in given.only.split(",") if name.strip()] or list(chosen)
    unknown = [name for name in wanted if name not in chosen]
    if unknown:
        parser.error(f"--only: no plan {', '.join(unknown)}; there are {', '.join(chosen)}")
    good = True
    print(f"{'plan':28}{'loss':>10}{'norm':>10}{'weights':>10}{'tokens/s':>12}{'MiB':>9}")
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        one = train(scratch / "one", 1, 1, settings)
        print("{:28}{:>10}{:>10}{:>10}{:>12,.0f}{:>9,}".format("one", "", "", "", *speed(one)), flush=True)
        for number, plan in enumerate(wanted):
            data_ranks, changes = chosen[plan]
            try:
                other = train(scratch / str(number), given.gpus, data_ranks, {**settings, **changes})
                distances = compare(one, other)
            except RuntimeError as error:
                refused = isinstance(error, RefusedError)
                good = good and refused
                print(f"{plan:28}{'refused' if refused else 'FAILED'}: {error}", flush=True)
                continue
            bad = not all(value <= tolerance for value in distances)
            good = good and not bad
            figures = "".join(f"{value:>10.1e}" for value in distances)
            rate, peak = speed(other)
            print(f"{plan:28}{figures}{rate:>12,.0f}{peak:>9,}{'  APART' if bad else ''}", flush=True)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
