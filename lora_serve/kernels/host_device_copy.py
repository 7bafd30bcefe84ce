"""Small numbers to the device and back without waiting for what it is busy with.

On a CPU the device's memory is the host's, and nothing here copies.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def to_device(values: Sequence[int] | Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Values [n] as a tensor on the device. Whatever is launched after this finds them there."""
    host = torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda")
    return host.to(device, non_blocking=True)


class DeviceToHostCopy:
    """A tensor on its way to the host, as it is when all that was launched before this is done."""

    def __init__(self, x: Tensor) -> None:
        self._host = x
        self._event: torch.cuda.Event | None = None
        if x.is_cuda:
            self._host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
            self._host.copy_(x, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()

    def wait(self) -> Tensor:
        """The tensor, on the host."""
        if self._event is not None:
            self._event.synchronize()
        return self._host
