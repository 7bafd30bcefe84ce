"""Every kernel on a GPU at the sizes of real models equals the reference."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from gpu_device import DEVICE, ON_GPU, gpu_only, here, sized
from kernels.kernel_cases import AttentionCase, assert_near, zeros_like
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lora_serve.kernels.contract import Activation, AttentionMetadata, Delta, DeltaGroup, Kernels, Rotation, Segments
from lora_serve.kernels.gpu.backend import GpuKernels
from lora_serve.kernels.gpu.cuda_graph import CapturedGraph
from lora_serve.kernels.gpu.plan_table import DeltaPlan, DeltaProblem, Launch, PlanTable
from lora_serve.kernels.packed_weight import Scheme
from lora_serve.kernels.reference import ReferenceKernels
from lora_serve.kernels.select import refuse_scheme

pytestmark = here
REFERENCE = ReferenceKernels()
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


@pytest.fixture(scope="module")
def kernels() -> GpuKernels:
    return GpuKernels()


def draw(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, device=DEVICE) * scale).to(dtype)


def int32(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


# --- delta -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Deltas:
    """A group of modules, and segments as (rows, rank); rows of rank 0 are the base's."""

    in_features: int
    out_features: tuple[int, ...]
    segments: tuple[tuple[int, int], ...]

    @property
    def rows(self) -> int:
        return sum(rows for rows, _ in self.segments)

    def group(self, dtype: torch.dtype) -> DeltaGroup:
        group = DeltaGroup(self.in_features, self.out_features, len(self.segments) + 1, dtype, DEVICE)
        for module, out in enumerate(self.out_features):
            for slot, (_, rank) in enumerate(self.segments, 1):
                if rank:
                    group.set(module, slot, self.delta(rank, out, dtype))
        return group

    def delta(self, rank: int, out: int, dtype: torch.dtype) -> Delta:
        a = draw(rank, self.in_features, dtype=dtype, scale=self.in_features**-0.5)
        return Delta(a, draw(rank, out, dtype=dtype, scale=rank**-0.5))

    def bounds(self) -> Segments:
        starts = [sum(rows for rows, _ in self.segments[:i]) for i in range(len(self.segments))]
        runs = [
            (start, start + rows, slot)
            for slot, (start, (rows, rank)) in enumerate(zip(starts, self.segments, strict=True), 1)
            if rank
        ]
        start, end, slot = (int32(list(each)) for each in zip(*runs, strict=True))
        weight = torch.linspace(0.5, 1.5, len(runs), device=DEVICE)
        longest = max(last - first for first, last, _ in runs)
        return Segments(start, end, slot, weight, longest, max(rank for _, rank in self.segments))


