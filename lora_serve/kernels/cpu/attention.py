"""Paged attention and KV writes on the CPU: argument packing for `attention.cpp`."""

from __future__ import annotations

import torch
from torch import Tensor

from lora_serve.kernels.checks import check_write
from lora_serve.kernels.contract import AttentionMetadata
from lora_serve.kernels.cpu.calls import CALLS
from lora_serve.kernels.cpu.library import Library, type_number


class NativeAttention:
    """`Kernels.write_kv` and `attention`."""

    def __init__(self, library: Library) -> None:
        self._write_kv, self._attention = library.call("lora_write_kv"), library.call("lora_attention")

    def write_kv(self, keys: Tensor, values: Tensor, k: Tensor, v: Tensor, kv_index: Tensor) -> None:
        blocks, size, heads, _ = keys.shape
        tokens = kv_index.shape[0]
        check_write(keys, values, k, v, kv_index)
        k_token, k_head = _byte_strides(k)
        v_token, v_head = _byte_strides(v)
        call = CALLS["WriteCall"].pack(
            keys=_pool(keys),
            values=_pool(values),
            k=k.data_ptr(),
            k_token=k_token,
            k_head=k_head,
            v=v.data_ptr(),
            v_token=v_token,
            v_head=v_head,
            index=kv_index.contiguous().data_ptr(),
            tokens=tokens,
            kv_heads=heads,
            blocks=blocks,
            block_size=size,
            threads=torch.get_num_threads(),
        )
        wrong = self._write_kv(call)
        if wrong:
            raise ValueError(f"the KV index of token {wrong - 1} is not in the pool")

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
        blocks, size, kv_heads, value_dim = values.shape
        if keys.shape != (blocks, size, kv_heads, key_dim) or heads % kv_heads:
            raise ValueError(f"q {tuple(q.shape)} does not fit the pool {tuple(keys.shape)}")
        if keys.dtype is not values.dtype:
            raise TypeError("keys and values share a type")
        table = metadata.block_table.contiguous()
        for part in (metadata.query_start, metadata.context, table):
            if part.dtype is not torch.int32:
                raise TypeError("attention metadata is int32")
        sequences = metadata.context.shape[0]
        if metadata.query_start.shape[0] != sequences + 1 or table.shape[0] != sequences:
            raise ValueError(f"metadata of {sequences} sequences have as many rows of blocks, and an end for each")
        if sinks is not None and sinks.shape != (heads,):
            raise ValueError(f"sinks {tuple(sinks.shape)} do not fit {heads} heads")
        if sinks is not None:
            sinks = sinks.to(torch.float32).contiguous()
        out = torch.empty(tokens, heads, value_dim, dtype=q.dtype)
        q_token, q_head = _byte_strides(q)
        call = CALLS["AttentionCall"].pack(
            keys=_pool(keys),
            values=_pool(values),
            q=q.data_ptr(),
            q_token=q_token,
            q_head=q_head,
            q_type=type_number(q.dtype),
            out=out.data_ptr(),
            query_start=metadata.query_start.data_ptr(),
            context=metadata.context.data_ptr(),
            block_table=table.data_ptr(),
            table_width=table.shape[1],
            sequences=metadata.context.shape[0],
            tokens=tokens,
            heads=heads,
            kv_heads=kv_heads,
            blocks=blocks,
            block_size=size,
            window=window or 0,
            threads=torch.get_num_threads(),
            sinks=0 if sinks is None else sinks.data_ptr(),
            scale=scale,
            softcap=softcap or 0.0,
        )
        wrong = self._attention(call)
        if wrong:
            raise ValueError(f"sequence {wrong - 1} does not fit its rows, context or blocks")
        return out


def _pool(pool: Tensor) -> tuple[int | float, ...]:
    """`Pool` in calls.h, of keys or values [blocks, block_size, kv_heads, dim]."""
    block, position, head, unit = pool.stride()
    if unit != 1:
        raise ValueError("heads of the KV pool are contiguous")
    each = pool.element_size()
    return CALLS["Pool"].values(
        data=pool.data_ptr(),
        block=block * each,
        position=position * each,
        head=head * each,
        type=type_number(pool.dtype),
        dim=pool.shape[3],
    )


def _byte_strides(rows: Tensor) -> tuple[int, int]:
    """Of a token and of a head, of rows [tokens, heads, dim]."""
    token, head, unit = rows.stride()
    if unit != 1:
        raise ValueError("heads are contiguous")
    each = rows.element_size()
    return token * each, head * each
