"""Random inputs for the kernels: hypothesis draws a small description, whose seed gives the numbers."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from hypothesis import strategies as st
from torch import Tensor

from lora_serve.kernels.contract import (
    AttentionMetadata,
    Delta,
    DeltaGroup,
    ExpertsGroup,
    Kernels,
    Segments,
    pointer_tables,
)
from lora_serve.kernels.packed_weight import PackedWeight, Scheme

CPU = torch.device("cpu")
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}  # relative to the largest value


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def assert_near(got: Tensor, wanted: Tensor, what: str = "") -> None:
    """Every element within the dtype's rounding of the largest one."""
    assert got.shape == wanted.shape
    assert got.dtype == wanted.dtype
    largest = wanted.float().abs().max().item() if wanted.numel() else 0.0
    torch.testing.assert_close(
        got.float(),
        wanted.float(),
        rtol=0,
        atol=TOLERANCE[wanted.dtype] * (largest + 1e-3),
        msg=lambda m: f"{what}: {m}",
    )


# --- delta -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DeltaCase:
    """`ranks[module][slot - 1]`, 0 where an adapter has no delta; segments as (start, end, slot, weight)."""

    seed: int
    dtype: torch.dtype
    weights: torch.dtype
    in_features: int
    out_features: tuple[int, ...]
    ranks: list[list[int]]
    tokens: int
    segments: list[tuple[int, int, int, float]]

    def group(self) -> DeltaGroup:
        torch.manual_seed(self.seed)
        group = DeltaGroup(self.in_features, self.out_features, len(self.ranks[0]) + 1, self.weights, CPU)
        for module, (out, ranks) in enumerate(zip(self.out_features, self.ranks, strict=True)):
            for slot, rank in enumerate(ranks, start=1):
                if rank:
                    a = torch.randn(rank, self.in_features) / self.in_features**0.5
                    b = torch.randn(rank, out) / rank**0.5
                    group.set(module, slot, Delta(a.to(self.weights), b.to(self.weights)))
        return group

    def rows(self) -> tuple[Tensor, list[Tensor]]:
        """x and the base's outputs, as slices of wider tensors, like those of fused projections."""
        torch.manual_seed(self.seed + 1)
        x = torch.randn(self.tokens, self.in_features + 3).to(self.dtype)[:, : self.in_features]
        return x, [torch.randn(self.tokens, out + 5).to(self.dtype)[:, :out] for out in self.out_features]

    def bounded(self) -> Segments:
        """The segments with exact bounds: `max_rank` is the largest sum over a composition's members."""
        places = {run[:2] for run in self.segments}
        together = [
            sum(ranks[slot - 1] for start, end, slot, _ in self.segments if (start, end) == place and start < end)
            for ranks in self.ranks
            for place in places
        ]
        return segments_of(self.segments, max(together, default=0))


def segments_of(runs: list[tuple[int, int, int, float]], rank: int = 0) -> Segments:
    """Segments from (start, end, slot, weight), with `rank` as `max_rank`; backends that do not need it get 0."""
    start, end, slot, weight = zip(*runs, strict=True) if runs else ((), (), (), ())
    longest = max((last - first for first, last, _, _ in runs), default=0)
    return Segments(int32(*start), int32(*end), int32(*slot), torch.tensor(weight, dtype=torch.float32), longest, rank)


MIXED = DeltaCase(
    seed=3,
    dtype=torch.bfloat16,
    weights=torch.bfloat16,
    in_features=96,
    out_features=(160, 33),
    ranks=[[16, 5, 128], [16, 0, 8]],
    tokens=30,
    segments=[(0, 1, 1, 1.0), (1, 4, 2, 0.5), (6, 30, 3, 1.0), (8, 9, 1, -1.0)],
)


