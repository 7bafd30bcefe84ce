"""LoHa: y = W x + s · ((W1a W1b) ⊙ (W2a W2b)) x, a Hadamard product of two low-rank matrices.

    s = α/r; `rank_pattern` and `alpha_pattern` override r and α by module name
    keys: X.hada_w1_a, X.hada_w2_a [out, r]; X.hada_w1_b, X.hada_w2_b [r, in]

The entrywise product of two rank r matrices has rank r²: its factors are the entrywise products of every row of W1b
with every row of W2b, and of every column of W1a with every column of W2a (Khatri–Rao). Only for nn.Linear; `hada_t1`
and `hada_t2` belong to convolutions. Source: PEFT 0.21, `peft/tuners/loha`.
"""

from __future__ import annotations

from torch import Tensor

from lora_serve.adapters.adapter import BaseShape, Lowered
from lora_serve.adapters.checkpoint import Checkpoint
from lora_serve.adapters.formats.budget import ElementBudget
from lora_serve.adapters.formats.factors import check_rank, effective_site, fold_head_delta, full_rank_delta, make_delta
from lora_serve.adapters.formats.fields import Patterns, check_fields, number
from lora_serve.adapters.formats.keys import check_delta, group_by_site, require_matrices
from lora_serve.adapters.formats.report import report
from lora_serve.adapters.formats.saved import split_saved

READ = {"r", "alpha", "rank_pattern", "alpha_pattern"}
WITHOUT_EFFECT = {"rank_dropout", "module_dropout", "use_effective_conv2d", "init_weights"}
TAILS = {name: name for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")}


def lower(checkpoint: Checkpoint, base: BaseShape) -> Lowered:
    """Lower to deltas of rank r², or min(in, out) if that is less. Raises AdapterInvalid naming keys and fields."""
    config, budget = checkpoint.config, ElementBudget(checkpoint.most_elements)
    check_fields(config, READ, WITHOUT_EFFECT)
    ranks, alphas = Patterns(config, "rank_pattern"), Patterns(config, "alpha_pattern")
    saved = split_saved(config, checkpoint.tensors, base)
    found = group_by_site(saved.rest, base, TAILS)
    require_matrices(found, {*TAILS})
    deltas, full = {}, 0
    for name, group in found.items():
        w1a, w1b, w2a, w2b = (group[tail].float() for tail in TAILS)
        rank = ranks.get(name, number(config, "r", 8))
        site = effective_site(name, saved.overrides, base)
        budget.check_rank(site, rank)
        for a, b in ((w1b, w1a), (w2b, w2a)):
            check_delta(site, a, b)
            check_rank(name, a.shape[0], rank)
        budget.reserve(site, min(len(w1b) ** 2, site.in_features, site.out_features))
        scaling = alphas.get(name, number(config, "alpha", 8)) / rank
        if rank * rank > min(w1a.shape[0], w1b.shape[1]):
            deltas[name] = full_rank_delta((w1a @ w1b) * (w2a @ w2b) * scaling)
            full += 1
        else:
            deltas[name] = make_delta(_row_products(w1b, w2b), _row_products(w1a.T, w2a.T) * scaling)
    features = [field for field in ("rank_pattern", "alpha_pattern") if config.get(field)] + saved.features
    lowered = ["the entrywise product of two low-rank matrices became one low-rank matrix of the squared rank"]
    if full:
        lowered.append(f"for {full} modules the squared rank is above the module's own: their whole change is kept")
    deltas, overrides = fold_head_delta(deltas, saved.overrides, base)
    return Lowered(
        deltas,
        report(config, base, method="LoHa", deltas=deltas, overrides=overrides, features=features, lowered=lowered),
        overrides,
    )


def _row_products(first: Tensor, second: Tensor) -> Tensor:
    """Entrywise products of every row of one matrix [r, n] with every row of another: [r², n]."""
    return (first[:, None] * second[None]).flatten(end_dim=1)
