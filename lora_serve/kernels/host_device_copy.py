"""Non-blocking copies of small tensors between host and device.

On a CPU, device memory is host memory and nothing is copied.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def to_device(values: Sequence[int] | Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Values as a tensor [n] on the device, for everything that is launched on this stream afterwards."""
    host = torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda")
    return host.to(device, non_blocking=True)


class DeviceToHostCopy:
    """An asynchronous copy of a tensor to the host, ordered after everything launched on this stream before."""

    def __init__(self, x: Tensor) -> None:
        self._host = x
        self._event: torch.cuda.Event | None = None
        if x.is_cuda:
            self._host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
            self._host.copy_(x, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()

    def wait(self) -> Tensor:
        """Wait for the copy; the tensor on the host."""
        if self._event is not None:
            self._event.synchronize()
        return self._host
