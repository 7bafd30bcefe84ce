"""A registry on a small base, polled by the test as the engine's loop polls it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from peft_folders import BASE, tensors, write
from torch import Tensor

from lora_serve.adapters.device_slots import DeviceSlots
from lora_serve.adapters.host_cache import HostCache
from lora_serve.adapters.registry import Loading, Registry
from lora_serve.adapters.store import Store
from lora_serve.errors import ServeError
from lora_serve.messages import AdapterInfo, Publish, Stats

BASE_NAME = "the-base"


class RegistryHarness:
    """A registry on a small base, with blocking versions of its operations."""

    def __init__(self, folder: Path, *, slots: int = 3, memory: int = 1 << 20) -> None:
        self.folder = folder
        self.device_slots = DeviceSlots(BASE, slots, torch.float32, torch.device("cpu"))
        self.cache = HostCache(memory)
        self.registry = Registry(
            Store(folder / "store"), self.cache, self.device_slots, BASE, torch.float32, lambda: None,
            max_bytes=1 << 20, base_name=BASE_NAME,
        )  # fmt: skip

    def wait_until(self, condition: Any) -> None:
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

    def publish(self, name: str, seed: int = 0, *, replace: bool = False) -> AdapterInfo:
        folder = write(self.folder / "store" / "staging" / f"{name}-{seed}", self.tensors(seed))
        info: AdapterInfo = self.run(lambda done: self.start_publish(name, folder, done, replace=replace))
        return info

    def start_publish(self, name: str, folder: Path, done: Any, *, replace: bool = False) -> None:
        self.registry.publish(Publish(name, str(folder), replace), done)

    @staticmethod
    def tensors(seed: int) -> dict[str, Tensor]:
        return tensors(seed)

    def load(self, digest: str) -> None:
        self.registry.request_load(digest)
        self.wait_until(lambda: not isinstance(self.registry.state(digest), Loading))

    def stats(self) -> Stats:
        stats = Stats()
        self.registry.fill_stats(stats)
        return stats
