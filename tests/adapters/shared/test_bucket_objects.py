"""A shared store in a bucket, against moto's server, and servers that ignore conditions, which the probe finds."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import boto3
import pytest
from careless_bucket import CarelessBucket
from moto.server import ThreadedMotoServer

from lora_serve.adapters.shared.bucket_objects import PART, BucketObjects
from lora_serve.adapters.shared.shared_location import open_objects
from lora_serve.adapters.shared.shared_objects import ObjectConflict, ObjectsUnreachable, SharedObjects
from lora_serve.adapters.shared.store_probe import check_preconditions
from lora_serve.errors import StoreUnusable


@pytest.fixture(scope="module")
def moto() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    yield "http://{}:{}".format(*server.get_host_and_port())
    server.stop()


@pytest.fixture
def credentials(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name, value in (("ACCESS_KEY_ID", "key"), ("SECRET_ACCESS_KEY", "secret"), ("DEFAULT_REGION", "us-east-1")):
        monkeypatch.setenv(f"AWS_{name}", value)
    return monkeypatch


@pytest.fixture
def bucket(moto: str, credentials: pytest.MonkeyPatch) -> SharedObjects:
    credentials.setenv("AWS_ENDPOINT_URL", moto)
    boto3.client("s3").create_bucket(Bucket="replicas")
    return open_objects("s3://replicas/some/prefix")


def test_a_bucket_that_compares_passes_the_probe(bucket: SharedObjects) -> None:
    check_preconditions(bucket)
    listed = boto3.client("s3").list_objects_v2(Bucket="replicas", Prefix="some/prefix/probes")
    assert listed["KeyCount"] == 0


@pytest.mark.parametrize(
    ("honours", "message"),
    [
        ((), r"it makes an object that there is already \(If-None-Match: \*\)"),
        (("If-None-Match",), r"it changes an object that has changed \(If-Match\)"),
        (("If-Match",), "it makes an object that there is already"),
        (("If-Match", "If-None-Match"), ""),
    ],
)
def test_a_bucket_that_overwrites_silently_is_refused(
    honours: tuple[str, ...], message: str, credentials: pytest.MonkeyPatch
) -> None:
    with CarelessBucket(*honours) as server:
        credentials.setenv("AWS_ENDPOINT_URL", server.url)
        objects = BucketObjects("replicas", "prefix")
        if message:
            with pytest.raises(StoreUnusable, match=message):
                check_preconditions(objects)
        else:
            check_preconditions(objects)
        assert not server.objects


def test_writers_that_race_lose_nothing_in_a_bucket(bucket: SharedObjects) -> None:
    bucket.create("number", b"0")

    def count(_: int) -> None:
        for _ in range(4):
            while True:
                found = bucket.read("number")
                assert found is not None
                assert found.data is not None
                try:
                    bucket.replace("number", str(int(found.data) + 1).encode(), found.tag)
                    break
                except ObjectConflict:
                    continue

    with ThreadPoolExecutor(4) as writers:
        list(writers.map(count, range(4)))
    found = bucket.read("number")
    assert found is not None
    assert found.data == b"16"
    assert bucket.read("number", found.tag) == (None, found.tag)
    bucket.remove("number")
    assert bucket.read("number") is None
    with pytest.raises(ObjectConflict):
        bucket.replace("number", b"1", found.tag)


def test_files_of_a_bucket_come_and_go_whole(bucket: SharedObjects, tmp_path: Path) -> None:
    content = bytes(range(256)) * (PART // 256) + b"the rest"
    (tmp_path / "source").write_bytes(content)
    bucket.upload("contents/digest/upload/adapter_model.safetensors", tmp_path / "source")
    (listed,) = bucket.files("contents")
    assert listed.key == "contents/digest/upload/adapter_model.safetensors"
    bucket.download(listed.key, tmp_path / "copy", len(content))
    assert (tmp_path / "copy").read_bytes() == content
    bucket.remove_file(listed.key)
    assert list(bucket.files("contents")) == []
    with pytest.raises(FileNotFoundError):
        bucket.download(listed.key, tmp_path / "none", 10)


def test_what_keeps_a_bucket_from_being_reached_is_said(bucket: SharedObjects, credentials: pytest.MonkeyPatch) -> None:
    with pytest.raises(ObjectsUnreachable, match="the bucket does not exist"):
        open_objects("s3://nobodys").create("object", b"")
    credentials.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(ObjectsUnreachable, match="Error performing GET"):
        open_objects("s3://replicas").read("object")
