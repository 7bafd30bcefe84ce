"""DeLoRA: y = W x + B(D(A(w ⊙ x))), a LoRA with normalised A and B and a learned strength λ.

    D = diag(λ/r / (‖A_i‖ · ‖B_i‖)), norms of A's rows and B's columns, at least 1e-4 each
    w = norms of the columns of the base's W at the start of training
    keys: X.delora_A [r, in], X.delora_B [out, r], X.delora_lambda [1], X.delora_w_norm [in]
    `rank_pattern` overrides r by module name; the configuration's λ is only the initial value

Where w was not saved, it is computed from the base. Only for nn.Linear. Source: PEFT 0.21,
`peft/tuners/delora`.
"""

from __future__ import annotations

from lora_serve.adapters.adapter import BaseShape, Lowered
from lora_serve.adapters.checkpoint import Checkpoint
from lora_serve.adapters.formats.budget import ElementBudget
from lora_serve.adapters.formats.factors import (
    check_rank,
    dequantisation_note,
    effective_site,
    effective_weight,
    fold_head_delta,
    make_delta,
)
from lora_serve.adapters.formats.fields import Patterns, check_fields, number
from lora_serve.adapters.formats.keys import check_delta, check_shape, group_by_site, require_matrices
from lora_serve.adapters.formats.report import report
from lora_serve.adapters.formats.saved import split_saved

READ = {"r", "rank_pattern", "bias"}
WITHOUT_EFFECT = {"delora_lambda", "lambda_pattern", "module_dropout", "init_weights"}
TAILS = {name: name for name in ("delora_A", "delora_B", "delora_lambda", "delora_w_norm")}
MIN_NORM = 1e-4  # of rows of A and columns of B


def lower(checkpoint: Checkpoint, base: BaseShape) -> Lowered:
    """Lower to deltas, with w folded into A and D into B. Raises AdapterInvalid naming keys and fields."""
    config, budget = checkpoint.config, ElementBudget(checkpoint.most_elements)
    check_fields(config, READ, WITHOUT_EFFECT)
    ranks = Patterns(config, "rank_pattern")
    saved = split_saved(config, checkpoint.tensors, base)
    found = group_by_site(saved.rest, base, TAILS)
    require_matrices(found, {"delora_A", "delora_B", "delora_lambda"})
    deltas, from_base = {}, 0
    for name, group in found.items():
        a, b, strength = (group[tail].float() for tail in ("delora_A", "delora_B", "delora_lambda"))
        site = effective_site(name, saved.overrides, base)
        check_delta(site, a, b)
        check_shape(f"{name}.delora_lambda", strength, (1,))
        rank = ranks.get(name, number(config, "r", 8))
        check_rank(name, a.shape[0], rank)
        budget.reserve(site, a.shape[0])
        if "delora_w_norm" in group:
            norms = group["delora_w_norm"].float()
            check_shape(f"{name}.delora_w_norm", norms, (site.in_features,))
        else:
            norms, from_base = effective_weight(name, saved.overrides, base).norm(dim=0), from_base + 1
        scaling = strength / rank / (a.norm(dim=1).clamp(min=MIN_NORM) * b.norm(dim=0).clamp(min=MIN_NORM))  # [r]
        deltas[name] = make_delta(a * norms, b.T * scaling[:, None])
    features = (["rank_pattern"] if config.get("rank_pattern") else []) + saved.features
    lowered = (
        [f"for {from_base} modules the norms of the weights are the base's", *dequantisation_note(base)]
        if from_base
        else []
    )
    deltas, overrides = fold_head_delta(deltas, saved.overrides, base)
    return Lowered(
        deltas,
        report(config, base, method="DeLoRA", deltas=deltas, overrides=overrides, features=features, lowered=lowered),
        overrides,
    )
