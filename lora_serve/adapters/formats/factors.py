"""Shared helpers of formats: factorising ΔW, checks of ranks and sizes, deltas on replaced heads.

A delta is stored as A [r, in] and B [r, out] (transposed), ΔW = Bᵀ A. Where r exceeds min(in, out), or where ΔW is a
full matrix, ΔW is one factor and an identity the other.

An adapter may replace the weight of a module that it also adapts: a resized head, or token rows of a head tied to the
embedding. `effective_site`, `effective_weight` and `fold_head_delta` apply the delta to the replacement, as PEFT does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from lora_serve.adapters.adapter import BaseShape, ModuleOverride, Site
from lora_serve.adapters.formats.fields import Config, number
from lora_serve.errors import AdapterInvalid
from lora_serve.kernels.contract import Delta

MAX_RANDOM_NUMBERS = 1 << 29  # random numbers that one adapter may require


def make_delta(a: Tensor, b: Tensor) -> Delta:
    """The delta of A [r, in] and B [r, out]; of their product, at full rank, if r is above min(in, out)."""
    if a.shape[0] <= min(a.shape[1], b.shape[1]):
        return Delta(a.contiguous(), b.contiguous())
    return full_rank_delta(b.T @ a)


def full_rank_delta(weight: Tensor) -> Delta:
    """The delta of ΔW [out, in] at rank min(in, out); one of its factors is an identity."""
    out_features, in_features = weight.shape
    if in_features <= out_features:
        return Delta(torch.eye(in_features), weight.T.contiguous())
    return Delta(weight.contiguous(), torch.eye(out_features))


def factorize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A full matrix [out, in] as a product: left [out, r] and right [r, in], r = min(in, out)."""
    delta = full_rank_delta(weight)
    return delta.b.T, delta.a


def check_rank(name: str, found: int, configured: float) -> None:
    """Raise AdapterInvalid if the rank of the weights is not the configured one."""
    if found != configured:
        raise AdapterInvalid(f"{name} has rank {found} in the weights and {configured:g} in adapter_config.json")


def positive_int(config: Config, field: str, default: int) -> int:
    """A field's value as a positive integer. Raises AdapterInvalid naming the field."""
    value = number(config, field, default)
    if not isinstance(value, int) or value < 1:
        raise AdapterInvalid(f"{field} in adapter_config.json is not a positive whole number")
    return value


def seed(config: Config) -> int:
    """The seed `projection_prng_key` of random projections that were not saved."""
    key = config.get("projection_prng_key", 0)
    if isinstance(key, bool) or not isinstance(key, int) or not 0 <= key < 1 << 63:
        raise AdapterInvalid("projection_prng_key in adapter_config.json is not a usable seed")
    return key


def check_random_count(numbers: int) -> None:
    if numbers > MAX_RANDOM_NUMBERS:
        raise AdapterInvalid(
            f"r in adapter_config.json asks for random projections of {numbers} numbers; "
            f"at most {MAX_RANDOM_NUMBERS} are drawn"
        )


def replaced_weight(name: str, overrides: Mapping[str, ModuleOverride], base: BaseShape) -> Tensor | None:
    """The replacement of an adapted module's weight, if any. Raises AdapterInvalid if the module is not the head."""
    weight = overrides.get(name, ModuleOverride()).parameters.get("weight")
    if weight is not None and name != base.head:
        raise AdapterInvalid(f"{name} is replaced whole and adapted as well; only one of the two can be served")
    return weight


def effective_site(name: str, overrides: Mapping[str, ModuleOverride], base: BaseShape) -> Site:
    """A site with the shape of its replaced weight, if any: a resized head has another output width."""
    weight = replaced_weight(name, overrides, base)
    return base.sites[name] if weight is None else replace(base.sites[name], out_features=weight.shape[0])


def effective_weight(name: str, overrides: Mapping[str, ModuleOverride], base: BaseShape) -> Tensor:
    """The weight that a site's delta is added to, replaced or the base's, float32 [out, in]."""
    weight = replaced_weight(name, overrides, base)
    return (base.weight(name) if weight is None else weight).detach().float().cpu()


def fold_head_delta(
    deltas: Mapping[str, Delta], overrides: Mapping[str, ModuleOverride], base: BaseShape
) -> tuple[dict[str, Delta], dict[str, ModuleOverride]]:
    """Fold the head's delta into a replaced weight or replaced token rows of the head; returns deltas and overrides."""
    kept_deltas, kept_overrides, head = dict(deltas), dict(overrides), base.head
    if head not in kept_deltas or head not in kept_overrides:
        return kept_deltas, kept_overrides
    override, delta = kept_overrides[head], kept_deltas[head]
    weight = replaced_weight(head, overrides, base)
    if weight is not None:
        merged = weight.float() + delta.b.float().T @ delta.a.float()
        override, _ = replace(override, parameters=override.parameters | {"weight": merged}), kept_deltas.pop(head)
    if override.token_rows is not None:
        rows = delta.b.float()[:, list(override.token_ids)].T @ delta.a.float()
        override = replace(override, token_rows=override.token_rows.float() + rows)
    return kept_deltas, kept_overrides | {head: override}


def dequantisation_note(base: BaseShape) -> list[str]:
    """The report's sentence for formats that used `effective_weight` of a quantised base; else empty."""
    return [f"the base's own weights were needed; its {base.quantized} ones were dequantised"] if base.quantized else []
