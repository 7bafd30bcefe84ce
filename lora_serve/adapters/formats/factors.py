"""From a method's own matrices to a delta's A and B: exactly, and at the lowest rank that is at hand.

ΔW = B A has rank r of A [r, in] and B [r, out] (as kept, transposed). Where a method's natural r exceeds
min(in, out), or where ΔW has no structure at all, ΔW itself is one factor and an identity the other.

A module that an adapter adapts may be one whose base it also replaces: a head that was resized, or token rows of a head
tied to the embedding. `site_of`, `own_weight` and `settled` put the delta upon the replacement, as PEFT does.
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

MOST_DRAWN = 1 << 29  # numbers that a configuration may make us draw at random


def cheaper(a: Tensor, b: Tensor) -> Delta:
    """A [r, in] and B [r, out] as they are, or their product where r is above min(in, out)."""
    if a.shape[0] <= min(a.shape[1], b.shape[1]):
        return Delta(a.contiguous(), b.contiguous())
    return whole(b.T @ a)


def whole(weight: Tensor) -> Delta:
    """ΔW [out, in] of rank min(in, out): the identity stands on its narrower side."""
    tall, wide = weight.shape
    if wide <= tall:
        return Delta(torch.eye(wide), weight.T.contiguous())
    return Delta(weight.contiguous(), torch.eye(tall))


def split(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A full factor [out, in] as (left [out, r], right [r, in]), r = min(in, out)."""
    delta = whole(weight)
    return delta.b.T, delta.a


def check_rank(name: str, found: int, said: float) -> None:
    """Hold the rank that the weights have to the configuration's."""
    if found != said:
        raise AdapterInvalid(f"{name} has rank {found} in the weights and {said:g} in adapter_config.json")


def count(config: Config, field: str, otherwise: int) -> int:
    """A positive whole number. Raises AdapterInvalid naming the field."""
    value = number(config, field, otherwise)
    if not isinstance(value, int) or value < 1:
        raise AdapterInvalid(f"{field} in adapter_config.json is not a positive whole number")
    return value


def seed(config: Config) -> int:
    """`projection_prng_key`: what random projections that were not saved are drawn from."""
    key = config.get("projection_prng_key", 0)
    if isinstance(key, bool) or not isinstance(key, int) or not 0 <= key < 1 << 63:
        raise AdapterInvalid("projection_prng_key in adapter_config.json is not a usable seed")
    return key


def check_drawn(numbers: int) -> None:
    if numbers > MOST_DRAWN:
        raise AdapterInvalid(
            f"r in adapter_config.json asks for random projections of {numbers} numbers; at most {MOST_DRAWN} are drawn"
        )


def replaced(name: str, overrides: Mapping[str, ModuleOverride], base: BaseShape) -> Tensor | None:
    """The weight that an adapter brings for a module that it also adapts; only the head can have one."""
    weight = overrides.get(name, ModuleOverride()).parameters.get("weight")
    if weight is not None and name != base.head:
        raise AdapterInvalid(f"{name} is replaced whole and adapted as well; only one of the two can be served")
    return weight


def site_of(name: str, overrides: Mapping[str, ModuleOverride], base: BaseShape) -> Site:
    """A site as wide as it is with what the adapter replaces of it: a resized head has another number of rows."""
    weight = replaced(name, overrides, base)
    return base.sites[name] if weight is None else replace(base.sites[name], out_features=weight.shape[0])


def own_weight(name: str, overrides: Mapping[str, ModuleOverride], base: BaseShape) -> Tensor:
    """The weights that a site's delta comes on top of, float32 [out, in]."""
    weight = replaced(name, overrides, base)
    return (base.weight(name) if weight is None else weight).detach().float().cpu()


def settled(
    deltas: Mapping[str, Delta], overrides: Mapping[str, ModuleOverride], base: BaseShape
) -> tuple[dict[str, Delta], dict[str, ModuleOverride]]:
    """Deltas and changes, where a replaced weight or replaced rows of the head have taken in the head's delta."""
    kept, rest, head = dict(deltas), dict(overrides), base.head
    if head not in kept or head not in rest:
        return kept, rest
    override, delta = rest[head], kept[head]
    weight = replaced(head, overrides, base)
    if weight is not None:
        merged = weight.float() + delta.b.float().T @ delta.a.float()
        override, _ = replace(override, parameters=override.parameters | {"weight": merged}), kept.pop(head)
    if override.token_rows is not None:
        rows = delta.b.float()[:, list(override.token_ids)].T @ delta.a.float()
        override = replace(override, token_rows=override.token_rows.float() + rows)
    return kept, rest | {head: override}


def dequantised(base: BaseShape) -> list[str]:
    """What a report says where `own_weight` was used."""
    return [f"the base's own weights were needed; its {base.quantized} ones were dequantised"] if base.quantized else []
