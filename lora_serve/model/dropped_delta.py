"""LoRA deltas with dropout of their input, of one adapter's rows, forwards and backwards, in torch's products.

    y += B (A d(x))        d(x) = mask ⊙ x / (1 − rate), a mask of its own for each module

The mask is drawn again where it is needed, from the seed of the pass and the module's name.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from lora_serve.kernels.contract import Delta
from lora_serve.model.training_step import DeltaDropout


def add_dropped_delta(y: Tensor, x: Tensor, delta: Delta, dropout: DeltaDropout, module: str) -> None:
    """Add the delta of x [rows, in] to y [rows, out]."""
    dropped = x.float() * dropout_factors(dropout, module, x)
    y += ((dropped @ delta.a.T) @ delta.b).to(y.dtype)


def add_dropped_gradients(
    x: Tensor, dy: Tensor, dx: Tensor, delta: Delta, gradient: Delta, dropout: DeltaDropout, module: str
) -> None:
    """Add the gradient of x [rows, in] to dx, and those of A and B to `gradient`."""
    factors, g = dropout_factors(dropout, module, x), dy.float()
    dropped, inner = x.float() * factors, g @ delta.b.T  # [rows, in], [rows, rank]
    gradient.b.addmm_((dropped @ delta.a.T).T, g)
    gradient.a.addmm_(inner.T, dropped)
    dx += ((inner @ delta.a) * factors).to(dx.dtype)


def dropout_factors(dropout: DeltaDropout, module: str, like: Tensor) -> Tensor:
    """0 or 1 / (1 − rate), float32, in the shape of `like`."""
    seed = hashlib.blake2b(f"{dropout.seed} {module}".encode(), digest_size=7).digest()
    generator = torch.Generator(like.device).manual_seed(int.from_bytes(seed, "big"))
    kept = torch.rand(like.shape, generator=generator, device=like.device) >= dropout.rate
    return kept / (1 - dropout.rate)
