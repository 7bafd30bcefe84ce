"""What an endpoint reads in a request, and what it passes on."""

from __future__ import annotations

import pytest

from lora_serve.replicas.forwarding import adapters_in, passed_on, without_base


@pytest.mark.parametrize(
    ("body", "adapters"),
    [
        (b'{"adapter": "x", "prompt": "a"}', ("x",)),
        (b'{"adapter": "x@3fa4", "model": "demo"}', ("x",)),
        (b'{"adapter": {"name": "x", "weight": 0.5}}', ("x",)),
        (b'{"adapter": [{"name": "y", "weight": 0.5}, {"name": "x"}]}', ("x", "y")),
        (b'{"adapter": null, "model": "x"}', ("x",)),
        (b'{"model": "demo:x"}', ("demo:x",)),
        (b'{"model": 3}', ()),
        (b'{"adapter": [3, {"name": 4}, null]}', ()),
        (b"[1]", ()),
        (b"", ()),
        (b'{"adapter": "x', ()),
        (b'{"a":' * 100_000, ()),
        (b"\xff", ()),
    ],
)
def test_the_adapters_are_read_out_of_the_body(body: bytes, adapters: tuple[str, ...]) -> None:
    assert adapters_in(body) == adapters


def test_the_base_is_no_adapter() -> None:
    assert without_base(("demo", "demo:x", "/models/demo", "y"), ["demo", "/models/demo"]) == ("x", "y")


def test_headers_of_a_connection_are_not_passed_on() -> None:
    given = [
        ("Connection", "close, X-Secret"),
        ("X-Secret", "1"),
        ("Transfer-Encoding", "chunked"),
        ("Host", "a"),
        ("Date", "today"),
        ("Server", "uvicorn"),
        ("Retry-After", "3"),
        ("x-ratelimit-limit-requests", "5"),
        ("Set-Cookie", "a=1"),
        ("Set-Cookie", "b=2"),
    ]
    assert passed_on(given) == (
        ("Retry-After", "3"),
        ("x-ratelimit-limit-requests", "5"),
        ("Set-Cookie", "a=1"),
        ("Set-Cookie", "b=2"),
    )
