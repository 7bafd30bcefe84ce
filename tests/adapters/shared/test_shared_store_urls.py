"""URLs of shared stores: which are taken, and what is said of the others."""

from __future__ import annotations

import pytest

from lora_serve.config import ServeConfig, parse_shared_store


@pytest.mark.parametrize(
    ("url", "place"),
    [
        ("s3://bucket", ("s3", "bucket")),
        ("s3://bucket/some/prefix/", ("s3", "bucket/some/prefix")),
        ("file:///srv/shared", ("file", "/srv/shared")),
    ],
)
def test_places(url: str, place: tuple[str, str]) -> None:
    assert parse_shared_store(url) == place
    assert ServeConfig(model="base", shared_store=url).shared_store == url


@pytest.mark.parametrize(
    "url",
    ["/srv/shared", "gs://bucket", "s3://", "s3:///x", "file://srv", "s3://key@bucket", "s3://b/../c", "s3://b?x"],
)
def test_other_urls_are_refused(url: str) -> None:
    with pytest.raises(ValueError, match="shared_store"):
        ServeConfig(model="base", shared_store=url)
