"""Time by kernel of a step on a GPU, from torch's profiler (on a CPU, by operator)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

STEPS = 5
MOST = 25  # kernels that are listed


def kernel_times(step: Callable[[], object], device: torch.device) -> dict[str, Any]:
    """Seconds that the device is busy in one step, and [name, launches, microseconds] of the kernels that take most."""
    on_gpu = device.type == "cuda"
    kind = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    step()
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as found:
        for _ in range(STEPS):
            step()
        if on_gpu:
            torch.cuda.synchronize(device)
    events = [(each.key, each.count / STEPS, getattr(each, kind) / STEPS) for each in found.key_averages()]
    events = sorted((each for each in events if each[2] > 0), key=lambda each: -each[2])
    return {"busy": sum(each[2] for each in events) / 1e6, "kernels": [list(each) for each in events[:MOST]]}
