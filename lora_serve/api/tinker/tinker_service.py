"""The state behind Tinker's API: sessions of all keys, checkpoints and results, and what becomes of silent sessions."""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import shutil
import time
from pathlib import Path
from typing import Annotated, Any

import msgspec
from fastapi import Depends, Request

from lora_serve.api.openai.preprocess import base_names
from lora_serve.api.services import Services
from lora_serve.api.tinker.checkpoint_store import TinkerCheckpoints
from lora_serve.api.tinker.future_results import FutureResult, FutureResults
from lora_serve.api.tinker.ordered_calls import HeldBytes
from lora_serve.api.tinker.sample_runs import SampleRuns
from lora_serve.api.tinker.sampler_weights import SamplerWeights
from lora_serve.api.tinker.sampling_sessions import SamplingSession
from lora_serve.api.tinker.tinker_errors import ResultGone, TooMuchWaits, UnknownTinkerObject
from lora_serve.api.tinker.tinker_leftovers import NeedlessAdapters, old_session_folders
from lora_serve.api.tinker.tinker_model import TinkerModel, TinkerParts
from lora_serve.api.tinker.tinker_session import SessionRecord, TinkerSession
from lora_serve.errors import BadRequest, EngineFault, ServeError, StoreUnusable, Unavailable

FOLDER = "tinker"  # in the adapter store's folder
SILENT_SECONDS = 600.0  # after which a session whose client sent nothing is ended; clients send a heartbeat every 10 s
SWEEP_SECONDS = 30.0
MOST_SESSIONS = 256  # of one key
MOST_SAMPLERS = 100_000  # sampling sessions of one key
_SESSION = re.compile(r"[0-9a-f]{32}")
_PART = re.compile(r"([0-9a-f]{32}):(train|sample):(\d{1,18})")

log = logging.getLogger(__name__)


