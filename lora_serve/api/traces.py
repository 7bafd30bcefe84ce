"""OpenTelemetry traces: a few spans per request, made when it has ended.

    POST /v1/chat/completions    SERVER, from the first byte to the last; part of the caller's trace (`traceparent`)
      chat shout                 from the engine's receipt to the end, with attributes of the GenAI conventions
        queue, prefill, decode   until its first step, its first token, its end; of the first choice with a token

As all spans are made at the end, from times that the access log needs too, a token costs nothing more. Export is in a
thread of the SDK, whose queue drops spans rather than wait. Attributes are names, numbers and digests: no prompt, no
text, no key.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from starlette.types import Scope

from lora_serve.api.request_record import RequestRecord
from lora_serve.errors import BadRequest

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

SERVICE = "lora-serve"
LAST_EXPORT = 0.8  # seconds for the last spans to be sent at the end; what is not sent by then is lost
OPERATIONS = {  # of the GenAI conventions, by path
    "/v1/completions": "text_completion",
    "/v1/embeddings": "embeddings",
    "/v1/chat/completions": "chat",
    "/v1/messages": "chat",
    "/v1/responses": "chat",
}
SAMPLING = ("max_tokens", "temperature", "top_p", "frequency_penalty", "presence_penalty")


class RequestTraces:
    """Makes the spans of requests.

    Args:
        provider: of the SDK, with its exporters.
    """

    def __init__(self, provider: TracerProvider) -> None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = provider
        self._tracer = provider.get_tracer("lora_serve", version("lora-serve"))
        self._propagator = TraceContextTextMapPropagator()

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> RequestTraces:
        """Traces that are exported as the OTEL_… environment variables say. Raises `BadRequest`."""
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError:
            raise BadRequest("traces need OpenTelemetry: pip install 'lora-serve[traces]'", param="traces") from None
        _check(environment)
        resource = Resource.create({SERVICE_VERSION: version("lora-serve")})
        if str(resource.attributes[SERVICE_NAME]).startswith("unknown_service"):
            resource = resource.merge(Resource({SERVICE_NAME: SERVICE}))
        # Not at the interpreter's exit, which would wait for a collector that does not answer.
        provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        return cls(provider)

    def record(self, scope: Scope, record: RequestRecord, status: int) -> str:
        """Make the spans of a request that has ended. Returns the id of its trace."""
        from opentelemetry.trace import SpanKind, Status, StatusCode, format_trace_id, set_span_in_context

        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        carrier = {name: headers[name] for name in ("traceparent", "tracestate") if name in headers}
        ended, clock = time.monotonic(), time.time_ns() - time.monotonic_ns()

        def at(moment: float) -> int:
            return clock + int(moment * 1e9)

        route = getattr(scope.get("route"), "path", None)
        name = f"{scope['method']} {route}" if route else scope["method"]
        attributes = {
            "http.request.method": scope["method"],
            "http.route": route,
            "http.response.status_code": status,
            "error.type": record.error and record.error[0],
            "lora_serve.request_id": scope["state"].get("request_id"),
        }
        server = self._tracer.start_span(
            name, self._propagator.extract(carrier), SpanKind.SERVER, _given(attributes), start_time=at(record.begun)
        )
        if status >= 500 or (record.error is not None and status < 400):  # the latter: in the middle of a stream
            server.set_status(Status(StatusCode.ERROR))
        if record.sent is not None:
            self._inference(scope["path"], record, set_span_in_context(server), at, ended)
        server.end(at(ended))
        return format_trace_id(server.get_span_context().trace_id)

    def _inference(self, path: str, record: RequestRecord, parent: Any, at: Any, ended: float) -> None:
        from opentelemetry.trace import set_span_in_context

        assert record.sent is not None
        operation = OPERATIONS.get(path, "chat")
        model = record.adapter_names or "base"
        inference = self._tracer.start_span(
            f"{operation} {model}",
            parent,
            attributes=_given(_genai(operation, model, record)),
            start_time=at(record.sent),
        )
        inside = set_span_in_context(inference)
        phases = [("queue", record.sent, record.started or ended)]
        if record.started is not None and record.first_token is not None:
            first = record.begun + record.first_token
            phases += [("prefill", record.started, first), ("decode", first, ended)]
        for phase, begin, end in phases:
            self._tracer.start_span(phase, inside, start_time=at(begin)).end(at(end))
        inference.end(at(ended))

    def close(self) -> None:
        """Export what is left, for as long as `LAST_EXPORT` at most."""
        closing = threading.Thread(target=self._provider.shutdown, daemon=True)
        closing.start()
        closing.join(LAST_EXPORT)


def _genai(operation: str, model: str, record: RequestRecord) -> dict[str, Any]:
    """Attributes of the GenAI semantic conventions, and the exact adapter versions."""
    sampling = record.sampling
    asked = {f"gen_ai.request.{name}": getattr(sampling, name) for name in SAMPLING} if sampling else {}
    return asked | {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": SERVICE,
        "gen_ai.request.model": model,
        "gen_ai.response.model": model,
        "gen_ai.request.choice.count": record.choices if record.choices > 1 else None,
        "gen_ai.request.seed": sampling and sampling.seed,
        "gen_ai.request.top_k": sampling.top_k if sampling and sampling.top_k else None,
        "gen_ai.response.finish_reasons": record.finish and [record.finish],
        "gen_ai.usage.input_tokens": record.prompt_tokens,
        "gen_ai.usage.output_tokens": record.completion_tokens,
        "gen_ai.usage.cache_read.input_tokens": record.cached or None,
        "gen_ai.response.time_to_first_chunk": record.first_token,
        "lora_serve.adapters": record.served or None,
        "lora_serve.queue_seconds": record.queued,
        "error.type": record.error and record.error[0],
    }


def _given(attributes: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in attributes.items() if value is not None}


def _check(environment: Mapping[str, str]) -> None:
    """Raise `BadRequest` for what is asked for in the environment and is not here."""
    exporter = environment.get("OTEL_TRACES_EXPORTER", "otlp")
    if exporter != "otlp":
        raise BadRequest(f"OTEL_TRACES_EXPORTER is {exporter[:100]}; traces are exported by otlp only", param="traces")
    for name in ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"):
        if environment.get(name, "http/protobuf") != "http/protobuf":
            raise BadRequest(f"{name} is {environment[name][:100]}; only http/protobuf is here", param="traces")
