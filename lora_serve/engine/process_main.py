"""The process that hosts the engine: a loop around the synchronous core, and the engine's end of the connection.

It exists so that a crash, a stuck kernel or a busy step never takes HTTP down with it. It holds no policy: what runs is
the engine's decision, when to die is the parent's (`engine/client.py`), except that it never outlives its parent.

Started as `python -m lora_serve.engine.process_main ADDRESS PARENT` with the configuration as JSON on standard input.
"""

from __future__ import annotations

import ctypes
import faulthandler
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Protocol

import msgspec
import zmq

from lora_serve.config import ServeConfig
from lora_serve.errors import EngineFault, Failure, ServeError
from lora_serve.messages import (
    Abort,
    Call,
    EngineInfo,
    Exit,
    FromEngine,
    Generate,
    Progress,
    Ready,
    Refused,
    Reply,
    Stats,
    ToEngine,
    Update,
    decode_to_engine,
    encode,
)

HEARTBEAT = 0.5  # seconds; half of what `Update` promises, so that one late turn is not a missed beat
STATS_EVERY = 0.1  # seconds between the numbers that travel with busy steps
NOTHING_RAN = 0.005  # seconds to wait for a poke when the engine is busy but this step had nothing to run
BACKPRESSURE = 0.05  # seconds between tries while the parent does not read
UNREAD = 256  # updates that may be on their way to a parent that does not read
LINGER = 1000  # milliseconds that the last messages get to leave

log = logging.getLogger(__name__)


class EngineCore(Protocol):
    """What this process needs of an engine; `lora_serve.engine.engine.Engine` is the real one."""

    @property
    def info(self) -> EngineInfo: ...
    @property
    def busy(self) -> bool: ...
    @property
    def step_in_flight(self) -> bool: ...
    def receive(self, message: Generate | Abort | Call) -> None: ...
    def step(self) -> Update: ...
    def replies(self) -> list[Reply]: ...
    def stats(self) -> Stats: ...
    def close(self) -> None: ...


class Build(Protocol):
    """Makes an engine. `wake` may be called from any thread, `progress` only from the one that builds."""

    def __call__(
        self, config: ServeConfig, *, wake: Callable[[], None], progress: Callable[[str, float], None]
    ) -> EngineCore: ...


class Waker:
    """Lets any thread cut the loop's wait short."""

    def __init__(self) -> None:
        self._read, self._write = socket.socketpair()
        self._read.setblocking(False)
        self._write.setblocking(False)

    def wake(self) -> None:
        with suppress(OSError):  # full: the loop has pokes enough to wake up for; closed: nothing to wake
            self._write.send(b"\0")

    def fileno(self) -> int:
        return self._read.fileno()

    def clear(self) -> None:
        with suppress(BlockingIOError):
            self._read.recv(4096)

    def close(self) -> None:
        self._read.close()
        self._write.close()


class Line:
    """The engine's end of the connection. Nothing here blocks longer than it was told to."""

    def __init__(self, address: str, waker: Waker) -> None:
        self._context = zmq.Context(io_threads=1)
        self._socket: zmq.Socket[bytes] = self._context.socket(zmq.DEALER)
        self._socket.linger = LINGER
        self._socket.sndhwm = UNREAD
        self._socket.connect(address)
        self._waker = waker
        self._unsent: deque[bytes] = deque()
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(waker.fileno(), zmq.POLLIN)

    def send(self, message: FromEngine) -> None:
        """Send, or keep in order until the parent reads again. An answer that cannot be written becomes a failure."""
        try:
            self._unsent.append(encode(message))
        except (ValueError, OverflowError):
            if not isinstance(message, Reply):
                raise
            log.exception("an answer cannot be sent")
            self._unsent.append(encode(Reply(message.id, failure=Failure.of(EngineFault("the answer cannot be sent")))))
        self.flush()

    def flush(self) -> bool:
        """Whether everything is on its way."""
        with suppress(zmq.Again):
            while self._unsent:
                self._socket.send(self._unsent[0], zmq.NOBLOCK)
                self._unsent.popleft()
        return not self._unsent

    def receive(self) -> list[ToEngine]:
        """All messages that wait now."""
        messages: list[ToEngine] = []
        with suppress(zmq.Again):
            while True:
                messages.append(decode_to_engine(self._socket.recv(zmq.NOBLOCK)))
        return messages

    def wait(self, seconds: float) -> None:
        """Until a message or a poke comes, `seconds` at most."""
        self._poller.poll(max(0, round(seconds * 1000)))
        self._waker.clear()

    def close(self) -> None:
        self._context.destroy(linger=LINGER)


