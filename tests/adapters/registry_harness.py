"""A registry on a small base, polled by the test as the engine's loop polls it."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft_folders import BASE, tensors, write
from torch import Tensor

from lora_serve.adapters.adapter import BaseShape
from lora_serve.adapters.device_slots import DeviceSlots
from lora_serve.adapters.lowering_job import LoweredVersion, LoweringContext, LoweringJob, run
from lora_serve.adapters.opening import open_store, publish_folders
from lora_serve.adapters.operations import AdapterOperations
from lora_serve.adapters.publisher import AdapterCompiler, Publisher
from lora_serve.adapters.registry import Registry
from lora_serve.adapters.residency import Budget, Residency
from lora_serve.adapters.store.disk import Disk
from lora_serve.adapters.store.store import Store
from lora_serve.adapters.workers import Workers
from lora_serve.errors import ServeError
from lora_serve.messages import AdapterInfo, Publish, Stats

BASE_NAME = "the-base"


class InProcessCompiler:
    """Lowers in the calling thread; the compiler's processes have tests of their own."""

    def __init__(self, context: LoweringContext) -> None:
        self.fingerprint = context.fingerprint
        self._context = context

    def lower(self, job: LoweringJob) -> LoweredVersion:
        return run(job, self._context)

    def lower_own(self, job: LoweringJob) -> LoweredVersion:
        return self.lower(job)


class RegistryHarness:
    """A registry on a small base, with blocking versions of its operations."""

    def __init__(
        self,
        folder: Path,
        *,
        slots: int = 3,
        memory: int = 1 << 20,
        device: int | None = None,
        training: int = 0,
        keep_versions: int = 1,
        dtype: torch.dtype = torch.float32,
        base: BaseShape = BASE,
        disk: Disk | None = None,
        workers: Workers | None = None,
        compiler: AdapterCompiler | None = None,
    ) -> None:
        self.folder = folder
        self.device_slots = DeviceSlots(base, slots, dtype, torch.device("cpu"))
        self.residency = Residency(Budget(slots, memory, device, training), keep_versions)
        self.store = Store(folder / "store", "a fingerprint", disk=disk)
        self.workers = workers = workers or Workers(lambda: None, compilers=2)
        compiler = compiler or InProcessCompiler(LoweringContext(base, "a base", dtype, 1 << 20, 1 << 20))
        self.publisher = publisher = Publisher(self.store, compiler, workers)
        self.registry = Registry(self.residency, self.device_slots, publisher, workers)
        self.operations = AdapterOperations(self.registry, self.residency, publisher, BASE_NAME)
        self.progress: list[tuple[int, int]] = []
        self.notes = open_store(
            self.registry, self.residency, publisher, BASE_NAME, lambda *now: self.progress.append(now)
        )

    def publish_folders(self, folder: Path, *, trust_settings: bool = False) -> list[str]:
        return publish_folders(
            self.registry,
            self.operations,
            self.residency,
            folder,
            lambda done, of: None,
            trust_settings=trust_settings,
        )

    def wait_until(self, condition: Callable[[], Any]) -> None:
        deadline = time.monotonic() + 10
        while not condition():
            self.registry.poll()
            assert time.monotonic() < deadline
            time.sleep(0.001)

    def run(self, start: Any) -> Any:
        """Run an operation that takes a callback; returns its result, or raises its ServeError."""
        results: list[Any] = []
        start(results.append)
        self.wait_until(lambda: results)
        if isinstance(results[0], ServeError):
            raise results[0]
        return results[0]

    def upload(self, seed: int, **config: Any) -> Path:
        """A folder of PEFT files in the store's staging, as an upload leaves it."""
        return write(self.store.staging / f"upload-{uuid.uuid4().hex}", self.tensors(seed), **config)

    def publish(self, name: str, seed: int = 0, *, replace: bool = False, **config: Any) -> AdapterInfo:
        folder = self.upload(seed, **config)
        info: AdapterInfo = self.run(lambda done: self.start_publish(name, folder, done, replace=replace))
        return info

    def start_publish(self, name: str, folder: Path, done: Any, *, replace: bool = False) -> None:
        self.operations.publish(Publish(name, str(folder), replace), done)

    @staticmethod
    def tensors(seed: int) -> dict[str, Tensor]:
        return tensors(seed)

    def load(self, digest: str) -> None:
        """Poll until a leased version is in memory or its load failed."""
        version = self.residency.versions[digest]
        self.wait_until(lambda: version.in_memory or version.failure is not None)

    def stats(self) -> Stats:
        stats = Stats()
        self.registry.fill_stats(stats)
        return stats
