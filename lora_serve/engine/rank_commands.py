"""Commands from rank 0 of a base to the other ranks, and the connection that carries them.

The other ranks carry out commands in the order in which rank 0 gives them, and rank 0 does the same itself: all make
the same collectives in the same order. Commands are msgpack; an adapter's weights travel beside one as a descriptor of
memory that the ranks map, so that rank 0 copies them once for all.
"""

from __future__ import annotations

import mmap
import os
import socket
from collections.abc import Callable
from typing import Any

import msgspec
import torch
from torch import Tensor

from lora_serve.adapters.adapter import Adapter
from lora_serve.adapters.lowered_file import FlatLayout, flat_bytes
from lora_serve.model.batch import Batch

LENGTH = 8  # bytes before a message


class JoinRanks(msgspec.Struct, frozen=True, tag="join"):
    """Become a rank; `config` is the server's as JSON, `meeting_point` see `TensorParallel`."""

    rank: int
    config: str
    meeting_point: str
    overlap: bool | None


class RunStep(msgspec.Struct, frozen=True, tag="run"):
    """Run a forward pass."""

    batch: Batch


class FillSlot(msgspec.Struct, frozen=True, tag="fill"):
    """Load an adapter, whose flat tensor comes with the command, into a free slot. Answered with a `FilledSlot`."""

    digest: str
    layout: FlatLayout
    dtype: str
    elements: int


class EmptySlot(msgspec.Struct, frozen=True, tag="empty"):
    """Evict the adapter in a slot, if there is one."""

    slot: int


class Leave(msgspec.Struct, frozen=True, tag="leave"):
    """End the process."""


class FilledSlot(msgspec.Struct, frozen=True, tag="filled"):
    """The slot into which an adapter was loaded; None: the device has no memory for it."""

    slot: int | None


RankCommand = JoinRanks | RunStep | FillSlot | EmptySlot | Leave
_encode = msgspec.msgpack.Encoder(enc_hook=list).encode  # ranges
_decode = msgspec.msgpack.Decoder(RankCommand | FilledSlot).decode


class RankConnection:
    """One end of the connection between rank 0 and another rank."""

    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected

    def send(self, message: bytes, descriptor: int | None = None) -> None:
        """Send an encoded message. Raises OSError if the other end is gone."""
        head = len(message).to_bytes(LENGTH, "little")
        if descriptor is None:
            self._socket.sendall(head + message)
        else:
            sent = socket.send_fds(self._socket, [head], [descriptor])
            self._socket.sendall(head[sent:] + message)

    def receive(self) -> tuple[Any, int | None]:
        """Wait for a message; returns it and the descriptor that came with it. Raises EOFError if the other is gone."""
        head, descriptors, _, _ = socket.recv_fds(self._socket, LENGTH, 1)
        if not head:
            raise EOFError
        head += self._read(LENGTH - len(head))
        message = _decode(self._read(int.from_bytes(head, "little")))
        return message, descriptors[0] if descriptors else None

    def close(self) -> None:
        self._socket.close()

    def _read(self, length: int) -> bytearray:
        data = bytearray(length)
        view = memoryview(data)
        while view:
            count = self._socket.recv_into(view)
            if not count:
                raise EOFError
            view = view[count:]
        return data


def encode_command(command: RankCommand | FilledSlot) -> bytes:
    """A message as it is sent."""
    return _encode(command)


def fill_slot(load: Callable[[Adapter], int], adapter: Adapter) -> FilledSlot:
    """Load an adapter by `DeviceSlots.load`; the answer to that."""
    try:
        return FilledSlot(load(adapter))
    except torch.OutOfMemoryError:
        return FilledSlot(None)


def shared_memory(flat: Tensor) -> int:
    """A descriptor of anonymous memory that holds a copy of a tensor's bytes; to be closed."""
    descriptor = os.memfd_create("adapter")
    left = flat_bytes(flat)
    while left:
        left = left[os.write(descriptor, left) :]
    return descriptor


def map_memory(descriptor: int, dtype: str, elements: int) -> Tensor:
    """The tensor in such memory, mapped read-only; closes the descriptor."""
    kind: torch.dtype = getattr(torch, dtype)
    try:
        if not elements:
            return torch.empty(0, dtype=kind)
        mapping = mmap.mmap(descriptor, elements * kind.itemsize, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        return torch.frombuffer(mapping, dtype=kind)
    finally:
        os.close(descriptor)
