"""Families that llama.cpp computes, and how its files describe them.

What a family's graph in llama.cpp computes is fixed; a model that differs in anything that no key of the file says is
refused. Each family here has been held to logits of llama.cpp itself (tests/fixtures/make_answers.py).
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

import sft


@dataclass(frozen=True)
class Form:
    """A family of models as llama.cpp has it.

    Attributes:
        arch: What GGUF calls it.
        can: Fields of an :class:`sft.Architecture` that the file describes, whatever they are.
        has: Those that the graph has built in, where they are not the architecture's defaults; one that follows from
            the model's sizes is a function of the architecture.
        adjacent: Whether the rotary embedding turns dimensions 2i and 2i + 1 of a head together; Hugging Face's files
            have i and i + size / 2.
        stretches: The scalings of the rotary embedding that the file can describe.
        experts: Of models whose every block has experts: whether the weights of those that are chosen are made to sum
            to one, and whether there is one that every token goes through. None: the graph has none.
        still: Every so many blocks, one whose queries and keys are not turned; None: all are turned.
        whole: Every so many blocks, one that sees all, where the others have a window; None: the graph has no windows.
        local: The base by which blocks with a window turn, unscaled; None: they turn as the others do.
    """

    arch: str
    can: tuple[str, ...] = ()
    has: dict[str, Any] | None = None
    adjacent: bool = False
    stretches: tuple[str, ...] = ("linear", "yarn")
    experts: tuple[bool, bool] | None = None
    still: int | None = None
    whole: int | None = None
    local: float | None = None


def _root_of_hidden(found: sft.Architecture) -> float:
    return float(found.hidden**0.5)


def _of_heads(largest: int) -> Any:
    """What Gemma's scores are multiplied by: where a model has so many blocks as the ``largest``, by other heads."""

    def scale(found: sft.Architecture) -> float:
        size = found.hidden // found.heads if len(found.blocks) == largest else found.head_size
        return float(size**-0.5)

    return scale


_SCALES = ("attention_scale", "embedding_scale", "residual_scale", "logit_scale")
_AROUND = sft.Norms(
    "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"
)
_GEMMA = {"norm_offset": 1.0, "activation": "gelu_tanh", "embedding_scale": _root_of_hidden}
_BEHIND = sft.Norms(None, "post_attention_layernorm", None, "post_feedforward_layernorm")

FORMS = {
    "llama": Form(
        "llama",
        can=("attention_bias", "output_bias", "mlp_bias"),
        adjacent=True,
        stretches=("linear", "yarn", "llama3"),
    ),
    "mistral": Form("llama", adjacent=True),
    "gemma": Form("gemma", has=_GEMMA, stretches=()),
    "gemma2": Form(
        "gemma2",
        can=("attention_cap", "logit_cap"),
        has={**_GEMMA, "norms": _AROUND, "attention_scale": _of_heads(46)},
        stretches=(),
        whole=2,
    ),
    "gemma3_text": Form(
        "gemma3",
        has={**_GEMMA, "norms": _AROUND, "head_norm": "head", "attention_scale": _of_heads(62)},
        stretches=("linear",),
        whole=6,
        local=10000.0,
    ),
    "qwen2": Form("qwen2", has={"attention_bias": True}),
    "qwen3": Form("qwen3", has={"head_norm": "head"}),
    "smollm3": Form("smollm3", adjacent=True, still=4),
    "granite": Form("granite", can=_SCALES, adjacent=True, stretches=()),
    "mixtral": Form("llama", adjacent=True, experts=(True, False)),
    "qwen2_moe": Form("qwen2moe", has={"attention_bias": True}, experts=(False, True)),
    "qwen3_moe": Form("qwen3moe", has={"head_norm": "head"}, experts=(True, False)),
    "olmo2": Form("olmo2", has={"head_norm": "all", "norms": _BEHIND}, stretches=()),
}
"""By ``model_type``."""

_SIZES = (
    *("vocabulary", "hidden", "positions", "blocks", "tied", "rotaries", "block_names"),
    *("inner", "heads", "kv_heads", "head_size", "norm_epsilon"),
)
"""Fields of an architecture that every file describes, or that are looked at by themselves."""


