"""A server process that forks others, each of which starts in milliseconds with everything imported.

The server is forked from this process itself (`ForkServer.fork`), while that has no threads yet: what is imported is
shared memory, and costs nothing. Python's `multiprocessing.forkserver` would import it a second time, for seconds and
hundreds of megabytes. Only where nobody called `fork`, or where the server was killed, is it started as a program.

    this process ──one byte, two descriptors──▶ server ──fork──▶ process: target(connection)
                 ◀────────── exit status ──────
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import select
import signal
import socket
import struct
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import NoReturn

_PR_SET_PDEATHSIG = 1  # of Linux's prctl
_PROGRAM = "import json, sys; sys.path[:], *rest = json.loads(sys.argv[1]); import {0} as server; server.main(*rest)"

Target = Callable[[Connection], None]


@dataclass(frozen=True)
class ForkedProcess:
    """A process that runs the target.

    Attributes:
        connection: to it, both ways; ends when the process does.
    """

    pid: int
    connection: Connection
    _status: int

    def close(self) -> int | None:
        """Wait for its end. Returns the exit status, minus the signal's number if one ended it; None: nobody knows."""
        self.connection.close()
        with open(self._status, "rb") as file:
            found = file.read()
        return struct.unpack("i", found)[0] if found else None


class ForkServer:
    """The server of this process. Methods other than `fork` may be called from any thread.

    Args:
        target: a function of a module, which each process runs; its end is the end of the process.
        imports: modules that the server imports first if it is started as a program.
    """

    def __init__(self, target: Target, imports: Sequence[str] = ()) -> None:
        self._target, self._imports = target, imports
        self._lock = threading.Lock()
        self._control: socket.socket | None = None
        self._pid = 0

    def fork(self) -> None:
        """Start the server as a copy of this process, which should have one thread and all modules imported."""
        ours, theirs = socket.socketpair()
        pid = _fork()
        if not pid:
            ours.close()
            _serve(theirs, self._target)
        theirs.close()
        self._control, self._pid = ours, pid

    def start(self) -> ForkedProcess:
        """Start a process that runs the target. Raises EOFError or OSError if that fails twice.

        Processes that run go on in any case, unless the server was killed.
        """
        with self._lock:
            if self._control is not None:
                try:
                    return _request(self._control)
                except (OSError, EOFError):
                    if _is_open(self._control):  # no process could be made, or it was killed at once
                        return _request(self._control)
                    self.close()
            self._control, self._pid = self._spawn()
            return _request(self._control)

    def close(self) -> None:
        """End the server; the next process that is started starts another."""
        if self._control is not None:
            self._control.close()
            self._control = None
            with suppress(ChildProcessError):
                os.waitpid(self._pid, 0)

    def _spawn(self) -> tuple[socket.socket, int]:
        """Start the server as a program, with the control socket for its standard input."""
        ours, theirs = socket.socketpair()
        with theirs:
            arguments = json.dumps([sys.path, self._target.__module__, self._target.__name__, list(self._imports)])
            command = [sys.executable, "-c", _PROGRAM.format(__name__), arguments]
            actions = [(os.POSIX_SPAWN_DUP2, theirs.fileno(), 0)]
            return ours, os.posix_spawn(sys.executable, command, os.environ, file_actions=actions)


def main(module: str, target: str, imports: Sequence[str]) -> NoReturn:
    """Run the server, whose control socket is the standard input."""
    for name in imports:
        import_module(name)
    _serve(socket.socket(fileno=os.dup(0)), getattr(import_module(module), target))


def _request(control: socket.socket) -> ForkedProcess:
    """Ask for a process, and wait until it runs."""
    connection, theirs = Pipe()
    status, sender = os.pipe()
    try:
        socket.send_fds(control, [b"\0"], [theirs.fileno(), sender])
    except OSError:
        os.close(status)
        connection.close()
        raise
    finally:
        theirs.close()
        os.close(sender)
    try:
        # It ends with the server from here on, which it would not if it was stopped before.
        return ForkedProcess(int(connection.recv_bytes()), connection, status)
    except (OSError, EOFError):
        os.close(status)
        connection.close()
        raise


def _is_open(control: socket.socket) -> bool:
    """Whether the server, which sends nothing, has its end of the socket."""
    try:
        control.recv(1, socket.MSG_DONTWAIT)
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False


def _fork() -> int:
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # the threads of a BLAS
        return os.fork()


def _serve(control: socket.socket, target: Target) -> NoReturn:
    """Fork a process for each request, and tell how it ended; until the other end of the socket is closed."""
    try:
        for number in (signal.SIGINT, signal.SIGTERM):  # sent to the whole group; the other end decides
            signal.signal(number, signal.SIG_IGN)
        gc.freeze()  # what is shared stays so
        woken, waker = os.pipe()
        os.set_blocking(woken, False)
        os.set_blocking(waker, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(waker)
        running: dict[int, int] = {}  # process → where its status is told
        while True:
            ready, _, _ = select.select([control.fileno(), woken], [], [])
            if woken in ready:
                with suppress(BlockingIOError):
                    os.read(woken, 4096)
                _tell_ended(running)
            if control.fileno() not in ready:
                continue
            request, descriptors, _, _ = socket.recv_fds(control, 1, 2)
            if not request:
                for pid in running:  # also of a system on which they would outlive this process if they are stopped
                    os.kill(pid, signal.SIGKILL)
                os._exit(0)
            server = os.getpid()
            try:
                connection, status = descriptors  # fewer if this process has too many open
                pid = _fork()
            except (OSError, ValueError):  # the other end sees that nobody has these
                traceback.print_exc()
                for each in descriptors:
                    os.close(each)
                continue
            if not pid:
                for each in (control.detach(), woken, waker, status, *running.values()):
                    os.close(each)
                _run(target, connection, server)
            os.close(connection)
            running[pid] = status
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def _tell_ended(running: dict[int, int]) -> None:
    while running:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if not pid:
            return
        told = running.pop(pid)
        with suppress(BrokenPipeError):  # nobody waits for it
            os.write(told, struct.pack("i", os.waitstatus_to_exitcode(status)))
        os.close(told)


def _run(target: Target, connection: int, server: int) -> NoReturn:
    """Run the target in this process, which ends with it, or with the server, also while it is stopped."""
    try:
        signal.set_wakeup_fd(-1, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        with suppress(AttributeError):  # Linux has it
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        threading.Thread(target=_exit_with, args=(server,), daemon=True).start()
        with Connection(connection) as opened:
            opened.send_bytes(str(os.getpid()).encode())
            target(opened)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def _exit_with(server: int) -> None:
    while os.getppid() == server:
        time.sleep(0.5)
    os._exit(1)
