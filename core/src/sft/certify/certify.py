"""The procedure: every check that asks about a plugin, in each of its cases."""

from __future__ import annotations

import os
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from sft import runtime
from sft.certify import adapters, exports, parts, runs, together
from sft.certify.checking import Check
from sft.certify.company import complete
from sft.certify.comparing import NotTriedError, RefusedError
from sft.certify.lab import Lab
from sft.certify.report import DIGITS, FAILED, HELD, NOT_TRIED, REFUSED, Report, Row, code, versions
from sft.certify.subject import Subject, find_subject
from sft.errors import SftError, UsageError
from sft.plugins.discovery import canonical, entries, find, import_plugin, installed
from sft.plugins.origins import file_of, origin_of
from sft.plugins.trial import trial_of

ALONE: tuple[Check, ...] = (*runs.CHECKS, *adapters.CHECKS, *parts.CHECKS, *exports.CHECKS)
CHECKS: tuple[Check, ...] = (*ALONE, *together.CHECKS)
OWN = "sft.certify"
"""The group of entry points: NAME = the checks of plugin NAME's own formula, a tuple of functions (lab)."""


def certify(
    name: str,
    *,
    plugins: Sequence[type] = (),
    only: Iterable[str] = (),
    tried: Mapping[str, Any] | None = None,
    beside: Iterable[str] | None = None,
    first_failure: bool = False,
    say: Callable[[Row], None] = lambda row: None,
) -> Report:
    """Try plugin ``name`` on tiny models, on the CPU: each check that asks about it, in all cases.

    ``plugins`` are classes that nothing installed provides, ``only`` names the checks that are tried, ``tried`` has
    values for options that nobody could guess. It is tried ``beside`` these plugins; None: all others. With
    ``first_failure`` nothing is tried after a case that fails. ``say`` is told of each case. Raises
    :class:`sft.UsageError` where there is no such plugin, or check.
    """
    runtime.prepare()
    runtime.use_device("cpu")
    subject = find_subject(name, plugins, tried)
    every = [*ALONE, *own_checks(subject), *together.CHECKS]
    checks = _chosen(every, only)
    others = None if beside is None else [find(canonical(one), installed()).name for one in beside]
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="sft-certify-") as work:
        lab = Lab(subject, Path(work), plugins, others)
        with mock.patch.dict(os.environ, _environment(lab)):
            complete(lab)
            report = _about(subject, checks, len(checks) == len(every), others)
            for row in _rows(checks, lab):
                report.rows.append(row)
                say(row)
                if first_failure and row.status == FAILED:
                    break
    report.seconds = time.monotonic() - began
    return report


def _environment(lab: Lab) -> dict[str, str]:
    """What the plugins that take part need in the environment, as they say themselves."""
    found: dict[str, str] = {}
    for name in [*lab.subject.company, *lab.others]:
        try:
            found.update(trial_of(import_plugin(name)).environment)
        except UsageError:  # it is not tried, and its case says why
            continue
    found.update(trial_of(lab.subject.plugin).environment)
    return {key: value.replace("{folder}", str(lab.work)) for key, value in found.items()}


def _rows(checks: Iterable[Check], lab: Lab) -> Iterator[Row]:
    for check in checks:
        if check.asks(lab):
            for case in _cases(check, lab):
                yield case if isinstance(case, Row) else _try(check, lab, case)


def own_checks(subject: Subject) -> list[Check]:
    """What the plugin's author says of its formula: the functions that its metadata names, each with its docstring."""
    return [_own(one) for item in entries(OWN) if item.name == subject.name for one in item.entry.load()]


def _own(function: Callable[[Lab], None]) -> Check:
    name = function.__name__.removeprefix("check_").replace("_", " ")
    sentence = " ".join((function.__doc__ or "").partition("\n\n")[0].split())
    return Check(name, sentence, lambda lab, case: function(lab), lambda lab: True, lambda lab: ("",))


def _chosen(checks: list[Check], only: Iterable[str]) -> list[Check]:
    wanted = [name.replace("-", " ").replace("_", " ") for name in only]
    known = {check.name for check in checks}
    for name in wanted:
        if name not in known:
            raise UsageError(f"There is no check {name!r}; there are {', '.join(sorted(known))}.")
    return [check for check in checks if not wanted or check.name in wanted]


def _about(subject: Subject, checks: list[Check], whole: bool, others: list[str] | None) -> Report:
    everything = [item for items in installed().values() for item in items]
    file = file_of(subject.plugin)
    own = [item.distribution for item in everything if item.name == subject.name and file is None]
    digests = code({"sft-core": "sft", **{item.distribution: item.entry.module for item in everything}})
    if file is not None:
        digests[file.path.name] = file.sha256[:DIGITS]
    return Report(
        subject.name,
        own[0] if own else origin_of(subject.plugin),
        subject.company,
        versions({item.distribution: item.version for item in everything}),
        digests,
        {check.name: check.sentence for check in checks},
        whole=whole,
        beside=others,
    )


def _cases(check: Check, lab: Lab) -> Iterable[str | Row]:
    """The cases of a check; where finding them fails, that is its one case."""
    began = time.monotonic()
    try:
        return list(check.cases(lab))
    except Exception as error:
        return [Row(check.name, "", FAILED, _sentence(error), time.monotonic() - began)]


def _try(check: Check, lab: Lab, case: str) -> Row:
    began = time.monotonic()
    try:
        status, said = HELD, check.holds(lab, case) or ""
    except RefusedError as error:
        status, said = REFUSED, str(error)
    except NotTriedError as error:
        status, said = NOT_TRIED, str(error)
    except Exception as error:
        status, said = FAILED, _sentence(error)
    said = said.replace(f"{lab.work}/", "")  # which is gone when the report is read
    return Row(check.name, case, status, " ".join(said.split()), round(time.monotonic() - began, 2))


def _sentence(error: Exception) -> str:
    if isinstance(error, (AssertionError, SftError)) and str(error):
        return str(error)
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} in {Path(place.filename).name}, line {place.lineno}: {error}"
