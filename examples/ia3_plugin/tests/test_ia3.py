"""What PEFT computes with (IA)³ is computed here, and what is written here is PEFT's. The distribution is installed."""

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

CASES = {"llama": 6, "qwen2": 14}  # adapted layers
TOLERANCE = 2e-5  # float32 noise of logits of up to 10; the adapters move some logit by more than 1


def merge(base, adapter, output):
    line = ["merge", "--model_name_or_path", base, "--adapter_path", adapter, "--output_path", output]
    subprocess.run([sys.executable, "-m", "sft", *map(str, line)], check=True)


def scaled_layers(model):
    """Adapted layers by their name in PEFT's files."""
    return {
        "base_model.model.model." + path.partition(".")[2]: layer
        for path, layer in model.named_sublayers()
        if hasattr(layer, "scale") and hasattr(layer, "base")
    }


@pytest.mark.parametrize("case", CASES)
def test_logits_are_pefts_also_merged(paddle, base_of, tmp_path, logits_of, case):
    expected = load_file(FIXTURES / case / "reference.safetensors")
    found = logits_of(load(base_of(case), FIXTURES / case), expected["input_ids"])
    np.testing.assert_allclose(found, expected["logits"], atol=TOLERANCE, rtol=0)
    assert np.abs(logits_of(load(base_of(case)), expected["input_ids"]) - found).max() > 1
    merge(base_of(case), FIXTURES / case, tmp_path / "merged")
    merged = logits_of(load(tmp_path / "merged"), expected["input_ids"])
    np.testing.assert_allclose(merged, expected["merged_logits"], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_pefts(paddle, base_of, case):
    from sft.parallel import hidden_states

    expected = load_file(FIXTURES / case / "reference.safetensors")
    (ids,) = expected["input_ids"]
    model = load(base_of(case), FIXTURES / case)
    batch = sft.assemble([[sft.Example(ids[:-1], ids[1:])]], pad_id=0)
    logits = model.lm_head(hidden_states(model, batch))
    loss = paddle.nn.functional.cross_entropy(logits[0], paddle.to_tensor(ids[1:]), reduction="sum")
    loss.backward()
    assert float(loss) == pytest.approx(float(expected["loss"][0]), rel=1e-5)
    layers = scaled_layers(model)
    assert len(layers) == CASES[case]
    for name, layer in layers.items():
        theirs = expected[f"{name}.ia3_l"].reshape(-1)
        found = layer.scale.grad.numpy()
        np.testing.assert_allclose(found, theirs, atol=1e-5 * np.abs(theirs).max(), rtol=1e-4, err_msg=name)


def test_a_new_adapter_begins_as_its_base(adapt, base_model, logits_of):
    ids = np.arange(4, 24)[None]
    model = adapt().model
    np.testing.assert_array_equal(logits_of(model, ids), logits_of(load(base_model), ids))
    assert len(scaled_layers(model)) == CASES["llama"]


def test_what_is_written_is_pefts_and_the_trained_model(train, base_model, tmp_path, logits_of):
    ids, trained = np.arange(4, 24)[None], []

    class Look(sft.Plugin):
        name = "look"
        api_version = 1

        @sft.hookimpl
        def sft_run_ended(self, run, summary):
            trained.append(logits_of(run.model, ids))

    summary = train(plugins=(Look,))
    assert summary.train_loss_last < summary.train_loss_first
    both = tmp_path / "out", FIXTURES / "llama"
    written, theirs = (load_file(folder / "adapter_model.safetensors") for folder in both)
    assert {n: (t.shape, t.dtype) for n, t in written.items()} == {n: (t.shape, t.dtype) for n, t in theirs.items()}
    config, of_peft = (json.loads((folder / "adapter_config.json").read_text()) for folder in both)
    differ = {"base_model_name_or_path"}
    assert {k: v for k, v in config.items() if k not in differ} == {k: of_peft[k] for k in config if k not in differ}
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
    settings = {"plugin": ["ia3"], "ia3_target_modules": ["q_proj", "down_proj"]}
    trained = sum(int(p.size) for p in adapt(**settings).model.parameters() if not p.stop_gradient)
    paper = pytest.importorskip("sft_parallel_4d.paper")
    assert paper.outline({"model_name_or_path": str(base_model), **settings}).outline.count()[1] == trained


def test_what_feeds_must_be_a_target(train):
    with pytest.raises(sft.UsageError, match="ia3_feedforward_modules names down_proj, which ia3_target_modules does"):
        train(ia3_target_modules=["q_proj"])


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("fan_in_fan_out", True, "plugin ia3 does not know fan_in_fan_out"),
        ("feedforward_modules", [], "down_proj.ia3_l is 1x48, .* scales outputs"),
        ("feedforward_modules", "down", "needs feedforward_modules as a list of names"),
    ],
)
def test_another_config_is_refused(base_model, tmp_path, key, value, message):
    folder = tmp_path / "adapter"
    shutil.copytree(FIXTURES / "llama", folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(sft.UsageError, match=message):
        load(base_model, folder)


def test_an_adapter_of_another_model_is_refused(base_model, tmp_path):
    folder = tmp_path / "adapter"
    shutil.copytree(FIXTURES / "llama", folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    name = "base_model.model.model.layers.0.self_attn.k_proj.ia3_l"
    save_file({**tensors, name: tensors[name][:-1].copy()}, folder / "adapter_model.safetensors")
    with pytest.raises(sft.UsageError, match=r"has weights for model\.layers\.0\.self_attn\.k_proj, which do not fit"):
        load(base_model, folder)
