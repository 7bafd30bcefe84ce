"""Host-to-device copies of adapters on a separate CUDA stream, overlapping with steps.

Source memory is pinned, so that a copy does not block the host. On a CPU nothing is copied: the host tensor is used.
"""

from __future__ import annotations

import logging
import weakref

import torch
from torch import Tensor

log = logging.getLogger(__name__)


class PendingCopy:
    """A copy that may still be running; keeps its source alive until it is complete."""

    def __init__(self, source: Tensor, event: torch.cuda.Event) -> None:
        self._source: Tensor | None = source
        self._event = event

    @property
    def complete(self) -> bool:
        """Whether the copy is complete; does not wait."""
        if self._source is not None and self._event.query():  # type: ignore[no-untyped-call]
            self._source = None
        return self._source is None

    def make_stream_wait(self) -> None:
        """Make work launched from now on on the current stream wait for the copy."""
        if not self.complete:
            torch.cuda.current_stream().wait_event(self._event)


class DeviceCopier:
    """Copies adapters to one device, one after the other.

    Attributes:
        bytes_per_second: an estimate; only how long sequences wait depends on it.
    """

    bytes_per_second = 10e9

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pending: list[PendingCopy] = []
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def pin_memory(self, flat: Tensor) -> None:
        """Pin a tensor's memory in place until the tensor is freed; takes milliseconds. Does nothing on a CPU."""
        if self._stream is None or flat.is_pinned() or not flat.numel():
            return
        runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        address = flat.data_ptr()
        # Registered in place: torch's pinned allocator would round the size up to a power of two.
        with torch.cuda.device(self._device):  # the current device is per thread
            failed = int(runtime.cudaHostRegister(address, flat.nbytes, 0))
        if not failed:
            weakref.finalize(flat, runtime.cudaHostUnregister, address)
        else:
            log.warning("cannot pin host memory of an adapter; its copy to the device will block steps")

    def copy(self, flat: Tensor) -> tuple[Tensor, PendingCopy | None]:
        """Start copying a tensor; returns the device tensor, and the copy if it may not be complete yet."""
        if self._stream is None:
            return flat.to(self._device), None
        current = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._stream):
            on_device = flat.to(self._device, non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
        on_device.record_stream(current)  # its memory is reused only after the steps that read it
        self._pending = [pending for pending in self._pending if not pending.complete]  # the others keep their source
        self._pending.append(PendingCopy(flat, event))
        return on_device, self._pending[-1]
