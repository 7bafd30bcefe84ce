"""The replica: a Ray actor with a server of its own as a child process. When one of the two ends, so does the other."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import msgspec
from ray import serve

from lora_serve.replicas.change_journal import ChangeJournal, journal_of
from lora_serve.replicas.changes import as_kept, change_kind
from lora_serve.replicas.forwarding import ForwardedRequest, ResponseBegin, ServerLost, WholeResponse
from lora_serve.replicas.journal_follower import JournalFollower
from lora_serve.replicas.server_child import ServerChild

STATISTICS_PERIOD = 0.5  # seconds between two looks at what is in memory
CATCH_UP_PERIOD = 1.0  # seconds between two looks into the journal of changes
SERVER_GONE = 3  # exit status of the actor when its server has ended

log = logging.getLogger("ray.serve")


class EngineReplica:
    """One server of the base and its adapters. Its methods are called by Ray and through the deployment's handle.

    Args:
        options: of `lora-serve serve`, named with underscores.
        journal: folder of the applications' journals.
    """

    async def __init__(self, options: dict[str, Any], journal: str) -> None:  # type: ignore[misc]  # Ray awaits it
        context = serve.get_replica_context()
        self._id = context.replica_id.unique_id
        self._server = ServerChild(self._id, options)
        self._journal = JournalFollower(
            self._id, ChangeJournal(journal_of(Path(journal), context.app_name)), self._server.ask
        )
        self._changing = asyncio.Lock()
        self._statistics: dict[str, Any] = {}
        try:
            await self._server.start()
            await self._catch_up()
            self._statistics = {"base": await self._base_names(), **await self._server.resident(), "ready": True}
        except BaseException:
            await self._server.stop()
            raise
        self._tasks = [
            asyncio.create_task(each) for each in (self._end_with_server(), self._follow_journal(), self._observe())
        ]

    # --- requests ----------------------------------------------------------------------------------------------------

    async def forward(self, request: ForwardedRequest) -> AsyncGenerator[ResponseBegin | ServerLost | bytes, None]:
        """The server's response to a request, as it comes."""
        async for part in self._server.send(request):
            yield part

    async def change(self, request: ForwardedRequest) -> WholeResponse | ServerLost:
        """Make a change that all replicas make, after those in the journal; returns the server's response."""
        kind = change_kind(request.method, request.path)
        async with self._changing:
            await self._journal.make_up()
            result = await self._server.fetch(request)
            if kind is not None and kind.kept and isinstance(result, WholeResponse) and result.begin.status < 400:
                thing, _, _ = as_kept(kind, request, result)
                self._journal.note(thing, request.change)
            return result

    # --- what Ray asks -----------------------------------------------------------------------------------------------

    def record_routing_stats(self) -> dict[str, Any]:
        """What the router is told: adapters by tier, names of the base, and whether requests are taken."""
        return self._statistics

    async def check_health(self) -> None:
        """Raise if the server has ended. An engine that is being restarted is the server's own affair."""
        if not self._server.running:
            raise RuntimeError("the server has ended")

    def __del__(self) -> None:
        self._server.abandon()

    # --- beside requests ---------------------------------------------------------------------------------------------

    async def _end_with_server(self) -> None:
        status = await self._server.wait()
        log.error("the server of replica %s ended with status %d, and so does the replica", self._id, status)
        logging.shutdown()
        os._exit(SERVER_GONE)  # Ray starts another one at once; what runs here can not be finished

    async def _observe(self) -> None:
        """Keep the statistics up to date. They are sent to all routers when they change, so they say no more."""
        while True:
            ready = await self._server.ask(ForwardedRequest("GET", "/ready"))
            takes_requests = isinstance(ready, WholeResponse) and ready.begin.status == 200
            self._statistics = self._statistics | await self._server.resident() | {"ready": takes_requests}
            await asyncio.sleep(STATISTICS_PERIOD)

    async def _base_names(self) -> list[str]:
        answer = await self._server.ask(ForwardedRequest("GET", "/v1/models"))
        if not isinstance(answer, WholeResponse) or answer.begin.status != 200:
            raise RuntimeError(f"the server does not list its models: {answer}")
        base = msgspec.json.decode(answer.body)["data"][0]
        return sorted({base["id"], base["root"]})

    # --- changes -----------------------------------------------------------------------------------------------------

    async def _follow_journal(self) -> None:
        while True:
            await asyncio.sleep(CATCH_UP_PERIOD)
            try:
                await self._catch_up()
            except Exception:  # a folder that cannot be read now, perhaps later
                log.exception("replica %s could not read the journal of changes", self._id)

    async def _catch_up(self) -> None:
        async with self._changing:
            await self._journal.make_up()