def serve(engine: EngineCore, line: Line) -> None:
    """Turn the loop until `Exit`: take messages, one step, tell what happened; sleep only with nothing to run."""
    told = counted = 0.0
    while True:
        for message in line.receive():
            if isinstance(message, Exit):
                engine.close()
                line.send(engine.step())
                return
            engine.receive(message)

        # A parent that does not read pauses generation: to drop events would tear streams, to keep them eat memory.
        if not line.flush():
            line.wait(BACKPRESSURE)
            continue

        update = engine.step()
        ran = update.step is not None or bool(update.events)
        idle = not engine.busy
        now = time.monotonic()
        beat = now - told >= HEARTBEAT
        if ran or beat:
            if update.stats is None and (idle or beat or now - counted >= STATS_EVERY):
                update, counted = msgspec.structs.replace(update, stats=engine.stats()), now
            line.send(update)
            told = now
        for reply in engine.replies():  # after the events: a drain is answered when the last stream has its end
            line.send(reply)

        if idle:
            line.wait(told + HEARTBEAT - now)
        elif not ran and not engine.step_in_flight:
            line.wait(NOTHING_RAN)


def run(build: Build, address: str, config: ServeConfig) -> int:
    """Build the engine and serve over `address` until told to exit. Returns the exit status."""
    waker = Waker()
    line = Line(address, waker)
    try:
        try:
            engine = build(
                config, wake=waker.wake, progress=lambda stage, fraction: line.send(Progress(stage, fraction))
            )
        except ServeError as error:
            line.send(Refused(Failure.of(error)))
            return 3
        except Exception as error:
            log.exception("the engine could not be built")
            message = f"the engine could not start ({type(error).__name__}); its log says why"
            line.send(Refused(Failure(EngineFault.kind, message)))
            return 1
        line.send(Ready(engine.info))
        try:
            serve(engine, line)
        except Exception:
            log.exception("the engine's loop ended by an error")
            return 1
        return 0
    finally:
        line.close()
        waker.close()


def bind_life_to(parent: int) -> None:
    """Die when the parent does: at once by the kernel's help on Linux, within a second everywhere, even mid-step."""
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1 is PR_SET_PDEATHSIG

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


def main(build: Build, arguments: Sequence[str]) -> int:
    """The process's entry: `arguments` are the address to connect to and the parent's process id."""
    address, parent = arguments
    bind_life_to(int(parent))
    # Terminals and service managers signal the whole group; whether to drain or to die is the parent's decision alone.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)  # the parent asks a stuck engine where it hangs before it kills it
    config = ServeConfig.model_validate_json(sys.stdin.read())
    logging.basicConfig(
        level=config.log_level.upper(),
        stream=sys.stderr,
        format="%(asctime)s %(levelname)s engine[%(process)d] %(name)s: %(message)s",
    )
    return run(build, address, config)


def _build(config: ServeConfig, *, wake: Callable[[], None], progress: Callable[[str, float], None]) -> EngineCore:
    progress("starting", 0.0)
    # Imported here: torch takes seconds, and a broken installation should arrive at the parent as a refusal.
    from lora_serve.engine.engine import Engine

    return Engine.build(config, wake=wake, progress=progress)


if __name__ == "__main__":
    sys.exit(main(_build, sys.argv[1:]))
