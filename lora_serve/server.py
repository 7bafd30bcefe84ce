"""The life of the serving process: bind, start the engine, serve HTTP, and go away in good order.

It decides when things begin and end; what is served is `api/app.py`, who computes is behind `engine/client.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Generator, Sequence
from typing import Any

import uvicorn
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from lora_serve.config import ServeConfig
from lora_serve.engine.client import COMMAND, EngineClient
from lora_serve.errors import BadRequest
from lora_serve.messages import EngineInfo

LAST_RESPONSES = 5  # seconds that open responses get to send their last bytes

log = logging.getLogger(__name__)

App = Callable[..., Any]  # ASGI
MakeApp = Callable[[EngineClient, Any], App]


def is_public(host: str) -> bool:
    """Whether others than this machine can reach `host`; a name that is not an address counts as public."""
    if host == "localhost":
        return False
    try:
        return not ipaddress.ip_address(host).is_loopback
    except ValueError:
        return True


def bind(host: str, port: int) -> socket.socket:
    """A bound socket that does not listen yet: a taken port is found before weights are loaded, and nobody waits in it.

    Raises: `BadRequest` with what the system said.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with contextlib.ExitStack() as undo:
            bound = undo.enter_context(socket.socket(family, kind, protocol))
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
            undo.pop_all()
            return bound
    except OSError as error:
        raise BadRequest(f"cannot listen on {host} port {port}: {error.strerror or error}", param="port") from error


def serve(
    config: ServeConfig, *, load_tokenizer: Callable[[], Any], make_app: MakeApp, engine: Sequence[str] = COMMAND
) -> int:
    """Serve until a signal says otherwise. Returns the exit status.

    Args:
        load_tokenizer: called once, in a thread, while the engine starts.
        make_app: the HTTP application over a started engine and the tokenizer.
        engine: command of the process that hosts the engine.

    Raises: the `ServeError` because of which the server cannot start.
    """
    if is_public(config.host) and config.api_key_file is None and not config.insecure:
        raise BadRequest(
            f"{config.host} can be reached from outside and there are no API keys: "
            "give --api-key-file, or --insecure to serve everybody",
            param="host",
        )
    bound = bind(config.host, config.port)
    with bound, asyncio.Runner(loop_factory=_loop_factory()) as runner:
        return runner.run(_Serving(config, EngineClient(config, command=engine)).run(bound, load_tokenizer, make_app))


class _Server(uvicorn.Server):
    """Uvicorn without its own signal handling; ours is there from the first second on."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None]:
        yield


class _Serving:
    def __init__(self, config: ServeConfig, engine: EngineClient) -> None:
        self._config = config
        self._engine = engine
        self._leave = asyncio.Event()

    async def run(self, bound: socket.socket, load_tokenizer: Callable[[], Any], make_app: MakeApp) -> int:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._signalled, number)
        leave = asyncio.create_task(self._leave.wait())
        starting = asyncio.create_task(self._start(load_tokenizer))
        try:
            await asyncio.wait({leave, starting}, return_when=asyncio.FIRST_COMPLETED)
            if not starting.done():
                starting.cancel()
                await asyncio.gather(starting, return_exceptions=True)
                return 0
            return await self._serve(bound, make_app(self._engine, starting.result()), leave)
        finally:
            leave.cancel()
            await self._engine.stop()

    async def _start(self, load_tokenizer: Callable[[], Any]) -> Any:
        """The tokenizer, once it and the engine are both there."""
        try:
            with _progress() as show:
                async with asyncio.TaskGroup() as both:
                    tokenizer = both.create_task(asyncio.to_thread(load_tokenizer))
                    both.create_task(self._engine.start(show))
        except BaseExceptionGroup as failures:  # the one that failed first; the other was cancelled for it
            raise failures.exceptions[0] from None
        return tokenizer.result()

    async def _serve(self, bound: socket.socket, app: App, leave: asyncio.Task[Any]) -> int:
        server = _Server(
            uvicorn.Config(
                app,
                http="httptools",
                log_config=None,
                log_level="warning",
                access_log=False,
                timeout_graceful_shutdown=LAST_RESPONSES,
            )
        )
        serving = asyncio.create_task(server.serve(sockets=[bound]))
        while not server.started and not serving.done():
            await asyncio.sleep(0.01)
        if self._engine.info is not None and server.started:
            _summarise(self._engine.info, self._config.host, bound.getsockname()[1])
        await asyncio.wait({leave, serving}, return_when=asyncio.FIRST_COMPLETED)
        # HTTP stays open while streams finish, so that /ready can say no and the engine's last words reach the clients.
        log.info("draining: running requests get %g s", self._config.drain_timeout)
        await self._engine.drain(self._config.drain_timeout)
        await self._engine.stop()
        server.should_exit = True
        await serving
        return 0 if server.started else 1

    def _signalled(self, number: signal.Signals) -> None:
        if not self._leave.is_set():
            self._leave.set()
            return
        self._engine.abandon()
        os._exit(128 + number)


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    if sys.platform == "win32":
        return None
    import uvloop  # not installable everywhere; asyncio's own loop does the same, slower

    return uvloop.new_event_loop


@contextlib.contextmanager
def _progress() -> Generator[Callable[[str, float], None]]:
    """A bar where a person watches, a log line per stage elsewhere."""
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


def _summarise(info: EngineInfo, host: str, port: int) -> None:
    table = Table.grid(padding=(0, 2))
    shown = f"[{host}]" if ":" in host else host
    rows = {
        "model": f"{info.model} ({info.parameters / 1e6:,.1f} M parameters)",
        "device": f"{info.device}, {info.dtype}, {info.kernels} kernels",
        "context": f"{info.max_model_len:,} tokens each, KV for {info.kv_tokens:,}",
        "adapters": f"{info.adapters} published, {info.adapter_slots} at once on the device",
        "listening": f"http://{shown}:{port}",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    for note in info.notes:
        table.add_row("note", note)
    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 200)
    console.print(table)
    sys.stdout.flush()
