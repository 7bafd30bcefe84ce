"""RandLoRA: y = W x + s · ΔW x, a weighted sum of random low-rank matrices that together have full rank.

    with d ≤ D the module's two widths, n = ⌈d / r⌉ bases and s = α/r:
    P [r·n, d] is λ[:, :, None] ⊙ A[:, :, :d] ⊙ γ[None] with its first two axes as one,
    Q [D, n·r] is B[:D, :n] with its last two axes as one, and ΔW = Q P where in = d, otherwise (Q P)ᵀ
    keys: X.randlora_lambda [r, n], X.randlora_gamma [n, d]; base_model.randlora_A [r, 1, d or more] and
    base_model.randlora_B [D or more, n or more, r], of which every module may hold a copy
    without `save_projection`, A and B are drawn from `projection_prng_key`: uniform, in bfloat16, or with `sparse` and
    `very_sparse` of -1, 0 and 1; divided by their standard deviation

(The axes of P and Q run in different orders; that is how PEFT multiplies them.) The rank is full by design, so ΔW is
kept whole where r·n is above d. Source: PEFT 0.21, `peft/tuners/randlora`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lora_serve.adapters.adapter import BaseShape, Lowered, Site
from lora_serve.adapters.checkpoint import Checkpoint
from lora_serve.adapters.formats.factors import cheaper, check_drawn, count, seed, settled, site_of
from lora_serve.adapters.formats.fields import check_fields, number
from lora_serve.adapters.formats.keys import by_site, check_shape, need
from lora_serve.adapters.formats.report import report
from lora_serve.adapters.formats.saved import take
from lora_serve.errors import AdapterInvalid

READ = {"r", "randlora_alpha", "projection_prng_key", "save_projection", "sparse", "very_sparse", "bias"}
WITHOUT_EFFECT = {"randlora_dropout", "init_weights"}
TRAINED = {"randlora_lambda": "randlora_lambda", "randlora_gamma": "randlora_gamma"}
TAILS = TRAINED | {"randlora_A": "randlora_A", "randlora_B": "randlora_B"}


def lower(checkpoint: Checkpoint, base: BaseShape) -> Lowered:
    """Compile to deltas of full rank, scaling in B. Raises AdapterInvalid naming keys and fields."""
    config = checkpoint.config
    check_fields(config, READ, WITHOUT_EFFECT)
    saved = take(config, checkpoint.tensors, base)
    shared = {key: saved.rest.pop(f"base_model.{key}", None) for key in ("randlora_A", "randlora_B")}
    found = by_site(saved.rest, base, TAILS)
    need(found, {*TRAINED})
    sites = [site_of(name, saved.overrides, base) for name in found]
    rank = count(config, "r", 32)
    scaling = number(config, "randlora_alpha", 640) / rank
    for site in sites:
        group, narrow = found[site.name], min(site.in_features, site.out_features)
        check_shape(f"{site.name}.randlora_lambda", group["randlora_lambda"], (rank, -(-narrow // rank)))
        check_shape(f"{site.name}.randlora_gamma", group["randlora_gamma"], (-(-narrow // rank), narrow))
        for key, own in shared.items():
            copy = group.get(key)
            if copy is not None and (own is None or not torch.equal(copy, own)):
                raise AdapterInvalid(f"{site.name}.{key} is not a copy of base_model.{key}")
    lowered = ["the sum of its bases has full rank: the whole change of every module is kept"]
    a, b = shared["randlora_A"], shared["randlora_B"]
    if not config.get("save_projection", True) or a is None or b is None:
        a, b = _drawn(config, rank, sites)
        lowered.append("the bases were drawn from projection_prng_key; they are not in the file")
    a, b = _fitting(a, b, rank, sites)
    deltas = {}
    for site in sites:
        narrow, broad = sorted((site.in_features, site.out_features))
        weights, gamma = (found[site.name][key].float() for key in TRAINED)
        p = (weights[:, :, None] * a[:, :, :narrow] * gamma[None]).flatten(end_dim=1)  # [r·n, d]
        q = b[:broad, : len(gamma)].flatten(1).T * scaling  # [n·r, D]
        deltas[site.name] = cheaper(p, q) if narrow == site.in_features else cheaper(q, p)
    features = [field for field in ("sparse", "very_sparse") if config.get(field)] + saved.features
    deltas, overrides = settled(deltas, saved.overrides, base)
    return Lowered(
        deltas,
        report(config, base, method="RandLoRA", deltas=deltas, overrides=overrides, features=features, lowered=lowered),
        overrides,
    )


def _widths(sites: list[Site]) -> tuple[int, int]:
    """What the shared bases must cover: the narrower and the broader of the largest input and output widths."""
    wide = max((site.in_features for site in sites), default=1)
    tall = max((site.out_features for site in sites), default=1)
    return min(wide, tall), max(wide, tall)


def _fitting(a: Tensor, b: Tensor, rank: int, sites: list[Site]) -> tuple[Tensor, Tensor]:
    narrow, broad = _widths(sites)
    bases = -(-max((min(site.in_features, site.out_features) for site in sites), default=1) // rank)
    fits = a.ndim == b.ndim == 3 and a.shape[:2] == (rank, 1) and a.shape[2] >= narrow
    if not fits or b.shape[0] < broad or b.shape[1] < bases or b.shape[2] != rank:
        raise AdapterInvalid(
            f"base_model.randlora_A takes [{rank}, 1, {narrow} or more] and base_model.randlora_B [{broad} or more, "
            f"{bases} or more, {rank}]; the adapter has {list(a.shape)} and {list(b.shape)}"
        )
    return a.float(), b.float()


def _drawn(config: dict[str, Any], rank: int, sites: list[Site]) -> tuple[Tensor, Tensor]:
    narrow, broad = _widths(sites)
    bases = -(-narrow // rank)
    check_drawn(rank * (narrow + broad * bases))
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
