"""One life of the engine process, as its parent holds it: the process, its own socket, its end.

Every life has a socket of its own in a private folder, so nothing that a dead engine sent can reach its successor.
When to start, kill or restart is decided in `engine/client.py`.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import signal
import tempfile
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable, Sequence
from contextlib import suppress

import zmq
import zmq.asyncio

from lora_serve.config import ServeConfig
from lora_serve.engine.cores import physical_cores
from lora_serve.errors import EngineFault
from lora_serve.messages import (
    EngineInfo,
    FromEngine,
    Progress,
    Ready,
    Refused,
    ToEngine,
    decode_from_engine,
    encode,
)

LAST_WORDS = 0.1  # seconds that messages sent just before death get to arrive
REAP = 5.0  # seconds that a killed process gets to be gone

log = logging.getLogger(__name__)


class EngineProcess:
    """A running engine process; made by `spawn`, ended by `close`, which is safe to call at any time."""

    def __init__(self, process: Process, context: zmq.asyncio.Context, socket: zmq.asyncio.Socket, folder: str) -> None:
        self._process = process
        self._context = context
        self._socket = socket
        self._folder = folder
        self._exit = asyncio.create_task(process.wait())

    def __repr__(self) -> str:
        status = self._process.returncode
        return f"<engine process {self.pid}, {'running' if status is None else f'ended with {status}'}>"

    @property
    def pid(self) -> int:
        return self._process.pid

    @classmethod
    async def spawn(cls, command: Sequence[str], config: ServeConfig) -> EngineProcess:
        """Start `command` with the configuration on its standard input and a socket of its own."""
        threads = config.threads or physical_cores()
        folder = tempfile.mkdtemp(prefix="lora-serve-")  # mode 0700: only this user can reach the socket in it
        context = zmq.asyncio.Context()
        try:
            socket: zmq.asyncio.Socket = context.socket(zmq.DEALER)
            socket.sndhwm = 0  # sending never blocks; how much may wait is bounded by the client's admission
            socket.linger = 0
            address = f"ipc://{folder}/engine"
            socket.bind(address)
            # The engine's options are what it is given here, and the parent's one-thread maths is not for it.
            environment = {name: value for name, value in os.environ.items() if not name.startswith("LORA_SERVE_")}
            environment["OMP_NUM_THREADS"] = str(threads)
            process = await asyncio.create_subprocess_exec(
                *command, address, str(os.getpid()), stdin=PIPE, env=environment
            )
        except BaseException:
            context.destroy(linger=0)
            shutil.rmtree(folder, ignore_errors=True)
            raise
        child = cls(process, context, socket, folder)
        try:
            options = config.model_copy(update={"threads": threads}).model_dump_json(exclude={"config"})
            await _give(process, options.encode())
        except BaseException:
            await child.close()
            raise
        return child

    async def ready(self, on_progress: Callable[[str, float], None]) -> EngineInfo:
        """Wait until the base is resident, however long that takes while the process lives.

        Raises: what the engine refused with; `EngineFault` if it ended without a word.
        """
        while (message := await self.receive()) is not None:
            match message:
                case Progress(stage, fraction):
                    on_progress(stage, fraction)
                case Ready(info):
                    # Both ends are connected, the name is not needed any more: not even kill -9 leaves it behind.
                    shutil.rmtree(self._folder, ignore_errors=True)
                    return info
                case Refused(failure):
                    raise failure.error()
                case _:
                    log.warning("the engine sent a %s before it was ready", type(message).__name__)
        raise EngineFault(f"the engine process ended while it started ({self._cause()})")

    def send(self, message: ToEngine) -> None:
        """Hand a message to the socket at once, in order. To a dead process: nothing happens."""
        if not self._socket.closed:
            self._socket.send(encode(message))  # resolved on the spot: there is no high-water mark

    async def receive(self) -> FromEngine | None:
        """The next message; None once the process has ended and nothing that it sent is left.

        Raises: `msgspec.DecodeError` on anything that is not a message.
        """
        receiving = asyncio.ensure_future(self._socket.recv())
        try:
            await asyncio.wait({receiving, self._exit}, return_when=asyncio.FIRST_COMPLETED)
            if not receiving.done():
                await asyncio.wait({receiving}, timeout=LAST_WORDS)
            return decode_from_engine(receiving.result()) if receiving.done() else None
        finally:
            receiving.cancel()

    async def exited(self, timeout: float) -> bool:
        """Whether the process is gone within `timeout` seconds."""
        await asyncio.wait({self._exit}, timeout=timeout)
        return self._exit.done()

    async def explain(self) -> None:
        """Have a stuck process write its threads' stacks to the log."""
        self._signal(signal.SIGUSR1)
        await self.exited(0.3)

    def kill(self) -> None:
        self._signal(signal.SIGKILL)

    async def close(self) -> None:
        """Kill what still runs and take back everything that this life used."""
        self.discard()
        if not await self.exited(REAP):  # a process that sleeps in a driver cannot be killed; do not wait for it
            log.error("engine process %d cannot be ended", self.pid)
            self._exit.cancel()

    def discard(self) -> None:
        """Kill, and take the socket and its folder away, without waiting."""
        self.kill()
        self._context.destroy(linger=0)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _signal(self, number: signal.Signals) -> None:
        if self._process.returncode is None:
            with suppress(ProcessLookupError):
                self._process.send_signal(number)

    def _cause(self) -> str:
        status = self._process.returncode
        if status is None:
            return "it still runs"
        if status >= 0:
            return f"exit status {status}"
        return signal.Signals(-status).name


async def _give(process: Process, text: bytes) -> None:
    """Write all of standard input; a process that died before reading it is noticed by its exit."""
    assert process.stdin is not None
    with suppress(BrokenPipeError, ConnectionResetError):
        process.stdin.write(text)
        await process.stdin.drain()
        process.stdin.close()
        await process.stdin.wait_closed()
