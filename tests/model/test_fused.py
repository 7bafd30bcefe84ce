"""Small modules are replaced by one call each where, and only where, that gives the module's own numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from driver import Driver
from parity import make_adapter, read_adapter
from support import save
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.models.cohere.modeling_cohere import CohereLayerNorm
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from lora_serve.kernels.contract import Activation, DeltaGroup, Layers, Segments
from lora_serve.kernels.reference import ReferenceKernels
from lora_serve.model.fused import FusedGatedMLP, FusedRMSNorm, fuse

CPU = torch.device("cpu")

NORMS = {"llama": 7, "qwen3": 13, "gemma2": 13, "phi3": 7, "gpt2": 0}
MLPS = {"llama": 3, "qwen3": 3, "gemma2": 3, "phi3": 0, "gpt2": 0}

TURNED = {"llama": 3, "qwen3": 3, "gemma2": 3, "phi3": 3, "gpt2": 0}


@pytest.mark.parametrize("architecture", NORMS)
def test_norms_gated_mlps_and_rotary_embeddings_of_known_bases_are_fused(architecture: str, tmp_path: Path) -> None:
    model = Driver(save(architecture, tmp_path / "base")).loaded.model
    assert sum(isinstance(module, FusedRMSNorm) for module in model.modules()) == NORMS[architecture]
    assert sum(isinstance(module, FusedGatedMLP) for module in model.modules()) == MLPS[architecture]
    layers = {layer for each in model.modules() if isinstance(each, nn.ModuleList) for layer in each}
    inner = [module for module in model.modules() if module not in layers]
    assert sum("forward" in vars(module) for module in inner) == TURNED[architecture]


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
    fuse(model, torch.float32, CPU, ReferenceKernels())
    assert list(model.modules()) == before
    assert not any("forward" in vars(module) for module in model.modules())


class Weighty(nn.Module):
    """A norm of the given rows, times its weights."""

    def __init__(self, normal: Callable[[Tensor], Tensor], width: int = 64) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = 1e-5
        self.normal = normal

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * self.normal(x.float()).to(x.dtype)


def rms(x: Tensor, eps: float = 1e-5) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def fused(module: nn.Module, dtype: torch.dtype, kernels: ReferenceKernels | None = None) -> bool:
    model = nn.ModuleDict({"part": module.to(dtype)})
    fuse(model, dtype, CPU, kernels or ReferenceKernels())
    return isinstance(model["part"], FusedRMSNorm | FusedGatedMLP)


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [64, 8192])
def test_a_layer_norm_without_bias_is_no_rms_norm_however_wide(dtype: torch.dtype, width: int) -> None:
    assert not fused(CohereLayerNorm(width, eps=1e-5), dtype)
    assert not fused(nn.LayerNorm(width, bias=False), dtype)
    assert fused(LlamaRMSNorm(width), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_that_differ_only_for_some_rows_or_weights_are_told_apart(dtype: torch.dtype) -> None:
    assert fused(Weighty(rms), dtype)
    unlike: list[Callable[[Tensor], Tensor]] = [
        lambda x: rms(x, eps=1e-6),  # for small rows
        lambda x: x * torch.rsqrt(x.square().mean(-1, keepdim=True).clamp(min=1e-5)),  # as well
        lambda x: rms(x.clamp(-100, 100)),  # for large ones
        lambda x: rms(x) * 1.001,
    ]
    assert not any(fused(Weighty(normal), dtype) for normal in unlike)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [0.0, 1.0, 0.5])
def test_whether_one_is_added_to_the_weights_is_seen_whatever_they_are(dtype: torch.dtype, value: float) -> None:
    for norm in (LlamaRMSNorm(64), GemmaRMSNorm(64)):
        nn.init.constant_(norm.weight, value)
        model = nn.ModuleDict({"norm": norm.to(dtype)})
        x = torch.randn(1, 3, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
        wanted = norm(x)
        fuse(model, dtype, CPU, ReferenceKernels())
        assert isinstance(model["norm"], FusedRMSNorm)
        torch.testing.assert_close(model["norm"](x), wanted)


class Sloppy(ReferenceKernels):
    """The right formulas, in half precision a digit too large."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, *, plus_one: bool) -> Tensor:
        exact = super().rms_norm(x, weight, eps, plus_one=plus_one)
        return exact if x.dtype is torch.float32 else exact * (1 + torch.finfo(x.dtype).eps)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_kernel_that_rounds_worse_than_the_module_does_not_replace_it(dtype: torch.dtype) -> None:
    assert fused(GemmaRMSNorm(256), dtype)
    assert not fused(GemmaRMSNorm(256), dtype, Sloppy())
    assert fused(GemmaRMSNorm(256), torch.float32, Sloppy())