def form_of(model: sft.FinishedModel) -> Form:
    """How ``model`` is described; :class:`sft.UsageError` for what llama.cpp does not compute."""
    kind, found = model.config.get("model_type"), model.architecture
    form = FORMS.get(str(kind))
    if form is None or not isinstance(found, sft.Architecture):
        raise sft.UsageError(
            f"Models of type {sft.shown(kind)} cannot be written as GGUF here (those that can: {', '.join(FORMS)}); "
            "write --to huggingface, and convert that with llama.cpp's convert_hf_to_gguf.py."
        )
    for field in fields(found):
        if field.name in (*_SIZES, *form.can):
            continue
        value, expected = getattr(found, field.name), (form.has or {}).get(field.name, field.default)
        expected = expected(found) if callable(expected) else expected
        if value != expected:
            raise sft.UsageError(
                f"llama.cpp computes {form.arch} with {field.name} {expected!r}, and this model has {value!r}; write "
                "--to huggingface."
            )
    turned = [form.still is None or (number + 1) % form.still != 0 for number in range(len(found.blocks))]
    if turned != [block.rotary is not None for block in found.blocks]:
        which = "every block" if form.still is None else f"all blocks but one in {form.still}"
        raise sft.UsageError(
            f"llama.cpp's {form.arch} turns queries and keys of {which}, and this model those of others; write --to "
            "huggingface."
        )
    _check_windows(form, found)
    _check_experts(form, found)
    rotary = found.rotaries[0]
    if rotary.kind not in ("default", *form.stretches) or rotary.size != found.head_size or rotary.interleaved:
        raise sft.UsageError(
            f"A GGUF file of {form.arch} cannot describe this model's rotary embedding ({rotary.kind}, {rotary.size} "
            f"of {found.head_size} dimensions); write --to huggingface."
        )
    return form


def _check_windows(form: Form, found: sft.Architecture) -> None:
    if form.whole is None:
        return
    windows = [block.window for block in found.blocks]
    local = [window is not None for window in windows]
    if local != [(number + 1) % form.whole != 0 for number in range(len(windows))] or len({*windows} - {None}) > 1:
        raise sft.UsageError(
            f"llama.cpp's {form.arch} has one window in all blocks but one in {form.whole}, and this model others; "
            "write --to huggingface."
        )
    caps = [cap for cap in form.can if cap.endswith("_cap") and getattr(found, cap) is None]
    if caps:
        raise sft.UsageError(f"llama.cpp's {form.arch} has a {caps[0]}, and this model none; write --to huggingface.")
    turning = [(found.rotaries[block.rotary or 0], block.window is not None) for block in found.blocks]
    wide = found.rotaries[0]
    narrow = wide if form.local is None else replace(wide, base=form.local, kind="default", values={})
    if any(rotary != (narrow if has_window else wide) for rotary, has_window in turning):
        raise sft.UsageError(
            f"llama.cpp's {form.arch} turns blocks with a window by the base {narrow.base:g}, unscaled, and the others "
            f"by one of their own, and this model otherwise; write --to huggingface."
        )


def _check_experts(form: Form, found: sft.Architecture) -> None:
    kinds = {block.experts for block in found.blocks}
    one = next(iter(kinds))
    here = None if one is None else (one.normalise, one.shared_inner is not None)
    if len(kinds) > 1 or here != form.experts:
        expected = "no experts" if form.experts is None else "experts in every block"
        if form.experts is not None:
            expected += f", weights that are {'' if form.experts[0] else 'not '}made to sum to one"
        raise sft.UsageError(
            f"llama.cpp's {form.arch} has {expected}, and this model is another; write --to huggingface."
        )


