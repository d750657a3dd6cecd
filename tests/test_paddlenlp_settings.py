"""PaddleNLP's settings files run as they are, and every name in them is honoured or explained."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from effects import EFFECTS, ELSEWHERE, MODELS, PARALLEL, make_data, run

import sft
from sft.plugins.requests import by_device
from sft.settings.paddlenlp import FOREIGN


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


DOCUMENT = """
    model_name_or_path use_flash_attention flash_mask lora lora_path lora_rank rslora lora_plus_scale pissa
    neftune neftune_noise_alpha vera vera_rank weight_quantize_algo dataset_name_or_path zero_padding
    greedy_zero_padding src_length max_length lazy eval_with_do_generation chat_template top_k top_p
    output_dir per_device_train_batch_size gradient_accumulation_steps per_device_eval_batch_size
    eval_accumulation_steps num_train_epochs max_steps learning_rate warmup_steps warmup_ratio
    lr_scheduler_type weight_decay max_grad_norm logging_steps evaluation_strategy eval_steps save_strategy
    save_steps save_total_limit load_best_model_at_end metric_for_best_model fp16 bf16 fp16_opt_level do_train
    do_eval disable_tqdm recompute seed resume_from_checkpoint overwrite_output_dir unified_checkpoint
    sharding sharding_parallel_degree tensor_parallel_degree pipeline_parallel_degree sequence_parallel
""".split()


def test_every_name_of_the_document_is_honoured_or_explained() -> None:
    assert [name for name in DOCUMENT if name not in {**EFFECTS, **ELSEWHERE, **FOREIGN}] == []
    # Where no plugin takes these, they are listed as without effect.
    assert {*EFFECTS, *ELSEWHERE} & set(FOREIGN) == set(PARALLEL)


def test_every_argument_of_run_finetune_is_honoured_or_explained() -> None:
    """The dataclasses that PaddleNLP's run_finetune.py parses; a new release with a new name fails here."""
    import dataclasses

    from paddlenlp.trl import DataConfig, ModelConfig, SFTConfig

    from sft.options import options_of
    from sft.plugins.discovery import installed
    from sft.plugins.requests import requests
    from sft.settings.arguments import core_options

    known = {*core_options(), *requests("setting"), *FOREIGN}
    for name, items in installed().items():
        declared = getattr(items[0].entry.load(), "Options", None)
        options = options_of(declared).values() if declared is not None else ()
        known |= {name.replace("-", "_"), *(n for option in options for n in (option.name, *option.aliases))}
    names = {f.name for cls in (ModelConfig, DataConfig, SFTConfig) for f in dataclasses.fields(cls) if f.init}
    assert sorted(names - known) == []


DEFAULTS = {
    "src_length": 1024, "max_length": 2048, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1,
    "per_device_eval_batch_size": 8, "num_train_epochs": 3.0, "learning_rate": 5e-5, "max_grad_norm": 1.0,
    "logging_steps": 500, "save_steps": 500, "vera_rank": 8, "lora_rank": 8, "neftune_noise_alpha": 5.0, "top_k": 1,
    "top_p": 1.0, "lr_scheduler_type": "linear", "seed": 42,
}  # fmt: skip


def test_defaults_are_the_documents() -> None:
    from sft.options import options_of
    from sft.plugins.discovery import import_plugin
    from sft.settings.arguments import core_options

    options = dict(core_options())
    for plugin in ("lora", "vera", "neftune"):
        options.update(options_of(import_plugin(plugin).Options))
    assert {name: options[name].default for name in DEFAULTS} == DEFAULTS


@pytest.mark.parametrize("name", FOREIGN)
def test_a_setting_without_meaning_is_named_with_its_reason(name: str) -> None:
    from sft.settings.paddlenlp import explain, listing

    foreign = FOREIGN[name]
    plain = {"true or false": "true", "a number": "7", "text": "anything"}.get(foreign.kind, foreign.kind)
    value = foreign.harmless[-1] if foreign.harmless is not None else plain
    left, found = explain({name: value, "seed": 1}, {"seed"})
    assert left == {"seed": 1}
    assert listing(found) == ["settings without effect here:", f"  {name} {value}: {foreign.reason}"]
    # A plugin that declares the name has it.
    assert explain({name: value}, {name}) == ({name: value}, [])
    if foreign.harmless is not None:
        with pytest.raises(sft.UsageError, match=f"^{name} 'seven' is not possible here: "):
            explain({name: "seven"}, set())
    elif plain != "anything":
        with pytest.raises(sft.UsageError, match=f"^{name}: expected .*, got 'seven'"):
            explain({name: "seven"}, set())


