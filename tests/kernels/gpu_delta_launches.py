"""Kernel table rows of `delta` and `delta_backward`: what they launch on a GPU for the groups of a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from gpu_kernels_table import Build
from gpu_launches import recorded_launches
from kernel_cases import CPU

from lora_serve.kernels.contract import DeltaGroup, Segments
from lora_serve.kernels.gpu import delta, delta_backward
from lora_serve.kernels.gpu.plan_table import NO_PLANS, DeltaPlan, DeltaProblem, PlanTable, rows_bucket

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
LOADS = {
    "expand_gated": "ld.global.v4",
    "shrink": "cp.async.cg.shared.global",
    "expand": "ld.global.v4",
}  # sixteen bytes each
PLANS = [  # besides the one by rule
    DeltaPlan(4, 16, 512, 512, 16, 4, 8, "dependent"),
    DeltaPlan(2, 64, 64, 256, 16, 8, 4, "dependent"),
]
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
        launches = [NO_PLANS, *(_every(plan, group, rows, longest) for plan in PLANS if dtype is weights is BF16)]
        with recorded_launches(delta, LOADS, targets) as found, processors_of_a_gpu():
            for table in launches:
                delta.delta(x, outputs, group, segments, table)
                if longest == 1:
                    mlp = DeltaGroup(4096, (14336, 14336), 8, weights, CPU)
                    both = [torch.zeros(rows, 14336, dtype=dtype) for _ in range(2)]
                    delta.DeltaCall(x, mlp, segments, table).expand_gated(both, "silu")
        for row in found:
            if row.dependent:
                row = replace(row, targets=(90,))  # no older GPU has dependent launches
            # Of few columns, each thread of a row's program loads and stores one output.
            few = row.constexprs.get("BLOCK_N", 512) < 2 * 32 * row.warps
            yield replace(row, scalars=() if few or FP32 in (dtype, weights) else ("ld.global.b16",))


def delta_backward_builds() -> Iterator[Build]:
    """The same group in training: a few adapters with many rows each."""
    vectors = {
        "shrink_gradients": "cp.async.cg.shared.global",
        "add_input_gradient": "ld.global.v4",
        "add_matrix_gradients": "ld.global.v4",
    }
    for dtype, weights in ((BF16, BF16), (BF16, FP32), (FP32, FP32)):  # a trainer computes with float32 matrices
        group, gradients = (DeltaGroup(4096, (4096, 1024, 1024), 8, kind, CPU) for kind in (weights, FP32))
        four = torch.zeros(4, dtype=torch.int32)
        segments = Segments(four, four, four, four.float(), 500, 16)
        x, *grads = (torch.zeros(2000, width, dtype=dtype) for width in (4096, *group.out_features))
        with (
            recorded_launches(delta, LOADS, (90,)),
            recorded_launches(delta_backward, vectors, (90,)) as found,
            processors_of_a_gpu(),
        ):
            delta_backward.delta_backward(x, grads, x, group, segments, gradients)
        yield from found


def _every(plan: DeltaPlan, group: DeltaGroup, rows: int, longest: int) -> PlanTable:
    """A table with this plan for the call."""
    table = PlanTable()
    table.delta[DeltaProblem(group.in_features, group.out_features, rows_bucket(rows), longest > delta.FEW)] = plan
    return table


@contextmanager
def processors_of_a_gpu() -> Iterator[None]:
    before, delta.processors = delta.processors, lambda *_: 132  # type: ignore[assignment]
    yield
    delta.processors = before
