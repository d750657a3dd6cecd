"""What is certified: a plugin, what it cannot be without, and other values that its options may have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sft import hookspecs
from sft.errors import UsageError
from sft.kit.about import load
from sft.options import Option, convert, options_of
from sft.plugins.calls import EVENTS
from sft.plugins.discovery import canonical, import_plugin, installed, with_refined
from sft.plugins.files import is_file, name_of
from sft.plugins.marks import implements
from sft.plugins.registry import Plugins
from sft.plugins.requests import requests
from sft.plugins.trial import trial_of

EXPORTS = "sft_export_adapter"
_READING = ("sft_import_adapter", "sft_adapter_merger", "sft_quantizer", "sft_model_family", "sft_model_config")


@dataclass
class Subject:
    """A plugin as it is certified.

    Attributes:
        name: Its canonical name.
        request: What asks for it: its name, or the path of its file.
        plugin: Its class, or module.
        company: What it cannot be without: what it requires, and an adapter where a run without one is refused.
        arranged: That adapter, which may be another one.
        tried: Values for options of it that nobody could guess: its class's, and the user's.
    """

    name: str
    request: str
    plugin: Any
    company: list[str] = field(default_factory=list)
    arranged: list[str] = field(default_factory=list)
    tried: Mapping[str, Any] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """What asks for it and its company."""
        return [*self.company, self.request]

    @property
    def own(self) -> list[str]:
        """Its name and those of its company."""
        return [*self.company, self.name]

    @property
    def files(self) -> list[str]:
        """The path of its file, where what its runs write cannot be read without it; none where it is installed."""
        reads = self.has(*_READING) or bool(_required(self.plugin))
        return [self.request] if reads and is_file(self.request) else []

    @property
    def options(self) -> dict[str, Option]:
        declared = getattr(self.plugin, "Options", None)
        return {} if declared is None else options_of(declared)

    def has(self, *hooks: str) -> bool:
        """Whether it implements one of ``hooks`` itself."""
        return any(implements(self.plugin, hook) for hook in hooks)

    def adapts(self) -> bool:
        """Whether a run of it writes an adapter, its own or that of its company."""
        return self.has(EXPORTS) or any(implements(import_plugin(one), EXPORTS) for one in self.company)

    @property
    def shares(self) -> bool:
        """Whether it shares runs among processes."""
        return self.has("sft_parallel_strategy", "sft_launch")

    @property
    def may_ask(self) -> bool:
        """Whether it is told what happens in a run, and may ask it to stop, to save or to evaluate."""
        return self.has(*EVENTS) and not getattr(self.plugin, "observes", False)

    @property
    def forms(self) -> list[str]:
        """What `sft export --to FORM` may name for it to write."""
        return forms_of(self.name)

    def only_computes(self, beside: Sequence[str] = ()) -> bool:
        """Whether it changes nothing of what is learned; or, beside it, those that are named there."""
        extra = [self.plugin] if self.name not in installed() else []
        active = Plugins.load([one for one in (*self.own, *beside) if one in installed()], hookspecs, extra)
        asked = list(beside) or [self.name]
        deciding = ("sft_schedule", "sft_record_format")
        others = [name for name, one in active if any(implements(one, hook) for hook in deciding)]
        shaping = {*active.shaping(), *others}
        return not shaping & {*asked}


def find_subject(request: str, extra: Sequence[type] = (), tried: Mapping[str, Any] | None = None) -> Subject:
    """The plugin that is installed as ``request``, or in the file of that path, or the class of that name in ``extra``,
    with what it requires."""
    direct = {name_of(one): one for one in extra if hasattr(one, "name")}
    request = str(Path(request).expanduser().absolute()) if is_file(request) else canonical(request)
    plugin = direct.get(request) or load(request)
    name = name_of(plugin)
    company = [one for one in _required(plugin) if one != name]
    tried = {**trial_of(plugin).options, **(tried or {})}
    subject = Subject(name, request, plugin, company, tried=tried)
    for key in subject.tried:
        if key not in subject.options:
            known = ", ".join(subject.options) or "none"
            raise UsageError(
                f"Plugin {name} has no option {key} (it has {known}), so no other value of it can be tried."
            )
    return subject


def _required(plugin: Any) -> list[str]:
    ordered: list[str] = []
    for one in getattr(plugin, "requires", ()):
        ordered += [name for name in with_refined(canonical(one)) if name not in ordered]
    return ordered


def an_adapter(subject: Subject, beside: Sequence[str] = ()) -> list[str]:
    """The first installed adapter that goes together with the subject, and with what is ``beside`` it."""
    for name in installed():
        try:
            if implements(import_plugin(name), EXPORTS):
                names = [*with_refined(name), *beside, *(one for one in subject.own if one in installed())]
                Plugins.load(names, hookspecs, [] if subject.name in installed() else [subject.plugin])
                return with_refined(name)
        except UsageError:
            continue
    raise UsageError(
        f"Plugin {subject.name} is tried beside an adapter, and none that goes together with it is installed; pip "
        "install one."
    )


def forms_of(name: str) -> list[str]:
    """The forms in which the installed plugin ``name`` writes a finished model."""
    return [form for form, names in requests("export").items() if name in names]


def company_of(name: str) -> list[str]:
    """The installed plugin ``name`` after what it requires."""
    return with_refined(canonical(name))


def wishes() -> list[str]:
    """Plugins that a run has unless it is told otherwise; here each is beside a run only where that is the question."""
    return sorted({name for names in requests("device").values() for name in names})


def other_values(option: Option, tried: Mapping[str, Any]) -> list[Any]:
    """Values of an option that are not its default, in its type; none where nobody can guess one: of a text, or a
    path."""
    if option.name in tried:
        return [convert(option, tried[option.name])]
    guesses: list[Any] = []
    if option.is_path:
        return []
    if option.is_list:
        guesses = [["q_proj", "down_proj"], ["q_proj"], [0], ["q_proj=4"]]
    elif option.choices is not None:
        guesses = list(option.choices) if len(option.words) > 1 else []
    elif option.is_flag:
        guesses = [not option.default]
    elif int in option.kinds or float in option.kinds:
        guesses = _numbers(option)
    found: list[Any] = []
    for guess in guesses:
        try:
            value = convert(option, guess)
        except UsageError:
            continue
        if value != option.default and value not in found:
            found.append(value)
    return found


def _numbers(option: Option) -> list[Any]:
    default = option.default
    low = option.minimum if option.minimum is not None else option.above
    high = option.maximum if option.maximum is not None else option.below
    guesses: list[Any] = []
    if default:
        guesses += [2 * default, default / 2 if float in option.kinds else default // 2]
    if low is not None and high is not None and high < 2:
        guesses.append((low + high) / 2)
    guesses += [4, 0.5, 1, 2, 0]
    if int not in option.kinds:
        guesses = [float(guess) for guess in guesses]
    elif float not in option.kinds:
        guesses = [guess for guess in guesses if float(guess).is_integer()]
    return guesses
