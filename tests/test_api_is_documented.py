"""What the API promises of itself: each hook is said, shown and tried; each public name says what it takes, gives and
refuses."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from making.reference import examples_of
from test_kit_pages import SHOWN

from sft import hookspecs
from sft.kit.about import KINDS, all_plugins, found
from sft.plugins.marks import hooks_of, single_hooks

ROOT = Path(__file__).parent.parent
PUBLIC = ("sft", "sft.parallel", "sft.testing")
TRIED = ("core/tests/**/*.py", "tests/**/*.py", "plugins/*/tests/**/*.py", "examples/*/tests/**/*.py")
NO_KIND = {"sft_launch", "sft_import_adapter", "sft_adapter_merger", "sft_adapter_updates"}
"""Hooks with one place that say nothing about what a plugin is; those that do go with another one."""


def texts(patterns: tuple[str, ...]) -> dict[Path, str]:
    return {path: path.read_text(encoding="utf-8") for pattern in patterns for path in ROOT.glob(pattern)}


def all_hooks() -> dict[str, Any]:
    """The core's hooks, and those that plugins of the project publish."""
    published = [getattr(row.plugin, "hookspecs", None) for row in found() if row.plugin is not None]
    return {hook: getattr(specs, hook) for specs in (hookspecs, *published) for hook in hooks_of(specs)}


# --- hooks --------------------------------------------------------------------------------------------------


def test_each_hook_says_what_it_is_for_and_stands_in_the_reference() -> None:
    page = (ROOT / "docs" / "reference" / "hooks.md").read_text(encoding="utf-8")
    for name, hook in all_hooks().items():
        assert len(inspect.getdoc(hook) or "") > 20, f"{name} says nothing"
        assert f"# `{name}`\n" in page, f"docs/reference/hooks.md lacks {name}; run make docs"


def test_each_hook_has_an_example_that_runs() -> None:
    """For authors: on a page, in examples/ or in what ``sft plugins new`` writes. What first-party plugins implement is
    no example, for it is not written to be read first."""
    assert [name for name in all_hooks() if not examples_of(name)] == []


def test_each_hook_is_tried() -> None:
    """By a test that implements it, calls it, or runs a plugin from a page; a name in words is no test."""
    here = Path(__file__).resolve()
    tried: set[str] = set()
    for path, text in texts(TRIED).items():
        if path.resolve() != here:
            tried |= {one or other for one, other in re.findall(r"(?:\bdef |\.)(\w+)|\b(\w+)=", text)}
            tried |= {hook for name in re.findall(r'written\("([\w-]+)"\)', text) for hook in shown_by(name)}
    assert [name for name in all_hooks() if name not in tried] == []


def shown_by(name: str) -> set[str]:
    """The functions of the plugin of this name that a page shows whole."""
    return {*re.findall(r"def (\w+)\(", SHOWN.get(name, ""))}


def test_each_seam_is_a_kind_of_plugin() -> None:
    """In ``sft plugins``."""
    seams = {*single_hooks([hookspecs])}
    assert seams - NO_KIND <= {*KINDS}
    assert {*KINDS} <= {*hooks_of(hookspecs)}


# --- public names -------------------------------------------------------------------------------------------


def functions() -> Iterator[tuple[str, Any, str]]:
    """Each public function, and each public method that public classes define: its name, itself, and what it says. A
    method may be said by the protocol that its class keeps to."""
    values = {f"{module}.{name}": value for module, name, value in public()}
    classes = [value for value in values.values() if inspect.isclass(value)]
    own = [(name, one) for cls in classes for name, one in vars(cls).items() if inspect.isfunction(one)]
    said = {name: text for name, one in own if (text := inspect.getdoc(one))}
    for name, value in values.items():
        if inspect.isfunction(value):
            yield name, value, inspect.getdoc(inspect.unwrap(value)) or ""
        for key, method in vars(value).items() if inspect.isclass(value) else ():
            if inspect.isfunction(method) and not key.startswith("_"):
                yield f"{name}.{key}", method, inspect.getdoc(getattr(value, key)) or said.get(key) or ""


def public() -> Iterator[tuple[str, str, Any]]:
    for module in PUBLIC:
        loaded = importlib.import_module(module)
        yield from ((module, name, getattr(loaded, name)) for name in loaded.__all__)


def test_each_function_says_what_it_does() -> None:
    assert [name for name, _, text in functions() if not text.strip()] == []


