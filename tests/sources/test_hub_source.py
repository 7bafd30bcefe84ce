"""Adapters on the Hugging Face hub: a mirror on this machine, which `HF_ENDPOINT` would name, asked by its library."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from adapter_bytes import FILES, MANY, PACKED, WANTED, WEIGHTS
from fetching import Fetching
from web_server import Handler, WebServer

from lora_serve.adapter_sources import parse_source
from lora_serve.errors import AdapterInvalid, AdapterNotFound, Unavailable
from lora_serve.sources import fetch
from lora_serve.sources.fetcher import Fetcher

OLD, NEW = "a" * 40, "b" * 40


class Mirror(WebServer):
    """A hub with the repository acme/poet, in which one file is in LFS."""

    def __init__(self) -> None:
        super().__init__()
        self.sha256 = hashlib.sha256(WEIGHTS).hexdigest()
        for revision, commit in (("main", NEW), (NEW, NEW), ("v1", OLD), (OLD, OLD)):
            self.answers[f"/api/models/acme/poet/revision/{revision}"] = self.describe(commit)
        self.answers["/api/models/acme/poet"] = self.describe(NEW)
        for commit in (OLD, NEW):
            self.add(commit, "", MANY)
            self.add(commit, "all/other", FILES)
            self.add(commit, "packed", {"poet.tar.gz": PACKED})

    def describe(self, commit: str) -> bytes:
        return json.dumps({"id": "acme/poet", "sha": commit, "siblings": [], "private": False}).encode()

    def add(self, commit: str, folder: str, files: dict[str, bytes]) -> None:
        listings: dict[str, list[dict[str, object]]] = {folder: []}
        for name, content in files.items():
            path = f"{folder}/{name}".lstrip("/")
            parent = path.rpartition("/")[0]
            if parent not in listings:
                listings[folder].append({"type": "directory", "path": parent, "oid": "0" * 40, "size": 0})
                listings[parent] = []
            entry: dict[str, object] = {"type": "file", "path": path, "oid": "1" * 40, "size": len(content)}
            if name.endswith(".safetensors"):
                entry["lfs"] = {"oid": self.sha256, "size": len(content), "pointerSize": 134}
            listings[parent].append(entry)
            self.answers[f"/acme/poet/resolve/{commit}/{path}"] = content
        for parent, entries in listings.items():
            self.answers[f"/api/models/acme/poet/tree/{commit}/{parent}".rstrip("/")] = json.dumps(entries).encode()


@pytest.fixture
def mirror(monkeypatch: pytest.MonkeyPatch) -> Iterator[Mirror]:
    monkeypatch.setattr(fetch, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with Mirror() as mirror:
        options = {"endpoint": f"http://{mirror.host}", "token": "hush"}
        monkeypatch.setenv("LORA_SERVE_SOURCE_OPTIONS_HUB", json.dumps(options))
        yield mirror  # type: ignore[misc]


def test_a_repository_is_an_adapter(mirror: Mirror, tmp_path: Path) -> None:
    hub = Fetching("hub=hf://acme", tmp_path)
    assert hub.get().revision == NEW
    assert hub.files == WANTED
    assert mirror.asked[0][1]["authorization"] == "Bearer hush"


def test_a_revision_is_resolved_once_and_its_commit_read(mirror: Mirror, tmp_path: Path) -> None:
    hub = Fetching("hub=hf://acme/{name}@v1", tmp_path)
    assert hub.get().revision == OLD
    assert hub.files == WANTED
    assert [path for path in mirror.paths if "resolve" in path and OLD not in path] == []


def test_a_folder_of_a_repository_is_an_adapter(mirror: Mirror, tmp_path: Path) -> None:
    hub = Fetching("hub=hf://acme/poet/all", tmp_path)
    hub.get("other")
    assert hub.files == FILES


def test_an_archive_in_a_repository_is_fetched(mirror: Mirror, tmp_path: Path) -> None:
    hub = Fetching("hub=hf://acme/poet/packed/{name}.tar.gz", tmp_path)
    hub.get()
    assert hub.files == {"archive": PACKED}


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("hub=hf://acme", "nobody"),
        ("hub=hf://acme/{name}@v9", "poet"),
        ("hub=hf://acme/poet/all", "nobody"),
        ("hub=hf://acme/poet/packed/{name}.zip", "poet"),
    ],
)
def test_what_is_not_there_is_not_found(mirror: Mirror, tmp_path: Path, source: str, name: str) -> None:
    def missing(code: str) -> object:
        return lambda answer: answer.send(b'{"error": "it is not there"}', 404, X_Error_Code=code)

    mirror.answers["/api/models/acme/nobody"] = missing("RepoNotFound")  # type: ignore[assignment]
    mirror.answers["/api/models/acme/poet/revision/v9"] = missing("RevisionNotFound")  # type: ignore[assignment]
    mirror.answers[f"/api/models/acme/poet/tree/{NEW}/all/nobody"] = missing("EntryNotFound")  # type: ignore[assignment]
    with pytest.raises(AdapterNotFound, match="source hub does not have it"):
        Fetching(source, tmp_path).get(name)


def test_weights_of_another_hash_are_not_taken(mirror: Mirror, tmp_path: Path) -> None:
    mirror.answers[f"/acme/poet/resolve/{NEW}/adapter_model.safetensors"] = WEIGHTS[::-1]
    with pytest.raises(Unavailable, match=r"does not have the announced SHA-256 \(5 attempts\)"):
        Fetching("hub=hf://acme", tmp_path).get()


def test_a_repository_of_a_whole_model_says_so(mirror: Mirror, tmp_path: Path) -> None:
    mirror.add(NEW, "", {"adapter_config.json": b"{}", "model.safetensors": b""})
    with pytest.raises(AdapterInvalid, match=r"adapter_model\.safetensors is missing; there is model\.safetensors"):
        Fetching("hub=hf://acme", tmp_path).get()


async def test_a_mirror_is_named_in_the_environment(
    mirror: Mirror, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LORA_SERVE_SOURCE_OPTIONS_HUB")
    monkeypatch.setenv("HF_ENDPOINT", f"http://{mirror.host}")
    monkeypatch.setenv("HF_TOKEN", "hush")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    fetcher = Fetcher(["hf"])
    location = parse_source("hub=hf://acme").locate("poet")
    done = await fetcher.fetch(location, str(tmp_path), most=1 << 30, seconds=20, limit=20, on_progress=lambda *_: None)
    await fetcher.close()
    assert (done.revision, (tmp_path / "adapter_model.safetensors").read_bytes()) == (NEW, WEIGHTS)
    assert dict(mirror.asked)["/api/models/acme/poet"]["authorization"] == "Bearer hush"


def test_a_hub_that_refuses_is_asked_once(mirror: Mirror, tmp_path: Path) -> None:
    def gated(answer: Handler) -> None:
        answer.send(b'{"error": "hush"}', 403, X_Error_Code="GatedRepo")

    mirror.answers["/api/models/acme/poet"] = gated
    with pytest.raises(Unavailable, match=r"source hub cannot be read: HTTP 403$") as error:
        Fetching("hub=hf://acme", tmp_path).get()
    assert "hush" not in error.value.message
    assert len(mirror.asked) == 1
