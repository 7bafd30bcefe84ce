"""GPU properties that kernel launches depend on, and Triton dtypes."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton.language as tl

TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@cache
def processors(device: torch.device, interpreted: int = 4) -> int:
    """Streaming multiprocessors of a GPU; `interpreted` on any other device (Triton's interpreter)."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else interpreted


def launch_options(dependent: bool) -> dict[str, Any]:
    """Options of a kernel's launch; see `plan_table.Launch`. Compilers for other GPUs do not know `launch_pdl`."""
    return {"DEPENDENT": True, "launch_pdl": True} if dependent else {"DEPENDENT": False}


@cache
def hopper(device: torch.device) -> bool:
    """Whether the GPU is of compute capability 9: products of large tiles straight from shared memory."""
    return device.type == "cuda" and torch.cuda.get_device_properties(device).major == 9
