"""The OpenAPI schema: FastAPI's, with the errors that this server responds with."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

import msgspec
from fastapi import FastAPI
from pydantic import BaseModel

COMPONENT = "#/components/schemas/"
FRAMEWORK_ERRORS = ("HTTPValidationError", "ValidationError")  # FastAPI's, in a shape that is not sent here


class ErrorDetail(BaseModel):
    """`param`: the field at fault; `code`: the kind of error."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(BaseModel):
    """OpenAI's error object."""

    error: ErrorDetail


Responses = dict[int | str, dict[str, Any]]
ETAG = {"headers": {"ETag": {"description": "the digest, quoted", "schema": {"type": "string"}}}}
UNCHANGED: Responses = {304: {"description": "It has one of the entity tags in If-None-Match", **ETAG}}


def errors(*statuses: int) -> Responses:
    """OpenAPI responses of a route, for the errors that not every route has."""
    return {status: _error(status) for status in statuses}


def documented(struct: type[msgspec.Struct], *statuses: int, success: int = 200, etag: bool = False) -> Responses:
    """OpenAPI responses of a route: a msgspec struct, with references resolved, and errors.

    Args:
        etag: whether the response has an entity tag.
    """
    (schema,), parts = msgspec.json.schema_components([struct], ref_template="{name}")

    def whole(node: Any) -> Any:
        if isinstance(node, list):
            return [whole(item) for item in node]
        if not isinstance(node, dict):
            return node
        return whole(parts[node["$ref"]]) if "$ref" in node else {key: whole(value) for key, value in node.items()}

    done = {"description": "Done", "content": {"application/json": {"schema": whole(schema)}}}
    return {success: done | (ETAG if etag else {}), **errors(*statuses)}


def _error(status: int) -> dict[str, Any]:
    schema = {"$ref": COMPONENT + ErrorReply.__name__}
    return {"description": HTTPStatus(status).phrase, "content": {"application/json": {"schema": schema}}}


class DocumentedAPI(FastAPI):
    """A FastAPI application whose schema has the errors that routes have in common.

    Which these are follows from whether a route takes a key and a body. The schema is served to whoever may call the
    API.

    Args:
        keys: whether keys are needed; otherwise they are optional in the schema.
    """

    def __init__(self, *, keys: bool = False, **settings: Any) -> None:
        super().__init__(**settings)
        self._keys = keys

    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            schema = super().openapi()
            components = schema.setdefault("components", {}).setdefault("schemas", {})
            for name in FRAMEWORK_ERRORS:
                components.pop(name, None)
            reply = ErrorReply.model_json_schema(ref_template=COMPONENT + "{model}")
            components |= reply.pop("$defs") | {ErrorReply.__name__: reply}
            for path in schema["paths"].values():
                for operation in path.values():
                    _document_errors(operation, self._keys)
        return self.openapi_schema or {}


def _document_errors(operation: dict[str, Any], keys: bool) -> None:
    responses = operation["responses"]
    if responses.get("422", {}).get("description") == "Validation Error":
        del responses["422"]
    if "security" in operation and not keys:
        operation["security"].append({})
    if "4XX" in responses:
        return  # the errors of another API, documented by its routes
    found = [403, 500, 503]  # 403: also for web pages, see `origin.py`
    if "security" in operation:
        found.append(401)
    if "requestBody" in operation:
        found += [400, 413, 415]
    for status in found:
        responses.setdefault(str(status), _error(status))
