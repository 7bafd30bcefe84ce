"""Operations that one kernel runs, timed beside the operations that it stands for, each replayed as in a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bench.gpu.forward_pass import BLOCK, DTYPE, time_in_turns
from bench.shapes import Shape
from lora_serve.kernels.contract import Kernels, Recording, Rotation


def time_operation_pairs(
    kernels: Kernels, shape: Shape, sizes: Sequence[int], device: torch.device, budget: float
) -> dict[str, dict[str, float]]:
    """Seconds of the operation of all layers of a model, by what is compared and numbers of rows."""
    found = {}
    with torch.inference_mode():
        for rows in sizes:
            runs = _rope_and_write(kernels, shape, rows, device)  # keeps the tensors that are read alive
            recordings = {name: _recorded(kernels, run) for name, run in runs.items()}
            replays = {name: recording.replay for name, recording in recordings.items()}
            found[f"RoPE and KV write, {rows} rows"] = time_in_turns(replays, device, budget)
    return found


def _rope_and_write(kernels: Kernels, shape: Shape, rows: int, device: torch.device) -> dict[str, Callable[[], Tensor]]:
    """The operations on heads that are parts of one product's outputs, as a layer has them."""
    widths = [count * shape.head_dim for count in (shape.heads, shape.kv_heads, shape.kv_heads)]
    outputs = torch.randn(1, rows, sum(widths), device=device).to(DTYPE).split_with_sizes(widths, -1)
    q, k, v = (each.view(1, rows, -1, shape.head_dim).transpose(1, 2) for each in outputs)
    cos, sin = torch.randn(2, 1, rows, shape.head_dim, device=device).to(DTYPE)
    pool = (rows, BLOCK, shape.kv_heads, shape.head_dim)  # each row is a sequence's
    keys, values = (torch.zeros(pool, dtype=DTYPE, device=device) for _ in range(2))
    index = BLOCK * torch.arange(rows, device=device)

    def apart() -> Tensor:
        for _ in range(shape.layers):
            turned, rotated = kernels.rope(q, k, cos, sin)
            kernels.write_kv(keys, values, rotated[0].transpose(0, 1), v[0].transpose(0, 1), index)
        return turned

    def fused() -> Tensor:
        for _ in range(shape.layers):
            turned = kernels.rope_and_write_kv(Rotation(q, k, cos, sin), v, keys, values, index)
        return turned

    return {"apart": apart, "fused": fused}


def _recorded(kernels: Kernels, run: Callable[[], Tensor]) -> Recording:
    """The calls, to be replayed. Raises RuntimeError if they cannot be."""
    recording = kernels.new_recording(check_values=False)
    recording.record(run)
    if recording.unsupported is not None:
        raise RuntimeError(recording.unsupported)
    return recording
