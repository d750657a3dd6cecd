"""Who imports whom, among the files of the core and of each plugin. The code is read; nothing of it is imported.

    python scripts/import_graph.py                     the numbers, circles and upward arrows of each package
    python scripts/import_graph.py --root ELSEWHERE    the same of another copy of the repository
    python scripts/import_graph.py --write             draw docs/architecture.md anew
    python scripts/import_graph.py --check             exit with 1 if there is a circle, or if that page is out of date

An import counts wherever it stands: at the top of a file, inside a function, or under TYPE_CHECKING for an annotation
alone. So does the name of a module as text ("sft.runtime", f"sft.commands.{name}"), by which modules are loaded on
first use. Importing ``a.b.c`` runs ``a/b/__init__.py``, so this is an import as well, unless that file holds no code.
The ``__init__.py`` of the whole package is its door, for those outside; a file inside that imports from it makes a
circle.

The files and folders in a folder are its rooms. A room stands one floor above the highest room that it imports from, so
every arrow points down. Where rooms import each other in a circle there are no such floors; then the arrows that run
against the others are called upward.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = Path("docs") / "architecture.md"
BEGIN = "<!-- From here on made by scripts/import_graph.py --write -->"

Graph = dict[str, set[str]]
"""For each name the names that it imports from."""


def packages(root: Path) -> list[Path]:
    """The folder of each import package of the repository, the core's first."""
    sources = [root / "core" / "src", *sorted(root.glob("plugins/*/src"))]
    return [door.parent for source in sources for door in sorted(source.glob("*/__init__.py"))]


# --- from code to the graph of files ------------------------------------------------------------------------


def file_graph(package: Path) -> Graph:
    """For each file of a package, as its path within, the files of the package that it imports."""
    paths = {_module(path, package): path for path in sorted(package.rglob("*.py"))}
    codeless = {module for module, path in paths.items() if path.name == "__init__.py" and not _has_code(path)}
    names = {module: path.relative_to(package).as_posix() for module, path in paths.items()}
    graph: Graph = {name: set() for name in names.values()}
    for module, path in paths.items():
        for imported in _imports(path, module, paths):
            parts = imported.split(".")
            run_before = {".".join(parts[:length]) for length in range(2, len(parts))} - codeless
            graph[names[module]] |= {names[one] for one in {imported, *run_before} if one in names and one != module}
    return graph


def _module(path: Path, package: Path) -> str:
    parts = path.relative_to(package.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _has_code(path: Path) -> bool:
    """Whether a file holds more than a docstring."""
    body = ast.parse(path.read_text(encoding="utf-8")).body
    return any(not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)) for node in body)


