"""What every plugin must keep: its runs repeat, resume, measure without changing anything, and leave nothing behind."""

from __future__ import annotations

import logging
import os
import random
import signal
import sys
import threading
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from sft.certify.checking import check
from sft.certify.comparing import CLOSE, NEAR, FailedError, NotTriedError, close, same
from sft.certify.lab import Lab, Outcome
from sft.certify.subject import other_values
from sft.context import Run
from sft.data.batches import PaddedCollator
from sft.errors import UsageError
from sft.kit.validate import validated
from sft.plugins.marks import hookimpl, hooks_of
from sft.plugins.registry import Plugin

DEFAULTS, VARIED = "as it comes", "options changed"


def variants(lab: Lab) -> Iterator[str]:
    """The subject as it comes, and with all its options changed."""
    yield DEFAULTS
    if lab.varied:
        yield VARIED


def settings_of(lab: Lab, variant: str) -> dict[str, Any]:
    return lab.varied if variant == VARIED else {}


def main_run(lab: Lab, variant: str, **more: Any) -> Outcome:
    """The run on which most checks stand: with a checkpoint of each step."""
    return lab.run(save_strategy="steps", save_steps=1, **settings_of(lab, variant), **more)


# --- the plugin itself --------------------------------------------------------------------------------------


@check("What it declares holds, as `sft plugins validate` has it: entry point, API, hooks, settings, words, import.")
def declared(lab: Lab, case: str) -> None:
    if lab.extra:
        raise NotTriedError("its class was given directly, and declares nothing")
    faults = [fault for found in validated(lab.subject.request) for _, fault in found.faults]
    if faults:
        raise FailedError(faults[0])


@check("A run of it learns: all numbers are finite, and the loss on what is learned falls.", cases=variants)
def learns(lab: Lab, case: str) -> None:
    check_learned(main_run(lab, case))


def check_learned(outcome: Outcome) -> None:
    """All is finite, and what the run minimises has fallen."""
    before, after = outcome.minimised[0], outcome.minimised[-1]
    if not np.isfinite([*outcome.losses, before, after]).all():
        raise FailedError("a loss is not finite")
    if after >= before:
        raise FailedError(f"after {len(outcome.losses)} steps the loss is {after:.4f}, and it was {before:.4f}")


@check("A run tells what it has to say through run.say, and writes nothing past it.", cases=variants)
def speaks_through_the_run(lab: Lab, case: str) -> None:
    printed = main_run(lab, case).printed.strip()
    if printed:
        raise FailedError(f"it wrote {printed.splitlines()[0]!r}")


@check("The same run again gives the same bits, whatever others draw from generators that all share.", cases=variants)
def repeats(lab: Lab, case: str) -> None:
    first = main_run(lab, case)
    again = lab.run(fresh=True, save_strategy="steps", save_steps=1, **settings_of(lab, case))
    same(again.losses, first.losses, "losses")
    same(again.files(), first.files(), "files of the result")
    same(again.evaluations, first.evaluations, "evaluations")


@check(
    "A run that is gone on with from its checkpoint ends with the same bits as one that was not stopped.",
    cases=variants,
)
def resumes(lab: Lab, case: str) -> None:
    whole = main_run(lab, case)
    if len(whole.losses) < 2:
        raise NotTriedError("it ends its run after the first step, so nothing could follow")
    for step in range(1, len(whole.losses)):
        later = lab.resumed(whole, step, save_strategy="steps", save_steps=1, **settings_of(lab, case))
        same(later.losses, whole.losses[step:], f"from step {step} on, losses")
        same(later.files(), whole.files(), f"from step {step} on, files of the result")
        same(later.evaluations[-1:], whole.evaluations[-1:], f"from step {step} on, the evaluation at the end")


class Disturbs(Plugin):
    """Lets paddle draw otherwise after each step, until the next one begins."""

    name = "certify-disturbs"
    api_version = 1

    @hookimpl
    def sft_step_ended(self, run: Run, record: dict[str, Any]) -> None:
        import paddle

        paddle.seed(123_456_789)


@check("Evaluating changes nothing of what is learned, draws nothing, and finds the same again.", cases=variants)
def evaluates_without_a_trace(lab: Lab, case: str) -> None:
    plain, given = main_run(lab, case), settings_of(lab, case)
    watched = lab.run(evaluation_strategy="steps", eval_steps=1, **given)
    same(watched.losses, plain.losses, "losses of a run that evaluates after each step")
    same(watched.files(), plain.files(), "files of a run that evaluates after each step")
    same(watched.evaluations[:1], plain.evaluations[:1], "the evaluation before the first step")
    same(watched.evaluations[-1:], plain.evaluations[-1:], "the evaluation of the result")
    twice = [record["eval_loss"] for record in watched.evaluations if record["step"] == plain.steps[-1]["step"]]
    same(twice, twice[:1] * len(twice), "the same model measured twice")
    alone = lab.run(do_train=False, **given)
    same(alone.evaluations, plain.evaluations[:1], "a run that only measures")
    disturbed = lab.run(also=[Disturbs], evaluation_strategy="steps", eval_steps=1, **given)
    same(disturbed.losses, watched.losses, "losses, where paddle's generator is another while it evaluates")
    same(disturbed.evaluations, watched.evaluations, "evaluations, where paddle's generator is another")


