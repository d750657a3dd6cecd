"""What plugin authors can hold on to: the public modules, and that our own plugins need no more than those."""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CORE = ROOT / "core" / "src" / "sft"
PUBLIC = ("sft", "sft.parallel", "sft.testing")
PLUGINS = sorted(path for pattern in ("plugins/*/src", "examples/*/src") for path in ROOT.glob(f"{pattern}/**/*.py"))


def names_of(module: str) -> set[str]:
    return set(importlib.import_module(module).__all__)


def used(path: Path) -> Iterator[tuple[int, str, str]]:
    """Each name that a file takes from ``sft``: line, module, and name ("" where it takes the module itself)."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, "") for alias in node.names if alias.name.split(".")[0] == "sft")
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "sft":
            yield from ((node.lineno, node.module, alias.name) for alias in node.names)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "sft":
            yield node.lineno, "sft", node.attr


def test_there_are_plugins_to_look_at() -> None:
    folders = {path.relative_to(ROOT).parts[1] for path in PLUGINS}
    assert {path.parent.name for path in ROOT.glob("plugins/*/pyproject.toml")} <= folders


@pytest.mark.parametrize("path", PLUGINS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_plugin_imports_public_names_only(path: Path) -> None:
    for line, module, name in used(path):
        assert module in PUBLIC, f"{path}:{line} imports {module}, which is not public"
        assert name in ("", *names_of(module)), f"{path}:{line} uses {module}.{name}, which is not in its __all__"


@pytest.mark.parametrize("path", PLUGINS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_plugin_sets_no_attribute_that_begins_with_sft(path: Path) -> None:
    """Functions of ``sft.parallel`` say such things; hooks are functions of a class."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            assert not node.attr.startswith("sft_"), f"{path}:{node.lineno} sets {node.attr}"


@pytest.mark.parametrize("path", PLUGINS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_plugin_imports_no_other_plugin(path: Path) -> None:
    """A refinement implements the hooks that another one publishes, by their names."""
    own = path.relative_to(ROOT).parts[3]
    others = {source.parent.name for source in PLUGINS if source.name == "__init__.py"} - {own}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        for name in names:
            assert name.split(".")[0] not in others, f"{path}:{node.lineno} imports {name}"


def test_the_search_finds_what_is_not_public(tmp_path: Path) -> None:
    path = tmp_path / "plugin.py"
    path.write_text("import sft\nfrom sft.files import write_json\ndef f():\n    import sft.runtime\n    sft.runtime\n")
    assert list(used(path)) == [
        (1, "sft", ""),
        (2, "sft.files", "write_json"),
        (4, "sft.runtime", ""),
        (5, "sft", "runtime"),
    ]


@pytest.mark.parametrize("module", PUBLIC)
def test_each_public_name_is_there_and_says_what_it_is(module: str) -> None:
    public = importlib.import_module(module)
    for name in public.__all__:
        value = getattr(public, name)
        if inspect.isclass(value) or inspect.isroutine(value):
            assert inspect.getdoc(value), f"{module}.{name} has no docstring"


@pytest.mark.parametrize("module", PUBLIC)
def test_each_public_name_stands_on_a_page(module: str) -> None:
    page = (ROOT / "docs" / "reference" / "public.md").read_text(encoding="utf-8")
    for name in names_of(module):
        assert f"`{module}.{name}`" in page, f"docs/reference/public.md lacks {module}.{name}; run make docs"


@pytest.mark.parametrize("file", ["hookspecs.py", "seams.py", "conversations.py"])
def test_each_type_that_a_signature_names_is_public(file: str) -> None:
    tree = ast.parse((CORE / file).read_text(encoding="utf-8"))
    own = {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("sft."):
            own |= {alias.name for alias in node.names}
    public = names_of("sft") | names_of("sft.parallel")
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            arguments = [argument.annotation for argument in (*node.args.args, *node.args.kwonlyargs)]
            annotations = [one for one in (*arguments, node.returns) if one is not None]
            named = {one.id for annotation in annotations for one in ast.walk(annotation) if isinstance(one, ast.Name)}
            assert named & own <= public, f"{file}: {node.name} names {named & own - public}"
