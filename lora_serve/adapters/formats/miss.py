"""MiSS: y = W x + Mᵀ S x, a block of weights M that is shared by all shards of r input channels.

    default   S [r, in] sums the channels j, j + r, j + 2r, … ; M [r, out]
    "mini"    M = [N N …], N [r, mini_r]
    "bat"     ΔW[p, q] = W[p, q] M[p] + M[p] for each r × r block at row p and column q of W; M [out/r, r, r]
    keys: X.miss_block; `init_weights` tells which of the three it is

"mini" has rank min(r, mini_r). "bat" depends on the base's weights and has full rank, so its ΔW is kept as a full
matrix. Only for nn.Linear. Source: PEFT 0.21, `peft/tuners/miss`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lora_serve.adapters.adapter import BaseShape, Lowered, Site
from lora_serve.adapters.checkpoint import Checkpoint
from lora_serve.adapters.formats.budget import ElementBudget
from lora_serve.adapters.formats.factors import (
    dequantisation_note,
    effective_site,
    effective_weight,
    fold_head_delta,
    full_rank_delta,
    make_delta,
    positive_int,
)
from lora_serve.adapters.formats.fields import check_fields
from lora_serve.adapters.formats.keys import check_shape, group_by_site
from lora_serve.adapters.formats.report import report
from lora_serve.adapters.formats.saved import split_saved
from lora_serve.errors import AdapterInvalid
from lora_serve.kernels.contract import Delta

READ = {"r", "mini_r", "init_weights", "bias"}
WITHOUT_EFFECT = {"miss_dropout"}
TAILS = {"miss_block": "miss_block"}


def lower(checkpoint: Checkpoint, base: BaseShape) -> Lowered:
    """Lower to deltas. Raises AdapterInvalid naming keys and fields."""
    config, budget = checkpoint.config, ElementBudget(checkpoint.most_elements)
    check_fields(config, READ, WITHOUT_EFFECT)
    rank, mini_r = positive_int(config, "r", 64), positive_int(config, "mini_r", 1)
    saved = split_saved(config, checkpoint.tensors, base)
    kind = config.get("init_weights")
    deltas = {}
    for name, group in group_by_site(saved.rest, base, TAILS).items():
        site, block = effective_site(name, saved.overrides, base), group["miss_block"].float()
        budget.check_rank(site, rank)
        if kind == "bat":
            budget.reserve(site, min(site.in_features, site.out_features))
            deltas[name] = _bat(site, block, rank, effective_weight(name, saved.overrides, base))
        elif kind == "mini":
            budget.reserve(site, min(rank, mini_r))
            deltas[name] = _mini(site, block, rank, mini_r)
        else:
            budget.reserve(site, rank)
            deltas[name] = _shared(site, block, rank)
    features = ([f"init_weights {kind}"] if kind in ("bat", "mini") else []) + saved.features
    full = "its blocks depend on the base's weights: the whole change of every module is kept, at full rank"
    lowered = [full, *dequantisation_note(base)] if kind == "bat" else []
    deltas, overrides = fold_head_delta(deltas, saved.overrides, base)
    return Lowered(
        deltas,
        report(config, base, method="MiSS", deltas=deltas, overrides=overrides, features=features, lowered=lowered),
        overrides,
    )


def _shared(site: Site, block: Tensor, rank: int) -> Delta:
    check_shape(f"{site.name}.miss_block", block, (rank, site.out_features))
    return make_delta(_shard_sums(rank, site.in_features), block)


def _mini(site: Site, block: Tensor, rank: int, mini_r: int) -> Delta:
    check_shape(f"{site.name}.miss_block", block, (rank, mini_r))
    if site.out_features % mini_r:
        raise AdapterInvalid(f"mini_r {mini_r} in adapter_config.json does not divide the width of {site.name}")
    repeat_matrix = torch.eye(mini_r).repeat(1, site.out_features // mini_r)  # [mini_r, out]
    if mini_r < rank:
        return make_delta(block.T[:, torch.arange(site.in_features) % rank], repeat_matrix)
    return make_delta(_shard_sums(rank, site.in_features), block @ repeat_matrix)


def _bat(site: Site, block: Tensor, rank: int, weight: Tensor) -> Delta:
    if site.in_features % rank or site.out_features % rank:
        raise AdapterInvalid(f"r {rank} in adapter_config.json does not divide the widths of {site.name}")
    check_shape(f"{site.name}.miss_block", block, (site.out_features // rank, rank, rank))
    blocks = weight.reshape(-1, rank, site.in_features // rank, rank).transpose(1, 2)  # [p, q, r, r]
    changed = blocks @ block[:, None] + block[:, None]
    return full_rank_delta(changed.transpose(1, 2).reshape(site.out_features, site.in_features))


def _shard_sums(rank: int, width: int) -> Tensor:
    """S [r, in]: row j sums the channels at position j of every shard; the last shard may be shorter."""
    channels = torch.arange(width)
    sums = torch.zeros(rank, width)
    sums[channels % rank, channels] = 1
    return sums
