"""A stub engine that keeps adapters in a dict, and an app on top of it, for tests of the admin routes."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from collections.abc import AsyncGenerator, Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import msgspec
from fastapi import FastAPI

from lora_serve.api.app import create_app
from lora_serve.api.key_file import Keys
from lora_serve.config import ServeConfig
from lora_serve.errors import AdapterBusy, AdapterExists, AdapterNotFound
from lora_serve.messages import (
    AdapterFiles,
    AdapterInfo,
    AdapterVersion,
    AliasInfo,
    DeleteAdapter,
    DeleteAlias,
    DescribeAdapter,
    DescribeAlias,
    Drain,
    EngineInfo,
    EvictAdapter,
    Inspect,
    Inspection,
    ListAdapters,
    ListAliases,
    ListNames,
    LoadAdapter,
    LocateFiles,
    Operation,
    PinAdapter,
    Publish,
    PutAlias,
    Stats,
    UnloadAdapter,
    Update,
)
from lora_serve.request import Event, Finished, Request

CONFIG = json.dumps({"peft_type": "LORA", "r": 8}).encode()
WEIGHTS = bytes(range(256)) * 40
REPORT = {"method": "LoRA", "modules": "2 of 7", "touched": {"linear": "2 of 7"}, "warnings": ["another base"]}
FILES = {"adapter_config.json": CONFIG, "adapter_model.safetensors": WEIGHTS}


class StubAdminEngine:
    """Keeps published adapters by name, and the files of each publish and inspection.

    `failure`: raised by the next call.
    """

    def __init__(self) -> None:
        self.alive = True
        self.ready = True
        self.restarts = 0
        self.stats = Stats()
        self.info: EngineInfo | None = None
        self.adapters: dict[str, AdapterInfo] = {}
        self.sources: dict[str, str] = {}
        self.aliases: dict[str, AliasInfo] = {}
        self.files: AdapterFiles | None = None  # of every version
        self.may_pin = True
        self.published: list[dict[str, bytes]] = []
        self.inspected: list[dict[str, bytes]] = []
        self.operations: list[Operation] = []
        self.failure: Exception | None = None
        self.observers: list[Callable[[Update], None]] = []

    def observe(self, observer: Callable[[Update], None]) -> None:
        self.observers.append(observer)

    async def generate(self, request: Request) -> AsyncGenerator[Event, None]:
        yield Finished(request.id, "length")

    async def call(self, operation: Operation) -> Any:
        self.operations.append(operation)
        if isinstance(operation, Publish | Inspect):
            found = self.published if isinstance(operation, Publish) else self.inspected
            root = Path(operation.folder)
            found.append({str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()})
        if self.failure is not None:
            raise self.failure
        return msgspec.to_builtins(self._do(operation))

    def _do(self, operation: Operation) -> Any:
        match operation:
            case Publish(name=name):
                operation.precondition.check(self._etag(name))
                if name in self.adapters and not operation.replace:
                    raise AdapterExists(f"{name} exists", param="name")
                versions = self.adapters[name].versions if name in self.adapters else []
                fresh = AdapterVersion(f"digest{len(versions)}", 1.0, 8, 2, 10_240, 10_240, ["disk"], 0, report=REPORT)
                self.adapters[name] = AdapterInfo(name, False, [fresh, *versions])
                self.sources[name] = operation.source
                return self.adapters[name]
            case Inspect():
                return Inspection("digest", 8, 2, 10_240, 10_240, REPORT)
            case ListAdapters(after):
                return [self.adapters[name] for name in sorted(self.adapters) if name > after][:2]
            case PinAdapter(name=name):
                if not self.may_pin:
                    raise AdapterBusy("no slot would be left", param="name")
                self.adapters[name] = msgspec.structs.replace(self._find(name), pinned=operation.pinned)
                return self.adapters[name]
            case DeleteAdapter(name=name) | UnloadAdapter(name=name):
                self._find(name)
                if isinstance(operation, DeleteAdapter):
                    operation.precondition.check(self._etag(name))
                return self.adapters.pop(name)
            case LocateFiles(name=name):
                self._find(name)
                return self.files
            case PutAlias(name=name):
                operation.precondition.check(self.aliases[name].etag if name in self.aliases else None)
                etag = f"tag{len(self.operations)}"
                self.aliases[name] = AliasInfo(name, operation.targets, operation.sticky or None, etag, 3.0)
                return self.aliases[name]
            case ListAliases(after):
                return [self.aliases[name] for name in sorted(self.aliases) if name > after][:2]
            case ListNames(most):
                return [*self.adapters, *self.aliases][:most]
            case DescribeAlias(name=name) | DeleteAlias(name=name):
                if name not in self.aliases:
                    raise AdapterNotFound(f"alias {name[:100]} does not exist", param="name")
                if isinstance(operation, DescribeAlias):
                    return self.aliases[name]
                operation.precondition.check(self.aliases[name].etag)
                return self.aliases.pop(name)
            case DescribeAdapter(name=name) | LoadAdapter(name=name) | EvictAdapter(name=name):
                return self._find(name)
            case Drain():
                return None

    def _etag(self, name: str) -> str | None:
        return self.adapters[name].versions[0].digest if name in self.adapters else None

    def _find(self, name: str) -> AdapterInfo:
        if name not in self.adapters:
            raise AdapterNotFound(f"adapter {name[:100]} does not exist", param="adapter")
        return self.adapters[name]


def engine_info(store: Path, **more: Any) -> EngineInfo:
    """What a ready engine reports of itself."""
    given: dict[str, Any] = {
        "model": "base", "root": "root", "device": "cpu", "dtype": "float32", "kernels": "none", "max_model_len": 64,
        "vocab_size": 258, "eos_token_ids": (), "kv_tokens": 1000, "adapter_slots": 4, "adapters": 0, "parameters": 1,
        "created": 7, "store": str(store),
    }  # fmt: skip
    return EngineInfo(**(given | more))


class StubAdminApp:
    """An app on a `StubAdminEngine`, and a client."""

    def __init__(self, store: Path, keys: Keys | None = None, **options: Any) -> None:
        self.engine = StubAdminEngine()
        self.engine.info = engine_info(store)
        self.config = ServeConfig(model="base", store=store, **options)
        self.app: FastAPI = create_app(
            self.engine, SimpleNamespace(chat_template=None, get_vocab=dict), self.config, keys
        )
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        self.client = httpx.AsyncClient(transport=transport, base_url="http://localhost")

    async def ask(self, method: str, path: str, key: str | None = None, **given: Any) -> httpx.Response:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        headers |= given.pop("headers", {})
        return await self.client.request(method, path, headers=headers, **given)

    async def upload(
        self, files: Mapping[str, bytes] = FILES, name: str | None = "poet", path: str = "/v1/adapters"
    ) -> httpx.Response:
        """A POST of single files, or a PUT where the path is an adapter's."""
        parts: list[tuple[str, Any]] = [("files", (file, content)) for file, content in files.items()]
        return await self.send(parts, name, path)

    async def send(
        self, parts: list[tuple[str, Any]], name: str | None = "poet", path: str = "/v1/adapters"
    ) -> httpx.Response:
        fields = [] if name is None else [("name", (None, name.encode()))]
        method = "POST" if path in ("/v1/adapters", "/v1/adapters/inspect") else "PUT"
        return await self.client.request(method, path, files=[*fields, *parts])

    @property
    def leftovers(self) -> list[Path]:
        """Files in staging; empty unless an upload is running."""
        staging = Path(str(self.config.store)) / "staging"
        return sorted(staging.iterdir()) if staging.exists() else []


def refusal(answer: httpx.Response) -> tuple[int, str | None, str]:
    """Status, field and message of an error; asserts that it has OpenAI's shape."""
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return answer.status_code, error["param"], error["message"]


def tar(files: Mapping[str, bytes | tarfile.TarInfo], mode: str = "w:gz") -> bytes:
    """A tar of files; a `TarInfo` is added unchanged, without content."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode=mode) as archive:  # type: ignore[call-overload]
        for name, content in files.items():
            if isinstance(content, tarfile.TarInfo):
                archive.addfile(content)
                continue
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return packed.getvalue()


def packed_zip(files: Mapping[str, bytes]) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return packed.getvalue()


def adapter_folder(path: Path, **more: bytes) -> Path:
    """A new folder with an adapter's files and some more."""
    path.mkdir(parents=True)
    for name, content in (FILES | more).items():
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_bytes(content)
    return path
