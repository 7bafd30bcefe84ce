"""AdaLoRA: y = W x + s · B((A ⊙ E) x), a truncated SVD whose ranks training has chosen.

    s = α / (init_r + 1e-5), whatever rank was left; where α ≤ 0, the rank stands for it
    keys: X.lora_A [r, in], X.lora_E [r, 1], X.lora_B [out, r]
    rank_pattern: "X.lora_E" → which of the init_r rows were kept; a module that it does not list has all of them

A module whose rank was cut to none is unchanged. Of the LoRA fields that its configuration inherits, it uses none but
α. Source: PEFT 0.21, `peft/tuners/adalora`.
"""

from __future__ import annotations

from typing import Any

from lora_serve.adapters.adapter import BaseShape, Lowered
from lora_serve.adapters.checkpoint import Checkpoint
from lora_serve.adapters.formats.factors import cheaper, check_rank, settled, site_of
from lora_serve.adapters.formats.fields import check_fields, number
from lora_serve.adapters.formats.keys import by_site, check_delta, check_shape, need
from lora_serve.adapters.formats.report import report
from lora_serve.adapters.formats.saved import take
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
    """Compile to deltas, E in A and the scaling in B. Raises AdapterInvalid naming keys and fields."""
    config = checkpoint.config
    check_fields(config, READ, WITHOUT_EFFECT, MUST_BE_OFF)
    saved = take(config, checkpoint.tensors, base)
    found = by_site(saved.rest, base, TAILS)
    need(found, {*TAILS})
    first, kept = number(config, "init_r", 12), _kept(config)
    alpha = number(config, "lora_alpha", 8) if config.get("lora_alpha") != 0 else 0.0
    deltas, cut = {}, 0
    for name, group in found.items():
        a, b = group["lora_A"].float(), group["lora_B"].float()
        check_delta(site_of(name, saved.overrides, base), a, b)
        rank = a.shape[0]
        check_shape(f"{name}.lora_E", group["lora_E"], (rank, 1))
        check_rank(name, rank, kept.get(name, first))
        if rank:
            scaling = (alpha if alpha > 0 else rank) / (first + 1e-5)
            deltas[name] = cheaper(a * group["lora_E"].float(), b.T * scaling)
        else:
            cut += 1
    features = (["rank_pattern"] if kept else []) + saved.features
    lowered = [f"{cut} modules were left no rank and are the base's"] if cut else []
    deltas, overrides = settled(deltas, saved.overrides, base)
    return Lowered(
        deltas,
        report(config, base, method="AdaLoRA", deltas=deltas, overrides=overrides, features=features, lowered=lowered),
        overrides,
    )


def _kept(config: dict[str, Any]) -> dict[str, int]:
    """How many rows `rank_pattern` has kept, by module."""
    pattern = config.get("rank_pattern") or {}
    if not isinstance(pattern, dict):
        raise AdapterInvalid("rank_pattern in adapter_config.json is not an object")
    kept = {}
    for key, rows in pattern.items():
        if not isinstance(rows, list) or not all(isinstance(row, bool) for row in rows):
            raise AdapterInvalid(f"rank_pattern.{key[:100]} in adapter_config.json is not a list of true and false")
        kept[key.removesuffix(".lora_E")] = sum(rows)
    return kept
