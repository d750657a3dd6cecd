"""What is installed works, whichever of the distributions it is: environments made of wheels, without an index."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from environments import Environment, build_wheels
from installing import pyproject

from sft.testing import make_model, write_data

ROOT = Path(__file__).parents[1]
PACKAGES = sorted(path.parent for path in ROOT.glob("plugins/*/pyproject.toml"))
RECORDS = [{"src": f"type#{n}", "tgt": "A coat for you."} for n in range(12)]
RUN = ("run", "--max_steps", "2", "--learning_rate", "1e-3", "--logging_steps", "1", "--disable_tqdm", "true")

TRAINED_WITH = {
    "attn_flashmask": "--plugin flashmask",
    "data_hub": "--dataset_name_or_path hf://PLACE/owner/coats",
    "data_packing": "--plugin greedy-zero-padding",
    "export_gguf": "",  # a run leaves a model to export, below
    "early_stopping": "--plugin early-stopping --evaluation_strategy steps --eval_steps 1",
    "influence": "--save_strategy steps --save_steps 1",  # of a run that leaves checkpoints, below
    "kernels_cpu": "--plugin fast-cpu",
    "models_paddlenlp": "--plugin paddlenlp-models",
    "noise_neftune": "--plugin neftune",
    "objectives": "--plugin z-loss,label-smoothing --label_smoothing_factor 0.1",
    "optimizers": "--plugin muon,wsd",
    "parallel_4d": "--nproc 2 --tensor_parallel_degree 2",
    "peft_lora": "--plugin lora,dora,rslora",
    "peft_vera": "--plugin vera",
    "quant_nf4": "--plugin nf4",
    "track": "--report_to visualdl",
    "ui_board": "",  # it follows runs, and no run has it
}
"""By folder, what a run is given beside model and data, with which the distribution has something to do."""

REFUSED = {"quant_nf4": "adapter"}
"""By folder, of those that can do nothing alone, a word of the sentence that says so."""

LIBRARY = {"track": "visualdl"}
"""By folder, the extra of a distribution that can do nothing without one."""


def project(package: Path) -> dict[str, Any]:
    return pyproject(package)["project"]


def plugins_of(package: Path) -> list[str]:
    return sorted(project(package)["entry-points"]["sft.plugins"])


def test_each_plugin_is_an_extra_and_all_has_each_distribution() -> None:
    """``--plugin NAME`` that is not there is cured by ``pip install "paddle-sft[NAME]"``, with no table of names."""
    extras = project(ROOT)["optional-dependencies"]
    brought = {name: requirement for name, (requirement, *_) in extras.items()}
    others = {name: brought.pop(name) for name in ("all", "cpu", "gpu", "test", "dev")}
    assert set(others) == {"all", "cpu", "gpu", "test", "dev"}
    expected = {name: project(package)["name"] for package in PACKAGES for name in plugins_of(package)}
    assert {name: re.match(r"[\w-]+", text)[0] for name, text in brought.items()} == expected
    for package in PACKAGES:  # a library that has an extra of its own there, by the plugin's name, comes too
        for name in project(package).get("optional-dependencies", {}).keys() & set(plugins_of(package)):
            assert brought[name].startswith(f"{project(package)['name']}[{name}]")
    assert sorted(re.match(r"[\w-]+", text)[0] for text in extras["all"]) == sorted(set(expected.values()))
    assert sorted(TRAINED_WITH) == [package.name for package in PACKAGES]


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheels")
    return build_wheels([ROOT / "core", *PACKAGES], _meta(folder), tmp_path_factory.mktemp("sources"))


def _meta(folder: Path) -> Path:
    """The wheel of the distribution that the repository itself is, in ``folder``; it has no code."""
    root = folder.parent / f"{folder.name} root" / "paddle_sft"
    root.mkdir(parents=True)
    for name in ("pyproject.toml", "LICENSE"):
        (root / name).write_bytes((ROOT / name).read_bytes())
    return build_wheels([root], folder, folder.parent / f"{folder.name} copy")


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("material")
    make_model(folder / "model")
    write_data(folder / "data", RECORDS, RECORDS[:2])
    shards = folder / "owner" / "coats" / "data"
    shards.mkdir(parents=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(RECORDS), shards / "train-00000-of-00001.parquet")
    return folder


@pytest.fixture(scope="module")
def core_alone(wheels: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    environment = Environment(tmp_path_factory.mktemp("core"), ["sft-core[cpu]"], wheels)
    environment.install("sft-core[cpu]")
    return environment


def listed(environment: Environment) -> dict[str, Any]:
    """The rows of ``sft plugins`` by name, none of which is broken."""
    said = environment.sft("plugins", "--json")
    rows = {row["name"]: row for row in map(json.loads, said.splitlines())}
    assert [row for row in rows.values() if row.get("fault")] == []
    return rows


def train(environment: Environment, material: Path, output: str, *settings: str, code: int = 0) -> str:
    data = () if "--dataset_name_or_path" in settings else ("--dataset_name_or_path", str(material / "data"))
    line = (*RUN, "--model_name_or_path", str(material / "model"), *data, *settings, "--output_dir", output)
    said = environment.sft(*line, code=code)
    if code == 0:
        folder = environment.python.parents[1] / output
        assert json.loads((folder / "run.json").read_text(encoding="utf-8"))["status"] == "finished"
        steps = [json.loads(text) for text in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        assert [line["step"] for line in steps if "loss" in line] == [1, 2]
    return said


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_core_alone(core_alone: Environment, material: Path) -> None:
    assert listed(core_alone) == {}
    train(core_alone, material, "out")
    said = train(core_alone, material, "asked", "--plugin", "lora", code=2)
    assert "Plugin lora is not installed (installed: none); pip install 'paddle-sft[lora]' brings it" in said
    for setting, value in {
        "optim": "lion",
        "lr_scheduler_type": "wsd",
        "lora_rank": "8",
        "tensor_parallel_degree": "2",
    }.items():
        said = train(core_alone, material, "asked", f"--{setting}", value, code=2)
        assert setting in said
        assert "pip install 'paddle-sft[all]' brings those of the project" in said
    said = train(core_alone, material, "tracked", "--report_to", "wandb")
    assert "report_to wandb: no plugin is installed that brings it; pip install 'paddle-sft[all]'" in said


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.name)
def test_the_core_with_one(
    wheels: Path, material: Path, core_alone: Environment, tmp_path: Path, package: Path
) -> None:
    """It lists its plugins and trains; uninstalled, it leaves the core as it was, and what asks for it says so."""
    name, plugins = project(package)["name"], plugins_of(package)
    needed = ["sft-core[cpu]", f"{name}[{LIBRARY[package.name]}]" if package.name in LIBRARY else name]
    environment = Environment(tmp_path / "environment", needed, wheels)
    environment.install(*needed)
    assert sorted(listed(environment)) == plugins
    settings = TRAINED_WITH[package.name].replace("PLACE", str(material)).split()
    if package.name in REFUSED:
        assert REFUSED[package.name] in train(environment, material, "out", *settings, code=2)
        train(environment, material, "without")
    else:
        train(environment, material, "out", *settings)
    if package.name == "export_gguf":
        environment.sft("export", "--to", "gguf", "--model_name_or_path", "out", "--output_path", "exported")
    if package.name == "influence":
        said = environment.sft("why", "out", "--prompt", "type#1", "--answer", "A coat for you.")
        assert "helpful:" in said
    environment.uninstall(name)
    assert environment.files() == core_alone.files()
    assert listed(environment) == {}
    said = train(environment, material, "asked", "--plugin", plugins[0], code=2)
    assert f"Plugin {plugins[0]} is not installed (installed: none); pip install 'paddle-sft[{plugins[0]}]'" in said


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_all_of_them_and_one_less_at_a_time(wheels: Path, material: Path, tmp_path: Path) -> None:
    environment = Environment(tmp_path / "environment", ["paddle-sft[all,cpu]"], wheels)
    environment.install("paddle-sft[all,cpu]")
    left = list(PACKAGES)
    everything = sorted(plugin for package in left for plugin in plugins_of(package))
    assert sorted(listed(environment)) == everything
    while left:
        gone = left.pop(0)
        environment.uninstall(project(gone)["name"])
        assert sorted(listed(environment)) == sorted(plugin for package in left for plugin in plugins_of(package))
        settings = ["--plugin", "lora"] if any(package.name == "peft_lora" for package in left) else []
        train(environment, material, f"without-{gone.name}", *settings)
        plugin = plugins_of(gone)[0]
        said = train(environment, material, "asked", "--plugin", plugin, code=2)
        assert f"Plugin {plugin} is not installed (installed: " in said
        assert f"); pip install 'paddle-sft[{plugin}]' brings it." in said


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_extras_resolve_from_a_folder_of_wheels(wheels: Path, material: Path, tmp_path: Path) -> None:
    asked = "paddle-sft[lora,flashmask,cpu]"
    environment = Environment(tmp_path / "environment", [asked], wheels)
    environment.install(asked)
    brought = {row["distribution"] for row in listed(environment).values()}
    assert brought == {"sft-peft-lora", "sft-attn-flashmask"}
    train(environment, material, "out", "--plugin", "lora", "--flash_mask", "true")