class TinkerService:
    """All that Tinker's API knows.

    Args:
        silent_seconds: see `SILENT_SECONDS`.
    """

    def __init__(self, services: Services, silent_seconds: float = SILENT_SECONDS) -> None:
        self.services = services
        self.futures = FutureResults()
        self.samples = SampleRuns(services, self.futures)
        self.checkpoints = TinkerCheckpoints(self._root)
        self.weights = SamplerWeights(services.engine)
        self._parts = TinkerParts(
            services.engine, self.futures, self.checkpoints, self.weights, self.check_base_model, HeldBytes()
        )
        self._silent_seconds = silent_seconds
        self._needless = NeedlessAdapters(services.engine, silent_seconds)
        self._sessions: dict[str, TinkerSession] = {}
        self._started = time.monotonic()
        self._sweeper: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"<TinkerService {len(self._sessions)} sessions, {self.futures!r}>"

    # --- lifecycle -----------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Begin to end silent sessions."""
        self._sweeper = asyncio.create_task(self._sweep())

    async def close(self) -> None:
        """Stop; what sessions have on disk goes on when the server starts again."""
        if self._sweeper is not None:
            self._sweeper.cancel()
            await asyncio.gather(self._sweeper, return_exceptions=True)
        await self.samples.close()
        await asyncio.gather(*(session.stop() for session in self._sessions.values()))

    # --- what there is -------------------------------------------------------------------------------------------

    def check_base_model(self, name: str) -> str:
        """Return what a client calls the base: its name, or anything before a colon and its name. Raises BadRequest."""
        known = base_names(self.services)
        if name not in known and name.rpartition(":")[2] not in known:
            base = self.services.config.served_name()
            raise BadRequest(f"the base model here is {base}; {name[:100]} is not served", param="base_model")
        return name

    def check_training(self) -> None:
        """Raise BadRequest if this server does not train."""
        info = self.services.engine.info
        if info is not None and not info.training_memory:
            raise BadRequest("this server does not train: it was started without --training-memory")

    async def new_session(self, owner: str, metadata: dict[str, Any] | None) -> TinkerSession:
        """Begin a session."""
        if sum(session.record.owner == owner for session in self._sessions.values()) >= MOST_SESSIONS:
            raise TooMuchWaits(f"this key has {MOST_SESSIONS} sessions already", retry_after=30)
        record = SessionRecord(secrets.token_hex(16), owner, time.time(), metadata or {})
        try:
            session = await asyncio.to_thread(TinkerSession.create, record, self._folder(record.id), self._parts)
        except OSError as error:
            raise StoreUnusable(f"a session cannot be begun at the moment: {error.strerror}") from error
        self._sessions[session.id] = session
        return session

    async def session(self, id_: str, owner: str) -> TinkerSession:
        """A key's session, also one that was there before the server started. Raises UnknownTinkerObject."""
        session = self._sessions.get(id_)
        if session is None and _SESSION.fullmatch(id_):
            session = self._resume(id_, owner)
        if session is None or session.record.owner != owner:
            raise UnknownTinkerObject(
                f"there is no session {id_[:100]}; one that is silent for {self._silent_seconds:g} s ends: "
                "go on from the last checkpoint in a new one",
                param="session_id",
            )
        session.last_seen = time.monotonic()
        return session

    def check_more_samplers(self, owner: str) -> None:
        """Raise TooMuchWaits if a key may begin no more sampling sessions."""
        if sum(len(session.samplers) for session in self.sessions(owner)) >= MOST_SAMPLERS:
            raise TooMuchWaits(f"this key has {MOST_SAMPLERS:,} sampling sessions; end a session", retry_after=60)

    async def finish(self, id_: str, owner: str) -> None:
        """End a session. Raises UnknownTinkerObject."""
        session = await self.session(id_, owner)
        if self._sessions.pop(id_, None) is not None:
            await session.close()

    def sessions(self, owner: str) -> list[TinkerSession]:
        """A key's sessions."""
        return [session for session in self._sessions.values() if session.record.owner == owner]

    async def model(self, id_: str, owner: str) -> TinkerModel:
        """Raises UnknownTinkerObject."""
        found = _PART.fullmatch(id_)
        if found is None or found[2] != "train":
            raise UnknownTinkerObject(f"there is no model {id_[:100]}", param="model_id")
        return (await self.session(found[1], owner)).find_model(int(found[3]))

    async def sampler(self, id_: str, owner: str) -> SamplingSession:
        """Raises UnknownTinkerObject; BadRequest if its weights were freed."""
        found = _PART.fullmatch(id_)
        session = None if found is None else await self.session(found[1], owner)
        sampler = None if session is None else session.samplers.get(id_)
        if sampler is None:
            raise UnknownTinkerObject(f"there is no sampling session {id_[:100]}", param="sampling_session_id")
        if sampler.freed:
            raise BadRequest(
                "the weights of this sampling session were freed, as newer ones of its model were saved: "
                "sample from those, or save weights under a name",
                param="sampling_session_id",
            )
        return sampler

    async def result(self, id_: str, owner: str, seconds: float) -> FutureResult | None:
        """The result of a request once it is there, or None. Raises UnknownTinkerObject, ResultGone."""
        found = _PART.match(id_)
        if found is None:
            raise UnknownTinkerObject(f"there is no request {id_[:100]}", param="request_id")
        session = await self.session(found[1], owner)  # which may go on only now, after a restart
        try:
            result = await self.futures.wait(id_, owner, seconds)
        except KeyError:
            if found[2] == "sample":
                raise ResultGone("the sample was lost; ask again") from None
            session.find_model(int(found[3]))
            return FutureResult.failed(EngineFault("the result of this call was lost"))
        session.last_seen = time.monotonic()
        return result

    # --- disk, and the end of sessions ---------------------------------------------------------------------------

    def _root(self) -> Path | None:
        info = self.services.engine.info
        return Path(info.store) / FOLDER if info is not None and info.store else None

    def _folder(self, id_: str = "") -> Path:
        root = self._root()
        if root is None:
            raise Unavailable("the server is starting", retry_after=5)
        return root / "sessions" / id_

    def _resume(self, id_: str, owner: str) -> TinkerSession | None:
        """Not in a thread, so that no session is resumed twice."""
        try:
            session = TinkerSession.read(self._folder(id_), self._parts)
            if session.record.owner == owner:
                session.resume()
        except (OSError, msgspec.MsgspecError):
            return None
        if session.record.owner != owner:
            return None
        self._sessions[id_] = session
        log.info("session %s goes on: %r", id_, session)
        return session

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(min(SWEEP_SECONDS, self._silent_seconds / 2))
            for step in (
                self._end_silent,
                self._remove_left,
                self._remove_expired,
                self._forget_deleted,
                self._remove_needless,
            ):
                try:
                    await step()
                except (ServeError, OSError) as error:
                    log.warning("sessions of Tinker's API: %s", error)

    async def _end_silent(self) -> None:
        before = time.monotonic() - self._silent_seconds
        for session in list(self._sessions.values()):
            if session.last_seen < before:
                log.info("session %s is ended: its client was silent", session.id)
                del self._sessions[session.id]
                await session.close()

    async def _remove_left(self) -> None:
        """Remove sessions of before the server started that nobody went on with, and folders that are none any more."""
        if time.monotonic() - self._started < self._silent_seconds:
            return
        for path in await asyncio.to_thread(old_session_folders, self._folder(), self._silent_seconds):
            if path.name in self._sessions:
                continue
            try:
                await TinkerSession.read(path, self._parts).close()
            except (OSError, msgspec.MsgspecError):
                await asyncio.to_thread(shutil.rmtree, path, ignore_errors=True)

    async def _remove_expired(self) -> None:
        for checkpoint in await asyncio.to_thread(self.checkpoints.expired):
            await asyncio.to_thread(self.checkpoints.delete, checkpoint)
            await self.weights.delete(checkpoint.adapter)

    async def _forget_deleted(self) -> None:
        def session_lives(model_id: str) -> bool:
            return self._folder(model_id.partition(":")[0]).exists()

        await asyncio.to_thread(self.checkpoints.forget_deleted, session_lives)

    async def _remove_needless(self) -> None:
        """Remove sampling weights whose deletion failed, or whose server was killed before it had noted them."""
        if time.monotonic() - self._started < self._silent_seconds:
            return
        await asyncio.to_thread(self.checkpoints.adapters)  # opens them
        for adapter in await self._needless.find(self._needed_adapters):
            log.info("weights for sampling that nothing names are deleted: %s", adapter)
            await self.weights.delete(adapter)

    def _needed_adapters(self) -> set[str]:
        return self.checkpoints.adapters().union(*(each.samplers.adapters for each in self._sessions.values()))


def _service(request: Request) -> TinkerService:
    service = request.app.state.tinker
    assert isinstance(service, TinkerService)
    return service


TinkerDep = Annotated[TinkerService, Depends(_service)]
