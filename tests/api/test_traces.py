"""OpenTelemetry traces: the spans of a request, in memory and as a collector receives them."""

from __future__ import annotations

import gzip
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.semconv._incubating.attributes import gen_ai_attributes
from opentelemetry.trace import SpanKind, StatusCode, format_span_id, format_trace_id
from stub_completions import StubCompletionApp

from lora_serve.api.caller import Caller
from lora_serve.api.key_file import Keys, hash_key
from lora_serve.api.request_record import RequestRecord
from lora_serve.api.traces import RequestTraces
from lora_serve.errors import BadRequest
from lora_serve.request import Tokens

TRACE, CALLER = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
PHASES = ["queue", "prefill", "decode"]


class Traced:
    """A stub server whose spans are kept in memory."""

    def __init__(self, tmp_path: Path) -> None:
        self.exporter = InMemorySpanExporter()
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        keys = Keys({hash_key("sk-secret"): Caller("team-a")})
        self.server = StubCompletionApp(tmp_path, keys, traces=RequestTraces(provider))

    def spans(self) -> dict[str, ReadableSpan]:
        """Finished spans by name; the newest of each."""
        return {span.name: span for span in self.exporter.get_finished_spans()}


@pytest.fixture
def traced(tmp_path: Path) -> Traced:
    return Traced(tmp_path)


async def test_a_request_is_one_trace_from_the_caller_to_the_last_token(traced: Traced) -> None:
    traced.server.client.headers["traceparent"] = f"00-{TRACE}-{CALLER}-01"
    await traced.server.complete("sk-secret", prompt="confidential", adapter="poet", max_tokens=2, temperature=0.5)
    spans = traced.spans()
    assert list(spans) == [*PHASES, "text_completion poet", "POST /v1/completions"]
    server, inference = spans["POST /v1/completions"], spans["text_completion poet"]
    assert server.kind == SpanKind.SERVER
    assert server.parent is not None
    assert format_span_id(server.parent.span_id) == CALLER
    assert {format_trace_id(span.context.trace_id) for span in spans.values()} == {TRACE}
    assert inference.parent is not None
    assert inference.parent.span_id == server.context.span_id
    assert all(spans[phase].parent.span_id == inference.context.span_id for phase in PHASES)  # type: ignore[union-attr]


async def test_the_phases_follow_each_other_and_fill_the_time_in_the_engine(traced: Traced) -> None:
    await traced.server.complete("sk-secret", max_tokens=2, stream=True)
    spans = traced.spans()
    queue, prefill, decode = (spans[phase] for phase in PHASES)
    inference, server = spans["text_completion base"], spans["POST /v1/completions"]
    moments = [
        server.start_time,
        queue.start_time,
        queue.end_time,
        prefill.end_time,
        decode.end_time,
    ]
    assert moments == sorted(moments)  # type: ignore[type-var]
    assert (queue.start_time, decode.end_time) == (inference.start_time, inference.end_time)
    assert (prefill.start_time, decode.start_time) == (queue.end_time, prefill.end_time)
    assert abs(server.end_time - time.time_ns()) < 5e9  # type: ignore[operator]  # on the wall clock


async def test_attributes_are_those_of_the_genai_conventions(traced: Traced) -> None:
    await traced.server.complete("sk-secret", adapter="poet", max_tokens=2, temperature=0.5, n=2, seed=7)
    attributes = dict(traced.spans()["text_completion poet"].attributes or {})
    names = {value for name, value in vars(gen_ai_attributes).items() if name.startswith("GEN_AI_")}
    assert {name for name in attributes if name.startswith("gen_ai.")} <= names
    timed = attributes.pop("gen_ai.response.time_to_first_chunk"), attributes.pop("lora_serve.queue_seconds")
    assert all(isinstance(each, float) for each in timed)
    assert attributes == {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "lora-serve",
        "gen_ai.request.model": "poet",
        "gen_ai.response.model": "poet",
        "gen_ai.request.max_tokens": 2,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 1.0,
        "gen_ai.request.frequency_penalty": 0.0,
        "gen_ai.request.presence_penalty": 0.0,
        "gen_ai.request.seed": 7,
        "gen_ai.request.choice.count": 2,
        "gen_ai.response.finish_reasons": ("length",),
        "gen_ai.usage.input_tokens": 2,
        "gen_ai.usage.output_tokens": 4,
        "lora_serve.adapters": ("poet@dddddddddddd",),
    }


