"""Linear layers with deltas on the GPU backend: one result, and in a graph shrink beside the base's product."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import interpreter  # noqa: F401  (before the kernels)
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import MIXED, DeltaCase, assert_near, composed_cases, pack_one, segments_of
from torch import Tensor

from lora_serve.kernels.contract import Activation, Segments
from lora_serve.kernels.gpu import delta as delta_module
from lora_serve.kernels.gpu.backend import GpuKernels
from lora_serve.kernels.gpu.plan_table import NO_PLANS, DeltaPlan, DeltaProblem, Launch, PlanTable
from lora_serve.kernels.gpu.stream_fork import StreamFork
from lora_serve.kernels.packed_weight import PackedWeight
from lora_serve.kernels.reference import ReferenceKernels

# The interpreter's numpy warns where a GPU goes on with infinity: g / (1 + exp(-z)) is 0 then, which is right.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")

REFERENCE = ReferenceKernels()
BF16 = torch.bfloat16
CASE = dataclasses.replace(MIXED, segments=[(0, 1, 1, 1.0), (1, 4, 2, 0.5), (6, 20, 3, 1.0)])
LONG = dataclasses.replace(CASE, tokens=200, segments=[(3, 190, 3, 1.0)])
Layers = list[tuple[PackedWeight, Tensor | None]]


class FakeStream:
    """A stream: what was done before each point of it, by name."""

    def __init__(self, cuda: FakeCuda, name: str) -> None:
        self.cuda, self.name = cuda, name
        self.done: set[str] = set()

    def wait_stream(self, other: FakeStream) -> None:
        self.done |= other.done


class FakeCuda:
    """Stands for `torch.cuda`: knows which work each stream has seen the end of."""

    def __init__(self, capturing: bool = True) -> None:
        self.capturing = capturing
        self.main = self.current = FakeStream(self, "main")
        self.launched: list[tuple[str, str, frozenset[str]]] = []  # stream, work, what is surely done before it

    def Stream(self) -> FakeStream:
        return FakeStream(self, "side")

    def current_stream(self) -> FakeStream:
        return self.current

    def is_current_stream_capturing(self) -> bool:
        return self.capturing

    @contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before

    def launch(self, work: str) -> None:
        self.launched.append((self.current.name, work, frozenset(self.current.done)))
        self.current.done.add(work)


class Watched(GpuKernels):
    """Records on which stream, and after what, each part of `adapted_linear` is launched."""

    def __init__(self, cuda: FakeCuda, plans: PlanTable = NO_PLANS) -> None:
        super().__init__(plans, StreamFork(cuda))
        self.cuda = cuda
        self._fork.prepare()

    def linear(self, x: Tensor, layers: Sequence[tuple[PackedWeight, Tensor | None]]) -> list[Tensor]:
        self.cuda.launch("product")
        return super().linear(x, layers)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    """Records the launches of shrink and expand, and the allocation of what lies between them, too."""
    cuda = FakeCuda()
    call = delta_module.DeltaCall

    class WatchedCall(call):  # type: ignore[misc,valid-type]
        def __init__(self, *args: object) -> None:
            super().__init__(*args)
            cuda.launch("scratch")

        def shrink(self) -> None:
            cuda.launch("shrink")
            super().shrink()

        def expand(self, outputs: Sequence[Tensor]) -> None:
            cuda.launch("expand")
            super().expand(outputs)

        def expand_gated(self, outputs: Sequence[Tensor], activation: Activation) -> Tensor:
            cuda.launch("expand and gate")
            return super().expand_gated(outputs, activation)  # type: ignore[no-any-return]

    monkeypatch.setattr("lora_serve.kernels.gpu.backend.DeltaCall", WatchedCall)
    return cuda


def run(kernels: GpuKernels, case: DeltaCase, segments: Segments | None = None) -> None:
    """Compare with the reference: linear, then delta."""
    torch.manual_seed(1)
    x, _ = case.rows()
    weights = [torch.randn(out, case.in_features).to(case.dtype) / 10 for out in case.out_features]
    segments, group = segments or case.bounded(), case.group()
    got = kernels.adapted_linear(x, [(each, None) for each in kernels.pack(weights)], group, segments)
    plain: Layers = [(pack_one(REFERENCE, weight), None) for weight in weights]
    wanted = REFERENCE.linear(x, plain)
    REFERENCE.delta(x, wanted, group, segments)
    together = REFERENCE.adapted_linear(x, plain, group, segments)
    for mine, right, same in zip(got, wanted, together, strict=True):
        assert_near(mine, right)
        assert torch.equal(right, same)


def test_in_a_graph_shrink_runs_beside_the_product_and_expand_waits_for_both(cuda: FakeCuda) -> None:
    run(Watched(cuda), CASE)
    assert cuda.launched == [
        ("main", "scratch", frozenset()),
        ("side", "shrink", frozenset({"scratch"})),
        ("main", "product", frozenset({"scratch"})),
        ("main", "expand", frozenset({"scratch", "shrink", "product"})),
    ]


@pytest.mark.parametrize(("capturing", "case"), [(False, CASE), (True, LONG)])
def test_eagerly_and_with_long_segments_all_is_on_one_stream(cuda: FakeCuda, capturing: bool, case: DeltaCase) -> None:
    cuda.capturing = capturing
    run(Watched(cuda), case)
    assert [(stream, work) for stream, work, _ in cuda.launched] == [
        ("main", work) for work in ("scratch", "product", "shrink", "expand")
    ]


def test_an_error_in_the_product_still_joins_the_streams() -> None:
    cuda = FakeCuda()
    fork = StreamFork(cuda)
    fork.prepare()
    with pytest.raises(RuntimeError, match="product"), fork.beside(lambda: cuda.launch("shrink")):
        raise RuntimeError("the product failed")
    assert "shrink" in cuda.main.done
    assert cuda.current is cuda.main


def test_without_a_second_stream_there_is_no_fork() -> None:
    assert not StreamFork(FakeCuda()).ready


def test_no_segments_are_the_base_alone(cuda: FakeCuda) -> None:
    run(Watched(cuda), CASE, segments_of([]))
    assert [work for _, work, _ in cuda.launched] == ["product"]


@pytest.mark.parametrize("scheme", ["int8", "int4", "fp8"])
def test_quantised_layers_get_deltas_too(scheme: str) -> None:
    torch.manual_seed(0)
    x, _ = CASE.rows()
    weights = [torch.randn(out, CASE.in_features) / 10 for out in CASE.out_features]
    kernels, group = GpuKernels(NO_PLANS), CASE.group()
    got, wanted = (
        each.adapted_linear(x, [(own, None) for own in each.pack(weights, scheme)], group, CASE.bounded())  # type: ignore[arg-type]
        for each in (kernels, REFERENCE)
    )
    for mine, right in zip(got, wanted, strict=True):
        assert_near(mine, right)


class EveryPlan(dict[DeltaProblem, DeltaPlan]):
    """One plan for every problem."""

    def get(self, problem: DeltaProblem, default: DeltaPlan | None = None) -> DeltaPlan:  # type: ignore[override]
        return self.plan

    def __init__(self, plan: DeltaPlan) -> None:
        self.plan = plan


def gated_table(launch: Launch = "in_turn", *, splits: int = 2, block_n: int = 16, gated: bool = True) -> PlanTable:
    table = PlanTable()
    table.delta = EveryPlan(DeltaPlan(splits, 16, 64, block_n, 16, 4, 4, launch, gated))
    return table


def gated_case(case: DeltaCase) -> DeltaCase:
    """With two projections of one width, in bfloat16."""
    ranks = [case.ranks[0], case.ranks[-1]]
    return dataclasses.replace(case, out_features=(48, 48), ranks=ranks, dtype=BF16, weights=BF16)


@settings(max_examples=10, deadline=None)
@given(
    composed_cases(),
    st.sampled_from(["silu", "gelu_tanh"]),
    st.sampled_from(["in_turn", "dependent"]),
    st.sampled_from([1, 8]),
    st.sampled_from([16, 64]),
)
def test_a_gated_mlps_inner_part_equals_the_reference(
    case: DeltaCase, activation: Activation, launch: Launch, splits: int, block_n: int
) -> None:
    case = gated_case(case)
    torch.manual_seed(1)
    x, _ = case.rows()
    weights = [torch.randn(out, case.in_features).to(BF16) / 10 for out in case.out_features]
    given = (x, [(each, None) for each in REFERENCE.pack(weights)], case.group(), case.bounded(), activation)
    got = GpuKernels(gated_table(launch, splits=splits, block_n=block_n)).adapted_gated_linear(*given)
    assert got.is_contiguous()
    assert_near(got, REFERENCE.adapted_gated_linear(*given))


def test_gated_in_one_kernel_and_in_two_single_rows_have_the_same_bits(cuda: FakeCuda) -> None:
    case = gated_case(dataclasses.replace(CASE, segments=[(0, 1, 1, 1.0), (2, 3, 2, 0.5), (2, 3, 3, 1.0)]))
    x, _ = case.rows()
    weights = [torch.randn(out, case.in_features).to(BF16) / 10 for out in case.out_features]
    results = []
    for gated in (True, False):
        kernels = Watched(cuda, gated_table("beside", gated=gated))
        layers = [(each, None) for each in kernels.pack(weights)]
        results.append(kernels.adapted_gated_linear(x, layers, case.group(), case.bounded(), "silu"))
    assert torch.equal(*results)
    assert [work for _, work, _ in cuda.launched] == [
        *("scratch", "shrink", "product", "expand and gate"),
        *("scratch", "shrink", "product", "expand"),
    ]
    assert cuda.launched[3] == ("main", "expand and gate", frozenset({"scratch", "shrink", "product"}))


def test_an_input_that_does_not_fit_is_refused_before_anything_is_launched(cuda: FakeCuda) -> None:
    kernels, (x, _) = Watched(cuda), CASE.rows()
    with pytest.raises(ValueError, match="does not fit the group"):
        kernels.adapted_linear(x[:, :-1], [], CASE.group(), CASE.bounded())
    assert not cuda.launched
