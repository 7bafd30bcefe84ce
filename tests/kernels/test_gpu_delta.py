"""Low-rank deltas of the GPU backend, in Triton's interpreter, equal the reference, with a CUDA graph's bounds too."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import interpreter  # noqa: F401  (before the kernels)
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import CPU, DTYPES, MIXED, DeltaCase, assert_near, composed_cases, experts_delta, segments_of

from lora_serve.kernels.contract import Delta, DeltaGroup, Segments
from lora_serve.kernels.gpu.delta import DeltaLaunch, delta, launch_of
from lora_serve.kernels.gpu.plan_table import DeltaPlan, DeltaProblem, PlanTable
from lora_serve.kernels.reference import ReferenceKernels

reference = ReferenceKernels()
few = settings(max_examples=8, deadline=None)

CASE = dataclasses.replace(MIXED, segments=[*MIXED.segments[:3], (0, 0, 0, 0.0)])
LONG = dataclasses.replace(CASE, tokens=200, segments=[(3, 190, 3, 1.0), (191, 200, 1, 1.0)])


@pytest.fixture(autouse=True)
def ignore_nan_warnings() -> Iterator[None]:
    """NumPy warns of NaN, which these tests use on purpose."""
    import numpy as np

    with np.errstate(invalid="ignore"):
        yield


def run(case: DeltaCase, group: DeltaGroup, segments: Segments | None = None) -> list[torch.Tensor]:
    x, outputs = case.rows()
    delta(x, outputs, group, segments or case.bounded())
    return outputs


@few
@given(composed_cases())
def test_it_equals_the_reference(case: DeltaCase) -> None:
    group = case.group()
    x, wanted = case.rows()
    reference.delta(x, wanted, group, case.bounded())
    for module, (got, want) in enumerate(zip(run(case, group), wanted, strict=True)):
        assert_near(got, want, f"module {module}")


def test_deltas_of_all_experts_are_added_by_one_call() -> None:
    group, x, segments, wanted = experts_delta()
    y = torch.zeros(wanted.shape)
    delta(x, [y], group, segments)
    assert_near(y, wanted)


@pytest.mark.parametrize("dtype", DTYPES.elements)
@pytest.mark.parametrize("weights", DTYPES.elements)
def test_rows_and_weights_may_have_different_dtypes(dtype: torch.dtype, weights: torch.dtype) -> None:
    case = dataclasses.replace(CASE, dtype=dtype, weights=weights)
    group = case.group()
    x, wanted = case.rows()
    reference.delta(x, wanted, group, case.bounded())
    for got, want in zip(run(case, group), wanted, strict=True):
        assert_near(got, want)


@few
@given(composed_cases())
def test_rows_outside_all_segments_keep_every_bit(case: DeltaCase) -> None:
    x, outputs = case.rows()
    covered = {row for start, end, _, _ in case.segments for row in range(start, end)}
    outside = [row for row in range(case.tokens) if row not in covered]
    x[outside] = float("nan")
    for output in outputs:
        output[outside] = float("nan")
    before = [output.clone() for output in outputs]
    delta(x, outputs, case.group(), case.bounded())
    for got, was in zip(outputs, before, strict=True):
        assert torch.equal(got[outside].view(torch.uint8), was[outside].view(torch.uint8))
        assert not got[sorted(covered)].isnan().any()


def test_modules_without_a_delta_in_the_slot_keep_every_bit() -> None:
    before = CASE.rows()[1]
    got = run(CASE, CASE.group(), segments_of([(1, 4, 2, 0.5)], rank=5))
    assert torch.equal(got[1], before[1])
    assert not torch.equal(got[0], before[0])


def test_a_composition_is_the_weighted_sum_of_its_adapters_rounded_once() -> None:
    case = dataclasses.replace(LONG, segments=[(2, 90, 1, 0.7), (2, 90, 3, 0.3), (2, 90, 2, -1.0), (90, 200, 1, 1.0)])
    group = case.group()
    x, base = case.rows()
    for module, got in enumerate(run(case, group)):
        wanted = base[module].double()
        for slot, weight in ((1, 0.7), (3, 0.3), (2, -1.0)):
            each = group.deltas[module][slot]
            if each is not None:
                wanted[2:90] += weight * (x[2:90].double() @ each.a.double().T @ each.b.double())
        rounding = (got[2:90].double() - wanted[2:90]).abs()
        assert (rounding <= wanted[2:90].abs() * 2**-8 + 2e-4).all()


@pytest.mark.parametrize("rows", [17, 64, 65, 187])
def test_long_segments_are_cut_into_tiles(rows: int) -> None:
    case = dataclasses.replace(LONG, segments=[(3, 3 + rows, 3, 1.0), (191, 200, 1, 1.0)])
    group = case.group()
    x, wanted = case.rows()
    reference.delta(x, wanted, group, case.bounded())
    for got, want in zip(run(case, group), wanted, strict=True):
        assert_near(got, want)


def test_many_short_segments_and_a_long_one_in_one_batch() -> None:
    runs = [(0, 40, 1, 1.0), *((row, row + 1, row % 3 + 1, 1.0) for row in range(40, 70)), (0, 0, 0, 0.0)]
    case = dataclasses.replace(CASE, tokens=71, segments=runs)
    group = case.group()
    x, wanted = case.rows()
    reference.delta(x, wanted, group, case.bounded())
    for got, want in zip(run(case, group), wanted, strict=True):
        assert_near(got, want)


def test_a_group_may_have_more_modules_than_one_launch_takes() -> None:
    case = dataclasses.replace(
        CASE, out_features=(40, 1, 150, 16, 7, 130), ranks=[[r, 3, 8] for r in (4, 0, 9, 1, 20, 2)]
    )
    group = case.group()
    x, wanted = case.rows()
    reference.delta(x, wanted, group, case.bounded())
    for got, want in zip(run(case, group), wanted, strict=True):
        assert_near(got, want)


def test_outputs_may_be_columns_of_one_tensor_and_tables_rows_of_others() -> None:
    a, b, rank = (torch.zeros(2, 9, dtype=dtype)[:, :4] for dtype in (torch.int64, torch.int64, torch.int32))
    group = DeltaGroup(96, (160, 33), 4, torch.bfloat16, CPU, (a, b, rank))
    for module, deltas in enumerate(CASE.group().deltas):
        for slot, each in enumerate(deltas):
            group.set(module, slot, each)
    x, wanted = CASE.rows()
    whole = torch.cat(wanted, 1)
    delta(x, list(whole.split([160, 33], dim=1)), group, CASE.bounded())
    assert torch.equal(whole, torch.cat(run(CASE, CASE.group()), 1))


def test_two_runs_give_the_same_bits() -> None:
    for case in (CASE, LONG):
        assert all(map(torch.equal, run(case, case.group()), run(case, case.group())))


def test_slots_can_change_while_the_grid_of_a_graph_stays() -> None:
    group = CASE.group()
    segments = dataclasses.replace(segments_of([(0, 30, 1, 1.0), (0, 0, 0, 0.0)]), max_rows=40, max_rank=200)
    first = run(CASE, group, segments)
    group.set(0, 1, None)
    group.set(1, 1, group.deltas[1][3])
    x, wanted = CASE.rows()
    reference.delta(x, wanted, group, segments)
    got = run(CASE, group, segments)
    assert torch.equal(got[0], wanted[0])
    assert_near(got[1], wanted[1])
    assert not torch.equal(got[1], first[1])
    torch.manual_seed(9)
    higher = Delta(torch.randn(190, 96).bfloat16() / 10, torch.randn(190, 160).bfloat16() / 14)
    group.set(0, 1, higher)
    x, wanted = CASE.rows()
    reference.delta(x, wanted, group, segments)
    assert_near(run(CASE, group, segments)[0], wanted[0])


def test_an_adapter_with_nan_affects_only_its_own_rows() -> None:
    group = CASE.group()
    wanted = run(CASE, group)
    broken = group.deltas[0][2]
    assert broken is not None
    broken.a.fill_(float("nan"))
    got = run(CASE, group)
    others = [*range(1), *range(4, 30)]
    assert got[0][1:4].isnan().all()
    assert torch.equal(got[0][others], wanted[0][others])
    assert torch.equal(got[1], wanted[1])


@pytest.mark.parametrize("runs", [[], [(0, 0, 0, 0.0), (0, 0, 0, 0.0)]])
def test_no_segments_or_empty_ones_leave_the_outputs_unchanged(runs: list[tuple[int, int, int, float]]) -> None:
    got = run(CASE, CASE.group(), segments_of(runs, rank=16))
    assert all(map(torch.equal, got, CASE.rows()[1]))


def test_shapes_and_types_that_do_not_fit_are_refused() -> None:
    group, segments = CASE.group(), CASE.bounded()
    x, outputs = CASE.rows()
    with pytest.raises(ValueError, match="does not fit the group"):
        delta(x[:, :-1], outputs, group, segments)
    with pytest.raises(ValueError, match="does not fit the group"):
        delta(x, outputs[:1], group, segments)
    with pytest.raises(ValueError, match="does not fit 30 rows of 33"):
        delta(x, [outputs[0], outputs[1][:20]], group, segments)
    with pytest.raises(ValueError, match="does not fit 30 rows of 160"):
        delta(x, [output.float() for output in outputs], group, segments)
    with pytest.raises(TypeError, match="float64"):
        delta(x.double(), [output.double() for output in outputs], group, segments)
    with pytest.raises(TypeError, match="int32"):
        delta(x, outputs, group, dataclasses.replace(segments, slot=segments.slot.long()))


PLANS = st.builds(
    DeltaPlan,
    splits=st.sampled_from([1, 2, 4, 16]),
    block_m=st.sampled_from([16, 64]),
    block_k=st.sampled_from([16, 64, 512]),
    block_n=st.sampled_from([16, 128, 1024]),
    block_r=st.sampled_from([16, 64]),
    shrink_warps=st.just(4),
    expand_warps=st.just(8),
    launch=st.sampled_from(["in_turn", "beside", "dependent"]),
)


class SamePlan(dict[DeltaProblem, DeltaPlan]):
    """One plan for every problem."""

    def __init__(self, plan: DeltaPlan) -> None:
        self.plan = plan

    def get(self, problem: DeltaProblem, default: DeltaPlan | None = None) -> DeltaPlan:  # type: ignore[override]
        return self.plan


def table_of(plan: DeltaPlan) -> PlanTable:
    table = PlanTable()
    table.delta = SamePlan(plan)
    return table


@settings(max_examples=15, deadline=None)
@given(composed_cases(), PLANS, st.sampled_from([0, 1000]))
def test_every_plan_gives_the_same_result(case: DeltaCase, plan: DeltaPlan, spare: int) -> None:
    case = dataclasses.replace(case, dtype=torch.bfloat16, weights=torch.bfloat16)
    group, table = case.group(), table_of(plan)
    segments = case.bounded()
    segments = dataclasses.replace(segments, max_rows=segments.max_rows + spare, max_rank=segments.max_rank + spare)
    x, got = case.rows()
    wanted, again = ([output.clone() for output in got] for _ in range(2))
    reference.delta(x, wanted, group, segments)
    delta(x, got, group, segments, table)
    delta(x, again, group, segments, table)
    for mine, twice, right in zip(got, again, wanted, strict=True):
        assert_near(mine, right)
        assert torch.equal(mine, twice)


def bounds(count: int, longest: int) -> Segments:
    one = torch.zeros(count, dtype=torch.int32)
    return Segments(one, one, one, one.float(), longest, 16)


def llama_launch(rows: int, outs: tuple[int, ...], wide: int, count: int, longest: int) -> DeltaLaunch:
    """What the rule launches on an H100 for a group of an 8B base."""
    group = DeltaGroup(wide, outs, 2, torch.bfloat16, CPU)
    return launch_of(rows, group, bounds(count, longest), torch.bfloat16, processors=132)


QKV, GATE_UP, DOWN = ((4096, 1024, 1024), 4096), ((14336, 14336), 4096), ((4096,), 14336)


def test_the_rule_chooses_what_was_fastest_on_an_h200() -> None:
    """Splits and columns of a program that were tried there one by one, for groups of an 8B base."""

    def chosen(rows: int, group: tuple[tuple[int, ...], int], count: int, longest: int) -> tuple[int, int, int]:
        launch = llama_launch(rows, *group, count, longest)
        return launch.splits, launch.plan.block_n, launch.plan.expand_warps

    assert chosen(1, GATE_UP, 1, 1) == (16, 128, 4)
    assert chosen(1, DOWN, 1, 1) == (16, 128, 4)
    assert chosen(32, GATE_UP, 32, 1) == (4, 512, 4)
    assert chosen(32, DOWN, 32, 1) == (8, 512, 4)
    assert chosen(32, QKV, 32, 1) == (4, 512, 4)
    assert chosen(2048, GATE_UP, 1, 2048) == (2, 128, 4)
    assert chosen(512, GATE_UP, 1, 512) == (4, 128, 4)
    assert chosen(2048, DOWN, 1, 2048) == (4, 128, 4)
    assert chosen(8192, QKV, 2, 8000) == (2, 128, 4)


def test_a_measured_plan_is_used_for_its_problem_and_type_alone() -> None:
    plan = DeltaPlan(8, 16, 64, 64, 16, 4, 4, "in_turn")
    table = PlanTable()
    table.delta[DeltaProblem(96, (160, 33), 32, False)] = plan
    group = CASE.group()

    def used(rows: int, longest: int, dtype: torch.dtype = torch.bfloat16) -> bool:
        return launch_of(rows, group, bounds(4, longest), dtype, 132, table).plan is plan

    assert used(32, 16)
    assert used(17, 1)
    assert not any([used(33, 16), used(16, 16), used(32, 17), used(32, 16, torch.float32)])
