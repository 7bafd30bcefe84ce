"""Host-to-device copies of adapters: from pinned memory, without delaying the kernels that run meanwhile."""

from __future__ import annotations

import torch
from gpu_device import DEVICE, gpu_only, here

from lora_serve.adapters.device_copy import DeviceCopier

pytestmark = [*here, gpu_only]
LARGE = 1 << 30  # bf16 numbers: two gibibytes take longer than any launch


def test_a_copy_to_the_device_does_not_delay_other_kernels() -> None:
    copier = DeviceCopier(DEVICE)
    flat = torch.ones(LARGE, dtype=torch.bfloat16)
    copier.pin_memory(flat)
    assert flat.is_pinned()
    small = torch.ones(8, device=DEVICE)
    (small + 1).sum().item()
    there, pending = copier.copy(flat)
    assert pending is not None
    two = (small + 1).sum()
    torch.cuda.current_stream().synchronize()
    under_way = not pending.complete
    assert two.item() == 16
    assert under_way, "the copy was done before a small sum: it proves nothing, or it was waited for"
    pending.make_stream_wait()
    assert float(there[-1]) == 1.0
    torch.cuda.synchronize()
    assert pending.complete
    assert float(there.min()) == 1.0


def test_pinned_or_empty_memory_is_not_pinned_again() -> None:
    copier = DeviceCopier(DEVICE)
    pinned = torch.ones(8).pin_memory()
    copier.pin_memory(pinned)
    assert pinned.is_pinned()
    copier.pin_memory(torch.ones(0))
    there, _ = copier.copy(pinned)
    torch.cuda.synchronize()
    assert there.cpu().equal(pinned)
