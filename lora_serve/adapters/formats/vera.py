"""VeRA: y = W x + λ_b ⊙ B(λ_d ⊙ (A x)), with one random A and B shared by all modules.

    keys: X.vera_lambda_d [r], X.vera_lambda_b [out];
          base_model.vera_A [r, widest in], base_model.vera_B [widest out, r]
    a module uses the first `in` columns of A and the first `out` rows of B
    without `save_projection`, A and B are generated from `projection_prng_key`: uniform in ± √(6 / fan_in), A first

Source: PEFT 0.21, `peft/tuners/vera`.
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
    check_rank,
    effective_site,
    fold_head_delta,
    make_delta,
    positive_int,
    seed,
)
from lora_serve.adapters.formats.fields import check_fields
from lora_serve.adapters.formats.keys import check_shape, group_by_site, require_matrices
from lora_serve.adapters.formats.report import report
from lora_serve.adapters.formats.saved import split_saved
from lora_serve.errors import AdapterInvalid

READ = {"r", "projection_prng_key", "save_projection", "bias"}
WITHOUT_EFFECT = {"vera_dropout", "d_initial", "init_weights"}
TAILS = {"vera_lambda_b": "vera_lambda_b", "vera_lambda_d": "vera_lambda_d"}
SHARED = ("base_model.vera_A", "base_model.vera_B")


def lower(checkpoint: Checkpoint, base: BaseShape) -> Lowered:
    """Lower to deltas, with λ_d folded into A and λ_b into B. Raises AdapterInvalid naming keys and fields."""
    config, budget = checkpoint.config, ElementBudget(checkpoint.most_elements)
    check_fields(config, READ, WITHOUT_EFFECT)
    saved = split_saved(config, checkpoint.tensors, base)
    shared = [saved.rest.pop(key, None) for key in SHARED]
    found = group_by_site(saved.rest, base, TAILS)
    require_matrices(found, {*TAILS})
    sites = [effective_site(name, saved.overrides, base) for name in found]
    rank = positive_int(config, "r", 256)
    for site in sites:
        group = found[site.name]
        budget.reserve(site, rank)
        check_rank(site.name, group["vera_lambda_d"].numel(), rank)
        check_shape(f"{site.name}.vera_lambda_d", group["vera_lambda_d"], (rank,))
        check_shape(f"{site.name}.vera_lambda_b", group["vera_lambda_b"], (site.out_features,))
    if config.get("save_projection", True):
        a, b = _saved_projections(shared, rank, sites)
        lowered = []
    else:
        a, b = _random_projections(config, rank, sites)
        lowered = ["the projections were drawn from projection_prng_key; they are not in the file"]
    deltas = {}
    for site in sites:
        group = found[site.name]
        left = group["vera_lambda_d"].float()[:, None] * a[:, : site.in_features]
        right = (group["vera_lambda_b"].float()[:, None] * b[: site.out_features]).T
        deltas[site.name] = make_delta(left, right)
    deltas, overrides = fold_head_delta(deltas, saved.overrides, base)
    return Lowered(
        deltas,
        report(
            config, base, method="VeRA", deltas=deltas, overrides=overrides, features=saved.features, lowered=lowered
        ),
        overrides,
    )


def _saved_projections(shared: list[Tensor | None], rank: int, sites: list[Site]) -> tuple[Tensor, Tensor]:
    a, b = shared
    if a is None or b is None:
        raise AdapterInvalid(f"save_projection is set in adapter_config.json, but {' or '.join(SHARED)} is missing")
    widest_in, widest_out = _widest(sites)
    if (
        a.ndim != 2
        or b.ndim != 2
        or a.shape[0] != rank
        or b.shape[1] != rank
        or a.shape[1] < widest_in
        or b.shape[0] < widest_out
    ):
        raise AdapterInvalid(
            f"{SHARED[0]} takes [{rank}, {widest_in} or more] and {SHARED[1]} [{widest_out} or more, {rank}]; "
            f"the adapter has {list(a.shape)} and {list(b.shape)}"
        )
    return a.float(), b.float()


def _random_projections(config: dict[str, Any], rank: int, sites: list[Site]) -> tuple[Tensor, Tensor]:
    widest_in, widest_out = _widest(sites)
    check_random_count(rank * (widest_in + widest_out))
    generator = torch.Generator().manual_seed(seed(config))

    def uniform(rows: int, columns: int) -> Tensor:
        bound = math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(columns))
        return torch.empty(rows, columns).uniform_(-bound, bound, generator=generator)

    a = uniform(rank, widest_in)
    return a, uniform(widest_out, rank)


def _widest(sites: list[Site]) -> tuple[int, int]:
    """Largest input and output width of the modules."""
    return max((site.in_features for site in sites), default=0), max((site.out_features for site in sites), default=0)
