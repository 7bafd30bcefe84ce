"""Adapters in Google Cloud Storage: gcsfs against a few answers of the JSON API; no emulator can be installed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from adapter_bytes import MANY, PACKED, WANTED
from fetching import Fetching
from web_server import Handler, WebServer

from lora_serve.errors import AdapterNotFound
from lora_serve.sources import fetch

pytest.importorskip("gcsfs")
OBJECTS = {f"prod/poet/{name}": content for name, content in MANY.items()} | {"prod/packed.zip": PACKED}


def describe(name: str) -> dict[str, object]:
    return {
        "kind": "storage#object", "name": name, "bucket": "adapters", "size": str(len(OBJECTS[name])), "etag": "e",
        "generation": "1", "updated": "2026-01-01T00:00:00.000Z", "timeCreated": "2026-01-01T00:00:00.000Z",
    }  # fmt: skip


def listing(answer: Handler) -> None:
    query = {key: values[0] for key, values in parse_qs(urlsplit(answer.path).query).items()}
    prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
    items, prefixes = [], set()
    for name in OBJECTS:
        if name.startswith(prefix):
            rest = name[len(prefix) :]
            if delimiter and delimiter in rest:
                prefixes.add(prefix + rest.partition(delimiter)[0] + delimiter)
            else:
                items.append(describe(name))
    body = {"kind": "storage#objects", "items": items, "prefixes": sorted(prefixes)}
    answer.send(json.dumps(body).encode(), Content_Type="application/json")


def answer_object(answer: Handler) -> None:
    name = unquote(urlsplit(answer.path).path).partition("/o/")[2]
    if "alt=media" not in answer.path:
        answer.send(json.dumps(describe(name)).encode(), Content_Type="application/json")
        return
    first, _, last = answer.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
    answer.send(OBJECTS[name][int(first) : int(last) + 1 if last else None], 206 if last else 200)


@pytest.fixture
def storage(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(fetch, "FIRST_PAUSE", 0.01)
    with WebServer() as web:
        web.answers["/storage/v1/b/adapters/o"] = listing
        for name in OBJECTS:
            for path in ("/storage/v1/b/adapters/o", "/download/storage/v1/b/adapters/o"):
                web.answers[f"{path}/{name}"] = answer_object
        options = {"endpoint_url": f"http://{web.host}", "token": "anon", "project": "p"}
        monkeypatch.setenv("LORA_SERVE_SOURCE_OPTIONS_G", json.dumps(options))
        yield


@pytest.mark.usefixtures("storage")
def test_folders_and_archives_of_a_bucket_are_fetched(tmp_path: Path) -> None:
    source = Fetching("g=gs://adapters/prod", tmp_path)
    source.get()
    assert source.files == WANTED
    source.get("packed.zip")
    assert source.files == {"archive": PACKED}
    with pytest.raises(AdapterNotFound):
        source.get("nobody")
