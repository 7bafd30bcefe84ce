"""Initial weights of LoRA adapters, as PEFT 0.21 has them.

    default       A uniform as in `nn.Linear` (Kaiming, a = √5), B = 0
    gaussian      A normal with deviation 1/r, B = 0
    orthogonal    A = Q_oddᵀ N / 10, B = N' Q_even / 10 with normal N, N' and the rows of an orthogonal Q [r, r]
    pissa         A = √(S_r / s) V_rᵀ, B = U_r √(S_r / s) of W = U S Vᵀ      Meng et al. 2024
    pissa_niter_n the same by a randomised decomposition with n power iterations, many times faster
    olora         A = R_r, B = Q_r of W = Q R                               Büyükakyüz 2024

Random numbers are a run's own: a generator that begins with its seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lora_serve.engine.training.trainable_layout import AdaptedSite
from lora_serve.engine.training.training_settings import LoraSettings
from lora_serve.errors import BadRequest
from lora_serve.model.trainable_base import TrainableBase
from lora_serve.model.trainable_linear import output_norm


class InitialWeights(NamedTuple):
    """What a module begins with: A [rank, in], B [out, rank] (None: zeros) and DoRA's magnitude [out], float32."""

    a: Tensor
    b: Tensor | None
    magnitude: Tensor | None


def lora_weights(
    base: TrainableBase, settings: LoraSettings, go_on: Callable[[], bool] = lambda: True
) -> dict[str, InitialWeights]:
    """What the modules of a LoRA adapter begin with, on the host. Takes long where `settings.reads_weights`.

    May run in any thread. Raises BadRequest for settings that do not fit, and where a weight cannot be decomposed.

    Args:
        go_on: whether it is still wanted; asked before each module.
    """
    generator, found = torch.Generator().manual_seed(settings.seed), {}
    with torch.no_grad():
        for name, layer in settings.layout(base.shape).layers.items():
            if not go_on():
                raise BadRequest("the adapter is not wanted any more")
            try:
                a, b = initial_matrices(
                    settings.init_lora_weights, layer.module, partial(_host_weight, base, name), generator
                )
            except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
                raise BadRequest(f"the weight of {name} has no decomposition", param="init_lora_weights") from error
            magnitude = output_norm(base.weight(name), None).cpu() if layer.magnitude >= 0 else None
            found[name] = InitialWeights(a, b, magnitude)
    return found


def _host_weight(base: TrainableBase, name: str) -> Tensor:
    return base.weight(name).cpu()


def initial_matrices(
    method: str, module: AdaptedSite, weight: Callable[[], Tensor], generator: torch.Generator
) -> tuple[Tensor, Tensor | None]:
    """A [rank, in] and B [out, rank], float32; None: zeros.

    Args:
        weight: W [out, in] on the host, only called by methods that need it.
        generator: of the host.
    """
    rank, site = module.rank, module.site
    if method.startswith("pissa"):
        u, values, vh = _components(method, weight().float(), rank, generator)
        roots = (values[:rank] / module.scaling).sqrt()
        return roots[:, None] * vh[:rank], u[:, :rank] * roots
    if method == "olora":
        whole = weight().float()
        q = torch.linalg.qr(whole[:, :rank]).Q
        return q.T @ whole, q
    if method == "orthogonal":
        q = torch.linalg.qr(torch.randn(rank, rank, generator=generator)).Q
        a = torch.randn(site.in_features, rank // 2, generator=generator) @ q[0::2]
        b = torch.randn(rank // 2, site.out_features, generator=generator).T @ q[1::2]
        return a.T / 10, b / 10
    a = torch.empty(rank, site.in_features)
    if method == "gaussian":
        return nn.init.normal_(a, std=1 / rank, generator=generator), None
    return nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator), None


def _components(method: str, weight: Tensor, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """U [out, r'], S [r'] and Vᵀ [r', in] of a weight, with r' ≥ rank."""
    iterations = method.removeprefix("pissa").removeprefix("_niter_")
    if not iterations:
        u, values, vh = torch.linalg.svd(weight, full_matrices=False)
        return u, values, vh
    # Halko et al. 2009, algorithms 4.4 and 5.1; torch's function draws from the process's generator.
    basis = torch.linalg.qr(weight @ torch.randn(weight.shape[1], rank, generator=generator)).Q
    for _ in range(int(iterations)):
        basis = torch.linalg.qr(weight @ torch.linalg.qr(weight.T @ basis).Q).Q
    u, values, vh = torch.linalg.svd(basis.T @ weight, full_matrices=False)
    return basis @ u, values, vh
