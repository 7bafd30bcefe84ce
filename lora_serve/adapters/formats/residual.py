"""PiSSA, OLoRA and KaSA: y = W' x + s · B A x, where initialisation changed the base weight W to W'.

    PiSSA   W' = W − U_r S_r V_rᵀ,  the r largest singular components
    OLoRA   W' = W − s · Q_r R_r,   the first r rows of R in W = Q R
    KaSA    W' = W − U_d S_d V_dᵀ,  the r smallest singular components;  ΔW = s · B diag(d) A
    the delta on W is s·B A − (W − W'), of rank 2r

For adapters saved without conversion. PEFT repeats the decomposition when it loads one; so does this, in float64. A
component is U Uᵀ W, where U are eigenvectors of the smaller of W Wᵀ and Wᵀ W. W' is not computed where PEFT saved it
with the adapter (`X.base_layer.weight` of a head). Where W is a head and an embedding at once, W' is both. Source: PEFT
0.21, `peft/tuners/lora/layer.py` and `variants.py`.

The two parts of the delta nearly cancel, so they are subtracted before anything is rounded: its factors, in float32
whatever the adapter's dtype, are those of the difference. Rounded to a serving dtype, the error is relative to what
training changed, not to the largest components of W.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lora_serve.adapters.adapter import BaseShape, ModuleOverride, Site
from lora_serve.adapters.formats.factors import full_rank_delta
from lora_serve.adapters.formats.fields import Config, name_list
from lora_serve.adapters.formats.keys import PREFIX
from lora_serve.adapters.formats.targets import ends_with
from lora_serve.errors import AdapterInvalid


def is_residual(config: Config) -> bool:
    """Whether the adapter was trained on a base that its initialisation changed."""
    return bool(methods(config))


def methods(config: Config) -> list[str]:
    """Which of PiSSA, OLoRA and KaSA changed the base, in order; empty for any other adapter."""
    initialisation = {"pissa": "PiSSA", "olora": "OLoRA"}.get(str(config.get("init_lora_weights")).lower(), "")
    return [name for name in (initialisation, "KaSA" if config.get("kasa_config") else "") if name]


def method_name(config: Config) -> str:
    """The methods' names, for messages."""
    return " with ".join(methods(config))


def component(
    name: str, weight: Tensor, rank: int, scaling: float, config: Config, *, transposed: bool = False
) -> tuple[Tensor, Tensor]:
    """W − W' as a product: up [out, r'] and down [r', in], float64. Raises AdapterInvalid naming the module.

    Args:
        name: the module's.
        weight: W [out, in].
        transposed: whether the module's parameter is Wᵀ, as in a Conv1D.
    """
    weight = weight.detach().cpu().double()
    ups, downs = [], []
    for method in methods(config):  # PEFT changes the weight once for each, one after the other
        most = min(weight.shape) - (method == "KaSA")
        if rank > most:
            raise AdapterInvalid(f"{method}: {name} has rank {rank}, and {list(weight.shape)} allows {most}")
        up, down = _component(method, weight, rank, scaling, transposed=transposed)
        ups.append(up)
        downs.append(down)
        weight = weight - up @ down
    return torch.cat(ups, dim=1), torch.cat(downs)


def check(site: Site, override: ModuleOverride, config: Config, base: BaseShape) -> None:
    """Raise AdapterInvalid where the initialisation cannot be repeated, or gives matrices of a wrong shape in PEFT."""
    if is_residual(config) and max(override.token_ids, default=0) >= site.out_features:
        raise AdapterInvalid(
            f"{method_name(config)} on {site.name}, whose vocabulary was resized, took a part out of a weight that the "
            "files do not have; train with init_lora_weights=True"
        )
    if "OLoRA" in methods(config) and site.in_features != site.out_features and site.transposed:
        raise AdapterInvalid(
            "init_lora_weights = 'olora' in adapter_config.json: PEFT gives a Conv1D that is not square matrices of "
            f"the wrong shape ({site.name}); train with 'pissa'"
        )


