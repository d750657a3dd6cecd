"""The layers of a model that techniques work on, and how one layer takes another's place."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sft.distributed.parts import is_elsewhere, part_of, whole_size
from sft.errors import UsageError
from sft.foreign_text import quoted
from sft.patterns import matches

STANDS_FOR = "stands_for"
"""Where a layer that has taken another's place says which."""


@dataclass(frozen=True)
class Target:
    """A Linear of a transformer block: its name as Hugging Face has it, its place, and the layer itself. The embedding
    is one of tokens, [V, hidden], and lm_head one of hidden states, [hidden, V].

    Attributes:
        name: For example ``model.layers.0.self_attn.q_proj``.
        parent, attribute: The layer that holds it, and as what.
        layer: A paddle Linear, or what stands for one.
        in_features, out_features: Of the whole, where processes share it.
    """

    name: str
    parent: Any
    attribute: str
    layer: Any
    in_features: int
    out_features: int

    def replace(self, layer: Any) -> None:
        """Put ``layer`` in this place, which it leaves within :class:`sft.Reference`."""
        setattr(self.parent, self.attribute, layer)
        vars(layer)[STANDS_FOR] = self.layer  # no sublayer of it, which it may be under another name


def target_layers(model: Any, patterns: Sequence[str] | None = None) -> list[Target]:
    """Linear layers of the transformer blocks, in the model's order; never the embedding or lm_head,
    and routers of experts only where a pattern names them.

    ``patterns`` narrows them: a plain name (``q_proj``) matches the last part of a layer's name, anything else
    is a regular expression that must match the whole name. A pattern that matches nothing is a
    :class:`UsageError` that lists what there is.
    """
    from sft.models.decoder import Router

    found = _linears(model)
    if not patterns:
        return [target for target in found if not isinstance(target.layer, Router)]
    chosen = matching([target.name for target in found], patterns)
    return [target for target in found if target.name in chosen]


def vocabulary_layers(model: Any) -> list[Target]:
    """The embedding and the head, ``model.embed_tokens`` and ``lm_head``, for techniques that name them. What takes
    their places makes of int64 [B, S] the rows [B, S, hidden] (``base.look_up`` gives those of another matrix), and is
    an :class:`sft.HeadLayer`. Of a tied model both have one matrix.

    Raises :class:`UsageError` for a model of a plugin's family: only the decoder's are known.
    """
    from sft.models.decoder import CausalLM

    if not isinstance(model, CausalLM):
        raise UsageError(
            f"{type(model).__name__} is a class of a plugin's own, whose embedding and head stay as they are; name "
            "layers of its blocks."
        )
    rows, size = model.architecture.vocabulary, model.architecture.hidden
    embedding = Target("model.embed_tokens", model.model, "embed_tokens", model.model.embed_tokens, rows, size)
    return [embedding, Target("lm_head", model, "lm_head", model.lm_head, size, rows)]


def matching(names: Sequence[str], patterns: Sequence[str]) -> set[str]:
    """Those of the layers' ``names`` that ``patterns`` choose, as :func:`target_layers` reads them; raises
    :class:`UsageError` for one that chooses none."""
    chosen: set[str] = set()
    for pattern in patterns:
        matched = {name for name in names if _matches(pattern, name)}
        if not matched:
            kinds = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in names))
            raise UsageError(
                f"Target {quoted(pattern)} matches no layer; this model has {kinds} in each block (for example "
                f"{names[0]})."
            )
        chosen |= matched
    return chosen


def _matches(pattern: str, name: str) -> bool:
    if re.fullmatch(r"\w+", pattern):
        return name.rsplit(".", 1)[-1] == pattern
    return matches(pattern, name, "Target")


def module_names(adapted: Iterable[str], everything: Iterable[str]) -> list[str]:
    """PEFT's ``target_modules`` for the layers ``adapted`` of ``everything`` that could have been, all by name.

    The last parts of their names (``q_proj``), or the whole names where only some of the layers of a last part are
    adapted.
    """
    names = set(adapted)
    kinds = {name.rpartition(".")[2] for name in names}
    everywhere = {name for name in everything if name.rpartition(".")[2] in kinds}
    return sorted(kinds if everywhere == names else names)


