"""Errors of Tinker's API: as responses to posts, and as results of accepted requests."""

from __future__ import annotations

from lora_serve.api.error_handlers import status
from lora_serve.errors import ServeError


class UnknownTinkerObject(ServeError):
    """A session, model, checkpoint or request that there is not, or that belongs to another key."""

    kind = "tinker_object_not_found"


class ResultGone(ServeError):
    """The result of a sample was lost; clients ask for it anew."""

    kind = "tinker_result_gone"
    quotes = False


class TooMuchWaits(ServeError):
    """So much of this key or model waits already that clients are to send it again later."""

    kind = "tinker_backpressure"
    quotes = False


def category(error: ServeError) -> str:
    """Whose mistake an error is, as clients call it."""
    return "server" if status(error) >= 500 or status(error) == 429 else "user"


def described(error: ServeError) -> str:
    """An error's message with the field at fault."""
    named = error.param is None or error.param in error.message
    return error.message if named else f"{error.param}: {error.message}"