def test_an_active_plugin_answers_for_itself(data: Path, tmp_path: Path) -> None:
    """Its own rows go before the core's, which are for where it is off."""
    settings = {"weight_double_quant_block_size": 256, "use_quick_lora": True, "eval_packing": "none"}
    plain = run(tmp_path / "plain", data, **settings).said_of("settings without effect here")
    assert plain.endswith("use_quick_lora true, eval_packing none: it belongs to a technique that is off")
    found = run(tmp_path / "out", data, plugin=["lora", "nf4", "zero-padding"], **settings)
    listed = found.said_of("settings without effect here")
    assert "weight_double_quant_block_size 256: blocks of doubly quantized absmax have 256 values" in listed
    assert "use_quick_lora true: it changes the speed of PaddleNLP's code, not the result" in listed
    assert "eval_packing none: dev data is packed as training data is" in listed
    with pytest.raises(sft.UsageError, match="weight_double_quant_block_size 64 is not possible here: bl"):
        run(tmp_path / "other", data, plugin=["lora", "nf4"], weight_double_quant_block_size=64)


def test_the_list_stands_in_the_run(data: Path, tmp_path: Path) -> None:
    found = run(tmp_path / "out", data, unified_checkpoint=True, expert_tensor_parallel_degree=1, save_steps=7)
    listed = found.said_of("settings without effect here")
    for part in (
        "unified_checkpoint true: checkpoints",
        "expert_tensor_parallel_degree 1: one process",
        "save_steps 7: save_str",
    ):
        assert part in listed
    with pytest.raises(sft.UsageError, match="expert_tensor_parallel_degree 2 is not possible here: one process"):
        run(tmp_path / "other", data, expert_tensor_parallel_degree=2)


@pytest.mark.parametrize("name", ["lora", "qlora", "sft"])
def test_settings_files_of_paddlenlp_run_as_they_are(name: str, data: Path, tmp_path: Path) -> None:
    """Files in PaddleNLP's form (the keys and values of its llama settings), with their paths changed."""
    file = Path(__file__).parent / "paddlenlp_settings" / f"{name}_argument.json"
    values = json.loads(file.read_text(encoding="utf-8"))
    values.pop("output_dir")
    # 24 records: one epoch is enough.
    found = run(tmp_path / "out", data, **{**values, "model_name_or_path": str(MODELS / "llama-tied-gqa"),
        "dataset_name_or_path": str(data), "num_train_epochs": 1, "max_steps": None})  # fmt: skip
    plugins = {
        "lora": {"flash-attention", "lora", "parallel-4d"},
        "qlora": {"lora", "nf4"},
        "sft": {"parallel-4d"},  # two files have a sharding stage; on one process it divides nothing
    }
    assert set(found.plugins) == {*plugins[name], "watch", *by_device({})}
    assert all(np.isfinite(found.losses))
    assert found.said_of("best model: checkpoint-")
    assert (found.folder / ("model.safetensors" if name == "sft" else "adapter_model.safetensors")).is_file()


def test_options_of_what_is_switched_off_are_listed(data: Path, tmp_path: Path) -> None:
    off = {"lora": False, "lora_rank": 8, "weight_quantize_algo": None, "vera": "false", "vera_rank": 8}
    values = {"model_name_or_path": str(MODELS / "llama-tied-gqa"), "dataset_name_or_path": str(data), "max_steps": 1}
    said: list[str] = []
    sft.run({**values, **off, "output_dir": str(tmp_path / "out"), "weight_blocksize": 64}, say=said.append)
    listed = next(line for line in said if line.startswith("settings without effect here"))
    for part in (
        "lora_rank 8: plugin lora is switched off",
        "vera_rank 8: plugin vera is",
        "weight_blocksize 64: plugin",
    ):
        assert part in listed
    # Without its switch an option at its default changes nothing; another value asks for the plugin.
    said.clear()
    sft.run(
        {**values, "output_dir": str(tmp_path / "default"), "lora_rank": 8, "neftune_noise_alpha": 5}, say=said.append
    )
    assert "lora_rank 8: it is the default of plugin lora, which is not asked for" in said[0]
    with pytest.raises(sft.UsageError, match=r"Unknown setting lora_rank; .* add --plugin lora"):
        sft.run({**values, "output_dir": str(tmp_path / "other"), "lora_rank": 4})


def test_null_is_unset_and_numbers_switch(data: Path, tmp_path: Path) -> None:
    """As PaddleNLP's JSON has them: null for its own defaults, 1 for true, true for the newest checkpoint."""
    values = {"disable_tqdm": None, "lora": 1, "vera": None, "resume_from_checkpoint": True, "max_steps": 3}
    same = {
        "model_name_or_path": str(MODELS / "llama-tied-gqa"),
        "dataset_name_or_path": str(data),
        "output_dir": str(tmp_path / "out"),
    }
    sft.run({**same, "lora": True, "save_strategy": "steps", "save_steps": 1, "max_steps": 2}, say=lambda text: None)
    file = tmp_path / "settings.json"
    file.write_text(json.dumps({**values, **same}))
    said: list[str] = []
    assert sft.run(file, say=said.append).steps == 3
    assert any(line.startswith("resuming from") for line in said)
