"""Changes that all replicas make: which requests are, what is answered, and the journal in which they are kept."""

from __future__ import annotations

import pytest
from fastapi.routing import APIRoute

from lora_serve.api import admin, alias_routes
from lora_serve.errors import BadRequest, PartlyApplied
from lora_serve.replicas.changes import as_kept, change_kind, merge
from lora_serve.replicas.forwarding import ForwardedRequest, ResponseBegin, ServerLost, WholeResponse


def response(replica: str, status: int, body: bytes = b"{}") -> WholeResponse:
    return WholeResponse(ResponseBegin(replica, status, ()), body)


def request(method: str = "PUT", target: str = "/v1/adapters/x", body: bytes = b"") -> ForwardedRequest:
    headers = (("Content-Type", "multipart/form-data; boundary=b"), ("Authorization", "Bearer sk-secret"))
    return ForwardedRequest(method, target, headers, body)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/adapters"),
        ("HEAD", "/v1/adapters/x"),
        ("POST", "/v1/completions"),
        ("POST", "/v1/adapters/inspect"),
        ("POST", "/v1/messages/count_tokens"),
        ("DELETE", "/v1/responses/x"),
        ("PATCH", "/v1/adapters/x"),
        ("PUT", "/anything"),
        ("DELETE", "/v1/adapters"),
        ("TRACE", "/v1/adapters/x"),
        ("OPTIONS", "/v1/files"),
    ],
)
def test_one_replica_answers_what_changes_nothing(method: str, path: str) -> None:
    assert change_kind(method, path) is None


@pytest.mark.parametrize(
    ("method", "path", "kept", "thing"),
    [
        ("PUT", "/v1/adapters/x", True, "/v1/adapters/x"),
        ("DELETE", "/v1/adapters/x", True, "/v1/adapters/x"),
        ("PUT", "/v1/aliases/x", True, "/v1/aliases/x"),
        ("DELETE", "/v1/aliases/x", True, "/v1/aliases/x"),
        ("POST", "/v1/adapters", True, ""),
        ("POST", "/v1/adapters/x/pin", True, "/v1/adapters/x/pin"),
        ("POST", "/v1/adapters/x/unpin", True, "/v1/adapters/x/pin"),
        ("POST", "/v1/adapters/x/evict", False, ""),
    ],
)
def test_all_replicas_make_changes(method: str, path: str, kept: bool, thing: str) -> None:
    kind = change_kind(method, path)
    assert kind is not None
    assert (kind.kept, kind.thing) == (kept, thing)


@pytest.mark.parametrize("path", ["/v1/load_lora_adapter", "/unload_lora_adapter"])
def test_folders_of_one_machine_are_refused(path: str) -> None:
    with pytest.raises(BadRequest, match="PUT /v1/adapters"):
        change_kind("POST", path)


@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
@pytest.mark.parametrize("path", ["/v1/files", "/v1/files/file-1/content", "/v1/fine_tuning/jobs"])
def test_files_that_one_server_would_keep_are_refused(method: str, path: str) -> None:
    with pytest.raises(BadRequest, match="/v1/files and /v1/fine_tuning"):
        change_kind(method, path)


def test_every_route_by_which_a_server_changes_adapters_is_a_change() -> None:
    routes = [*admin.router.routes, *alias_routes.router.routes]
    known = [route for route in routes if isinstance(route, APIRoute)]
    changing = [(method, route.path) for route in known for method in route.methods or () if method != "GET"]
    assert len(changing) > 8
    missed = [each for each in changing if change_kind(*each) is None]
    assert missed == [("POST", "/v1/adapters/inspect")]


def test_a_new_adapter_is_kept_as_one_that_can_be_published_again() -> None:
    kind = change_kind("POST", "/v1/adapters")
    assert kind is not None
    body = b'{"name": "x", "versions": [{"digest": "d2"}, {"digest": "d1"}]}'
    thing, kept, names = as_kept(kind, request("POST", "/v1/adapters"), response("a", 201, body))
    assert (thing, kept.method, kept.target, names) == ("/v1/adapters/x", "PUT", "/v1/adapters/x", ("x@d2",))


def test_an_alias_is_kept_with_the_whole_digests_of_its_targets() -> None:
    kind = change_kind("PUT", "/v1/aliases/a")
    assert kind is not None
    body = b'{"name": "a", "targets": [{"adapter": "x@d1", "weight": 1}, {"adapter": "y", "weight": 2}]}'
    thing, _, names = as_kept(kind, request("PUT", "/v1/aliases/a"), response("a", 200, body))
    assert (thing, names) == ("/v1/aliases/a", ("x@d1", "y"))


def test_what_all_did_or_refused_is_answered_as_one_did() -> None:
    assert merge("PUT", [response("a", 201), response("b", 201)], True).begin.status == 201
    assert merge("PUT", [response("a", 422), response("b", 422)], True).begin.status == 422
    assert merge("DELETE", [response("a", 404), response("b", 200)], True).begin.status == 200  # gone everywhere


def test_the_answer_names_the_replicas_that_a_change_did_not_reach() -> None:
    results = [response("a", 201), response("b", 507), ServerLost("c", "closed"), RuntimeError()]
    with pytest.raises(PartlyApplied, match=r"1 of 4 .* not at b \(status 507\), c \(closed\), one that .* make it up"):
        merge("PUT", results, True)
    with pytest.raises(PartlyApplied, match=r"0 of 1 .* send it again"):
        merge("PUT", [ServerLost("c", "closed")], True)
