"""DeLoRA: y = W x + B(D(A(w ⊙ x))), the angle and the strength of a LoRA apart.

    D = diag(λ/r / (‖A_i‖ · ‖B_i‖)), norms of A's rows and B's columns, at least 1e-4 each
    w = norms of the columns of the base's own W, as they were when training began
    keys: X.delora_A [r, in], X.delora_B [out, r], X.delora_lambda [1], X.delora_w_norm [in]
    `rank_pattern` overrides r by module name; λ is in the weights, whatever the configuration began with

Where the norms were not saved, they are taken from the base. Only nn.Linear can have it. Source: PEFT 0.21,
`peft/tuners/delora`.
"""

from __future__ import annotations

from lora_serve.adapters.adapter import BaseShape, Lowered
from lora_serve.adapters.checkpoint import Checkpoint
from lora_serve.adapters.formats.factors import cheaper, check_rank, dequantised, own_weight, settled, site_of
from lora_serve.adapters.formats.fields import Patterns, check_fields, number
from lora_serve.adapters.formats.keys import by_site, check_delta, check_shape, need
from lora_serve.adapters.formats.report import report
from lora_serve.adapters.formats.saved import take

READ = {"r", "rank_pattern", "bias"}
WITHOUT_EFFECT = {"delora_lambda", "lambda_pattern", "module_dropout", "init_weights"}
TAILS = {name: name for name in ("delora_A", "delora_B", "delora_lambda", "delora_w_norm")}
LEAST = 1e-4  # of a norm


def lower(checkpoint: Checkpoint, base: BaseShape) -> Lowered:
    """Compile to deltas, w in A and D in B. Raises AdapterInvalid naming keys and fields."""
    config = checkpoint.config
    check_fields(config, READ, WITHOUT_EFFECT)
    ranks = Patterns(config, "rank_pattern")
    saved = take(config, checkpoint.tensors, base)
    found = by_site(saved.rest, base, TAILS)
    need(found, {"delora_A", "delora_B", "delora_lambda"})
    deltas, measured = {}, 0
    for name, group in found.items():
        a, b, strength = (group[tail].float() for tail in ("delora_A", "delora_B", "delora_lambda"))
        check_delta(site_of(name, saved.overrides, base), a, b)
        check_shape(f"{name}.delora_lambda", strength, (1,))
        rank = ranks.get(name, number(config, "r", 8))
        check_rank(name, a.shape[0], rank)
        if "delora_w_norm" in group:
            widths = group["delora_w_norm"].float()
            check_shape(f"{name}.delora_w_norm", widths, (site_of(name, saved.overrides, base).in_features,))
        else:
            widths, measured = own_weight(name, saved.overrides, base).norm(dim=0), measured + 1
        scaling = strength / rank / (a.norm(dim=1).clamp(min=LEAST) * b.norm(dim=0).clamp(min=LEAST))  # [r]
        deltas[name] = cheaper(a * widths, b.T * scaling[:, None])
    features = (["rank_pattern"] if config.get("rank_pattern") else []) + saved.features
    lowered = (
        [f"for {measured} modules the norms of the weights are the base's", *dequantised(base)] if measured else []
    )
    deltas, overrides = settled(deltas, saved.overrides, base)
    return Lowered(
        deltas,
        report(config, base, method="DeLoRA", deltas=deltas, overrides=overrides, features=features, lowered=lowered),
        overrides,
    )
