"""The search for launch plans, in Triton's interpreter: with a timer that invents times, on a tiny model."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path

import kernels.interpreter  # noqa: F401  (before the kernels)
import pytest
import torch
from memory_recording import MemoryRecording
from torch import Tensor

from bench.gpu import plan_search, tune, tuning_problems
from bench.gpu.command import NO_GPU
from bench.gpu.plan_search import GraphTimer, PlanFails, Run, Tuner
from bench.gpu.tuning_problems import DeltaCase, Group, delta_cases, groups
from lora_serve.kernels.contract import Activation, DeltaGroup, Layers, Segments
from lora_serve.kernels.gpu import plan_table
from lora_serve.kernels.gpu.backend import GpuKernels
from lora_serve.kernels.gpu.plan_table import (
    AttentionProblem,
    DecodeAttentionPlan,
    DeltaPlan,
    MatmulPlan,
    PlanTable,
    PrefillAttentionPlan,
)

MODEL = "tiny"
AnyPlan = DeltaPlan | MatmulPlan | DecodeAttentionPlan | PrefillAttentionPlan
GROUPS = [Group(MODEL, "gate+up", 32, (48, 48))]


@pytest.fixture(autouse=True)
def one_small_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter is slow."""
    monkeypatch.setattr(plan_search, "groups", lambda model: GROUPS)


@pytest.fixture
def small_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning_problems, "CONTEXT", 40)
    monkeypatch.setattr(tuning_problems, "LONGEST", 64)
    monkeypatch.setattr(
        plan_search, "DECODE_ATTENTION_AXES", {"programs": (1, 4), "tokens": (32, 64, 128), "warps": (2, 4, 8)}
    )
    monkeypatch.setattr(plan_search, "PREFILL_ATTENTION_AXES", {"tokens": (16, 32, 64), "warps": (4, 8)})


class InventedTimer:
    """Seconds of a call by the plan that is in force, after running it."""

    def __init__(self, plans: PlanTable, seconds: Callable[[AnyPlan | None], float]) -> None:
        self._plans, self._seconds = plans, seconds

    def __call__(self, run: Run) -> float:
        run()
        plans: list[AnyPlan] = [*self._plans.delta.values(), *self._plans.matmul.values()]
        plans += [*self._plans.decode_attention.values(), *self._plans.prefill_attention.values()]
        return self._seconds(plans[-1] if plans else None)


def tuner(
    seconds: Callable[[AnyPlan | None], float],
    backend: type[GpuKernels] = GpuKernels,
    *,
    deadline: float = math.inf,
    dependent: bool = True,
) -> Tuner:
    plans = PlanTable()
    return Tuner(
        backend(plans), plans, InventedTimer(plans, seconds), deadline, cache=1, device="cpu", dependent=dependent
    )


def narrow(plan: AnyPlan | None) -> float:
    """Fastest with 256 outputs, in two splits, dependent; attention with 32 tokens and two warps or more."""
    if plan is None:
        return 1.0
    if isinstance(plan, DecodeAttentionPlan | PrefillAttentionPlan):
        return 1.0 + abs(math.log2(plan.tokens / 32)) + plan.warps / 16
    slow = abs(math.log2(plan.block_n / 256)) + abs(math.log2(plan.splits / 2))
    return 1 + slow + (isinstance(plan, DeltaPlan) and plan.launch != "dependent")


@pytest.mark.parametrize("dependent", [True, False])
def test_the_fastest_value_of_each_field_is_found(dependent: bool) -> None:
    search = tuner(narrow, dependent=dependent)
    search.tune_delta(MODEL, decode=[2], prefill=[20])
    assert len(search.found) == 2
    for each in search.found:
        assert isinstance(each.plan, DeltaPlan)
        assert (each.plan.block_n, each.plan.splits) == (256, 2)
        assert (each.plan.launch == "dependent") == dependent
        assert each.after <= each.before
    assert [*search.table.delta.values()] == [each.plan for each in search.found]
    assert not search.failures


def test_attention_is_tuned_for_sequences_that_decode_and_for_prompts(small_attention: None) -> None:
    search = tuner(narrow)
    search.tune_attention(MODEL, decode=[3], prompts=[20])
    ((problem, decoding),) = search.table.decode_attention.items()
    ((other, prompts),) = search.table.prefill_attention.items()
    assert (problem, other) == (AttentionProblem(2, 2, 32, 32, 2, 4), AttentionProblem(2, 2, 32, 32, 2, 32))
    assert (decoding.tokens, decoding.warps, prompts.tokens, prompts.warps) == (32, 2, 32, 4)
    assert [each.tried for each in search.found] == [6, 4]  # one field after the other
    assert not search.failures


def test_quantised_layers_are_tuned_too() -> None:
    search = tuner(narrow)
    search.tune_matmul(MODEL, [3])
    assert {(plan.block_n, plan.splits) for plan in search.table.matmul.values()} == {(256, 2)}
    assert {problem.scheme for problem in search.table.matmul} == {"int8", "int4"}


