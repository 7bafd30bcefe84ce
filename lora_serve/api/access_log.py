"""What remains of requests: a line in the access log, a line in the audit log for every change, and usage.

A line has the request's id, the key's name, the route, the status, the adapter versions, tokens and times: never a
prompt, a key or generated text. Probes and scrapes are logged at level debug.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Container
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lora_serve.api.request_record import Change, RequestRecord, record_of
from lora_serve.api.usage import UsageRecords
from lora_serve.metrics import Metrics

LONGEST_PATH = 200  # characters of a path in a line
DISCONNECTED = 499  # status of a request whose client left before the response began, as nginx has it

access = logging.getLogger("lora_serve.access")
audit = logging.getLogger("lora_serve.audit")


class AccessLog:
    """ASGI middleware: logs every request when it has ended, and counts errors and usage.

    Args:
        quiet_paths: paths that are logged at level debug.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, usage: UsageRecords, quiet_paths: Container[str]) -> None:
        self._app = app
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
            if record.prompt_tokens:  # it was admitted
                tokens = record.prompt_tokens, record.completion_tokens
                self._usage.add(_key(scope) or "", record.adapter_names, *tokens)
            level = logging.DEBUG if scope["path"] in self._quiet_paths and status < 400 else logging.INFO
            _write(access, level, f"{scope['method']} {_path(scope)} {status}", _fields(scope, record))
            for change in record.changes:
                _write(audit, logging.INFO, f"{change.action} {change.name}", _audit_fields(scope, change, status))


def _fields(scope: Scope, record: RequestRecord) -> dict[str, Any]:
    """What a line says besides method, path and status; without what there is none of."""
    state = scope["state"]
    kind, message = record.error or (None, None)
    fields = {
        "key": _key(scope),
        "adapter": "+".join(record.served) or None,
        "prompt_tokens": record.prompt_tokens or None,
        "completion_tokens": record.completion_tokens or None,
        "queued": record.queued,
        "first_token": record.first_token,
        "finish": record.finish,
        "seconds": time.monotonic() - record.begun,
        "error": kind,
        "reason": message,
        "id": state.get("request_id"),
        "traceparent": state.get("traceparent"),
    }
    return {name: value for name, value in fields.items() if value is not None}


def _audit_fields(scope: Scope, change: Change, status: int) -> dict[str, Any]:
    client = scope.get("client")
    fields = {
        "status": status,
        "digest": change.digest or None,
        "targets": change.targets or None,
        "key": _key(scope),
        "client": None if client is None else client[0],
        "id": scope["state"].get("request_id"),
    }
    return {name: value for name, value in fields.items() if value is not None}


def _path(scope: Scope) -> str:
    """The path, quoted where it could be taken for something else."""
    path: str = scope["path"][:LONGEST_PATH]
    return path if path.isprintable() and " " not in path else repr(path)


def _key(scope: Scope) -> str | None:
    """The name of the caller's key; None without keys, or for an unknown one."""
    caller = scope["state"].get("caller")
    return None if caller is None else caller.name or None


def _write(log: logging.Logger, level: int, message: str, fields: dict[str, Any]) -> None:
    if log.isEnabledFor(level):
        log.log(level, "%s", message, extra={"fields": fields})
