"""Residual additions are fused with the norm that follows where, and only where, that gives the layer's own bits."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from driver import Driver
from support import save
from torch import Tensor, nn

from lora_serve.kernels.reference import ReferenceKernels
from lora_serve.model.fused import FusedRMSNorm
from lora_serve.model.fused_residual import fuse_residuals

CPU = torch.device("cpu")

WIDTH = 16
FUSED = {"llama": True, "qwen3": True, "phi3": True, "mixtral": True, "gemma2": False, "gpt2": False}


class CountingKernels(ReferenceKernels):
    """Counts norms of rows as wide as the hidden states, with and without a sum."""

    def __init__(self) -> None:
        self.norms = self.sums = 0

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, *, plus_one: bool) -> Tensor:
        self.norms += x.ndim == 3
        return super().rms_norm(x, weight, eps, plus_one=plus_one)

    def add_rms_norm(
        self, x: Tensor, y: Tensor, weight: Tensor, eps: float, *, plus_one: bool
    ) -> tuple[Tensor, Tensor]:
        self.sums += 1
        return super().add_rms_norm(x, y, weight, eps, plus_one=plus_one)


@pytest.mark.parametrize("architecture", FUSED)
def test_in_bases_of_the_pre_norm_kind_each_norm_but_the_first_has_its_sum(architecture: str, tmp_path: Path) -> None:
    kernels = CountingKernels()
    driver = Driver(save(architecture, tmp_path / "base"), kernels=kernels)
    config = driver.loaded.model.config
    kernels.norms = kernels.sums = 0
    driver.teach([[5, 9, 33]], decode=0)
    if FUSED[architecture]:
        assert kernels.sums == 2 * config.num_hidden_layers
        assert kernels.norms == kernels.sums + 1  # the reference's sums call it
    else:
        assert kernels.sums == 0


class Attention(nn.Linear):
    """Stands for attention: it takes what a layer passes on, and gives a tuple."""

    def forward(self, hidden_states: Tensor, scale: Any = None, **others: Any) -> tuple[Tensor, None]:  # type: ignore[override]
        return super().forward(hidden_states) * (1.0 if scale is None else scale), None


Formula = Callable[["Layer", Tensor, dict[str, Any]], Tensor]


def pre_norm(layer: Layer, x: Tensor, given: dict[str, Any]) -> Tensor:
    x = x + layer.mixer(hidden_states=layer.before(x), **given)[0]
    return x + layer.dense(layer.between(x))


class Layer(nn.Module):
    """A decoder layer of any formula, with parts of any names."""

    def __init__(self, formula: Formula = pre_norm, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.formula = formula
        kernels = ReferenceKernels()
        weights = [nn.Parameter(torch.rand(WIDTH, dtype=dtype)) for _ in range(2)]
        self.dense = nn.Linear(WIDTH, WIDTH, dtype=dtype)
        self.between = FusedRMSNorm(weights[0], 1e-6, plus_one=False, kernels=kernels)
        self.mixer = Attention(WIDTH, WIDTH, dtype=dtype)
        self.before = FusedRMSNorm(weights[1], 1e-6, plus_one=False, kernels=kernels)
        self.drop = nn.Dropout()

    def forward(self, hidden_states: Tensor, scale: Any = None, **others: Any) -> Tensor:
        return self.formula(self, hidden_states, {"scale": scale, **others})


class Model(nn.Module):
    def __init__(self, *layers: nn.Module, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(layers)
        weight = nn.Parameter(torch.rand(WIDTH, dtype=dtype))
        self.final = FusedRMSNorm(weight, 1e-6, plus_one=False, kernels=ReferenceKernels())
        self.eval()

    def forward(self, x: Tensor, **given: Any) -> Tensor:
        for layer in self.blocks:
            x = layer(x, **given)
        return self.final(x)


def is_fused(layer: nn.Module, dtype: torch.dtype = torch.float32) -> bool:
    fuse_residuals(Model(layer), dtype, CPU)
    return "forward" in vars(layer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fused_layers_give_the_same_bits(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = Model(*(Layer(dtype=dtype) for _ in range(3)), dtype=dtype)
    x = torch.randn(1, 5, WIDTH).to(dtype)
    plain = copy.deepcopy(model)
    fuse_residuals(model, dtype, CPU)
    assert all("forward" in vars(layer) for layer in model.blocks)
    for given in ({}, {"scale": 0.5, "other": object()}):
        assert torch.equal(model(x, **given), plain(x, **given))
    assert torch.equal(model(x[:, :2]), plain(x[:, :2]))


def test_hooks_on_norms_still_correct_their_rows() -> None:
    torch.manual_seed(0)
    model = Model(Layer(), Layer())
    plain = copy.deepcopy(model)
    fuse_residuals(model, torch.float32, CPU)

    def negate_a_row(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        output[:, 1] = -args[0][:, 1]
        return output

    for own in (model, plain):
        for norm in (own.blocks[0].between, own.blocks[1].before, own.final):
            norm.register_forward_hook(negate_a_row)
    x = torch.randn(1, 3, WIDTH)
    assert torch.equal(model(x), plain(x))


def test_a_norm_of_other_rows_than_the_sum_is_their_own() -> None:
    norm = Layer().between
    x, y = torch.randn(2, 1, 3, WIDTH)
    total = norm.add(x, y)
    assert torch.equal(norm(x), ReferenceKernels().rms_norm(x, norm.weight, 1e-6, plus_one=False))
    assert torch.equal(norm(total), ReferenceKernels().rms_norm(x + y, norm.weight, 1e-6, plus_one=False))


def parallel(layer: Layer, x: Tensor, given: dict[str, Any]) -> Tensor:
    return x + layer.mixer(hidden_states=layer.before(x), **given)[0] + layer.dense(layer.between(x))


def post_norm(layer: Layer, x: Tensor, given: dict[str, Any]) -> Tensor:
    x = x + layer.before(layer.mixer(hidden_states=x, **given)[0])
    return x + layer.between(layer.dense(x))


def scaled(layer: Layer, x: Tensor, given: dict[str, Any]) -> Tensor:
    x = x + 1.001 * layer.mixer(hidden_states=layer.before(x), **given)[0]
    return x + layer.dense(layer.between(x))


def clamped(layer: Layer, x: Tensor, given: dict[str, Any]) -> Tensor:
    return pre_norm(layer, x, given).clamp(max=500.0)


def rounded(layer: Layer, x: Tensor, given: dict[str, Any]) -> Tensor:
    x = x.float() + layer.mixer(hidden_states=layer.before(x), **given)[0].float()
    return (x + layer.dense(layer.between(x.to(layer.dense.weight.dtype))).float()).to(layer.dense.weight.dtype)


def residual_of_the_norm(layer: Layer, x: Tensor, given: dict[str, Any]) -> Tensor:
    x = layer.before(x)
    x = x + layer.mixer(hidden_states=x, **given)[0]
    return x + layer.dense(layer.between(x))


def drops_arguments(layer: Layer, x: Tensor, given: dict[str, Any]) -> Tensor:
    return pre_norm(layer, x, {"scale": given["scale"]})


def changes_arguments(layer: Layer, x: Tensor, given: dict[str, Any]) -> Tensor:
    return pre_norm(layer, x, given | {"scale": 1.0})


def swaps_norms_by_argument(layer: Layer, x: Tensor, given: dict[str, Any]) -> Tensor:
    return pre_norm(layer, x, given) if given["scale"] is None else parallel(layer, x, given)


def gives_a_tuple(layer: Layer, x: Tensor, given: dict[str, Any]) -> Any:
    return (pre_norm(layer, x, given),)


UNLIKE = (
    *(parallel, post_norm, scaled, clamped, residual_of_the_norm, drops_arguments, changes_arguments),
    *(swaps_norms_by_argument, gives_a_tuple),
)


@pytest.mark.parametrize("formula", UNLIKE)
def test_layers_of_another_formula_are_left_alone(formula: Formula) -> None:
    assert is_fused(Layer())
    assert not is_fused(Layer(formula))


def test_a_sum_kept_in_float32_is_no_sum_in_the_models_dtype() -> None:
    assert is_fused(Layer(dtype=torch.bfloat16), torch.bfloat16)
    assert not is_fused(Layer(rounded, torch.bfloat16), torch.bfloat16)


def test_a_layer_with_a_scale_or_in_training_is_left_alone() -> None:
    scales, trains = Layer(), Layer()
    scales.register_buffer("scale", torch.ones(1))
    assert not is_fused(scales)
    model = Model(trains)
    trains.train()
    fuse_residuals(model, torch.float32, CPU)
    assert "forward" not in vars(trains)