def describe(model: sft.FinishedModel, form: Form, writer: Any) -> None:
    """Write the sizes of ``model`` into the header of ``writer`` (gguf's)."""
    import gguf

    found = model.architecture
    assert isinstance(found, sft.Architecture)
    windows = [block.window for block in found.blocks if block.window is not None]
    positions = found.positions if form.whole else min([found.positions, *windows])
    if positions < found.positions:
        model.say(
            f"note: llama.cpp's {form.arch} has no sliding window, so the file says that its context is the window, "
            f"{positions:,} tokens, up to which both compute the same"
        )
    writer.add_context_length(positions)
    writer.add_embedding_length(found.hidden)
    writer.add_block_count(len(found.blocks))
    writer.add_feed_forward_length(found.inner)
    writer.add_head_count(found.heads)
    writer.add_head_count_kv(found.kv_heads)
    writer.add_key_length(found.head_size)
    writer.add_value_length(found.head_size)
    writer.add_layer_norm_rms_eps(found.norm_epsilon)
    writer.add_vocab_size(found.vocabulary)
    if form.whole and windows:
        writer.add_sliding_window(windows[0])
    if "attention_cap" in form.can:
        writer.add_attn_logit_softcapping(found.attention_cap)
        writer.add_final_logit_softcapping(found.logit_cap)
    if "attention_scale" in form.can:
        writer.add_attention_scale(
            found.attention_scale if found.attention_scale is not None else found.head_size**-0.5
        )
        writer.add_embedding_scale(found.embedding_scale)
        writer.add_residual_scale(found.residual_scale)
        writer.add_logit_scale(1.0 / found.logit_scale)  # it divides
    experts = found.blocks[0].experts
    if experts is not None:
        writer.add_expert_count(experts.count)
        writer.add_expert_used_count(experts.chosen)
        if form.arch != "llama":
            writer.add_expert_feed_forward_length(experts.inner)
        if experts.shared_inner is not None:
            writer.add_expert_shared_feed_forward_length(experts.shared_inner)
    rotary = found.rotaries[0]
    writer.add_rope_dimension_count(rotary.size)
    writer.add_rope_freq_base(rotary.base)
    if rotary.kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rotary.values["factor"]))
    elif rotary.kind == "yarn":
        _describe_yarn(model, rotary, writer)


def _describe_yarn(model: sft.FinishedModel, rotary: sft.Rotary, writer: Any) -> None:
    import gguf

    known = {"factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "rope_type", "type"}
    more = sorted(key for key, value in rotary.values.items() if key not in known and value is not None)
    if more:
        raise sft.UsageError(
            f"A GGUF file cannot describe {', '.join(more)} of this model's rope_scaling; write --to huggingface."
        )
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(float(rotary.values["factor"]))
    writer.add_rope_scaling_orig_ctx_len(int(rotary.values.get("original_max_position_embeddings") or rotary.positions))
    writer.add_rope_scaling_yarn_beta_fast(float(rotary.values.get("beta_fast") or 32.0))
    writer.add_rope_scaling_yarn_beta_slow(float(rotary.values.get("beta_slow") or 1.0))


def further_tensors(model: sft.FinishedModel) -> dict[str, np.ndarray]:
    """Tensors that the file has beside the model's: by what each rotary frequency is divided, float32 [size / 2]."""
    rotary = model.architecture.rotaries[0]
    if rotary.kind != "llama3":
        return {}
    plain = replace(rotary, kind="default").frequencies()[0]
    return {"rope_freqs.weight": (plain / rotary.frequencies()[0]).astype(np.float32)}


def arranged(name: str, model: sft.FinishedModel, form: Form) -> np.ndarray:
    """The tensor ``name`` of ``model``, its rows in the order in which ``form`` has them."""
    return turned_as(form, name, model.read(name), model)


def turned_as(form: Form, name: str, array: np.ndarray, model: sft.FinishedModel) -> np.ndarray:
    """``array``, the rows of tensor ``name`` or of what is added to it, in the order in which ``form`` has them."""
    found = model.architecture
    assert isinstance(found, sft.Architecture)
    layer = name.split(".")[-2]
    if found.norm_offset and array.ndim == 1 and layer.endswith("norm"):
        return array.astype(np.float32) + np.float32(found.norm_offset)  # the graph adds none
    if form.adjacent and layer in ("q_proj", "k_proj"):
        return _adjacent(array, found.heads if layer == "q_proj" else found.kv_heads)
    return array


def _adjacent(array: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head, of which i and i + size / 2 turn together, so that 2i and 2i + 1 do."""
    halves = array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
    return halves.swapaxes(1, 2).reshape(array.shape)
