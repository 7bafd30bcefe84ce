"""Errors in HTTP responses: OpenAI's shape, the right status, and a message that names the invalid field."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import pytest
from fastapi import APIRouter, Body
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_validator
from stub_admin import StubAdminApp, refusal

from lora_serve import errors as tree
from lora_serve.api import error_handlers
from lora_serve.api.json_body import JSONRoute


@pytest.mark.parametrize(
    ("error", "status", "type"),
    [
        (tree.BadRequest, 400, "invalid_request_error"),
        (tree.ContextExceeded, 400, "invalid_request_error"),
        (error_handlers.Unauthenticated, 401, "authentication_error"),
        (error_handlers.Forbidden, 403, "permission_error"),
        (tree.AdapterNotFound, 404, "not_found_error"),
        (tree.AdapterExists, 409, "conflict_error"),
        (tree.AdapterBusy, 409, "conflict_error"),
        (tree.TooLarge, 413, "invalid_request_error"),
        (error_handlers.UnsupportedMedia, 415, "invalid_request_error"),
        (tree.AdapterInvalid, 422, "invalid_request_error"),
        (tree.Overloaded, 429, "rate_limit_error"),
        (tree.EngineFault, 500, "server_error"),
        (tree.ServeError, 500, "server_error"),
        (tree.Unavailable, 503, "server_error"),
        (tree.StorageFull, 507, "server_error"),
    ],
)
def test_every_error_class_has_a_status_and_a_type(error: type[tree.ServeError], status: int, type: str) -> None:
    raised = error("words", param="field")
    assert error_handlers.status(raised) == status
    shown = {"message": "words", "type": type, "param": "field", "code": error.kind}
    assert error_handlers.body(raised) == {"error": shown}


def test_all_error_classes_are_covered() -> None:
    def kinds(cls: type[tree.ServeError]) -> set[str]:
        return {cls.kind}.union(*map(kinds, cls.__subclasses__()))

    assert kinds(tree.ServeError) == error_handlers.STATUS.keys()


def test_overload_and_unavailability_send_retry_after() -> None:
    assert error_handlers.headers(tree.Overloaded("full")) == {"Retry-After": "1"}
    assert error_handlers.headers(tree.Unavailable("later", retry_after=2.1)) == {"Retry-After": "3"}
    assert error_handlers.headers(tree.Unavailable("soon", retry_after=0.01)) == {"Retry-After": "1"}
    assert error_handlers.headers(tree.BadRequest("never")) == {}


# --- validation ------------------------------------------------------------------------------------------------------


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Use(Strict):
    name: str
    weight: float = 1.0


class Asked(Strict):
    prompt: str | list[str] | list[int]
    temperature: float = Field(1.0, ge=0, le=2)
    adapter: str | Use | list[Use] | None = None
    seed: int | None = None

    @field_validator("seed")
    @classmethod
    def _seed_is_even(cls, value: int | None) -> int | None:
        if value is not None and value % 2:
            raise ValueError("must be even")
        return value


def explained(sent: Any) -> tuple[str, str | None]:
    """What a client would be told of a body."""
    with pytest.raises(ValidationError) as failed:
        TypeAdapter(Asked).validate_python(sent)
    problems = [{**problem, "loc": ("body", *problem["loc"])} for problem in failed.value.errors()]
    error = error_handlers.validation_error(problems, sent)
    return error.message, error.param


@pytest.mark.parametrize(
    ("sent", "param", "message"),
    [
        ({"prompt": "x", "best_of": 2}, "best_of", "unknown parameter: best_of"),
        ({}, "prompt", "missing parameter: prompt"),
        ({"prompt": "x", "temperature": 3.0}, "temperature", "temperature: Input should be less than or equal to 2"),
        ({"prompt": "x", "seed": "5"}, "seed", "seed: Input should be a valid integer"),
        ({"prompt": "x", "seed": 3}, "seed", "seed: must be even"),
        ({"prompt": "x", "adapter": [{"name": "a", "wait": 1}]}, "adapter.0.wait", "unknown parameter: adapter.0.wait"),
        ({"prompt": "x", "adapter": {"weight": 1.0}}, "adapter.name", "missing parameter: adapter.name"),
        ([], None, error_handlers.NEEDS_JSON),
    ],
)
def test_a_failed_validation_names_the_field(sent: Any, param: str | None, message: str) -> None:
    assert explained(sent) == (message, param)


def test_alternatives_of_a_union_are_reported_together() -> None:
    message, param = explained({"prompt": 5})
    assert param == "prompt"
    assert message == "prompt: Input should be a valid string; or Input should be a valid list"


def test_error_messages_quote_a_bounded_part_of_the_input() -> None:
    message, param = explained({"prompt": "x", "y" * 10_000: 1})
    assert param == "y" * error_handlers.LONGEST_NAME
    assert len(message) < 2 * error_handlers.LONGEST_NAME
    message, _ = explained({"prompt": "x", "temperature": "secret words"})
    assert "secret" not in message
    assert "http" not in message


# --- over HTTP -------------------------------------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path: Path) -> StubAdminApp:
    server = StubAdminApp(tmp_path)

    router = APIRouter(route_class=JSONRoute)

    @router.post("/ask")
    async def ask(asked: Annotated[Asked, Body()]) -> None:
        raise ZeroDivisionError(asked.prompt)

    server.app.include_router(router)
    return server


async def test_unknown_routes_and_methods_have_the_same_error_shape(server: StubAdminApp) -> None:
    assert refusal(await server.ask("GET", "/no/such")) == (404, None, "no such route")
    assert refusal(await server.ask("DELETE", "/v1/adapters"))[0] == 405


@pytest.mark.parametrize("content", ["{", '{"prompt": "x"} y', "", "null", "5", "[" * 100_000, '{"prompt": "\\ud800'])
async def test_bodies_that_are_not_json_objects_are_400(server: StubAdminApp, content: str) -> None:
    answer = await server.ask("POST", "/ask", content=content, headers={"Content-Type": "application/json"})
    status, param, message = refusal(answer)
    assert (status, param) == (400, None)
    assert len(message) < 200


async def test_our_errors_keep_their_message_and_headers(server: StubAdminApp) -> None:
    server.engine.failure = tree.Unavailable("restarting", retry_after=4.0)
    answer = await server.ask("GET", "/v1/adapters")
    assert refusal(answer) == (503, None, "restarting")
    assert answer.headers["Retry-After"] == "4"


async def test_an_internal_error_reveals_nothing(server: StubAdminApp) -> None:
    answer = await server.ask("POST", "/ask", json={"prompt": "secret words"})
    assert refusal(answer) == (500, None, "the server failed on this request")
    assert "secret" not in answer.text
    assert "ZeroDivision" not in answer.text
