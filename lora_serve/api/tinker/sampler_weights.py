"""Weights of training runs as adapters, to be sampled from: published under a name that only their owner may use."""

from __future__ import annotations

import logging
from typing import NamedTuple

import msgspec

from lora_serve.api.private_adapters import private_adapter
from lora_serve.api.services import EngineProtocol
from lora_serve.api.tinker.resumable_run import ResumableRun
from lora_serve.errors import ServeError
from lora_serve.messages import AdapterInfo, DeleteAdapter
from lora_serve.training_messages import PublishRun

log = logging.getLogger(__name__)


class PublishedWeights(NamedTuple):
    """A published adapter: its name, and the digest of its content."""

    adapter: str
    digest: str


class SamplerWeights:
    """Publishes and deletes such adapters."""

    def __init__(self, engine: EngineProtocol) -> None:
        self._engine = engine

    async def publish(self, run: ResumableRun, owner: str, *, durable: bool) -> PublishedWeights:
        """Publish a run's weights as they are now; `durable`: so that they survive the end of the machine."""
        name = private_adapter(owner)
        info = msgspec.convert(await run.ask(PublishRun(run.name, name, durable)), AdapterInfo)
        return PublishedWeights(name, info.versions[0].digest)

    async def delete(self, adapter: str) -> None:
        """Delete an adapter, once nobody uses it; it does not matter if it is gone."""
        if adapter:
            try:
                await self._engine.call(DeleteAdapter(adapter))
            except ServeError as error:
                log.info("weights for sampling were not deleted: %s", error.message)