def _imports(path: Path, module: str, modules: Mapping[str, Path]) -> Iterator[str]:
    """The names among ``modules`` that the file of ``module`` imports or mentions as text."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        named: list[str] = []
        if isinstance(node, ast.Import):
            named = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            # `from a import b`: either the module a.b, or a name that a itself defines.
            within = [f"{start}.{alias.name}" for alias in node.names]
            named = [name if name in modules else start for name in within]
        elif isinstance(node, ast.JoinedStr) and isinstance(node.values[0], ast.Constant):
            folder, _, rest = str(node.values[0].value).rpartition(".")
            named = [] if rest or not folder else [name for name in modules if name.rpartition(".")[0] == folder]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and "." in node.value:
            named = [node.value.partition(":")[0]]
        yield from (name for name in named if name in modules)


# --- circles and floors -------------------------------------------------------------------------------------


def circles(graph: Graph) -> list[list[str]]:
    """Groups of names each of which reaches every other one of its group."""
    reached = {name: _reach(graph, name) for name in graph}
    groups = {frozenset(other for other in reached[name] if name in reached[other]) for name in graph}
    return sorted(sorted(group) for group in groups if group)


def _reach(graph: Graph, start: str) -> set[str]:
    """What ``start`` imports, directly or not; itself only where it stands in a circle."""
    reached: set[str] = set()
    waiting = [start]
    while waiting:
        new = graph[waiting.pop()] - reached
        reached |= new
        waiting += new
    return reached


def one_circle(graph: Graph, group: list[str]) -> list[str]:
    """A shortest way within a group from its first name back to it, that name at both ends."""
    ways = [[group[0]]]
    for way in ways:  # which grows
        for following in sorted(graph[way[-1]] & {*group}):
            if following == group[0]:
                return [*way, following]
            if not any(following in other for other in ways):
                ways.append([*way, following])
    raise ValueError(f"{group} is no circle")


def room_graphs(graph: Graph) -> dict[str, Graph]:
    """For each folder ("" is the whole package) the graph of the files and folders in it. Folders end with a slash."""
    graphs: dict[str, Graph] = {}
    for name, imported in graph.items():
        for folder in _folders(name):
            room = _room(name, folder)
            rooms = graphs.setdefault(folder, {})
            rooms.setdefault(room, set()).update(
                _room(other, folder) for other in imported if other.startswith(folder) and _room(other, folder) != room
            )
    return graphs


def _folders(name: str) -> list[str]:
    """The folders that a file lies in, from the whole package ("") on."""
    parts = name.split("/")[:-1]
    return ["".join(f"{part}/" for part in parts[:depth]) for depth in range(len(parts) + 1)]


def _room(name: str, folder: str) -> str:
    """The room of ``folder`` that a file below it lies in (or is)."""
    first, slash, _ = name.removeprefix(folder).partition("/")
    return first + slash


def floors(rooms: Graph) -> list[list[str]]:
    """Rooms by floor, from the ground up; a circle of rooms is an error."""
    height: dict[str, int] = {}
    while len(height) < len(rooms):
        ready = [room for room in rooms if room not in height and rooms[room] <= height.keys()]
        if not ready:
            raise ValueError(f"rooms import each other in a circle: {circles(rooms)}")
        height |= {room: 1 + max((height[other] for other in rooms[room]), default=-1) for room in ready}
    return [sorted(room for room in rooms if height[room] == floor) for floor in range(max(height.values()) + 1)]


def upward(graph: Graph) -> list[str]:
    """Arrows between rooms that stand in a circle, against the order of these rooms that has few of them."""
    arrows = set()
    for folder, rooms in room_graphs(graph).items():
        for circle in circles(rooms):
            place = {room: number for number, room in enumerate(_order(graph, folder, circle))}
            for name, other in _between(graph, folder, circle):
                if place[_room(name, folder)] < place[_room(other, folder)]:
                    arrows.add(f"{name} -> {other}")
    return sorted(arrows)


def _between(graph: Graph, folder: str, circle: list[str]) -> list[tuple[str, str]]:
    """The imports of files from one room of a circle to another."""
    inside = {name for name in graph if name.startswith(folder) and _room(name, folder) in circle}
    pairs = [(name, other) for name in inside for other in graph[name] & inside]
    return [(name, other) for name, other in pairs if _room(name, folder) != _room(other, folder)]


def _order(graph: Graph, folder: str, circle: list[str]) -> list[str]:
    """The rooms of a circle from the bottom up: next comes the one with the fewest imports from those that are left."""
    arrows = [(_room(name, folder), _room(other, folder)) for name, other in _between(graph, folder, circle)]
    order: list[str] = []
    while len(order) < len(circle):
        left = [room for room in circle if room not in order]

        def badness(room: str, left: list[str] = left) -> tuple[int, int, str]:
            ups = sum(1 for one, other in arrows if one == room and other in left)
            downs = sum(1 for one, other in arrows if other == room and one in left)
            return ups - downs, ups, room

        order.append(min(left, key=badness))
    return order


# --- what is printed and drawn ------------------------------------------------------------------------------


def faults(package: Path) -> list[str]:
    """One line for each circle of files and each upward arrow of a package; none is how it should be."""
    graph = file_graph(package)
    lines = [
        f"{package.name}: {len(group)} files import each other, as in {' -> '.join(one_circle(graph, group))}"
        f" (all: {', '.join(group)})"
        for group in circles(graph)
    ]
    return [*lines, *(f"{package.name}: upward: {arrow}" for arrow in upward(graph))]


def counts(package: Path) -> str:
    """The numbers of a package in one line."""
    graph = file_graph(package)
    in_circles = sum(len(group) for group in circles(graph))
    arrows = sum(len(imported) for imported in graph.values())
    return (
        f"{package.name}: {len(graph)} files, {arrows} imports, {in_circles} files in circles, "
        f"{len(upward(graph))} upward arrows"
    )


def drawing(root: Path) -> str:
    """The made part of docs/architecture.md."""
    core, *plugins = packages(root)
    graph = file_graph(core)
    lines = ["## The core", "", *_picture(room_graphs(graph)[""]), ""]
    lines += ["An arrow is left out where a longer way over other rooms says the same.", ""]
    lines += ["| floor | file | what it is for |", "|---|---|---|", *_rows(core, graph), ""]
    lines += ["## The plugins", "", "Each from its ground floor up; files between two arrows stand on one floor.", ""]
    for package in plugins:
        rooms = (_written(package, "", floor) for floor in floors(room_graphs(file_graph(package))[""]))
        shown = (" ".join(f"`{room}`" for room in floor) for floor in rooms)
        lines += [f"- **{package.name}**: {' → '.join(floor for floor in shown if floor)}"]
    return "\n".join([*lines, ""])


def _picture(rooms: Graph) -> list[str]:
    """A mermaid flow chart of rooms, the highest floor on top."""
    names = {room: f"r{number}" for number, room in enumerate(sorted(rooms))}
    lines = ["```mermaid", "flowchart TB"]
    for number, floor in reversed([*enumerate(floors(rooms))]):
        lines += [f'  subgraph f{number}["{number}"]', "    direction LR"]
        lines += [f'    {names[room]}["{room}"]' for room in floor]
        lines += ["  end"]
    for room in sorted(rooms):
        through = {far for near in rooms[room] for far in _reach(rooms, near)}
        lines += [f"  {names[room]} --> {names[other]}" for other in sorted(rooms[room] - through)]
    return [*lines, "```"]


def _rows(package: Path, graph: Graph) -> list[str]:
    """A line of the table for each file of a package, from the top floor down; a folder's likewise."""
    all_rooms = room_graphs(graph)

    def within(folder: str) -> Iterator[str]:
        for floor in reversed(floors(all_rooms[folder])):
            for room in _written(package, folder, floor):
                yield from within(folder + room) if room.endswith("/") else [folder + room]

    rows = []
    for number, floor in reversed([*enumerate(floors(all_rooms[""]))]):
        for room in _written(package, "", floor):
            files = within(room) if room.endswith("/") else [room]
            rows += [f"| {number} | `{name}` | {_first_sentence(package / name)} |" for name in files]
    return rows


