"""What a family promises, tried on a checkpoint: ``sft.testing.check_family``, from which tests import it.

Each check stands for a place of the core that relies on it. Two ways of computing the same thing must agree within
:data:`RELATIVE` of the largest value, in float32.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from sft import hookspecs
from sft.data.batches import assemble
from sft.plugins.registry import Plugins
from sft.seams import Batch, Example

RELATIVE = 5e-6
LENGTHS = (4, 7, 5)
"""Of the documents, in tokens; with the answer no longer than what any rotary scaling leaves alone."""
ANSWER = 3


def check_family(folder: Path, *plugins: Any) -> None:
    """Hold the model in ``folder`` to all that :class:`sft.LanguageModel` and :class:`sft.Family` promise.

    ``folder`` is a tiny checkpoint of the family, float32, in Hugging Face's layout; ``plugins`` are classes, or names
    of installed plugins, that read it. Raises AssertionError, with a sentence about what is not kept. What the model
    computes is another question: a test of the family's own must compare logits with a reference.
    """
    from sft import runtime

    runtime.prepare()
    model, source = _load(folder, plugins)
    documents = _documents(source.architecture.vocabulary)
    _shape_is_the_models(model)
    _names_are_those_of_the_files(model, source)
    alone = [compute_logits(model, _rows([ids])) for ids in documents]
    _rows_read_as_documents_do(model, documents, alone)
    _answers_are_those_without_a_cache(model, documents)
    _the_loss_is_that_of_the_logits(model, documents, alone)
    plain = _gradients(model, documents)
    _gradients_reach_the_embedding(model, documents, plain)
    _recomputing_changes_nothing(model, documents, plain)
    _what_is_saved_is_what_was_read(model, source, folder, plugins, alone[0], documents[0])


def _load(folder: Path, plugins: tuple[Any, ...]) -> tuple[Any, Any]:
    from sft.models.loading import load_model, open_model

    names = [one for one in plugins if isinstance(one, str)]
    active = Plugins.load(names, hookspecs, [one for one in plugins if not isinstance(one, str)])
    active.start({})
    source = open_model(folder, active)
    return load_model(source), source


def _documents(vocabulary: int) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.integers(0, vocabulary, length) for length in LENGTHS]


def _rows(*rows: list[np.ndarray]) -> Batch:
    """Rows of documents, in which every next token is a target."""
    return assemble([[Example(ids, np.append(ids[1:], -100)) for ids in row] for row in rows], pad_id=0)


def compute_logits(model: Any, batch: Batch) -> np.ndarray:
    """float32 [B, S, V]."""
    import paddle

    from sft.models.forward import hidden_states

    with paddle.no_grad():
        return np.asarray(model.lm_head(hidden_states(model, batch)).astype("float32").numpy())


def forward(model: Any, input_ids: np.ndarray) -> np.ndarray:
    """float32 logits [B, S, V] of ``input_ids`` int64 [B, S], each row one document."""
    return compute_logits(model, _rows(*([ids] for ids in input_ids)))


def _agree(found: np.ndarray, expected: np.ndarray, what: str) -> None:
    assert found.shape == expected.shape, f"{what}: shape {found.shape} where {expected.shape} is expected"
    off = float(np.abs(found.astype(np.float64) - expected).max(initial=0.0))
    largest = float(np.abs(expected).max(initial=0.0))
    assert off <= RELATIVE * largest, f"{what}: {off:.2e} apart, and the largest value is {largest:.2e}"


# --- what stands where ----------------------------------------------------------------------------------------


def _shape_is_the_models(model: Any) -> None:
    from sft.models.kernels import PLAIN

    shape, embedding = model.architecture, model.get_input_embeddings()
    sizes = list(embedding.weight.shape)
    assert sizes == [shape.vocabulary, shape.hidden], f"the embedding is {sizes}, architecture says otherwise"
    is_tied = model.lm_head.weight is embedding.weight
    assert is_tied == shape.tied, f"architecture.tied is {shape.tied}, and lm_head is{'' if is_tied else ' not'} tied"
    transposed = bool(getattr(model.lm_head, "transpose_y", False))
    expected = sizes if transposed else sizes[::-1]
    assert list(model.lm_head.weight.shape) == expected, f"lm_head.weight is not {expected}"
    assert model.recompute is False, "a new model must not recompute"
    assert model.kernels is PLAIN, "a new model must begin with kernels = sft.PLAIN"
    asked = (getattr(model.attention, name, None) for name in ("mask", "attend"))
    assert all(map(callable, asked)), "model.attention is no AttentionBackend"


def _names_are_those_of_the_files(model: Any, source: Any) -> None:
    from sft.models.layers import target_layers

    stored = {source.family.from_file(name, "hf") for name in source.weights()}
    targets = target_layers(model)
    assert targets, f"there is no Linear below {source.architecture.block_names}, so nothing could be adapted"
    missing = [target.name for target in targets if f"{target.name}.weight" not in stored]
    assert not missing, f"the checkpoint has no weight for the Linears {', '.join(missing[:3])}"
    for name in stored:
        there_and_back = source.family.from_file(source.family.to_file(name, "hf"), "hf")
        assert there_and_back == name, f"{name} is written under a name that is read as {there_and_back}"
    count = len(source.architecture.blocks)
    numbers = {int(one.name[len(source.architecture.block_names) + 1 :].split(".")[0]) for one in targets}
    assert numbers == set(range(count)), f"architecture has {count} blocks, and the Linears are in {sorted(numbers)}"


# --- what is computed -----------------------------------------------------------------------------------------


def _rows_read_as_documents_do(model: Any, documents: list[np.ndarray], alone: list[np.ndarray]) -> None:
    packed = compute_logits(model, _rows(documents, [documents[1]]))
    starts = np.cumsum([0, *LENGTHS])
    for number, expected in enumerate(alone):
        place = slice(starts[number], starts[number + 1])
        _agree(packed[:1, place], expected, f"document {number} of a packed row reads otherwise than alone")
    _agree(packed[1:, : LENGTHS[1]], alone[1], "a row with padding on its right reads otherwise than without")


def _answers_are_those_without_a_cache(model: Any, documents: list[np.ndarray]) -> None:
    """Greedy; prompts of a batch are padded on the left."""
    import paddle

    from sft.models.cache import CachedReading

    def cached(prompts: list[np.ndarray], answers: list[np.ndarray]) -> np.ndarray:
        """Logits [B, ANSWER, V] of the tokens of ``answers``, fed one by one after the prompts."""
        width = max(map(len, prompts))
        ids = np.stack([np.pad(prompt, (width - len(prompt), 0)) for prompt in prompts])
        reading = CachedReading(
            model.architecture, np.asarray([width - len(prompt) for prompt in prompts]), model.kernels
        )
        found = []
        with paddle.no_grad():
            for step in range(ANSWER):
                reading.expect(ids.shape[1])
                hidden = model.hidden_states(model.embed(paddle.to_tensor(ids)), reading)
                found.append(model.lm_head(hidden[:, -1:]).numpy())
                ids = np.stack([answer[step : step + 1] for answer in answers])
        return np.concatenate(found, axis=1)

    answers, expected = [], []
    for prompt in documents:
        ids = prompt
        for _ in range(ANSWER):
            ids = np.append(ids, compute_logits(model, _rows([ids]))[0, -1].argmax())
        answers.append(ids[len(prompt) :])
        expected.append(compute_logits(model, _rows([ids[:-1]]))[:, len(prompt) - 1 :])
    for prompt, answer, logits in zip(documents, answers, expected, strict=True):
        _agree(cached([prompt], [answer]), logits, "an answer over the cache is another than without it")
    together = cached(documents, answers)
    _agree(together, np.concatenate(expected), "a prompt with padding on its left has another answer than alone")


def _the_loss_is_that_of_the_logits(model: Any, documents: list[np.ndarray], alone: list[np.ndarray]) -> None:
    from sft.training.loss import batch_loss

    expected = 0.0
    for ids, logits in zip(documents, alone, strict=True):
        wide = logits[0, :-1].astype(np.float64)
        largest = wide.max(-1, keepdims=True)
        normaliser = np.log(np.exp(wide - largest).sum(-1)) + largest[:, 0]
        expected += float((normaliser - wide[np.arange(len(ids) - 1), ids[1:]]).sum())
    found = float(batch_loss(model, _rows(documents)))
    _agree(np.asarray(found), np.asarray(expected), "the loss, made with lm_head's matrix, is not that of the logits")


def _gradients(model: Any, documents: list[np.ndarray]) -> dict[str, np.ndarray]:
    """Of one loss over all documents, by parameter; the model has none afterwards."""
    from sft.training.loss import batch_loss

    model.train()
    batch_loss(model, _rows(documents[:2], documents[2:])).backward()
    model.eval()
    learned = {name: one for name, one in model.named_parameters() if not one.stop_gradient}
    found = {name: one.grad.numpy() for name, one in learned.items() if one.grad is not None}
    for parameter in model.parameters():
        parameter.clear_gradient(set_to_zero=False)
    return found


def _gradients_reach_the_embedding(model: Any, documents: list[np.ndarray], gradients: dict[str, np.ndarray]) -> None:
    embedding = model.get_input_embeddings()
    (name,) = (name for name, one in model.named_parameters() if one is embedding.weight)
    assert name in gradients, "no gradient reaches the embedding"
    silent = [token for token in {*np.concatenate(documents[:2])} if not gradients[name][token].any()]
    assert not silent, f"no gradient reaches the embedding of the tokens {silent[:3]}"
    called = []
    hook = embedding.register_forward_post_hook(lambda *_: called.append(True))
    compute_logits(model, _rows(documents[:1]))
    hook.remove()
    assert called, "embed does not call the layer of get_input_embeddings, so no hook on that layer would be felt"


def _recomputing_changes_nothing(model: Any, documents: list[np.ndarray], plain: dict[str, np.ndarray]) -> None:
    from sft.models.layers import target_layers

    def compared(expected: dict[str, np.ndarray], which: str) -> None:
        model.recompute = True
        again = _gradients(model, documents)
        model.recompute = False
        others = sorted(again.keys() ^ expected.keys())
        assert not others, f"recompute gives gradients to other parameters{which}: {others[:3]}"
        for name, gradient in expected.items():
            _agree(again[name], gradient, f"with recompute, the gradient of {name} is another{which}")

    compared(plain, "")
    linears = {f"{target.name}.weight" for target in target_layers(model)}
    for name, parameter in model.named_parameters():  # as where adapters train
        parameter.stop_gradient = name not in linears
    compared({name: one for name, one in plain.items() if name in linears}, " where the embedding is frozen")
    for parameter in model.parameters():
        parameter.stop_gradient = False


def _what_is_saved_is_what_was_read(
    model: Any, source: Any, folder: Path, plugins: tuple[Any, ...], logits: np.ndarray, document: np.ndarray
) -> None:
    from sft.files import write_json
    from sft.models.config import hf_config
    from sft.models.saving import model_tensors
    from sft.models.shards import write_tensors
    from sft.models.source import Weights

    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        write_tensors(place, model_tensors(list(model.named_parameters()), source))
        write_json(place / "config.json", hf_config(source.values, "float32", source.family))
        weights, written = source.weights(), Weights(place, source.family)
        others = sorted({*written} ^ {*weights})
        assert not others, f"other tensors are written: {others[:3]}"
        for one in written:
            assert np.array_equal(written.read(one), weights.read(one)), f"{one} is written with other values"
        _agree(
            compute_logits(_load(place, plugins)[0], _rows([document])),
            logits,
            "what was saved and read computes otherwise",
        )
