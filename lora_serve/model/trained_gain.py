"""IA³'s gains in training: rows of a batch times the gain of each row's adapter, forwards and backwards.

y = l ⊙ x      dx = l ⊙ dy      dl += Σ over rows of dy ⊙ x
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lora_serve.model.training_step import AdapterSpan, Gain

GainedSpan = tuple[AdapterSpan, Gain]


def apply_gains(
    x: Tensor, spans: Sequence[AdapterSpan], module: str, *, on_input: bool, part: slice | None = None
) -> Tensor:
    """x [..., width] times the gains that a module's adapters have on its input, or on its output.

    Args:
        part: which numbers of the output x is; None: all.
    """
    found = [
        (span, gain if part is None else Gain(gain.values[part], gain.gradient[part], on_input))
        for span in spans
        if (gain := span.gains.get(module)) is not None and gain.on_input == on_input
    ]
    if not found:
        return x
    gained: Tensor = GainedRows.apply(x.reshape(-1, x.shape[-1]), found)  # type: ignore[no-untyped-call]
    return gained.view(x.shape)


class GainedRows(torch.autograd.Function):
    """Rows [rows, width] of which spans are multiplied; saves those of the spans."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gains: Sequence[GainedSpan]) -> Tensor:
        y, before = x.clone(), []
        for span, gain in gains:
            rows = x[span.start : span.end]
            before.append(rows.clone())
            y[span.start : span.end] = rows.float() * gain.values
        ctx.save_for_backward(*before)
        ctx.gains = gains
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        dx = dy.clone()
        for (span, gain), before in zip(ctx.gains, ctx.saved_tensors, strict=True):
            rows = dy[span.start : span.end].float()
            gain.gradient.add_((rows * before.float()).sum(0))
            dx[span.start : span.end] = rows * gain.values
        return dx, None
