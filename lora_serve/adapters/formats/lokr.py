"""LoKr: y = W x + s · (W1 ⊗ W2) x, a Kronecker product of two matrices, each full or of low rank.

    s = α/r, also where a factor is full; `rank_pattern` and `alpha_pattern` override r and α by module name
    keys: X.lokr_w1 [o1, i1], or X.lokr_w1_a [o1, r] and X.lokr_w1_b [r, i1] (`decompose_both`);
          X.lokr_w2 [o2, i2], or X.lokr_w2_a [o2, r] and X.lokr_w2_b [r, i2]; o1·o2 = out, i1·i2 = in

With W1 = U1 V1 and W2 = U2 V2, W1 ⊗ W2 = (U1 ⊗ U2)(V1 ⊗ V2): the rank is the product of the factors' ranks, which is
never above min(in, out). The shapes are taken from the keys, not from `decompose_factor`. Only for nn.Linear; `lokr_t2`
belongs to convolutions. Source: PEFT 0.21, `peft/tuners/lokr`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lora_serve.adapters.adapter import BaseShape, Lowered, Site
from lora_serve.adapters.checkpoint import Checkpoint
from lora_serve.adapters.formats.budget import ElementBudget
from lora_serve.adapters.formats.factors import check_rank, effective_site, factorize, fold_head_delta
from lora_serve.adapters.formats.fields import Patterns, check_fields, number
from lora_serve.adapters.formats.keys import group_by_site
from lora_serve.adapters.formats.report import report
from lora_serve.adapters.formats.saved import split_saved
from lora_serve.errors import AdapterInvalid
from lora_serve.kernels.contract import Delta

READ = {"r", "alpha", "rank_pattern", "alpha_pattern"}
WITHOUT_EFFECT = {
    "rank_dropout", "rank_dropout_scale", "module_dropout", "use_effective_conv2d", "init_weights",
    "decompose_both", "decompose_factor",
}  # fmt: skip
TAILS = {name: name for name in ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")}


def lower(checkpoint: Checkpoint, base: BaseShape) -> Lowered:
    """Lower to deltas whose rank is the product of the factors' ranks. Raises AdapterInvalid naming keys and fields."""
    config, budget = checkpoint.config, ElementBudget(checkpoint.most_elements)
    check_fields(config, READ, WITHOUT_EFFECT)
    ranks, alphas = Patterns(config, "rank_pattern"), Patterns(config, "alpha_pattern")
    saved = split_saved(config, checkpoint.tensors, base)
    deltas, full = {}, 0
    for name, group in group_by_site(saved.rest, base, TAILS).items():
        rank = ranks.get(name, number(config, "r", 8))
        if rank < 1:
            raise AdapterInvalid(f"r or rank_pattern in adapter_config.json gives {name} the rank {rank:g}")
        scaling = alphas.get(name, number(config, "alpha", 8)) / rank
        site = effective_site(name, saved.overrides, base)
        deltas[name] = _delta(site, group, rank, scaling, budget)
        full += deltas[name].a.shape[0] == min(site.in_features, site.out_features)
    features = [field for field in ("rank_pattern", "alpha_pattern") if config.get(field)] + saved.features
    lowered = ["the Kronecker product of two factors became one product, of the product of their ranks"]
    if full:
        lowered.append(f"for {full} modules that is the module's full rank")
    deltas, overrides = fold_head_delta(deltas, saved.overrides, base)
    return Lowered(
        deltas,
        report(config, base, method="LoKr", deltas=deltas, overrides=overrides, features=features, lowered=lowered),
        overrides,
    )


def _delta(site: Site, group: Mapping[str, Tensor], rank: float, scaling: float, budget: ElementBudget) -> Delta:
    (u1, v1), (u2, v2) = (_factor(site, group, key, rank, budget) for key in ("lokr_w1", "lokr_w2"))
    if len(u1) * len(u2) != site.out_features or v1.shape[1] * v2.shape[1] != site.in_features:
        raise AdapterInvalid(
            f"{site.name} takes factors whose heights multiply to {site.out_features} and widths to "
            f"{site.in_features}; the adapter has [{len(u1)}, {v1.shape[1]}] and [{len(u2)}, {v2.shape[1]}]"
        )
    budget.reserve(site, len(v1) * len(v2))
    return Delta(torch.kron(v1, v2), torch.kron(u1.T.contiguous(), u2.T.contiguous()) * scaling)


def _factor(
    site: Site, group: Mapping[str, Tensor], key: str, rank: float, budget: ElementBudget
) -> tuple[Tensor, Tensor]:
    """One factor as U [o, r] and V [r, i], with r at most min(o, i)."""
    wanted, given = ({key}, {f"{key}_a", f"{key}_b"}), {tail for tail in group if tail.startswith(key)}
    if given not in wanted or any(group[tail].ndim != 2 for tail in given):
        raise AdapterInvalid(f"{site.name} takes {key}, or {key}_a and {key}_b, as matrices; it has {sorted(given)}")
    if key in given:
        return factorize(group[key].float())
    left, right = group[f"{key}_a"].float(), group[f"{key}_b"].float()
    if left.shape[1] != right.shape[0]:
        raise AdapterInvalid(f"{site.name}.{key}_a is {list(left.shape)} and {key}_b {list(right.shape)}")
    check_rank(f"{site.name}.{key}", left.shape[1], rank)
    budget.check_rank(site, rank)
    return (left, right) if left.shape[1] <= min(left.shape[0], right.shape[1]) else factorize(left @ right)
