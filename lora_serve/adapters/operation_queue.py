"""Order and error handling of operations on adapter names, whose slow parts end in callbacks."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar

from lora_serve.errors import EngineFault, ServeError

T = TypeVar("T")
Done = Callable[[Any], None]  # gets an operation's result, or a ServeError

log = logging.getLogger(__name__)


class OperationQueue:
    """Runs the operations on one name one after the other, in the order in which they arrive."""

    def __init__(self) -> None:
        self._waiting: dict[str, deque[_Operation]] = {}  # of each name on which an operation is under way

    def run(self, name: str, start: Callable[[Done], None], done: Done) -> None:
        """Start an operation once earlier ones on its name have ended.

        Args:
            start: begins the operation; it calls what it is given when the operation has ended, or raises.
            done: called once, with the operation's result or the ServeError that ended it.
        """
        operation = _Operation(start, done, lambda: self._go_on(name))
        if name in self._waiting:
            self._waiting[name].append(operation)
        else:
            self._waiting[name] = deque([operation])
            self._go_on(name)

    def _go_on(self, name: str) -> None:
        """Begin the operations that wait, until one does not end at once."""
        waiting = self._waiting[name]
        while waiting:
            if not waiting.popleft().begin():
                return
        del self._waiting[name]


class _Operation:
    """One operation: its beginning, and its end, which happens once."""

    def __init__(self, start: Callable[[Done], None], done: Done, go_on: Callable[[], None]) -> None:
        self._start, self._done, self._go_on = start, done, go_on
        self._began = self._ended = False

    def begin(self) -> bool:
        """Begin; returns whether it has ended already."""
        next_step(lambda _: self._start(self._end), self._end)(None)
        self._began = True
        return self._ended

    def _end(self, result: Any) -> None:
        if self._ended:  # a step failed after the operation had ended
            return
        self._ended = True
        try:
            self._done(result)
        except Exception:
            log.exception("the answer to an operation on an adapter could not be given")
        if self._began:  # otherwise `begin` tells
            self._go_on()


def next_step(step: Callable[[T], None], done: Done) -> Callable[[T], None]:
    """`step`, as a callback that ends its operation with the error that it raises: a bug must not leave it waiting."""

    def callback(result: T) -> None:
        try:
            step(result)
        except ServeError as error:
            done(error)
        except Exception as error:
            log.exception("an operation on an adapter failed")
            done(EngineFault(f"the operation failed ({type(error).__name__})"))

    return callback


def if_successful(step: Callable[[T], None], done: Done) -> Callable[[T | ServeError], None]:
    """`next_step` of an operation whose step before succeeded; an error of that one ends the operation."""

    def callback(result: T | ServeError) -> None:
        if isinstance(result, ServeError):
            done(result)
        else:
            next_step(step, done)(result)

    return callback
