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
        self._queues: dict[str, deque[Callable[[], None]]] = {}  # by name; the first operation is under way

    def run(self, name: str, start: Callable[[Done], None], done: Done) -> None:
        """Start an operation once earlier ones on its name have ended.

        Args:
            start: begins the operation; it calls what it is given when the operation has ended, or raises.
            done: called once, with the operation's result or the ServeError that ended it.
        """
        ended = False

        def end(result: Any) -> None:
            nonlocal ended
            if ended:  # a step failed after the operation had ended
                return
            ended = True
            try:
                done(result)
            finally:
                queue.popleft()
                if queue:
                    queue[0]()
                else:
                    del self._queues[name]

        queue = self._queues.setdefault(name, deque())
        queue.append(lambda: next_step(lambda _: start(end), end)(None))
        if len(queue) == 1:
            queue[0]()


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
