"""Low-rank deltas of the reference and the native CPU backend."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from kernel_cases import CPU, MIXED, DeltaCase, assert_near, delta_cases, segments_of

from lora_serve.kernels.contract import DeltaGroup
from lora_serve.kernels.cpu.backend import NativeKernels
from lora_serve.kernels.reference import ReferenceKernels

reference = ReferenceKernels()
many = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@settings(max_examples=40, deadline=None)
@given(delta_cases())
def test_the_reference_computes_the_contracts_formula(case: DeltaCase) -> None:
    case = dataclasses.replace(case, dtype=torch.float32)
    group = case.group()
    x, outputs = case.rows()
    wanted = [output.double() for output in outputs]
    for start, end, slot, weight in case.segments:
        for module, deltas in enumerate(group.deltas):
            delta = deltas[slot]
            if delta is not None:
                for row in range(start, end):
                    wanted[module][row] += weight * (x[row].double() @ delta.a.double().T) @ delta.b.double()
    reference.delta(x, outputs, group, segments_of(case.segments))
    for got, want in zip(outputs, wanted, strict=True):
        assert_near(got, want.float())


@many
@given(delta_cases())
def test_native_equals_the_reference(native: NativeKernels, case: DeltaCase) -> None:
    group, segments = case.group(), segments_of(case.segments)
    x, outputs = case.rows()
    _, wanted = case.rows()
    native.delta(x, outputs, group, segments)
    reference.delta(x, wanted, group, segments)
    for module, (got, want) in enumerate(zip(outputs, wanted, strict=True)):
        assert_near(got, want, f"module {module}")


@many
@given(delta_cases())
def test_rows_outside_all_segments_keep_every_bit(native: NativeKernels, case: DeltaCase) -> None:
    x, outputs = case.rows()
    before = [output.clone() for output in outputs]
    covered = {row for start, end, _, _ in case.segments for row in range(start, end)}
    outside = [row for row in range(case.tokens) if row not in covered]
    x[outside] = float("nan")
    native.delta(x, outputs, case.group(), segments_of(case.segments))
    for got, was in zip(outputs, before, strict=True):
        assert torch.equal(got[outside], was[outside])


@pytest.mark.parametrize("in_features", [96, 2501])
@pytest.mark.parametrize("rows", [*range(1, 10), 17])
def test_a_rows_bits_do_not_depend_on_how_many_share_its_segment(
    native: NativeKernels, rows: int, in_features: int
) -> None:
    case = dataclasses.replace(MIXED, in_features=in_features)
    group = case.group()
    x, outputs = case.rows()
    _, alone = case.rows()
    native.delta(x, outputs, group, segments_of([(0, rows, 3, 0.7)]))
    for row in range(rows):
        native.delta(x, alone, group, segments_of([(row, row + 1, 3, 0.7)]))
    assert all(torch.equal(a, b) for a, b in zip(outputs, alone, strict=True))


def test_bits_do_not_depend_on_the_number_of_threads(native: NativeKernels) -> None:
    big = dataclasses.replace(MIXED, in_features=500, out_features=(700, 90), tokens=100, segments=[(0, 100, 3, 1.0)])
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        x, outputs = big.rows()
        native.delta(x, outputs, big.group(), segments_of(big.segments))
        results.append(outputs)
    for outputs in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(outputs, results[0], strict=True))


def test_a_composition_is_the_weighted_sum_of_its_adapters(native: NativeKernels) -> None:
    case = dataclasses.replace(MIXED, dtype=torch.float32, weights=torch.float32)
    group = case.group()
    x, both = case.rows()
    _, base = case.rows()
    native.delta(x, both, group, segments_of([(2, 9, 1, 0.7), (2, 9, 3, 0.3)]))
    for module, (got, was) in enumerate(zip(both, base, strict=True)):
        wanted = was.clone()
        for slot, weight in ((1, 0.7), (3, 0.3)):
            delta = group.deltas[module][slot]
            assert delta is not None
            wanted[2:9] += weight * (x[2:9] @ delta.a.T @ delta.b)
        assert_near(got, wanted)


def test_a_slot_can_be_pointed_at_another_delta_between_calls(native: NativeKernels) -> None:
    group = MIXED.group()
    x, outputs = MIXED.rows()
    segments = segments_of([(0, 30, 1, 1.0)])
    native.delta(x, outputs, group, segments)
    group.set(0, 1, None)
    group.set(1, 1, group.deltas[1][3])
    _, got = MIXED.rows()
    _, wanted = MIXED.rows()
    native.delta(x, got, group, segments)
    reference.delta(x, wanted, group, segments)
    assert torch.equal(got[0], wanted[0])
    assert_near(got[1], wanted[1])
    assert not torch.equal(got[1], outputs[1])


def test_an_adapter_with_nan_affects_only_its_own_rows(native: NativeKernels) -> None:
    group = MIXED.group()
    x, wanted = MIXED.rows()
    native.delta(x, wanted, group, segments_of(MIXED.segments))
    broken = group.deltas[0][2]
    assert broken is not None
    broken.a.fill_(float("nan"))
    _, got = MIXED.rows()
    native.delta(x, got, group, segments_of(MIXED.segments))
    others = [*range(1), *range(4, 30)]
    assert got[0][1:4].isnan().all()
    assert torch.equal(got[0][others], wanted[0][others])
    assert torch.equal(got[1], wanted[1])


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_no_segments_leave_the_outputs_unchanged(native: NativeKernels, backend: str) -> None:
    kernels = native if backend == "native" else reference
    x, outputs = MIXED.rows()
    before = [output.clone() for output in outputs]
    kernels.delta(x, outputs, MIXED.group(), segments_of([]))
    assert all(torch.equal(a, b) for a, b in zip(outputs, before, strict=True))


@pytest.mark.parametrize("run", [(0, 31, 1, 1.0), (-1, 3, 1, 1.0), (5, 3, 1, 1.0), (0, 3, 4, 1.0), (0, 3, -1, 1.0)])
def test_segments_outside_the_batch_or_the_slots_write_nothing(
    native: NativeKernels, run: tuple[int, int, int, float]
) -> None:
    x, outputs = MIXED.rows()
    before = [output.clone() for output in outputs]
    with pytest.raises(ValueError, match="segment 1"):
        native.delta(x, outputs, MIXED.group(), segments_of([(0, 2, 1, 1.0), run]))
    assert all(torch.equal(a, b) for a, b in zip(outputs, before, strict=True))


def test_shapes_and_types_that_do_not_fit_are_refused(native: NativeKernels) -> None:
    group, segments = MIXED.group(), segments_of(MIXED.segments)
    x, outputs = MIXED.rows()
    with pytest.raises(ValueError, match="does not fit the group"):
        native.delta(x[:, :-1], outputs, group, segments)
    with pytest.raises(ValueError, match="does not fit the group"):
        native.delta(x, outputs[:1], group, segments)
    with pytest.raises(ValueError, match="does not fit 30 rows of 33"):
        native.delta(x, [outputs[0], outputs[1][:20]], group, segments)
    with pytest.raises(ValueError, match="does not fit 30 rows of 160"):
        native.delta(x, [output.float() for output in outputs], group, segments)
    with pytest.raises(TypeError, match="float64"):
        native.delta(x.double(), [output.double() for output in outputs], group, segments)
    with pytest.raises(TypeError, match="float64"):
        native.delta(x, outputs, DeltaGroup(96, (160, 33), 4, torch.float64, CPU), segments)
    with pytest.raises(TypeError, match="int32"):
        native.delta(x, outputs, group, dataclasses.replace(segments, end=segments.end.long()))
    for part in ("end", "slot", "weight"):
        fewer = dataclasses.replace(segments, **{part: getattr(segments, part)[:-1]})
        with pytest.raises(ValueError, match="a segment has"):
            native.delta(x, outputs, group, fewer)
