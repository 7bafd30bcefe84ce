"""The HTTP application over a started engine: routes, error shapes and limits put together.

What the routes do is in the rooms that they come from; here are only those that say how the server is.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response

from lora_serve.api import admin, error_responses
from lora_serve.api.auth import Authorized, Keys
from lora_serve.api.engine import Engine
from lora_serve.api.limits import BodyLimit
from lora_serve.api.openai import chat, completions, models, tokenize
from lora_serve.api.services import Injected, Services
from lora_serve.api.sse import ClientGone
from lora_serve.config import ServeConfig
from lora_serve.errors import Unavailable
from lora_serve.metrics import CONTENT_TYPE, Metrics

router = APIRouter(tags=["server"])


def create_app(engine: Engine, tokenizer: Any, config: ServeConfig, keys: Keys | None) -> FastAPI:
    """The application; `keys` None lets everybody do everything. With keys, the schema and its pages are not served."""
    app = FastAPI(
        title="lora-serve",
        version=version("lora-serve"),
        openapi_url=None if keys else "/openapi.json",
    )
    metrics = Metrics(lambda: engine.stats, lambda: engine.restarts)
    engine.observe(metrics.observe)
    app.state.services = Services(engine, tokenizer, config, keys, metrics, config.store_folder() / "staging")
    app.add_middleware(BodyLimit, most=config.max_body, streams=admin.is_upload)
    error_responses.install(app)
    app.add_exception_handler(ClientGone, nobody)
    for routes in (completions, chat, models, tokenize, admin):
        app.include_router(routes.router)
    app.include_router(router)
    return app


async def nobody(request: Request, error: Exception) -> Response:
    """What is said to a client that has gone: nothing, without a trace in the log."""
    return Response(status_code=499)


@router.get("/health")
async def health(services: Injected) -> dict[str, str]:
    """Whether the engine is alive: 200, or 503 when its heartbeat has stopped."""
    if not services.engine.alive:
        raise Unavailable("the engine does not answer")
    return {"status": "ok"}


@router.get("/ready")
async def ready(services: Injected) -> dict[str, str]:
    """Whether requests are taken: 200, or 503 while starting, restarting or draining."""
    if not services.engine.ready:
        raise Unavailable("the server takes no requests at the moment", retry_after=1.0)
    return {"status": "ready"}


@router.get("/metrics")
async def metrics(services: Injected, caller: Authorized) -> Response:
    """Metrics in Prometheus' text format."""
    return Response(services.metrics.render(), media_type=CONTENT_TYPE)
