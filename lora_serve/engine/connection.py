"""The engine's end of the connection to the API process: a socket, a queue of unsent messages, and a waker."""

from __future__ import annotations

import logging
import socket
from collections import deque
from contextlib import suppress
from math import ceil

import zmq

from lora_serve.errors import EngineFault, Failure
from lora_serve.messages import FromEngine, Reply, ToEngine, decode_to_engine, encode

MAX_UNREAD = 256  # updates that may be queued in the socket while the parent does not read
LINGER = 1000  # milliseconds for sending the last messages when the socket is closed

log = logging.getLogger(__name__)


class Waker:
    """Wakes the engine loop from any thread."""

    def __init__(self) -> None:
        self._read, self._write = socket.socketpair()
        self._read.setblocking(False)
        self._write.setblocking(False)

    def wake(self) -> None:
        with suppress(OSError):  # full: a wake-up is pending already; closed: nothing to wake
            self._write.send(b"\0")

    def fileno(self) -> int:
        return self._read.fileno()

    def clear(self) -> None:
        with suppress(BlockingIOError):
            self._read.recv(4096)

    def close(self) -> None:
        self._read.close()
        self._write.close()


class Connection:
    """The engine's end of the connection. Only `wait` blocks, with a timeout."""

    def __init__(self, address: str, waker: Waker) -> None:
        self._context = zmq.Context(io_threads=1)
        self._socket: zmq.Socket[bytes] = self._context.socket(zmq.DEALER)
        self._socket.linger = LINGER
        self._socket.sndhwm = MAX_UNREAD
        self._socket.connect(address)
        self._waker = waker
        self._unsent: deque[bytes] = deque()
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(waker.fileno(), zmq.POLLIN)

    def send(self, message: FromEngine) -> None:
        """Send, or queue until the parent reads again. A reply that cannot be encoded is sent as a failure."""
        try:
            self._unsent.append(encode(message))
        except (ValueError, OverflowError):
            if not isinstance(message, Reply):
                raise
            log.exception("a reply could not be encoded")
            self._unsent.append(encode(Reply(message.id, failure=Failure.of(EngineFault("the answer cannot be sent")))))
        self.flush()

    def flush(self) -> bool:
        """Send what is queued, as far as the socket takes it; whether nothing is left."""
        with suppress(zmq.Again):
            while self._unsent:
                self._socket.send(self._unsent[0], zmq.NOBLOCK)
                self._unsent.popleft()
        return not self._unsent

    def receive(self) -> list[ToEngine]:
        """All messages that have arrived."""
        messages: list[ToEngine] = []
        with suppress(zmq.Again):
            while True:
                messages.append(decode_to_engine(self._socket.recv(zmq.NOBLOCK)))
        return messages

    def wait(self, seconds: float) -> None:
        """Wait for a message or a wake-up, `seconds` at most."""
        self._poller.poll(max(0, ceil(seconds * 1000)))
        self._waker.clear()

    def close(self) -> None:
        self._context.destroy(linger=LINGER)
