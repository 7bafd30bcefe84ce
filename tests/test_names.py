"""Names: unique classes and modules, docstrings without retired words, and field terms that find the right file."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "lora_serve"
SOURCES = {str(path.relative_to(PACKAGE)): path.read_text() for path in sorted(PACKAGE.rglob("*.py"))}
TREES = {path: ast.parse(source) for path, source in SOURCES.items()}
BACKENDS = {"kernels/cpu", "kernels/gpu"}  # implement one interface, with modules of the same names
# Words of our own that were replaced by the field's; "vector bank" is PEFT's name, "in-flight" the field's.
RETIRED = re.compile(
    r"\b(tapes?|rungs?|ladders?|seats?|seated|part(y|ies)|(?<!in-)flights?|lean|foreign|(?<!vector )banks?)\b",
    re.IGNORECASE,
)
FIRST_LINE = 120  # characters

FINDABLE = [  # a term that a newcomer greps for → a file, or a package, that must contain it
    ("LoRA delta is applied", "model/linear.py"),
    ("evict", "adapters/residency.py"),
    ("evict", "adapters/device_slots.py"),
    ("lru", "adapters/residency.py"),
    ("in_flight", "engine"),
    ("prefetch", "adapters"),
    ("schedule", "engine/scheduler.py"),
    ("prefill", "engine/scheduler.py"),
    ("decode", "engine/scheduler.py"),
    ("preempt", "engine/scheduler.py"),
    ("cuda_graph", "model/cuda_graphs.py"),
    ("paged", "model/paged_attention.py"),
    ("fused", "model/fused.py"),
    ("shrink", "kernels"),
    ("expand", "kernels"),
    ("lora_a", "adapters/formats"),
    ("scaling", "adapters/formats"),
]


def duplicates(found: Iterator[tuple[str, str]]) -> dict[str, list[str]]:
    """Names that occur in more than one place, with the places."""
    places = defaultdict(list)
    for name, place in found:
        places[name].append(place)
    return {name: where for name, where in places.items() if len(where) > 1}


def classes() -> Iterator[tuple[str, str]]:
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                yield node.name, path


def modules() -> Iterator[tuple[str, str]]:
    for path in map(Path, SOURCES):
        if path.stem != "__init__":
            yield path.stem, str(path.parent)


def first_lines() -> Iterator[tuple[str, str]]:
    """(place, docstring) of every module and of every public class and function."""
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                name = getattr(node, "name", "")
                docstring = ast.get_docstring(node)
                if docstring is not None and not name.startswith("_"):
                    yield f"{path}:{getattr(node, 'lineno', 1)} {name}", docstring.splitlines()[0]


def test_no_class_name_occurs_twice() -> None:
    assert duplicates(classes()) == {}


def test_no_module_name_occurs_twice_except_in_backends() -> None:
    twice = duplicates(modules())
    assert {name: places for name, places in twice.items() if set(places) != BACKENDS} == {}


def test_the_first_line_of_a_docstring_is_a_complete_sentence() -> None:
    incomplete = [
        f"{place}: {line}"
        for place, line in first_lines()
        if len(line) > FIRST_LINE or not line.rstrip().endswith((".", ":", "?", ")"))
    ]
    assert incomplete == []


def test_no_first_line_of_a_docstring_contains_a_retired_word() -> None:
    assert [f"{place}: {line}" for place, line in first_lines() if RETIRED.search(line)] == []


@pytest.mark.parametrize(("term", "place"), FINDABLE)
def test_a_common_term_finds_the_file_that_implements_it(term: str, place: str) -> None:
    candidates = [path for path in SOURCES if path == place or path.startswith(f"{place}/")]
    assert candidates, f"{place} does not exist"
    assert any(term.lower() in (path + SOURCES[path]).lower() for path in candidates)


def test_retired_words_are_recognised() -> None:
    for line in ("Seated adapters.", "A bank of slots.", "The tape.", "A foreign module.", "One flight."):
        assert RETIRED.search(line), line
    for line in ("An in-flight step.", "One shared vector bank.", "A partial result.", "Clean up."):
        assert not RETIRED.search(line), line
