"""The sampling sessions of a session: what is sampled from, on disk so that they outlive the server's process."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import msgspec

FILE = "samplers"  # a JSON object a line, in the session's folder
KEPT_EPHEMERAL = 8  # newest weights of a model that were saved for a sampling session alone

log = logging.getLogger(__name__)


class SamplingSession(msgspec.Struct, frozen=True):
    """What is sampled from.

    Attributes:
        path: of the checkpoint, if there is one.
        adapter, digest: its weights; empty for the base.
        model_id: the model whose weights these are, if they were saved for this session alone.
        freed: whether these are deleted.
    """

    id: str
    base_model: str
    path: str | None = None
    adapter: str = ""
    digest: str = ""
    model_id: str = ""
    freed: bool = False


class SamplingSessions:
    """The sampling sessions of one session. Methods write without waiting for the disk.

    Args:
        folder: the session's.
    """

    def __init__(self, folder: Path) -> None:
        self._file = folder / FILE
        self._found: dict[str, SamplingSession] = {}
        if self._file.exists():
            for line in self._file.read_bytes().splitlines():
                try:
                    sampler = msgspec.json.decode(line, type=SamplingSession)
                except msgspec.MsgspecError:  # a line that was cut off
                    continue
                self._found[sampler.id] = sampler

    def __iter__(self) -> Iterator[SamplingSession]:
        return iter(list(self._found.values()))

    def get(self, id_: str) -> SamplingSession | None:
        return self._found.get(id_)

    def add(self, sampler: SamplingSession) -> list[str]:
        """Add a sampling session, or change one; returns the adapters of older ones that are to be deleted."""
        self._put(sampler)
        if not sampler.model_id or sampler.freed:
            return []
        own = [each for each in self._found.values() if each.model_id == sampler.model_id and not each.freed]
        old = own[:-KEPT_EPHEMERAL]
        for each in old:
            self._put(msgspec.structs.replace(each, freed=True))
        return [each.adapter for each in old]

    @property
    def ephemeral(self) -> list[str]:
        """Adapters that were published for these sessions alone, and are not freed."""
        return [each.adapter for each in self._found.values() if each.model_id and not each.freed]

    def _put(self, sampler: SamplingSession) -> None:
        self._found[sampler.id] = sampler
        try:
            with self._file.open("ab", buffering=0) as file:
                file.write(msgspec.json.encode(sampler) + b"\n")
        except OSError as error:
            log.warning("a sampling session was not written down: %s", error.strerror)
