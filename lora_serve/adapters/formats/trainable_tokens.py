"""Trainable tokens: chosen rows of the embedding, and of the head, are replaced.

    e[id] = row;  logit[id] = x · row
    keys: X.trainable_tokens_delta [ids, width]: the new rows, not differences; `token_indices` says which they are

A head that is tied to the embedding follows it; its own key is a copy. A linear module that has such rows, a head or
any other, computes x Wᵀ without its bias. One that is not the head gets the rows' differences as a delta of rank `ids`.
Source: PEFT 0.21, `peft/tuners/trainable_tokens`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lora_serve.adapters.adapter import BaseShape, Lowered, ModuleOverride
from lora_serve.adapters.checkpoint import Checkpoint
from lora_serve.adapters.formats.factors import dequantised, own_weight, site_of
from lora_serve.adapters.formats.fields import check_fields
from lora_serve.adapters.formats.keys import by_site, check_shape, home
from lora_serve.adapters.formats.report import report
from lora_serve.adapters.formats.saved import TOKENS, take, token_ids, without_bias
from lora_serve.errors import AdapterInvalid
from lora_serve.kernels.contract import Delta

READ = {"token_indices"}
WITHOUT_EFFECT = {"init_weights"}
TAIL = "trainable_tokens_delta"


def lower(checkpoint: Checkpoint, base: BaseShape) -> Lowered:
    """Compile to replaced rows. Raises AdapterInvalid naming keys and fields."""
    config = checkpoint.config
    check_fields(config, READ, WITHOUT_EFFECT)
    tensors = dict(checkpoint.tensors)
    embedded = [key for key in tensors if home(key, base)[1] == TAIL and home(key, base)[0] in base.embeddings]
    for key in embedded:
        tensors[key.removesuffix(TAIL) + TOKENS] = tensors.pop(key)
    saved = take(config, tensors, base)
    overrides, deltas = dict(saved.overrides), {}
    for name, group in by_site(saved.rest, base, {TAIL: TAIL}).items():
        rows, ids = group[TAIL], token_ids(config, name)
        if name == base.head and base.tied and base.input_embedding in overrides:
            _check_copy(name, rows, overrides[base.input_embedding].token_rows, base)
            continue
        site = site_of(name, overrides, base)
        check_shape(f"{name}.{TAIL}", rows, (len(ids), site.in_features))
        if not 0 <= min(ids, default=0) <= max(ids, default=0) < site.out_features:
            raise AdapterInvalid(f"token_indices in adapter_config.json has ids outside 0..{site.out_features - 1}")
        if name == base.head:
            override = without_bias(overrides.get(name, ModuleOverride()), name, base)
            overrides[name] = replace(override, token_ids=tuple(ids), token_rows=rows)
            continue
        offsets = torch.zeros(len(ids), site.out_features)
        offsets[torch.arange(len(ids)), ids] = 1
        deltas[name] = Delta(rows.float() - own_weight(name, overrides, base)[ids], offsets)
        if base.bias(name) is not None:
            overrides[name] = without_bias(overrides.get(name, ModuleOverride()), name, base)
    lowered = [f"{len(token_ids(config, ''))} rows are replaced"]
    if deltas:
        lowered += [f"in {len(deltas)} linear modules, as differences from the base's rows", *dequantised(base)]
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
    """Tied modules share one parameter in PEFT; two different ones cannot both be meant."""
    if embedded is None or not torch.equal(rows * base.embeddings[base.input_embedding], embedded):
        raise AdapterInvalid(f"{name}.{TAIL} is not a copy of the embedding's, to which the head is tied")
