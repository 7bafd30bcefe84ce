"""Kernel table rows of `delta`: what it launches on a GPU for the groups of a model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from gpu_kernels_table import Build
from gpu_launches import recorded_launches
from kernel_cases import CPU

from lora_serve.kernels.contract import DeltaGroup, Segments
from lora_serve.kernels.gpu import delta

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
LOADS = {"shrink": "cp.async.cg.shared.global", "expand": "ld.global.v4"}  # sixteen bytes each
CASES = [  # rows' type, weights' type, rows, segments, longest, rank, targets
    (BF16, BF16, 32, 32, 1, 16, (80, 89, 90)),
    (BF16, BF16, 32, 32, 16, 64, (89,)),
    (BF16, BF16, 32, 32, 16, 1024, (90,)),  # as in a graph
    (BF16, BF16, 300, 200, 60, 32, (90,)),
    (BF16, BF16, 2048, 4, 2000, 16, (80, 90)),
    (BF16, BF16, 2048, 4, 2000, 64, (89, 90)),
    (FP16, FP16, 32, 32, 1, 32, (89,)),
    (FP16, FP16, 2048, 4, 2000, 64, (90,)),
    (FP32, FP32, 8, 8, 1, 16, (80,)),
    (FP32, FP32, 512, 4, 500, 64, (89,)),
    (BF16, FP16, 512, 4, 500, 16, (90,)),
]


def delta_builds() -> Iterator[Build]:
    """A group like q, k and v in decode and prefill, of low and high rank."""
    for dtype, weights, rows, count, longest, rank, targets in CASES:
        group = DeltaGroup(4096, (4096, 1024, 1024), 8, weights, CPU)
        many = torch.zeros(count, dtype=torch.int32)
        segments = Segments(many, many, many, many.float(), longest, rank)
        x, *outputs = (torch.zeros(rows, width, dtype=dtype) for width in (4096, *group.out_features))
        with recorded_launches(delta, LOADS, targets) as found:
            delta.delta(x, outputs, group, segments)
        scalars = ("ld.global.b16",) if FP32 not in (dtype, weights) else ()  # one element each
        yield from (replace(row, scalars=scalars) for row in found)
