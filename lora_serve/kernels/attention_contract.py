"""The kernel contract: rotary embeddings, the paged KV cache, and attention over it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


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


@dataclass(frozen=True)
class Rotation:
    """Queries and keys with their rotary embedding: the arguments of `AttentionOperations.rope`."""

    q: Tensor
    k: Tensor
    cos: Tensor
    sin: Tensor


class AttentionOperations(Protocol):
    """What an attention layer does between its projections."""

    def rope(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Rotary position embedding of queries and keys (RoFormer, arXiv:2104.09864; halves, not pairs).

        y = x * cos + concat(-x[dim/2:], x[:dim/2]) * sin for every head, in float32, rounded once.
        Shapes: q [1, heads, tokens, dim], k [1, kv_heads, tokens, dim], cos and sin [1, tokens, dim].
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
        self, rotation: Rotation, v: Tensor, keys: Tensor, values: Tensor, kv_index: Tensor
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