MIXED = (8, 16, 32, 64, 128)
QKV, GATE_UP, DOWN = (4096, (4096, 1024, 1024)), (4096, (14336, 14336)), (14336, (4096,))
DELTAS = sized(
    [
        pytest.param(Deltas(*QKV, ((1, 16),)), id="qkv, one row"),
        pytest.param(Deltas(*QKV, ((1, 16),) * 32), id="qkv, 32 rows all distinct"),
        pytest.param(Deltas(*QKV, ((16, 16),) * 16), id="qkv, 16 segments of 16"),
        pytest.param(Deltas(*GATE_UP, tuple((1, rank) for rank in MIXED) * 6), id="gate and up, mixed ranks"),
        pytest.param(Deltas(*DOWN, ((1, 64), (1, 0), (3, 128), (200, 0), (1, 8))), id="down, beside the base"),
        pytest.param(Deltas(*DOWN, ((2048, 16),)), id="down, a prompt"),
        pytest.param(Deltas(*QKV, ((700, 128), (1, 8), (33, 32), (290, 64))), id="qkv, prompts beside a token"),
    ],
    [
        pytest.param(Deltas(96, (64, 32), tuple((1, rank) for rank in MIXED)), id="mixed ranks"),
        pytest.param(Deltas(96, (64,), ((40, 16), (2, 0), (1, 8))), id="a prompt"),
    ],
)


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize("case", DELTAS)
def test_deltas_equal_the_reference(kernels: GpuKernels, case: Deltas, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    group, segments = case.group(dtype), case.bounds()
    x = draw(case.rows, case.in_features, dtype=dtype)
    base = [draw(case.rows, out, dtype=dtype) for out in case.out_features]
    got, again, wanted = ([output.clone() for output in base] for _ in range(3))
    kernels.delta(x, got, group, segments)
    kernels.delta(x, again, group, segments)
    REFERENCE.delta(x, wanted, group, segments)
    for mine, twice, right in zip(got, again, wanted, strict=True):
        assert_near(mine, right)
        assert torch.equal(mine, twice)


TRAINED = sized(
    [
        pytest.param(Deltas(*QKV, ((700, 16), (60, 64), (1, 8), (290, 128))), id="qkv, four adapters"),
        pytest.param(Deltas(*DOWN, ((2048, 16),)), id="down, one adapter"),
    ],
    [pytest.param(Deltas(96, (64, 32), ((40, 16), (2, 0), (1, 8))), id="two modules")],
)


@pytest.mark.parametrize("weights", [FP32, BF16])
@pytest.mark.parametrize("case", TRAINED)
def test_gradients_of_deltas_equal_the_reference(kernels: GpuKernels, case: Deltas, weights: torch.dtype) -> None:
    torch.manual_seed(0)
    group, segments = case.group(weights), case.bounds()
    x, before = (draw(case.rows, case.in_features, dtype=BF16) for _ in range(2))
    grads = [draw(case.rows, out, dtype=BF16) for out in case.out_features]
    found = []
    for each in (kernels, kernels, REFERENCE):
        gradients, dx = zeros_like(group), before.clone()
        each.delta_backward(x, grads, dx, group, segments, gradients)
        own = [delta for slots in gradients.deltas for delta in slots if delta is not None]
        found.append([dx, *(matrix for delta in own for matrix in (delta.a, delta.b))])
    for mine, twice, right in zip(*found, strict=True):
        assert_near(mine, right)
        assert torch.equal(mine, twice)


@gpu_only
def test_a_replayed_graph_reads_what_slots_point_at_now(kernels: GpuKernels) -> None:
    torch.manual_seed(0)
    case = Deltas(*QKV, ((1, 16),) * 8)
    group, segments = case.group(BF16), replace(case.bounds(), max_rows=16, max_rank=1024)
    x = draw(8, case.in_features, dtype=BF16)
    outputs = [torch.zeros(8, out, dtype=BF16, device=DEVICE) for out in case.out_features]

    def run() -> Tensor:
        for output in outputs:
            output.zero_()
        kernels.delta(x, outputs, group, segments)
        return outputs[0]

    graph = CapturedGraph(torch.cuda.graph_pool_handle(), torch.cuda.Stream())
    graph.record(run)
    assert graph.unsupported is None
    for ranks in ([16] * 8, [8, 128, 64, 0, 32, 16, 200, 8], [0] * 7 + [64]):
        for module, out in enumerate(case.out_features):
            for slot, rank in enumerate(ranks, 1):
                group.set(module, slot, case.delta(rank, out, BF16) if rank else None)
        x.copy_(draw(8, case.in_features, dtype=BF16))
        graph.replay()
        wanted = [torch.zeros_like(output) for output in outputs]
        REFERENCE.delta(x, wanted, group, segments)
        for got, right in zip(outputs, wanted, strict=True):
            assert_near(got, right)


class EveryProblem(dict[DeltaProblem, DeltaPlan]):
    """One plan for every problem."""

    def __init__(self, plan: DeltaPlan) -> None:
        self._plan = plan

    def get(self, problem: DeltaProblem, default: DeltaPlan | None = None) -> DeltaPlan:  # type: ignore[override]
        return self._plan


def launching(launch: Launch, block_n: int) -> PlanTable:
    """Plans with this launch for every problem, and for pointwise kernels if it is dependent."""
    table = PlanTable()
    table.delta = EveryProblem(DeltaPlan(4, 16, 256, block_n, 16, 4, 4, launch))
    table.dependent_pointwise = launch == "dependent"
    return table


LAUNCHES: list[Launch] = ["in_turn", "beside", "dependent"]


@gpu_only
@pytest.mark.parametrize("block_n", [128, 512])
@pytest.mark.parametrize("launch", LAUNCHES)
def test_layers_with_deltas_in_a_graph_equal_the_reference(launch: Launch, block_n: int) -> None:
    """A few layers one after the other, so that each kernel's launch meets those of its neighbours."""
    if launch == "dependent" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("no older GPU has dependent launches")
    torch.manual_seed(0)
    kernels = GpuKernels(launching(launch, block_n))
    case = Deltas(1024, (1024, 1024), ((1, 16), (1, 64), (3, 8), (1, 0), (16, 16)))
    group, segments = case.group(BF16), replace(case.bounds(), max_rows=16, max_rank=1024)
    weights = [draw(out, 1024, dtype=BF16, scale=1024**-0.5) for out in case.out_features]
    layers = [(packed, None) for packed in kernels.pack(weights)]
    scale = draw(1024, dtype=BF16)
    x = draw(case.rows, 1024, dtype=BF16)

    def forward(own: Kernels) -> Tensor:
        y = own.rms_norm(x, scale, 1e-5, plus_one=False)
        for _ in range(4):
            gate, up = own.adapted_linear(y, layers, group, segments)
            y = own.add_rms_norm(x, own.gated_activation(gate, up, "silu"), scale, 1e-5, plus_one=False)[1]
        return y

    recording = kernels.new_recording(check_values=True)
    result = torch.empty_like(x)
    recording.record(lambda: result.copy_(forward(kernels)))
    assert recording.unsupported is None
    for _ in range(20):
        x.copy_(draw(case.rows, 1024, dtype=BF16))
        recording.replay()
        eager = forward(kernels)
        assert_near(result, eager)
    wanted = forward(REFERENCE)
    assert (result.float() - wanted.float()).norm() < 0.05 * wanted.float().norm()  # four layers' roundings


# --- attention ---------------------------------------------------------------------------------------------------

DECODING = [(1, 4096), (1, 1), (0, 1), (1, 517), (1, 16)]
PREFILLING = [(512, 4096), (1, 700), (300, 300), (0, 1), (2, 17)]
LLAMA = AttentionCase(7, BF16, 8, 4, 128, 128, 16, DECODING, None, None, False)
ATTENTION = sized(
    [
        pytest.param(replace(LLAMA, sequences=[(1, 512)] * 32), id="decode 32"),
        pytest.param(LLAMA, id="decode"),
        pytest.param(replace(LLAMA, sequences=PREFILLING), id="prefill"),
        pytest.param(replace(LLAMA, sequences=PREFILLING, dtype=FP32), id="prefill in fp32"),
        pytest.param(replace(LLAMA, dtype=FP32, window=1000), id="decode in fp32, window"),
        pytest.param(replace(LLAMA, sequences=PREFILLING, dtype=FP16, window=128), id="prefill in fp16, window"),
        pytest.param(replace(LLAMA, dtype=FP16, sinks=True), id="decode in fp16, sinks"),
        pytest.param(
            replace(LLAMA, key_dim=64, value_dim=64, share=8, window=128, sinks=True, sequences=PREFILLING + DECODING),
            id="64 wide, window and sinks",
        ),
        pytest.param(
            replace(LLAMA, key_dim=96, value_dim=96, share=1, kv_heads=32, sequences=PREFILLING + DECODING),
            id="96 wide",
        ),
        pytest.param(
            replace(
                LLAMA, key_dim=256, value_dim=256, kv_heads=4, share=2, softcap=50.0, sequences=PREFILLING + DECODING
            ),
            id="256 wide, softcap",
        ),
        pytest.param(
            replace(LLAMA, key_dim=256, value_dim=256, dtype=FP32, kv_heads=4, softcap=50.0, window=300),
            id="256 in fp32",
        ),
        pytest.param(
            replace(LLAMA, key_dim=192, value_dim=128, kv_heads=16, share=1, sequences=PREFILLING + DECODING),
            id="192 and 128 wide",
        ),
    ],
    [
        pytest.param(replace(LLAMA, kv_heads=2, sequences=[(1, 300), (0, 1), (1, 3)], sinks=True), id="decode"),
        pytest.param(replace(LLAMA, kv_heads=1, sequences=[(20, 60), (1, 9)], window=20, softcap=5.0), id="prefill"),
    ],
)


def on_device(case: AttentionCase) -> tuple[Tensor, Tensor, Tensor, AttentionMetadata, tuple[Any, ...]]:
    q, keys, values, metadata = case.tensors()
    there = AttentionMetadata(
        *(each.to(DEVICE) for each in (metadata.query_start, metadata.context, metadata.block_table)),
        metadata.max_query_len,
        metadata.max_context_len,
    )
    scale, window, softcap, sinks = case.options
    options = (scale, window, softcap, None if sinks is None else sinks.to(DEVICE))
    heads = q.to(DEVICE).transpose(0, 1).contiguous().transpose(0, 1)  # [heads, tokens, dim] in memory
    return heads, keys.to(DEVICE), values.to(DEVICE), there, options


@pytest.mark.parametrize("case", ATTENTION)
def test_attention_equals_the_reference(kernels: GpuKernels, case: AttentionCase) -> None:
    q, keys, values, metadata, options = on_device(case)
    wanted = REFERENCE.attention(q, keys, values, metadata, *options)
    assert_near(kernels.attention(q, keys, values, metadata, *options), wanted)
    loose = replace(metadata, max_context_len=131072)  # as in a graph
    assert_near(kernels.attention(q, keys, values, loose, *options), wanted)


@gpu_only
@pytest.mark.parametrize("sequences", [64, 256])
def test_a_replayed_mixed_step_attends_to_what_its_metadata_says_now(kernels: GpuKernels, sequences: int) -> None:
    """One graph of 768 rows: prompts, chunks and decoding sequences of any number, padding after them."""
    rows, width = 768, 512
    keys, values = (draw(2000, 16, 8, 128, dtype=BF16) for _ in range(2))
    q = draw(rows, 32, 128, dtype=BF16)
    start, context = int32([0] * (sequences + 1)), int32([1] * sequences)
    table = torch.zeros(sequences, width, dtype=torch.int32, device=DEVICE)
    bucket = AttentionMetadata(start, context, table, rows, 16 * width)
    graph = CapturedGraph(torch.cuda.graph_pool_handle(), torch.cuda.Stream())
    out = graph.record(lambda: kernels.attention(q, keys, values, bucket, 128**-0.5))
    assert graph.unsupported is None
    for case in (
        [(1, 900)] * 32 + [(512, 512)],
        [(1, 8000), (700, 1700)],
        [(2, 2)] * 60 + [(1, 1), (1, 17)],
        [(768, 768)],
        [(1, 40)] * 64,
        [(0, 1), (300, 300), (0, 1), (1, 5)],
    ):
        counts, used = [own for own, _ in case], sum(own for own, _ in case)
        begins = [sum(counts[:i]) for i in range(len(counts) + 1)]
        start.copy_(int32(begins + [used] * (sequences - len(case))))
        context.copy_(int32([length for _, length in case] + [1] * (sequences - len(case))))
        table.zero_()
        for i, (_, length) in enumerate(case):
            blocks = -(-length // 16)
            table[i, :blocks] = 1 + torch.randperm(1999, device=DEVICE)[:blocks].int()
        q.copy_(draw(rows, 32, 128, dtype=BF16))
        q[used:] = float("nan")
        keys[0] = values[0] = float("nan")
        graph.replay()
        exact = AttentionMetadata(
            start[: len(case) + 1], context[: len(case)], table[: len(case)], max(counts), max(own for _, own in case)
        )
        assert_near(out[:used], REFERENCE.attention(q[:used], keys, values, exact, 128**-0.5))
        assert not out[used:].any()


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_attention_equals_torchs_attention(kernels: GpuKernels, dtype: torch.dtype) -> None:
    case = replace(LLAMA, dtype=dtype, sequences=sized(PREFILLING, [(5, 20), (1, 30)]))  # type: ignore[arg-type]
    q, keys, values, metadata, _ = on_device(case)
    got = kernels.attention(q, keys, values, metadata, 128**-0.5)
    row = 0
    for i, (rows, context) in enumerate(case.sequences):
        blocks = metadata.block_table[i, : -(-context // case.block_size)].long()
        key, value = (pool[blocks].flatten(0, 1)[:context].transpose(0, 1)[None] for pool in (keys, values))
        seen = torch.ones(rows, context, dtype=torch.bool, device=DEVICE).tril(context - rows)
        own = q[row : row + rows].transpose(0, 1)[None]
        wanted = scaled_dot_product_attention(own, key, value, attn_mask=seen, enable_gqa=True)
        assert_near(got[row : row + rows], wanted[0].transpose(0, 1))
        row += rows


# --- pointwise ----------------------------------------------------------------------------------------------------

TYPES = [FP32, BF16, FP16]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("dim", sized([64, 96, 128, 256], [64]))
def test_rotary_embeddings_and_kv_writes_equal_the_reference(kernels: GpuKernels, dim: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    tokens, heads, kv_heads = sized([300, 32, 8], [5, 4, 2])
    q, k = (draw(1, tokens, n, dim, dtype=dtype).transpose(1, 2) for n in (heads, kv_heads))
    cos, sin = (draw(1, tokens, dim, dtype=dtype) for _ in range(2))
    for got, wanted in zip(kernels.rope(q, k, cos, sin), REFERENCE.rope(q, k, cos, sin), strict=True):
        assert_near(got, wanted)
    pools = [draw(64, 16, kv_heads, dim, dtype=dtype) for _ in range(2)]
    mine, right = ([pool.clone() for pool in pools] for _ in range(2))
    index = torch.randperm(64 * 16, device=DEVICE)[:tokens]
    rows = k[0].transpose(0, 1)
    kernels.write_kv(*mine, rows, -rows, index)
    REFERENCE.write_kv(*right, rows, -rows, index)
    for got, wanted in zip(mine, right, strict=True):
        assert torch.equal(got, wanted)
    queries, rotated = kernels.rope(q, k, cos, sin)
    assert_near(kernels.rope_and_write_kv(Rotation(q, k, cos, sin), -k, *mine, index), queries)
    kernels.write_kv(*right, rotated[0].transpose(0, 1), -rows, index)
    for got, wanted in zip(mine, right, strict=True):
        assert_near(got, wanted)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("rows", "width"), sized([(1, 4096), (33, 14336), (512, 3584)], [(3, 96)]))
def test_norms_and_gated_activations_equal_the_reference(
    kernels: GpuKernels, rows: int, width: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    x, up, weight = (draw(*size, dtype=dtype) for size in ((rows, width), (rows, width), (width,)))
    for plus_one in (False, True):
        got, wanted = (each.rms_norm(x, weight, 1e-5, plus_one=plus_one) for each in (kernels, REFERENCE))
        assert_near(got, wanted)
        total, normed = kernels.add_rms_norm(x, up, weight, 1e-5, plus_one=plus_one)
        assert torch.equal(total, x + up)
        assert torch.equal(normed, kernels.rms_norm(x + up, weight, 1e-5, plus_one=plus_one))
    activations: list[Activation] = ["silu", "gelu_tanh"]
    for activation in activations:
        assert_near(kernels.gated_activation(x, up, activation), REFERENCE.gated_activation(x, up, activation))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("rows", [1, 33])
@pytest.mark.parametrize("biased", [False, True])
def test_layers_packed_together_are_one_product(
    kernels: GpuKernels, rows: int, biased: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    wide, outs = sized([4096, (4096, 1024, 1024)], [64, (64, 32, 32)])  # type: ignore[misc]
    weights = [draw(out, wide, dtype=dtype, scale=wide**-0.5) for out in outs]
    packed = [kernels.pack([weight])[0] for weight in weights]
    biases = [draw(out, dtype=dtype) if biased else None for out in outs]
    x = draw(rows, wide, dtype=dtype)
    wanted = REFERENCE.linear(x, list(zip(packed, biases, strict=True)))
    joined = kernels.pack(weights)
    got = kernels.linear(x, list(zip(joined, biases, strict=True)))
    for mine, right, own, laid in zip(got, wanted, packed, joined, strict=True):
        assert_near(mine, right)
        assert torch.equal(kernels.unpack(laid), kernels.unpack(own))


@gpu_only
def test_a_pass_that_depends_on_values_is_refused_and_later_captures_work() -> None:
    pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
    x = torch.arange(4.0, device=DEVICE)
    branching = CapturedGraph(pool, stream)
    assert torch.equal(branching.record(lambda: x[x > x.mean().item()]), torch.tensor([2.0, 3.0], device=DEVICE))
    assert branching.unsupported is not None
    assert torch.cuda.current_stream() == torch.cuda.default_stream()  # not left on the capture's stream
    torch.cuda.empty_cache()  # the allocator is not left in capture mode
    plain = CapturedGraph(pool, stream)
    doubled = plain.record(lambda: 2 * x)
    assert plain.unsupported is None
    x += 1
    plain.replay()
    assert torch.equal(doubled, 2 * x)


SCHEMES: tuple[Scheme, ...] = ("int8", "int4", "fp8")


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("rows", sized([1, 32, 64, 500], [3]))
def test_quantised_layers(kernels: GpuKernels, rows: int, scheme: Scheme) -> None:
    """Neighbours in memory, one of whose outputs no tile divides, at sizes where inputs are split and are not."""
    if reason := ON_GPU and refuse_scheme(scheme, DEVICE):
        pytest.skip(reason)
    wide, outs = (4096, (1024, 4099)) if ON_GPU else (128, (32, 35))
    weights = [draw(out, wide, dtype=BF16, scale=wide**-0.5) for out in outs]
    biases = [draw(outs[0], dtype=BF16), None]
    x = draw(rows, wide, dtype=BF16)
    got = kernels.linear(x, list(zip(kernels.pack(weights, scheme), biases, strict=True)))
    wanted = REFERENCE.linear(x, list(zip(REFERENCE.pack(weights, scheme), biases, strict=True)))
    for mine, right in zip(got, wanted, strict=True):
        assert_near(mine, right)
