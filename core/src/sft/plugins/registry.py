"""Plugins: the base class, and the set that is active in one run.

``discovery.py`` finds what is installed; ``requests.py`` decides which of it a run requests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any, ClassVar

import pluggy

from sft.errors import SftError, UsageError
from sft.plugins.api import said_once
from sft.plugins.calls import failed, from_plugin, guard
from sft.plugins.declarations import check_form, check_relations, in_order, meant
from sft.plugins.discovery import canonical, find, import_plugin, imported, installed, is_of, strange_requests
from sft.plugins.marks import hooks_of, implements, needs, provides, single_hooks
from sft.plugins.origins import PluginFile, file_of, origin_of
from sft.plugins.trace import watch_if_asked
from sft.plugins.trial import Trial

SHAPING = (
    *("sft_collator", "sft_model_family", "sft_model_config", "sft_quantizer"),
    *("sft_adapt_model", "sft_parameter_groups", "sft_objective", "sft_token_loss", "sft_optimizer"),
)
"""Hooks whose implementation changes what a checkpoint's weights and state are; others only watch, or compute the same
in another way. A schedule is not among them: to branch off a checkpoint with another is usual, and the settings that
differ are said."""


class Plugin:
    """Base of a plugin: subclass it, set the attributes, implement hooks with ``@sft.hookimpl``.

    One instance is made for each run, with that run's ``Options``; keep the run's state on ``self``.

    Attributes:
        name: The name it is requested by; equal to the entry point's.
        summary: One line for listings.
        reference: The paper or document that defines the technique.
        api_version: The range of plugin APIs that it is written for: ``">=1.1,<2"``, as pip reads such a text, with an
            end; a number N stands for ``>=N,<N+1``. Not inherited from the sft that happens to be there.
        requires: Plugins that must be active too; this one is called after them.
        conflicts: Plugins that it cannot work together with.
        supersedes: Plugins that do part of what this one does: where their settings are true together, this one alone
            is active. Both requested by name are as any other two that need the same place.
        reads: Settings of the core that it reads and that do nothing without it (``adam_beta1`` beside another
            optimizer), so that nobody is told that they have no effect.
        order: Hooks that all plugins answer are called in ascending order, then in the order of the requests; but a
            plugin always after those that it ``requires``.
        shaping: Whether it changes what is learned: then a checkpoint is only resumed and measured with it, and with
            the same options. None: as its hooks let suppose.
        observes: Whether it only watches. It may then implement events alone, and errors in them are said and end
            nothing. One that does not say so ends the run with its errors.
        demo: Settings with which ``sft demo`` shows this plugin, where its distribution claims ``command.demo``.
        certify: What ``sft certify`` needs to try it, where not every run can: an :class:`sft.Trial`.
        paddlenlp: PaddleNLP's settings that it answers without reading them: an :class:`sft.Foreign` by name, which
            says why nothing depends on it, or at which values.
        Options: A dataclass of :func:`sft.option` fields: the settings that the plugin adds.
        hookspecs: A module or class with hook specifications that this plugin publishes for its refinements.
        options: The instance of ``Options`` of this run.
    """

    name: ClassVar[str]
    summary: ClassVar[str] = ""
    reference: ClassVar[str] = ""
    api_version: ClassVar[int | str]
    requires: ClassVar[tuple[str, ...]] = ()
    conflicts: ClassVar[tuple[str, ...]] = ()
    supersedes: ClassVar[tuple[str, ...]] = ()
    reads: ClassVar[tuple[str, ...]] = ()
    order: ClassVar[int] = 0
    shaping: ClassVar[bool | None] = None
    observes: ClassVar[bool] = False
    demo: ClassVar[Mapping[str, Any]] = {}
    certify: ClassVar[Trial] = Trial()
    paddlenlp: ClassVar[Mapping[str, Any]] = {}
    Options: ClassVar[type | None] = None
    hookspecs: Any = None

    def __init__(self, options: Any = None) -> None:
        self.options = options


class Plugins:
    """The active plugins of one run: classes first (``load``), instances when the settings are known (``start``)."""

    def __init__(self, classes: dict[str, Any], origins: dict[str, str], hookspecs: Any) -> None:
        self._classes = classes
        self._origins = origins
        self._hookspecs = hookspecs
        self.readers: list[str] = []
        """Those that read the adapter which is opened: its reader, and what that refines."""
        self.direct: list[str] = []
        """Those that were given as classes, and that another process would not find among what is installed."""
        self.files: dict[str, PluginFile] = {}
        """Those that were read from a file of their own, which any process with its path finds."""
        self.replaced: list[str] = []
        """Clauses on installed plugins that were asked for, and whose place a class given directly takes."""
        self.tell: Callable[[str], None] = print
        """Tells the user a line."""
        self.manager = pluggy.PluginManager("sft")
        self._callers: dict[tuple[str, str], pluggy.HookCaller] = {}

    @classmethod
    def load(
        cls,
        names: Sequence[str],
        hookspecs: Any,
        extra: Iterable[Any] = (),
        explicit: Iterable[str] = (),
        wishes: Iterable[str] = (),
    ) -> Plugins:
        """Import the requested plugins and check what they declare.

        ``hookspecs`` is the module of the core's hooks, ``extra`` are plugin classes given directly, and ``explicit``
        names those that were asked for by name, not by a setting. ``wishes`` are plugins that wish to be active: each
        is, if it goes together with those that are.
        """
        classes: dict[str, Any] = {}
        origins: dict[str, str] = {}
        replaced: list[str] = []
        extra = list(extra)
        for plugin in extra:
            given, origin = _name_of(plugin), origin_of(plugin)
            if classes.setdefault(given, plugin) is not plugin:
                other = origin.removeprefix("given directly ")
                raise UsageError(f"Plugin {given} is {origins[given]} and {other}; leave one out, or rename it.")
            origins[given] = origin
            check_relations(plugin, f"Plugin {given} ({origins[given]})")
        available, strange = installed(), strange_requests()
        for name in names:
            if name in classes and any(not is_of(item, classes[name]) for item in available.get(name, ())):
                replaced.append(f"plugin {name} is {origins[name]}, not that of {available[name][0].origin}")
            if name not in classes:
                item = find(name, available)
                for fault in strange.get(item.distribution, ()):
                    raise UsageError(f"Plugin {name} ({item.origin}) declares {fault}")
                classes[name], origins[name] = imported(item), item.origin
        superseded = {other for plugin in classes.values() for other in _related(plugin, "supersedes")}
        superseded -= {*explicit, *(canonical(plugin.name) for plugin in extra)}
        classes = {name: plugin for name, plugin in classes.items() if name not in superseded}
        for name in wishes:
            if name not in origins and not strange.get((item := find(name, available)).distribution):
                plugin = imported(item)
                if _goes_with(name, plugin, classes, hookspecs):
                    classes[name], origins[name] = plugin, item.origin
        plugins = cls(classes, origins, hookspecs)
        plugins.replaced = replaced
        plugins.direct = [
            name
            for name in origins
            if name in classes
            and file_of(classes[name]) is None
            and not any(is_of(item, classes[name]) for item in available.get(name, ()))
        ]
        plugins.files = {name: file for name, plugin in classes.items() if (file := file_of(plugin)) is not None}
        plugins._check_declarations()
        plugins._classes = in_order(classes, canonical)
        plugins._check_single()
        return plugins

    def start(self, options: Mapping[str, Any]) -> None:
        """Make the instances, publish their hooks and register them; refuse two providers of a single seam."""
        self.manager.add_hookspecs(self._hookspecs)
        for name, plugin in self._classes.items():
            published = getattr(plugin, "hookspecs", None)
            if published is None:
                continue
            try:
                self.manager.add_hookspecs(published)
            except ValueError as error:
                raise UsageError(f"{self.who(name)} cannot publish its hooks: {error}.") from error
        # pluggy calls the last one registered first.
        for name, plugin in reversed(self._classes.items()):
            instance = plugin if isinstance(plugin, ModuleType) else self._make(name, plugin, options.get(name))
            try:
                with said_once(self.who(name)):
                    self.manager.register(instance, name=name)
            except pluggy.PluginValidationError as error:
                cause = " ".join(str(error).split())
                raise UsageError(f"{self.who(name)} does not fit the hooks: {cause}.") from error
        try:
            self.manager.check_pending()
        except pluggy.PluginValidationError as error:
            name = str(self.manager.get_name(error.plugin))
            cause = str(error).partition(" in plugin ")[0]
            hint = meant(cause.partition("'")[2].rstrip("'"), self._hooks())
            raise UsageError(
                f"{self.who(name)} implements a hook that no active plugin publishes ({cause}{hint}); "
                "upgrade it, or add the plugin that it refines."
            ) from error
        for name, _ in self:
            guard(self.manager, self.manager.get_plugin(name), self.who(name), lambda text: self.tell(text))
        watch_if_asked(self.manager)

    def _make(self, name: str, plugin: Any, options: Any) -> Any:
        try:
            return plugin(options)
        except SftError:
            raise
        except (Exception, SystemExit) as error:
            raise failed(error, "its __init__", self.who(name)) from from_plugin(error)

    @property
    def hook(self) -> Any:
        return self.manager.hook

    @property
    def names(self) -> list[str]:
        return list(self._classes)

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        """Names and classes (or modules) of the active plugins, in calling order."""
        return iter(self._classes.items())

    def origin(self, name: str) -> str:
        """Distribution and version of an active plugin."""
        return self._origins[name]

    def who(self, name: str) -> str:
        """An active plugin as messages name it, at the beginning of a sentence."""
        return f"Plugin {name} ({self.origin(name)})"

    def files_written(self) -> dict[str, dict[str, str]]:
        """For run.json and checkpoints: of each plugin that was read from a file, its path and SHA-256."""
        return {name: file.as_dict() for name, file in self.files.items()}

    def shaping(self) -> list[str]:
        """Those that change what is learned. Of one that does not say whether it does: itself, or through the plugin
        that it refines, which it requires, or whose hooks it implements."""
        published = {name: getattr(plugin, "hookspecs", None) for name, plugin in self}

        def refines(name: str, plugin: Any) -> bool:
            others = [specs for other, specs in published.items() if specs is not None and other != name]
            return any(needs(plugin, hook) for specs in others for hook in hooks_of(specs))

        def shapes(name: str, plugin: Any) -> bool:
            declared = getattr(plugin, "shaping", None)
            return shapes_by_itself(plugin) or refines(name, plugin) if declared is None else bool(declared)

        return [name for name, plugin in self if shapes(name, plugin)]

    def inactive(self) -> list[str]:
        return [name for name in installed() if name not in self._classes]

    def rival(self, name: str) -> str | None:
        """The active plugin that cannot work together with the installed plugin ``name``, where there is one."""
        try:
            conflicts = _related(import_plugin(name), "conflicts")
        except UsageError:
            return None  # said when it is asked for
        for other, plugin in self:
            if other in conflicts or name in _related(plugin, "conflicts"):
                return other
        return None

    def ask(self, name: str, hook: str, /, **arguments: Any) -> Any:
        """Call ``hook`` of one plugin alone; None when it does not implement it."""
        caller = self._callers.get((name, hook))
        if caller is None:  # making one takes longer than most calls, and records are many
            others = [plugin for other, plugin in self.manager.list_name_plugin() if other != name]
            caller = self._callers[name, hook] = self.manager.subset_hook_caller(hook, remove_plugins=others)
        found = caller(**arguments)
        if caller.spec is not None and caller.spec.opts.get("firstresult"):
            return found  # itself, though it may be a list
        return found[0] if found else None

    def implementing(self, hook: str) -> list[str]:
        """The names of the plugins that implement ``hook``, in calling order."""
        return [str(one.plugin_name) for one in reversed(getattr(self.hook, hook).get_hookimpls())]

    def behind(self, hook: str) -> list[str]:
        """The names of the plugins that implement ``hook``, in calling order, and of those that refine one of them:
        that require it, or implement a hook that it publishes."""
        found = self.implementing(hook)
        published = [specs for name, plugin in self if name in found and (specs := getattr(plugin, "hookspecs", None))]
        hooks = [hook for specs in published for hook in hooks_of(specs)]
        for name, plugin in self:
            required = not set(found).isdisjoint(_related(plugin, "requires"))
            if name not in found and (required or any(implements(plugin, one) for one in hooks)):
                found.append(name)
        return found

    def provider(self, hook: str) -> str | None:
        """The name of the plugin that implements ``hook``, where one does; not of one that wraps its answer."""
        for implementation in getattr(self.hook, hook).get_hookimpls():
            if not implementation.wrapper:
                return str(implementation.plugin_name)
        return None

    def _check_declarations(self) -> None:
        hooks = self._hooks()
        for name, plugin in self._classes.items():
            check_form(plugin, self.who(name), hooks)
        for name, plugin in self._classes.items():
            for needed in _related(plugin, "requires"):
                if needed not in self._classes:
                    for other, theirs in self:
                        if needed in _related(theirs, "conflicts"):
                            raise UsageError(
                                f"Plugin {name} refines {needed}, which cannot work together with {other}; "
                                f"leave {name} or {other} out."
                            )
                    raise UsageError(
                        f"Plugin {name} refines {needed}, which is not active; add --plugin {needed} "
                        f"or leave {name} out."
                    )
            for other in _related(plugin, "conflicts"):
                if other in self._classes:
                    raise UsageError(
                        f"Plugins {name} ({self.origin(name)}) and {other} ({self.origin(other)}) cannot "
                        "work together; leave one of them out."
                    )

    def _hooks(self) -> list[str]:
        """Every hook that exists among these plugins: the core's, and those that they publish."""
        return [hook for specs in self._specifications() for hook in hooks_of(specs)]

    def _specifications(self) -> list[Any]:
        published = (getattr(plugin, "hookspecs", None) for plugin in self._classes.values())
        return [self._hookspecs, *(specs for specs in published if specs is not None)]

    def _check_single(self) -> None:
        for hook in single_hooks(self._specifications()):
            providers = [name for name, plugin in self if provides(plugin, hook)]
            if len(providers) > 1:
                listed = " and ".join(f"{name} ({self.origin(name)})" for name in providers)
                raise UsageError(f"Plugins {listed} both provide {hook}, which has one place; leave one out.")


