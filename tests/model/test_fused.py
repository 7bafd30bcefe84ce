"""Small modules are replaced by one call each where, and only where, that gives the module's own numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from driver import Driver
from support import save
from torch import nn

from lora_serve.kernels.reference import ReferenceKernels
from lora_serve.model.fused import FusedGatedMLP, FusedRMSNorm, fuse

NORMS = {"llama": 7, "qwen3": 13, "gemma2": 13, "phi3": 7, "gpt2": 0}
MLPS = {"llama": 3, "qwen3": 3, "gemma2": 3, "phi3": 0, "gpt2": 0}

TURNED = {"llama": 3, "qwen3": 3, "gemma2": 3, "phi3": 3, "gpt2": 0}


@pytest.mark.parametrize("architecture", NORMS)
def test_norms_gated_mlps_and_rotary_embeddings_of_known_bases_are_fused(architecture: str, tmp_path: Path) -> None:
    model = Driver(save(architecture, tmp_path / "base")).loaded.model
    assert sum(isinstance(module, FusedRMSNorm) for module in model.modules()) == NORMS[architecture]
    assert sum(isinstance(module, FusedGatedMLP) for module in model.modules()) == MLPS[architecture]
    assert sum("forward" in vars(module) for module in model.modules()) == TURNED[architecture]


class Odd(nn.Module):
    """Has all that a norm has, and does something else."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))
        self.eps = 1e-6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / (x.abs().mean(-1, keepdim=True) + self.eps) * self.weight


class OddMLP(nn.Module):
    """Has the parts of a gated MLP, in another order."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(8, 9), nn.Linear(8, 9), nn.Linear(9, 8)
        self.act_fn = nn.SiLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.gate_proj(x) * self.act_fn(self.up_proj(x)))


def apply_rotary_pos_emb(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotates adjacent pairs where the usual RoPE rotates halves."""
    return tuple(
        x * cos[:, None] + torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2) * sin[:, None] for x in (q, k)
    )  # type: ignore[return-value]


class OddAttention(nn.Module):
    """Calls a function of a well-known name, which does not do the well-known thing."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8, 8))

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        return apply_rotary_pos_emb(x, x, cos, sin)[0]


def test_modules_that_only_look_alike_are_left_as_they_are() -> None:
    model = nn.ModuleDict({"norm": Odd(), "mlp": OddMLP(), "layer": nn.LayerNorm(8), "attention": OddAttention()})
    before = list(model.modules())
    fuse(model, torch.float32, ReferenceKernels())
    assert list(model.modules()) == before
    assert not any("forward" in vars(module) for module in model.modules())
