"""The FastAPI application: all routes, error handlers, body limit, and the health, readiness and metrics routes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.responses import PlainTextResponse
from starlette.middleware.cors import CORSMiddleware

from lora_serve.adapter_sources import parse_sources
from lora_serve.api import admin, alias_routes, download, error_handlers, key_routes, lora_routes, page, usage_routes
from lora_serve.api.access_log import AccessLog
from lora_serve.api.anthropic import messages_api
from lora_serve.api.auth import Authorized, MetricsReader
from lora_serve.api.caller import EVERYBODY
from lora_serve.api.content_encoding import ContentEncoding
from lora_serve.api.error_responses import ErrorResponses
from lora_serve.api.fine_tuning import file_routes, job_routes
from lora_serve.api.fine_tuning.file_store import FileStore
from lora_serve.api.fine_tuning.job_queue import JobQueue
from lora_serve.api.fine_tuning.job_results import JobResults
from lora_serve.api.fine_tuning.job_store import JobStore
from lora_serve.api.fine_tuning.trained_models import TrainedModels
from lora_serve.api.key_file import Keys
from lora_serve.api.limits import BodyLimit, RequireKey
from lora_serve.api.methods import HeadRequests
from lora_serve.api.openai import chat, completions, embeddings, models, responses, tokenize
from lora_serve.api.openai.chat_format import ChatFormat
from lora_serve.api.openai.encode import TextEncoder
from lora_serve.api.openapi import DocumentedAPI
from lora_serve.api.origin import LocalOrigin
from lora_serve.api.request_id import RequestId
from lora_serve.api.services import EngineProtocol, Services, ServicesDep, staging_of
from lora_serve.api.source_fetches import SourceFetches
from lora_serve.api.sse import ClientDisconnected
from lora_serve.api.tinker import (
    tinker_checkpoints_api,
    tinker_sampling_api,
    tinker_sessions_api,
    tinker_training_api,
)
from lora_serve.api.tinker.tinker_service import TinkerService
from lora_serve.api.traces import RequestTraces
from lora_serve.api.usage import UsageRecords
from lora_serve.config import ServeConfig, is_public
from lora_serve.errors import Unavailable
from lora_serve.job_metrics import JobCollector
from lora_serve.metrics import CONTENT_TYPE, Metrics
from lora_serve.sources.fetcher import Fetcher
from lora_serve.sources.totals import SourceTotals

OPEN_PATHS = ("/health", "/ready")  # without a key
RATE_HEADERS = [f"x-ratelimit-{part}-{of}" for part in ("limit", "remaining", "reset") for of in ("requests", "tokens")]
USAGE_FILE, FILES, JOBS = "usage.sqlite", "files", "fine-tuning-jobs"  # in the adapter store's folder
# Asked for every few seconds; so are files of the page.
QUIET_PATHS = (
    *OPEN_PATHS,
    "/metrics",
    "/api/v1/retrieve_future",
    "/api/v1/session_heartbeat",
    "/api/v1/telemetry",
)

router = APIRouter(tags=["server"])


def create_app(
    engine: EngineProtocol,
    tokenizer: Any,
    config: ServeConfig,
    keys: Keys | None,
    traces: RequestTraces | None = None,
) -> FastAPI:
    """Build the application.

    Args:
        keys: API keys; None allows every caller everything.
        traces: makes spans of requests; None makes none.
    """
    app = DocumentedAPI(
        title="lora-serve",
        version=version("lora-serve"),
        docs_url=None,  # FastAPI's pages need files of other hosts; see `page.py`
        redoc_url=None,
        keys=keys is not None,
        strict_content_type=False,  # a body without a Content-Type is taken for JSON
    )
    totals = SourceTotals()

    def in_store(name: str) -> Path | None:
        return Path(info.store) / name if (info := engine.info) and info.store else None

    stored = JobStore(lambda: in_store(JOBS))
    metrics = Metrics(
        lambda: engine.stats,
        lambda: engine.restarts,
        totals,
        JobCollector(stored.count_by_status, lambda: jobs.running),
        block_size=config.kv_block_size,
    )
    engine.observe(metrics.observe)
    encoder = TextEncoder(tokenizer)
    usage = UsageRecords(lambda: in_store(USAGE_FILE))
    files = FileStore(lambda: in_store(FILES), quota=config.max_files_size)
    results = JobResults(stored, engine, files, lambda: staging_of(engine))
    jobs = JobQueue(stored, engine, tokenizer, results, config.training_jobs)
    sources = make_source_fetches(config, engine, totals)
    services = Services(
        engine,
        tokenizer,
        encoder,
        ChatFormat.of(tokenizer),
        config,
        keys,
        metrics,
        usage,
        files,
        jobs,
        TrainedModels(stored, engine, results),
        sources,
    )
    app.state.services = services
    tinker = app.state.tinker = TinkerService(services)
    owners = {EVERYBODY.owner} if keys is None else keys.owners
    starts: list[Callable[[], Any]] = [partial(files.open_at_start, owners), sources.start, jobs.start, tinker.start]
    for start in starts:
        app.router.add_event_handler("startup", start)
    for close in (jobs.close, tinker.close, sources.close, usage.close, files.close):
        app.router.add_event_handler("shutdown", close)
    if traces is not None:
        app.router.add_event_handler("shutdown", traces.close)
    # Each of these is around those before it.
    app.add_middleware(BodyLimit, most=config.max_body, is_upload=is_upload)
    app.add_middleware(ContentEncoding)
    app.add_middleware(RequireKey, open_paths={*OPEN_PATHS, *page.bundle()})
    app.add_middleware(ErrorResponses)
    app.add_middleware(HeadRequests)
    if config.allow_origin:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=config.allow_origin,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["X-Request-Id", "Retry-After", "ETag", *RATE_HEADERS],
        )
    if keys is None and not is_public(config.host):
        app.add_middleware(LocalOrigin, host=config.host, allow_origin=config.allow_origin)
    app.add_middleware(
        AccessLog, metrics=metrics, usage=usage, quiet_paths={*QUIET_PATHS, *page.bundle()}, traces=traces
    )
    app.add_middleware(RequestId)
    error_handlers.install(app)
    app.add_exception_handler(ClientDisconnected, client_disconnected)
    for routes in (
        completions,
        chat,
        responses,
        messages_api,
        embeddings,
        models,
        tokenize,
        admin,
        alias_routes,
        download,
        lora_routes,
        file_routes,
        job_routes,
        tinker_sessions_api,
        tinker_training_api,
        tinker_sampling_api,
        tinker_checkpoints_api,
        usage_routes,
        key_routes,
        page,
    ):
        app.include_router(routes.router)
    app.include_router(tinker_sessions_api.unread)
    app.include_router(router)
    return app


def is_upload(method: str, path: str) -> bool:
    """Whether a request body is streamed to disk."""
    return admin.is_upload(method, path) or file_routes.is_file_upload(method, path)


def make_source_fetches(config: ServeConfig, engine: EngineProtocol, totals: SourceTotals) -> SourceFetches:
    """What fetches adapters from the sources that the configuration names; none if it names none."""
    sources = parse_sources(config.adapter_source)
    return SourceFetches(
        sources,
        engine,
        Fetcher(source.scheme for source in sources),
        lambda: staging_of(engine),
        totals,
        most=int(config.max_adapter_size),
        seconds=config.source_timeout,
    )


async def client_disconnected(request: Request, error: Exception) -> Response:
    """Exception handler for a client that has disconnected: no body, no log line."""
    return Response(status_code=499)


@router.get("/health")
async def health(services: ServicesDep) -> dict[str, str]:
    """Liveness: 200, or 503 once the engine's heartbeat has stopped."""
    if not services.engine.alive:
        raise Unavailable("the engine does not answer")
    return {"status": "ok"}


@router.get("/ready")
async def ready(services: ServicesDep) -> dict[str, str]:
    """Readiness: 200, or 503 while starting, restarting or draining."""
    if not services.engine.ready:
        raise Unavailable("the server is not accepting requests at the moment", retry_after=1.0)
    return {"status": "ready"}


@router.get("/version")
async def show_version(caller: Authorized) -> dict[str, str]:
    """The server's version."""
    return {"version": version("lora-serve")}


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(services: ServicesDep, caller: MetricsReader) -> Response:
    """Metrics in Prometheus text format."""
    return Response(services.metrics.render(), media_type=CONTENT_TYPE)