def tree_of(function: Any) -> ast.FunctionDef:
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function)))).body
    assert isinstance(tree, ast.FunctionDef)
    return tree


def test_each_function_that_refuses_says_so() -> None:
    """By the name of the error, or in words."""
    silent = []
    for name, function, text in functions():
        raised = {
            ast.unparse(node.exc.func)
            for node in ast.walk(tree_of(function))
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)
        }
        raised = {
            one for one in raised if one.endswith("Error") and one not in ("AssertionError", "NotImplementedError")
        }
        if raised and not re.search(r"[Rr]aise|[Rr]efuse|Error|must", text):
            silent.append(f"{name}: {', '.join(sorted(raised))}")
    assert silent == []


def test_each_function_of_arrays_says_their_shapes_or_types() -> None:
    silent = []
    for name, function, text in functions():
        tree = tree_of(function)
        annotations = [one.annotation for one in (*tree.args.args, *tree.args.kwonlyargs) if one.annotation]
        named = " ".join(ast.unparse(one) for one in (*annotations, *filter(None, [tree.returns])))
        if "ndarray" in named and not re.search(
            r"\bu?int\d+|float\d+|bool\b|\[[A-Za-z1n,. ]+\]|dtype|shape|:meth:", text
        ):
            silent.append(name)
    assert silent == []


def numeric(annotation: str) -> bool:
    return re.search(r"\b(int|float|ndarray)\b", annotation) is not None


def test_each_number_that_a_function_takes_is_said() -> None:
    """By its name: what it counts or measures."""
    silent = []
    for name, function, text in functions():
        arguments = tree_of(function).args
        for one in (*arguments.args, *arguments.kwonlyargs):
            if one.annotation and numeric(ast.unparse(one.annotation)) and not re.search(rf"\b{one.arg}\b", text):
                silent.append(f"{name}({one.arg})")
    assert silent == []


def test_each_number_that_a_class_holds_is_said() -> None:
    """By its name, in what the class says or a class that it derives from."""
    silent = []
    for module, name, value in public():
        if inspect.isclass(value) and dataclasses.is_dataclass(value):
            said = "\n".join(inspect.getdoc(one) or "" for one in value.__mro__[:-1])
            fields = [one for one in dataclasses.fields(value) if numeric(str(one.type)) or "Any" in str(one.type)]
            silent += [f"{module}.{name}.{one.name}" for one in fields if not re.search(rf"\b{one.name}\b", said)]
    assert silent == []


def test_losses_seconds_and_memory_have_units() -> None:
    """Of what holds or takes one, by its name, its text says the unit."""
    units = {"loss": "nats", "memory": "MiB|bytes|GiB", "positions": "tokens|position|document"}
    units |= {"second": "second|clock"}
    silent = []

    def without(name: str, text: str) -> str:
        """``text`` without ``name`` itself, which is no unit though it may read like one."""
        return re.sub(rf"\b{name}\b", "", text)

    for module, name, value in public():
        if inspect.isclass(value) and dataclasses.is_dataclass(value):
            said = "\n".join(inspect.getdoc(one) or "" for one in value.__mro__[:-1])
            for one in dataclasses.fields(value):
                unit = next((unit for word, unit in units.items() if word in one.name), "")
                if numeric(str(one.type)) and not re.search(unit, without(one.name, said)):
                    silent.append(f"{module}.{name}.{one.name}")
    for name, hook in all_hooks().items():
        for word, unit in units.items():
            text = inspect.getdoc(hook) or ""
            silent += [
                f"{name}({one})"
                for one in inspect.signature(hook).parameters
                if word in one and not re.search(unit, without(one, text))
            ]
    for name, function, text in functions():
        arguments = tree_of(function).args
        for given in (*arguments.args, *arguments.kwonlyargs):
            unit = next((unit for word, unit in units.items() if word in given.arg), "")
            if given.annotation and numeric(ast.unparse(given.annotation)):
                silent += [f"{name}({given.arg})"] * (not re.search(unit, without(given.arg, text)))
    assert silent == []


NO_TECHNIQUE = {"command", "kernels"}
"""Kinds of plugins that follow no paper or program."""


def test_each_technique_names_its_source() -> None:
    """A paper, a section of one, or the program whose behaviour it has."""
    techniques = [row for row in all_plugins(shapes=False) if not {*row.kinds} <= NO_TECHNIQUE]
    assert len(techniques) > 20
    silent = [row.name for row in techniques if not row.reference]
    assert silent == []
