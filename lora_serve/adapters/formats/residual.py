"""LoRAs that were trained on a changed base and saved without conversion: PiSSA, OLoRA, KaSA.

    PiSSA   W' = W − U_r S_r V_rᵀ,  the r largest singular components
    OLoRA   W' = W − s · Q_r R_r,   the first r rows of R in W = Q R
    KaSA    W' = W − U_d S_d V_dᵀ,  the r smallest singular components;  ΔW = s · B diag(d) A
    y = W' x + s·B A x, so the delta on W has a second part of rank r: rank 2 r in all

PEFT redoes the decomposition when it loads such an adapter; so does this, in float64. A component is U Uᵀ W, and U come
from the eigenvectors of the smaller of W Wᵀ and Wᵀ W. Source: PEFT 0.21, `peft/tuners/lora/layer.py` and `variants.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lora_serve.adapters.adapter import BaseShape, Site
from lora_serve.adapters.formats.fields import Config
from lora_serve.errors import AdapterInvalid


def changes_base(config: Config) -> bool:
    """Whether the adapter belongs to a changed base."""
    return name(config) != ""


def name(config: Config) -> str:
    """The method's name; empty for any other adapter."""
    initialisation = config.get("init_lora_weights")
    if config.get("kasa_config"):
        return "KaSA"
    return {"pissa": "PiSSA", "olora": "OLoRA"}.get(str(initialisation).lower(), "")


def added(
    site: Site, a: Tensor, b: Tensor, rank: int, scaling: float, config: Config, base: BaseShape
) -> tuple[Tensor, Tensor]:
    """A [2r, in] and B [out, 2r] with the second part; `b` has its scaling. Raises AdapterInvalid if there is none."""
    if base.tied and site.name == base.head:
        raise AdapterInvalid(
            f"{name(config)} on a head that shares the embedding's weights would change both; convert the adapter with "
            "path_initial_model_for_weight_conversion"
        )
    weight = base.weight(site.name).cpu().double()  # [out, in]
    if rank >= min(weight.shape):
        raise AdapterInvalid(f"{name(config)}: {site.name} has rank {rank} and no more in {list(weight.shape)}")
    if name(config) == "OLoRA":
        left = torch.linalg.qr(weight[:, :rank]).Q
        down, up = left.T @ weight, left * scaling
    elif weight.shape[0] <= weight.shape[1]:
        left = _extreme(weight @ weight.T, rank, largest=name(config) == "PiSSA")
        down, up = left.T @ weight, left
    else:
        right = _extreme(weight.T @ weight, rank, largest=name(config) == "PiSSA")
        down, up = right.T, weight @ right
    # The factor between the two scales of A and B is free; even ones keep low precision out of trouble.
    even = (down.norm() / up.norm()).sqrt()
    return torch.cat([a, (down / even).float()]), torch.cat([b, -(up * even).float()], dim=1)


def _extreme(gram: Tensor, rank: int, *, largest: bool) -> Tensor:
    """Eigenvectors [n, rank] of the largest or smallest eigenvalues."""
    vectors: Tensor = torch.linalg.eigh(gram).eigenvectors  # ascending
    return vectors[:, -rank:] if largest else vectors[:, :rank]
