"""The page of hooks: each is documented, typed, and called by the core with all it promises."""

from __future__ import annotations

import ast
import inspect
import operator
import pydoc
import re
import textwrap
from pathlib import Path

import pytest

import sft
from sft import hookspecs, parallel
from sft.plugins.registry import Plugins

HOOKS = {name: value for name, value in vars(hookspecs).items() if name.startswith("sft_")}


def calls_in_core() -> dict[str, list[list[str]]]:
    """Hook → keyword arguments of each ``….hook.HOOK(…)`` and ``….ask(NAME, "HOOK", …)`` in the core's code."""
    found: dict[str, list[list[str]]] = {}
    for path in Path(sft.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            name = node.func.attr
            if name == "ask":
                name = str(getattr(node.args[1], "value", ""))
            found.setdefault(name, []).append([str(keyword.arg) for keyword in node.keywords])
    return found


CALLS = calls_in_core()
SINGLE = {
    "sft_launch",
    "sft_collator",
    "sft_parallel_strategy",
    "sft_quantizer",
    "sft_attention_backend",
    "sft_kernels",
    "sft_objective",
    "sft_optimizer",
    "sft_schedule",
    "sft_export_adapter",
    "sft_import_adapter",
    "sft_adapter_merger",
    "sft_adapter_updates",
}


def test_there_are_hooks() -> None:
    assert len(HOOKS) >= 18


@pytest.mark.parametrize("name", HOOKS)
def test_a_hook_is_documented_and_typed(name: str) -> None:
    function = HOOKS[name]
    assert (inspect.getdoc(function) or "").strip(), "a hook without a docstring"
    signature = inspect.signature(function)
    assert signature.return_annotation is not inspect.Signature.empty
    for argument in signature.parameters.values():
        assert argument.annotation is not inspect.Parameter.empty, argument.name
        assert argument.default is inspect.Parameter.empty, argument.name


def test_what_a_hook_takes_and_gives_is_public() -> None:
    """Every class of sft that the page of hooks imports for its signatures."""
    tree = ast.parse(Path(hookspecs.__file__).read_text(encoding="utf-8"))
    guarded = next(node for node in tree.body if isinstance(node, ast.If))
    imports = [node for node in guarded.body if isinstance(node, ast.ImportFrom)]
    assert {alias.name for node in imports for alias in node.names} - set(sft.__all__) == set()


@pytest.mark.parametrize("name", HOOKS)
def test_the_core_calls_the_hook_with_all_that_it_promises(name: str) -> None:
    calls = CALLS.get(name, [])
    assert calls, "no code of the core calls this hook"
    for arguments in calls:
        assert arguments == list(inspect.signature(HOOKS[name]).parameters)


def test_single_hooks() -> None:
    plugins = Plugins.load([], hookspecs)
    plugins.start({})
    callers = {name: getattr(plugins.hook, name) for name in HOOKS}
    assert {name for name, caller in callers.items() if hasattr(caller.spec.function, "sft_single")} == SINGLE
    # With no provider, a single hook gives its caller None, not an empty list.
    assert plugins.hook.sft_collator(run=None) is None
    assert plugins.hook.sft_state(run=None) == []


def test_the_whole_public_api_is_there() -> None:
    for name in sft.__all__:
        assert getattr(sft, name) is not None
    with pytest.raises(AttributeError, match="module 'sft' has no attribute 'nothing'"):
        _ = sft.nothing


CLASSES = [
    *(name for name in sft.__all__ if inspect.isclass(getattr(sft, name))),
    *(f"parallel.{name}" for name in parallel.__all__ if inspect.isclass(getattr(parallel, name))),
]


def test_help_lists_every_public_name() -> None:
    assert set(sft.__all__) <= set(dir(sft))
    text = pydoc.plain(pydoc.render_doc(sft))
    assert [name for name in sft.__all__ if not re.search(rf"^ +(class )?{name}\b", text, re.MULTILINE)] == []


@pytest.mark.parametrize("name", CLASSES)
def test_help_names_every_attribute_and_hides_no_description(name: str) -> None:
    """A text below an attribute is for readers of the code alone; help() shows the docstring of the class."""
    cls = operator.attrgetter(name)(sft)
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(tree, ast.ClassDef)
    inits = [node.body for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "__init__"]
    attributes, hidden = [], []
    for body in (tree.body, *inits):
        for statement, following in zip(body, [*body[1:], None], strict=True):
            if isinstance(statement, (ast.Assign, ast.AnnAssign)):
                target = statement.target if isinstance(statement, ast.AnnAssign) else statement.targets[0]
                targets = target.elts if isinstance(target, ast.Tuple) else [target]
                names = [ast.unparse(one) for one in targets]
                if body is not tree.body:  # where other names are those of the function
                    names = [name.removeprefix("self.") for name in names if name.startswith("self.")]
                attributes += names
                if names and isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
                    hidden.append(attributes[-1])
    assert hidden == []
    text = pydoc.plain(pydoc.render_doc(cls))
    public = [attribute for attribute in attributes if not attribute.startswith("_")]
    assert [attribute for attribute in public if not re.search(rf"\b{attribute}\b", text)] == []
