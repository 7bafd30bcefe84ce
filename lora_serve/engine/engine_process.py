"""Handle of one engine process in its parent: the process, its socket, and its cleanup.

Every process gets a socket of its own in a private folder, so no message of a dead engine can reach its successor. When
to start, kill or restart is decided in `engine/supervisor.py`.
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

from lora_serve.config import ServeConfig
from lora_serve.engine.arrival import Arrival
from lora_serve.engine.cores import compute_threads, physical_cores
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

FINAL_MESSAGES = 0.1  # seconds to wait for messages that were sent just before the process ended
KILL_TIMEOUT = 5.0  # seconds to wait for a killed process

log = logging.getLogger(__name__)


class EngineProcess:
    """A running engine process; created by `spawn`, ended by `close`, which may be called at any time."""

    def __init__(
        self, process: Process, context: zmq.Context[zmq.Socket[bytes]], socket: zmq.Socket[bytes], folder: str
    ) -> None:
        self._process = process
        self._context = context
        self._socket = socket
        self._folder = folder
        self._loop = asyncio.get_running_loop()
        self._arrival = Arrival()  # what `receive` waits for
        self._loop.add_reader(socket.fileno(), self._arrival.wake)
        self._exit = asyncio.create_task(process.wait())
        self._exit.add_done_callback(lambda exit: self._loop.call_later(FINAL_MESSAGES, self._end))
        self._ended = False  # no further messages will arrive

    def __repr__(self) -> str:
        status = self._process.returncode
        return f"<engine process {self.pid}, {'running' if status is None else f'ended with {status}'}>"

    @property
    def pid(self) -> int:
        return self._process.pid

    @classmethod
    async def spawn(cls, command: Sequence[str], config: ServeConfig) -> EngineProcess:
        """Start `command` with the configuration on its standard input and a new socket."""
        threads = config.threads or physical_cores()
        folder = tempfile.mkdtemp(prefix="lora-serve-")  # mode 0700: only this user can reach the socket in it
        context = zmq.Context()
        try:
            socket: zmq.Socket[bytes] = context.socket(zmq.DEALER)
            socket.sndhwm = 0  # sending never blocks; the client's limit on open streams bounds the queue
            socket.linger = 0
            address = f"ipc://{folder}/engine"
            socket.bind(address)
            # The engine takes its options from standard input only, and its own number of threads.
            ours = {name for name in os.environ if name.startswith("LORA_SERVE_")} - {"LORA_SERVE_KERNEL_FLAGS"}
            environment = {name: value for name, value in os.environ.items() if name not in ours}
            environment["OMP_NUM_THREADS"] = str(compute_threads(threads, config.tensor_parallel))
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
            await _write_stdin(process, options.encode())
        except BaseException:
            await child.close()
            raise
        return child

    async def wait_until_ready(self, on_progress: Callable[[str, float], None]) -> EngineInfo:
        """Wait until the base is loaded, without a timeout while the process lives.

        Raises: the `ServeError` with which the engine refused to start; `EngineFault` if it ended without one.
        """
        while (message := await self.receive()) is not None:
            match message:
                case Progress(stage, fraction):
                    on_progress(stage, fraction)
                case Ready(info):
                    # Both ends are connected, so the path is no longer needed; removed now, kill -9 cannot leave it.
                    shutil.rmtree(self._folder, ignore_errors=True)
                    return info
                case Refused(failure):
                    raise failure.error()
                case _:
                    log.warning("unexpected %s from the engine before it was ready", type(message).__name__)
        raise EngineFault(f"the engine process ended while it started ({self._exit_cause()})")

    def send(self, message: ToEngine) -> None:
        """Queue a message on the socket, in order; does nothing once the process has died or is closed."""
        if not self._socket.closed:
            with suppress(zmq.Again):  # the engine's end is gone, which `receive` will say; there is no high-water mark
                self._socket.send(encode(message), zmq.NOBLOCK)
            self._arrival.wake()  # sending may have consumed the socket's only signal that a message has arrived

    async def receive(self) -> FromEngine | None:
        """The next message; None once the process has ended and all its messages were read.

        Raises: `msgspec.DecodeError` on anything that is not a message.
        """
        while not self._socket.closed:
            if int(self._socket.get(zmq.EVENTS)) & zmq.POLLIN:
                message: FromEngine = decode_from_engine(self._socket.recv(zmq.NOBLOCK))
                return message
            if self._ended:
                break
            await self._arrival.wait()
        return None

    async def wait_for_exit(self, timeout: float) -> bool:
        """Whether the process exits within `timeout` seconds."""
        await asyncio.wait({self._exit}, timeout=timeout)
        return self._exit.done()

    async def dump_stacks(self) -> None:
        """Make a stuck process write the stacks of its threads to the log."""
        self._signal(signal.SIGUSR1)
        await self.wait_for_exit(0.3)

    def kill(self) -> None:
        self._signal(signal.SIGKILL)

    async def close(self) -> None:
        """Kill the process if it still runs, wait for it, and remove its socket."""
        self.destroy()
        if not await self.wait_for_exit(KILL_TIMEOUT):  # e.g. stuck in a device driver, where it cannot be killed
            log.error("engine process %d did not exit after SIGKILL", self.pid)
            self._exit.cancel()

    def destroy(self) -> None:
        """Kill the process and remove its socket and folder, without waiting."""
        self.kill()
        if not self._socket.closed:
            self._loop.remove_reader(self._socket.fileno())
        self._context.destroy(linger=0)
        self._end()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _end(self) -> None:
        self._ended = True
        self._arrival.wake()

    def _signal(self, number: signal.Signals) -> None:
        if self._process.returncode is None:
            with suppress(ProcessLookupError):
                self._process.send_signal(number)

    def _exit_cause(self) -> str:
        status = self._process.returncode
        if status is None:
            return "it still runs"
        if status >= 0:
            return f"exit status {status}"
        return signal.Signals(-status).name


async def _write_stdin(process: Process, text: bytes) -> None:
    """Write and close the process's standard input; if it died before reading, its exit is noticed elsewhere."""
    assert process.stdin is not None
    with suppress(BrokenPipeError, ConnectionResetError):
        process.stdin.write(text)
        await process.stdin.drain()
        process.stdin.close()
        await process.stdin.wait_closed()
