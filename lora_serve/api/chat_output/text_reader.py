"""Text that arrives in pieces, read by generators that yield while they wait for more of it.

A reader of a format is plain sequential code; `yield from reader.literal("<tool_call>")` suspends it until the text
that decides has arrived. Text is consumed as it is read, so that each character is looked at a constant number of
times and only what could become a marker stays unread. `hold` keeps what is consumed from then on, in case it has to
be read as plain text after all.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator
from typing import TypeVar

T = TypeVar("T")
Step = Generator[None, None, T]  # yields while it waits for text
Write = Callable[[str], None]

CERTAIN = 4  # characters of a marker at which a text that was cut off is taken to have ended in it
SPACE = re.compile(r"[ \t\r\n]+")


class TextReader:
    """The unread part of a text of which more may arrive."""

    def __init__(self) -> None:
        self._text = ""
        self._next = 0
        self._ended = False
        self._cut_off = False
        self._held: list[str] | None = None

    def append(self, text: str) -> None:
        """Add text at the end."""
        self._text = self._text[self._next :] + text
        self._next = 0

    def end(self, *, cut_off: bool = False) -> None:
        """Say that no more text will come; `cut_off`: more would have come."""
        self._ended = True
        self._cut_off = cut_off

    def hold(self) -> None:
        """Keep what is consumed from now on."""
        self._held = []

    def release(self) -> str:
        """What was consumed since `hold`; empty after `drop`, and if the text was cut off in it."""
        held, self._held = "".join(self._held or ()), None
        return "" if self._cut_off and self._next == len(self._text) else held

    def drop(self) -> None:
        """Forget what was consumed since `hold`."""
        self._held = None

    def take(self, count: int) -> str:
        """Consume characters that have arrived."""
        taken = self._text[self._next : self._next + count]
        self._next += count
        if self._held is not None:
            self._held.append(taken)
        return taken

    def peek(self) -> Step[str]:
        """The next character; empty at the end of the text."""
        while self._next == len(self._text) and not self._ended:
            yield
        return self._text[self._next : self._next + 1]

    def run(self, pattern: re.Pattern[str], write: Write) -> Step[None]:
        """Consume characters as long as they match a pattern of the form `[…]+`, and write them as they come."""
        while (yield from self.peek()):
            match = pattern.match(self._text, self._next)
            if not match:
                return
            write(self.take(match.end() - self._next))

    def skip(self, pattern: re.Pattern[str] = SPACE) -> Step[None]:
        """Consume characters as long as they match."""
        yield from self.run(pattern, lambda text: None)

    def literal(self, *options: str) -> Step[str]:
        """Consume one of these strings and return it; empty, and nothing is consumed, if none is next."""
        while True:
            unread = self._text[self._next : self._next + max(map(len, options))]
            for option in options:
                if unread.startswith(option):
                    return self.take(len(option))
            if self._ended or not any(option.startswith(unread) for option in options):
                return ""
            yield

    def until(self, markers: tuple[str, ...], write: Write) -> Step[str]:
        """Write text up to the first of these markers, which is returned but not consumed; empty at the end."""
        pattern = re.compile("|".join(map(re.escape, markers)) or r"(?!)")
        while True:
            found = pattern.search(self._text, self._next)
            if found:
                end = found.start()
            else:
                overlap = _overlap(self._text, self._next, markers) if markers else 0
                end = len(self._text)
                if not self._ended or (self._cut_off and overlap >= CERTAIN):
                    end -= overlap
            if end > self._next:
                write(self.take(end - self._next))
            if found:
                return found.group()
            if self._ended:
                return ""
            yield


def _overlap(text: str, start: int, markers: tuple[str, ...]) -> int:
    """Length of the longest suffix of `text[start:]` that begins a marker."""
    longest = min(len(text) - start, max(map(len, markers)))
    for length in range(longest, 0, -1):
        suffix = text[len(text) - length :]
        if any(marker.startswith(suffix) for marker in markers):
            return length
    return 0