@check("What a run writes is what it trained: read again, it computes the same.", cases=variants)
def reloads(lab: Lab, case: str) -> None:
    outcome = main_run(lab, case)
    close(lab.reloaded(outcome), outcome.logits, "logits")


def _watches(lab: Lab) -> bool:
    return bool(getattr(lab.subject.plugin, "observes", False))


@check("A run that is only watched learns, to the bit, what it learns alone.", _watches)
def changes_nothing(lab: Lab, case: str) -> None:
    watched, plain = main_run(lab, DEFAULTS), lab.run(without=True, save_strategy="steps", save_steps=1)
    same(watched.losses, plain.losses, "losses")
    same(watched.files(), plain.files(), "files of the result")
    for one, other in zip(watched.evaluations, plain.evaluations, strict=True):
        same({key: one.get(key) for key in other}, other, "an evaluation")


@check("A run of another model afterwards is not touched by the one before.")
def runs_share_nothing(lab: Lab, case: str) -> None:
    main_run(lab, DEFAULTS)
    other = lab.model(num_hidden_layers=1)
    outcome = lab.run(model=other)
    close(lab.reloaded(outcome, other), outcome.logits, "logits of its result")


# --- what all share -----------------------------------------------------------------------------------------


@check(
    "A run leaves what all share as it was: generators, environment, working folder, paddle's settings, its own module."
)
def leaves_nothing_behind(lab: Lab, case: str) -> None:
    lab.run(fresh=True)  # what is made once has been made
    noted: dict[str, dict[str, Any]] = {}

    class Note(Plugin):
        name = "certify-note"
        api_version = 1
        order = -1_000_000

        @hookimpl
        def sft_check(self, run: Run) -> None:
            noted["before"] = _shared(lab)

    lab.run(also=[Note])
    before, after = noted["before"], _shared(lab)
    changed = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    if changed:
        raise FailedError(f"a run changes {', '.join(changed[:5])}")


def _shared(lab: Lab) -> dict[str, Any]:
    import paddle

    root = lab.subject.plugin.__module__.partition(".")[0]
    own = {name: module for name, module in list(sys.modules.items()) if name.partition(".")[0] == root != "sft"}
    return {
        "the generator of random": hash(random.getstate()),
        "the generator of numpy": hash(np.random.get_state()[1].tobytes()),  # type: ignore[index]
        "numpy's handling of errors": repr(np.geterr()),
        "the environment": dict(os.environ),
        "the working folder": (os.getcwd(), sorted(os.listdir())),
        "sys.path": list(sys.path),
        "the filters of warnings": len(warnings.filters),
        "the level of logging": (logging.root.level, len(logging.root.handlers)),
        "signals": [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)],
        "threads": sorted(one.name for one in threading.enumerate() if not one.daemon),
        "paddle's default dtype": paddle.get_default_dtype(),
        "paddle's device": paddle.device.get_device(),
        "whether paddle keeps gradients": paddle.is_grad_enabled(),
        **{f"{name}.{key}": value for name, module in own.items() for key, value in _plain(module)},
        **{f"the class's {key}": value for key, value in _plain(lab.subject.plugin)},
    }


def _plain(owner: Any) -> Iterable[tuple[str, Any]]:
    """The plain values and collections of a module or class; other things in them by which they are."""
    for key, value in list(vars(owner).items()):
        if not key.startswith("__") and isinstance(value, (dict, list, set, tuple, str, int, float, bool, bytes)):
            yield key, _frozen(value)


def _frozen(value: Any) -> Any:
    if isinstance(value, dict):
        return [(_frozen(key), _frozen(one)) for key, one in value.items()]
    if isinstance(value, (list, tuple)):
        return [_frozen(one) for one in value]
    if isinstance(value, set):
        return sorted(map(repr, value))
    return value if isinstance(value, (str, int, float, bool, bytes, type(None))) else id(value)


# --- options ------------------------------------------------------------------------------------------------


def _options(lab: Lab) -> Iterable[str]:
    return lab.subject.options