@st.composite
def delta_cases(draw: st.DrawFn) -> DeltaCase:
    slots = draw(st.integers(1, 4))
    out_features = tuple(draw(st.lists(st.integers(1, 200), min_size=1, max_size=3)))
    rank = st.one_of(st.just(0), st.integers(1, 130))
    tokens = draw(st.integers(1, 40))
    edge = st.integers(0, tokens)
    runs = [
        (min(a, b), max(a, b), slot, weight)
        for a, b, slot, weight in draw(
            st.lists(
                st.tuples(edge, edge, st.integers(1, slots), st.sampled_from([1.0, 0.5, -2.0])), min_size=1, max_size=6
            )
        )
    ]
    return DeltaCase(
        seed=draw(st.integers(0, 1000)),
        dtype=draw(DTYPES),
        weights=draw(DTYPES),
        in_features=draw(st.integers(1, 150)),
        out_features=out_features,
        ranks=[draw(st.lists(rank, min_size=slots, max_size=slots)) for _ in out_features],
        tokens=tokens,
        segments=runs,
    )


@st.composite
def composed_cases(draw: st.DrawFn) -> DeltaCase:
    """Segments as in the contract: compositions are neighbours, others do not overlap; some are empty."""
    case = draw(delta_cases())
    member = st.tuples(st.integers(1, len(case.ranks[0])), st.sampled_from([1.0, 0.5, -2.0]))
    runs: list[tuple[int, int, int, float]] = []
    row = 0
    for _ in range(draw(st.integers(1, 5))):
        start = row + draw(st.sampled_from([0, 0, 1, 3]))
        row = start + draw(st.sampled_from([0, 1, 1, 2, 17, 70]))
        place = (start, row) if start < row else (0, 0)
        runs += [(*place, slot, weight) for slot, weight in draw(st.lists(member, min_size=1, max_size=3))]
    return replace(case, tokens=row + draw(st.integers(1, 3)), segments=runs)


def zeros_like(group: DeltaGroup) -> DeltaGroup:
    """A group for the gradients of another."""
    found = DeltaGroup(group.in_features, group.out_features, group.rank.shape[1], torch.float32, group.a.device)
    for module in range(len(group.out_features)):
        for slot in range(group.rank.shape[1]):
            delta = group.get(module, slot)
            if delta is not None:
                wide = torch.promote_types(delta.a.dtype, torch.float32)
                found.set(
                    module, slot, Delta(torch.zeros_like(delta.a, dtype=wide), torch.zeros_like(delta.b, dtype=wide))
                )
    return found


def disjoint(case: DeltaCase) -> Segments:
    """The case's segments without compositions, which are not trained."""
    runs, last = [], 0
    for run in case.segments:
        if run[0] >= last:
            runs.append(run)
            last = run[1]
    return segments_of(runs, max(max(ranks) for ranks in case.ranks))


def delta_gradients(kernels: Kernels, case: DeltaCase) -> list[Tensor]:
    """What `delta_backward` adds to: dx, then A and B of every module and slot."""
    group = case.group()
    x, grads = case.rows()
    gradients, dx = zeros_like(group), x.clone().contiguous()
    kernels.delta_backward(x, grads, dx, group, disjoint(case), gradients)
    own = [gradients.get(module, slot) for module in range(len(grads)) for slot in range(group.rank.shape[1])]
    return [dx, *(matrix for each in own if each is not None for matrix in (each.a, each.b))]


