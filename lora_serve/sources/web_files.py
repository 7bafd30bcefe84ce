"""Adapters on a web server, which may send the request elsewhere, but not to an address that only this machine reaches.

Redirects are followed to public addresses and to the operator's own host and port; a redirect from https to http is
not followed, and credentials go to the operator's host alone. Addresses are checked when a connection is made, so that
a name whose address changes in between gains nothing.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any
from urllib.parse import urljoin

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from lora_serve.adapter_files import ADAPTER_FILES
from lora_serve.adapter_sources import AdapterLocation
from lora_serve.errors import Unavailable
from lora_serve.names import ARCHIVE, CONFIG
from lora_serve.sources.remote_files import BLOCK, CONNECT_SECONDS, READ_SECONDS, RemoteFile, read_options

MOST_REDIRECTS = 5
NOT_FOUND = (404, 410)
NO_URL = "it redirects to what is no URL"


class WebFiles:
    """An adapter whose files are at URLs below one, or an archive at a URL."""

    revision = ""

    def __init__(self, location: AdapterLocation) -> None:
        self._url = f"{location.scheme}://{location.place}"
        self._location = location
        self._headers: dict[str, str] = read_options(location.source).get("headers", {})

    def list(self) -> dict[str, RemoteFile]:
        """All files that there may be: a web server does not tell."""
        if self._location.is_archive:
            return {ARCHIVE: RemoteFile(self._url)}
        return {name: RemoteFile(f"{self._url}/{name}") for name in sorted(ADAPTER_FILES, key=lambda x: x != CONFIG)}

    @contextmanager
    def read(self, file: RemoteFile) -> Iterator[Iterator[bytes]]:
        with asyncio.Runner() as runner:
            blocks = _read(file.path, self._headers)
            try:
                yield iter(lambda: runner.run(_next(blocks)), b"")
            finally:
                runner.run(blocks.aclose())


async def _next(blocks: Any) -> bytes:
    return await anext(blocks, b"")


async def _read(url: str, headers: dict[str, str]) -> Any:
    async with _session(url) as session, _get(session, url, headers) as answer:
        async for block in answer.content.iter_chunked(BLOCK):
            yield block


@asynccontextmanager
async def _session(url: str) -> AsyncIterator[aiohttp.ClientSession]:
    addresses = _Addresses(url)
    connector = aiohttp.TCPConnector(resolver=addresses, socket_factory=addresses.make_socket, force_close=True)
    timeout = aiohttp.ClientTimeout(sock_connect=CONNECT_SECONDS, sock_read=READ_SECONDS)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout, auto_decompress=False) as session:
        try:
            yield session
        except aiohttp.ClientError:
            if addresses.refused:
                raise Unavailable("it leads to an address that is not public") from None
            raise


@asynccontextmanager
async def _get(
    session: aiohttp.ClientSession, url: str, headers: dict[str, str]
) -> AsyncIterator[aiohttp.ClientResponse]:
    """The answer, after redirects."""
    own = URL(url).origin()
    for _ in range(MOST_REDIRECTS + 1):
        sent = {"Accept-Encoding": "identity"} | (headers if URL(url).origin() == own else {})
        try:
            begun = await session.get(url, headers=sent, allow_redirects=False)
        except ValueError:  # aiohttp.InvalidURL, or a host that no name server can be asked for
            raise Unavailable(NO_URL) from None
        async with begun as answer:
            if answer.status in (301, 302, 303, 307, 308) and "Location" in answer.headers:
                url = _redirected(url, answer.headers["Location"])
                continue
            if answer.status in NOT_FOUND:
                raise FileNotFoundError(url)
            answer.raise_for_status()
            if answer.status != 200 or answer.headers.get("Content-Encoding", "identity") != "identity":
                raise Unavailable("its answer is not a plain file")
            yield answer
            return
    raise Unavailable(f"it redirects more than {MOST_REDIRECTS} times")


def _redirected(url: str, to: str) -> str:
    """Where a redirect leads. Raises Unavailable if it is not followed."""
    try:
        target = URL(urljoin(url, to))
        if not target.host and target.scheme in ("http", "https"):
            raise ValueError
    except ValueError:
        raise Unavailable(NO_URL) from None
    scheme = URL(url).scheme
    if target.scheme not in ("https", scheme):
        raise Unavailable(f"it leads from {scheme} to another scheme")
    return str(target)


class _Addresses(AbstractResolver):
    """The addresses that may be connected to: public ones, and those of the operator's host and port."""

    def __init__(self, url: str) -> None:
        own = URL(url)
        self._host, self._port = own.host, own.port
        self._own: set[tuple[str, int | None]] = {(str(own.host), own.port)}  # an address is not resolved
        self._resolver = aiohttp.ThreadedResolver()
        self.refused = False

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        found = await self._resolver.resolve(host, port, family)
        if (host, port) == (self._host, self._port):
            self._own |= {(each["host"], port) for each in found}
        return found

    async def close(self) -> None:
        await self._resolver.close()

    def make_socket(self, info: Any) -> socket.socket:
        """A socket for the address of `info`. Raises PermissionError if it may not be connected to."""
        family, kind, protocol, _, (host, port, *_) = info
        if (host, port) not in self._own and not is_public_address(host):
            self.refused = True
            raise PermissionError("this address is not public")
        made = socket.socket(family, kind, protocol)
        made.setblocking(False)
        return made


def is_public_address(host: str) -> bool:
    """Whether an IP address is one of the internet's, also where an IPv6 address only wraps an IPv4 one."""
    address = ipaddress.ip_address(host.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address):
        wrapped = address.ipv4_mapped or address.sixtofour
        if address.teredo is not None or address in ipaddress.ip_network("64:ff9b::/96"):
            return False
        address = wrapped or address
    return address.is_global and not address.is_multicast
