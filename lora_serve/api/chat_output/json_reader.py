"""Incremental reading of JSON values, and of the object that most formats write a tool call as.

Reading is as lenient as models need (raw line breaks in strings are taken), but finds where the value ends; the text
is passed on as it is.
"""

from __future__ import annotations

import json
import re
from enum import Enum, auto
from typing import Any

from lora_serve.api.chat_output.call_writer import CallWriter
from lora_serve.api.chat_output.text_reader import SPACE, Step, TextReader, Write

PLAIN = re.compile(r'[^"\\]+')
SCALAR = re.compile(r"[-+.0-9A-Za-z]+")
VALID_SCALAR = re.compile(r"true|false|null|-?[0-9]+(\.[0-9]+)?([eE][-+]?[0-9]+)?")
ARGUMENTS = ("arguments", "parameters")
OTHER_KEYS = ("type", "id")  # written by some models, of no use to the caller


class Expected(Enum):
    """What may come next in a JSON text."""

    VALUE = auto()
    VALUE_OR_END = auto()
    KEY = auto()
    KEY_OR_END = auto()
    COLON = auto()
    COMMA_OR_END = auto()


def read_json(reader: TextReader, write: Write) -> Step[bool]:
    """Consume one JSON value and write its text as it comes; False where it is malformed or the text ends."""
    closing: list[str] = []
    expected = Expected.VALUE
    while True:
        if closing:
            yield from reader.run(SPACE, write)
        character = yield from reader.peek()
        if not character:
            return False
        match expected:
            case Expected.COMMA_OR_END | Expected.VALUE_OR_END | Expected.KEY_OR_END if character == closing[-1]:
                write(reader.take(1))
                closing.pop()
                expected = Expected.COMMA_OR_END
            case Expected.COMMA_OR_END if character == ",":
                write(reader.take(1))
                expected = Expected.KEY if closing[-1] == "}" else Expected.VALUE
            case Expected.COLON if character == ":":
                write(reader.take(1))
                expected = Expected.VALUE
            case Expected.KEY | Expected.KEY_OR_END if character == '"':
                if not (yield from _read_string(reader, write)):
                    return False
                expected = Expected.COLON
            case Expected.VALUE | Expected.VALUE_OR_END:
                if character in "{[":
                    write(reader.take(1))
                    closing.append("}" if character == "{" else "]")
                    expected = Expected.KEY_OR_END if character == "{" else Expected.VALUE_OR_END
                elif character == '"':
                    if not (yield from _read_string(reader, write)):
                        return False
                    expected = Expected.COMMA_OR_END
                else:
                    scalar: list[str] = []
                    yield from reader.run(SCALAR, scalar.append)
                    write("".join(scalar))
                    if not VALID_SCALAR.fullmatch("".join(scalar)):
                        return False
                    expected = Expected.COMMA_OR_END
            case _:
                return False
        if not closing and expected is Expected.COMMA_OR_END:
            return True


def _read_string(reader: TextReader, write: Write) -> Step[bool]:
    write(reader.take(1))
    while character := (yield from reader.peek()):
        if character == '"':
            write(reader.take(1))
            return True
        if character == "\\":
            write(reader.take(1))
            if (yield from reader.peek()):
                write(reader.take(1))
        else:
            yield from reader.run(PLAIN, write)
    return False


def _read_value(reader: TextReader) -> Step[Any]:
    """A whole JSON value; `...` if it is malformed."""
    pieces: list[str] = []
    valid = yield from read_json(reader, pieces.append)
    return _decode("".join(pieces)) if valid else ...


def _decode(text: str) -> Any:
    """The value of a JSON text; `...` if it is malformed."""
    try:
        return json.loads(text, strict=False)
    except (ValueError, RecursionError):
        return ...


def read_arguments(reader: TextReader, calls: CallWriter, name: str, ends: tuple[str, ...]) -> Step[None]:
    """Begin a call whose arguments are the object that comes next, and write them as they come.

    What can't be read as JSON is written as the model wrote it, up to one of `ends`: a call that has begun can't be
    taken back, and clients have to check arguments anyway.
    """
    reader.drop()
    calls.begin(name)
    if not (yield from read_json(reader, calls.arguments)):
        yield from reader.until(ends, calls.arguments)


def read_call_object(reader: TextReader, calls: CallWriter, ends: tuple[str, ...] = (), *, marked: bool) -> Step[bool]:
    """Consume `{"name": …, "arguments": {…}}`, keys in any order; False, at the first other character, if it is none.

    Args:
        ends: markers that end malformed arguments.
        marked: a marker has announced a call, so that a name without arguments is one too.
    """
    call = CallObject(reader, calls, ends, marked=marked)
    return (yield from call.read())


class CallObject:
    """A tool call that is an object with a name and arguments."""

    def __init__(self, reader: TextReader, calls: CallWriter, ends: tuple[str, ...], *, marked: bool) -> None:
        self._reader = reader
        self._calls = calls
        self._ends = ends
        self._marked = marked
        self._name: str | None = None
        self._arguments: str | None = None  # that came before the name
        self._begun = False

    def read(self) -> Step[bool]:
        """Consume the object; True if a call has begun."""
        self._reader.take(1)
        while True:
            yield from self._reader.skip()
            if not (yield from self._read_member()):
                return self._begun
            yield from self._reader.skip()
            if (yield from self._reader.literal(",")):
                continue
            if (yield from self._reader.literal("}")) and self._marked and self._name is not None and not self._begun:
                self._begin("{}")
            return self._begun

    def _read_member(self) -> Step[bool]:
        if (yield from self._reader.peek()) != '"':
            return False
        key = yield from _read_value(self._reader)
        yield from self._reader.skip()
        if not (yield from self._reader.literal(":")):
            return False
        yield from self._reader.skip()
        if self._begun or key in OTHER_KEYS:
            return (yield from read_json(self._reader, lambda text: None))
        if key == "name":
            return (yield from self._read_name())
        if key in ARGUMENTS:
            return (yield from self._read_arguments())
        return False

    def _read_name(self) -> Step[bool]:
        if (yield from self._reader.peek()) != '"':
            return False
        name = yield from _read_value(self._reader)
        if not isinstance(name, str) or not self._calls.knows(name):
            return False
        self._name = name
        if self._arguments is not None:
            self._begin(self._arguments)
        return True

    def _read_arguments(self) -> Step[bool]:
        is_object = (yield from self._reader.peek()) == "{"
        if is_object and self._name is not None:
            self._begun = True
            yield from read_arguments(self._reader, self._calls, self._name, self._ends)
            return True
        pieces: list[str] = []
        if not (yield from read_json(self._reader, pieces.append)):
            return False
        arguments = "".join(pieces)
        if not is_object:  # null, or the arguments as a string of JSON
            decoded = _decode(arguments)
            arguments = "{}" if decoded is None else decoded if isinstance(decoded, str) else ""
            if not isinstance(_decode(arguments), dict):
                return False
        self._arguments = arguments
        if self._name is not None:
            self._begin(arguments)
        return True

    def _begin(self, arguments: str) -> None:
        assert self._name is not None
        self._begun = True
        self._reader.drop()
        self._calls.begin(self._name)
        self._calls.arguments(arguments)
