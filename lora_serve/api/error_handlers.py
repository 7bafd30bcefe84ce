"""Exception handlers: every error becomes an HTTP status and OpenAI's error JSON, or Anthropic's on its routes.

OpenAI's is `{"error": {"message", "type", "param", "code"}}`. Messages do not echo request content, except
a truncated field name. Internal errors are logged, not shown (`error_responses.py`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import Scope

from lora_serve.api.anthropic.anthropic_errors import anthropic_error, is_anthropic
from lora_serve.api.methods import allowed_methods
from lora_serve.api.request_id import request_id
from lora_serve.api.request_record import record_of
from lora_serve.errors import BadRequest, Overloaded, ServeError, Unavailable

LONGEST_NAME = 100  # characters of a field name in a message
NEEDS_JSON = "the body must be a JSON object, sent as application/json"
MOST_REASONS = 4  # alternatives of a union in a message
MOST_PROBLEMS = 20  # of a body that are looked at
UNKNOWN, MISSING = "extra_forbidden", "missing"  # pydantic's types of problems

STATUS = {
    "bad_request": 400,
    "context_length_exceeded": 400,
    "thread_unsupported_request": 400,
    "invalid_training_file": 400,
    "invalid_validation_file": 400,
    "training_diverged": 400,
    "invalid_api_key": 401,
    "forbidden": 403,
    "adapter_not_found": 404,
    "model_not_found": 404,
    "file_not_found": 404,
    "job_not_found": 404,
    "response_not_found": 404,
    "tinker_object_not_found": 404,
    "run_not_found": 404,
    "adapter_exists": 409,
    "adapter_busy": 409,
    "adapter_broken": 409,  # not 5xx: one damaged adapter does not make the server unhealthy
    "file_damaged": 409,
    "tinker_result_gone": 410,
    "run_exists": 409,
    "precondition_failed": 412,
    "too_large": 413,
    "unsupported_media_type": 415,
    "adapter_invalid": 422,
    "overloaded": 429,
    "rate_limit_exceeded": 429,
    "tinker_backpressure": 429,
    "engine_fault": 500,
    "server_error": 500,
    "model_unsupported": 500,
    "unavailable": 503,
    "settings_not_applied": 503,
    "partly_applied": 503,  # of several replicas
    "storage_full": 507,
    "store_unusable": 507,
}

TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    409: "conflict_error",
    429: "rate_limit_error",
}


class Unauthenticated(ServeError):
    """Missing or unknown API key."""

    kind = "invalid_api_key"
    quotes = False


class Forbidden(ServeError):
    """The API key does not allow this."""

    kind = "forbidden"
    quotes = False


class RateLimited(ServeError):
    """The key has used up a quota.

    Args:
        headers: what is left of the quota.
    """

    kind = "rate_limit_exceeded"
    quotes = False

    def __init__(self, message: str, *, retry_after: float, headers: dict[str, str]) -> None:
        super().__init__(message, retry_after=retry_after)
        self.headers = headers


class InvalidField(BadRequest):
    """A field of the request is unknown, missing or has a value that it cannot have.

    Args:
        problem: the class of problem and the outermost field that the route knows; for logs.
    """

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        retry_after: float | None = None,
        problem: str | None = None,
    ) -> None:
        super().__init__(message, param=param, retry_after=retry_after)
        self.problem = problem

    @property
    def reason(self) -> str | None:
        return self.problem or super().reason


class UnsupportedMedia(ServeError):
    """The body is in a format or encoding that is not read here."""

    kind = "unsupported_media_type"
    quotes = False


def status(error: ServeError) -> int:
    """The HTTP status of an error."""
    return STATUS.get(error.kind, 500)


def body(error: ServeError) -> dict[str, Any]:
    """The error as OpenAI's JSON object; also sent as an event when a stream has already started."""
    return _openai_error(status(error), error.message, error.param, error.kind)


def headers(error: ServeError) -> dict[str, str]:
    """Response headers of an error: Retry-After, WWW-Authenticate, what is left of a quota."""
    if isinstance(error, Unauthenticated):
        return {"WWW-Authenticate": "Bearer"}
    seconds = error.retry_after
    if seconds is None and isinstance(error, Overloaded | Unavailable):
        seconds = 1.0
    left = error.headers if isinstance(error, RateLimited) else {}
    return left if seconds is None else left | {"Retry-After": str(max(1, math.ceil(seconds)))}


