"""Entry point of the engine process: a loop that passes messages to the engine, runs steps and sends updates.

The engine is a process of its own so that a crash, a stuck kernel or a long step never takes HTTP down. What runs is
the engine's decision, when to exit the parent's (`engine/supervisor.py`); the process never outlives its parent.

Started as `python -m lora_serve.engine.process_main ADDRESS PARENT` with the configuration as JSON on standard input.
"""

from __future__ import annotations

import ctypes
import faulthandler
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import import_module
from typing import NoReturn, Protocol

import msgspec

from lora_serve import log_format
from lora_serve.config import ServeConfig
from lora_serve.engine.connection import Connection, Waker
from lora_serve.errors import EngineFault, Failure, ServeError
from lora_serve.messages import (
    Abort,
    Call,
    EngineInfo,
    Exit,
    Generate,
    Progress,
    Ready,
    Refused,
    Reply,
    Stats,
    Update,
)

HEARTBEAT = 0.5  # seconds; half of what `Update` promises, so that one late iteration is not a missed heartbeat
STATS_EVERY = 0.1  # seconds between statistics while steps run
IDLE_STEP_WAIT = 0.005  # seconds to wait for a message when the engine is busy but this step had nothing to run
EXIT_SECONDS = 2.0  # after `Exit`, for running loads to end and the last messages to be sent
BACKPRESSURE = 0.05  # seconds between attempts to send while the parent does not read

log = logging.getLogger(__name__)


class EngineCore(Protocol):
    """The engine's interface to this process; implemented by `lora_serve.engine.engine.Engine`."""

    @property
    def info(self) -> EngineInfo: ...
    @property
    def busy(self) -> bool: ...
    @property
    def step_in_flight(self) -> bool: ...
    def receive(self, message: Generate | Abort | Call) -> None: ...
    def step(self) -> Update: ...
    def train(self) -> bool: ...
    def replies(self) -> list[Reply]: ...
    def stats(self) -> Stats: ...
    def close(self) -> None: ...


class Build(Protocol):
    """Builds an engine. `wake` may be called from any thread, `progress` only from the building one."""

    def __call__(
        self, config: ServeConfig, *, wake: Callable[[], None], progress: Callable[[str, float], None]
    ) -> EngineCore: ...


def serve(engine: EngineCore, connection: Connection, on_exit: Callable[[], None]) -> None:
    """The engine's loop until `Exit`: receive messages, run one step, send updates, train for a moment.

    Waits only if nothing can run.

    Args:
        on_exit: called at `Exit`, before the engine is closed.
    """
    last_update = last_stats = 0.0
    while True:
        for message in connection.receive():
            if isinstance(message, Exit):
                on_exit()
                engine.close()
                connection.send(engine.step())
                return
            engine.receive(message)

        # Pause generation while the parent does not read: dropping events breaks streams, keeping them fills memory.
        if not connection.flush():
            connection.wait(BACKPRESSURE)
            continue

        update = engine.step()
        ran = update.step is not None or bool(update.events)
        told = update.stats is not None
        idle = not engine.busy
        now = time.monotonic()
        heartbeat = now - last_update >= HEARTBEAT
        if ran or heartbeat or told:
            if update.stats is None and (idle or heartbeat or now - last_stats >= STATS_EVERY):
                update, last_stats = msgspec.structs.replace(update, stats=engine.stats()), now
            connection.send(update)
            last_update = now
        trained = engine.train()  # after the events: streams do not wait for it
        for reply in engine.replies():  # after the events: a drain is answered after the last stream's end
            connection.send(reply)

        if trained:
            continue
        if not engine.busy:
            connection.wait(last_update + HEARTBEAT - time.monotonic())
        elif not ran and not engine.step_in_flight:
            connection.wait(IDLE_STEP_WAIT)


def run(build: Build, address: str, config: ServeConfig, on_exit: Callable[[], None] = lambda: None) -> int:
    """Build the engine and serve over `address` until an `Exit` message. Returns the exit status."""
    waker = Waker()
    connection = Connection(address, waker)
    try:
        try:
            engine = build(
                config, wake=waker.wake, progress=lambda stage, fraction: connection.send(Progress(stage, fraction))
            )
        except ServeError as error:
            connection.send(Refused(Failure.of(error)))
            return 3
        except Exception as error:
            log.exception("engine start failed")
            message = f"the engine could not start ({type(error).__name__}); its log says why"
            connection.send(Refused(Failure(EngineFault.kind, message)))
            return 1
        connection.send(Ready(engine.info))
        try:
            serve(engine, connection, on_exit)
        except Exception:
            log.exception("engine loop failed")
            return 1
        return 0
    finally:
        connection.close()
        waker.close()


def die_with_parent() -> None:
    """Have Linux kill this process when its parent dies, even during a step."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1 is PR_SET_PDEATHSIG


def watch_parent(parent: int) -> None:
    """End this process within a second of its parent, on any system."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


def end(status: int) -> NoReturn:
    """End the process at once: taking a model apart object by object takes seconds, and threads may still run."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def end_soon() -> None:
    """End the process within `EXIT_SECONDS`, even if it waits for a load or a publish. The store survives that."""
    timer = threading.Timer(EXIT_SECONDS, end, (0,))
    timer.daemon = True
    timer.start()


def main(build: Build, arguments: Sequence[str], prepare: Callable[[], None] = lambda: None) -> NoReturn:
    """Run the process: `arguments` are the address to connect to and the parent's process id.

    Args:
        prepare: called while this process has no threads of its own.
    """
    address, parent = arguments
    die_with_parent()
    # Terminals and service managers signal the whole process group, but only the parent decides to drain or to exit.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)  # the parent has a stuck engine dump its stacks before it kills it
    config = ServeConfig.model_validate_json(sys.stdin.read())
    log_format.configure(config.log_level, config.log_format, f"engine[{os.getpid()}]")
    prepare()
    watch_parent(int(parent))
    end(run(build, address, config, end_soon))


def _prepare() -> None:
    """Import the engine, which takes seconds, and fork what compiles adapters, which then need not import it."""
    try:
        import_module("lora_serve.engine.engine")
        from lora_serve.adapters.compiler import fork_compilers
    except Exception:  # it is raised again where the parent gets a message
        return
    with suppress(OSError):  # too many processes: it is tried again with the first adapter
        fork_compilers()


def _build(config: ServeConfig, *, wake: Callable[[], None], progress: Callable[[str, float], None]) -> EngineCore:
    progress("starting", 0.0)
    from lora_serve.engine.engine import Engine

    return Engine.build(config, wake=wake, progress=progress)


if __name__ == "__main__":
    main(_build, sys.argv[1:], _prepare)
