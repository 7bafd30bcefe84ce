"""The kernel backend interface: LoRA delta, paged attention, and the base's layers, with exact semantics.

Imports torch only. Backends (`reference`, `cpu`, `gpu`) implement `Kernels` and declare what they support; callers
never check which one they have. All tensors of one call are on one device. Nothing is allocated for a maximum: rows
without a segment are not touched, ranks are not padded, slots that are not in a batch cost nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from lora_serve.kernels.packed_weight import PackedExpertWeights, PackedWeight, Scheme


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


@dataclass(frozen=True)
class AttentionMetadata:
    """Which rows of a flat batch belong to which sequence, and the sequences' KV blocks.

    Attributes:
        query_start: int32 [sequences + 1], rows of sequence i are query_start[i]:query_start[i+1].
        context: int32 [sequences], tokens of the sequence including this step's: the last row of sequence i
            is at position context[i] - 1.
        block_table: int32 [sequences, blocks], the sequence's KV blocks in order; beyond its context nothing is read.
        max_query_len, max_context_len: no less than any sequence's rows and context, known on the host.
    """

    query_start: Tensor
    context: Tensor
    block_table: Tensor
    max_query_len: int
    max_context_len: int


Activation = Literal["silu", "gelu_tanh"]
Layers = Sequence[tuple[PackedWeight, Tensor | None]]  # weights and biases of layers that read the same input
ReplaySupport = Literal["none", "recorded_steps", "cuda_graphs"]


@dataclass(frozen=True)
class GraphBuckets:
    """Sizes of steps for which CUDA graphs are captured at start; each serves smaller steps too.

    Attributes:
        rows: of steps in which every sequence decodes, ascending.
        max_segment_rows: bound of such a step's segments; see `Segments`.
        max_rank: bound of the segments of all steps.
        tokens, sequences: of steps with prompt tokens, ascending; every number of tokens with every one of sequences.
    """

    rows: tuple[int, ...]
    max_segment_rows: int
    max_rank: int
    tokens: tuple[int, ...] = ()
    sequences: tuple[int, ...] = ()


class Recording(Protocol):
    """A forward pass recorded once, to be replayed on the same memory without the model's Python.

    Attributes:
        unsupported: why the pass cannot be replayed; None if it can.
    """

    unsupported: str | None

    def record(self, run: Callable[[], Tensor]) -> Tensor:
        """Run a pass and record it; its result, whose memory every replay writes again."""
        ...

    def replay(self) -> None:
        """Run the recorded pass again; the device may still be at it when this returns."""
        ...


class Kernels(Protocol):
    """A backend.

    Attributes:
        name: for logs and messages.
        build: which build of it this is, for people; empty where there is only one.
        replay: how steps are run without the model's Python: "recorded_steps" are recorded the second time that their
            shape occurs, each for exactly that shape; "cuda_graphs" are captured at start for `graph_buckets`.
        has_grouped_linear: whether it has `pack_experts` and `grouped_linear`.
    """

    name: str
    build: str
    replay: ReplaySupport
    graph_buckets: GraphBuckets | None
    has_grouped_linear: bool

    def pack(
        self, weights: Sequence[Tensor], scheme: Scheme | None = None, importance: Tensor | None = None
    ) -> list[PackedWeight]:
        """Lay out the weights [out, in] (fp32, bf16 or fp16) of layers that read the same input, for `linear`.

        Args:
            importance: of the inputs, [in]; see `packed_weight.quantize`.
        """
        ...

    def unpack(self, packed: PackedWeight) -> Tensor:
        """The weights [out, in] that a packed weight stands for: in their own dtype, float32 if quantised."""
        ...

    def lookup(self, packed: PackedWeight, ids: Tensor) -> Tensor:
        """unpack(packed)[ids] of a weight in full precision, without unpacking the rest: ids int64 [n] → [n, in]."""
        ...

    def linear(self, x: Tensor, layers: Layers) -> list[Tensor]:
        """Up to eight layers that read the same input: y = x @ unpack(packed).T + bias, accumulated in float32.

        The layers share dtype and scheme.

        Shapes: x [rows, in] with unit stride in the last dimension, bias [out] in x's dtype; returns [rows, out] in x's
        dtype, with unit stride in the last dimension. Where the weights are quantised, rows are rounded too: x is
        `packed_weight.round_rows(x, scheme)`.
        """
        ...

    def exact_linear(self, x: Tensor, layers: Layers) -> list[Tensor]:
        """`linear` of weights that are quantised without rounding the rows: y = x @ unpack(packed).T + bias.

        Quantised weights are rounded to x's dtype. Shapes as there; the layers may differ in dtype and scheme.
        """
        ...

    def linear_backward(self, grads: Sequence[Tensor], weights: Sequence[PackedWeight]) -> Tensor:
        """Gradient of the input that layers share: dx = Σ grads[m] @ unpack(weights[m]), of `exact_linear`.

        Shapes: grads[m] [rows, out_m] with unit stride in the last dimension; returns [rows, in] in their dtype,
        contiguous, memory that nothing else reads. No weight is unpacked longer than it is needed.
        """
        ...

    def pack_experts(
        self, weights: Tensor, scheme: Scheme | None = None, importance: Tensor | None = None
    ) -> PackedExpertWeights:
        """Lay out one layer of a mixture's experts, weights [experts, out, in], for `grouped_linear`."""
        ...

    def grouped_linear(self, x: Tensor, weights: PackedExpertWeights, bias: Tensor | None, end: Tensor) -> Tensor:
        """Each expert's layer over its own rows of x, which are sorted by expert.

        Semantics: `y[end[e - 1] : end[e]]` (from 0 for the first) is `linear` of the same rows of x, `weights[e]` and
        `bias[e]`; rows from the last end on are zero.
        Shapes: x [rows, in] with unit stride in the last dimension, bias [experts, out] in x's dtype, end int64
        [experts], ascending; returns [rows, out] in x's dtype, contiguous.
        """
        ...

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, *, plus_one: bool) -> Tensor:
        """Root mean square norm of rows x [..., width], in x's dtype, computed in float32.

        n = x / sqrt(mean(x²) + eps); y = n * (1 + weight) with `plus_one`, else n rounded to x's dtype, times weight.
        """
        ...

    def add_rms_norm(
        self, x: Tensor, y: Tensor, weight: Tensor, eps: float, *, plus_one: bool
    ) -> tuple[Tensor, Tensor]:
        """x + y, rounded to their dtype, and the `rms_norm` of that: to the bits of the two operations by themselves.

        Shapes: x and y [..., width] of one dtype; both results as x, contiguous.
        """
        ...

    def gated_activation(self, gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
        """activation(gate) * up, both [..., width] of one dtype; the activation in float32, then rounded to it."""
        ...

    def rope(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Rotary position embedding of queries and keys (RoFormer, arXiv:2104.09864; halves, not pairs).

        y = x * cos + concat(-x[dim/2:], x[:dim/2]) * sin for every head, in float32, rounded once.
        Shapes: q [1, heads, tokens, dim], k [1, kv_heads, tokens, dim], cos and sin [1, tokens, dim].
        """
        ...

    def new_recording(self, *, check_values: bool) -> Recording:
        """An empty recording for one pass; only where `replay` is not "none".

        Args:
            check_values: also detect values that reach Python (`tolist`, `numpy`), which would make a replay wrong;
            slow.
        """
        ...

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

    def delta_backward(
        self,
        x: Tensor,
        grads: Sequence[Tensor],
        dx: Tensor,
        group: DeltaGroup,
        segments: Segments,
        gradients: DeltaGroup,
    ) -> None:
        """Add the gradients of `delta`: of its input to dx, and of each slot's A and B to those of `gradients`.

        Semantics, for every segment s and module m with rank[m, slot[s]] > 0, accumulated in float32:

            rows = slice(start[s], end[s]);  a, b = A and B of (m, slot[s])
            g = weight[s] * grads[m][rows]
            h, dh = x[rows] @ a.T, g @ b.T                          # [rows, rank]
            B of gradients += h.T @ g;  A of gradients += dh.T @ x[rows]
            dx[rows] += dh @ a

        Shapes: x and dx [tokens, in], grads[m] [tokens, out_m]; all share a dtype. `gradients` has the group's shapes
        and ranks, and float32 tensors. Segments of one slot may follow each other; none cover the same rows.
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

    def write_kv(self, keys: Tensor, values: Tensor, k: Tensor, v: Tensor, kv_index: Tensor) -> None:
        """Store this step's keys and values in the block pool.

        Semantics: `keys.flatten(0, 1)[kv_index] = k; values.flatten(0, 1)[kv_index] = v`.
        Shapes: keys [blocks, block_size, kv_heads, key_dim], values [blocks, block_size, kv_heads, value_dim],
        k [tokens, kv_heads, key_dim], v likewise (any strides over the first two dimensions), kv_index int64 [tokens],
        position = block * block_size + offset.
        """
        ...

    def rope_and_write_kv(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cos: Tensor,
        sin: Tensor,
        keys: Tensor,
        values: Tensor,
        kv_index: Tensor,
    ) -> Tensor:
        """`rope`, then `write_kv` of the rotated keys and of v: to the bits of the two operations by themselves.

        Shapes: v [1, kv_heads, tokens, value_dim], the others as there; returns the rotated queries. The rotated keys
        are in the block pool alone.
        """
        ...

    def attention(
        self,
        q: Tensor,
        keys: Tensor,
        values: Tensor,
        metadata: AttentionMetadata,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Causal attention of each row over its own sequence's blocks (this step's keys are already written).

        Semantics, for the row at position p of sequence i and query head h (kv head h // (heads // kv_heads)):

            j runs over max(0, p - window + 1) .. p  (from 0 without a window)
            score[j] = scale * q · key[j];  with softcap c: c * tanh(score / c)
            out = softmax(score ++ [sinks[h]])[:-1] @ value    (a sink takes probability and adds no value)

        Shapes: q [tokens, heads, key_dim] (any strides over the first two dimensions), sinks [heads];
        returns [tokens, heads, value_dim] in q's dtype, contiguous. Softmax in float32.
        """
        ...