def response(error: ServeError, scope: Scope) -> JSONResponse:
    """The complete HTTP response for an error raised before the response to this request started."""
    record_of(scope).failed(error.kind, error.reason)
    shown = _shape(scope, status(error), error.message, error.param, error.kind)
    return JSONResponse(shown, status(error), headers(error))


def validation_error(problems: Sequence[Mapping[str, Any]], sent: Any) -> InvalidField:
    """The error of a failed validation, with the field as a dotted path.

    Only the first of pydantic's problems are looked at, and those with the first field described; of a union's
    alternatives, the one that got deepest, as it is most likely the one meant. `sent` is the decoded body: its keys
    tell field names from names of union members, which pydantic also puts into a location.
    """
    if not problems:
        return InvalidField("the request is not valid")
    problems = problems[:MOST_PROBLEMS]
    paths = [_field_path(problem, sent) for problem in problems]
    related = [(path, problem) for path, problem in zip(paths, problems, strict=True) if path[:1] == paths[0][:1]]
    deepest = max((path for path, _ in related), key=len)
    told = [problem for path, problem in related if path == deepest]
    param = ".".join(deepest)[:LONGEST_NAME] or None
    kinds = [problem["type"] for problem in told]
    if UNKNOWN in kinds:
        known = deepest[0] if len(deepest) > 1 else None  # the last name is the client's
        return InvalidField(f"unknown parameter: {param}", param=param, problem=_classified(known, UNKNOWN))
    kind = _classified(deepest[0] if deepest else None, MISSING if MISSING in kinds else kinds[0])
    if MISSING in kinds and param:
        return InvalidField(f"missing parameter: {param}", param=param, problem=kind)
    if not param and (MISSING in kinds or not isinstance(sent, dict)):
        return InvalidField(NEEDS_JSON, problem=kind)
    reasons = list(dict.fromkeys(problem["msg"].removeprefix("Value error, ") for problem in told))[:MOST_REASONS]
    text = "; or ".join(reasons)[: 4 * LONGEST_NAME]
    return InvalidField(f"{param}: {text}" if param else text, param=param, problem=kind)


def _classified(field: str | None, kind: str) -> str:
    return kind if field is None else f"{field}: {kind}"


def install(app: FastAPI) -> None:
    """Register the exception handlers on `app`."""
    app.add_exception_handler(ServeError, _serve_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _http_error)


def _shape(scope: Scope, status: int, message: str, param: str | None, code: str | None) -> dict[str, Any]:
    """The error JSON of the API that a request's path belongs to."""
    if is_anthropic(scope["path"]):
        return anthropic_error(status, message, param, code, request_id(scope))
    return _openai_error(status, message, param, code)


def _openai_error(status: int, message: str, param: str | None, code: str | None) -> dict[str, Any]:
    kind = TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _field_path(problem: Mapping[str, Any], sent: Any) -> tuple[str, ...]:
    where, *location = problem["loc"]
    if where != "body":
        return tuple(str(part) for part in location)
    path: list[str] = []
    for index, part in enumerate(location):
        held = part in sent if isinstance(sent, dict) else isinstance(sent, list) and part in range(len(sent))
        if held:
            sent = sent[part]
        elif problem["type"] != "missing" or index < len(location) - 1:
            continue  # a union member's name
        path.append(str(part))
    return tuple(path)


def _serve_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ServeError)
    return response(error, request.scope)


def _validation_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    return response(validation_error(error.errors(), error.body), request.scope)


def _http_error(request: Request, error: Exception) -> JSONResponse:
    """Errors of the web framework: unknown route, method not allowed, a body that is not JSON."""
    assert isinstance(error, HTTPException)
    own_words = {404: "no such route", 405: "this route does not have that method"}.get(error.status_code)
    message = own_words or str(error.detail)[: 4 * LONGEST_NAME]
    code = HTTPStatus(error.status_code).name.lower()
    record_of(request.scope).failed(code, own_words)
    shown = _shape(request.scope, error.status_code, message, None, code)
    headers = dict(error.headers or {})
    if error.status_code == 405:  # the framework names the methods of one route only
        headers["Allow"] = ", ".join(allowed_methods(request.app.routes, request.scope))
    return JSONResponse(shown, error.status_code, headers)