def _goes_with(name: str, plugin: Any, others: Mapping[str, Any], hookspecs: Any) -> bool:
    """Whether a plugin that nobody asks for finds what it needs among ``others``, and its places free."""
    if not {*_related(plugin, "requires")} <= {*others}:
        return False
    for other, theirs in others.items():
        for key in ("conflicts", "supersedes"):
            if other in _related(plugin, key) or name in _related(theirs, key):
                return False
    published = (getattr(one, "hookspecs", None) for one in others.values())
    places = single_hooks([hookspecs, *filter(None, published)])
    taken = [hook for hook in places if any(provides(theirs, hook) for theirs in others.values())]
    return not any(provides(plugin, hook) for hook in taken)


def _related(plugin: Any, key: str) -> list[str]:
    """The plugins that ``plugin`` names in its ``requires``, ``conflicts`` or ``supersedes``."""
    return [canonical(name) for name in getattr(plugin, key, ())]


def shapes_by_itself(plugin: Any) -> bool:
    """Whether a plugin class or module changes what is learned: as it declares, or else as its own hooks and
    ``requires`` let suppose. In the company of others it may also refine one of them."""
    declared = getattr(plugin, "shaping", None)
    if declared is not None:
        return bool(declared)
    return bool(getattr(plugin, "requires", ())) or any(implements(plugin, hook) for hook in SHAPING)


def _name_of(plugin: Any) -> str:
    """The name of a plugin that was given directly, which must be a class (or a module) with one."""
    if not isinstance(plugin, (type, ModuleType)):
        raise UsageError(f"plugins: expected plugin classes, got {plugin!r}; give the class, not an instance.")
    name = getattr(plugin, "name", None)
    if not isinstance(name, str) or not name.strip():
        raise UsageError(
            f"Plugin class {plugin.__name__} has no name; set name to the text that it is to be requested by."
        )
    return canonical(name)
