"""bench's modules import each other without circles, groups import only what is shared, documented commands exist."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BENCH = ROOT / "bench"
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(BENCH.rglob("*.py"))
}
GROUPS = {"serving", "kernels", "gpu", "peers", "simulation", "structured_output"}
DOCUMENTS = [ROOT / "Makefile", ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *BENCH.rglob("*.md")]


def imported(path: Path) -> Iterator[str]:
    """Modules of bench that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom) and node.module in MODULES:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            yield from names & MODULES.keys() or {node.module}


def group(module: str) -> str:
    """The package below bench that a module is in; `shared` for those in none."""
    name = module.split(".")[1] if "." in module else ""
    return name if name in GROUPS else "shared"


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = {module: set(imported(path)) for module, path in MODULES.items()}
    assert "bench.serving.load" in graph["bench.serving.http_throughput"]
    TopologicalSorter(graph).prepare()
    with pytest.raises(CycleError):
        TopologicalSorter(graph | {"bench.serving.client": {"bench.serving.load"}}).prepare()


def test_every_module_is_in_a_group_or_shared_at_the_top() -> None:
    assert {path.parent.name for path in BENCH.rglob("*.py")} == GROUPS | {"bench"}


def test_shared_modules_import_no_group_and_groups_only_serving() -> None:
    crossing = {
        f"{module} imports {target}"
        for module, path in MODULES.items()
        for target in imported(path)
        if group(target) not in {group(module), "shared"} | ({"serving"} if group(module) != "shared" else set())
    }
    assert crossing == set()


def test_every_documented_command_exists() -> None:
    texts = {path: path.read_text() for path in [*DOCUMENTS, *MODULES.values()]}
    commands = {
        module
        for text in texts.values()
        for by_module, by_file in re.findall(
            r"(?:python3?|-m|\$\(PYTHON\)) (?:-m )?(?:(bench(?:\.\w+)+)|(bench/[\w/]+)\.py)", text
        )
        for module in [by_module or by_file.replace("/", ".")]
    }
    assert {"bench.make_model", "bench.gpu.check", "bench.gpu.wheels", "bench.peers.compare"} <= commands
    for module in commands:
        assert module in MODULES, module
        assert '__name__ == "__main__"' in MODULES[module].read_text(), module


def test_every_file_of_bench_that_is_mentioned_exists() -> None:
    for document in [*DOCUMENTS, *MODULES.values()]:
        for name in re.findall(r"\bbench/[\w/]+\.(?:py|md)\b", document.read_text()):
            assert (ROOT / name).exists(), f"{document}: {name}"
