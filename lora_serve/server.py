"""Lifecycle of the server process: bind, start the engine, serve HTTP, drain, exit.

The application is built by `api/app.py`; the engine runs in a process behind `engine/client.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Awaitable, Callable, Generator, Sequence
from typing import Any, NamedTuple

import uvicorn
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from lora_serve import malloc
from lora_serve.config import ServeConfig, is_public
from lora_serve.engine.client import COMMAND, EngineClient
from lora_serve.errors import BadRequest
from lora_serve.http_protocol import ConnectionLimits, connection_limit, limited_protocol
from lora_serve.messages import EngineInfo

MALLOC_ARENAS = 2  # the memory of a thread that tokenizes is then used again by others
LAST_RESPONSES = 3  # seconds for open responses to send their last bytes
LAST_THREADS = 1.0  # seconds for threads to end, e.g. one that tokenizes for a client that has left

log = logging.getLogger(__name__)


class App(NamedTuple):
    """What is served.

    Attributes:
        asgi: the HTTP application.
        drain: lets work that is no request be saved when the server ends, in so many seconds at most.
    """

    asgi: Callable[..., Any]
    drain: Callable[[float], Awaitable[None]]


MakeApp = Callable[[EngineClient, Any], App]


def bind(host: str, port: int) -> socket.socket:
    """A bound socket that does not listen yet: a port in use is found before weights are loaded.

    Raises: `BadRequest` with the system's message.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with contextlib.ExitStack() as undo:
            listener = undo.enter_context(socket.socket(family, kind, protocol))
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            undo.pop_all()
            return listener
    except OSError as error:
        raise BadRequest(f"cannot listen on {host} port {port}: {error.strerror or error}", param="port") from error


def serve(
    config: ServeConfig, *, load_tokenizer: Callable[[], Any], make_app: MakeApp, engine: Sequence[str] = COMMAND
) -> int:
    """Serve until a signal arrives. Returns the exit status.

    Args:
        load_tokenizer: called once, in a thread, while the engine starts.
        make_app: builds the HTTP application from the started engine and the tokenizer.
        engine: command of the engine process.

    Raises: the `ServeError` that prevents the start.
    """
    if is_public(config.host) and config.api_key_file is None and not config.insecure:
        raise BadRequest(
            f"{config.host} can be reached from outside and there are no API keys: "
            "give --api-key-file, or --insecure to serve everybody",
            param="host",
        )
    malloc.limit_arenas(MALLOC_ARENAS)
    listener = bind(config.host, config.port)
    with listener, asyncio.Runner(loop_factory=_loop_factory()) as runner:
        status = runner.run(
            _ServerProcess(config, EngineClient(config, command=engine)).run(listener, load_tokenizer, make_app)
        )
        _end_within(LAST_THREADS, status)
        return status


