"""What the API promises of itself: each hook is said, shown and tried; each public name says what it takes, gives and
refuses."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sft import hookspecs
from sft.kit.about import KINDS, found
from sft.plugins.marks import hooks_of, single_hooks

ROOT = Path(__file__).parent.parent
PUBLIC = ("sft", "sft.parallel", "sft.testing")
SHOWN = (
    "plugins/*/src/**/*.py",
    "examples/*/src/**/*.py",
    "docs/*.md",
    "core/src/sft/kit/templates/*/plugin.py.template",
)
TRIED = ("core/tests/**/*.py", "tests/**/*.py", "plugins/*/tests/**/*.py")
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
    """Plugins and examples have tests of their own, and pages of docs are run by tests/test_documents.py and
    test_kit_pages.py."""
    sources = "\n".join(texts(SHOWN).values())
    assert [name for name in all_hooks() if not re.search(rf"def {name}\(", sources)] == []


def test_each_hook_is_tried() -> None:
    here = Path(__file__).resolve()
    words: set[str] = set()
    for path, text in texts((*TRIED, "plugins/*/src/**/*.py")).items():
        words |= set(re.findall(r"\w+", text)) if path.resolve() != here else set()
    assert [name for name in all_hooks() if name not in words] == []


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
