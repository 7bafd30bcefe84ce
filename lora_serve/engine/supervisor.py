"""Supervise the engine process: start it, watch its heartbeat, kill it when it is silent, restart it with backoff.

Every message counts as a heartbeat; the client interprets them.
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

EXIT_GRACE = 3.0  # seconds that an engine gets to exit by itself
MAX_BACKOFF = 30.0  # seconds
STABLE_LIFETIME = 60.0  # seconds; after an engine lived this long, the backoff starts over

log = logging.getLogger(__name__)


class Supervisor:
    """Keeps an engine running until `stop`.

    Args:
        config: passed to the engine; after `heartbeat_timeout` seconds of silence it is killed.
        command: program that runs the engine.
        on_message: called with every message of the running engine.
        on_loss: called when an engine is gone, before the next one is started.
    """

    def __init__(
        self,
        config: ServeConfig,
        command: Sequence[str],
        on_message: Callable[[FromEngine], None],
        on_loss: Callable[[], None],
    ) -> None:
        self.restarts = 0
        self.info: EngineInfo | None = None
        self.child: EngineProcess | None = None  # set exactly while an engine is ready
        self.start_seconds = 1.0
        self._config = config
        self._command = tuple(command)
        self._on_message = on_message
        self._on_loss = on_loss
        self._interval = min(1.0, config.heartbeat_timeout / 8)
        self._heartbeat = Heartbeat(self._interval, time.monotonic())
        self._task: asyncio.Task[None] | None = None
        self._stopping = False

    @property
    def alive(self) -> bool:
        """Whether an engine runs and its heartbeat is recent: less than half of `heartbeat_timeout` ago."""
        return self.child is not None and self._heartbeat.silence < self._config.heartbeat_timeout / 2

    async def start(self, on_progress: Callable[[str, float], None]) -> None:
        """Start the first engine and supervise it; returns when it is ready.

        Raises: the `ServeError` with which the engine refused to start, `EngineFault` if it died.
        """
        if self._task is not None:
            raise RuntimeError("the engine was started before")
        child = await self._launch(on_progress)
        self._task = asyncio.create_task(self._supervise(child), name="engine-supervisor")

    async def stop(self) -> None:
        """Ask the engine to exit, and kill it if it does not. The supervisor cannot be started again."""
        self._stopping = True
        child, self.child = self.child, None
        if child is not None:
            child.send(Exit())
            if not await child.wait_for_exit(EXIT_GRACE):
                log.warning("the engine did not exit within %g s and is killed", EXIT_GRACE)
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def abandon(self) -> None:
        """Kill the engine and remove its socket without waiting; for a process that is about to end."""
        if self.child is not None:
            self.child.destroy()

    async def _launch(self, on_progress: Callable[[str, float], None]) -> EngineProcess:
        """Start an engine and wait until it is ready; it is closed if that fails."""
        began = time.monotonic()
        child = await EngineProcess.spawn(self._command, self._config)
        try:
            self.info = await child.wait_until_ready(on_progress)
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
                cause = await self._wait_until_gone(child)
            finally:
                self.child = None
                self._on_loss()
                await child.close()
            if self._stopping:
                return
            failures = failures_after(failures, time.monotonic() - born)
            log.error("engine lost: %s; restarting", cause)
            child, failures = await self._relaunch(failures)
            self.restarts += 1

    async def _relaunch(self, failures: int) -> tuple[EngineProcess, int]:
        """Retry until an engine is ready. Returns it with the number of consecutive failures so far."""
        while True:
            await asyncio.sleep(backoff(failures))
            try:
                return await self._launch(lambda stage, fraction: None), failures
            except ServeError as error:
                log.error("engine restart failed: %s", error.message)
            except OSError:
                log.exception("engine restart failed")
            failures = failures_after(failures, lived=0.0)

    async def _wait_until_gone(self, child: EngineProcess) -> str:
        """Pass messages on until the engine is gone or silent for too long. Returns the cause, for the log."""
        listener = asyncio.create_task(self._receive_messages(child))
        watcher = asyncio.create_task(self._watch_heartbeat(child))
        try:
            done, _ = await asyncio.wait({listener, watcher}, return_when=asyncio.FIRST_COMPLETED)
            return done.pop().result()
        except Exception as error:  # supervision must survive a bug in the handling of a message
            log.exception("error while handling a message of the engine")
            return f"its messages could not be handled ({type(error).__name__})"
        finally:
            for task in (listener, watcher):
                task.cancel()
            await asyncio.gather(listener, watcher, return_exceptions=True)

    async def _receive_messages(self, child: EngineProcess) -> str:
        try:
            while (message := await child.receive()) is not None:
                self._heartbeat.beat()
                self._on_message(message)
                await asyncio.sleep(0)  # what waits for the message goes on before the next one
        except ValueError as error:  # includes msgspec's errors
            return f"it sent what is not a message ({error})"
        return f"its process ended: {child!r}"

    async def _watch_heartbeat(self, child: EngineProcess) -> str:
        heartbeat = self._heartbeat
        while heartbeat.silence <= self._config.heartbeat_timeout:
            await asyncio.sleep(self._interval)
            heartbeat.tick(time.monotonic())
        await child.dump_stacks()
        return f"it was silent for more than {self._config.heartbeat_timeout:g} s"


class Heartbeat:
    """Seconds since the engine's last message, not counting time in which this process itself did not run.

    After the machine was suspended or the event loop blocked, the engine's messages are still unread; counting that gap
    as silence would kill a healthy engine. So one tick adds at most twice the tick interval.
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
    """Seconds to wait before a restart after so many consecutive failures (1 or more): 0, 1, 2, 4 … 30."""
    return 0.0 if failures <= 1 else min(MAX_BACKOFF, 2.0 ** (min(failures, 10) - 2))


def failures_after(failures: int, lived: float) -> int:
    """Consecutive failures after an engine ended `lived` seconds after it was ready (0: it never was)."""
    return 1 if lived >= STABLE_LIFETIME else failures + 1
