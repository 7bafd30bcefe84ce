"""Supervise the engine process: start it, watch its heartbeat, kill a silent one, restart with backoff.

What the messages mean is the client's business; here they are signs of life only.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence

from lora_serve.config import ServeConfig
from lora_serve.engine.engine_process import EngineProcess
from lora_serve.errors import ServeError
from lora_serve.messages import EngineInfo, Exit, FromEngine

EXIT_GRACE = 3.0  # seconds that an engine gets to end by itself
MAX_BACKOFF = 30.0  # seconds
SOUND_LIFE = 60.0  # seconds; an engine that lived this long after a start had no trouble with starting

log = logging.getLogger(__name__)


class Supervisor:
    """One engine after the other, until `stop`.

    Args:
        config: goes to the engine; `heartbeat_timeout` is the silence that is too long.
        command: program that hosts the engine.
        take: gets every message of the running engine.
        lost: called when an engine is gone, before the next one is started.
    """

    def __init__(
        self,
        config: ServeConfig,
        command: Sequence[str],
        take: Callable[[FromEngine], None],
        lost: Callable[[], None],
    ) -> None:
        self.restarts = 0
        self.info: EngineInfo | None = None
        self.child: EngineProcess | None = None  # set exactly while an engine is ready to be spoken to
        self.start_seconds = 1.0
        self._config = config
        self._command = tuple(command)
        self._take = take
        self._lost = lost
        self._interval = min(1.0, config.heartbeat_timeout / 8)
        self._heartbeat = Heartbeat(self._interval, time.monotonic())
        self._task: asyncio.Task[None] | None = None
        self._stopping = False

    @property
    def alive(self) -> bool:
        """An engine runs and its heartbeat is recent. SlotRotation False well before the watchdog gives up on it."""
        return self.child is not None and self._heartbeat.silence < self._config.heartbeat_timeout / 2

    async def start(self, on_progress: Callable[[str, float], None]) -> None:
        """Start the first engine; returns when it is ready, and from then on it is supervised.

        Raises: the `ServeError` that the engine refused to start with, `EngineFault` if it died.
        """
        if self._task is not None:
            raise RuntimeError("the engine was started before")
        child = await self._launch(on_progress)
        self._task = asyncio.create_task(self._supervise(child), name="engine-supervisor")

    async def stop(self) -> None:
        """End the engine, by force if it does not end by itself. Final."""
        self._stopping = True
        child, self.child = self.child, None
        if child is not None:
            child.send(Exit())
            if not await child.exited(EXIT_GRACE):
                log.warning("the engine did not end by itself and is killed")
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def abandon(self) -> None:
        """Kill the engine and take its socket away without waiting; for a process that is about to end."""
        if self.child is not None:
            self.child.discard()

    async def _launch(self, on_progress: Callable[[str, float], None]) -> EngineProcess:
        """A child that is ready; one that did not get there is closed."""
        began = time.monotonic()
        child = await EngineProcess.spawn(self._command, self._config)
        try:
            self.info = await child.ready(on_progress)
        except BaseException:
            await child.close()
            raise
        self.start_seconds = time.monotonic() - began
        self._heartbeat = Heartbeat(self._interval, time.monotonic())
        self.child = child
        return child

    async def _supervise(self, child: EngineProcess) -> None:
        failures = 0
        while True:
            born = time.monotonic()
            try:
                cause = await self._attend(child)
            finally:
                self.child = None
                self._lost()
                await child.close()
            if self._stopping:
                return
            failures = failures_after(failures, time.monotonic() - born)
            log.error("the engine is gone: %s; it is started again", cause)
            child, failures = await self._relaunch(failures)
            self.restarts += 1

    async def _relaunch(self, failures: int) -> tuple[EngineProcess, int]:
        """Try until an engine is ready. Returns it with the number of ends in a row so far."""
        while True:
            await asyncio.sleep(backoff(failures))
            try:
                return await self._launch(lambda stage, fraction: None), failures
            except ServeError as error:
                log.error("the engine could not be started again: %s", error.message)
            except OSError:
                log.exception("the engine could not be started again")
            failures = failures_after(failures, lived=0.0)

    async def _attend(self, child: EngineProcess) -> str:
        """Pass on what the child says until it is gone or silent too long. Returns what happened, for the log."""
        listener = asyncio.create_task(self._listen(child))
        watcher = asyncio.create_task(self._watch(child))
        try:
            done, _ = await asyncio.wait({listener, watcher}, return_when=asyncio.FIRST_COMPLETED)
            return done.pop().result()
        except Exception as error:  # supervision must outlive any fault of ours in handling a message
            log.exception("a message of the engine could not be handled")
            return f"its messages could not be handled ({type(error).__name__})"
        finally:
            for task in (listener, watcher):
                task.cancel()
            await asyncio.gather(listener, watcher, return_exceptions=True)

    async def _listen(self, child: EngineProcess) -> str:
        try:
            while (message := await child.receive()) is not None:
                self._heartbeat.beat()
                self._take(message)
        except ValueError as error:  # msgspec's errors are among them
            return f"it sent what is not a message ({error})"
        return f"its process ended: {child!r}"

    async def _watch(self, child: EngineProcess) -> str:
        heartbeat = self._heartbeat
        while heartbeat.silence <= self._config.heartbeat_timeout:
            await asyncio.sleep(self._interval)
            heartbeat.tick(time.monotonic())
        await child.explain()
        return f"it was silent for more than {self._config.heartbeat_timeout:g} s"


class Heartbeat:
    """Seconds of engine silence, by a clock that stops while this process itself does not run.

    After a suspended machine or a blocked event loop the engine's beats wait unread; counting that gap as silence
    would kill a healthy engine. So one tick adds at most twice the interval at which ticks should come.
    """

    def __init__(self, interval: float, now: float) -> None:
        self._most = 2 * interval
        self._last = now
        self.silence = 0.0

    def tick(self, now: float) -> None:
        self.silence += min(now - self._last, self._most)
        self._last = now

    def beat(self) -> None:
        self.silence = 0.0


def backoff(failures: int) -> float:
    """Seconds before the next start after `failures` ends in a row (1 or more): 0, 1, 2, 4 … 30."""
    return 0.0 if failures <= 1 else min(MAX_BACKOFF, 2.0 ** (min(failures, 10) - 2))


def failures_after(failures: int, lived: float) -> int:
    """How many ends in a row it is, when an engine ends `lived` seconds after it was ready (0: it never was)."""
    return 1 if lived >= SOUND_LIFE else failures + 1
