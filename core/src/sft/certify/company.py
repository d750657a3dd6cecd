"""Who is beside whom: what a plugin cannot be without is learned by asking whether a run would be refused."""

from __future__ import annotations

from collections.abc import Sequence

from sft.certify.comparing import NotTriedError, RefusedError
from sft.certify.lab import Lab, no_others, quiet
from sft.certify.subject import Subject, an_adapter, company_of
from sft.errors import PluginError, UsageError
from sft.fine_tune import prepare_run
from sft.plugins.discovery import import_plugin
from sft.plugins.trial import no_records
from sft.settings.checks import check_plugins
from sft.settings.reading import normalise


def complete(lab: Lab) -> None:
    """Add an adapter to what the subject cannot be without, where a run is refused alone and not beside one. Raises
    :class:`UsageError` where the subject cannot be tried at all."""
    subject = lab.subject
    said = no_records(subject.plugin) or _refusal(lab, lab.names())
    if said is None:
        return
    adapter = _adapter(subject, [])
    if adapter and _refusal(lab, lab.names(adapter)) is None:
        subject.arranged, subject.company = adapter, [*adapter, *subject.company]
        return
    raise UsageError(f"Plugin {subject.name} cannot be tried here: {said}")


def together_with(lab: Lab, case: str) -> tuple[Lab, list[str]]:
    """What is beside the subject where it is tried with the plugin ``case``: that, what it requires, and an adapter
    where the two are refused without one. And the lab: another where ``case`` takes the place of an adapter that was
    arranged. Raises :class:`RefusedError` where the two are refused, and :class:`NotTriedError` where ``case`` is
    without the subject too."""
    try:
        said = no_records(import_plugin(case))
        own = [one for one in company_of(case) if one not in lab.subject.own]
    except UsageError as error:
        raise NotTriedError(str(error)) from error
    if said is not None:
        raise NotTriedError(f"{case}: {said}")
    said = _refusal(lab, lab.names(own))
    if said is None:
        return lab, own
    _check_alone(lab, case)
    if lab.subject.arranged:
        instead = lab.instead()
        if _refusal(instead, instead.names(company_of(case))) is None:
            return instead, company_of(case)
    adapter = _adapter(lab.subject, own)
    if adapter and _refusal(lab, lab.names([*adapter, *own])) is None:
        return lab, [*adapter, *own]
    raise RefusedError(said)


def _check_alone(lab: Lab, case: str) -> None:
    """Refuse to say anything of the subject where it is ``case`` that cannot be tried here."""
    *required, name = company_of(case)
    said = _refusal(lab, no_others([*required, name]))
    if said is not None:
        adapter = _adapter(Subject(name, name, import_plugin(name), required), [])
        if not adapter or _refusal(lab, no_others([*adapter, *required, name])) is not None:
            raise NotTriedError(said)


def _adapter(subject: Subject, others: Sequence[str]) -> list[str]:
    """An adapter for a subject whose runs write none; nothing where none goes together with it and ``others``."""
    try:
        return [] if subject.adapts() else an_adapter(subject, others)
    except UsageError:
        return []


def _refusal(lab: Lab, names: Sequence[str]) -> str | None:
    """Why a run of these plugins is refused before anything is read; None if it is not."""
    extra = lab.extra if lab.subject.request in names else ()
    try:
        run = prepare_run(normalise(lab.settings(lab.model(), names)), extra, quiet)
        check_plugins(run.plugins)
    except UsageError as error:
        return str(error)
    except PluginError:
        return None  # a fault, which the checks say
    return None
