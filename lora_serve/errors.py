"""Exceptions of the server, as one tree.

`api/error_handlers.py` maps each kind to an HTTP status. Between processes an error is sent as a `Failure` and raised
again as the same kind. Messages are for the sender of the request: they name the field at fault and contain no memory
addresses, server paths or prompt text.
"""

from __future__ import annotations

import errno
from typing import ClassVar

import msgspec


class ServeError(Exception):
    """Base class of all errors.

    Args:
        message: one or two sentences for the client.
        param: the request field at fault, as spelled in the request.
        retry_after: seconds until a retry makes sense.
    """

    kind: ClassVar[str] = "server_error"
    quotes: ClassVar[bool] = True  # messages may quote a request, an upload or a name in them

    def __init__(self, message: str, *, param: str | None = None, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after = retry_after

    @property
    def reason(self) -> str | None:
        """Why, for logs, in words that no client chose: the message, or the outermost field where it may quote one."""
        if not self.quotes:
            return self.message
        return None if self.param is None else self.param.partition(".")[0].partition("[")[0]


class BadRequest(ServeError):
    """The request is invalid as written."""

    kind = "bad_request"


class ContextExceeded(BadRequest):
    """Prompt and requested output exceed the model's context length."""

    kind = "context_length_exceeded"
    quotes = False


class AdapterNotFound(ServeError):
    """The adapter or its version does not exist, or the caller may not use it."""

    kind = "adapter_not_found"


class AdapterExists(ServeError):
    """The name is taken, and a new version was not asked for."""

    kind = "adapter_exists"


class AdapterInvalid(ServeError):
    """The adapter's files are invalid or unsupported; the message names keys and fields.

    Those come from untrusted files, so unprintable characters are replaced.
    """

    kind = "adapter_invalid"

    def __init__(self, message: str, *, param: str | None = None, retry_after: float | None = None) -> None:
        printable = "".join(letter if letter.isprintable() else "\ufffd" for letter in message)
        super().__init__(printable, param=param, retry_after=retry_after)


class AdapterBusy(ServeError):
    """The operation conflicts with the state of the adapter (evicting a pinned one, for example)."""

    kind = "adapter_busy"


class AdapterBroken(ServeError):
    """The adapter is damaged in the store; the others are served, and publishing it again repairs it."""

    kind = "adapter_broken"


class RunNotFound(ServeError):
    """There is no training run of this name; after a restart of the engine there is none at all."""

    kind = "run_not_found"


class RunExists(ServeError):
    """There is a training run of this name already."""

    kind = "run_exists"


class PreconditionFailed(ServeError):
    """What was to be changed is not, or no more, what the request's If-Match or If-None-Match says."""

    kind = "precondition_failed"
    quotes = False


class TooLarge(ServeError):
    """An upload or body exceeds a configured limit."""

    kind = "too_large"
    quotes = False


class Overloaded(ServeError):
    """The queue is full; the request was not queued."""

    kind = "overloaded"
    quotes = False


class Unavailable(ServeError):
    """The engine is starting, restarting, draining or out of memory."""

    kind = "unavailable"
    quotes = False


class SettingsNotApplied(Unavailable):
    """A version has settings by which the request was not made: it was published meanwhile. Asking again helps."""

    kind = "settings_not_applied"


class PartlyApplied(ServeError):
    """A change was made at some replicas and not at others."""

    kind = "partly_applied"


class StorageFull(ServeError):
    """The disk of the store is full; partial files have been removed."""

    kind = "storage_full"
    quotes = False
    errnos: ClassVar = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # of an `OSError` that means this


class StoreUnusable(ServeError):
    """The store's folder is not a store, is for another base, or cannot be written. Names the folder at start only."""

    kind = "store_unusable"
    quotes = False


class EngineFault(ServeError):
    """This request failed inside the engine; others are not affected."""

    kind = "engine_fault"
    quotes = False


class ModelUnsupported(ServeError):
    """The base model cannot be served correctly; raised at start only."""

    kind = "model_unsupported"


class Failure(msgspec.Struct, frozen=True):
    """Wire form of a `ServeError`."""

    kind: str
    message: str
    param: str | None = None
    retry_after: float | None = None

    @classmethod
    def of(cls, error: BaseException) -> Failure:
        """Convert any exception; other than a `ServeError`, it only says that the engine failed."""
        if isinstance(error, ServeError):
            return cls(error.kind, error.message, error.param, error.retry_after)
        return cls(EngineFault.kind, "the engine failed on this request")

    def error(self) -> ServeError:
        """The exception to raise."""
        cls = _KINDS.get(self.kind, ServeError)
        return cls(self.message, param=self.param, retry_after=self.retry_after)


def _by_kind(cls: type[ServeError]) -> dict[str, type[ServeError]]:
    found = {cls.kind: cls}
    for sub in cls.__subclasses__():
        found |= _by_kind(sub)
    return found


_KINDS = _by_kind(ServeError)
