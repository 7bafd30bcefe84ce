"""LoRA deltas of one adapter's rows, with dropout of their input or without, forwards and backwards, in torch.

    y += B (A d(x))        d(x) = mask ⊙ x / (1 − rate), a mask of its own for each module

The mask is drawn again where it is needed, from the seed of the pass and the module's name.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from lora_serve.kernels.contract import Delta
from lora_serve.model.training_step import DeltaDropout


def add_dropped_delta(y: Tensor, x: Tensor, delta: Delta, dropout: DeltaDropout | None, module: str) -> None:
    """Add the delta of x [rows, in] to y [rows, out]."""
    dropped = x.float() if dropout is None else x.float() * dropout_factors(dropout, module, x)
    y += ((dropped @ delta.a.T) @ delta.b).to(y.dtype)


def add_dropped_gradients(
    x: Tensor, dy: Tensor, dx: Tensor, delta: Delta, gradient: Delta, dropout: DeltaDropout | None, module: str
) -> None:
    """Add the gradient of x [rows, in] to dx, and those of A and B to `gradient`."""
    factors = 1.0 if dropout is None else dropout_factors(dropout, module, x)
    g = dy.float()
    dropped, inner = x.float() * factors, g @ delta.b.T  # [rows, in], [rows, rank]
    gradient.b.addmm_((dropped @ delta.a.T).T, g)
    gradient.a.addmm_(inner.T, dropped)
    dx += ((inner @ delta.a) * factors).to(dx.dtype)


def dropout_factors(dropout: DeltaDropout, module: str, like: Tensor) -> Tensor:
    """0 or 1 / (1 − rate), float32, in the shape of `like`."""
    seed = hashlib.blake2b(f"{dropout.seed} {module}".encode(), digest_size=7).digest()
    generator = torch.Generator(like.device).manual_seed(int.from_bytes(seed, "big"))
    rows = like.shape[0]
    shape = (rows if dropout.count is None else dropout.count, *like.shape[1:])
    kept = torch.rand(shape, generator=generator, device=like.device) >= dropout.rate
    return kept[dropout.first : dropout.first + rows] / (1 - dropout.rate)
