"""A plugin beside each other installed one, on each family of models, and on two processes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from sft.certify import tiny
from sft.certify.checking import check
from sft.certify.company import together_with
from sft.certify.comparing import NEAR, FailedError, NotTriedError, RefusedError, close, same
from sft.certify.lab import Lab, Outcome, no_others, provides, quiet
from sft.certify.runs import DEFAULTS, check_learned, main_run
from sft.certify.subject import forms_of
from sft.errors import UsageError
from sft.fine_tune import run as fine_tune
from sft.inference.evaluate import evaluate_finished
from sft.plugins.discovery import canonical, import_plugin
from sft.plugins.requests import requests
from sft.training.journal import read_metrics

PROCESSES = "nproc"
"""The setting that starts several processes; the plugin that claims it shares a run among them."""


# --- beside others ------------------------------------------------------------------------------------------


_OF_LAYERS = ("sft_quantizer", "sft_adapt_model", "sft_kernels", "sft_attention_backend")


def _others(lab: Lab) -> Iterator[str]:
    return iter(lab.others)


@check(
    "Beside another plugin it trains, resumes, is read again and merged; or the two are refused in one sentence.",
    cases=_others,
)
def works_beside(lab: Lab, case: str) -> str | None:
    lab, beside = together_with(lab, case)
    if provides(case, "sft_parallel_strategy") or lab.subject.has("sft_parallel_strategy"):
        return _in_two_processes(lab, {PROCESSES: 2}, beside)
    try:
        whole = lab.run(beside, save_strategy="steps", save_steps=2)
    except UsageError as error:
        raise RefusedError(str(error)) from error
    _compare(lab, case, beside, whole)
    # Other options are worth their time where others have a hand in the layers.
    given = lab.varied if any(provides(case, hook) for hook in _OF_LAYERS) else {}
    _keeps(lab, beside, lab.run(beside, save_strategy="steps", save_steps=2, **given), **given)
    said = _export(lab, [*lab.subject.forms, *forms_of(case)], whole)
    return f"beside {', '.join(beside)}" if beside != [case] else said


def _keeps(lab: Lab, beside: list[str], whole: Outcome, **given: Any) -> None:
    """It is gone on with, read again, merged and measured alike."""
    if len(whole.losses) > 2:  # it may have been asked to end before
        later = lab.resumed(whole, 2, beside, save_strategy="steps", save_steps=2, **given)
        same(later.losses, whole.losses[2:], "gone on with, the loss")
        same(later.files(), whole.files(), "gone on with, the files of the result")
        same(later.evaluations[-1:], whole.evaluations[-1:], "gone on with, the evaluation at the end")
    close(lab.reloaded(whole), whole.logits, "read again, logits")
    if (whole.folder / "adapter_config.json").is_file():
        close(lab.merged(whole), whole.logits, "merged, logits")


def _export(lab: Lab, forms: Iterable[str], whole: Outcome, model: Path | None = None) -> str | None:
    """It is written in one of ``forms`` at least; what is said of those that hold less than there is, such as an
    adapter alone."""
    written, refused = 0, list[str]()
    for form in forms:
        try:
            lab.exported(whole, form, model)
            written += 1
        except UsageError as error:
            refused.append(f"not as {form}: {error}")
    if refused and not written:
        raise RefusedError(refused[0])
    return "; ".join(refused) or None


def _compare(lab: Lab, case: str, beside: list[str], whole: Outcome) -> None:
    """What only computes in another way changes no number; what refines the subject changes some."""
    steps = len(whole.losses) if whole.ended_early else None
    needed = lab.needed_of_core(beside)
    if lab.subject.only_computes(beside):
        close(whole.losses, main_run(lab, DEFAULTS, **needed).losses[:steps], f"without {case}, losses", NEAR)
    elif lab.subject.name in map(canonical, getattr(import_plugin(case), "requires", ())):
        plain = main_run(lab, DEFAULTS, **needed)
        if plain.numbers() == whole.numbers():
            raise FailedError(f"{case} refines it and has no effect")
    if lab.subject.only_computes():
        try:
            plain = lab.run(beside, without=True)
        except UsageError:
            return
        close(whole.losses, plain.losses[:steps], "without it, losses", NEAR)
        own, others = ([step["grad_norm"] for step in outcome.steps[:steps]] for outcome in (whole, plain))
        close(own, others, "without it, gradient norms", NEAR / 10)


# --- families -----------------------------------------------------------------------------------------------


def _families(lab: Lab) -> list[str]:
    return [] if lab.subject.shares else tiny.families()


@check(
    "On each family of models it trains, is read again and merged; what only computes otherwise computes the same.",
    cases=_families,
)
def works_on_family(lab: Lab, case: str) -> None:
    model = lab.model(case)
    outcome = lab.run(model=model)
    check_learned(outcome)
    close(lab.reloaded(outcome, model), outcome.logits, "read again, logits")
    if (outcome.folder / "adapter_config.json").is_file():
        close(lab.merged(outcome, model), outcome.logits, "merged, logits")
    if lab.subject.only_computes():
        plain = lab.run(without=True, model=model)
        close(outcome.losses[:1], plain.losses[:1], "the first loss")
        close(outcome.steps[0]["grad_norm"], plain.steps[0]["grad_norm"], "the first gradient norm", NEAR / 10)
        close(outcome.losses, plain.losses, "losses", NEAR)
    _export(lab, lab.subject.forms, outcome, model)


# --- two processes ------------------------------------------------------------------------------------------


def _plans(lab: Lab) -> dict[str, dict[str, Any]]:
    """Settings for two processes: each number and value by which a plugin that shares runs says it can be asked."""
    found: dict[str, dict[str, Any]] = {}
    for name in requests("number").get(PROCESSES, ()):
        if not provides(name, "sft_parallel_strategy"):
            continue
        found[f"{PROCESSES} 2"] = {PROCESSES: 2}
        for number, names in requests("number").items():
            if name in names and number != PROCESSES:
                found[f"{number} 2"] = {PROCESSES: 2, number: 2}
        for value, names in requests("value").items():
            if name in names:
                key, _, word = value.partition(".")
                found[f"{key} {word}"] = {PROCESSES: 2, key: word}
    return found


@check(
    "On two processes that share the run it learns what it learns on one, and the result is read again and merged.",
    cases=_plans,
)
def works_in_two_processes(lab: Lab, case: str) -> str | None:
    return _in_two_processes(lab, _plans(lab)[case], [])


def _in_two_processes(lab: Lab, plan: dict[str, Any], beside: list[str]) -> str | None:
    if lab.extra:
        raise NotTriedError("the plugin is not installed, and other processes would not have it")
    shared = [one for one in beside if not provides(one, "sft_parallel_strategy")]
    key = json.dumps([plan, shared])
    if key not in lab.tried:  # beside the plugin that shares runs, it is tried in the same way
        lab.tried[key] = _tried(lab, plan, shared)
    return lab.tried[key]


def _tried(lab: Lab, plan: dict[str, Any], shared: list[str]) -> str | None:
    try:
        folder, steps, evaluations = _shared_run(lab, plan, lab.names(shared))
    except UsageError as error:
        if not shared and _is_refused_anyway(lab, plan):
            raise NotTriedError(f"the plan is refused of other runs too: {error}") from error
        raise RefusedError(str(error)) from error
    if plan == {PROCESSES: 2}:
        place = str(folder / "checkpoint-2")
        later, rest, measured = _shared_run(lab, plan, lab.names(shared), resume_from_checkpoint=place)
        same([line["loss"] for line in rest[-1:]], [line["loss"] for line in steps[-1:]], "gone on with, the loss")
        same(measured[-1:], evaluations[-1:], "gone on with, the evaluation at the end")
        same(Outcome(later).files(), Outcome(folder).files(), "gone on with, the files of the result")
    alone = _on_one(lab, shared, steps[0]["tokens"])
    close(evaluations[:1], [alone.evaluations[0]["eval_loss"]], "the loss of dev data before the first step")
    _measures_on_one(lab, folder, evaluations[-1], lab.names(shared))
    if (folder / "adapter_config.json").is_file():
        close(lab.merged(Outcome(folder)), lab.reloaded(Outcome(folder)), "merged, logits")
    if lab.draws(shared):
        return "it draws, and each process draws its own: what they learn is not compared"
    losses = [line["loss"] for line in steps]
    close(losses[:1], alone.losses[:1], "the first loss")
    close(losses, alone.losses, "losses", NEAR)
    norms = [line["grad_norm"] for line in steps]
    close(norms[:1], [alone.steps[0]["grad_norm"]], "the first gradient norm", NEAR / 10)
    return None


def _is_refused_anyway(lab: Lab, plan: dict[str, Any]) -> bool:
    """Whether a run of this plan is refused without the subject: then it says nothing of the two."""
    try:
        _shared_run(lab, plan, lab.names(without=True))
    except UsageError:
        return True
    return False


def _shared_run(lab: Lab, plan: dict[str, Any], names: list[str], **more: Any) -> tuple[Path, list[Any], list[float]]:
    """The folder of a run of ``names`` in two processes, its lines of steps, and the losses that it measured."""
    names = [one for one in names if not provides(one, "sft_parallel_strategy")]
    saves = {"per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 1}
    values = lab.settings(lab.model(), names, **saves, **plan, **more)
    fine_tune(values, say=quiet)
    folder = Path(values["output_dir"])
    lines = read_metrics(folder)
    steps = [line for line in lines if "loss" in line]
    return folder, steps, [line["eval_loss"] for line in lines if "eval_loss" in line]


def _on_one(lab: Lab, beside: list[str], tokens: int) -> Outcome:
    """The run of one process that has as many tokens in its first step: two processes share rows, or have the same."""
    only = lab.subject.has("sft_parallel_strategy")
    for size in (2, 4):
        outcome = lab.run(beside, without=only, per_device_train_batch_size=size)
        if outcome.steps[0]["tokens"] == tokens:
            return outcome
    raise FailedError(f"the first step has {tokens} tokens, which two or four rows on one process do not have")


def _measures_on_one(lab: Lab, folder: Path, expected: float, names: list[str]) -> None:
    """What two processes wrote is measured in this one."""
    adapter = (folder / "adapter_config.json").is_file()
    data = lab.needed(names).get("dataset_name_or_path", str(lab.data))
    values = {
        "model_name_or_path": str(lab.model() if adapter else folder),
        "dataset_name_or_path": data,
        "max_length": 64,
    }
    reading = [
        *(lab.reading() if adapter else no_others()),
        *(one for one in names if provides(one, "sft_record_format")),
    ]
    record = evaluate_finished(values, folder if adapter else None, quiet, reading)
    close(record["eval_loss"], expected, "the loss of the result, measured in one process", 1e-4)


CHECKS = (works_on_family, works_beside, works_in_two_processes)