def experts_delta() -> tuple[ExpertsGroup, Tensor, Segments, Tensor]:
    """Two experts and two adapters, one without a delta for the first expert: group, x, segments, what is added."""
    tables = pointer_tables(2, 3, CPU)
    experts = []
    for expert in range(2):
        a, b, rank = (table[expert : expert + 1] for table in tables)
        experts.append(DeltaGroup(32, (48,), 3, torch.float32, CPU, (a, b, rank)))
    group = ExpertsGroup(experts)
    torch.manual_seed(0)
    deltas = {place: Delta(torch.randn(4, 32), torch.randn(4, 48)) for place in ((0, 1), (1, 1), (1, 2))}
    for (expert, slot), delta in deltas.items():
        experts[expert].set(0, slot, delta)  # after the group was made
    x = torch.randn(6, 32)
    runs = [(0, 1, 0, 1, 1.0), (1, 2, 0, 2, 1.0), (2, 5, 1, 1, 0.5), (2, 5, 1, 2, -1.0), (5, 5, 1, 2, 1.0)]
    wanted = torch.zeros(6, 48)
    for first, last, expert, slot, factor in runs:
        if (expert, slot) in deltas:
            wanted[first:last] += factor * (x[first:last] @ deltas[expert, slot].a.T @ deltas[expert, slot].b)
    slots = [(first, last, expert * group.expert_slots + slot, factor) for first, last, expert, slot, factor in runs]
    return group, x, segments_of(slots, 8), wanted


# --- attention ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AttentionCase:
    """`sequences`: (rows of this step, context including them); 0 rows: a sequence that is not in this step."""

    seed: int
    dtype: torch.dtype
    kv_heads: int
    share: int
    key_dim: int
    value_dim: int
    block_size: int
    sequences: list[tuple[int, int]]
    window: int | None
    softcap: float | None
    sinks: bool

    @property
    def options(self) -> tuple[float, int | None, float | None, Tensor | None]:
        torch.manual_seed(self.seed + 1)
        sinks = torch.randn(self.kv_heads * self.share) if self.sinks else None
        return self.key_dim**-0.5, self.window, self.softcap, sinks

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, AttentionMetadata]:
        """q (a transposed view, as models pass it), keys, values and metadata; blocks in random order."""
        torch.manual_seed(self.seed)
        counts = [-(-context // self.block_size) for _, context in self.sequences]
        blocks = sum(counts) + 1
        keys = torch.randn(blocks, self.block_size, self.kv_heads, self.key_dim).to(self.dtype)
        values = torch.randn(blocks, self.block_size, self.kv_heads, self.value_dim).to(self.dtype)
        order = torch.randperm(blocks).tolist()
        table = torch.zeros(len(counts), max(counts), dtype=torch.int32)
        for i, count in enumerate(counts):
            table[i, :count] = int32(*(order.pop() for _ in range(count)))
        rows = [rows for rows, _ in self.sequences]
        start = int32(*(sum(rows[:i]) for i in range(len(rows) + 1)))
        contexts = [context for _, context in self.sequences]
        metadata = AttentionMetadata(start, int32(*contexts), table, max(rows), max(contexts))
        q = torch.randn(self.kv_heads * self.share, sum(rows), self.key_dim).to(self.dtype).transpose(0, 1)
        return q, keys, values, metadata


@st.composite
def attention_cases(draw: st.DrawFn) -> AttentionCase:
    sequences = []
    for _ in range(draw(st.integers(1, 4))):
        rows = draw(st.sampled_from([0, 1, 1, 1, 2, 7, 40]))
        sequences.append((rows, max(1, rows + draw(st.sampled_from([0, 0, 1, 15, 31, 32, 90])))))
    key_dim = draw(st.sampled_from([8, 24, 64, 80, 128]))
    return AttentionCase(
        seed=draw(st.integers(0, 1000)),
        dtype=draw(DTYPES),
        kv_heads=draw(st.sampled_from([1, 2, 3])),
        share=draw(st.sampled_from([1, 2, 7, 8])),
        key_dim=key_dim,
        value_dim=draw(st.sampled_from([key_dim, 8, 72])),
        block_size=draw(st.sampled_from([1, 3, 16, 64])),
        sequences=sequences,
        window=draw(st.sampled_from([None, None, 1, 5, 33])),
        softcap=draw(st.sampled_from([None, None, 2.0, 30.0])),
        sinks=draw(st.booleans()),
    )


def pack_one(kernels: Kernels, weight: Tensor, scheme: Scheme | None = None) -> PackedWeight:
    """A layer's weights packed by themselves."""
    return kernels.pack([weight], scheme)[0]
