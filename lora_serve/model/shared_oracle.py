"""Send what rank 0 computes with the whole model to the other ranks of a base: the oracle, inputs' importance."""

from __future__ import annotations

import math
from collections.abc import Mapping

import msgspec
import torch
from torch import Tensor

from lora_serve.model.self_check import Oracle
from lora_serve.model.tensor_parallel import TensorParallel


class OracleFields(msgspec.Struct, array_like=True):
    """An `Oracle` without its logits, and their shape."""

    kind: str
    tokens: list[list[int]]
    float32_tolerance: float | None
    tolerance: float
    shape: tuple[int, ...]


def share_oracle(own: Oracle | None, parallel: TensorParallel) -> Oracle:
    """Rank 0's oracle, in every rank; the others have none of their own."""
    encoded = b""
    if own is not None:
        encoded = msgspec.msgpack.encode(
            OracleFields(own.kind, own.tokens, own.float32_tolerance, own.tolerance, tuple(own.logits.shape))
        )
    length = torch.tensor([len(encoded)])
    parallel.share(length)
    data = torch.tensor(list(encoded) if encoded else [0] * int(length), dtype=torch.uint8)
    parallel.share(data)
    fields = msgspec.msgpack.decode(bytes(data.tolist()), type=OracleFields)
    logits: Tensor = torch.empty(fields.shape) if own is None else own.logits.contiguous()
    parallel.share(logits)
    return Oracle(fields.kind, fields.tokens, logits, fields.float32_tolerance, fields.tolerance)


def share_importance(
    own: Mapping[str, Tensor], widths: Mapping[str, int], parallel: TensorParallel
) -> dict[str, Tensor]:
    """Rank 0's importance of the inputs of linear modules, in every rank; the others' own is not read.

    Args:
        widths: of the inputs, by module; a module need not have an importance.
    """
    found = {}
    for name, width in sorted(widths.items()):
        missing = torch.full((width,), math.nan)
        shared = own.get(name, missing).clone() if parallel.rank == 0 else missing
        parallel.share(shared)
        if not shared.isnan().any():
            found[name] = shared
    return found
