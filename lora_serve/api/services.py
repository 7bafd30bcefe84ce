"""Dependencies of the routes, injected by FastAPI, and the interface of the engine that they use."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Protocol

from fastapi import Depends
from fastapi import Request as HttpRequest

from lora_serve.api.fine_tuning.file_store import FileStore
from lora_serve.api.fine_tuning.job_queue import JobQueue
from lora_serve.api.fine_tuning.trained_models import TrainedModels
from lora_serve.api.key_file import Keys
from lora_serve.api.openai.chat_format import ChatFormat
from lora_serve.api.openai.encode import TextEncoder
from lora_serve.api.openai.item_memory import ItemMemory
from lora_serve.api.quotas import Quotas
from lora_serve.api.settings_cache import SettingsCache
from lora_serve.api.source_fetches import SourceFetches
from lora_serve.api.usage import UsageRecords
from lora_serve.config import ServeConfig
from lora_serve.errors import Unavailable
from lora_serve.messages import EngineInfo, Operation, Stats, Update
from lora_serve.metrics import Metrics
from lora_serve.request import Event, Request


class EngineProtocol(Protocol):
    """Interface of the engine, as `engine.client.EngineClient` implements it. No method blocks the event loop."""

    @property
    def info(self) -> EngineInfo | None:
        """None until the engine was ready for the first time; kept during a restart."""

    @property
    def stats(self) -> Stats:
        """The latest engine statistics."""

    @property
    def alive(self) -> bool:
        """Whether the heartbeat is recent."""

    @property
    def ready(self) -> bool:
        """Whether requests are accepted: started, alive, not draining."""

    @property
    def restarts(self) -> int:
        """Number of engine restarts."""

    def generate(self, request: Request) -> AsyncGenerator[Event, None]:
        """Run one request: yields `Admitted`, `Tokens`… or `Embedded`, `Finished`; if refused, only `Finished`.

        Closing the generator aborts the request. Raises `Unavailable` if the engine accepts no requests.
        """

    async def call(self, operation: Operation) -> Any:
        """Run an admin operation and return `Reply.result`; raises the operation's `ServeError`."""

    def observe(self, observer: Callable[[Update], None]) -> None:
        """Register a callback for every `Update`."""


@dataclass(frozen=True)
class Services:
    """What the routes depend on.

    Attributes:
        tokenizer: the base's Hugging Face tokenizer.
        encoder: tokenizes texts of any length with it.
        chat: how the base writes messages; None if it has no chat template.
        keys: API keys; None allows every caller everything.
        quotas: of the keys.
        usage: tokens by key, adapter and day.
        files: training data, by key.
        jobs: fine-tuning jobs.
        trained: models that these made, by name.
        sources: what fetches adapters that are not published.
        items: output items that an input of `/v1/responses` may refer to.
        settings: what is known of adapters with settings.
    """

    engine: EngineProtocol
    tokenizer: Any
    encoder: TextEncoder
    chat: ChatFormat | None
    config: ServeConfig
    keys: Keys | None
    metrics: Metrics
    usage: UsageRecords
    files: FileStore
    jobs: JobQueue
    trained: TrainedModels
    sources: SourceFetches
    quotas: Quotas = field(default_factory=Quotas)
    items: ItemMemory = field(default_factory=ItemMemory)
    settings: SettingsCache = field(default_factory=SettingsCache)

    @property
    def staging(self) -> Path:
        """Folder for uploads, on the store's file system. Raises Unavailable while the engine starts."""
        return staging_of(self.engine)


def staging_of(engine: EngineProtocol) -> Path:
    """Folder for uploads, on the store's file system. Raises Unavailable while the engine starts."""
    if engine.info is None:
        raise Unavailable("the server is starting", retry_after=5)
    return Path(engine.info.store) / "staging"


def _services(request: HttpRequest) -> Services:
    services = request.app.state.services
    assert isinstance(services, Services)
    return services


ServicesDep = Annotated[Services, Depends(_services)]
