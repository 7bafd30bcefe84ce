"""AdaLoRA: y = W x + s · B((A ⊙ E) x), a truncated SVD whose ranks were pruned in training.

    s = α / (init_r + 1e-5), whatever the remaining rank; where α ≤ 0, the rank takes its place
    keys: X.lora_A [r, in], X.lora_E [r, 1], X.lora_B [out, r]
    rank_pattern: "X.lora_E" → which of the init_r rows were kept; a module that is not listed has all of them

A module whose rank was pruned to 0 is unchanged. Of the LoRA fields in its configuration only α is used. Source: PEFT
0.21, `peft/tuners/adalora`.
"""

from __future__ import annotations

from typing import Any

from lora_serve.adapters.adapter import BaseShape, Lowered
from lora_serve.adapters.checkpoint import Checkpoint
from lora_serve.adapters.formats.budget import ElementBudget
from lora_serve.adapters.formats.factors import check_rank, effective_site, fold_head_delta, make_delta
from lora_serve.adapters.formats.fields import check_fields, number
from lora_serve.adapters.formats.keys import check_delta, check_shape, group_by_site, require_matrices
from lora_serve.adapters.formats.report import report
from lora_serve.adapters.formats.saved import split_saved
from lora_serve.errors import AdapterInvalid

READ = {"init_r", "lora_alpha", "rank_pattern", "bias", "trainable_token_indices"}
WITHOUT_EFFECT = {
    "r", "lora_dropout", "use_rslora", "alpha_pattern", "init_lora_weights", "lora_bias", "megatron_core",
    "runtime_config", "eva_config", "loftq_config", "corda_config", "lora_ga_config", "qalora_group_size",
    "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step",
}  # fmt: skip
MUST_BE_OFF: dict[str, tuple[Any, ...]] = {
    "use_dora": (False,),
    "use_qalora": (False,),
    "use_bdlora": (False,),
    "layer_replication": ([],),
    "target_parameters": ([],),
    "megatron_config": (),
    "velora_config": (),
    "monteclora_config": (),
    "alora_invocation_tokens": (),
    "arrow_config": (),
    "kasa_config": (),
}
TAILS = {"lora_A": "lora_A", "lora_B": "lora_B", "lora_E": "lora_E"}


def lower(checkpoint: Checkpoint, base: BaseShape) -> Lowered:
    """Lower to deltas, with E folded into A and the scaling into B. Raises AdapterInvalid naming keys and fields."""
    config, budget = checkpoint.config, ElementBudget(checkpoint.most_elements)
    check_fields(config, READ, WITHOUT_EFFECT, MUST_BE_OFF)
    saved = split_saved(config, checkpoint.tensors, base)
    found = group_by_site(saved.rest, base, TAILS)
    require_matrices(found, {*TAILS})
    init_r, kept_ranks = number(config, "init_r", 12), _kept_ranks(config)
    alpha = number(config, "lora_alpha", 8) if config.get("lora_alpha") != 0 else 0.0
    deltas, unranked = {}, 0
    for name, group in found.items():
        a, b = group["lora_A"].float(), group["lora_B"].float()
        site = effective_site(name, saved.overrides, base)
        check_delta(site, a, b)
        rank = a.shape[0]
        check_shape(f"{name}.lora_E", group["lora_E"], (rank, 1))
        check_rank(name, rank, kept_ranks.get(name, init_r))
        if rank:
            budget.reserve(site, rank, "init_r")
            scaling = (alpha if alpha > 0 else rank) / (init_r + 1e-5)
            deltas[name] = make_delta(a * group["lora_E"].float(), b.T * scaling)
        else:
            unranked += 1
    features = (["rank_pattern"] if kept_ranks else []) + saved.features
    lowered = [f"{unranked} modules were left no rank and are the base's"] if unranked else []
    deltas, overrides = fold_head_delta(deltas, saved.overrides, base)
    return Lowered(
        deltas,
        report(config, base, method="AdaLoRA", deltas=deltas, overrides=overrides, features=features, lowered=lowered),
        overrides,
    )


def _kept_ranks(config: dict[str, Any]) -> dict[str, int]:
    """Number of rows that `rank_pattern` keeps, by module."""
    pattern = config.get("rank_pattern") or {}
    if not isinstance(pattern, dict):
        raise AdapterInvalid("rank_pattern in adapter_config.json is not an object")
    kept_ranks = {}
    for key, rows in pattern.items():
        if not isinstance(rows, list) or not all(isinstance(row, bool) for row in rows):
            raise AdapterInvalid(f"rank_pattern.{key[:100]} in adapter_config.json is not a list of true and false")
        kept_ranks[key.removesuffix(".lora_E")] = sum(rows)
    return kept_ranks
