"""What PEFT computes with DoRA is computed here, and what is written here is PEFT's. The distribution is installed."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import FIXTURES
from safetensors.numpy import load_file, save_file

import sft
from sft.testing import load

CASES = ["llama", "qwen2-qv-rs"]
TOLERANCE = 2e-5  # float32 noise of logits of up to 10; the adapters move some logit by more than 3


def merge(base, adapter, output):
    line = ["merge", "--model_name_or_path", base, "--adapter_path", adapter, "--output_path", output]
    subprocess.run([sys.executable, "-m", "sft", *map(str, line)], check=True)


def dora_layers(model):
    """Adapted layers by their name in PEFT's files."""
    return {
        "base_model.model.model." + path.partition(".")[2]: layer
        for path, layer in model.named_sublayers()
        if hasattr(layer, "magnitude")
    }


@pytest.mark.parametrize("case", CASES)
def test_logits_are_pefts(paddle, base_of, logits_of, case):
    expected = load_file(FIXTURES / case / "reference.safetensors")
    found = logits_of(load(base_of(case), FIXTURES / case), expected["input_ids"])
    np.testing.assert_allclose(found, expected["logits"], atol=TOLERANCE, rtol=0)
    assert np.abs(logits_of(load(base_of(case)), expected["input_ids"]) - found).max() > 3


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_pefts(paddle, base_of, case):
    """Of A and B, for which the norm is a constant, and of the magnitudes."""
    from sft.parallel import hidden_states

    expected = load_file(FIXTURES / case / "reference.safetensors")
    (ids,) = expected["input_ids"]
    model = load(base_of(case), FIXTURES / case)
    batch = sft.assemble([[sft.Example(ids[:-1], ids[1:])]], pad_id=0)
    logits = model.lm_head(hidden_states(model, batch))
    loss = paddle.nn.functional.cross_entropy(logits[0], paddle.to_tensor(ids[1:]), reduction="sum")
    loss.backward()
    assert float(loss) == pytest.approx(float(expected["loss"][0]), rel=1e-5)
    layers = dora_layers(model)
    assert len(layers) == {"llama": 14, "qwen2-qv-rs": 4}[case]
    for name, layer in layers.items():
        for key, gradient in (
            ("lora_A.weight", layer.lora_A.grad.numpy().T),
            ("lora_B.weight", layer.lora_B.grad.numpy().T),
            ("lora_magnitude_vector", layer.magnitude.grad.numpy()),
        ):
            theirs = expected[f"{name}.{key}"]
            np.testing.assert_allclose(gradient, theirs, atol=1e-5 * np.abs(theirs).max(), rtol=1e-4, err_msg=name)


@pytest.mark.parametrize("case", CASES)
def test_merging_gives_pefts_merged_model(paddle, base_of, tmp_path, logits_of, case):
    expected = load_file(FIXTURES / case / "reference.safetensors")
    merge(base_of(case), FIXTURES / case, tmp_path / "merged")
    found = logits_of(load(tmp_path / "merged"), expected["input_ids"])
    np.testing.assert_allclose(found, expected["merged_logits"], atol=TOLERANCE, rtol=0)


def test_a_new_adapter_begins_as_its_base(adapt, base_model, logits_of):
    ids = np.arange(4, 24)[None]
    model = adapt(plugin=["dora"]).model
    np.testing.assert_allclose(logits_of(model, ids), logits_of(load(base_model), ids), atol=TOLERANCE, rtol=0)
    assert len(dora_layers(model)) == 14


def test_what_is_written_is_pefts_and_the_trained_model(train, base_model, tmp_path, logits_of):
    ids, trained = np.arange(4, 24)[None], []

    class Look(sft.Plugin):
        name = "look"
        api_version = 1

        @sft.hookimpl
        def sft_run_ended(self, run, summary):
            trained.append(logits_of(run.model, ids))

    summary = train(plugins=(Look,), dora_rank=4, dora_alpha=8)
    assert summary.train_loss_last < summary.train_loss_first
    both = tmp_path / "out", FIXTURES / "llama"
    written, theirs = (load_file(folder / "adapter_model.safetensors") for folder in both)
    assert {n: (t.shape, t.dtype) for n, t in written.items()} == {n: (t.shape, t.dtype) for n, t in theirs.items()}
    config, of_peft = (json.loads((folder / "adapter_config.json").read_text()) for folder in both)
    differ = {"base_model_name_or_path"}
    assert {k: v for k, v in config.items() if k not in differ} == {k: of_peft[k] for k in config if k not in differ}
    assert config["use_dora"]
    np.testing.assert_array_equal(logits_of(load(base_model, tmp_path / "out"), ids), trained[0])
    merge(base_model, tmp_path / "out", tmp_path / "merged")
    np.testing.assert_allclose(logits_of(load(tmp_path / "merged"), ids), trained[0], atol=TOLERANCE, rtol=0)
    assert np.abs(logits_of(load(base_model), ids) - trained[0]).max() > 0.1


def test_a_resumed_run_is_the_run_that_was_not_stopped(train, tmp_path):
    train("whole")
    train("stopped", save_strategy="steps", save_steps=2)
    shutil.rmtree(tmp_path / "stopped" / "checkpoint-4", ignore_errors=True)
    train("stopped", save_strategy="steps", save_steps=2, resume_from_checkpoint="auto")
    whole, resumed = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "stopped"))
    assert whole.keys() == resumed.keys()
    assert all(whole[name].tobytes() == resumed[name].tobytes() for name in whole)


def test_it_stands_on_paper_as_it_is(adapt, base_model):
    settings = {"plugin": ["dora"], "dora_rank": 3, "dora_target_modules": ["q_proj", "down_proj"]}
    trained = sum(int(p.size) for p in adapt(**settings).model.parameters() if not p.stop_gradient)
    paper = pytest.importorskip("sft_parallel_4d.paper")
    assert paper.outline({"model_name_or_path": str(base_model), **settings}).outline.count()[1] == trained


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("bias", "all"),
        ("rank_pattern", {"q_proj": 2}),
        ("modules_to_save", ["lm_head"]),
        ("init_lora_weights", "pissa"),
    ],
)
def test_more_than_dora_is_refused_and_not_left_out(base_model, tmp_path, key, value):
    folder = tmp_path / "adapter"
    shutil.copytree(FIXTURES / "llama", folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(sft.UsageError, match=f"plugin dora does not know {key}"):
        load(base_model, folder)


@pytest.mark.parametrize("key", ["lora_A.weight", "lora_B.weight", "lora_magnitude_vector"])
def test_a_damaged_folder_is_refused(base_model, tmp_path, key):
    folder = tmp_path / "adapter"
    shutil.copytree(FIXTURES / "llama", folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    del tensors[f"base_model.model.model.layers.0.mlp.up_proj.{key}"]
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(sft.UsageError, match=r"the tensors of model\.layers\.0\.mlp\.up_proj are not complete"):
        load(base_model, folder)
