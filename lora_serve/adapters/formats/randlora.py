"""RandLoRA: y = W x + s · ΔW x, ΔW a weighted sum of random low-rank matrices that has full rank.

    with d ≤ D the module's input and output width, sorted, n = ⌈d / r⌉ bases and s = α/r:
    P [r·n, d] is λ[:, :, None] ⊙ A[:, :, :d] ⊙ γ[None] with its first two axes flattened,
    Q [D, n·r] is B[:D, :n] with its last two axes flattened, and ΔW = Q P where in = d, otherwise (Q P)ᵀ
    keys: X.randlora_lambda [r, n], X.randlora_gamma [n, d]; base_model.randlora_A [r, 1, d or more] and
    base_model.randlora_B [D or more, n or more, r], of which every module may hold a copy
    without `save_projection`, A and B are generated from `projection_prng_key`: uniform, in bfloat16, or with `sparse`
    and `very_sparse` from {-1, 0, 1}; divided by their standard deviation

(The flattened axes of P and Q are in different orders, as in PEFT.) Where r·n is above d, ΔW is kept as a full matrix.
Source: PEFT 0.21, `peft/tuners/randlora`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lora_serve.adapters.adapter import BaseShape, Lowered, Site
from lora_serve.adapters.checkpoint import Checkpoint
from lora_serve.adapters.formats.budget import ElementBudget
from lora_serve.adapters.formats.factors import (
    check_random_count,
    effective_site,
    fold_head_delta,
    make_delta,
    positive_int,
    seed,
)
from lora_serve.adapters.formats.fields import check_fields, number
from lora_serve.adapters.formats.keys import check_shape, group_by_site, require_matrices
from lora_serve.adapters.formats.report import report
from lora_serve.adapters.formats.saved import split_saved
from lora_serve.errors import AdapterInvalid

READ = {"r", "randlora_alpha", "projection_prng_key", "save_projection", "sparse", "very_sparse", "bias"}
WITHOUT_EFFECT = {"randlora_dropout", "init_weights"}
TRAINED = {"randlora_lambda": "randlora_lambda", "randlora_gamma": "randlora_gamma"}
TAILS = TRAINED | {"randlora_A": "randlora_A", "randlora_B": "randlora_B"}


def lower(checkpoint: Checkpoint, base: BaseShape) -> Lowered:
    """Lower to deltas of full rank, the scaling folded into B. Raises AdapterInvalid naming keys and fields."""
    config, budget = checkpoint.config, ElementBudget(checkpoint.most_elements)
    check_fields(config, READ, WITHOUT_EFFECT)
    saved = split_saved(config, checkpoint.tensors, base)
    shared = {key: saved.rest.pop(f"base_model.{key}", None) for key in ("randlora_A", "randlora_B")}
    found = group_by_site(saved.rest, base, TAILS)
    require_matrices(found, {*TRAINED})
    sites = [effective_site(name, saved.overrides, base) for name in found]
    rank = positive_int(config, "r", 32)
    scaling = number(config, "randlora_alpha", 640) / rank
    for site in sites:
        group, narrow = found[site.name], min(site.in_features, site.out_features)
        budget.check_rank(site, rank)
        budget.reserve(site, narrow)
        budget.check((rank + narrow) * (site.in_features + site.out_features))  # its factors before they are multiplied
        check_shape(f"{site.name}.randlora_lambda", group["randlora_lambda"], (rank, -(-narrow // rank)))
        check_shape(f"{site.name}.randlora_gamma", group["randlora_gamma"], (-(-narrow // rank), narrow))
        for key, original in shared.items():
            copy = group.get(key)
            if copy is not None and (original is None or not torch.equal(copy, original)):
                raise AdapterInvalid(f"{site.name}.{key} is not a copy of base_model.{key}")
    lowered = ["the sum of its bases has full rank: the whole change of every module is kept"]
    a, b = shared["randlora_A"], shared["randlora_B"]
    if not config.get("save_projection", True) or a is None or b is None:
        a, b = _random_bases(config, rank, sites)
        lowered.append("the bases were drawn from projection_prng_key; they are not in the file")
    a, b = _check_bases(a, b, rank, sites)
    deltas = {}
    for site in sites:
        narrow, broad = sorted((site.in_features, site.out_features))
        weights, gamma = (found[site.name][key].float() for key in TRAINED)
        p = (weights[:, :, None] * a[:, :, :narrow] * gamma[None]).flatten(end_dim=1)  # [r·n, d]
        q = b[:broad, : len(gamma)].flatten(1).T * scaling  # [n·r, D]
        deltas[site.name] = make_delta(p, q) if narrow == site.in_features else make_delta(q, p)
    features = [field for field in ("sparse", "very_sparse") if config.get(field)] + saved.features
    deltas, overrides = fold_head_delta(deltas, saved.overrides, base)
    return Lowered(
        deltas,
        report(config, base, method="RandLoRA", deltas=deltas, overrides=overrides, features=features, lowered=lowered),
        overrides,
    )


def _widths(sites: list[Site]) -> tuple[int, int]:
    """Sizes of the shared bases: the largest input and output width, smaller one first."""
    widest_in = max((site.in_features for site in sites), default=1)
    widest_out = max((site.out_features for site in sites), default=1)
    return min(widest_in, widest_out), max(widest_in, widest_out)


def _check_bases(a: Tensor, b: Tensor, rank: int, sites: list[Site]) -> tuple[Tensor, Tensor]:
    narrow, broad = _widths(sites)
    bases = -(-max((min(site.in_features, site.out_features) for site in sites), default=1) // rank)
    fits = a.ndim == b.ndim == 3 and a.shape[:2] == (rank, 1) and a.shape[2] >= narrow
    if not fits or b.shape[0] < broad or b.shape[1] < bases or b.shape[2] != rank:
        raise AdapterInvalid(
            f"base_model.randlora_A takes [{rank}, 1, {narrow} or more] and base_model.randlora_B [{broad} or more, "
            f"{bases} or more, {rank}]; the adapter has {list(a.shape)} and {list(b.shape)}"
        )
    return a.float(), b.float()


def _random_bases(config: dict[str, Any], rank: int, sites: list[Site]) -> tuple[Tensor, Tensor]:
    narrow, broad = _widths(sites)
    bases = -(-narrow // rank)
    check_random_count(rank * (narrow + broad * bases))
    generator = torch.Generator().manual_seed(seed(config))
    if config.get("sparse") or config.get("very_sparse"):
        share = 1 / (2 * (math.sqrt(narrow) if config.get("very_sparse") else 3))
        a = torch.rand((rank, 1, narrow), generator=generator)
        b = torch.rand((broad, bases, rank), generator=generator)
        a, b = ((x > 1 - share).float() - (x < share).float() for x in (a, b))
    else:

        def uniform(*shape: int) -> Tensor:
            bound = math.sqrt(3.0) * math.sqrt(2.0 / 6.0) / math.sqrt(shape[2])
            return torch.empty(shape, dtype=torch.bfloat16).uniform_(-bound, bound, generator=generator)

        a = uniform(rank, 1, narrow)
        b = torch.cat([uniform(broad, 1, rank) for _ in range(bases)], dim=1)
    return a / a.std(), b / b.std()
