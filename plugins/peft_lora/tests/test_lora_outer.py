"""LoRA of the embedding and of lm_head, and rows of tokens that train beside LoRA: PEFT's adapters, and what runs write
and read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import sft
from sft.inference.merge import merge
from sft.testing import load, write_data

CASES = {
    "qwen2-lora-outer": "qwen2-untied",
    "llama-lora-outer": "llama-tied-gqa",
    "qwen2-lora-rows": "qwen2-untied",
    "llama-lora-rows": "llama-tied-gqa",
}
TOLERANCE = 1e-4
PREFIX = "base_model.model."
EMBEDDING, HEAD = f"{PREFIX}model.embed_tokens", f"{PREFIX}lm_head"
OUTER = {"lora_target_modules": ["q_proj", "embed_tokens", "lm_head"], "lora_rank": 3}


def quiet(text: str) -> None:
    pass


def settings_of(models: Path, model: str, **settings: Any) -> dict[str, Any]:
    return {"model_name_or_path": str(models / model), **settings}


# --- what PEFT wrote ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("case", "base"), CASES.items(), ids=list(CASES))
def test_logits_are_pefts_also_merged(assert_logits_are_pefts: Any, case: str, base: str) -> None:
    assert_logits_are_pefts(case, base)


def test_loss_and_gradients_of_embedding_and_head_are_pefts(adapt: Any, models: Path, peft: Path) -> None:
    from sft.training.loss import batch_loss

    case = "qwen2-lora-outer"
    run = adapt(**settings_of(models, CASES[case], lora_path=str(peft / case)))
    expected = load_file(peft / case / "gradients.safetensors")
    ids, labels = expected.pop("input_ids"), expected.pop("labels")
    rows = [[sft.Example(*pair)] for pair in zip(ids, labels, strict=True)]
    loss = batch_loss(run.model, sft.assemble(rows, 0)) / 15
    loss.backward()
    assert float(loss) == pytest.approx(float(expected.pop("loss")[0]), rel=1e-5)
    layers = {path: layer for path, layer in run.model.named_sublayers() if hasattr(layer, "lora_A")}
    found = {}
    for path, layer in layers.items():
        for half in "AB":
            kind = f"lora_embedding_{half}" if "embed" in path else f"lora_{half}.weight"
            found[f"{PREFIX}{path}.{kind}"] = getattr(layer, f"lora_{half}").grad.numpy().T
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        np.testing.assert_allclose(found[name], gradient, atol=5e-6, rtol=1e-4, err_msg=name)


def test_rows_over_a_base_that_has_grown_are_read_with_it(
    paddle: Any, models: Path, peft: Path, tmp_path: Path, adapter_variant: Any, logits_of: Any
) -> None:
    """PEFT writes the embedding of such a base whole; a tokenizer says that it has grown."""
    expected, base = load_file(peft / "llama-lora-rows-grown" / "reference.safetensors"), models / "llama-tied-gqa"
    folder = adapter_variant("llama-lora-rows-grown")
    content = (base / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(content)
    found = logits_of(load(base, folder), expected["input_ids"])
    np.testing.assert_allclose(found, expected["logits"], atol=TOLERANCE, rtol=0)
    merge(str(base), folder, tmp_path / "merged", quiet)
    merged = logits_of(load(tmp_path / "merged"), expected["input_ids"])
    np.testing.assert_allclose(merged, expected["merged_logits"], atol=TOLERANCE, rtol=0)


# --- the layers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("cap", [None, 3.0])
@pytest.mark.parametrize("kind", ["lora", "rows"])
def test_the_chunked_loss_has_the_gradients_of_the_formula(
    paddle: Any, monkeypatch: pytest.MonkeyPatch, kind: str, cap: float | None, scale: float
) -> None:
    """Cross-entropy of cap·tanh(scale·(h·W + u·B)/cap), or with some columns replaced, against numbers that autograd
    finds of whole logits; in chunks of three positions."""
    from sft.models.architecture import Architecture, Block
    from sft.models.decoder import Head
    from sft.training import loss as chunked

    shape = Architecture(
        vocabulary=11, hidden=6, positions=8, blocks=(Block(),), tied=False, inner=4, heads=1, kv_heads=1, head_size=6,
        norm_epsilon=1e-5, logit_cap=cap, logit_scale=scale,
    )  # fmt: skip
    head, rng = Head(shape, None), np.random.default_rng(0)
    tensor = lambda *size: paddle.to_tensor(rng.standard_normal(size).astype("float32"), stop_gradient=False)  # noqa: E731
    head.weight.set_value(tensor(6, 11))
    head.weight.stop_gradient = True
    a, b, rows, tokens = tensor(6, 2), tensor(2, 11), tensor(3, 6), (2, 9, 4)

    class Own(sft.HeadLayer, paddle.nn.Layer):
        def __init__(self) -> None:
            super().__init__()
            self.base = head

        def beside(self, hidden: Any) -> sft.Beside:
            if kind == "lora":
                return sft.Beside(paddle.matmul(hidden, a) * 0.7, b)
            return sft.Beside(paddle.matmul(hidden, rows, transpose_y=True), tokens=tokens)

    monkeypatch.setattr(chunked, "CHUNK_BYTES", 3 * 4 * 11)
    layer, hidden, labels = Own(), tensor(2, 4, 6), np.array([[1, -100, 9, 4], [0, 2, 10, -100]])
    weights = rng.uniform(0.5, 2, (2, 4)).astype("float32")
    learned = [hidden, a, b] if kind == "lora" else [hidden, rows]

    logits = paddle.matmul(hidden, head.weight)
    if kind == "lora":
        logits = logits + 0.7 * paddle.matmul(paddle.matmul(hidden, a), b)
    else:
        own = paddle.matmul(hidden, rows, transpose_y=True)
        columns = [own[..., tokens.index(n)] if n in tokens else logits[..., n] for n in range(11)]
        logits = paddle.stack(columns, axis=-1)
    logits = logits * scale
    logits = logits if cap is None else paddle.tanh(logits / cap) * cap
    np.testing.assert_allclose(layer(hidden).numpy(), logits.numpy(), atol=1e-5, rtol=0)
    losses = -paddle.nn.functional.log_softmax(logits).reshape([8, 11])
    places = np.flatnonzero(labels.reshape(-1) != -100)
    each = paddle.stack([losses[int(n), int(labels.reshape(-1)[n])] * float(weights.reshape(-1)[n]) for n in places])
    expected = paddle.grad([each.sum()], learned)

    total = chunked.target_loss(hidden, labels, layer, weights=weights)
    assert float(total) == pytest.approx(float(each.sum()), rel=1e-5)
    for found, exact in zip(paddle.grad([total * 3.0], learned), expected, strict=True):
        np.testing.assert_allclose(found.numpy(), 3.0 * exact.numpy(), atol=2e-5, rtol=1e-4)
    each_alone = chunked.target_losses(hidden, labels, layer).sum(where=labels != -100)
    assert each_alone == pytest.approx(float((each / paddle.to_tensor(weights.reshape(-1)[places])).sum()), rel=1e-5)
    right = (logits.reshape([8, 11]).argmax(-1).numpy() == labels.reshape(-1))[places].sum()
    assert chunked.target_scores(hidden, labels, layer)[1] == right


# --- runs ---------------------------------------------------------------------------------------------------

ROWS = {"lora_target_modules": ["q_proj"], "new_tokens": ["<tool>", "<|extra|>"], "trainable_token_indices": "new,5"}


@pytest.mark.parametrize("settings", [OUTER, ROWS], ids=["outer", "rows"])
@pytest.mark.parametrize("model", ["llama-tied-gqa", pytest.param("qwen2-untied", marks=pytest.mark.slow)])
def test_what_a_run_trains_is_written_and_comes_back(
    train: Any, models: Path, tmp_path: Path, looking: Any, input_ids: Any, logits_of: Any, model: str, settings: Any
) -> None:
    """To the bit; merged the same but for float32 noise; and a run that goes on from it begins there."""
    base, (look, logits) = models / model, looking
    train("out", (look,), **settings_of(models, model, **settings))
    tied = model == "llama-tied-gqa"
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    written = load_file(tmp_path / "out" / "adapter_model.safetensors")
    outer = {name.removeprefix(PREFIX) for name in written if ".layers." not in name}
    if settings is OUTER:
        pair = {f"lm_head.lora_{half}.weight" for half in "AB"}
        assert outer == {*pair, *(f"model.embed_tokens.lora_embedding_{half}" for half in "AB")}
        assert config.get("ensure_weight_tying", False) is tied
        assert all(tensor.any() for name, tensor in written.items())
    else:
        delta = ".token_adapter.trainable_tokens_delta"
        assert outer == {f"model.embed_tokens{delta}", *([] if tied else [f"lm_head{delta}"])}
        ids = [5, 320, 321] if tied else [5, 312, 313]  # the other has rows for them already
        assert config["trainable_token_indices"] == (ids if tied else {"embed_tokens": ids, "lm_head": ids})
    np.testing.assert_array_equal(logits_of(load(base, tmp_path / "out"), input_ids), logits[0])
    merge(str(base), tmp_path / "out", tmp_path / "merged", quiet)
    np.testing.assert_allclose(logits_of(load(tmp_path / "merged"), input_ids), logits[0], atol=TOLERANCE, rtol=0)
    on = {"lora_path": str(tmp_path / "out"), "learning_rate": 0.0, "max_steps": 1}
    on |= {"new_tokens": settings.get("new_tokens", [])}
    train("on", **settings_of(models, model, **on))
    again = load_file(tmp_path / "on" / "adapter_model.safetensors")
    assert {name: tensor.tobytes() for name, tensor in again.items()} == {n: t.tobytes() for n, t in written.items()}


@pytest.mark.parametrize("settings", [OUTER, ROWS], ids=["outer", "rows"])
@pytest.mark.parametrize("model", ["llama-tied-gqa", pytest.param("qwen2-untied", marks=pytest.mark.slow)])
def test_only_what_is_named_trains(adapt: Any, models: Path, model: str, settings: Any) -> None:
    run = adapt(**settings_of(models, model, **settings))
    found = {name for name, p in run.model.named_parameters() if not p.stop_gradient and ".layers." not in name}
    heads = [] if model == "llama-tied-gqa" else ["lm_head"]
    if settings is OUTER:
        assert found == {f"{name}.lora_{half}" for name in ("model.embed_tokens", *heads) for half in "AB"}
    else:
        assert found == {f"{name}.rows" for name in ("model.embed_tokens", *heads)}


@pytest.mark.parametrize("settings", [{**OUTER, "lora_dropout": 0.2}, ROWS], ids=["outer", "rows"])
@pytest.mark.parametrize("model", ["qwen2-untied", pytest.param("llama-tied-gqa", marks=pytest.mark.slow)])
def test_a_resumed_run_is_the_run_that_was_not_stopped(
    train: Any, models: Path, tmp_path: Path, model: str, settings: Any
) -> None:
    settings = settings_of(models, model, **settings, save_strategy="steps", save_steps=2, max_steps=4)
    train("whole", **settings)
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    assert not (checkpoint / "trainer" / "trainable.safetensors").exists()  # all of it is in the adapter's file
    train("stopped", **settings, resume_from_checkpoint=str(checkpoint))
    whole, resumed = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "stopped"))
    assert {n: t.tobytes() for n, t in whole.items()} == {n: t.tobytes() for n, t in resumed.items()}
    if "trainable_token_indices" in settings:
        settings["trainable_token_indices"] = "new,6"
        with pytest.raises(sft.UsageError, match="checkpoint-2 has trained the rows of other tokens than"):
            train("other", **settings, resume_from_checkpoint=str(checkpoint))


def test_new_tokens_come_from_a_file_too(train: Any, models: Path, tmp_path: Path) -> None:
    file = tmp_path / "tokens.txt"
    said: list[str] = []
    file.write_text("<b>\n\n<c>\r\n", encoding="utf-8-sig")
    settings = settings_of(models, "llama-tied-gqa", new_tokens=["<a>"], new_tokens_path=str(file))
    train("out", say=said.append, **settings, max_steps=1, trainable_token_indices=["new"])
    added = json.loads((tmp_path / "out" / "tokenizer.json").read_text())["added_tokens"]
    assert [token["content"] for token in added][-3:] == ["<a>", "<b>", "<c>"]
    assert "new_tokens: 3 tokens, ids 320 to 322, embeddings grow from 320 to 384 rows" in said
    file.write_text("\n")
    with pytest.raises(sft.UsageError, match=r"new_tokens_path: .*tokens\.txt holds no token"):
        train("none", **settings)
    with pytest.raises(sft.UsageError, match=r"new_tokens_path: .*cannot be read"):
        train("none", **{**settings, "new_tokens_path": str(tmp_path / "nothing.txt")})


def test_the_rows_of_a_token_that_the_data_has_move_and_no_other(train: Any, models: Path, tmp_path: Path) -> None:
    """Over the merged model: the embedding differs from the base's in the rows that trained, and nowhere else."""
    data = write_data(tmp_path / "tool", [{"src": f"say <tool> {n}", "tgt": f"<tool> {n}"} for n in range(4)])
    settings = settings_of(models, "qwen2-untied", dataset_name_or_path=str(data), do_eval=False, new_tokens=["<tool>"])
    train("out", **settings, lora_target_modules=["q_proj"], trainable_token_indices=["<tool>", "7"])
    merge(str(models / "qwen2-untied"), tmp_path / "out", tmp_path / "merged", quiet)
    before, after = (
        load_file(folder / "model.safetensors") for folder in (models / "qwen2-untied", tmp_path / "merged")
    )
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        moved = np.flatnonzero((after[name] != before[name]).any(axis=1))
        assert set(moved) == ({312} if "embed" in name else {7, 312}), name  # 7 is read nowhere, and not written


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"trainable_token_indices": ["<nothing>"]}, "'<nothing>' is no token of this model; give ids from 0 to 319"),
        ({"trainable_token_indices": [320]}, "320 is no token of this model"),
        ({"trainable_token_indices": [True]}, "True is no token of this model"),
        ({"trainable_token_indices": "new"}, "new means the tokens that new_tokens adds, and it adds none"),
        ({"trainable_token_indices": [1], "new_tokens": ["<x>"]}, "new_tokens adds token 320.* add new to it"),
        (
            {"trainable_token_indices": [1], "plugin": []},
            "names rows that train beside an adapter, and this run trains",
        ),
        ({"trainable_token_indices": [1], **OUTER}, "model.embed_tokens is adapted, and trainable_token_indices"),
        ({"trainable_token_indices": [1], "modules_to_save": "embed_tokens"}, "model.embed_tokens trains whole, with"),
        ({"modules_to_save": "embed_tokens", **OUTER}, "lm_head is adapted, and modules_to_save"),
        ({"new_tokens": ["<x>"], **OUTER}, "lm_head is adapted, and new_tokens lets it train whole"),
        (
            {"plugin": ["lora", "dora"], **OUTER},
            "names model.embed_tokens, and plugin dora refines Linears of the blocks",
        ),
        ({"plugin": ["lora", "pissa"], **OUTER}, "names model.embed_tokens, and plugin pissa refines Linears"),
        ({"lora_target_modules": "lm_head", "lora_layers_to_transform": "0"}, "names none of their layers; leave one"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(train: Any, tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(sft.UsageError, match=message):
        train("out", **settings)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("case", "change", "config", "message"),
    [
        ("llama-lora-outer", None, {"ensure_weight_tying": False}, "adapts the embedding and the head apart, and in"),
        (
            "llama-lora-outer",
            lambda t: t.update({f"{HEAD}.lora_A.weight": t[f"{HEAD}.lora_A.weight"] + 1}),
            {},
            "embedding and head are one .* and has different updates",
        ),
        (
            "qwen2-lora-outer",
            lambda t: t.update({f"{EMBEDDING}.base_layer.weight": t[f"{EMBEDDING}.base_layer.weight"] * 2}),
            {},
            "was trained over another matrix of model.embed_tokens than this model has",
        ),
        (
            "qwen2-lora-outer",
            None,
            {"use_dora": True},
            "adapts .*embed_tokens.*, and plugin lora reads adapters of refined",
        ),
        ("qwen2-lora-rows", None, {"trainable_token_indices": [7]}, "names 1 tokens of .*embed_tokens"),
        ("qwen2-lora-rows", None, {"trainable_token_indices": {"q_proj": [7]}}, "no different tokens of embed_tokens"),
        ("qwen2-lora-rows", None, {"trainable_token_indices": [7, 7]}, "no different tokens of embed_tokens"),
        (
            "llama-lora-rows",
            lambda t: t.pop(f"{EMBEDDING}.token_adapter.trainable_tokens_delta"),
            {},
            "names rows of .*embed_tokens.* and adapter_model.* has none",
        ),
        ("llama-lora-rows", None, {"trainable_token_indices": [9, 5, 320]}, "rows of .*embed_tokens.* do not fit"),
    ],
    ids=["untied", "apart", "base", "dora", "count", "layer", "twice", "lost", "beyond"],
)
def test_what_does_not_belong_together_is_refused(
    models: Path, adapter_variant: Any, tmp_path: Path, case: str, change: Any, config: Any, message: str
) -> None:
    folder = adapter_variant(case, change, **config)
    with pytest.raises(sft.UsageError, match=message):
        load(models / CASES[case], folder)
    with pytest.raises(sft.UsageError, match=message):
        merge(str(models / CASES[case]), folder, tmp_path / "merged", quiet)
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("settings", [OUTER, ROWS], ids=["outer", "rows"])
@pytest.mark.parametrize("model", ["llama-tied-gqa", "qwen2-untied"])
def test_on_paper_they_are_as_they_are(adapt: Any, models: Path, model: str, settings: dict[str, Any]) -> None:
    paper = pytest.importorskip("sft_parallel_4d.paper")
    given = settings_of(models, model, **settings)
    trained = sum(int(p.size) for p in adapt(**given).model.parameters() if not p.stop_gradient)
    assert paper.outline({"plugin": ["lora"], **given}).outline.count()[1] == trained
