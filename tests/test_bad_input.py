"""Bad input: each mistake is one sentence with exit code 2, told before anything is written."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file, save_file

import sft

MODELS = Path(__file__).parent.parent / "core" / "tests" / "fixtures" / "models"
RECORD = '{"src": "What is a river?", "tgt": "Water."}\n'
SFT = Path(sys.executable).with_name("sft")


def everything_below(folder: Path) -> dict[str, bytes]:
    """Each file below ``folder``, and what it holds."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else b"" for p in sorted(folder.rglob("*"))}


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A folder with a model, a data set of 20 records, and nothing else; commands are typed in it."""
    files = shutil.ignore_patterns("*reference*")
    shutil.copytree(MODELS / "llama-tied-gqa", tmp_path / "model", ignore=files)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.json").write_text(RECORD * 20, encoding="utf-8")
    return tmp_path


SETTINGS = {"model_name_or_path": "model", "dataset_name_or_path": "data", "output_dir": "out"}


@pytest.fixture
def typed(work: Path) -> Callable[..., str]:
    """What ``sft ...`` says on standard error, having failed with exit code 2 and written nothing."""

    def run(*arguments: str, path: Path | None = None) -> str:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(path or "")}
        before = everything_below(work)
        done = subprocess.run(
            [str(SFT), *arguments], capture_output=True, text=True, cwd=work, env=environment, timeout=60
        )
        assert done.returncode == 2, done
        assert everything_below(work) == before
        assert done.stderr.startswith("sft: ")
        assert done.stderr.count("\n") == 1
        assert done.stderr.endswith("\n")
        return done.stderr.removeprefix("sft: ").rstrip("\n")

    return run


@pytest.fixture
def refused(work: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """What ``sft.run`` raises with these settings, having written nothing; a value of None takes a setting away.

    This is what the command line prints (``typed`` shows that), without a process of its own for each case.
    """
    monkeypatch.chdir(work)

    def run(**changed: Any) -> str:
        settings = {name: value for name, value in {**SETTINGS, **changed}.items() if value is not None}
        before = everything_below(work)
        with pytest.raises(sft.UsageError) as caught:
            sft.run(settings, say=lambda text: None)
        assert everything_below(work) == before
        message = str(caught.value)
        assert "\n" not in message
        return message

    return run


def arguments(**changed: str) -> list[str]:
    return [part for name, value in {**SETTINGS, **changed}.items() for part in (f"--{name}", value)]


# --- typed, in a process of its own -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model_name_or_path": "./missing"}, "Model ./missing does not exist; give model_name_or_path a model direct"),
        ({"dataset_name_or_path": "missing"}, "Data missing does not exist; give dataset_name_or_path an existing"),
        ({"learning_rat": "1e-4"}, "Unknown setting learning_rat; did you mean learning_rate?"),
        ({"plugin": "lorra"}, "Plugin lorra is not installed (installed: "),
        ({"max_steps": "many"}, "max_steps: expected a whole number of at least -1, got 'many'."),
        ({"learning_rate": ""}, "learning_rate: expected a number of at least 0, got ''."),
        ({"model_name_or_path": "nobody/nothing"}, "Model nobody/nothing is not a directory here and could not be dow"),
        (
            {"output_dir": "model"},
            "output_dir model contains model_name_or_path model, which would be overwritten; chang",
        ),
        ({"output_dir": "data/train.json"}, "output_dir data/train.json: data/train.json is a file; give a folder."),
        ({"output_dir": "data/train.json/out"}, "output_dir data/train.json/out: data/train.json is a file; give a fo"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_wrong_settings(typed: Callable[..., str], changed: dict[str, str], message: str) -> None:
    assert typed("run", *arguments(**changed)).startswith(message)


def test_a_missing_required_setting(typed: Callable[..., str]) -> None:
    assert typed("run", "--model_name_or_path", "model", "--output_dir", "out") == (
        "dataset_name_or_path is not set; add --dataset_name_or_path VALUE or put it into the settings file."
    )


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("missing.json", None, "Settings file missing.json cannot be read ("),
        ("broken.json", '{"seed": 1,\n}', "Settings file broken.json is not valid JSON ("),
        ("broken.yaml", "seed: [1\n", "Settings file broken.yaml is not valid YAML ("),
    ],
)
def test_settings_files(typed: Callable[..., str], work: Path, name: str, text: str | None, message: str) -> None:
    if text is not None:
        (work / name).write_text(text, encoding="utf-8")
    assert typed("run", name, *arguments()).startswith(message)


def test_a_line_that_is_not_json(typed: Callable[..., str], work: Path) -> None:
    (work / "data" / "train.json").write_text(RECORD * 16 + '{"src": "a"\n' + RECORD, encoding="utf-8")
    assert typed("run", *arguments()).startswith("data/train.json, line 17 is not JSON (")


def test_a_plugin_that_cannot_be_imported(typed: Callable[..., str], work: Path) -> None:
    info = work / "site" / "sft_test_broken-0.3.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: sft-test-broken\nVersion: 0.3\n")
    (info / "entry_points.txt").write_text("[sft.plugins]\nbroken = sft_test_broken:Broken\n")
    (work / "site" / "sft_test_broken.py").write_text("import no_such_module\n")
    assert typed("run", "--plugin", "broken", *arguments(), path=work / "site") == (
        "Plugin broken of sft-test-broken 0.3 cannot be imported (ModuleNotFoundError: No module named "
        "'no_such_module'); pip install --upgrade --force-reinstall sft-test-broken, or leave the plugin out."
    )


def test_an_output_folder_that_holds_another_run(typed: Callable[..., str], work: Path) -> None:
    (work / "out").mkdir()
    (work / "out" / "run.json").write_text('{"status": "finished"}')
    (work / "out" / "model.safetensors").write_bytes(b"precious")
    assert typed("run", *arguments()) == (
        "output_dir out already holds a run; choose another folder, continue it with "
        "--resume_from_checkpoint auto, or replace it with --overwrite_output_dir."
    )


def test_names_of_layers_that_are_not_there(typed: Callable[..., str]) -> None:
    message = typed("run", "--plugin", "lora", *arguments(lora_target_modules="q_proj,w_pack"))
    assert message == (
        "Target 'w_pack' matches no layer; this model has q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, "
        "down_proj in each block (for example model.layers.0.self_attn.q_proj)."
    )


# --- given to sft.run ---------------------------------------------------------------------------------------


def test_these_settings_are_right(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the mistakes of this file, the run succeeds: each of them is what it is refused for."""
    monkeypatch.chdir(work)
    summary = sft.run({**SETTINGS, "max_steps": 1}, say=lambda text: None)
    assert summary.steps == 1
    assert (work / "out" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            '{"src": "a"}',
            'data/train.json, line 18: the record has no "tgt" (its keys: src); each needs "src" and "tgt',
        ),
        ('{"src": "a", "tgt": " "}', 'data/train.json, line 18: "tgt" is empty; remove the record or give it an answ'),
        ('["a", "b"]', "data/train.json, line 18 holds list, not a JSON object"),
        ('{"src": ["a", "b"], "tgt": ["c"]}', 'data/train.json, line 18: "src" has 2 turns and "tgt" has 1'),
    ],
)
def test_a_wrong_record(refused: Callable[..., str], work: Path, line: str, message: str) -> None:
    (work / "data" / "train.json").write_text(RECORD * 17 + line + "\n" + RECORD, encoding="utf-8")
    assert refused().startswith(message)