async def test_errors_are_on_the_span_and_nothing_of_prompts_keys_or_messages(traced: Traced) -> None:
    await traced.server.complete("sk-wrong", prompt="confidential")
    refused = traced.exporter.get_finished_spans()[-1]
    assert refused.name == "POST"  # a key is checked before there is a route
    assert refused.attributes is not None
    assert (refused.attributes["http.response.status_code"], refused.attributes["error.type"]) == (
        401,
        "invalid_api_key",
    )
    assert refused.status.status_code == StatusCode.UNSET  # the caller's fault
    traced.server.engine.breaks = 1
    await traced.server.complete("sk-secret", prompt="confidential", stop=["private"], stream=True)
    broken = traced.exporter.get_finished_spans()[-1]
    assert broken.attributes is not None
    assert (broken.status.status_code, broken.attributes["error.type"]) == (StatusCode.ERROR, "engine_fault")
    told = "".join(span.to_json() for span in traced.exporter.get_finished_spans())
    assert not any(secret in told for secret in ("confidential", "private", "sk-", "team-a", "it broke"))


async def test_probes_are_not_traced_and_unknown_paths_do_not_become_names(traced: Traced) -> None:
    await traced.server.client.get("/health")
    assert traced.spans() == {}
    await traced.server.client.get("/v1/anything", headers={"Authorization": "Bearer sk-secret"})
    assert list(traced.spans()) == ["GET"]


def test_a_token_after_the_first_does_no_more_than_count() -> None:
    record = RequestRecord()
    record.generated(Tokens("r", [1], queued=0.1))
    before = dict(vars(record))
    record.generated(Tokens("r", [2], queued=0.2, started=1.0))
    changed = {name for name, value in vars(record).items() if value != before[name]}
    assert changed == {"completion_tokens"}


# --- export ----------------------------------------------------------------------------------------------------------


@contextmanager
def collector() -> Iterator[tuple[str, list[ExportTraceServiceRequest], list[str]]]:
    """An OTLP/HTTP receiver: its URL, what it was sent, and the headers `x-team` of that."""
    received: list[ExportTraceServiceRequest] = []
    teams: list[str] = []

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            if self.path == "/v1/traces" and self.headers["Content-Type"] == "application/x-protobuf":
                received.append(ExportTraceServiceRequest.FromString(body))
                teams.append(self.headers.get("x-team", ""))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", received, teams
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def environment(monkeypatch: pytest.MonkeyPatch, **variables: str) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(f"OTEL_{name}", value)


async def test_a_collector_receives_the_spans_as_the_environment_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with collector() as (url, received, teams):
        environment(
            monkeypatch,
            EXPORTER_OTLP_ENDPOINT=url,
            EXPORTER_OTLP_HEADERS="x-team=blue",
            EXPORTER_OTLP_COMPRESSION="gzip",
            RESOURCE_ATTRIBUTES="deployment.environment.name=test",
        )
        traces = RequestTraces.from_environment()
        server = StubCompletionApp(tmp_path, traces=traces)
        await server.complete(adapter="poet", max_tokens=2)
        traces.close()
        (request,), (team,) = received, teams
    (resource,) = request.resource_spans
    described = {attribute.key: attribute.value.string_value for attribute in resource.resource.attributes}
    assert (described["service.name"], described["deployment.environment.name"]) == ("lora-serve", "test")
    (scope,) = resource.scope_spans
    assert [span.name for span in scope.spans] == [*PHASES, "text_completion poet", "POST /v1/completions"]
    assert team == "blue"


@pytest.mark.parametrize("how", ["hangs", "refuses"])
async def test_a_collector_that_hangs_or_refuses_delays_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if how == "hangs":
            listener.listen()  # connections are made, and nobody answers
        environment(
            monkeypatch,
            EXPORTER_OTLP_ENDPOINT=f"http://127.0.0.1:{listener.getsockname()[1]}",
            BSP_SCHEDULE_DELAY="20",
            BSP_MAX_QUEUE_SIZE="8",
            BSP_MAX_EXPORT_BATCH_SIZE="4",
        )
        traces = RequestTraces.from_environment()
        server = StubCompletionApp(tmp_path, traces=traces)
        begun = time.monotonic()
        for _ in range(40):  # 200 spans, of which 8 wait
            assert (await server.complete(max_tokens=1)).status_code == 200
        assert time.monotonic() - begun < 2
        begun = time.monotonic()
        traces.close()
        assert time.monotonic() - begun < 1.2


@pytest.mark.parametrize(
    ("name", "value"),
    [("OTEL_TRACES_EXPORTER", "zipkin"), ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")],
)
def test_what_is_not_here_is_refused_at_start(name: str, value: str) -> None:
    with pytest.raises(BadRequest, match=f"{name} is {value}"):
        RequestTraces.from_environment({name: value})


async def test_a_sampler_of_the_environment_is_obeyed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with collector() as (url, received, _):
        environment(monkeypatch, EXPORTER_OTLP_ENDPOINT=url, TRACES_SAMPLER="always_off")
        traces = RequestTraces.from_environment()
        await StubCompletionApp(tmp_path, traces=traces).complete(max_tokens=1)
        traces.close()
        assert received == []
