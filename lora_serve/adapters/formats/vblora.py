"""VB-LoRA: y = W x + B(A x), where A and B are composed of sub-vectors from one shared vector bank.

    each sub-vector of length v of a row of A, and of a column of B, is Σ_k softmax(top-k logits) · bank[indices]
    keys: base_model.vblora_vector_bank [vectors, v]; X.vblora_logits_A [r, in/v, vectors], _B [out/v, r, vectors]
    with `save_only_topk_weights`, instead: X.vblora_logits_A_topk_indices [r, in/v, k] (integers) and _topk_weights
    [..., k - 1], the softmax without its last weight, which is 1 minus the others

Source: PEFT 0.21, `peft/tuners/vblora`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lora_serve.adapters.adapter import BaseShape, Lowered
from lora_serve.adapters.checkpoint import Checkpoint
from lora_serve.adapters.formats.budget import ElementBudget
from lora_serve.adapters.formats.factors import effective_site, fold_head_delta, make_delta, positive_int
from lora_serve.adapters.formats.fields import check_fields
from lora_serve.adapters.formats.keys import check_shape, group_by_site, require_matrices
from lora_serve.adapters.formats.report import report
from lora_serve.adapters.formats.saved import split_saved
from lora_serve.errors import AdapterInvalid

READ = {"r", "topk", "num_vectors", "vector_length", "save_only_topk_weights", "bias"}
WITHOUT_EFFECT = {"vblora_dropout", "init_vector_bank_bound", "init_logits_std"}
BANK = "base_model.vblora_vector_bank"
LOGITS = {name: name for name in ("vblora_logits_A", "vblora_logits_B")}
CHOSEN = {f"{name}_topk_{part}": f"{name}_topk_{part}" for name in LOGITS for part in ("indices", "weights")}


def lower(checkpoint: Checkpoint, base: BaseShape) -> Lowered:
    """Lower to deltas, with A and B composed. Raises AdapterInvalid naming keys and fields."""
    config, budget = checkpoint.config, ElementBudget(checkpoint.most_elements)
    check_fields(config, READ, WITHOUT_EFFECT)
    saved = split_saved(config, checkpoint.tensors, base)
    bank = saved.rest.pop(BANK, None)
    if bank is None:
        raise AdapterInvalid(f"{BANK} is missing: the sub-vectors that all modules are put together from")
    bank, length, rank = bank.float(), positive_int(config, "vector_length", 256), positive_int(config, "r", 4)
    check_shape(BANK, bank, (positive_int(config, "num_vectors", 256), length))
    topk = positive_int(config, "topk", 2)
    tails = CHOSEN if config.get("save_only_topk_weights") else LOGITS
    found = group_by_site(saved.rest, base, tails)
    require_matrices(found, {*tails})
    deltas = {}
    for name, group in found.items():
        site = effective_site(name, saved.overrides, base)
        if site.in_features % length or site.out_features % length:
            raise AdapterInvalid(f"vector_length {length} in adapter_config.json does not divide the widths of {name}")
        budget.reserve(site, rank)
        budget.check(topk * rank * (site.in_features + site.out_features), "topk")  # the sub-vectors before their sum
        a = _combine(name, group, "vblora_logits_A", (rank, site.in_features // length), topk, bank)  # [r, in/v, v]
        b = _combine(name, group, "vblora_logits_B", (site.out_features // length, rank), topk, bank)  # [out/v, r, v]
        deltas[name] = make_delta(a.flatten(1), b.transpose(0, 1).flatten(1))
    features = (["save_only_topk_weights"] if tails is CHOSEN else []) + saved.features
    deltas, overrides = fold_head_delta(deltas, saved.overrides, base)
    return Lowered(
        deltas,
        report(config, base, method="VB-LoRA", deltas=deltas, overrides=overrides, features=features),
        overrides,
    )


def _combine(
    name: str, group: Mapping[str, Tensor], key: str, shape: tuple[int, int], topk: int, bank: Tensor
) -> Tensor:
    """The weighted sums of the top-k sub-vectors, [*shape, v]."""
    vectors = len(bank)
    if topk > vectors:
        raise AdapterInvalid(f"topk = {topk} in adapter_config.json is more than the {vectors} vectors of {BANK}")
    if key in group:
        check_shape(f"{name}.{key}", group[key], (*shape, vectors))
        top, indices = group[key].float().topk(topk, dim=-1)
        weights = top.softmax(-1)
    else:
        indices, first = group[f"{key}_topk_indices"], group[f"{key}_topk_weights"]
        check_shape(f"{name}.{key}_topk_indices", indices, (*shape, topk))
        check_shape(f"{name}.{key}_topk_weights", first, (*shape, topk - 1))
        indices, first = indices.long(), first.float()
        if indices.min() < 0 or indices.max() >= vectors:
            raise AdapterInvalid(f"{name}.{key}_topk_indices does not choose {topk} of {vectors} vectors")
        weights = torch.cat([first, (1 - first.sum(-1, keepdim=True)).clamp(min=0)], -1)
    return (weights[..., None] * bank[indices]).sum(-2)
