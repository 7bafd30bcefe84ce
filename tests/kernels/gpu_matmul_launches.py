"""Kernel table rows of quantised linear layers: what they launch on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from gpu_kernels_table import Build
from gpu_launches import recorded_launches

from lora_serve.kernels.gpu import matmul
from lora_serve.kernels.packed_weight import Scheme

COPIES = "cp.async.cg.shared.global"  # sixteen bytes each
LOADS = {
    "round_rows": "ld.global.v4",
    "round_rows_to_fp8": "ld.global.v4",
    "multiply": COPIES,
    "add_splits": "ld.global.v4",
}
CASES: list[tuple[Scheme, torch.dtype, int, tuple[int, ...]]] = [  # scheme, rows' type, rows, targets
    ("int8", torch.bfloat16, 1, (80, 89, 90)),
    ("int8", torch.bfloat16, 32, (90,)),
    ("int8", torch.bfloat16, 64, (89, 90)),
    ("int8", torch.float16, 500, (80, 89, 90)),
    ("int4", torch.bfloat16, 1, (80, 89, 90)),
    ("int4", torch.float32, 32, (90,)),
    ("int4", torch.bfloat16, 64, (89, 90)),
    ("int4", torch.bfloat16, 500, (80, 89, 90)),
    ("fp8", torch.bfloat16, 1, (89, 90)),
    ("fp8", torch.bfloat16, 64, (89, 90)),
]


def linear_builds() -> Iterator[Build]:
    """A layer whose input is split, and one whose is not, with a number of outputs that no tile divides."""
    for scheme, dtype, rows, targets in CASES:
        layers = [(matmul.pack(torch.zeros(out, 1024), scheme), torch.zeros(out).to(dtype)) for out in (64, 4099)]
        with recorded_launches(matmul, LOADS, targets) as found:
            for each in layers:
                matmul.linear(torch.zeros(rows, 1024, dtype=dtype), [each])
        yield from (replace(row, scalars=("ld.global.b8",)) for row in found)  # one number each
