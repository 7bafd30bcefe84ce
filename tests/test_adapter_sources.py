"""Sources of adapters: how an operator names them, and that nobody gets out of one."""

from __future__ import annotations

import pytest

from lora_serve.adapter_sources import find_location, parse_source, parse_sources
from lora_serve.errors import BadRequest

SOURCES = parse_sources(
    [
        "support=s3://bucket/adapters",
        "web=https://host.example/a/{name}.tar.gz",
        "org=hf://acme",
        "pinned=hf://acme/lora@v1/all",
        "disk=file:///srv/adapters/",
    ]
)


@pytest.mark.parametrize(
    ("source", "name", "place", "revision"),
    [
        ("s=s3://bucket/adapters", "poet", "bucket/adapters/poet", ""),
        ("s=s3://bucket", "poet", "bucket/poet", ""),
        ("s=gs://bucket/{name}/lora", "poet", "bucket/poet/lora", ""),
        ("s=https://h:8443/x/{name}.zip", "poet", "h:8443/x/poet.zip", ""),
        ("s=hf://acme", "poet", "acme/poet", ""),
        ("s=hf://acme/{name}@v1.0", "poet", "acme/poet", "v1.0"),
        ("s=hf://acme/loras@main/text", "poet", "acme/loras/text/poet", "main"),
        ("s=file:///srv/adapters/", "poet", "/srv/adapters/poet", ""),
    ],
)
def test_a_name_has_one_place_in_a_source(source: str, name: str, place: str, revision: str) -> None:
    location = parse_source(source).locate(name)
    assert (location.place, location.revision, location.label) == (place, revision, f"s/{name}")
    assert location.is_archive == place.endswith(".zip")


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ("s3://bucket/x", "is not NAME=URL"),
        ("a b=s3://bucket", "is not NAME=URL"),
        ("s=ftp://host/x", "is not a URL of"),
        ("s=/srv/adapters", "is not a URL of"),
        ("s=file://adapters", "absolute path"),
        ("s=file:///srv/../etc", "without query"),
        ("s=https://user:secret@host/x", "belong in the environment"),
        ("s=https://host/x?token=secret", "without query"),
        ("s=https:///x", "names no host"),
        ("s=https://host:0/x", "names no host"),
        ("s=https://{name}.host/x", "names no host"),
        ("s=s3:///x", "names no bucket"),
        ("s=s3://bucket/{name}/{name}", "only one {name}"),
        ("s=s3://bucket/{user}", "only one {name}"),
        ("s=hf://acme/lora@a b", "without query"),
        ("s=hf://{name}/lora", "no organisation"),
    ],
)
def test_what_is_no_source_is_refused_with_the_reason(given: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason.replace("{", r"\{")) as error:
        parse_source(given)
    assert "secret" not in str(error.value).replace(given, "")


def test_two_sources_need_two_names_in_the_environment_too() -> None:
    with pytest.raises(ValueError, match="two sources are called my_s3"):
        parse_sources(["my-s3=s3://a", "my_S3=s3://b"])


@pytest.mark.parametrize(
    ("given", "place"),
    [
        ("support", "bucket/adapters/poet"),
        ("support/other", "bucket/adapters/other"),
        ("support/team/2026-11/run_3", "bucket/adapters/team/2026-11/run_3"),
        ("support/packed.tar.gz", "bucket/adapters/packed.tar.gz"),
        ("s3://bucket/adapters/other/", "bucket/adapters/other"),
        ("https://host.example/a/other.tar.gz", "host.example/a/other.tar.gz"),
        ("hf://acme/other", "acme/other"),
        ("hf://acme/other@abc", "acme/other"),
        ("pinned/other", "acme/lora/all/other"),
        ("file:///srv/adapters/other", "/srv/adapters/other"),
    ],
)
def test_an_admin_may_name_a_source_a_path_in_it_or_its_url(given: str, place: str) -> None:
    assert find_location(SOURCES, given, "poet").place == place


def test_a_hub_source_without_a_revision_takes_an_admins() -> None:
    assert find_location(SOURCES, "hf://acme/other@abc", "poet").revision == "abc"
    assert find_location(SOURCES, "hf://acme/lora@v1/all/x", "poet").source == "org"  # the first that has it


@pytest.mark.parametrize(
    "given",
    [
        "nowhere",
        "s3://bucket/other/poet",
        "s3://bucket/adapters",
        "s3://bucket/adapters-of-others/poet",
        "s3://bucket/adapters/../others/poet",
        "s3://bucket/adapters//poet",
        "support/../others",
        "support/a/../../others",
        "support/%2e%2e/others",
        "support/..",
        "support/.hidden",
        "support/a\\b",
        "support/a?versionId=1",
        "support/a#b",
        "support/a\nb",
        "support/" + "/".join("abcdefghi"),
        "support/",
        "web/a/b",
        "http://host.example/a/other.tar.gz",
        "https://host.example/b/other.tar.gz",
        "https://host.example/a/.tar.gz",
        "https://host.example/a/x@evil.example/.tar.gz",
        "http://169.254.169.254/latest/meta-data",
        "pinned/other@v2",
        "file:///etc/passwd",
        "file:///srv/adapters/../../etc",
    ],
)
def test_nothing_outside_of_the_sources_can_be_named(given: str) -> None:
    with pytest.raises(BadRequest) as error:
        find_location(SOURCES, given, "poet")
    assert error.value.param == "source"


def test_a_server_without_sources_says_so() -> None:
    with pytest.raises(BadRequest, match="the server has none"):
        find_location([], "s3://bucket/adapters/poet", "poet")
