"""Whether the files of an adapter hold everything that trains: checked before hours are spent on what would be lost."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import paddle

from sft.errors import UsageError
from sft.files import can_write
from sft.models.layers import trainable
from sft.plugins.calls import a_or_an, mistaken

if TYPE_CHECKING:
    from sft.context import CoreRun
    from sft.seams import AdapterFiles


def check_export(run: CoreRun) -> None:
    """Refuse an adapter whose files could not be written, or would lack something that trains.

    To see what the files depend on, parameters are changed and the exports compared; afterwards the parameters are
    restored bit by bit. All processes take part, and the main one compares.
    """
    if not run.exports_adapter:
        return
    with run.strategy.assembled(run.model):
        if not run.strategy.is_main:
            return
        export = partial(run.hook.sft_export_adapter, run=run, model=run.model)
        wrong = not_written(export())
        # Layers that train whole, and rows of tokens, are written by the core.
        own = {*run.whole, *run.rows}
        parameters = {name: p for name, p in trainable(run.model).items() if name not in own}
        missing = left_out(parameters, export) if wrong is None else []
    plugin = str(run.plugins.provider("sft_export_adapter"))
    if wrong is not None:
        raise mistaken(wrong, "sft_export_adapter", run.plugins.who(plugin))
    if missing:
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3:,} more" if len(missing) > 3 else "")
        raise UsageError(
            f"Plugin {plugin} leaves {shown} out of the adapter that it writes, so "
            "what they learn would be lost; upgrade the plugin that trains them, or leave it out."
        )


def not_written(files: AdapterFiles) -> str | None:
    """What of ``files`` no adapter's folder could hold, or without which nobody could read it; None if all is well."""
    for key, value in files.config.items():
        try:
            json.dumps({key: value}, ensure_ascii=False).encode()
        except (TypeError, ValueError, RecursionError) as error:
            cause = " ".join(str(error).split())
            return f"a config that cannot be written as JSON: {key!r} is {a_or_an(type(value).__name__)} ({cause})"
    kind = files.config.get("peft_type")
    if not isinstance(kind, str) or not kind:
        return f"a config whose 'peft_type' is {kind!r} where the kind of adapter, a text, is expected"
    for name, tensor in files.tensors.items():
        if not can_write(tensor.dtype):
            return f"a tensor that safetensors cannot hold: {name!r} is of {tensor.dtype}"
    return None


@paddle.no_grad()
def left_out(parameters: Mapping[str, Any], export: Callable[[], AdapterFiles]) -> list[str]:
    """The names of those ``parameters`` whose values leave no trace in what ``export`` gives.

    Parameters are numbered. For each binary digit, those that have a 0 there are changed together, and then those that
    have a 1. An entry of the files that changes with exactly one of the two, for each digit, depends on one parameter
    alone, and the digits spell its number. So about 2·log₂(number of parameters) exports recognise most of them; the
    others, which share their entries, are then changed one by one. What differs from export to export by itself, such
    as a date, proves nothing and is set aside.
    """
    names = list(parameters)
    held = {name: parameter.clone() for name, parameter in parameters.items()}
    # Together no larger than the moments of the optimizer, which come with the first step.
    first, second = ({name: _varied(value, kind) for name, value in held.items()} for kind in (1.0, 1.7))

    def put(values: Mapping[str, Any], chosen: Iterable[str]) -> None:
        for name in chosen:
            parameters[name].set_value(values[name])

    def changed(digests: Mapping[str, bytes]) -> set[str]:
        return {key for key, digest in plain.items() if digests.get(key) != digest}

    def varied(chosen: list[str]) -> dict[str, bytes]:
        put(second, chosen)
        digests = _digests(export())
        put(first, chosen)
        return digests

    def set_aside() -> None:
        """Leave out what differs though nothing was changed since the first export: a date, a random name."""
        for key in changed(_digests(export())):
            del plain[key]

    try:
        put(first, names)  # zeros, as adapters begin with, hide what they are multiplied with
        plain = _digests(export())
        digits = range(max(1, (len(names) - 1).bit_length()))
        by_digit = [
            [varied([name for number, name in enumerate(names) if number >> digit & 1 == value]) for value in (0, 1)]
            for digit in digits
        ]
        set_aside()  # now, not at once: a date in seconds changes seldom
        numbers: dict[str, int | None] = dict.fromkeys(plain, 0)
        for digit in digits:
            zero, one = (changed(digests) for digests in by_digit[digit])
            for key, number in numbers.items():
                single = number is not None and (key in zero) != (key in one)
                numbers[key] = number | (key in one) << digit if single and number is not None else None
        kept = {names[number] for number in numbers.values() if number is not None}
        alone = {name: varied([name]) for name in names if name not in kept}
        set_aside()
        return [name for name, digests in alone.items() if not changed(digests)]
    finally:
        put(held, names)


def _varied(value: Any, kind: float) -> Any:
    """``value`` with each element moved by another share of itself, keeping its sign or, if it is 0, becoming positive;
    differently for each ``kind``."""
    shares = 0.5 + 0.4 * paddle.sin(kind * paddle.arange(1, value.size + 1, dtype="float32"))
    flat = value.astype("float32").reshape([-1])
    return (flat * (1.0 + shares) + 0.01 * shares).reshape(value.shape).astype(value.dtype)


def _digests(files: AdapterFiles) -> dict[str, bytes]:
    """A digest of each tensor of ``files``, and each entry of its config as JSON."""
    digests = {
        f"config {key}": json.dumps(value, sort_keys=True, default=str).encode() for key, value in files.config.items()
    }
    for name, tensor in files.tensors.items():
        digests[f"tensor {name}"] = hashlib.blake2b(np.ascontiguousarray(tensor).tobytes()).digest()
    return digests
