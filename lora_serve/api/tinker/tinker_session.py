"""A session of a client: its models and sampling sessions, with what is on disk of them."""

from __future__ import annotations

import asyncio
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from lora_serve.api.tinker.model_calls import ModelCalls
from lora_serve.api.tinker.model_journal import JOURNAL, ModelJournal
from lora_serve.api.tinker.sampling_sessions import SamplingSession, SamplingSessions
from lora_serve.api.tinker.tinker_errors import TooMuchWaits, UnknownTinkerObject
from lora_serve.api.tinker.tinker_model import TinkerModel, TinkerParts

RECORD = "session.json"
MOST_MODELS = 64  # of a session
MOST_SAMPLERS = 100_000


class SessionRecord(msgspec.Struct, frozen=True):
    """A session and whose it is; `created` in seconds since the epoch."""

    id: str
    owner: str
    created: float
    metadata: dict[str, Any] = {}


class TinkerSession:
    """One session.

    Args:
        folder: its own, with its record.

    Attributes:
        last_seen: when a client last asked for anything of it, on the monotonic clock.
    """

    def __init__(self, record: SessionRecord, folder: Path, parts: TinkerParts) -> None:
        self.record, self.folder, self.parts = record, folder, parts
        self.last_seen = time.monotonic()
        self.samplers = SamplingSessions(folder)
        self._models: dict[int, TinkerModel] = {}

    def __repr__(self) -> str:
        return f"<TinkerSession {self.id}: {len(self._models)} models>"

    @classmethod
    def create(cls, record: SessionRecord, folder: Path, parts: TinkerParts) -> TinkerSession:
        """A new session, in a new folder. Raises OSError."""
        folder.mkdir(parents=True)
        (folder / RECORD).write_bytes(msgspec.json.encode(record))
        return cls(record, folder, parts)

    @classmethod
    def read(cls, folder: Path, parts: TinkerParts) -> TinkerSession:
        """A session that was there before the server started. Raises OSError, msgspec.MsgspecError."""
        return cls(msgspec.json.decode((folder / RECORD).read_bytes(), type=SessionRecord), folder, parts)

    def resume(self) -> None:
        """Go on with the models that the session had. Raises OSError."""
        for journal in sorted(self.folder.glob(f"models/*/{JOURNAL}")):
            self._open(int(journal.parent.name), resume=True)

    @property
    def id(self) -> str:
        return self.record.id

    @property
    def models(self) -> list[TinkerModel]:
        return list(self._models.values())

    def model_id(self, number: int) -> str:
        """The id of a model, which clients make in the same way."""
        return f"{self.id}:train:{number}"

    def sampler_id(self, number: int) -> str:
        """The id of a sampling session."""
        return f"{self.id}:sample:{number}"

    def new_model(self, number: int) -> TinkerModel:
        """The model of this number, which is begun if there is none."""
        if number not in self._models:
            if len(self._models) >= MOST_MODELS:
                raise TooMuchWaits(f"a session has at most {MOST_MODELS} models", retry_after=5)
            self._open(number, resume=False)
        return self._models[number]

    def find_model(self, number: int) -> TinkerModel:
        """Raises UnknownTinkerObject."""
        if number not in self._models:
            raise UnknownTinkerObject(f"there is no model {self.model_id(number)}", param="model_id")
        return self._models[number]

    def add_sampler(self, sampler: SamplingSession) -> SamplingSession:
        """The sampling session of this id, which is added if there is none."""
        known = self.samplers.get(sampler.id)
        if known is None:
            if sum(1 for _ in self.samplers) >= MOST_SAMPLERS:
                raise TooMuchWaits(f"a session has at most {MOST_SAMPLERS} sampling sessions", retry_after=60)
            self.samplers.add(sampler)
        return known or sampler

    async def stop(self) -> None:
        """Carry out no more calls."""
        await asyncio.gather(*(model.stop() for model in self.models))

    async def close(self) -> None:
        """End the session: its models, and weights that were saved for its sampling sessions alone."""
        for model in self.models:
            await model.close()
        self.parts.futures.forget(f"{self.id}:")
        for adapter in self.samplers.ephemeral:
            await self.parts.weights.delete(adapter)
        await asyncio.to_thread(self._remove)

    def _open(self, number: int, *, resume: bool) -> None:
        journal = ModelJournal(self.folder / "models" / str(number))
        model = TinkerModel(self.model_id(number), self.record.owner, self.parts, journal)
        if resume:
            model.resume()
        model.start(ModelCalls(model, self.samplers, self.sampler_id).carry)
        self._models[number] = model

    def _remove(self) -> None:
        with suppress(OSError):
            (self.folder / RECORD).unlink()  # first: a folder without a record is no session
        shutil.rmtree(self.folder, ignore_errors=True)
