"""Norms, gated activations, rotary embeddings and KV writes in Triton, each in one launch.

All are bound by memory, so a program takes about two thousand numbers: several rows, or a part of a row. Values are not
read on the host, so indices are not checked.

A dependent launch starts its programs while the kernel before still runs (`plan_table.py`); they wait for its end
before they read anything that a kernel of the step wrote.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from lora_serve.kernels.checks import check_gated, check_norm, check_rope, check_write
from lora_serve.kernels.contract import Activation, Rotation
from lora_serve.kernels.gpu.device import launch_options

PROGRAM = 2048  # numbers of a program, unless a row is longer
GELU = tl.constexpr(1.5957691216057308)  # 2 sqrt(2 / pi)


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, plus_one: bool, dependent: bool = False) -> Tensor:
    """`Kernels.rms_norm`. Raises ValueError for shapes or strides that do not fit."""
    rows = x.reshape(-1, x.shape[-1])
    check_norm(rows, weight)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch_norm(rows, None, weight, None, y, eps, plus_one, dependent)
    return y


def add_rms_norm(
    x: Tensor, y: Tensor, weight: Tensor, eps: float, *, plus_one: bool, dependent: bool = False
) -> tuple[Tensor, Tensor]:
    """`Kernels.add_rms_norm`. Raises ValueError for shapes or strides that do not fit."""
    rows, others = x.reshape(-1, x.shape[-1]), y.reshape(-1, x.shape[-1])
    check_norm(rows, weight)
    if x.shape != y.shape or x.dtype is not y.dtype or others.stride(1) != 1:
        raise ValueError(f"x {tuple(x.shape)}, {x.dtype} and y {tuple(y.shape)}, {y.dtype} do not fit")
    total, normed = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    _launch_norm(rows, others, weight, total, normed, eps, plus_one, dependent)
    return total, normed


def _launch_norm(
    rows: Tensor,
    others: Tensor | None,
    weight: Tensor,
    total: Tensor | None,
    y: Tensor,
    eps: float,
    plus_one: bool,
    dependent: bool,
) -> None:
    count, width = rows.shape
    if count:
        pad = triton.next_power_of_2(width)
        tile = max(1, PROGRAM // pad)
        _norm[(triton.cdiv(count, tile),)](
            rows, others, weight, total, y, count, rows.stride(0), 0 if others is None else others.stride(0), eps,
            PLUS_ONE=plus_one, WIDTH=width, PAD=pad, TILE=tile, num_warps=min(16, max(4, pad // 256)),
            **launch_options(dependent),
        )  # fmt: skip


def gated_activation(gate: Tensor, up: Tensor, activation: Activation, *, dependent: bool = False) -> Tensor:
    """`Kernels.gated_activation`. Raises ValueError for shapes or strides that do not fit."""
    check_gated(gate, up)
    width = gate.shape[-1]
    left, right = gate.reshape(-1, width), up.reshape(-1, width)
    y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if y.numel():
        tile = min(PROGRAM, triton.next_power_of_2(width))
        _gated[left.shape[0], triton.cdiv(width, tile)](
            left, right, y, left.stride(0), right.stride(0), SILU=activation == "silu", WIDTH=width, TILE=tile,
            **launch_options(dependent),
        )  # fmt: skip
    return y


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, dependent: bool = False) -> tuple[Tensor, Tensor]:
    """`Kernels.rope`; the results are views of [tokens, heads, dim].

    Raises ValueError or TypeError for shapes, strides or types that do not fit.
    """
    check_rope(q, k, cos, sin)
    _, heads, tokens, dim = q.shape
    kv_heads = k.shape[1]
    q_out, k_out = (torch.empty(tokens, n, dim, dtype=q.dtype, device=q.device) for n in (heads, kv_heads))
    if tokens:
        pad = triton.next_power_of_2(dim // 2)
        tile = max(1, PROGRAM // 2 // pad)
        _rope[tokens, triton.cdiv(heads, tile) + triton.cdiv(kv_heads, tile)](
            q, k, q_out, k_out, cos.contiguous(), sin.contiguous(), q.stride(2), q.stride(1), k.stride(2), k.stride(1),
            HEADS=heads, KV_HEADS=kv_heads, HALF=dim // 2, PAD=pad, TILE=tile, **launch_options(dependent),
        )  # fmt: skip
    return q_out.transpose(0, 1)[None], k_out.transpose(0, 1)[None]


def write_kv(keys: Tensor, values: Tensor, k: Tensor, v: Tensor, kv_index: Tensor, *, dependent: bool = False) -> None:
    """`Kernels.write_kv`; an index outside the pool is not detected.

    Raises ValueError or TypeError for shapes, strides or types that do not fit.
    """
    size, heads = keys.shape[1:3]
    tokens = kv_index.shape[0]
    _check_pool(keys, values, k, v, kv_index)
    if tokens:
        pad = triton.next_power_of_2(max(keys.shape[3], values.shape[3]))
        tile = min(max(1, PROGRAM // pad), triton.next_power_of_2(heads))
        _write[tokens, triton.cdiv(heads, tile), 2](
            keys, values, k, v, kv_index.contiguous(), *keys.stride()[:3], *values.stride()[:3], *k.stride()[:2],
            *v.stride()[:2], SIZE=size, HEADS=heads, KEY_DIM=keys.shape[3], VALUE_DIM=values.shape[3], PAD=pad,
            TILE=tile, num_warps=min(4, max(1, tile * pad // 256)), **launch_options(dependent),
        )  # fmt: skip


def rope_and_write_kv(
    rotation: Rotation, v: Tensor, keys: Tensor, values: Tensor, kv_index: Tensor, *, dependent: bool = False
) -> Tensor:
    """`Kernels.rope_and_write_kv`; the result is a view of [tokens, heads, dim]. An index is checked as in `write_kv`.

    Raises ValueError or TypeError for shapes, strides or types that do not fit.
    """
    q, k, cos, sin = rotation.q, rotation.k, rotation.cos, rotation.sin
    check_rope(q, k, cos, sin)
    if k.shape[:3] != v.shape[:3]:
        raise ValueError(f"k {tuple(k.shape)} and v {tuple(v.shape)} do not fit")
    _check_pool(keys, values, k[0].transpose(0, 1), v[0].transpose(0, 1), kv_index)
    _, heads, tokens, dim = q.shape
    kv_heads, value_dim = values.shape[2:]
    q_out = torch.empty(tokens, heads, dim, dtype=q.dtype, device=q.device)
    if tokens:
        pad, value_pad = triton.next_power_of_2(dim // 2), triton.next_power_of_2(value_dim)
        tile, value_tile = max(1, PROGRAM // 2 // pad), max(1, PROGRAM // value_pad)
        parts = triton.cdiv(heads, tile) + triton.cdiv(kv_heads, tile) + triton.cdiv(kv_heads, value_tile)
        _rope_and_write[tokens, parts](
            q, k, v, q_out, keys, values, cos.contiguous(), sin.contiguous(), kv_index.contiguous(),
            q.stride(2), q.stride(1), k.stride(2), k.stride(1), v.stride(2), v.stride(1),
            *keys.stride()[:3], *values.stride()[:3], SIZE=keys.shape[1], HEADS=heads, KV_HEADS=kv_heads,
            HALF=dim // 2, PAD=pad, TILE=tile, VALUE_DIM=value_dim, VALUE_PAD=value_pad, VALUE_TILE=value_tile,
            **launch_options(dependent),
        )  # fmt: skip
    return q_out.transpose(0, 1)[None]


def _check_pool(keys: Tensor, values: Tensor, k: Tensor, v: Tensor, kv_index: Tensor) -> None:
    check_write(keys, values, k, v, kv_index)
    if keys.shape[:3] != values.shape[:3] or any(each.stride(-1) != 1 for each in (keys, values, k, v)):
        raise ValueError("keys and values have the same blocks and heads, and heads are contiguous")


@triton.jit(do_not_specialize=["count"])
def _norm(
    x: tl.tensor, other: tl.tensor, weight: tl.tensor, total: tl.tensor, y: tl.tensor, count: tl.tensor,
    x_row: tl.tensor, other_row: tl.tensor, eps: tl.tensor,
    PLUS_ONE: tl.constexpr, WIDTH: tl.constexpr, PAD: tl.constexpr, TILE: tl.constexpr, DEPENDENT: tl.constexpr,
) -> None:  # fmt: skip
    """`rms_norm` of TILE rows of x [count, WIDTH]; PAD is a power of two, no less than WIDTH.

    With `other`, of x + other, which is written to `total`.
    """
    if DEPENDENT:
        gdc_launch_dependents()
    row = (tl.program_id(0) * TILE + tl.arange(0, TILE)).to(tl.int64)
    d = tl.arange(0, PAD)
    inside = (row < count)[:, None] & (d < WIDTH)[None, :]
    w = tl.load(weight + d, mask=d < WIDTH, other=0.0).to(tl.float32)[None, :]
    if DEPENDENT:
        gdc_wait()
    wide = tl.load(x + (row * x_row)[:, None] + d[None, :], mask=inside, other=0.0).to(tl.float32)
    if other is not None:
        added = tl.load(other + (row * other_row)[:, None] + d[None, :], mask=inside, other=0.0).to(tl.float32)
        rounded = (wide + added).to(total.dtype.element_ty)
        tl.store(total + (row * WIDTH)[:, None] + d[None, :], rounded, mask=inside)
        wide = rounded.to(tl.float32)
    n = wide * tl.rsqrt(tl.sum(wide * wide, 1) / WIDTH + eps)[:, None]
    n = n * (1.0 + w) if PLUS_ONE else n.to(x.dtype.element_ty).to(tl.float32) * w
    tl.store(y + (row * WIDTH)[:, None] + d[None, :], n.to(y.dtype.element_ty), mask=inside)


@triton.jit
def gate_values(g: tl.tensor, u: tl.tensor, SILU: tl.constexpr) -> tl.tensor:
    """activation(g) * u in their dtype; the activation in float32, then rounded to it."""
    wide = g.to(tl.float32)
    power = wide if SILU else GELU * (wide + 0.044715 * wide * wide * wide)
    active = (wide / (1.0 + tl.exp(-power))).to(g.dtype)  # (1 + tanh z) / 2 is the logistic function of 2 z
    return (active.to(tl.float32) * u.to(tl.float32)).to(g.dtype)


@triton.jit
def _gated(
    gate: tl.tensor, up: tl.tensor, y: tl.tensor, gate_row: tl.tensor, up_row: tl.tensor,
    SILU: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, DEPENDENT: tl.constexpr,
) -> None:  # fmt: skip
    """`gated_activation` of TILE numbers (axis 1) of one row (axis 0)."""
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = d < WIDTH
    g = tl.load(gate + row * gate_row + d, mask=inside, other=0.0)
    u = tl.load(up + row * up_row + d, mask=inside, other=0.0)
    tl.store(y + row * WIDTH + d, gate_values(g, u, SILU), mask=inside)


@triton.jit
def _rope(
    q: tl.tensor, k: tl.tensor, q_out: tl.tensor, k_out: tl.tensor, cos: tl.tensor, sin: tl.tensor,
    q_token: tl.tensor, q_head: tl.tensor, k_token: tl.tensor, k_head: tl.tensor,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr, PAD: tl.constexpr, TILE: tl.constexpr,
    DEPENDENT: tl.constexpr,
) -> None:  # fmt: skip
    """`rope` of TILE heads (axis 1: first q's, then k's) of one token (axis 0)."""
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    tile, q_tiles, token = tl.program_id(1), tl.cdiv(HEADS, TILE), tl.program_id(0).to(tl.int64)
    if tile < q_tiles:
        _rotate(q, q_out + token * (HEADS * 2 * HALF), cos, sin, q_token, q_head, 2 * HALF, tile,
                HEADS, HALF, PAD, TILE)  # fmt: skip
    else:
        _rotate(k, k_out + token * (KV_HEADS * 2 * HALF), cos, sin, k_token, k_head, 2 * HALF, tile - q_tiles,
                KV_HEADS, HALF, PAD, TILE)  # fmt: skip


@triton.jit
def _rope_and_write(
    q: tl.tensor, k: tl.tensor, v: tl.tensor, q_out: tl.tensor, keys: tl.tensor, values: tl.tensor,
    cos: tl.tensor, sin: tl.tensor, kv_index: tl.tensor,
    q_token: tl.tensor, q_head: tl.tensor, k_token: tl.tensor, k_head: tl.tensor, v_token: tl.tensor, v_head: tl.tensor,
    key_block: tl.tensor, key_token: tl.tensor, key_head: tl.tensor,
    value_block: tl.tensor, value_token: tl.tensor, value_head: tl.tensor,
    SIZE: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr, PAD: tl.constexpr,
    TILE: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_PAD: tl.constexpr, VALUE_TILE: tl.constexpr,
    DEPENDENT: tl.constexpr,
) -> None:  # fmt: skip
    """`rope_and_write_kv` of some heads (axis 1: q's, k's, then v's) of one token (axis 0)."""
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    tile, token = tl.program_id(1), tl.program_id(0).to(tl.int64)
    q_tiles, k_tiles = tl.cdiv(HEADS, TILE), tl.cdiv(KV_HEADS, TILE)
    if tile < q_tiles:
        _rotate(q, q_out + token * (HEADS * 2 * HALF), cos, sin, q_token, q_head, 2 * HALF, tile,
                HEADS, HALF, PAD, TILE)  # fmt: skip
    else:
        index = tl.load(kv_index + token)
        if tile < q_tiles + k_tiles:
            _rotate(k, keys + index // SIZE * key_block + index % SIZE * key_token, cos, sin, k_token, k_head, key_head,
                    tile - q_tiles, KV_HEADS, HALF, PAD, TILE)  # fmt: skip
        else:
            _copy(v, v_token, v_head, values + index // SIZE * value_block + index % SIZE * value_token, value_head,
                    tile - q_tiles - k_tiles, KV_HEADS, VALUE_DIM, VALUE_PAD, VALUE_TILE)  # fmt: skip


@triton.jit
def _rotate(
    x: tl.tensor, y: tl.tensor, cos: tl.tensor, sin: tl.tensor, x_token: tl.tensor, x_head: tl.tensor,
    y_head: tl.tensor, tile: tl.tensor,
    HEADS: tl.constexpr, HALF: tl.constexpr, PAD: tl.constexpr, TILE: tl.constexpr,
) -> None:  # fmt: skip
    """Rotate the halves a and b of a token's heads: (a, b) -> (a cos - b sin, b cos' + a sin'); y is the token's."""
    token = tl.program_id(0).to(tl.int64)
    head = tile * TILE + tl.arange(0, TILE)
    d = tl.arange(0, PAD)
    half = d < HALF
    inside = (head < HEADS)[:, None] & half[None, :]
    place = x + token * x_token + (head * x_head)[:, None] + d[None, :]
    a = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(place + HALF, mask=inside, other=0.0).to(tl.float32)
    turn = token * (2 * HALF) + d
    cos_a = tl.load(cos + turn, mask=half, other=0.0).to(tl.float32)[None, :]
    cos_b = tl.load(cos + turn + HALF, mask=half, other=0.0).to(tl.float32)[None, :]
    sin_a = tl.load(sin + turn, mask=half, other=0.0).to(tl.float32)[None, :]
    sin_b = tl.load(sin + turn + HALF, mask=half, other=0.0).to(tl.float32)[None, :]
    place = y + (head * y_head)[:, None] + d[None, :]
    tl.store(place, (a * cos_a - b * sin_a).to(y.dtype.element_ty), mask=inside)
    tl.store(place + HALF, (b * cos_b + a * sin_b).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _write(
    keys: tl.tensor, values: tl.tensor, k: tl.tensor, v: tl.tensor, kv_index: tl.tensor,
    key_block: tl.tensor, key_token: tl.tensor, key_head: tl.tensor,
    value_block: tl.tensor, value_token: tl.tensor, value_head: tl.tensor,
    k_token: tl.tensor, k_head: tl.tensor, v_token: tl.tensor, v_head: tl.tensor,
    SIZE: tl.constexpr, HEADS: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, PAD: tl.constexpr,
    TILE: tl.constexpr, DEPENDENT: tl.constexpr,
) -> None:  # fmt: skip
    """`write_kv` of TILE heads (axis 1) of one token (axis 0), its keys or its values (axis 2)."""
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    index = tl.load(kv_index + tl.program_id(0))
    if tl.program_id(2) == 0:
        _copy(k, k_token, k_head, keys + index // SIZE * key_block + index % SIZE * key_token, key_head,
                tl.program_id(1), HEADS, KEY_DIM, PAD, TILE)  # fmt: skip
    else:
        _copy(v, v_token, v_head, values + index // SIZE * value_block + index % SIZE * value_token, value_head,
                tl.program_id(1), HEADS, VALUE_DIM, PAD, TILE)  # fmt: skip


@triton.jit
def _copy(
    x: tl.tensor, x_token: tl.tensor, x_head: tl.tensor, y: tl.tensor, y_head: tl.tensor, tile: tl.tensor,
    HEADS: tl.constexpr, DIM: tl.constexpr, PAD: tl.constexpr, TILE: tl.constexpr,
) -> None:  # fmt: skip
    """Copy a token's heads from x to y, which is the token's."""
    head = tile * TILE + tl.arange(0, TILE)
    d = tl.arange(0, PAD)
    inside = (head < HEADS)[:, None] & (d < DIM)[None, :]
    row = tl.load(x + tl.program_id(0).to(tl.int64) * x_token + (head * x_head)[:, None] + d[None, :], mask=inside)
    tl.store(y + (head * y_head)[:, None] + d[None, :], row, mask=inside)
