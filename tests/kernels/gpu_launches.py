"""Kernel table rows taken from launches: what attention and the pointwise functions launch on a GPU.

The functions run on the host with every kernel replaced by a recorder of its arguments, so a row equals the launch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from types import ModuleType
from typing import Any

import torch
from gpu_kernels_table import Build
from kernel_cases import AttentionCase
from torch import Tensor

from lora_serve.kernels.contract import Rotation
from lora_serve.kernels.gpu import attention, pointwise

TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
TYPES |= {torch.int8: "i8", torch.float8_e4m3fn: "fp8e4nv", torch.int32: "i32", torch.int64: "i64"}
SHAPES = ((1, 80), (4, 128), (2, 256))  # query heads per kv head, and their width


class RecordedKernel:
    """Stands for a kernel: `kernel[grid](*args)` adds a row instead of a launch."""

    def __init__(self, kernel: Any, rows: list[Build], targets: tuple[int, ...], vectors: tuple[str, ...]) -> None:
        self._kernel, self._rows, self._targets, self._vectors = kernel, rows, targets, vectors

    def __getitem__(self, grid: tuple[int, ...]) -> RecordedKernel:
        return self

    def __call__(
        self, *args: Any, num_warps: int = 4, num_stages: int = 3, launch_pdl: bool = False, **constexprs: Any
    ) -> None:
        given = dict(zip(self._kernel.arg_names, args, strict=False))
        types = {name: _type(value) for name, value in given.items() if value is not None}
        constexprs |= {name: None for name, value in given.items() if value is None}
        steady = {parameter.name for parameter in self._kernel.params if not parameter.do_not_specialize}
        aligned = tuple(name for name, value in given.items() if name in steady and _aligned(value))
        name = f"{self._kernel.__name__} {constexprs}"
        self._rows.append(
            Build(
                name,
                self._kernel,
                types,
                constexprs,
                aligned,
                warps=num_warps,
                stages=num_stages,
                dependent=launch_pdl,
                vectors=self._vectors,
                targets=self._targets,
            )
        )


def _type(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"*{TYPES[value.dtype]}"
    return "fp32" if isinstance(value, float) else "i32"


def _aligned(value: Any) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0)


@contextmanager
def recorded_launches(module: ModuleType, kernels: dict[str, str], targets: tuple[int, ...]) -> Iterator[list[Build]]:
    """The rows of what `module` launches inside; `kernels`: their names, each with what its PTX must contain."""
    rows: list[Build] = []
    before = {name: getattr(module, name) for name in kernels}
    for name, vector in kernels.items():
        setattr(module, name, RecordedKernel(before[name], rows, targets, (vector,)))
    yield rows
    for name, kernel in before.items():
        setattr(module, name, kernel)


def attention_builds() -> Iterator[Build]:
    """Every tile, without options and with window, softcap and sinks; contexts split and not; prompts and none."""
    copies = "cp.async.cg.shared.global"  # sixteen bytes each
    kernels = {"decode": copies, "prefill": copies, "combine": "ld.global.v4"}
    real = attention.processors, attention.hopper
    for (share, width), dtype, hopper in product(SHAPES, (torch.bfloat16, torch.float32), (True, False)):
        if dtype is torch.float32 and width > 128:
            continue  # as at 128, and slow to compile
        case = AttentionCase(0, dtype, 8, share, width, width, 16, [(1, 300), (3, 64)], None, None, False)
        q, keys, values, metadata = case.tensors()
        sinks = torch.zeros(8 * share, dtype=dtype)
        with recorded_launches(attention, kernels, (90,) if hopper else (80, 89)) as rows:
            attention._plan.cache_clear()  # it depends on the device
            attention.processors, attention.hopper = lambda *_: 132, lambda _, hopper=hopper: hopper  # type: ignore[assignment,misc]
            attention.attention(q, keys, values, metadata, 0.1, window=300, softcap=30.0, sinks=sinks)
            attention.attention(q, keys, values, replace(metadata, max_context_len=64), 0.1)
            attention.attention(q, keys, values, replace(metadata, max_query_len=1), 0.1)
        attention.processors, attention.hopper = real
        attention._plan.cache_clear()
        yield from rows


def pointwise_builds() -> Iterator[Build]:
    """The pointwise kernels at widths of real models."""
    kernels = dict.fromkeys(("_norm", "_gated", "_rope", "_write", "_rope_and_write"), "ld.global.v4")
    with recorded_launches(pointwise, kernels, (90,)) as rows:
        x, gate = torch.zeros(2, 5120).bfloat16(), torch.zeros(2, 14336).bfloat16()
        for dependent in (False, True):
            for wide, weight in ((x, x[0]), (x[:, :128], x[0, :128])):
                pointwise.rms_norm(wide, weight, 1e-6, plus_one=False, dependent=dependent)
                pointwise.add_rms_norm(wide, wide, weight, 1e-6, plus_one=True, dependent=dependent)
            pointwise.gated_activation(gate, gate, "silu", dependent=dependent)
            pointwise.gated_activation(gate, gate, "gelu_tanh", dependent=dependent)
            for dim in (80, 128):
                q, k = torch.zeros(3, 32, dim).bfloat16(), torch.zeros(3, 8, dim).bfloat16()
                turn, index = torch.zeros(1, 3, dim), torch.zeros(3, dtype=torch.int64)
                heads = [each.transpose(0, 1)[None] for each in (q, k)]
                pointwise.rope(*heads, turn, turn, dependent=dependent)  # type: ignore[misc]
                pool = torch.zeros(4, 16, 8, dim).bfloat16()
                pointwise.write_kv(pool, pool, k, k, index, dependent=dependent)
                rotation = Rotation(heads[0], heads[1], turn, turn)
                pointwise.rope_and_write_kv(rotation, heads[1], pool, pool, index, dependent=dependent)
    yield from rows
