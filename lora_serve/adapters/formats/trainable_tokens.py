"""Trainable tokens: e[id] = row, logit[id] = x · row; chosen rows of the embedding, and of a tied head, are replaced.

    keys: X.trainable_tokens_delta [ids, width]: the new rows, not differences; `token_indices` says which they are

A tied head uses the embedding's rows; its own key is a copy. Linear modules with replaced rows compute x Wᵀ without
their bias; one that is not the head gets the differences of rows as a delta of rank `ids`.
Source: PEFT 0.21, `peft/tuners/trainable_tokens`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lora_serve.adapters.adapter import BaseShape, Lowered, ModuleOverride
from lora_serve.adapters.checkpoint import Checkpoint
from lora_serve.adapters.formats.factors import dequantisation_note, effective_site, effective_weight
from lora_serve.adapters.formats.fields import check_fields
from lora_serve.adapters.formats.keys import PREFIX, check_shape, group_by_site, split_key
from lora_serve.adapters.formats.report import report
from lora_serve.adapters.formats.saved import TOKENS, remove_bias, split_saved, token_ids
from lora_serve.errors import AdapterInvalid
from lora_serve.kernels.contract import Delta

READ = {"token_indices"}
WITHOUT_EFFECT = {"init_weights"}
TAIL = "trainable_tokens_delta"


def lower(checkpoint: Checkpoint, base: BaseShape) -> Lowered:
    """Lower to replaced rows. Raises AdapterInvalid naming keys and fields."""
    config = checkpoint.config
    check_fields(config, READ, WITHOUT_EFFECT)
    tensors = dict(checkpoint.tensors)
    if base.tied and f"{PREFIX}{base.head}.base_layer.{TAIL}" in tensors:
        raise AdapterInvalid(
            f"target_modules in adapter_config.json names {base.input_embedding} and the head that is tied to it, "
            "which PEFT does not run either; the embedding alone replaces the rows of both"
        )
    embedded = [
        key for key in tensors if split_key(key, base)[1] == TAIL and split_key(key, base)[0] in base.embeddings
    ]
    for key in embedded:
        tensors[key.removesuffix(TAIL) + TOKENS] = tensors.pop(key)
    saved = split_saved(config, tensors, base)
    overrides, deltas = dict(saved.overrides), {}
    for name, group in group_by_site(saved.rest, base, {TAIL: TAIL}).items():
        rows, ids = group[TAIL], token_ids(config, name)
        if name == base.head and base.tied and base.input_embedding in overrides:
            _check_copy(name, rows, overrides[base.input_embedding].token_rows, base)
            continue
        site = effective_site(name, overrides, base)
        check_shape(f"{name}.{TAIL}", rows, (len(ids), site.in_features))
        if not 0 <= min(ids, default=0) <= max(ids, default=0) < site.out_features:
            raise AdapterInvalid(f"token_indices in adapter_config.json has ids outside 0..{site.out_features - 1}")
        if name == base.head:
            override = remove_bias(overrides.get(name, ModuleOverride()), name, base)
            overrides[name] = replace(override, token_ids=tuple(ids), token_rows=rows)
            continue
        offsets = torch.zeros(len(ids), site.out_features)
        offsets[torch.arange(len(ids)), ids] = 1
        deltas[name] = Delta(rows.float() - effective_weight(name, overrides, base)[ids], offsets)
        if base.bias(name) is not None:
            overrides[name] = remove_bias(overrides.get(name, ModuleOverride()), name, base)
    lowered = [f"{len(token_ids(config, ''))} rows are replaced"]
    if deltas:
        lowered += [f"in {len(deltas)} linear modules, as differences from the base's rows", *dequantisation_note(base)]
    return Lowered(deltas, _report(config, base, deltas, overrides, lowered), overrides)


def _report(
    config: dict[str, Any],
    base: BaseShape,
    deltas: dict[str, Delta],
    overrides: dict[str, ModuleOverride],
    lowered: list[str],
) -> dict[str, Any]:
    return report(config, base, method="Trainable tokens", deltas=deltas, overrides=overrides, lowered=lowered)


def _check_copy(name: str, rows: Tensor, embedded: Tensor | None, base: BaseShape) -> None:
    """Raise AdapterInvalid if a tied head's rows differ from the embedding's; in PEFT they are one parameter."""
    if embedded is None or not torch.equal(rows * base.embeddings[base.input_embedding], embedded):
        raise AdapterInvalid(f"{name}.{TAIL} is not a copy of the embedding's, to which the head is tied")
