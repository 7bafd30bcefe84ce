"""PiSSA, OLoRA and KaSA: y = W' x + s · B A x, where initialisation changed the base weight W to W'.

    PiSSA   W' = W − U_r S_r V_rᵀ,  the r largest singular components
    OLoRA   W' = W − s · Q_r R_r,   the first r rows of R in W = Q R
    KaSA    W' = W − U_d S_d V_dᵀ,  the r smallest singular components;  ΔW = s · B diag(d) A
    the delta on W is s·B A − (W − W'), of rank 2r

For adapters saved without conversion. PEFT repeats the decomposition when it loads one; so does this, in float64. A
component is U Uᵀ W, where U are eigenvectors of the smaller of W Wᵀ and Wᵀ W. Source: PEFT 0.21,
`peft/tuners/lora/layer.py` and `variants.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lora_serve.adapters.adapter import BaseShape, Site
from lora_serve.adapters.formats.fields import Config
from lora_serve.errors import AdapterInvalid


def is_residual(config: Config) -> bool:
    """Whether the adapter was trained on a base that its initialisation changed."""
    return method_name(config) != ""


def method_name(config: Config) -> str:
    """PiSSA, OLoRA or KaSA; empty for any other adapter."""
    initialisation = config.get("init_lora_weights")
    if config.get("kasa_config"):
        return "KaSA"
    return {"pissa": "PiSSA", "olora": "OLoRA"}.get(str(initialisation).lower(), "")


def append_residual(
    site: Site, a: Tensor, b: Tensor, rank: int, scaling: float, config: Config, base: BaseShape
) -> tuple[Tensor, Tensor]:
    """A [2r, in] and B [out, 2r] on the original base; `b` is scaled already. Raises AdapterInvalid."""
    if base.tied and site.name == base.head:
        raise AdapterInvalid(
            f"{method_name(config)} on a head that shares the embedding's weights would change both; "
            "convert the adapter with path_initial_model_for_weight_conversion"
        )
    weight = base.weight(site.name).cpu().double()  # [out, in]
    if rank >= min(weight.shape):
        raise AdapterInvalid(f"{method_name(config)}: {site.name} has rank {rank} and no more in {list(weight.shape)}")
    if method_name(config) == "OLoRA":
        left = torch.linalg.qr(weight[:, :rank]).Q
        down, up = left.T @ weight, left * scaling
    elif weight.shape[0] <= weight.shape[1]:
        left = _eigenvectors(weight @ weight.T, rank, largest=method_name(config) == "PiSSA")
        down, up = left.T @ weight, left
    else:
        right = _eigenvectors(weight.T @ weight, rank, largest=method_name(config) == "PiSSA")
        down, up = right.T, weight @ right
    # How the scale is divided between A and B is arbitrary; equal norms are best in low precision.
    balance = (down.norm() / up.norm()).sqrt()
    return torch.cat([a, (down / balance).float()]), torch.cat([b, -(up * balance).float()], dim=1)


def _eigenvectors(gram: Tensor, rank: int, *, largest: bool) -> Tensor:
    """Eigenvectors [n, rank] of the largest or smallest eigenvalues."""
    vectors: Tensor = torch.linalg.eigh(gram).eigenvectors  # ascending
    return vectors[:, -rank:] if largest else vectors[:, :rank]
