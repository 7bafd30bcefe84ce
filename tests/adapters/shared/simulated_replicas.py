"""Replicas of one process whose threads run in an order that a seed chooses, and that are killed at any moment."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from failing_disk import QuickDisk
from memory_objects import MemoryBucket, MemoryObjects
from peft_folders import BASE
from registry_harness import BASE_NAME, InProcessCompiler, RegistryHarness

from lora_serve.adapters.lowering_job import LoweringContext
from lora_serve.adapters.shared.catalog import Catalog, decode_catalog
from lora_serve.adapters.shared.shared_store import SharedStore
from lora_serve.adapters.sharing import SharedOperations
from lora_serve.adapters.store.records import find_damage
from lora_serve.adapters.workers import Workers
from lora_serve.errors import ServeError
from lora_serve.messages import AliasTarget, DeleteAlias, Publish, PutAlias
from lora_serve.precondition import ANYTHING, Precondition
from lora_serve.request import AdapterUse

COMPILER = InProcessCompiler(LoweringContext(BASE, "a base", torch.float32, 1 << 20, 1 << 20))
ORDERED = ("load", "store", "change_shared")  # kinds of work that one thread does


class SimulatedWorkers(Workers):
    """Work and the handling of its results, one at a time when `poll` is called, in an order chosen by a seed."""

    def __init__(self, chosen: random.Random) -> None:
        self._chosen = chosen
        self._queued: dict[str, deque[tuple[Callable[[], Any], Callable[[Any], None]]]] = {}
        self._results: deque[Callable[[], None]] = deque()
        self.repeated: list[tuple[Callable[[], Any], Callable[[Any], None]]] = []

    def load(self, work: Any, done: Any) -> None:
        self._queue("load", work, done)

    def store(self, work: Any, done: Any) -> None:
        self._queue("store", work, done)

    def lower(self, work: Any, done: Any) -> None:
        self._queue("lower", work, done)

    def change_shared(self, work: Any, done: Any) -> None:
        self._queue("change_shared", work, done)

    def transfer(self, work: Any, done: Any) -> None:
        self._queue("transfer", work, done)

    def repeat(self, work: Any, done: Any, seconds: float, share: float = 1.0) -> None:
        self.repeated.append((work, done))

    def poll(self, timeout: float | None = None) -> bool:
        kinds = [kind for kind, queued in self._queued.items() if queued]
        if self._results and (not kinds or self._chosen.random() < 0.5):
            self._results.popleft()()
            return True
        if not kinds:
            return False
        kind = self._chosen.choice(kinds)
        queued = self._queued[kind]
        if kind not in ORDERED:
            queued.rotate(self._chosen.randrange(len(queued)))
        self._do(*queued.popleft())
        return True

    def do_shared(self) -> None:
        """Do the next change of the shared store, if there is one."""
        if queued := self._queued.get("change_shared"):
            self._do(*queued.popleft())

    def do_repeated(self) -> None:
        for work, done in self.repeated:
            self._do(work, done)

    def close(self) -> None:
        self._queued.clear()
        self._results.clear()

    def _queue(self, kind: str, work: Any, done: Any) -> None:
        self._queued.setdefault(kind, deque()).append((work, done))

    def _do(self, work: Callable[[], Any], done: Callable[[Any], None]) -> None:
        try:
            result = work()
        except ServeError as error:
            result = error
        self._results.append(lambda: done(result))


class Replica:
    """One replica; its store survives when it is killed."""

    def __init__(self, folder: Path, bucket: MemoryBucket, chosen: random.Random, *, unreliable: float = 0.0) -> None:
        self.workers = SimulatedWorkers(chosen)
        self.objects = MemoryObjects(bucket, chosen)
        self.objects.unreliable = unreliable
        self.harness = RegistryHarness(
            folder, keep_versions=3, disk=QuickDisk(), workers=self.workers, compiler=COMPILER
        )
        shared = SharedStore(
            self.objects, "a fingerprint", "tests", self.harness.store.followed(), pause=lambda seconds: None
        )
        self.shared = SharedOperations(
            shared,
            self.harness.operations,
            self.harness.registry,
            self.harness.residency,
            self.harness.publisher,
            self.workers,
            base_name=BASE_NAME,
            keep_versions=3,
        )
        self.notes: list[str] = []

    def start(self) -> None:
        self.notes = self.shared.start(lambda done, of: None)

    def kill(self) -> None:
        self.workers.close()
        self.harness.store.close()

    def run(self, steps: int = 2000) -> None:
        """Work until there is none."""
        while self.harness.registry.poll():
            steps -= 1
            assert steps, "it never ends"

    def look(self) -> None:
        """Read the catalog, and do what follows from it."""
        self.workers.do_repeated()
        self.run()

    def call(self, start: Callable[[Any], None]) -> Any:
        """Run a change to its end; returns its result, or raises its ServeError."""
        results: list[Any] = []
        start(results.append)
        self.run()
        assert len(results) == 1
        if isinstance(results[0], ServeError):
            raise results[0]
        return results[0]

    def publish(
        self, name: str, seed: int, *, replace: bool = True, precondition: Precondition = ANYTHING, **more: Any
    ) -> Any:
        operation = Publish(name, str(self.harness.upload(seed)), replace, precondition=precondition, **more)
        return self.call(lambda done: self.shared.publish(operation, done))

    def delete(self, name: str, precondition: Precondition = ANYTHING) -> Any:
        return self.call(lambda done: self.shared.delete(name, done, precondition))

    def put_alias(self, name: str, *targets: str, precondition: Precondition = ANYTHING) -> Any:
        operation = PutAlias(name, [AliasTarget(target) for target in targets], precondition=precondition)
        return self.call(lambda done: self.shared.put_alias(operation, done))

    def delete_alias(self, name: str) -> Any:
        return self.call(lambda done: self.shared.delete_alias(DeleteAlias(name), done))

    @property
    def served(self) -> dict[str, Any]:
        """Shared names → digests of their versions, or what the alias stands for; in memory and on the disk alike."""
        names = self.harness.residency.names
        stored = self.harness.store.names()
        found: dict[str, Any] = {}
        for name, record in names.items():
            assert stored[name].versions == record.versions
            if record.shared:
                found[name] = record.versions
        aliases = self.harness.residency.aliases.records
        assert self.harness.store.aliases() == aliases
        return found | {name: record for name, record in aliases.items() if record.shared}

    def check_whole(self) -> None:
        """Every version that is served is whole on the disk, and nothing else is there."""
        store, residency = self.harness.store, self.harness.residency
        named = {digest for record in residency.names.values() for digest in record.versions}
        assert {path.name for path in (self.harness.folder / "store" / "versions").iterdir()} == named
        for digest in named:
            assert not find_damage(store.folder(digest), store.version(digest))
        for name, record in residency.aliases.records.items():
            for target in record.targets:
                assert residency.find(AdapterUse(target.name, target.version or None)), name


def wanted(catalog: Catalog) -> dict[str, Any]:
    """What a replica serves that has followed a catalog."""
    return {**catalog.adapters, **catalog.aliases}


def newest(bucket: MemoryBucket) -> Catalog:
    return decode_catalog(bucket.history[-1])
