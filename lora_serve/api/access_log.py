"""What remains of requests: a line in the access log, a line in the audit log for every change, and usage.

A line has the request's id, the key's name, the route, the status, the adapter versions, tokens and times: never a
prompt, a key or generated text; of an error its kind, and the reason in words that no client chose. Probes and scrapes
are logged at level debug.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Container
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lora_serve.api.request_record import Change, RequestRecord, record_of
from lora_serve.api.traces import RequestTraces
from lora_serve.api.usage import UsageRecords
from lora_serve.metrics import Metrics

LONGEST_TEXT = 200  # characters of a path or a name in a line
DISCONNECTED = 499  # status of a request whose client left before the response began, as nginx has it

access = logging.getLogger("lora_serve.access")
audit = logging.getLogger("lora_serve.audit")


class AccessLog:
    """ASGI middleware: logs every request when it has ended, and counts errors and usage.

    Args:
        quiet_paths: paths that are logged at level debug, and not traced.
        traces: makes spans of the others.
    """

    def __init__(
        self,
        app: ASGIApp,
        metrics: Metrics,
        usage: UsageRecords,
        quiet_paths: Container[str],
        traces: RequestTraces | None = None,
    ) -> None:
        self._app = app
        self._traces = traces
        self._metrics, self._usage = metrics, usage
        self._quiet_paths = quiet_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = record_of(scope)
        status = DISCONNECTED

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, watched)
        finally:
            if record.error is not None:
                self._metrics.count_error(status, record.error[0])
            quiet = scope["path"] in self._quiet_paths
            fields = _fields(scope, record)
            if self._traces is not None and not quiet:
                fields["trace_id"] = self._traces.record(scope, record, status)
            level = logging.DEBUG if quiet and status < 400 else logging.INFO
            _write(access, level, f"{scope['method']} {_quoted(scope['path'])} {status}", fields)
            if record.prompt_tokens:  # it was admitted
                tokens = record.prompt_tokens, record.completion_tokens
                self._usage.add(_key(scope) or "", record.adapter_names, *tokens)
            for change in record.changes:
                write_audit(change, **_audit_fields(scope, status))


def _fields(scope: Scope, record: RequestRecord) -> dict[str, Any]:
    """What a line says besides method, path and status; None where there is none of it."""
    state = scope["state"]
    kind, reason = record.error or (None, None)
    return {
        "key": _key(scope),
        "adapter": "+".join(record.served) or None,
        "prompt_tokens": record.prompt_tokens or None,
        "completion_tokens": record.completion_tokens or None,
        "queued": record.queued,
        "first_token": record.first_token,
        "finish": record.finish,
        "seconds": time.monotonic() - record.begun,
        "error": kind,
        "reason": reason,
        "id": state.get("request_id"),
        "traceparent": state.get("traceparent"),
    }


def _audit_fields(scope: Scope, status: int) -> dict[str, Any]:
    client = scope.get("client")
    return {
        "status": status,
        "key": _key(scope),
        "client": None if client is None else client[0],
        "id": scope["state"].get("request_id"),
    }


def write_audit(change: Change, **fields: Any) -> None:
    """Write a line of the audit log; fields that are None are left out."""
    own = {"digest": change.digest or None, "targets": change.targets or None}
    _write(audit, logging.INFO, f"{change.action} {_quoted(change.name)}", own | fields)


def _quoted(text: str) -> str:
    """A path or a name as the client sent it, cut, and quoted where it could be taken for something else."""
    text = text[:LONGEST_TEXT]
    return text if text.isprintable() and " " not in text else repr(text)


def _key(scope: Scope) -> str | None:
    """The name of the caller's key; None without keys, or for an unknown one."""
    caller = scope["state"].get("caller")
    return None if caller is None else caller.name or None


def _write(log: logging.Logger, level: int, message: str, fields: dict[str, Any]) -> None:
    if log.isEnabledFor(level):
        given = {name: value for name, value in fields.items() if value is not None}
        log.log(level, "%s", message, extra={"fields": given})
