"""No circle of imports and no arrow from a lower floor to a higher one, in the core or in a plugin."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import import_graph as graphs  # noqa: E402

PACKAGES = {package.name: package for package in graphs.packages(ROOT)}


def package(folder: Path, **files: str) -> Path:
    """A package ``house`` of files by name; two underscores in a name stand for a folder."""
    for name, text in {"__init__": "", **files}.items():
        path = folder / "house" / (f"{name.replace('__', '/')}.py" if name != "__init__" else "__init__.py")
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.parent != folder / "house":
            (path.parent / "__init__.py").touch()
        path.write_text(text)
    return folder / "house"


def test_all_packages_of_the_repository_are_looked_at() -> None:
    folders = [path.parent.name for path in ROOT.glob("plugins/*/pyproject.toml")]
    assert set(PACKAGES) == {"sft", *(f"sft_{folder}" for folder in folders)}
    assert len(folders) > 5


@pytest.mark.parametrize("name", PACKAGES)
def test_no_file_stands_in_a_circle_and_no_arrow_points_up(name: str) -> None:
    faults = graphs.faults(PACKAGES[name])
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(
    "imports",
    [
        "import house.b",
        "from house import b",
        "from house.b import name",
        "from . import b",
        "from .b import name",
        "def later():\n    from house.b import name",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from house.b import name",
        "LAZY = {'name': 'house.b'}",
        "LAZY = {'name': 'house.b:name'}",
    ],
)
def test_each_way_of_importing_counts(tmp_path: Path, imports: str) -> None:
    house = package(tmp_path, a=imports, b="from house.a import other")
    assert graphs.file_graph(house)["a.py"] >= {"b.py"}
    assert graphs.faults(house) == [
        "house: 2 files import each other, as in a.py -> b.py -> a.py (all: a.py, b.py)",
        "house: upward: a.py -> b.py",
    ]


def test_a_module_that_is_named_by_a_pattern_counts(tmp_path: Path) -> None:
    house = package(
        tmp_path, a="import importlib\ndef get(n):\n    importlib.import_module(f'house.rooms.{n}')", rooms__b=""
    )
    assert graphs.file_graph(house)["a.py"] == {"rooms/b.py"}


def test_a_longer_circle_is_named_as_it_goes(tmp_path: Path) -> None:
    house = package(tmp_path, a="import house.b", b="import house.c", c="import house.a", d="import house.a")
    assert graphs.faults(house)[0] == (
        "house: 3 files import each other, as in a.py -> b.py -> c.py -> a.py (all: a.py, b.py, c.py)"
    )


def test_what_an_init_runs_on_the_way_counts(tmp_path: Path) -> None:
    house = package(tmp_path, rooms__a="", rooms__b="")
    (house / "rooms" / "__init__.py").write_text("from house.rooms import a")
    assert graphs.circles(graphs.file_graph(house)) == []
    (house / "rooms" / "a.py").write_text("from house.rooms import b")
    assert graphs.circles(graphs.file_graph(house)) == [["rooms/__init__.py", "rooms/a.py"]]
    (house / "rooms" / "__init__.py").write_text('"""Only a docstring."""')
    assert graphs.circles(graphs.file_graph(house)) == []


def test_whoever_goes_out_through_the_door_makes_a_circle(tmp_path: Path) -> None:
    house = package(tmp_path, a="from house import name")
    (house / "__init__.py").write_text("from house.a import name")
    assert graphs.circles(graphs.file_graph(house)) == [["__init__.py", "a.py"]]


def test_folders_have_an_order_though_no_files_stand_in_a_circle(tmp_path: Path) -> None:
    house = package(
        tmp_path,
        low__one="",
        low__two="from house.high import one",
        high__one="from house.low import one",
        high__two="from house.low import one",
    )
    assert graphs.circles(graphs.file_graph(house)) == []
    assert graphs.upward(graphs.file_graph(house)) == ["low/two.py -> high/one.py"]
    with pytest.raises(ValueError, match="in a circle"):
        graphs.floors(graphs.room_graphs(graphs.file_graph(house))[""])


def test_floors_are_counted_from_what_is_imported(tmp_path: Path) -> None:
    house = package(tmp_path, errors="", rooms__a="import house.errors", b="import house.rooms.a, house.errors", c="")
    rooms = graphs.room_graphs(graphs.file_graph(house))
    assert graphs.floors(rooms[""]) == [["__init__.py", "c.py", "errors.py"], ["rooms/"], ["b.py"]]
    assert graphs.floors(rooms["rooms/"]) == [["__init__.py", "a.py"]]


def test_the_picture_in_the_documentation_is_the_graph() -> None:
    """Where it is not: .venv/bin/python scripts/import_graph.py --write."""
    assert (ROOT / graphs.PAGE).read_text(encoding="utf-8") == graphs.page(ROOT)
