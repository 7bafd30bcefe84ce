"""Import rules: packages import only from layers below their own, and some libraries only in some packages.

Packages on the same layer do not import each other. Imports inside functions and under TYPE_CHECKING count as well.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).parent.parent / "lora_serve"


class Package(NamedTuple):
    layer: int
    name: str
    modules: tuple[str, ...]  # below lora_serve, submodules included; the longest match wins


OUTSIDE = (
    "arrival",
    "client",
    "connection",
    "engine_process",
    "event_buffer",
    "process_main",
    "rank_main",
    "supervisor",
)
PACKAGES = (
    Package(9, "ray", ("ray",)),
    Package(8, "replicas", ("replicas",)),
    Package(
        7,
        "command line",
        (
            "__main__",
            "cli",
            "command_help",
            "server",
            "http_protocol",
            "remote",
            "remote_copies",
            "adapter_commands",
            "reports",
            "store_commands",
            "shared_store_commands",
            "key_commands",
            "option_errors",
            "top_command",
            "train_command",
        ),
    ),
    Package(6, "api", ("api",)),
    Package(5, "metrics", ("metrics", "source_metrics", "job_metrics")),
    Package(5, "engine from outside", tuple(f"engine.{module}" for module in OUTSIDE)),
    Package(4, "engine inside", ("engine",)),
    Package(3, "model", ("model",)),
    Package(3, "sources", ("sources",)),
    Package(2, "adapters", ("adapters",)),
    Package(2, "kv", ("kv",)),
    Package(1, "kernels", ("kernels",)),
    Package(
        1,
        "shared types",
        (
            "request",
            "messages",
            "training_messages",
            "learning_rate",
            "precondition",
            "config",
            "errors",
            "names",
            "adapter_files",
            "adapter_sources",
            "serve_settings",
            "log_format",
            "malloc",
        ),
    ),
)

# Libraries that only some packages may import; any other may be imported anywhere.
TENSORS = ("engine inside", "model", "adapters", "kv", "kernels")
ALLOWED_IN = {
    "fastapi": ("api",),
    "starlette": ("api", "replicas", "ray"),
    "ray": ("ray",),
    "aiohttp": ("replicas", "sources"),
    "opentelemetry": ("api",),
    "prometheus_client": ("metrics", "command line"),
    "uvicorn": ("command line",),
    "rich": ("command line",),
    "httpx": ("command line",),
    "psutil": ("engine inside",),
    "s3fs": ("sources",),
    "gcsfs": ("sources",),
    "obstore": ("adapters",),
    "huggingface_hub": ("sources", "model"),
    "llguidance": ("api", "engine inside"),
    "sentencepiece": ("engine inside",),
    "zmq": ("engine from outside",),
    "torch": TENSORS,
    "safetensors": ("adapters", "model"),
    "pydantic": ("ray", "command line", "api", "shared types"),
}

Imports = dict[str, set[str]]  # module → every module it imports, by full name


def package_of(module: str) -> Package:
    """The package that a module belongs to; the name is without `lora_serve.`."""
    fits = [
        (len(name), package) for package in PACKAGES for name in package.modules if f"{module}.".startswith(f"{name}.")
    ]
    assert fits, f"{module} is in no package: add it to the table"
    return max(fits)[1]


def layer_violations(imports: Imports) -> list[str]:
    """Imports from a layer above, or from another package on the same layer."""
    found = []
    for module, targets in imports.items():
        package = package_of(module)
        for target in sorted(targets & imports.keys()):
            other = package_of(target)
            if other is not package and other.layer >= package.layer:
                found.append(f"{module} (layer {package.layer}) imports {target} (layer {other.layer})")
    return found


def library_violations(libraries: Imports) -> list[str]:
    """Libraries imported where they are not allowed."""
    return [
        f"{module} imports {library}"
        for module, used in libraries.items()
        for library in sorted(used)
        if library in ALLOWED_IN and package_of(module).name not in ALLOWED_IN[library]
    ]


def import_cycle(imports: Imports) -> list[str]:
    """Modules of an import cycle, in order; empty if there is none."""
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


def imported_names(source: str) -> Iterable[str]:
    """Full names in a module's import statements; `from a import b` gives both a and a.b."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def sources() -> dict[str, Path]:
    """Modules and subpackages of lora_serve, by name without `lora_serve.`."""
    found = {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").rstrip("."): path
        for path in sorted(PACKAGE.rglob("*.py"))
    }
    return {name: path for name, path in found.items() if name}


def imports_by_module() -> Imports:
    modules = sources()
    return {
        module: {
            name
            for full in imported_names(path.read_text())
            if (name := full.removeprefix("lora_serve.")) != full and name in modules
        }
        for module, path in modules.items()
    }


def test_packages_import_only_from_layers_below() -> None:
    assert layer_violations(imports_by_module()) == []


def test_libraries_are_imported_only_where_allowed() -> None:
    used = {
        module: {full.split(".")[0] for full in imported_names(path.read_text())} for module, path in sources().items()
    }
    assert library_violations(used) == []


def test_there_are_no_import_cycles() -> None:
    assert import_cycle(imports_by_module()) == []


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("__init__.py")), ids=lambda path: path.parent.name)
def test_init_files_contain_only_imports(path: Path) -> None:
    for node in ast.parse(path.read_text()).body:
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        listing = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
        assert isinstance(node, ast.Import | ast.ImportFrom) or docstring or listing, ast.unparse(node)


def test_the_checks_themselves_find_violations() -> None:
    graph: Imports = {
        "kv.pool": {"adapters.store.store"},
        "adapters.store.store": {"kernels.contract"},
        "kernels.contract": {"engine.engine"},
        "engine.engine": {"engine.scheduler", "kv.pool"},
        "engine.scheduler": set(),
        "engine.client": {"engine.engine"},
    }
    assert layer_violations(graph) == [
        "kv.pool (layer 2) imports adapters.store.store (layer 2)",
        "kernels.contract (layer 1) imports engine.engine (layer 4)",
    ]
    assert import_cycle(graph) == [
        "adapters.store.store",
        "kernels.contract",
        "engine.engine",
        "kv.pool",
        "adapters.store.store",
    ]
    assert library_violations({"engine.engine": {"fastapi", "torch"}, "api.app": {"fastapi"}}) == [
        "engine.engine imports fastapi"
    ]
    assert set(imported_names("def f():\n    from a.b import c\nimport d")) == {"a.b", "a.b.c", "d"}