@check("No option is accepted and ignored: another value changes what is learned.", cases=_options)
def options_take_effect(lab: Lab, case: str) -> str:
    option = lab.subject.options[case]
    if len(option.words) == 1:
        raise NotTriedError(f"its one value, {option.words[0]}, asks for the plugin")
    if lab.subject.shares:
        raise NotTriedError("processes that share a run are what works in two processes tries")
    values = other_values(option, lab.subject.tried)
    if not values:
        raise NotTriedError(f"no value of it can be guessed; give one with --try {case}=VALUE")
    rest = {name: value for name, value in lab.varied.items() if name != case}
    shown, why = [], ""
    for beside in ({}, rest) if rest else ({},):
        for value in values:
            try:
                other = lab.run(save_strategy="steps", save_steps=1, **beside, **{case: value})
            except UsageError as error:
                why = str(error)
                continue
            plain = lab.run(save_strategy="steps", save_steps=1, **beside)
            shown.append(value)
            if other.numbers() != plain.numbers() or _changes_an_export(lab, plain, beside, {case: value}):
                return f"{case} {value}"
    if not shown:
        raise NotTriedError(f"all values that were tried are refused: {why}")
    same_as = f"with {' or '.join(dict.fromkeys(map(str, shown)))} everything is as without"
    if lab.subject.only_computes() and not lab.subject.may_ask and not lab.subject.forms:
        raise NotTriedError(f"{same_as}, and the plugin changes nothing of what is learned")
    raise FailedError(same_as)


def _changes_an_export(lab: Lab, outcome: Outcome, beside: dict[str, Any], given: dict[str, Any]) -> bool:
    """Whether a model is exported otherwise with the options ``given``, in a form that takes them."""
    for form in lab.subject.forms:
        try:
            if lab.exported(outcome, form, **beside, **given) != lab.exported(outcome, form, **beside):
                return True
        except UsageError:
            continue
    return False


def _publishes(lab: Lab) -> bool:
    published = getattr(lab.subject.plugin, "hookspecs", None)
    return published is not None and not lab.subject.shares


@check("It asks each hook that it publishes, so that no refinement is active and forgotten.", _publishes)
def asks_what_it_publishes(lab: Lab, case: str) -> str:
    asked: set[str] = set()

    def probe(name: str) -> Any:
        def implementation(self: Any) -> None:
            asked.add(name)

        return hookimpl(implementation)

    names = hooks_of(lab.subject.plugin.hookspecs)
    members = {"name": "certify-probe", "api_version": 1, **{name: probe(name) for name in names}}
    lab.run(also=[type("Probe", (Plugin,), members)])
    if silent := sorted(set(names) - asked):
        raise FailedError(f"{', '.join(silent)} was never asked")
    return ", ".join(names)


# --- rows ---------------------------------------------------------------------------------------------------


class Rows(PaddedCollator):
    """All records in their order, three to a row."""

    packs = True

    def rows(self, lengths: np.ndarray, rng: np.random.Generator | None) -> list[tuple[int, ...]]:
        numbers = range(len(lengths))
        return [tuple(numbers[start : start + 3]) for start in range(0, len(lengths), 3)]


class Packs(Plugin):
    """Puts three records into each row."""

    name = "certify-rows"
    api_version = 1

    @hookimpl
    def sft_collator(self, run: Run) -> Any:
        return Rows(run.tokenizer.pad_id)


def _collates_not(lab: Lab) -> bool:
    return not lab.subject.has("sft_collator") and not lab.subject.shares


@check("Records that share a row are learned as if each had its own.", _collates_not, variants)
def packed_as_padded(lab: Lab, case: str) -> None:
    given = settings_of(lab, case)
    if lab.draws(**given):
        raise NotTriedError("it draws, and other rows draw other numbers")
    padded = lab.run(per_device_train_batch_size=12, max_length=128, **given)
    packed = lab.run(also=[Packs], per_device_train_batch_size=4, max_length=128, **given)
    close(packed.losses[:1], padded.losses[:1], "the first loss")
    close(packed.steps[0]["grad_norm"], padded.steps[0]["grad_norm"], "the first gradient norm", 10 * CLOSE)
    close(packed.losses, padded.losses, "losses", NEAR)
    close(packed.evaluations[0]["eval_loss"], padded.evaluations[0]["eval_loss"], "the loss of dev data")


@check("Two micro-batches of two rows are learned as one of four.", _collates_not, variants)
def accumulates(lab: Lab, case: str) -> None:
    given = settings_of(lab, case)
    if lab.draws(**given):
        raise NotTriedError("it draws, and other micro-batches draw other numbers")
    whole = lab.run(**given)
    halves = lab.run(per_device_train_batch_size=2, gradient_accumulation_steps=2, **given)
    close(halves.losses[:1], whole.losses[:1], "the first loss")
    close(halves.losses, whole.losses, "losses", NEAR)


CHECKS = (
    declared,
    learns,
    reloads,
    resumes,
    repeats,
    evaluates_without_a_trace,
    speaks_through_the_run,
    changes_nothing,
    runs_share_nothing,
    leaves_nothing_behind,
    options_take_effect,
    asks_what_it_publishes,
    packed_as_padded,
    accumulates,
)
