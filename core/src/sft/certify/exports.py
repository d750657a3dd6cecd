"""What a plugin must keep that writes finished models in another form."""

from __future__ import annotations

from sft.certify.checking import check
from sft.certify.comparing import FailedError, NotTriedError, same
from sft.certify.lab import Lab, Outcome, digests, quiet
from sft.certify.runs import DEFAULTS, main_run
from sft.certify.subject import an_adapter
from sft.errors import UsageError
from sft.inference.merge import merge


def _exports(lab: Lab) -> bool:
    return lab.subject.has("sft_export")


def _forms(lab: Lab) -> list[str]:
    return lab.subject.forms or [""]


def writes_models(lab: Lab, form: str) -> bool:
    """Whether a model without an adapter is written in ``form``; some are of adapters alone."""
    try:
        lab.exported(Outcome(lab.model()), form)
    except UsageError:
        return False
    return True


def _check_form(form: str) -> None:
    if not form:
        raise NotTriedError("no form is known that it writes: its metadata names none (export.FORM)")


@check(
    "In each form it writes what a run has trained: the same files again, and it touches no other.", _exports, _forms
)
def exports(lab: Lab, case: str) -> str:
    _check_form(case)
    outcome = main_run(lab, DEFAULTS)
    if not lab.subject.adapts() and not writes_models(lab, case):
        raise NotTriedError("no model is written in it without an adapter; beside one it is tried too")
    before = digests(outcome.folder, outcome.folder.rglob("*"))
    written = lab.exported(outcome, case)
    same(lab.exported(outcome, case), written, "written again, the files")
    same(digests(outcome.folder, outcome.folder.rglob("*")), before, "the files of the model itself")
    if not written:
        raise FailedError("it wrote no file")
    return ", ".join(written)


@check("A model with an adapter is written as the model that they are merged into.", _exports, _forms)
def exports_what_is_adapted(lab: Lab, case: str) -> str:
    _check_form(case)
    try:
        adapter = an_adapter(lab.subject)
    except UsageError as error:
        raise NotTriedError(str(error)) from error
    if not writes_models(lab, case):
        raise NotTriedError("it holds an adapter alone, and no model that one is merged into")
    outcome = lab.run(adapter)
    merged = lab.place("merged") / lab.model().name  # which a file may say
    merged.parent.mkdir()
    merge(str(lab.model()), outcome.folder, merged, quiet)
    written = lab.exported(outcome, case)
    same(written, lab.exported(Outcome(merged), case), "with the adapter and merged, the files")
    if written == lab.exported(Outcome(lab.model()), case):
        raise FailedError("with the adapter and without it, the files are the same")
    return f"beside {', '.join(adapter)}"


CHECKS = (exports, exports_what_is_adapted)
