"""The house's floors, as a table and as a test: who may import whom, who may know which library.

A room imports from floors below it and from itself; two rooms on one floor do not know each other. Imports inside
functions and under TYPE_CHECKING count like any other.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).parent.parent / "lora_serve"


class Room(NamedTuple):
    floor: int
    name: str
    modules: tuple[str, ...]  # below lora_serve; a name also stands for all below it, the longest that fits wins


OUTSIDE = ("client", "connection", "engine_process", "event_buffer", "process_main", "supervisor")
ROOMS = (
    Room(7, "command line", ("__main__", "cli", "server", "remote", "reports")),
    Room(6, "api", ("api",)),
    Room(5, "metrics", ("metrics",)),
    Room(5, "engine from outside", tuple(f"engine.{module}" for module in OUTSIDE)),
    Room(4, "engine inside", ("engine",)),
    Room(3, "model", ("model",)),
    Room(2, "adapters", ("adapters",)),
    Room(2, "kv", ("kv",)),
    Room(1, "kernels", ("kernels",)),
    Room(1, "words", ("request", "messages", "config", "errors", "names")),
)

# Libraries that only some rooms may know; whatever is not listed is free to all.
TENSORS = ("engine inside", "model", "adapters", "kv", "kernels")
KNOWN_BY = {
    "fastapi": ("api",),
    "starlette": ("api",),
    "prometheus_client": ("metrics",),
    "uvicorn": ("command line",),
    "rich": ("command line",),
    "httpx": ("command line",),
    "psutil": ("engine inside",),
    "zmq": ("engine from outside",),
    "torch": TENSORS,
    "safetensors": ("adapters", "model"),
    "pydantic": ("command line", "api", "words"),
}

Imports = dict[str, set[str]]  # module → every module it imports, by full name


def room_of(module: str) -> Room:
    """The room that a module of ours (without the package's name) lives in."""
    fits = [(len(name), room) for room in ROOMS for name in room.modules if f"{module}.".startswith(f"{name}.")]
    assert fits, f"{module} lives in no room: add it to the table"
    return max(fits)[1]


def walls_broken(imports: Imports) -> list[str]:
    """Imports that go up, or sideways into another room."""
    found = []
    for module, targets in imports.items():
        room = room_of(module)
        for target in sorted(targets & imports.keys()):
            other = room_of(target)
            if other is not room and other.floor >= room.floor:
                found.append(f"{module} (floor {room.floor}) imports {target} (floor {other.floor})")
    return found


def libraries_misplaced(libraries: Imports) -> list[str]:
    """Libraries known where they should not be."""
    return [
        f"{module} imports {library}"
        for module, used in libraries.items()
        for library in sorted(used)
        if library in KNOWN_BY and room_of(module).name not in KNOWN_BY[library]
    ]


def circle(imports: Imports) -> list[str]:
    """Modules that import each other in a circle, in order; empty if there is none."""
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        for target in sorted(imports[module] & imports.keys()):
            if found := visit(target, (*path, module)):
                return found
        done.add(module)
        return []

    return next((found for module in sorted(imports) if (found := visit(module, ()))), [])


def imported(source: str) -> Iterable[str]:
    """Full names in a module's import statements; `from a import b` gives both a and a.b."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def sources() -> dict[str, Path]:
    """Our modules and subpackages, by name without the top package's."""
    found = {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").rstrip("."): path
        for path in sorted(PACKAGE.rglob("*.py"))
    }
    return {name: path for name, path in found.items() if name}


def ours() -> Imports:
    modules = sources()
    return {
        module: {
            name
            for full in imported(path.read_text())
            if (name := full.removeprefix("lora_serve.")) != full and name in modules
        }
        for module, path in modules.items()
    }


def test_rooms_import_only_from_floors_below() -> None:
    assert walls_broken(ours()) == []


def test_libraries_are_known_only_where_they_belong() -> None:
    used = {module: {full.split(".")[0] for full in imported(path.read_text())} for module, path in sources().items()}
    assert libraries_misplaced(used) == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert circle(ours()) == []


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("__init__.py")), ids=lambda path: path.parent.name)
def test_packages_only_hand_names_on(path: Path) -> None:
    for node in ast.parse(path.read_text()).body:
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        listing = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
        assert isinstance(node, ast.Import | ast.ImportFrom) or docstring or listing, ast.unparse(node)


def test_the_test_itself_sees_what_it_should() -> None:
    graph: Imports = {
        "kv.pool": {"adapters.bank"},
        "adapters.bank": {"kernels.contract"},
        "kernels.contract": {"engine.engine"},
        "engine.engine": {"engine.scheduler", "kv.pool"},
        "engine.scheduler": set(),
        "engine.client": {"engine.engine"},
    }
    assert walls_broken(graph) == [
        "kv.pool (floor 2) imports adapters.bank (floor 2)",
        "kernels.contract (floor 1) imports engine.engine (floor 4)",
    ]
    assert circle(graph) == ["adapters.bank", "kernels.contract", "engine.engine", "kv.pool", "adapters.bank"]
    assert libraries_misplaced({"engine.engine": {"fastapi", "torch"}, "api.app": {"fastapi"}}) == [
        "engine.engine imports fastapi"
    ]
    assert set(imported("def f():\n    from a.b import c\nimport d")) == {"a.b", "a.b.c", "d"}
