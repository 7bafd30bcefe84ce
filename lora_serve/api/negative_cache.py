"""What is remembered of names that could not be fetched, so that a source is not asked again for every request."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable

from lora_serve.errors import AdapterNotFound, ServeError

MOST = 10_000  # names


class NegativeCache:
    """Errors by name, each for a while; the oldest is forgotten first.

    Args:
        not_found: seconds for which a name is remembered that no source has.
        failed: seconds for any other error.
        most: names that are remembered.
    """

    def __init__(
        self,
        not_found: float = 10.0,
        failed: float = 30.0,
        most: int = MOST,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._not_found, self._failed, self._most, self._clock = not_found, failed, most, clock
        self._errors: OrderedDict[str, tuple[ServeError, float]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._errors)

    def add(self, name: str, error: ServeError) -> None:
        """Remember an error."""
        self._errors.pop(name, None)
        if len(self._errors) >= self._most:
            self._errors.popitem(last=False)
        seconds = self._not_found if isinstance(error, AdapterNotFound) else self._failed
        self._errors[name] = error, self._clock() + seconds

    def find(self, name: str) -> ServeError | None:
        """The remembered error of a name, as a new one that says how long it is still remembered."""
        error, until = self._errors.get(name, (None, 0.0))
        left = until - self._clock()
        if error is None or left <= 0:
            self._errors.pop(name, None)
            return None
        return type(error)(error.message, param=error.param, retry_after=max(1.0, left))

    def forget(self, name: str) -> None:
        """Forget a name: it was published."""
        self._errors.pop(name, None)
