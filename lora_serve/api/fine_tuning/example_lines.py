"""Training data read line by line: JSONL to examples, and the first mistakes with their lines.

Memory and work are bounded by the line, whatever the size of the file. A file has examples of one kind. Blank lines
count as lines and mean nothing; a byte order mark and line ends of Windows are accepted. Mistakes name fields and never
repeat what the file says.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from lora_serve.api.error_handlers import validation_error
from lora_serve.api.fine_tuning.example_schemas import (
    ChatExample,
    CompletionExample,
    Example,
    Kind,
    PreferenceExample,
)
from lora_serve.api.json_body import decode
from lora_serve.errors import BadRequest

LONGEST_LINE = 4 << 20  # bytes
MOST_LINES = 2_000_000  # blank ones included
MOST_INVALID = 1000  # lines, after which no more are read
MOST_TOLD = 10  # mistakes
LONGEST_MISTAKE = 300  # characters
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
UTF_16_MARKS = (b"\xff\xfe", b"\xfe\xff")
# The fields that tell which kind a line is meant to be → its schema.
SCHEMAS: dict[str, type[Example]] = {
    "messages": ChatExample,
    "completion": CompletionExample,
    "prompt": CompletionExample,
    "preferred_output": PreferenceExample,
    "non_preferred_output": PreferenceExample,
    "input": PreferenceExample,
}


class InvalidExamples(BadRequest):
    """Lines of a file of training data are invalid; the message has their numbers."""

    kind = "invalid_training_file"


class Mistake(NamedTuple):
    """Why a line, counted from 1, is no example; `param` is the field at fault."""

    line: int
    message: str
    param: str | None


@dataclass(frozen=True)
class CheckedLines:
    """What a file of training data contains.

    Attributes:
        kind: of all its examples; None if there are none.
        examples: valid lines.
        lines: that were read, blank ones included.
        invalid: lines with a mistake.
        mistakes: the first of these.
    """

    kind: Kind | None
    examples: int
    lines: int
    invalid: int
    mistakes: tuple[Mistake, ...]

    def raise_if_invalid(self) -> None:
        """Raise `InvalidExamples` that names the first mistakes, or says that there are no examples."""
        if self.invalid:
            told = [f"line {mistake.line}: {mistake.message}" for mistake in self.mistakes]
            if self.invalid > len(told):
                told.append(f"and {self.invalid - len(told):,} more")
            count = f"{self.invalid:,} of the {self.lines:,} lines read"
            raise InvalidExamples(f"no valid training data in {count}: {'; '.join(told)}", param="file")
        if not self.examples:
            raise InvalidExamples("the file has no examples", param="file")


def parse_example(line: bytes) -> Example:
    """The example in a line without its line end. Raises `BadRequest` with the field at fault."""
    try:
        value = decode(line, "the line")
    except BadRequest as error:
        raise BadRequest(error.message.replace(" at line 1 column ", " at byte ")) from None
    if not isinstance(value, dict):
        raise BadRequest("every line must be a JSON object of its own (JSONL)")
    schema = next((SCHEMAS[field] for field in SCHEMAS if field in value), None)
    if schema is None:
        raise BadRequest(
            "the line must have messages, or prompt and completion, or input, preferred_output and non_preferred_output"
        )
    try:
        return schema.model_validate(value)
    except ValidationError as error:
        found: Any = error.errors(include_url=False, include_context=False, include_input=False)
        problems = [{**problem, "loc": ("body", *problem["loc"])} for problem in found]
    raise validation_error(problems, value)


def read_examples(path: Path) -> Iterator[tuple[int, Example]]:
    """The examples of a checked file, with their line numbers. Raises `InvalidExamples` at a line that is none."""
    with path.open("rb") as file:
        number = 0
        while line := file.readline(LONGEST_LINE + len(BYTE_ORDER_MARK) + 1):
            number += 1
            line = line.removeprefix(BYTE_ORDER_MARK) if number == 1 else line
            if line.isspace():
                continue
            try:
                yield number, parse_example(line)
            except BadRequest as error:
                raise InvalidExamples(f"line {number}: {error.message}", param=error.param) from None


class LineChecker:
    """Checks lines while their bytes arrive."""

    def __init__(self) -> None:
        self._line = bytearray()
        self._number = 1  # of the line that is being received
        self._too_long = False
        self._kind: Kind | None = None
        self._examples = self._invalid = 0
        self._mistakes: list[Mistake] = []

    @property
    def invalid(self) -> int:
        """Lines with a mistake so far."""
        return self._invalid

    def feed(self, piece: bytes) -> None:
        """Take the next bytes of the file. Raises `InvalidExamples` if it has far too many lines, or mistakes."""
        start = 0
        while (end := piece.find(b"\n", start)) >= 0:
            self._extend(piece[start:end])
            self._end_line()
            if self._invalid >= MOST_INVALID:
                self._checked(self._number).raise_if_invalid()
            if self._number >= MOST_LINES:
                raise InvalidExamples(f"the file has more than {MOST_LINES:,} lines", param="file")
            self._number += 1
            start = end + 1
        self._extend(piece[start:])

    def finish(self) -> CheckedLines:
        """Take the end of the file, which also ends its last line."""
        last = self._number if self._line or self._too_long else self._number - 1
        self._end_line()
        return self._checked(last)

    def _checked(self, lines: int) -> CheckedLines:
        return CheckedLines(self._kind, self._examples, lines, self._invalid, tuple(self._mistakes))

    def _extend(self, piece: bytes) -> None:
        if self._too_long:
            return
        self._line += piece
        if len(self._line) > LONGEST_LINE + len(BYTE_ORDER_MARK):
            self._too_long = True
            self._line = bytearray()

    def _end_line(self) -> None:
        line, self._line = bytes(self._line), bytearray()
        too_long, self._too_long = self._too_long, False
        if self._number == 1:
            line = line.removeprefix(BYTE_ORDER_MARK)
        if not too_long and (not line or line.isspace()):
            return
        try:
            if too_long or len(line) > LONGEST_LINE:
                raise BadRequest(f"the line has more than {LONGEST_LINE:,} bytes")
            if self._number == 1 and line.startswith(UTF_16_MARKS):
                raise BadRequest("the file must be UTF-8; it seems to be UTF-16")
            kind = parse_example(line).kind
            self._kind = self._kind or kind
            if kind != self._kind:
                raise BadRequest(f"the line is a {kind} example, and those before it are {self._kind} examples")
        except BadRequest as error:
            self._invalid += 1
            if len(self._mistakes) < MOST_TOLD:
                self._mistakes.append(Mistake(self._number, error.message[:LONGEST_MISTAKE], error.param))
        else:
            self._examples += 1