class WrongInSplits(GpuKernels):
    """A backend whose plans of two splits, the fastest ones, give other results."""

    def adapted_gated_linear(
        self,
        x: Tensor,
        layers: Layers,
        group: DeltaGroup,
        segments: Segments,
        activation: Activation,
    ) -> Tensor:
        y = super().adapted_gated_linear(x, layers, group, segments, activation)
        wrong = any(plan.splits == 2 for plan in [*self._plans.delta.values()][-1:])
        return 1.1 * y if wrong else y


def test_a_plan_with_other_results_is_never_chosen() -> None:
    search = tuner(narrow, WrongInSplits)
    search.tune_delta(MODEL, decode=[2], prefill=[])
    assert search.found
    assert all(each.plan.splits != 2 for each in search.found)
    assert any("splits=2" in what and "differ" in reason for what, reason in search.failures.items())


def test_a_plan_that_fails_is_reported_and_never_chosen() -> None:
    def seconds(plan: AnyPlan | None) -> float:
        if isinstance(plan, DeltaPlan) and plan.block_n == 256:
            raise PlanFails("out of shared memory")
        return narrow(plan)

    search = tuner(seconds)
    search.tune_delta(MODEL, decode=[2], prefill=[])
    assert all(each.plan.block_n in (128, 512) for each in search.found)
    assert set(search.failures.values()) == {"out of shared memory"}


def test_after_the_deadline_nothing_is_tried_and_what_was_found_is_written(tmp_path: Path) -> None:
    search = tuner(narrow, deadline=time.monotonic() - 1)
    path = tune.tune(search, [MODEL], lambda: tune.file_of(search.table, "NVIDIA H100", (9, 0)), tmp_path)
    assert not search.found
    assert plan_table.read(path).delta == ()


def test_what_was_found_is_what_the_card_gets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_attention: None
) -> None:
    for sizes in ("DECODE_ROWS", "QUANTIZED_ROWS", "ATTENTION_ROWS"):
        monkeypatch.setattr(tune, sizes, (2,))
    monkeypatch.setattr(tune, "PREFILL_ROWS", (20,))
    search = tuner(narrow)
    tune.tune(search, [MODEL], lambda: tune.file_of(search.table, "NVIDIA H100", (9, 0)), tmp_path)
    got = plan_table.find("NVIDIA H100", (9, 0), tmp_path)
    assert got.delta == search.table.delta
    assert got.matmul == search.table.matmul
    assert got.decode_attention == search.table.decode_attention
    assert got.prefill_attention == search.table.prefill_attention
    assert len(got.delta) == 2
    text = tune.report(search)
    assert "tiny gate+up, 20 rows of a prompt" in text
    assert "layers with pointwise kernels dependent" in text


def test_a_decode_problem_has_a_graphs_bounds_and_every_mix() -> None:
    cases: list[DeltaCase] = list(
        delta_cases(GpuKernels(PlanTable()), GROUPS[0], 20, long=False, cache=1, device="cpu")
    )
    one, distinct, mixed = (case.segments for case in cases)
    assert [each.count for each in (one, distinct, mixed)] == [20] * 3
    assert (one.max_rows, one.max_rank) == (16, 1024)
    assert (one.end - one.start).tolist() == [16, 4] + [0] * 18
    assert (distinct.end - distinct.start).tolist() == [1] * 20
    assert len({case.problem for case in cases}) == 1
    assert all(case.error() < 0.02 for case in cases)
    assert torch.equal(mixed.slot, distinct.slot)


class FakeEvent:
    """An event of a device whose clock goes on by a millisecond at each."""

    clock = 0

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        FakeEvent.clock += 1
        self.at = FakeEvent.clock

    def elapsed_time(self, later: FakeEvent) -> float:
        return later.at - self.at

    def synchronize(self) -> None:
        """It is over at once."""


class KernelsInMemory(GpuKernels):
    """The backend with `MemoryRecording` in place of CUDA graphs."""

    unsupported: str | None = None

    def new_recording(self, *, check_values: bool) -> MemoryRecording:  # type: ignore[override]
        made = MemoryRecording()
        made.unsupported = self.unsupported
        return made


def test_a_call_is_timed_as_a_graph_that_must_give_its_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    kernels = KernelsInMemory(PlanTable())
    timer = GraphTimer(kernels, "cpu")
    x = torch.ones(2)
    assert timer(lambda: [[2 * x]]) == pytest.approx(1e-3 / 6)  # so many replays fit its budget of 3 ms
    values = iter(range(1, 100))
    with pytest.raises(PlanFails, match="in a graph, its results differ"):
        timer(lambda: [[next(values) * x]])
    kernels.unsupported = "operation not permitted"
    with pytest.raises(PlanFails, match="not permitted"):
        timer(lambda: [[x]])


def test_the_groups_of_a_model_are_those_of_a_layer() -> None:
    found = groups("llama-3.1-8b")
    assert [each.name for each in found] == ["qkv", "o", "gate+up", "down"]
    assert (found[0].in_features, found[0].out_features) == (4096, (4096, 1024, 1024))
    assert (found[3].in_features, found[3].out_features) == (14336, (4096,))


def test_without_a_gpu_nothing_is_tuned(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit) as status:
        tune.main([])
    assert status.value.code == NO_GPU
    assert "sees no GPU" in capsys.readouterr().err