def _written(package: Path, folder: str, rooms: list[str]) -> list[str]:
    """Of rooms of a folder those that are worth a word: not an ``__init__.py`` without code."""
    return [room for room in rooms if room.endswith("/") or _has_code(package / folder / room)]


def _first_sentence(path: Path) -> str:
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    paragraph = " ".join(docstring.partition("\n\n")[0].split())
    plain = re.sub(r":\w+:`([^`]+)`", r"`\1`", paragraph).replace("``", "`")
    return plain.split(". ")[0].rstrip(".").replace("|", "\\|")


def page(root: Path) -> str:
    """docs/architecture.md as it should be: what is written by hand, then the drawing."""
    written = (root / PAGE).read_text(encoding="utf-8").partition(BEGIN)[0]
    return f"{written}{BEGIN}\n\n{drawing(root)}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--root", type=Path, default=ROOT, help="the repository that is read")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--write", action="store_true", help=f"draw {PAGE} anew")
    what.add_argument("--check", action="store_true", help=f"fail on circles, and if {PAGE} is not current")
    given = parser.parse_args()
    wrong = [line for package in packages(given.root) for line in faults(package)]
    if not (given.write or given.check):
        print("\n".join([*map(counts, packages(given.root)), *wrong]))
    elif wrong:
        print("\n".join(wrong), file=sys.stderr)
        return 1
    elif given.write:
        (given.root / PAGE).write_text(page(given.root), encoding="utf-8")
    elif (given.root / PAGE).read_text(encoding="utf-8") != page(given.root):
        print(f"{PAGE} is not current; run python scripts/import_graph.py --write.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
