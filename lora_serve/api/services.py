"""What every route works with: one object, made with the app, handed to routes by FastAPI's dependency injection."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, Request

from lora_serve.api.auth import Keys
from lora_serve.api.engine import Engine
from lora_serve.config import ServeConfig
from lora_serve.metrics import Metrics


@dataclass(frozen=True)
class Services:
    """The parts of a running server.

    Attributes:
        tokenizer: the base's Hugging Face tokenizer.
        keys: who may do what; None lets everybody do everything.
        staging: folder on the store's file system where uploads are received.
    """

    engine: Engine
    tokenizer: Any
    config: ServeConfig
    keys: Keys | None
    metrics: Metrics
    staging: Path


def _services(request: Request) -> Services:
    services = request.app.state.services
    assert isinstance(services, Services)
    return services


Injected = Annotated[Services, Depends(_services)]
