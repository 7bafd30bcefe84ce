"""LoRA on an embedding: e' = e + s · B A[:, id], added before the model scales its embeddings.

    keys: X.lora_embedding_A [r, ids], X.lora_embedding_B [dim, r], X.lora_magnitude_vector [dim] with DoRA
    `target_parameters` on X.weight: X.lora_A.weight [r, dim], X.lora_B.weight [ids, r], e' = e + s · B[id] A

With tied weights the head is unchanged, unless `ensure_weight_tying` is set; PEFT then saves the head's LoRA too.
Source: PEFT 0.21, `peft/tuners/lora/layer.py` (Embedding, ParamWrapper).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from lora_serve.adapters.adapter import BaseShape, ModuleOverride
from lora_serve.adapters.formats import dora
from lora_serve.adapters.formats.keys import check_shape
from lora_serve.errors import AdapterInvalid
from lora_serve.kernels.contract import Delta


def lower(
    name: str,
    matrices: dict[str, Tensor],
    override: ModuleOverride,
    scaling: Callable[[str, int, tuple[int, ...]], float],
    base: BaseShape,
) -> ModuleOverride:
    """Add an embedding's LoRA to its override. Raises AdapterInvalid naming keys."""
    table = override.parameters.get("weight")
    ids, width = tuple(base.modules[name]["weight"] if table is None else table.shape)
    match matrices:
        case {"embedding_A": ids_matrix, "embedding_B": width_matrix}:
            rank = ids_matrix.shape[0]
            check_shape(f"{name}.lora_embedding_A", ids_matrix, (rank, ids))
            check_shape(f"{name}.lora_embedding_B", width_matrix, (width, rank))
            factor = scaling(name, rank, ())
            rows, columns = ids_matrix.T.contiguous(), width_matrix.T.float().contiguous() * factor
        case {"A": width_matrix, "B": ids_matrix}:
            rank = width_matrix.shape[0]
            check_shape(f"{name}.lora_A", width_matrix, (rank, width))
            check_shape(f"{name}.lora_B", ids_matrix, (ids, rank))
            factor = scaling(f"{name}.weight", rank, (ids, width))
            rows, columns = ids_matrix.contiguous(), width_matrix.float() * factor
        case _:
            raise AdapterInvalid(f"only one of A and B is there for {name}")
    if (magnitude := matrices.get("magnitude")) is not None:
        weight = base.parameter(f"{name}.weight").cpu() if table is None else table
        override = replace(override, gain_out=dora.gain(name, magnitude, weight.float().T, (rows.float() @ columns).T))
    return replace(override, lookup=Delta(rows, columns * base.embeddings[name]))
