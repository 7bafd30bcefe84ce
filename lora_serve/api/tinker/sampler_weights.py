"""Weights of training runs as adapters, to be sampled from: published under a name that only their owner may use."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import msgspec

from lora_serve.api.private_adapters import private_adapter
from lora_serve.api.services import EngineProtocol
from lora_serve.api.tinker.resumable_run import ResumableRun
from lora_serve.api.upload import staging_folder
from lora_serve.errors import ServeError
from lora_serve.messages import AdapterInfo, DeleteAdapter, Publish
from lora_serve.training_messages import ExportRun

log = logging.getLogger(__name__)


class PublishedWeights(NamedTuple):
    """A published adapter: its name, and the digest of its content."""

    adapter: str
    digest: str


class SamplerWeights:
    """Publishes and deletes such adapters.

    Args:
        staging: returns a folder on the store's file system.
    """

    def __init__(self, engine: EngineProtocol, staging: Callable[[], Path]) -> None:
        self._engine, self._staging = engine, staging

    async def publish(self, run: ResumableRun, owner: str) -> PublishedWeights:
        """Publish a run's weights as they are now."""
        name = private_adapter(owner)
        async with staging_folder(self._staging()) as root:
            folder = root / "adapter"
            await run.ask(ExportRun(run.name, str(folder)))
            info = msgspec.convert(await self._engine.call(Publish(name, str(folder))), AdapterInfo)
        return PublishedWeights(name, info.versions[0].digest)

    async def delete(self, adapter: str) -> None:
        """Delete an adapter, once nobody uses it; it does not matter if it is gone."""
        if adapter:
            try:
                await self._engine.call(DeleteAdapter(adapter))
            except ServeError as error:
                log.info("weights for sampling were not deleted: %s", error.message)
