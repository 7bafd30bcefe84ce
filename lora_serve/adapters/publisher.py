"""Publishes adapters: reads, checks and lowers a folder of PEFT files and stores it as a version of a name.

Blocking: called in the publishing thread, or before the engine's loop starts.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from lora_serve.adapters.adapter import BaseShape
from lora_serve.adapters.checkpoint import read
from lora_serve.adapters.digest import digest
from lora_serve.adapters.formats.dispatch import lower
from lora_serve.adapters.formats.report import complete
from lora_serve.adapters.store import Meta, Record, Store
from lora_serve.adapters.traits import traits
from lora_serve.errors import AdapterExists, TooLarge
from lora_serve.names import CONFIG, MODULES, POOLING, WEIGHTS


@dataclass(frozen=True)
class PublishedVersion:
    """A stored version and the name that refers to it."""

    name: str
    record: Record
    meta: Meta


class Publisher:
    """Checks folders of PEFT files and publishes them to the store.

    Args:
        max_bytes: largest weights file.
        most_elements: elements that fit into the host cache; a larger adapter could never be served.
    """

    def __init__(self, store: Store, base: BaseShape, *, max_bytes: int, most_elements: int) -> None:
        self._store = store
        self._base = base
        self._max_bytes = max_bytes
        self._most_elements = most_elements
        self._named = {name: record.digest for name, record in store.names().items()}  # name → digest, as on disk

    def publish(self, name: str, folder: Path, *, replace: bool, source: str = "") -> PublishedVersion:
        """Check and store a folder as a version of `name`; a folder in the store's staging is removed."""
        try:
            version, meta = self._check(folder)
            if name in self._named and not replace:
                raise AdapterExists(f"adapter {name} exists; PUT publishes a new version of it", param="name")
            record = self._store.publish(name, folder, version, meta, source)
            self._named[name] = version
            return PublishedVersion(name, record, self._store.meta(version))
        finally:
            self._remove_if_staged(folder)

    def inspect(self, folder: Path) -> tuple[str, Meta]:
        """Digest and metadata of the version that publishing would create; a folder in staging is removed."""
        try:
            return self._check(folder)
        finally:
            self._remove_if_staged(folder)

    def publish_unchanged(self, name: str, folder: Path, record: Record | None) -> PublishedVersion | None:
        """Publish one of the operator's folders; None if `record` was published from the same, unmodified files."""
        signature = sha256()
        for path in (folder / name for name in (CONFIG, WEIGHTS, MODULES, POOLING)):
            if path.exists():
                status = path.stat()
                signature.update(f"{path.resolve()} {status.st_size} {status.st_mtime_ns}\n".encode())
        if record is not None and record.source == signature.hexdigest():
            return None
        return self.publish(name, folder, replace=True, source=signature.hexdigest())

    def unpublish(self, name: str) -> None:
        self._store.unpublish(name)
        self._named.pop(name, None)

    def drop(self, version: str) -> None:
        """Delete a version, unless a name refers to it (again, by a later publish)."""
        if version not in self._named.values():
            self._store.drop(version)

    def _check(self, folder: Path) -> tuple[str, Meta]:
        checkpoint = read(folder, max_bytes=self._max_bytes)
        lowered = lower(checkpoint, self._base)
        elements = sum(tensor.numel() for tensor in lowered.tensors.values())
        if elements + lowered.vectors > self._most_elements:
            raise TooLarge(f"the adapter has {elements} numbers; --adapter-cache-memory holds {self._most_elements}")
        meta = Meta(
            created=time.time(),
            rank=max((delta.a.shape[0] for delta in lowered.deltas.values()), default=0),
            modules=len(lowered.deltas.keys() | lowered.overrides.keys()),
            elements=elements,
            vectors=lowered.vectors,
            file_bytes=checkpoint.file_bytes,
            report=complete(lowered, checkpoint, self._base),
            traits=traits(lowered, self._base),
        )
        return digest(lowered), meta

    def _remove_if_staged(self, folder: Path) -> None:
        if self._store.is_staged(folder):
            shutil.rmtree(folder, ignore_errors=True)
