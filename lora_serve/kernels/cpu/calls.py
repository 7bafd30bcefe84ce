"""Struct packers for native calls, generated from `calls.h`.

A packer takes exactly the struct's members, by name, so that the two languages cannot disagree about what lies where;
`Library` compares the sizes with those that the compiler saw. A member whose name is a Python keyword gets an
underscore behind it (`in_`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from keyword import iskeyword
from pathlib import Path
from struct import Struct
from typing import Any, NamedTuple

HEADER = Path(__file__).with_name("calls.h")

_STRUCT = re.compile(r"struct (\w+) \{(.*?)\};", re.DOTALL)
_FORMATS = {"int64_t": "q", "double": "d"}
_POINTER = re.compile(r"(?:const )?(?:char|void|float|int32_t|int64_t|[A-Z]\w*)\* (\w+)")
_MEMBERS = re.compile(r"(int64_t|double|[A-Z]\w*) (\w+(?:, \w+)*)")
_ARRAY = re.compile(r"(int64_t|[A-Z]\w*) (\w+)\[\]")
_BESIDE = re.compile(r"#pragma once\n#include <cstdint>\n\nnamespace \{\s*\}\s*")  # what a header has besides structs


class _Member(NamedTuple):
    name: str
    format: str  # as in the module `struct`
    nested: bool = False
    array: bool = False


class CallStruct:
    """One struct of the header: its members, each 8 bytes or another struct, without padding.

    Attributes:
        format: of the members, as the module `struct` writes it.
        size: in bytes, without the array behind it.
        has_array: whether an array follows.
        values: the members, given by name, as a tuple of numbers; a nested struct is given as its own `values`.
        pack: the same as bytes. The array, if there is one, is the last member: its elements' values one after the
            other. TypeError for a missing or unknown member, ValueError for a nested struct or an array that is too
            long or too short.
    """

    values: Callable[..., tuple[int | float, ...]]
    pack: Callable[..., bytes]

    def __init__(self, name: str, members: Sequence[_Member]) -> None:
        self.format = "".join(member.format for member in members if not member.array)
        self.size = 8 * len(self.format)
        self.has_array = members[-1].array
        # A step packs hundreds of calls: functions made for the members, as `namedtuple` makes them, cost next to
        # nothing beside `Struct.pack`.
        flat: list[str] = []
        lines = []
        for member in members:
            parts = [f"{member.name}_{i}" for i in range(len(member.format))] if member.nested else [member.name]
            if member.nested:
                lines.append(f"{', '.join(parts)}, = {member.name}")
            flat += [f"*{member.name}"] if member.array else parts
        head = f"(*, {', '.join(member.name for member in members)})"
        packer = f"packer(len({members[-1].name}))" if self.has_array else "packer"
        element = members[-1].format if self.has_array else ""
        names: dict[str, Any] = {"packer": cache(self._packer_with(element)) if element else Struct(self.format).pack}
        for function, result in (("values", f"({', '.join(flat)},)"), ("pack", f"{packer}({', '.join(flat)})")):
            body = "".join(f"    {line}\n" for line in (*lines, f"return {result}"))
            exec(f"def {name}_{function}{head}:\n{body}", names)
            setattr(self, function, names[f"{name}_{function}"])

    def _packer_with(self, element: str) -> Callable[[int], Callable[..., bytes]]:
        """What packs the struct before an array of so many values."""

        def packer(count: int) -> Callable[..., bytes]:
            if count % len(element):
                raise ValueError(f"an array of {len(element)} values an element does not have {count}")
            return Struct(self.format + element * (count // len(element))).pack

        return packer


def parse(header: str) -> dict[str, CallStruct]:
    """The structs of a header, by name.

    Raises:
        ValueError: a line that the grammar of `calls.h` does not have.
    """
    header = re.sub(r"[ \t]*//.*", "", header)
    structs: dict[str, CallStruct] = {}
    for match in _STRUCT.finditer(header):
        name, body = match.groups()
        declarations = [" ".join(line.split()) for line in body.split(";")]
        if declarations.pop():
            raise ValueError(f"struct {name} ends in the middle of a declaration")
        members: list[_Member] = []
        for declaration in declarations:
            if members and members[-1].array:
                raise ValueError(f"{declaration} comes after the array of {name}")
            members += _members(declaration, structs)
        if not members or name in structs:
            raise ValueError(f"struct {name} is empty, or there are two of it")
        structs[name] = CallStruct(name, members)
    if not _BESIDE.fullmatch(_STRUCT.sub("", header).lstrip()):
        raise ValueError("the header has something besides structs")
    return structs


def _members(declaration: str, structs: Mapping[str, CallStruct]) -> list[_Member]:
    if match := _POINTER.fullmatch(declaration):
        return [_Member(_name(match[1]), "q")]
    if match := _ARRAY.fullmatch(declaration):
        return [_Member(_name(match[2]), _format(match[1], structs), array=True)]
    if match := _MEMBERS.fullmatch(declaration):
        nested = match[1] in structs
        return [_Member(_name(name), _format(match[1], structs), nested) for name in match[2].split(", ")]
    raise ValueError(f"no member that can be packed: {declaration}")


def _name(name: str) -> str:
    return f"{name}_" if iskeyword(name) else name


def _format(type_name: str, structs: Mapping[str, CallStruct]) -> str:
    if type_name in structs and not structs[type_name].has_array:
        return structs[type_name].format
    if type_name not in _FORMATS:
        raise ValueError(f"no type that can be packed: {type_name}")
    return _FORMATS[type_name]


CALLS = parse(HEADER.read_text())
