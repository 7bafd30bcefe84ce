"""The kernel contract: low-rank deltas of a mixed batch, and the tables through which adapters are found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lora_serve.kernels.layer_contract import Activation, Layers


@dataclass(frozen=True)
class Delta:
    """One adapter's low-rank part for one module; views into the adapter's flat tensor.

    `a` is [rank, in]; `b` is [rank, out] (transposed from PEFT's), scaling folded in. Both contiguous, of one dtype,
    and beginning at 64-byte boundaries.
    """

    a: Tensor
    b: Tensor


def pointer_tables(modules: int, slots: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Empty tables of addresses of A and of B (int64) and of ranks (int32), each [modules, slots]."""
    return (
        torch.zeros(modules, slots, dtype=torch.int64, device=device),
        torch.zeros(modules, slots, dtype=torch.int64, device=device),
        torch.zeros(modules, slots, dtype=torch.int32, device=device),
    )


class DeltaGroup:
    """Pointer tables of the modules that read the same input (q, k and v, say).

    Attributes:
        in_features, out_features: width of the shared input; one output width per module.
        a, b: int64 [modules, slots], address of each `Delta.a` / `Delta.b`; 0 where the slot has none.
        rank: int32 [modules, slots]; 0 where the slot has none.
        deltas: the tensors behind the addresses, [module][slot]; keeps them alive and lets the reference read them.
    Slot 0 is the base model and always empty. The tables' addresses never change.

    Args:
        tables: zeroed memory for `a`, `b` and `rank`; the device slots give rows of their own, so that one write fills
            a slot of all groups. None: the group's own memory.
    """

    def __init__(
        self,
        in_features: int,
        out_features: tuple[int, ...],
        slots: int,
        dtype: torch.dtype,
        device: torch.device,
        tables: tuple[Tensor, Tensor, Tensor] | None = None,
    ) -> None:
        modules = len(out_features)
        self.in_features = in_features
        self.out_features = out_features
        self.dtype = dtype
        self.a, self.b, self.rank = pointer_tables(modules, slots, device) if tables is None else tables
        self.deltas: list[list[Delta | None]] = [[None] * slots for _ in range(modules)]

    def set(self, module: int, slot: int, delta: Delta | None) -> None:
        """Point `slot` of `module` at `delta` (None: at nothing)."""
        self.deltas[module][slot] = delta
        self.a[module, slot] = 0 if delta is None else delta.a.data_ptr()
        self.b[module, slot] = 0 if delta is None else delta.b.data_ptr()
        self.rank[module, slot] = 0 if delta is None else delta.a.shape[0]

    def get(self, module: int, slot: int) -> Delta | None:
        """The delta that `slot` of `module` points at."""
        return self.deltas[module][slot]


class ExpertsGroup(DeltaGroup):
    """The pointer tables of one layer of a mixture's experts as one module's.

    Attributes:
        expert_slots: slots of each expert; slot s of expert e is e * expert_slots + s.

    Args:
        experts: each expert's own group, of one module; rows of shared tables, one after the other, which this group
            reads too.
    """

    def __init__(self, experts: Sequence[DeltaGroup]) -> None:
        self._experts = experts
        first = experts[0]
        self.expert_slots = first.rank.shape[1]
        for expert, own in enumerate(experts):
            if (
                own.a.shape[0] != 1
                or own.a.data_ptr() != first.a.data_ptr() + expert * self.expert_slots * first.a.itemsize
            ):
                raise ValueError(f"the pointer tables of expert {expert} do not follow those of the one before")
        slots = len(experts) * self.expert_slots
        a, b, rank = (table.as_strided((1, slots), (slots, 1)) for table in (first.a, first.b, first.rank))
        super().__init__(first.in_features, first.out_features, slots, first.dtype, first.a.device, (a, b, rank))

    def set(self, module: int, slot: int, delta: Delta | None) -> None:
        self._experts[slot // self.expert_slots].set(module, slot % self.expert_slots, delta)

    def get(self, module: int, slot: int) -> Delta | None:
        return self._experts[slot // self.expert_slots].get(module, slot % self.expert_slots)


@dataclass(frozen=True)
class Segments:
    """Ranges of consecutive rows that use one adapter slot.

    All tensors are [segments], on the device: `start`, `end` (int32, half-open row ranges), `slot` (int32, never 0),
    `weight` (float32). Segments that cover the same rows (a composition) are neighbours and cover exactly the same
    ones: their deltas add. Others do not overlap. Rows in no segment are the base's. An empty segment (start = end)
    does nothing. Known on the host: `max_rows` is no less than any segment's rows, `max_rank` no less than the sum of
    ranks that any module adds to one row.
    """

    start: Tensor
    end: Tensor
    slot: Tensor
    weight: Tensor
    max_rows: int
    max_rank: int

    @property
    def count(self) -> int:
        return self.start.shape[0]


class DeltaOperations(Protocol):
    """Deltas by themselves, and together with the base's layers."""

    def delta(self, x: Tensor, outputs: Sequence[Tensor], group: DeltaGroup, segments: Segments) -> None:
        """Add the low-rank delta of each row's adapter to the base's outputs, in place.

        Semantics, for every segment s and module m with rank[m, slot[s]] > 0, accumulated in float32:

            rows = slice(start[s], end[s])
            h = x[rows] @ a(m, slot[s]).T                          # shrink [rows, rank]
            outputs[m][rows] += weight[s] * (h @ b(m, slot[s]))    # expand [rows, out_m]

        Shapes: x [tokens, in], outputs[m] [tokens, out_m]; x and outputs share a dtype (fp32, bf16, fp16), the
        group's dtype may differ from it. Inputs have unit stride in the last dimension.
        """
        ...

    def adapted_linear(
        self,
        x: Tensor,
        layers: Layers,
        group: DeltaGroup,
        segments: Segments,
    ) -> list[Tensor]:
        """`linear`, then `delta` on its outputs: one operation, so that a backend may run parts of both at once.

        Shapes: x [rows, in] with unit stride in the last dimension; the layers are the group's modules, in order.
        """
        ...

    def adapted_gated_linear(
        self,
        x: Tensor,
        layers: Layers,
        group: DeltaGroup,
        segments: Segments,
        activation: Activation,
    ) -> Tensor:
        """`adapted_linear` of two layers, then `gated_activation` of their outputs: the inner part of a gated MLP.

        Shapes: as there; the layers have the same number of outputs; returns [rows, out] in x's dtype.
        """
        ...
