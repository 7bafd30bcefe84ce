"""Every error that may leave a room, as one tree.

A room raises one of these; `api/error_responses.py` alone knows which HTTP status each kind becomes. An error crosses the
process border as a `Failure` and is raised again on the other side as the same kind. Messages are for the person who
sent the request: they name the field and never carry addresses, paths or prompt text.
"""

from __future__ import annotations

from typing import ClassVar

import msgspec


class ServeError(Exception):
    """Base of the tree.

    Args:
        message: one or two sentences for the caller.
        param: the request field at fault, as the caller spelt it.
        retry_after: seconds after which trying again makes sense.
    """

    kind: ClassVar[str] = "server_error"

    def __init__(self, message: str, *, param: str | None = None, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after = retry_after


class BadRequest(ServeError):
    """The request can never be served as it is written."""

    kind = "bad_request"


class ContextExceeded(BadRequest):
    """Prompt and requested output do not fit the model's context."""

    kind = "context_length_exceeded"


class AdapterNotFound(ServeError):
    """No such adapter, no such version of it, or none that this caller may know of."""

    kind = "adapter_not_found"


class AdapterExists(ServeError):
    """The name is taken and the caller did not ask for a new version."""

    kind = "adapter_exists"


class AdapterInvalid(ServeError):
    """The adapter's files cannot be served faithfully; the message names keys and fields.

    These are a stranger's, so what a terminal would not print as it is does not stay in the message.
    """

    kind = "adapter_invalid"

    def __init__(self, message: str, *, param: str | None = None, retry_after: float | None = None) -> None:
        printable = "".join(letter if letter.isprintable() else "\ufffd" for letter in message)
        super().__init__(printable, param=param, retry_after=retry_after)


class AdapterBusy(ServeError):
    """What was asked of the adapter contradicts what is being done with it (evicting a pinned one, say)."""

    kind = "adapter_busy"


class TooLarge(ServeError):
    """An upload or body is over a configured cap."""

    kind = "too_large"


class Overloaded(ServeError):
    """The queue is full; nothing was queued."""

    kind = "overloaded"


class Unavailable(ServeError):
    """The engine is starting, restarting, draining or out of memory."""

    kind = "unavailable"


class StorageFull(ServeError):
    """The disk of the store is full; nothing half-written is left."""

    kind = "storage_full"


class EngineFault(ServeError):
    """This request failed inside the engine; others were not touched."""

    kind = "engine_fault"


class ModelUnsupported(ServeError):
    """The base model cannot be served right; raised at start only."""

    kind = "model_unsupported"


class Failure(msgspec.Struct, frozen=True):
    """A `ServeError` on the wire."""

    kind: str
    message: str
    param: str | None = None
    retry_after: float | None = None

    @classmethod
    def of(cls, error: BaseException) -> Failure:
        """Any exception as a failure; what is not a `ServeError` says only that the engine failed."""
        if isinstance(error, ServeError):
            return cls(error.kind, error.message, error.param, error.retry_after)
        return cls(EngineFault.kind, "the engine failed on this request")

    def error(self) -> ServeError:
        """The same error again, ready to be raised."""
        cls = _KINDS.get(self.kind, ServeError)
        return cls(self.message, param=self.param, retry_after=self.retry_after)


def _tree(cls: type[ServeError]) -> dict[str, type[ServeError]]:
    found = {cls.kind: cls}
    for sub in cls.__subclasses__():
        found |= _tree(sub)
    return found


_KINDS = _tree(ServeError)
