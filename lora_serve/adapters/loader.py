"""Slow work beside the engine's loop: threads do it, their results wait until the loop picks them up."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from queue import Empty, SimpleQueue
from typing import TypeVar

import torch

from lora_serve.errors import EngineFault, ServeError

T = TypeVar("T")


class Loader:
    """Two threads: one reads adapters for waiting requests, the other publishes, so that uploads never delay a load.

    Args:
        wake: called from a thread when a result is there to be picked up.
    """

    def __init__(self, wake: Callable[[], None]) -> None:
        # One compute thread each: casting an adapter must not take the cores from a running step.
        self._loads = ThreadPoolExecutor(1, "adapter-load", initializer=torch.set_num_threads, initargs=(1,))
        self._publishes = ThreadPoolExecutor(1, "adapter-publish", initializer=torch.set_num_threads, initargs=(1,))
        self._finished: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._wake = wake

    def load(self, work: Callable[[], T], done: Callable[[T | ServeError], None]) -> None:
        """Have the reading thread do `work`; `done` gets its result in the loop's thread."""
        self._submit(self._loads, work, done)

    def publish(self, work: Callable[[], T], done: Callable[[T | ServeError], None]) -> None:
        """The same in the publishing thread, in the order of calls."""
        self._submit(self._publishes, work, done)

    def poll(self) -> bool:
        """Run what waits to be run in the loop's thread; whether there was anything."""
        any_ = False
        while True:
            try:
                finish = self._finished.get_nowait()
            except Empty:
                return any_
            finish()
            any_ = True

    def close(self) -> None:
        """Let what runs finish, drop what waits."""
        for executor in (self._loads, self._publishes):
            executor.shutdown(wait=True, cancel_futures=True)

    def _submit(
        self, executor: ThreadPoolExecutor, work: Callable[[], T], done: Callable[[T | ServeError], None]
    ) -> None:
        def run() -> None:
            result: T | ServeError
            try:
                result = work()
            except ServeError as error:
                result = error
            except Exception as error:  # a fault of ours or the disk's: the caller learns of it, the thread lives
                result = EngineFault(f"the adapter could not be read or stored ({type(error).__name__})")
            self._finished.put(lambda: done(result))
            self._wake()

        executor.submit(run)
