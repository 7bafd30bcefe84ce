"""Background threads for slow work on adapters; the engine loop collects their results with `poll`."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from queue import Empty, SimpleQueue
from typing import TypeVar

from lora_serve.errors import EngineFault, ServeError, Unavailable

T = TypeVar("T")
Work = Callable[[], T]
Done = Callable[[T | ServeError], None]

TRANSFERS = 4  # of versions from and to a shared store at the same time
BUSY_SHARE = 0.02  # of a thread's time that repeated work may take

log = logging.getLogger(__name__)


class Workers:
    """Threads that load adapters, change the store and a shared one, wait for compilers, begin and save training runs.

    None delays another kind.

    Args:
        wake: called from a thread when a result is ready for `poll`.
        compilers: adapters that are lowered at the same time.
    """

    def __init__(self, wake: Callable[[], None], compilers: int) -> None:
        self._loads = ThreadPoolExecutor(1, "adapter-load")
        self._store = ThreadPoolExecutor(1, "adapter-store")  # one: changes take effect in the order of calls
        self._compilers = ThreadPoolExecutor(compilers, "adapter-compile")
        self._shared = ThreadPoolExecutor(1, "shared-store")  # one: changes are made in the order of calls
        self._transfers = ThreadPoolExecutor(TRANSFERS, "shared-transfer")
        self._runs = ThreadPoolExecutor(1, "training-files")
        self._decompositions = ThreadPoolExecutor(1, "training-weights")
        self._finished: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._wake = wake
        self._closed = threading.Event()

    def load(self, work: Work[T], done: Done[T]) -> None:
        """Run `work` in the loading thread; `poll` passes its result, or error, to `done`."""
        self._submit(self._loads, work, done)

    def store(self, work: Work[T], done: Done[T]) -> None:
        """Run `work` in the thread that changes the store, in the order of calls; `done` as in `load`."""
        self._submit(self._store, work, done)

    def save(self, work: Work[T], done: Done[T]) -> None:
        """Run `work`, which reads or writes files of training runs, in the order of calls; `done` as in `load`."""
        self._submit(self._runs, work, done)

    def decompose(self, work: Work[T], done: Done[T]) -> None:
        """Run `work`, which computes what an adapter begins with from the base's weights; `done` as in `load`."""
        self._submit(self._decompositions, work, done)

    def lower(self, work: Work[T], done: Done[T]) -> None:
        """Run `work`, which waits for a compiler process; `done` as in `load`."""
        self._submit(self._compilers, work, done)

    def change_shared(self, work: Work[T], done: Done[T]) -> None:
        """Run `work` in the thread that changes the shared store, in the order of calls; `done` as in `load`."""
        self._submit(self._shared, work, done)

    def transfer(self, work: Work[T], done: Done[T]) -> None:
        """Run `work`, which copies files from or to the shared store; `done` as in `load`."""
        self._submit(self._transfers, work, done)

    def repeat(self, work: Work[T], done: Done[T], seconds: float, share: float = BUSY_SHARE) -> None:
        """Run `work` in a thread of its own again and again, with pauses; `done` as in `load`.

        A pause is so long, or longer where the work takes long: `share` of the time at most.
        """

        def run() -> None:
            took = 0.0
            while not self._closed.wait(max(seconds, took / share)):
                begun = time.monotonic()
                self._run(work, done)
                took = time.monotonic() - begun

        # Not waited for: it may hang on a network folder.
        threading.Thread(target=run, name="adapter-watch", daemon=True).start()

    def poll(self, timeout: float | None = None) -> bool:
        """Run the callbacks of finished work, in the calling thread; returns whether there were any.

        Args:
            timeout: seconds to wait for the first; None: not at all.
        """
        any_ = False
        while True:
            try:
                finish = self._finished.get_nowait() if any_ or timeout is None else self._finished.get(timeout=timeout)
            except Empty:
                return any_
            any_ = True
            try:
                finish()
            except Exception:  # a bug in one operation must not end everybody's requests
                log.exception("an operation on an adapter failed")

    def close(self) -> None:
        """Wait for running work and drop queued work; what repeats is not repeated."""
        self._closed.set()
        executors = (self._loads, self._compilers, self._transfers, self._shared, self._store)
        for executor in (*executors, self._runs, self._decompositions):
            executor.shutdown(wait=True, cancel_futures=True)

    def _submit(self, executor: ThreadPoolExecutor, work: Work[T], done: Done[T]) -> None:
        try:
            executor.submit(self._run, work, done)
        except RuntimeError:  # closed
            self._finished.put(lambda: done(Unavailable("the server is shutting down", retry_after=5)))

    def _run(self, work: Work[T], done: Done[T]) -> None:
        result: T | ServeError
        try:
            result = work()
        except ServeError as error:
            result = error
        except Exception as error:  # a bug or a disk fault: report it, keep the thread alive
            log.exception("work on an adapter failed")
            result = EngineFault(f"the adapter could not be read or stored ({type(error).__name__})")
        self._finished.put(lambda: done(result))
        self._wake()