def test_a_wrong_record_of_the_dev_data(refused: Callable[..., str], work: Path) -> None:
    (work / "data" / "dev.json").write_text(RECORD + "{}\n", encoding="utf-8")
    assert refused().startswith("data/dev.json, line 2: the record is in no known format (its keys: none); known are")


def test_an_empty_train_file(refused: Callable[..., str], work: Path) -> None:
    (work / "data" / "train.json").write_text("")
    assert refused() == "data/train.json is empty; it needs at least one JSON object on a line."


def test_a_folder_without_training_data(refused: Callable[..., str], work: Path) -> None:
    (work / "data" / "train.json").rename(work / "data" / "all.json")
    assert refused().startswith("data has no training data; it needs train.json, train.jsonl or train/*.json")


def test_evaluation_without_dev_data(refused: Callable[..., str], work: Path) -> None:
    (work / "data" / "train.json").write_text("not even read")
    assert refused(evaluation_strategy="epoch").startswith("Evaluation is asked for, and data has no dev data in use;")
    assert refused(do_eval=True).startswith("Evaluation is asked for, and data has no dev data in use;")


def test_a_template_that_leaves_no_target(refused: Callable[..., str], work: Path) -> None:
    """It writes the answer alone, and of an answer of one token nothing is learned: nothing stands before it."""
    (work / "data" / "train.json").write_text('{"src": "a", "tgt": "b"}', encoding="utf-8")
    (work / "answer.jinja").write_text("{% generation %}{{ messages[-1].content }}{% endgeneration %}")
    assert refused(chat_template="answer.jinja") == (
        "No train record keeps a target, not one token of an answer that has another before it; check the data and the "
        "chat template, or raise max_length."
    )


def test_records_longer_than_the_model_reads(refused: Callable[..., str], work: Path) -> None:
    (work / "data" / "train.json").write_text(RECORD + RECORD.replace("river", "river " * 30), encoding="utf-8")
    message = refused()
    assert message.startswith("A record has ")
    assert (
        " tokens and model reads at most 65, the last of which is only predicted (max_position_embeddings, or a"
        in message
    )


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_output_folder_that_cannot_be_made(refused: Callable[..., str], work: Path) -> None:
    (work / "locked").mkdir(mode=0o500)
    assert refused(output_dir="locked/out") == "output_dir locked/out: locked is not writable; give another folder."