class _Server(uvicorn.Server):
    """Uvicorn without its signal handlers; `_ServerProcess` installs its own before the engine starts."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None]:
        yield


class _ServerProcess:
    """One run of the server, from engine start to exit."""

    def __init__(self, config: ServeConfig, engine: EngineClient) -> None:
        self._config = config
        self._engine = engine
        self._limits = ConnectionLimits(connection_limit())
        self._stop_requested = asyncio.Event()

    async def run(self, listener: socket.socket, load_tokenizer: Callable[[], Any], make_app: MakeApp) -> int:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._on_signal, number)
        stop_requested = asyncio.create_task(self._stop_requested.wait())
        starting = asyncio.create_task(self._start(load_tokenizer))
        try:
            await asyncio.wait({stop_requested, starting}, return_when=asyncio.FIRST_COMPLETED)
            if not starting.done():
                starting.cancel()
                await asyncio.gather(starting, return_exceptions=True)
                return 0
            app = make_app(self._engine, starting.result())
            # What was loaded until now stays; collecting garbage among it would pause every stream for 0.1 s.
            gc.collect()
            gc.freeze()
            return await self._serve(listener, app, stop_requested)
        finally:
            stop_requested.cancel()
            await self._engine.stop()

    async def _start(self, load_tokenizer: Callable[[], Any]) -> Any:
        """Start the engine and load the tokenizer side by side; returns the tokenizer."""
        try:
            with _progress() as show:
                async with asyncio.TaskGroup() as both:
                    tokenizer = both.create_task(asyncio.to_thread(load_tokenizer))
                    both.create_task(self._engine.start(show))
        except BaseExceptionGroup as failures:  # the first failure; the other task was cancelled because of it
            raise failures.exceptions[0] from None
        return tokenizer.result()

    async def _serve(self, listener: socket.socket, app: App, stop_requested: asyncio.Task[Any]) -> int:
        server = _Server(
            uvicorn.Config(
                app.asgi,
                http=limited_protocol(self._limits),  # type: ignore[arg-type]  # a factory will do
                log_config=None,
                log_level="warning",
                access_log=False,
                timeout_graceful_shutdown=LAST_RESPONSES,
            )
        )
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        while not server.started and not serving.done():
            await asyncio.sleep(0.01)
        if self._engine.info is not None and server.started:
            _print_summary(self._engine.info, self._config.host, listener.getsockname()[1])
        await asyncio.wait({stop_requested, serving}, return_when=asyncio.FIRST_COMPLETED)
        # HTTP stays open during the drain: /ready answers 503, and streams get their final events.
        log.info("draining: running requests have %g s to finish", self._config.drain_timeout)
        limit = self._config.drain_timeout
        await asyncio.gather(self._engine.drain(limit), app.drain(limit))
        server.should_exit = True
        await asyncio.gather(self._engine.stop(), serving)
        return 0 if server.started else 1

    def _on_signal(self, number: signal.Signals) -> None:
        if not self._stop_requested.is_set():
            self._stop_requested.set()
            return
        self._engine.abandon()
        os._exit(128 + number)


def _end_within(seconds: float, status: int) -> None:
    """End the process if it has not ended by then, as Python waits for all threads."""
    timer = threading.Timer(seconds, os._exit, (status,))
    timer.daemon = True
    timer.start()


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    if sys.platform == "win32":
        return None
    import uvloop  # not available on Windows

    return uvloop.new_event_loop


@contextlib.contextmanager
def _progress() -> Generator[Callable[[str, float], None]]:
    """Start-up progress: a bar on a terminal, otherwise one log line per stage."""
    console = Console(stderr=True)
    if console.is_terminal:
        columns = (TextColumn("{task.description:<32}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task("starting", total=1.0)
            yield lambda stage, fraction: bar.update(task, description=stage, completed=fraction)
        return
    last = ""

    def show(stage: str, fraction: float) -> None:
        nonlocal last
        if stage != last:
            log.info("%s (%d %%)", stage, round(100 * fraction))
        last = stage

    yield show


def _describe_memory(place: str, parts: dict[str, int]) -> str:
    """What each part may take of a memory."""
    shown = ", ".join(f"{part} {size / (1 << 30):.2f}" for part, size in parts.items() if size)
    return f"{place}: at most {sum(parts.values()) / (1 << 30):.2f} GiB ({shown})"


def _print_summary(info: EngineInfo, host: str, port: int) -> None:
    table = Table.grid(padding=(0, 2))
    shown = f"[{host}]" if ":" in host else host
    shared = f", shared by {info.tensor_parallel} processes" if info.tensor_parallel > 1 else ""
    broken = f" ({info.broken_adapters} of them broken)" if info.broken_adapters else ""
    rows = {
        "model": f"{info.model} ({info.parameters / 1e6:,.1f} M parameters)",
        "device": f"{info.device}, {info.dtype}, {info.kernels}{shared}",
        "context": f"{info.max_model_len:,} tokens each, KV for {info.kv_tokens:,}",
        "adapters": f"{info.adapters} published{broken}, {info.adapter_slots} at once on the device",
        "memory": "; ".join(_describe_memory(place, parts) for place, parts in info.memory.items()),
        "store": info.store,
        "listening": f"http://{shown}:{port}",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    for note in info.notes:
        table.add_row("note", note)
    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 200)
    console.print(table)
    sys.stdout.flush()
