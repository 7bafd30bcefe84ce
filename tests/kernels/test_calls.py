"""The structs that native functions take: described once, packed by name, and of the size that the compiler saw."""

from __future__ import annotations

import ctypes
from struct import error, pack
from typing import Any

import pytest

from lora_serve.kernels.cpu.backend import NativeKernels
from lora_serve.kernels.cpu.build import BuildError, library
from lora_serve.kernels.cpu.calls import CALLS, HEADER, CallStruct, parse
from lora_serve.kernels.cpu.library import Library


def header(structs: str) -> str:
    return f"#pragma once\n#include <cstdint>\n\nnamespace {{\n{structs}\n}}  // namespace\n"


PAIR = "struct Pair { int64_t first, second; };"
CALL = f"""
{PAIR}
// What a call takes.
struct Call {{
    const char* x;  // [rows]
    Pair pair;
    double eps;
    int64_t rows, in;
    Pair output[];  // [outputs]
}};
"""


@pytest.fixture
def call() -> CallStruct:
    return parse(header(CALL))["Call"]


MEMBERS: dict[str, Any] = {"x": 7, "pair": (1, 2), "eps": 0.5, "rows": 3, "in_": 4, "output": (5, 6, 7, 8)}


def test_members_are_packed_in_their_order_without_padding(call: CallStruct) -> None:
    assert call.pack(**MEMBERS) == pack("qqqdqq4q", 7, 1, 2, 0.5, 3, 4, 5, 6, 7, 8)
    assert call.pack(**MEMBERS | {"output": ()}) == pack("qqqdqq", 7, 1, 2, 0.5, 3, 4)
    assert call.size == 6 * 8


def test_members_are_known_by_their_names_whatever_order_they_come_in(call: CallStruct) -> None:
    assert call.pack(**dict(reversed(MEMBERS.items()))) == call.pack(**MEMBERS)


@pytest.mark.parametrize("member", MEMBERS)
def test_a_missing_member_is_refused(call: CallStruct, member: str) -> None:
    with pytest.raises(TypeError, match=f"argument: '{member}'"):
        call.pack(**{name: value for name, value in MEMBERS.items() if name != member})


@pytest.mark.parametrize("wrong", [{"another": 1}, {"pair": 1}, {"x": "seven"}, {"rows": (1, 2)}, {"eps": None}])
def test_an_unknown_member_or_a_value_of_another_type_is_refused(call: CallStruct, wrong: dict[str, Any]) -> None:
    with pytest.raises((TypeError, error)):
        call.pack(**MEMBERS | wrong)


def test_members_without_names_are_refused(call: CallStruct) -> None:
    with pytest.raises(TypeError):
        call.pack(*MEMBERS.values())


@pytest.mark.parametrize("wrong", [{"pair": (1, 2, 3)}, {"pair": (1,)}, {"output": (5, 6, 7)}])
def test_a_nested_struct_or_an_array_of_another_length_is_refused(call: CallStruct, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="values"):
        call.pack(**MEMBERS | wrong)


@pytest.mark.parametrize(
    "structs",
    [
        "struct A { int32_t small; };",
        "struct A { Unknown member; };",
        "struct A { char *x; };",
        "struct A { const char* x, y; };",
        "struct A { int64_t three[3]; };",
        "struct A { int64_t array[]; int64_t after; };",
        f"{PAIR} struct A {{ int64_t array[]; }}; struct B {{ A member; }};",
        "struct A { int64_t x = 0; };",
        "struct A { int64_t get() const { return 0; } };",
        "struct A { int64_t x };",
        "struct A { };",
        f"{PAIR} {PAIR}",
        "int64_t number;",
    ],
)
def test_a_header_that_the_parser_does_not_understand_is_refused(structs: str) -> None:
    with pytest.raises(ValueError, match=r"struct|that can be packed|after the array"):
        parse(header(structs))


def test_the_compiler_sees_every_struct_at_the_size_that_is_packed(native: NativeKernels) -> None:
    size = ctypes.CDLL(str(library()))["lora_struct_size"]
    assert len(CALLS) == HEADER.read_text().count("\nstruct ")
    assert {name: size(name.encode()) for name in CALLS} == {name: struct.size for name, struct in CALLS.items()}
    assert size(b"NoSuchCall") == 0


def test_a_library_with_another_layout_is_refused(native: NativeKernels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CALLS, "Heads", parse(header(PAIR))["Pair"])
    with pytest.raises(BuildError, match="struct Heads has 32 bytes, not 16"):
        Library(library())
