"""VB-LoRA: y = W x + B(A x), where A and B are put together from sub-vectors of one shared bank.

    each piece of v numbers of a row of A, and of a column of B, is Σ_k softmax(top-k logits) · bank[indices]
    keys: base_model.vblora_vector_bank [vectors, v]; X.vblora_logits_A [r, in/v, vectors], _B [out/v, r, vectors]
    with `save_only_topk_weights`, instead: X.vblora_logits_A_topk_indices [r, in/v, k] (integers) and _topk_weights
    [..., k - 1], what the softmax gives but for the last, which is what is missing to one

Source: PEFT 0.21, `peft/tuners/vblora`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lora_serve.adapters.adapter import BaseShape, Lowered
from lora_serve.adapters.checkpoint import Checkpoint
from lora_serve.adapters.formats.factors import cheaper, check_rank, count, settled, site_of
from lora_serve.adapters.formats.fields import check_fields
from lora_serve.adapters.formats.keys import by_site, check_shape, need
from lora_serve.adapters.formats.report import report
from lora_serve.adapters.formats.saved import take
from lora_serve.errors import AdapterInvalid

READ = {"r", "topk", "num_vectors", "vector_length", "save_only_topk_weights", "bias"}
WITHOUT_EFFECT = {"vblora_dropout", "init_vector_bank_bound", "init_logits_std"}
BANK = "base_model.vblora_vector_bank"
LOGITS = {name: name for name in ("vblora_logits_A", "vblora_logits_B")}
CHOSEN = {f"{name}_topk_{part}": f"{name}_topk_{part}" for name in LOGITS for part in ("indices", "weights")}


def lower(checkpoint: Checkpoint, base: BaseShape) -> Lowered:
    """Compile to deltas, A and B put together. Raises AdapterInvalid naming keys and fields."""
    config = checkpoint.config
    check_fields(config, READ, WITHOUT_EFFECT)
    saved = take(config, checkpoint.tensors, base)
    device_slots = saved.rest.pop(BANK, None)
    if device_slots is None:
        raise AdapterInvalid(f"{BANK} is missing: the sub-vectors that all modules are put together from")
    device_slots, length, rank = device_slots.float(), count(config, "vector_length", 256), count(config, "r", 4)
    check_shape(BANK, device_slots, (count(config, "num_vectors", 256), length))
    tails = CHOSEN if config.get("save_only_topk_weights") else LOGITS
    found = by_site(saved.rest, base, tails)
    need(found, {*tails})
    deltas = {}
    for name, group in found.items():
        site = site_of(name, saved.overrides, base)
        a = _pieces(config, name, group, "vblora_logits_A", device_slots)  # [r, in/v, v]
        b = _pieces(config, name, group, "vblora_logits_B", device_slots)  # [out/v, r, v]
        check_rank(name, a.shape[0], rank)
        check_shape(f"{name}.vblora_logits_A, put together,", a, (rank, site.in_features // length, length))
        check_shape(f"{name}.vblora_logits_B, put together,", b, (site.out_features // length, rank, length))
        if site.in_features % length or site.out_features % length:
            raise AdapterInvalid(f"vector_length {length} in adapter_config.json does not divide the widths of {name}")
        deltas[name] = cheaper(a.flatten(1), b.transpose(0, 1).flatten(1))
    features = (["save_only_topk_weights"] if tails is CHOSEN else []) + saved.features
    deltas, overrides = settled(deltas, saved.overrides, base)
    return Lowered(
        deltas,
        report(config, base, method="VB-LoRA", deltas=deltas, overrides=overrides, features=features),
        overrides,
    )


def _pieces(config: dict[str, Any], name: str, group: Mapping[str, Tensor], key: str, device_slots: Tensor) -> Tensor:
    """Σ weight · sub-vector, [..., v]."""
    most, vectors = count(config, "topk", 2), device_slots.shape[0]
    if key in group:
        logits = group[key].float()
        if logits.ndim != 3 or logits.shape[-1] != vectors or most > vectors:
            raise AdapterInvalid(
                f"{name}.{key} takes logits of {vectors} vectors, of which topk = {most} are used; "
                f"the adapter has {list(logits.shape)}"
            )
        best, indices = logits.topk(most, dim=-1)
        weights = best.softmax(-1)
    else:
        indices, first = group[f"{key}_topk_indices"].long(), group[f"{key}_topk_weights"].float()
        check_shape(f"{name}.{key}_topk_weights", first, (*indices.shape[:-1], most - 1))
        if indices.ndim != 3 or indices.shape[-1] != most or indices.min() < 0 or indices.max() >= vectors:
            raise AdapterInvalid(f"{name}.{key}_topk_indices does not choose {most} of {vectors} vectors")
        weights = torch.cat([first, (1 - first.sum(-1, keepdim=True)).clamp(min=0)], -1)
    return (weights[..., None] * device_slots[indices]).sum(-2)