@pytest.mark.parametrize("folder", ["nowhere", "data"])
def test_a_checkpoint_that_is_none(refused: Callable[..., str], folder: str) -> None:
    assert refused(resume_from_checkpoint=folder) == (
        f"{folder} is not a checkpoint of sft (no trainer/state.json); give a checkpoint-N folder or auto."
    )


def test_an_adapter_folder_that_is_none(refused: Callable[..., str]) -> None:
    assert refused(plugin=["lora"], lora_path="data") == "lora_path data holds no adapter (no adapter_config.json)."


def test_a_setting_of_a_plugin_that_is_not_requested(refused: Callable[..., str]) -> None:
    assert refused(lora_rank=4) == "Unknown setting lora_rank; if it belongs to plugin lora, add --plugin lora."


# --- model directories --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tokenizer.json", "model has no tokenizer.json; write one with transformers: "),
        ("config.json", "model has no config.json; give a model directory in Hugging Face or Paddle layout."),
        (
            "model.safetensors",
            "model has no weights; it needs model.safetensors (or its shards and index), or with allow",
        ),
    ],
)
def test_a_model_directory_without_one_of_its_files(
    refused: Callable[..., str], work: Path, name: str, message: str
) -> None:
    (work / "model" / name).unlink()
    assert refused().startswith(message)


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "model.safetensors"])
def test_a_model_directory_with_a_broken_file(refused: Callable[..., str], work: Path, name: str) -> None:
    (work / "model" / name).write_bytes(b"{")
    assert refused().startswith(f"model/{name} ")


def change_config(work: Path, **values: Any) -> None:
    path = work / "model" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "gpt2"}, "model: model_type 'gpt2' is not a family that is known here; use one of llama, "),
        ({"model_type": None}, "model: model_type None is not a family that is known here; use one of llama, "),
        ({"head_dim": 16}, "model: tensor model.layers.0.self_attn.q_proj.weight has shape [32, 32], which does"),
        ({"vocab_size": 300}, "model: its tokenizer has 320 tokens, its model 300; they do not belong together."),
        ({"num_hidden_layers": 3}, "model lacks tensors model.layers.2."),
        ({"num_hidden_layers": 1}, "model holds unknown tensors model.layers.1."),
        (
            {"tie_word_embeddings": False},
            "model lacks tensors lm_head.weight; weights and config.json do not belong tog",
        ),
        ({"intermediate_size": 64}, "model: tensor model.layers.0.mlp.gate_proj.weight has shape [48, 32], which does"),
        ({"hidden_size": 64, "head_dim": 16}, "model: tensor model."),
    ],
    ids=str,
)
def test_config_and_weights_that_do_not_belong_together(
    refused: Callable[..., str], work: Path, values: dict[str, Any], message: str
) -> None:
    change_config(work, **values)
    assert refused().startswith(message)


def test_a_tensor_of_another_model(refused: Callable[..., str], work: Path) -> None:
    path = work / "model" / "model.safetensors"
    tensors = load_file(str(path))
    tensors["model.layers.0.self_attn.q_proj.bias"] = tensors["model.norm.weight"].copy()
    save_file(tensors, str(path))
    assert refused() == (
        "model holds unknown tensors model.layers.0.self_attn.q_proj.bias; weights and config.json do not belong "
        "together."
    )


def test_a_shard_that_is_not_there(refused: Callable[..., str], work: Path) -> None:
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (work / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert refused() == (
        "model lacks model-00001-of-00002.safetensors, named by model.safetensors.index.json; copy it there."
    )


@pytest.mark.parametrize("text", ["{", "{}", '{"weight_map": 3}', "[]"])
def test_an_index_that_is_none(refused: Callable[..., str], work: Path, text: str) -> None:
    (work / "model" / "model.safetensors.index.json").write_text(text)
    assert refused().startswith("model/model.safetensors.index.json is not an index of weights (")


# --- the other commands -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("rnu", "There is no command 'rnu'; `sft --help` lists the commands."),
        ("generate --prompt hello", "Missing option"),
        ("generate --model_name_or_path ./missing --prompt hello", "Model ./missing does not exist"),
        (
            "generate --model_name_or_path model --top_k -1 --prompt hello",
            "top_k: expected a whole number of at least 0, got '-1'",
        ),
        ("merge --model_name_or_path model --lora_path data --output_path out", "data "),
        ("plugins --xml", "No such option"),
    ],
)
def test_other_commands(typed: Callable[..., str], line: str, message: str) -> None:
    assert typed(*line.split()).startswith(message)
