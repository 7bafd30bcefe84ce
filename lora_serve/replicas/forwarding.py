"""What passes between an endpoint and the replicas behind it: requests, the beginnings and bodies of responses."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

import msgspec

Headers = tuple[tuple[str, str], ...]

MOST_COLLECTED = 8 << 20  # bytes of a response that is collected before any of it is passed on

# Of one connection (RFC 9110), of the endpoint's own server, or told anew.
DROPPED = {
    *("connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection", "te", "trailer"),
    *("transfer-encoding", "upgrade", "host", "date", "server", "expect"),
}


@dataclass(frozen=True)
class ForwardedRequest:
    """An HTTP request on its way to a replica.

    Attributes:
        target: path and query.
        avoid: replicas that it should not go to again.
        change: number in the journal of the change that it makes, if it is one that is kept there.
    """

    method: str
    target: str
    headers: Headers = ()
    body: bytes = field(default=b"", repr=False)
    avoid: tuple[str, ...] = ()
    change: int = 0

    @property
    def path(self) -> str:
        """The target without its query."""
        return self.target.partition("?")[0]


@dataclass(frozen=True)
class ResponseBegin:
    """A replica's server has begun to respond; chunks of the body follow."""

    replica: str
    status: int
    headers: Headers

    def header(self, name: str) -> str:
        """The value of a header, by its name in lower case; empty if there is none."""
        return next((value for key, value in self.headers if key.lower() == name), "")

    @property
    def comes_whole(self) -> bool:
        """Whether the body is collected before any of it is passed on."""
        length = self.header("content-length")
        return length.isdigit() and int(length) <= MOST_COLLECTED

    @property
    def is_event_stream(self) -> bool:
        return self.header("content-type").startswith("text/event-stream")


@dataclass(frozen=True)
class ServerLost:
    """The connection to a replica's server broke before the response was complete."""

    replica: str
    reason: str


@dataclass(frozen=True)
class WholeResponse:
    """A response with its whole body."""

    begin: ResponseBegin
    body: bytes = field(repr=False)


def passed_on(headers: Iterable[tuple[str, str]]) -> Headers:
    """The headers that are about the message, not about a connection. What `Connection` names is dropped too."""
    headers = list(headers)
    named = {
        part.strip().lower() for name, value in headers if name.lower() == "connection" for part in value.split(",")
    }
    return tuple((name, value) for name, value in headers if name.lower() not in DROPPED | named)


class _Selection(msgspec.Struct):
    """What a body says of adapters; everything else in it is passed over."""

    model: Any = None
    adapter: Any = None


_decode = msgspec.json.Decoder(_Selection).decode


def adapters_in(body: bytes) -> tuple[str, ...]:
    """Names in the fields `adapter` and `model` of a body, without versions; none if it is nothing of that kind.

    What is wrong with a body is for the server to say. A `model` may be the base: see `without_base`.
    """
    try:
        found = _decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return ()
    given = found.adapter if isinstance(found.adapter, list) else [found.adapter]
    names = [each.get("name") if isinstance(each, dict) else each for each in given]
    if found.adapter is None:
        names = [found.model]
    return tuple(sorted({name.partition("@")[0] for name in names if isinstance(name, str) and name}))


def without_base(names: Iterable[str], base_names: Collection[str]) -> tuple[str, ...]:
    """Adapters among the names of a request: not the base, nor `base:` before an adapter."""
    found = []
    for name in names:
        prefix = next((f"{base}:" for base in base_names if name.startswith(f"{base}:")), "")
        if name not in base_names:
            found.append(name.removeprefix(prefix))
    return tuple(found)