def _linears(model: Any) -> list[Target]:
    targets, blocks = [], f"{model.architecture.block_names}."
    for path, parent in model.named_sublayers():
        if not path.startswith(blocks):
            continue
        for attribute, layer in parent.named_children():
            features = linear_features(layer)
            if features is not None:
                targets.append(Target(f"{path}.{attribute}", parent, attribute, layer, *features))
    return targets


def linear_features(layer: Any) -> tuple[int, int] | None:
    """(in, out) of a layer that is a Linear, or stands for one (a quantized layer says so itself); else None.

    Of a layer that is divided among processes, those of the whole.
    """
    import paddle

    part = part_of(layer)
    if part is not None:
        return part.shape[0], part.shape[1]
    if isinstance(layer, paddle.nn.Linear):
        return int(layer.weight.shape[0]), int(layer.weight.shape[1])
    if hasattr(layer, "dequantize"):
        return int(layer.in_features), int(layer.out_features)
    return None


def linear_weight(layer: Any) -> Any:
    """The weight of a Linear, or of what stands for one, float32 [in, out]: what this process holds of it."""
    return layer.dequantize() if hasattr(layer, "dequantize") else layer.weight.astype("float32")


def linear_bias(layer: Any) -> Any:
    """What a Linear, or what stands for one, adds to its products in this process: [out], or None. Of processes that
    share its inputs one adds the bias, and the others add zeros."""
    return layer.added_bias if hasattr(layer, "added_bias") else getattr(layer, "bias", None)


def quantized_values(model: Any) -> int:
    """How many values of Linears are kept as codes, or beside them: those that ``parameters()`` does not know of."""
    count = 0
    for layer in model.sublayers():
        if hasattr(layer, "dequantize"):
            in_features, out_features = linear_features(layer) or (0, 0)
            count += in_features * out_features
            if getattr(layer, "bias", None) is not None and "bias" not in dict(layer.named_parameters()):
                count += out_features
    return count


def trainable(model: Any) -> dict[str, Any]:
    """Structured name → parameter, of those that train; tied parameters appear once."""
    return {name: parameter for name, parameter in model.named_parameters() if not parameter.stop_gradient}


def sizes(parameters: dict[str, Any], model: Any) -> tuple[int, int]:
    """Trainable and all parameters, as numbers of values of the whole model; a quantizer's codes count too."""
    found = [(whole_size(parameter), not parameter.stop_gradient) for parameter in parameters.values()]
    total = sum(size for size, _ in found) + quantized_values(model)
    return sum(size for size, trains in found if trains), total


def trained_by_layer(parameters: Mapping[str, Any], model: Any) -> dict[str, dict[str, int]]:
    """How many values train in each block of a model (``model.layers.0``), by the part of it to which they belong
    (``self_attn.q_proj``), and in what is in no block. What an adapter adds to a layer belongs to that layer, and
    experts of one name add up. ``parameters`` are all of the model, by structured name."""
    blocks = f"{model.architecture.block_names}."
    paths = [path for path, layer in model.named_sublayers() if STANDS_FOR in vars(layer)]
    adapted = {_in_block(path, blocks)[1] for path in paths}
    found: dict[str, dict[str, int]] = {}
    for name, parameter in parameters.items():
        if parameter.stop_gradient:
            continue
        layer, part = _in_block(name, blocks)
        words = part.split(".")
        owners = (".".join(words[:count]) for count in range(1, len(words)))
        own = next((owner for owner in owners if owner in adapted), ".".join(words[:-1]) or part)
        of_layer = found.setdefault(layer or own, {})
        of_layer[own] = of_layer.get(own, 0) + whole_size(parameter)
    return found


def _in_block(path: str, blocks: str) -> tuple[str, str]:
    """A structured name as its block, empty where it is in none, and the rest, without numbers."""
    block, rest = "", path
    if path.startswith(blocks):
        number, _, rest = path.removeprefix(blocks).partition(".")
        block = f"{blocks}{number}"
    return block, ".".join(word for word in rest.split(".") if not word.isdigit())


def held_by(quantizer: str | None, model: Any) -> str:
    """For a line about a model: how many of its Linears plugin ``quantizer`` holds; empty where there is none."""
    if quantizer is None:
        return ""
    count = sum(hasattr(layer, "dequantize") for layer in model.sublayers())
    part = " of this process" if any(is_elsewhere(layer) for layer in model.sublayers()) else ""
    return f", {count:,} Linears{part} held by {quantizer}"
