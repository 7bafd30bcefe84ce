"""The ingress: one HTTP endpoint before the replicas.

A request goes to a replica that holds the adapter which its body names. What comes back is passed on as the server gave
it. Until a response has begun for the client, that is, until its whole body or the first event with content is there, a
request whose replica is lost or takes no requests goes to another one; afterwards a stream that breaks ends with an
error event. Changes go to all replicas (`replicas/changes.py`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle
from starlette.types import Receive, Scope, Send

from lora_serve.api.error_handlers import Forbidden
from lora_serve.api.sse import ClientDisconnected
from lora_serve.errors import EngineFault, Overloaded, ServeError, Unavailable
from lora_serve.ray.adapter_router import SEPARATOR
from lora_serve.replicas import changes, event_framing
from lora_serve.replicas.change_journal import ChangeJournal, not_kept
from lora_serve.replicas.changes import ChangeKind
from lora_serve.replicas.event_framing import EventFraming
from lora_serve.replicas.forwarding import (
    ForwardedRequest,
    ResponseBegin,
    ServerLost,
    WholeResponse,
    adapters_in,
)
from lora_serve.replicas.http_exchange import HttpExchange, accept_lifespan

TRIES = 5  # replicas that a request is given to
PAUSE = 0.1  # seconds before the next one, doubled each time
CHANGE_TIMEOUT = 900.0  # seconds for all replicas to make a change

log = logging.getLogger("ray.serve")


Parts = AsyncGenerator[ResponseBegin | ServerLost | bytes, None]
Rest = AsyncGenerator[ResponseBegin | ServerLost | bytes, None] | AsyncGenerator[ServerLost | list[bytes], None]


@dataclass
class BegunResponse:
    """A response of which enough is there to be passed on.

    Attributes:
        parts: the beginning of the body; whole events of a stream.
        rest: what follows; None if that is all.
        instead: whether another replica may do better.
    """

    begin: ResponseBegin
    parts: list[bytes]
    rest: Rest | None = None
    instead: bool = False


class Ingress:
    """ASGI application.

    Args:
        handle: of the replicas' deployment.
        journal: folder of the changes that all replicas make.
        keep_versions: versions of an adapter that a replica keeps.
        max_body: bytes of a body other than an adapter.
        max_upload: bytes of an adapter.
        start_timeout: seconds within which a response must begin.
    """

    def __init__(
        self,
        handle: DeploymentHandle,
        journal: Path,
        *,
        keep_versions: int,
        max_body: int,
        max_upload: int,
        start_timeout: float,
    ) -> None:
        self._handle = handle
        self._folder, self._keep_versions = journal, keep_versions
        self._max_body, self._max_upload = max_body, max_upload
        self._start_timeout = start_timeout
        self._changing = asyncio.Lock()
        self._changes: set[asyncio.Future[WholeResponse]] = set()  # so that they are not collected

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await accept_lifespan(receive, send)
            return
        if scope["type"] != "http":
            raise NotImplementedError("only HTTP is served")
        exchange = HttpExchange(scope, receive, send)
        try:
            await self._respond(exchange)
        except ClientDisconnected:
            return
        except ServeError as error:
            await exchange.refuse(error)
        except Exception:
            log.exception("a request failed in the ingress: %s %.200r", scope["method"], scope["path"])
            await exchange.refuse(EngineFault("the endpoint failed on this request"))

    async def _respond(self, exchange: HttpExchange) -> None:
        head = exchange.head
        kind = changes.change_kind(head.method, head.path)
        if kind is not None:
            refusal = await self._refusal_to_change(head)  # the body is not read yet, so the client is not watched
            if refusal is not None:
                await exchange.pass_on(refusal.begin, refusal.parts)
                return
        most = self._max_upload if kind is not None and kind.upload else self._max_body
        request = replace(head, body=await exchange.read_body(most))
        if kind is None:
            response = await exchange.while_connected(self._begin(request))
            await exchange.pass_on(response.begin, response.parts, response.rest)
            return
        # Not ended when the client leaves: some replicas would have made the change, and the journal not.
        changing = asyncio.ensure_future(self._change(kind, request))
        self._changes.add(changing)
        changing.add_done_callback(self._changes.discard)
        result = await asyncio.shield(changing)
        await exchange.pass_on(result.begin, [result.body])

    # --- one replica -------------------------------------------------------------------------------------------------

    async def _begin(self, request: ForwardedRequest) -> BegunResponse:
        """The response of the first replica that can serve a request; the last one's if none can.

        Raises: `Unavailable`, `Overloaded` if there is no response.
        """
        deadline = asyncio.get_running_loop().time() + self._start_timeout
        adapters = SEPARATOR.join(adapters_in(request.body)) if request.method == "POST" else ""
        handle = self._handle.options(stream=True, multiplexed_model_id=adapters, method_name="forward")
        last: BegunResponse | None = None
        for number in range(TRIES):
            if number:
                await asyncio.sleep(PAUSE * 2 ** (number - 1))
            try:
                async with asyncio.timeout_at(deadline):
                    result = await _first_parts(handle.remote(request))
            except TimeoutError:
                break
            if isinstance(result, ServerLost):
                log.warning("replica %s lost a request that had not begun: %s", result.replica or "?", result.reason)
                request = replace(request, avoid=(*request.avoid, result.replica))
            elif not result.instead:
                return result
            else:
                last = result
                request = replace(request, avoid=(*request.avoid, result.begin.replica))
        if last is not None:
            return last
        raise Unavailable("no replica could serve this request", retry_after=2)

    async def _refusal_to_change(self, head: ForwardedRequest) -> BegunResponse | None:
        """What a server says to a caller who may change nothing; None if the key may.

        Asked before the body is read and before the change waits its turn, so that who has no key delays nobody.
        """
        kept = tuple(pair for pair in head.headers if pair[0].lower() in ("authorization", "x-api-key", "origin"))
        answer = await self._begin(ForwardedRequest("GET", "/v1/key", kept))
        if answer.begin.status != 200:
            return answer
        if not msgspec.json.decode(b"".join(answer.parts))["admin"]:
            raise Forbidden("this needs an admin key")
        return None

    # --- all replicas ------------------------------------------------------------------------------------------------

    async def _change(self, kind: ChangeKind, request: ForwardedRequest) -> WholeResponse:
        """Make a change at all replicas, one change after the other, and keep it in the journal.

        Raises: `PartlyApplied`, `Unavailable`; `StorageFull`, `StoreUnusable` before anything is changed.
        """
        async with self._changing, _locked(self._folder, self._keep_versions) as journal:
            if not kind.kept:
                return changes.merge(request.method, await self._broadcast(request), kept=False)
            number = await asyncio.to_thread(journal.begin, request.body)
            try:
                results = await self._broadcast(replace(request, change=number))
                done = next(
                    (each for each in results if isinstance(each, WholeResponse) and each.begin.status < 400), None
                )
                if done is not None:
                    await asyncio.to_thread(journal.keep, number, *changes.as_kept(kind, request, done))
            finally:
                await asyncio.to_thread(journal.abandon, number)
            return changes.merge(request.method, results, kept=True)

    async def _broadcast(self, request: ForwardedRequest) -> list[Any]:
        """What each replica made of a change. Raises `Unavailable`."""
        try:
            results: list[Any] = await self._handle.broadcast("change", request).results_async(
                timeout_s=CHANGE_TIMEOUT, return_exceptions=True
            )
        except (RayError, RayServeException) as error:
            raise Unavailable("no replica could be reached", retry_after=5) from error
        except TimeoutError:
            raise Unavailable("not every replica has answered; send it again", retry_after=5) from None
        return results


@asynccontextmanager
async def _locked(folder: Path, keep_versions: int) -> AsyncGenerator[ChangeJournal, None]:
    """The journal in a folder, locked against other processes. Raises `StorageFull`, `StoreUnusable`."""
    try:
        journal = await asyncio.to_thread(ChangeJournal, folder, keep_versions)
        lock = journal.lock()
        await asyncio.to_thread(lock.__enter__)
    except OSError as error:
        raise not_kept(error) from error
    try:
        yield journal
    finally:
        lock.__exit__(None, None, None)


async def _first_parts(parts: Any) -> BegunResponse | ServerLost:
    """The beginning of a replica's response: all of it if it comes whole, a stream up to its first event with content.

    Args:
        parts: Ray's generator; cancelled unless it is part of the result.

    Raises: `Overloaded`.
    """
    stream = _without_failures(parts)
    kept = False
    try:
        begin = await anext(stream)
        if isinstance(begin, ServerLost):
            return begin
        assert isinstance(begin, ResponseBegin)
        if begin.comes_whole:
            collected: list[bytes] = []
            async for part in stream:
                if isinstance(part, ServerLost):
                    return part
                assert isinstance(part, bytes)
                collected.append(part)
            instead = event_framing.may_succeed_elsewhere(begin.status, b"".join(collected))
            return BegunResponse(begin, collected, instead=instead)
        if not begin.is_event_stream:
            kept = True
            return BegunResponse(begin, [], stream)
        events = _whole_events(stream)
        seen: list[bytes] = []
        async for some in events:
            if isinstance(some, ServerLost):
                return some
            seen += some
            content = next((event for event in some if not event_framing.is_prelude(event)), None)
            if content is not None:
                kept = True
                return BegunResponse(begin, seen, events, event_framing.event_may_succeed_elsewhere(content))
        return BegunResponse(begin, seen)
    finally:
        if not kept:
            await stream.aclose()


async def _without_failures(parts: Any) -> Parts:
    """What a replica sends; if it or Ray fails, `ServerLost` instead of an exception. Cancelled when it is closed.

    Raises: `Overloaded` if too many requests wait for a replica.
    """
    complete = False
    try:
        async for part in parts:
            yield part
        complete = True
    except BackPressureError as error:
        complete = True
        raise Overloaded("too many requests wait for a replica already", retry_after=1) from error
    except (RayError, RayServeException) as error:
        complete = True
        yield ServerLost("", f"the replica failed: {type(error).__name__}")
    finally:
        if not complete:
            parts.cancel()


async def _whole_events(stream: Parts) -> AsyncGenerator[ServerLost | list[bytes], None]:
    """The whole events of a stream as they come, some at a time."""
    framing = EventFraming()
    async with aclosing(stream):
        async for part in stream:
            if isinstance(part, ServerLost):
                yield part
                return
            assert isinstance(part, bytes)
            if events := framing.feed(part):
                yield events