def subtract(
    site: Site,
    a: Tensor,
    b: Tensor,
    rank: int,
    scaling: float,
    config: Config,
    base: BaseShape,
    *,
    is_parameter: bool,
) -> tuple[Tensor, Tensor]:
    """A [r', in] and B [out, r'] on W, from those on W', in float32; r' ≤ 2r, or 3r with two methods.

    Args:
        b: scaled.
        rank: r.
        is_parameter: whether the LoRA is of the parameter, as it lies, and not of the module.
    """
    weight = base.weight(site.name)
    transposed = (is_parameter or "OLoRA" in methods(config)) and site.transposed
    if transposed and is_parameter:
        up, down = component(site.name, weight.T, rank, scaling, config)
        return difference(a, b, down.T, up.T)
    return difference(a, b, *component(site.name, weight, rank, scaling, config, transposed=transposed))


def with_reduced_tables(
    config: Config, tensors: dict[str, Tensor], scale: Callable[[str, int, tuple[int, ...]], float], base: BaseShape
) -> dict[str, Tensor]:
    """The tensors, and W' of an embedding or a tied head whose initialisation changed it, as if PEFT had saved it too.

    Such a weight is read outside its module's own LoRA as well: by a lookup, or by the module that it is tied to.
    """
    if not is_residual(config):
        return tensors
    reduced = {}
    for module in (*base.embeddings, *([base.head] if base.tied else [])):
        a, key = tensors.get(f"{PREFIX}{module}.lora_A.weight"), f"{PREFIX}{module}.base_layer.weight"
        if a is None or a.ndim != 2 or key in tensors:
            continue
        weight, name = base.parameter(f"{module}.weight").float().cpu(), f"{module}.weight"
        is_parameter = ends_with(name, frozenset(name_list(config, "target_parameters")))
        scaling = scale(name if is_parameter else module, a.shape[0], tuple(weight.shape))
        up, down = component(module, weight, a.shape[0], scaling, config)
        reduced[key] = (weight.double() - up @ down).float()
    if base.tied and len(reduced) > 1:
        raise AdapterInvalid(
            f"{method_name(config)} takes a part out of both {base.input_embedding} and {base.head}, "
            "which share a weight; train with it on one of them"
        )
    return tensors | reduced


def difference(a: Tensor, b: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """A [r', in] and B [out, r'], float32, with B A = b a − up down, by a singular value decomposition."""
    left, right = torch.cat([b.double(), -up], dim=1), torch.cat([a.double(), down])
    if len(right) >= min(len(left), right.shape[1]):
        whole = full_rank_delta((left @ right).float())
        return whole.a, whole.b.T
    outer, inner = torch.linalg.qr(left), torch.linalg.qr(right.T)
    u, values, vh = torch.linalg.svd(outer.R @ inner.R.T, full_matrices=False)
    roots = values.sqrt()
    return (roots[:, None] * (vh @ inner.Q.T)).float(), ((outer.Q @ u) * roots).float()


def _component(method: str, weight: Tensor, rank: int, scaling: float, *, transposed: bool) -> tuple[Tensor, Tensor]:
    if method == "OLoRA" and transposed:  # PEFT decomposes the parameter as it is; that fits square ones only
        left = torch.linalg.qr(weight.T[:, :rank]).Q
        return (left.T @ weight.T).T * scaling, left.T
    if method == "OLoRA":
        left = torch.linalg.qr(weight[:, :rank]).Q
        return left * scaling, left.T @ weight
    if weight.shape[0] <= weight.shape[1]:
        left = _eigenvectors(weight @ weight.T, rank, largest=method == "PiSSA")
        return left, left.T @ weight
    right = _eigenvectors(weight.T @ weight, rank, largest=method == "PiSSA")
    return weight @ right, right.T


def _eigenvectors(gram: Tensor, rank: int, *, largest: bool) -> Tensor:
    """Eigenvectors [n, rank] of the largest or smallest eigenvalues."""
    vectors: Tensor = torch.linalg.eigh(gram).eigenvectors  # ascending
    return vectors[:, -rank:] if largest else vectors[:, :rank]