class GatedMLP(nn.Module):
    """down(activation(gate(x)) * up(x)), the gate first scaled or bounded, if so wished."""

    def __init__(self, activation: str, bound: float | None = None, scale: float = 1) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(16, 24), nn.Linear(16, 24), nn.Linear(24, 16)
        self.act_fn = ACT2FN[activation]
        self.bound, self.scale = bound, scale

    def forward(self, x: Tensor) -> Tensor:
        gate = self.scale * self.gate_proj(x)
        return self.down_proj(self.act_fn(gate if self.bound is None else gate.clamp(max=self.bound)) * self.up_proj(x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_activations_that_are_nearly_alike_are_told_apart(dtype: torch.dtype) -> None:
    known: dict[str, Activation] = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}
    assert all(fused(GatedMLP(name), dtype) for name in known)
    assert not any(fused(GatedMLP(name), dtype) for name in ("gelu", "quick_gelu", "relu2", "mish"))
    assert not fused(GatedMLP("silu", bound=30.0), dtype)
    assert not fused(GatedMLP("silu", scale=1.001), dtype)


class Conditioned(LlamaRMSNorm):
    """A norm that may be given more than rows."""

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        return super().forward(x) if scale is None else super().forward(x) * scale


def test_a_module_that_takes_more_than_rows_is_left_alone() -> None:
    assert not fused(Conditioned(64), torch.float32)


class GatingKernels(ReferenceKernels):
    """Counts inner parts of gated MLPs that are computed with their projections' deltas by one call."""

    together = 0

    def adapted_gated_linear(
        self,
        x: Tensor,
        layers: Layers,
        group: DeltaGroup,
        segments: Segments,
        activation: Activation,
    ) -> Tensor:
        self.together += 1
        return super().adapted_gated_linear(x, layers, group, segments, activation)


def test_only_projections_with_deltas_that_no_hook_corrects_are_gated_by_the_same_call(tmp_path: Path) -> None:
    kernels = GatingKernels()
    driver = Driver(save("llama", tmp_path / "base"), kernels=kernels)
    model = driver.loaded.model
    layers = model.config.num_hidden_layers
    make_adapter("llama", tmp_path / "0", 0, peft.LoraConfig(r=2, target_modules=["gate_proj", "up_proj"]))
    name = driver.load_adapter(read_adapter(driver, tmp_path / "0"))

    def calls(uses: list[list[tuple[str, float]]]) -> tuple[int, Tensor]:
        before = kernels.together
        logits = driver.teach([[5, 9, 33]], 0, uses)[0]
        return kernels.together - before, logits

    assert calls([[]])[0] == 0
    adapted, wanted = calls([[(name, 1.0)]])
    assert adapted == layers
    for projection in ("gate_proj", "up_proj"):
        handle = model.model.layers[0].mlp.get_submodule(projection).register_forward_hook(lambda *_: None)
        hooked, got = calls([[(name, 1.0)]])
        handle.remove()
        assert hooked == layers - 1
        torch.testing.assert_close(got, wanted)
