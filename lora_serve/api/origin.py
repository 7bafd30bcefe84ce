"""Protection of a local server without keys from web pages.

Any page that is open in a browser on this machine can send requests to a loopback address, also, by DNS rebinding,
under a host name of its own. Browsers tell by `Origin` and `Host` where a request comes from; programs
send no `Origin`.
"""

from __future__ import annotations

from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from lora_serve.api import error_handlers
from lora_serve.config import is_public


class LocalOrigin:
    """ASGI middleware: 403 for requests whose `Host` or `Origin` is of another host.

    Args:
        host: the address that the server listens on; allowed beside localhost and the loopback addresses.
        allow_origin: origins that are allowed too.
    """

    def __init__(self, app: ASGIApp, host: str, allow_origin: Collection[str]) -> None:
        self._app = app
        self._host = host.lower()
        self._allow_origin = allow_origin

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (foreign := self._foreign(Headers(scope=scope))):
            error = error_handlers.Forbidden(
                f"a web page may not use this server: foreign {foreign}; --allow-origin lists the origins that may"
            )
            await error_handlers.response(error, scope)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _foreign(self, headers: Headers) -> str | None:
        """Name of the header that names a foreign host."""
        if not all(self._is_local(_host_name(f"//{host}")) for host in headers.getlist("host")):
            return "Host"
        for origin in headers.getlist("origin"):
            local = origin.startswith(("http://", "https://")) and self._is_local(_host_name(origin))
            if not local and origin not in self._allow_origin:
                return "Origin"
        return None

    def _is_local(self, host: str) -> bool:
        return host == self._host or not is_public(host)


def _host_name(url: str) -> str:
    """The host of a URL in lower case; empty if there is none."""
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""
