"""What a kernel backend promises: the only maths that the adapters and the paged KV need.

Imports torch only. Backends (`reference`, `native`) implement `Kernels`; whoever calls them never asks which one it
has. Every tensor of one call lives on one device. Nothing is allocated by the caller for a maximum: rows without a
segment are not touched, ranks are not padded, slots that are not in a batch cost nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from lora_serve.kernels.packed_weight import PackedWeight, Scheme


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
    """Pointer tables of the modules that read one input (q, k and v, say): a slot is a row of pointers.

    Attributes:
        in_features, out_features: width of the shared input; one output width per module.
        a, b: int64 [modules, slots], address of each `Delta.a` / `Delta.b`; 0 where the slot has none.
        rank: int32 [modules, slots]; 0 where the slot has none.
        deltas: the tensors behind the addresses, [module][slot]; keeps them alive and lets the reference read them.
    Slot 0 is the base model and always empty. The tables' addresses never change.

    Args:
        tables: zeroed memory for `a`, `b` and `rank`; the bank gives rows of its own, so that one write fills a slot of
            all groups. None: the group's own memory.
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


@dataclass(frozen=True)
class Segments:
    """Runs of consecutive rows that share a slot.

    All tensors are [segments], on the device: `start`, `end` (int32, half-open row ranges), `slot` (int32, never 0),
    `weight` (float32). Segments that cover the same rows (a composition) are neighbours and cover exactly the same
    ones: their deltas add. Others do not overlap. Rows in no segment are the base's. An empty segment (start = end) is
    none. Known on the host: `longest` is no less than any segment's rows, `rank` no less than the ranks together that
    any module adds to one row.
    """

    start: Tensor
    end: Tensor
    slot: Tensor
    weight: Tensor
    longest: int
    rank: int

    @property
    def count(self) -> int:
        return self.start.shape[0]


@dataclass(frozen=True)
class AttentionMetadata:
    """How a flat batch of tokens lies over its sequences and their KV blocks.

    Attributes:
        query_start: int32 [sequences + 1], rows of sequence i are query_start[i]:query_start[i+1].
        context: int32 [sequences], tokens of the sequence including this step's: the last row of sequence i
            stands at position context[i] - 1.
        block_table: int32 [sequences, blocks], the sequence's KV blocks in order; beyond its context nothing is read.
        max_query_len, max_context_len: no less than any sequence's rows and context, known on the host.
    """

    query_start: Tensor
    context: Tensor
    block_table: Tensor
    max_query_len: int
    max_context_len: int


Activation = Literal["silu", "gelu_tanh"]


@dataclass(frozen=True)
class GraphBuckets:
    """Steps that a backend wants tapes of before they come, each serving smaller ones too.

    Attributes:
        rows: their sizes, ascending; of sequences that decode.
        longest, rank: what their segments are kept within; see `Segments`.
    """

    rows: tuple[int, ...]
    longest: int
    rank: int


class Recording(Protocol):
    """A pass over a backend's calls, noted once to be made again on the same memory without the model's Python.

    `refused` says why it cannot be, if so.
    """

    refused: str | None

    def note(self, run: Callable[[], Tensor]) -> Tensor:
        """Make a pass and note it; its result."""
        ...

    def play(self) -> None:
        """Make the noted pass again; the result lies where it lay."""
        ...


class Kernels(Protocol):
    """A backend.

    `ladder` is None where tapes are made of whatever steps come, each for its exact size.
    """

    name: str
    ladder: GraphBuckets | None

    def pack(self, weight: Tensor, scheme: Scheme | None = None) -> PackedWeight:
        """Put a map's weights [out, in] (fp32, bf16 or fp16) into the form that `linear` reads."""
        ...

    def unpack(self, packed: PackedWeight) -> Tensor:
        """The weights [out, in] that a packed map amounts to: in their own dtype, or float32 if made small."""
        ...

    def beside(self, layers: Sequence[PackedWeight]) -> list[PackedWeight]:
        """The same maps, which `linear` will get together, laid out for that; those given are not used any more."""
        ...

    def rows(self, packed: PackedWeight, ids: Tensor) -> Tensor:
        """unpack(packed)[ids] of a map in full precision, without unpacking the rest: ids int64 [n] → [n, in]."""
        ...

    def linear(self, x: Tensor, layers: Sequence[tuple[PackedWeight, Tensor | None]]) -> list[Tensor]:
        """Up to eight maps of one kind that read one input: y = x @ unpack(packed).T + bias, accumulated in float32.

        Shapes: x [rows, in] with unit stride in the last dimension, bias [out] in x's dtype; returns [rows, out] in x's
        dtype, with unit stride in the last dimension. Where the weights are small, rows are rounded too: x is
        `packed.rounded(x, scheme)`.
        """
        ...

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, *, plus_one: bool) -> Tensor:
        """Root mean square norm of rows x [..., width], in x's dtype, computed in float32.

        n = x / sqrt(mean(x²) + eps); y = n * (1 + weight) with `plus_one`, else n rounded to x's dtype, times weight.
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

    def tape(self, *, check_values: bool = False) -> Recording | None:
        """A tape that notes a pass over this backend's calls (`check_values`: and whether it can be); None if it has none."""
        ...

    def delta(self, x: Tensor, outputs: list[Tensor], group: DeltaGroup, segments: Segments) -> None:
        """Add each row's own low-rank delta to the base's outputs, in place.

        Semantics, for every segment s and module m with rank[m, slot[s]] > 0, accumulated in float32:

            rows = slice(start[s], end[s])
            h = x[rows] @ a(m, slot[s]).T                          # shrink [rows, rank]
            outputs[m][rows] += weight[s] * (h @ b(m, slot[s]))    # expand [rows, out_m]

        Shapes: x [tokens, in], outputs[m] [tokens, out_m]; x and outputs share a dtype (fp32, bf16, fp16), the
        group's dtype may differ from it. Inputs have unit stride in the last dimension.
        """
        ...

    def write_kv(self, keys: Tensor, values: Tensor, k: Tensor, v: Tensor, kv_index: Tensor) -> None:
        """Store this step's keys and values at their places in the block pool.

        Semantics: `keys.flatten(0, 1)[kv_index] = k; values.flatten(0, 1)[kv_index] = v`.
        Shapes: keys [blocks, block_size, kv_heads, key_dim], values [blocks, block_size, kv_heads, value_dim],
        k [tokens, kv_heads, key_dim], v likewise (any strides over the first two dimensions), kv_index int64 [tokens],
        position = block * block_size + offset.
        """
        ...

    def attention(
        self,
        q: Tensor,
        keys: Tensor,
        values: Tensor,
        spans: AttentionMetadata,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Causal attention of each row over its own sequence's blocks (this step's keys are already written).

        Semantics, for the row at position p of sequence i and query head h (kv head h // (heads // kv_heads)):

            j runs over max(0, p - window + 1) .. p  (from 0 without a window)
            score[j] = scale * q · key[j];  with softcap c: c * tanh(score / c)
            out = softmax(score ++ [sinks[h]])[:-1] @ value    (a sink takes probability and gives nothing)

        Shapes: q [tokens, heads, key_dim] (any strides over the first two dimensions), sinks [heads];
        returns [tokens, heads, value_dim] in q's dtype, contiguous. Softmax in float32.
        """
        ...
