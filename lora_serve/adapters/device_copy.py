"""An adapter's way to the device: a copy beside whatever runs there, from memory that the device reads by itself.

On a CPU the device's memory is the host's: nothing is copied, and everything has arrived.
"""

from __future__ import annotations

import logging
import weakref

import torch
from torch import Tensor

log = logging.getLogger(__name__)


class PendingCopy:
    """A copy on its way; it keeps its source until it is there."""

    def __init__(self, source: Tensor, event: torch.cuda.Event) -> None:
        self._source: Tensor | None = source
        self._event = event

    @property
    def there(self) -> bool:
        """Whether the copy is complete; asked without waiting."""
        if self._source is not None and self._event.query():  # type: ignore[no-untyped-call]
            self._source = None
        return self._source is None

    def wait_for_copies(self) -> None:
        """Have the device do nothing that is launched from now on before the copy is complete."""
        if not self.there:
            torch.cuda.current_stream().wait_event(self._event)


class Upload:
    """Copies to one device, on a stream of their own."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._under_way: list[PendingCopy] = []
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def pin(self, flat: Tensor) -> None:
        """Let the device read the tensor's memory by itself, for as long as the tensor lives; takes milliseconds."""
        if self._stream is None or flat.is_pinned() or not flat.numel():
            return
        runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        place = flat.data_ptr()
        # Registered where it lies: memory from torch's own pool would be rounded up to a power of two.
        with torch.cuda.device(self._device):  # each thread has its own
            failed = int(runtime.cudaHostRegister(place, flat.nbytes, 0))
        if not failed:
            weakref.finalize(flat, runtime.cudaHostUnregister, place)
        else:
            log.warning("an adapter's memory cannot be pinned; its copy to the device will hold steps up")

    def send(self, flat: Tensor) -> tuple[Tensor, PendingCopy | None]:
        """The tensor on the device, and its arrival if that lies in the future."""
        if self._stream is None:
            return flat.to(self._device), None
        current = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._stream):
            there = flat.to(self._device, non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
        there.record_stream(current)  # its memory is handed on only when the steps that read it are done
        self._under_way = [arrival for arrival in self._under_way if not arrival.there]  # the others keep their source
        self._under_way.append(PendingCopy(flat, event))
        return there, self._under_way[-1]
