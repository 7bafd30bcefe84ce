"""Background threads that load and publish adapters; the engine loop collects their results with `poll`."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from queue import Empty, SimpleQueue
from typing import TypeVar

import torch

from lora_serve.errors import EngineFault, ServeError

T = TypeVar("T")


class Loader:
    """Two threads: one loads adapters for waiting requests, one publishes, so that publishing never delays a load.

    Args:
        wake: called from a thread when a result is ready for `poll`.
    """

    def __init__(self, wake: Callable[[], None]) -> None:
        # One compute thread each: casting an adapter must not take cores from a running step.
        self._loads = ThreadPoolExecutor(1, "adapter-load", initializer=torch.set_num_threads, initargs=(1,))
        self._publishes = ThreadPoolExecutor(1, "adapter-publish", initializer=torch.set_num_threads, initargs=(1,))
        self._finished: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._wake = wake

    def load(self, work: Callable[[], T], done: Callable[[T | ServeError], None]) -> None:
        """Run `work` in the loading thread; `poll` passes its result, or error, to `done`."""
        self._submit(self._loads, work, done)

    def publish(self, work: Callable[[], T], done: Callable[[T | ServeError], None]) -> None:
        """Run `work` in the publishing thread, in the order of calls; `done` as in `load`."""
        self._submit(self._publishes, work, done)

    def poll(self) -> bool:
        """Run the callbacks of finished work, in the calling thread; returns whether there were any."""
        any_ = False
        while True:
            try:
                finish = self._finished.get_nowait()
            except Empty:
                return any_
            finish()
            any_ = True

    def close(self) -> None:
        """Wait for running work and drop queued work."""
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
            except Exception as error:  # a bug or a disk fault: report it, keep the thread alive
                result = EngineFault(f"the adapter could not be read or stored ({type(error).__name__})")
            self._finished.put(lambda: done(result))
            self._wake()

        executor.submit(run)
