"""The reference backend in plain torch: slow, simple, correct on any device.

The other backends are tested against it, and it serves where none of them can run. It reads the tensors behind the
pointer tables, never the addresses, and loops over segments and sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from lora_serve.kernels.composed import ComposedBackward, ComposedOperations
from lora_serve.kernels.contract import (
    Activation,
    AttentionMetadata,
    DeltaGroup,
    GraphBuckets,
    Layers,
    Recording,
    ReplaySupport,
    Segments,
)
from lora_serve.kernels.packed_weight import (
    PackedExpertWeights,
    PackedWeight,
    Scheme,
    dequantize,
    quantize,
    round_rows,
)


class ReferenceKernels(ComposedOperations, ComposedBackward):
    """`Kernels` in plain torch."""

    name, build = "reference", ""
    replay: ReplaySupport = "none"  # it reads segments and sequences in Python
    graph_buckets: GraphBuckets | None = None
    has_grouped_linear = True

    def pack(
        self, weights: Sequence[Tensor], scheme: Scheme | None = None, importance: Tensor | None = None
    ) -> list[PackedWeight]:
        return [_pack(weight, scheme, importance) for weight in weights]

    def unpack(self, packed: PackedWeight) -> Tensor:
        return packed.data if packed.scale is None else dequantize(packed.data, packed.scale, packed.levels)

    def outputs_of(self, packed: PackedWeight, outputs: slice) -> PackedWeight:
        scale, levels = (None if part is None else part[outputs] for part in (packed.scale, packed.levels))
        shape = (outputs.stop - outputs.start, packed.shape[1])
        return replace(packed, shape=shape, data=packed.data[outputs], scale=scale, levels=levels)

    def lookup(self, packed: PackedWeight, ids: Tensor) -> Tensor:
        return nn.functional.embedding(ids, packed.data)

    def linear(self, x: Tensor, layers: Layers) -> list[Tensor]:
        outputs = []
        for packed, bias in layers:
            if packed.scheme is None:
                outputs.append(nn.functional.linear(x, packed.data, bias))
                continue
            y = round_rows(x, packed.scheme) @ self.unpack(packed).T
            outputs.append((y if bias is None else y + bias.float()).to(x.dtype))
        return outputs

    def pack_experts(
        self, weights: Tensor, scheme: Scheme | None = None, importance: Tensor | None = None
    ) -> PackedExpertWeights:
        return PackedExpertWeights.pack(weights, lambda weight: _pack(weight, scheme, importance))

    def grouped_linear(self, x: Tensor, weights: PackedExpertWeights, bias: Tensor | None, end: Tensor) -> Tensor:
        y = x.new_zeros(x.shape[0], weights.shape[0])
        first = 0
        for expert, last in enumerate(end.tolist()):
            if first < last:
                own = None if bias is None else bias[expert]
                (y[first:last],) = self.linear(x[first:last], [(weights[expert], own)])
            first = last
        return y

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, *, plus_one: bool) -> Tensor:
        wide = x.float()
        n = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        return (n * (1 + weight.float())).to(x.dtype) if plus_one else (n.to(x.dtype) * weight).to(x.dtype)

    def gated_activation(self, gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
        if activation == "silu":
            return nn.functional.silu(gate) * up
        return nn.functional.gelu(gate, approximate="tanh") * up

    def rope(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:

        def rotate(x: Tensor) -> Tensor:
            first, second = x.float().chunk(2, dim=-1)
            return (x.float() * cos[:, None].float() + torch.cat([-second, first], -1) * sin[:, None].float()).to(
                x.dtype
            )

        return rotate(q), rotate(k)

    def new_recording(self, *, check_values: bool) -> Recording:
        """Not supported: `replay` is "none"."""
        raise NotImplementedError

    def delta(self, x: Tensor, outputs: Sequence[Tensor], group: DeltaGroup, segments: Segments) -> None:
        if segments.count == 0:
            return
        runs = zip(
            segments.start.tolist(),
            segments.end.tolist(),
            segments.slot.tolist(),
            segments.weight.tolist(),
            strict=True,
        )
        wide = torch.promote_types(x.dtype, torch.float32)  # float64 checks gradients
        for start, end, slot, weight in runs:
            rows = x[start:end].to(wide)
            for module, output in enumerate(outputs):
                delta = group.get(module, slot)
                if delta is not None:
                    shrunk = rows @ delta.a.to(wide).T  # [rows, rank]
                    sums = output[start:end].to(wide) + weight * (shrunk @ delta.b.to(wide))
                    output[start:end] = sums.to(output.dtype)

    def write_kv(self, keys: Tensor, values: Tensor, k: Tensor, v: Tensor, kv_index: Tensor) -> None:
        size = keys.shape[1]
        block, offset = kv_index // size, kv_index % size
        keys[block, offset] = k.to(keys.dtype)
        values[block, offset] = v.to(values.dtype)

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
        tokens, heads, key_dim = q.shape
        size, kv_heads, value_dim = keys.shape[1], keys.shape[2], values.shape[3]
        out = q.new_zeros(tokens, heads, value_dim)
        starts = metadata.query_start.tolist()
        for i, context in enumerate(metadata.context.tolist()):
            first, last = starts[i], starts[i + 1]
            if first == last:
                continue
            blocks = metadata.block_table[i, : -(-context // size)].long()
            key = keys[blocks].flatten(0, 1)[:context].float()  # [context, kv_heads, key_dim]
            value = values[blocks].flatten(0, 1)[:context].float()
            queries = (
                q[first:last].float().reshape(last - first, kv_heads, -1, key_dim)
            )  # [rows, kv_heads, share, key_dim]
            score = scale * torch.einsum("rhgd,jhd->hgrj", queries, key)
            if softcap is not None:
                score = softcap * torch.tanh(score / softcap)
            at = torch.arange(context - (last - first), context, device=q.device)[:, None]  # positions of the rows
            j = torch.arange(context, device=q.device)
            hidden = j > at
            if window is not None:
                hidden |= j <= at - window
            score = score.masked_fill(hidden, float("-inf"))
            if sinks is not None:
                sink = sinks.float().view(kv_heads, -1, 1, 1).expand(*score.shape[:-1], 1)
                score = torch.cat([score, sink], dim=-1)
            share = score.softmax(dim=-1)[..., :context]
            out[first:last] = torch.einsum("hgrj,jhd->rhgd", share, value).flatten(1, 2).to(q.dtype)
        return out


def _pack(weight: Tensor, scheme: Scheme | None, importance: Tensor | None) -> PackedWeight:
    shape = (weight.shape[0], weight.shape[1])
    data, scale, levels = (weight, None, None) if scheme is None else quantize(weight, scheme, importance)
    return PackedWeight(shape, weight.dtype, scheme, data, scale, levels)
