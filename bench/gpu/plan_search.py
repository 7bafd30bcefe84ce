"""Search for the fastest launch plan of a problem: one field after the other, each plan checked before it is timed.

A plan is timed only if its results are the reference's, and as a CUDA graph, as in a step: what a launch costs the host
does not count.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, TypeVar

import msgspec
import torch
import triton
from torch import Tensor

from bench.gpu.tuning_problems import (
    DTYPE,
    TOLERANCE,
    AttentionCase,
    DeltaCase,
    MatmulCase,
    delta_cases,
    groups,
    relative_error,
)
from bench.shapes import SHAPES
from lora_serve.kernels.contract import DeltaGroup
from lora_serve.kernels.gpu import matmul
from lora_serve.kernels.gpu.attention import decode_by_rule, forget_plans, prefill_by_rule
from lora_serve.kernels.gpu.backend import GpuKernels
from lora_serve.kernels.gpu.delta import plan_by_rule
from lora_serve.kernels.gpu.device import hopper, processors
from lora_serve.kernels.gpu.plan_table import (
    DecodeAttentionPlan,
    DeltaPlan,
    MatmulPlan,
    PlanTable,
    PrefillAttentionPlan,
)
from lora_serve.kernels.packed_weight import RUN, Scheme
from lora_serve.kernels.select import refuse_scheme

GAIN = 0.99  # a plan is better if it takes less than this share of the time
REPEATS = 5
SCHEMES: tuple[Scheme, ...] = ("int8", "int4", "fp8")
Plan = TypeVar("Plan", DeltaPlan, MatmulPlan, DecodeAttentionPlan, PrefillAttentionPlan)
Axes = Mapping[str, Sequence[Any]]
Cases = Sequence[DeltaCase] | Sequence[MatmulCase] | Sequence[AttentionCase]
Run = Callable[[], list[list[Tensor]]]  # layers' outputs

DECODE_AXES: Axes = {
    "splits": (1, 2, 4, 8, 16),
    "block_n": (128, 256, 512, 1024),
    "launch": ("beside", "in_turn", "dependent"),
    "gated": (True, False),
    "expand_warps": (4, 8),
    "block_k": (256, 512),
}
PREFILL_AXES: Axes = {
    "block_n": (64, 128, 256),
    "splits": (1, 2, 4),
    "block_m": (64, 128),
    "expand_warps": (4, 8),
    "launch": ("in_turn", "beside", "dependent"),
    "block_r": (16, 32),
    "block_k": (64, 128),
    "shrink_warps": (4, 8),
}
MATMUL_AXES: Axes = {
    "block_n": (32, 64, 128, 256),
    "splits": (1, 2, 4, 8),
    "stages": (3, 4, 6),
    "warps": (4, 8),
    "block_m": (16, 32, 64, 128),
}


DECODE_ATTENTION_AXES: Axes = {
    "programs": (1, 2, 4, 8),
    "tokens": (32, 64, 128),
    "warps": (2, 4, 8),
    "stages": (2, 3, 4, 5),
    "least_part": (64, 128, 256),
}
PREFILL_ATTENTION_AXES: Axes = {"rows": (64, 128), "tokens": (32, 64, 128), "warps": (4, 8), "stages": (2, 3, 4, 5)}


class PlanFails(Exception):
    """A plan that does not compile, cannot be captured, or gives other results."""


class GraphTimer:
    """Seconds of a call that is replayed as a CUDA graph, whose results must be those of the call itself."""

    def __init__(self, kernels: GpuKernels, device: str, budget: float = 0.003) -> None:
        self._kernels, self._budget = kernels, budget
        self._first = self._record(lambda: [[torch.zeros(1, device=device)]])  # while it lives, graphs share memory

    def __call__(self, run: Run) -> float:
        wanted = run()
        recording, got = self._record(run)
        count = max(3, min(50, round(self._budget / self._seconds(recording.replay, 2))))
        found = statistics.median(self._seconds(recording.replay, count) for _ in range(REPEATS))
        for mine, right in zip(chain(*got), chain(*wanted), strict=True):
            error = relative_error(mine, right)
            if not error <= TOLERANCE:
                raise PlanFails(f"in a graph, its results differ by {error:.2g}")
        return found

    def _record(self, run: Run) -> tuple[Any, list[list[Tensor]]]:
        recording = self._kernels.new_recording(check_values=False)
        got: list[list[Tensor]] = recording.record(run)  # type: ignore[arg-type,assignment]
        if recording.unsupported is not None:
            raise PlanFails(recording.unsupported)
        return recording, got

    @staticmethod
    def _seconds(replay: Callable[[], None], count: int) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(count):
            replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / count


@dataclass
class Tuned:
    """A problem's seconds per call: of the base's product alone, with the plan by rule, and with the best plan."""

    what: str
    base: float
    before: float
    after: float
    plan: DeltaPlan | MatmulPlan | DecodeAttentionPlan | PrefillAttentionPlan
    tried: int


@dataclass
class Tuner:
    """Searches plans; `timer` gives a call's seconds.

    Attributes:
        table: what `kernels` launches by; a plan is tried by putting it there.
        deadline: after it, no further plan is tried.
        failures: plans that failed, with the reason.
    """

    kernels: GpuKernels
    table: PlanTable
    timer: Callable[[Run], float]
    deadline: float
    cache: int
    device: str
    dependent: bool
    found: list[Tuned] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    pointwise: Mapping[str, float] = field(default_factory=dict)

    @property
    def over(self) -> bool:
        return time.monotonic() > self.deadline

    def tune_delta(self, model: str, decode: Sequence[int], prefill: Sequence[int]) -> None:
        """All groups of a model, at numbers of rows of decode and of prefill steps."""
        for long, sizes, axes in ((False, decode, DECODE_AXES), (True, prefill, PREFILL_AXES)):
            for rows in sizes:
                for group in groups(model):
                    if self.over:
                        return
                    each = delta_cases(self.kernels, group, rows, long=long, cache=self.cache, device=self.device)
                    cases = list(each)
                    start = self._delta_rule(cases[0])
                    what = f"{model} {group.name}, {rows} rows{' of a prompt' if long else ''}"
                    base = self.timer(cases[0].base) / cases[0].calls
                    self._search(what, base, cases, self.table.delta, start, axes)

    def tune_matmul(self, model: str, sizes: Sequence[int]) -> None:
        """All groups of a model with quantised weights."""
        for rows in sizes:
            for scheme in SCHEMES:
                if refuse_scheme(scheme, torch.device(self.device)):
                    continue
                for group in groups(model):
                    if self.over:
                        return
                    case = MatmulCase(self.kernels, group, rows, scheme, cache=self.cache, device=self.device)
                    start = _matmul_rule(case, scheme, processors(torch.device(self.device)))
                    what = f"{model} {group.name}, {rows} rows, {scheme}"
                    self._search(what, float("nan"), [case], self.table.matmul, start, MATMUL_AXES)

    def tune_attention(self, model: str, decode: Sequence[int], prompts: Sequence[int]) -> None:
        """Sequences that decode, by their number, and prompts, by their tokens."""
        device, given = torch.device(self.device), {"cache": self.cache, "device": self.device}
        shape = SHAPES[model]
        width = max(16, triton.next_power_of_2(shape.head_dim))
        for rows in decode:
            if self.over:
                return
            case = AttentionCase(self.kernels, model, rows, 1, **given)
            start = decode_by_rule(width, DTYPE.itemsize)
            what = f"{model} attention, {rows} sequences that decode"
            self._search(what, float("nan"), [case], self.table.decode_attention, start, DECODE_ATTENTION_AXES)
        for tokens in prompts:
            if self.over:
                return
            case = AttentionCase(self.kernels, model, 1, tokens, **given)
            first = prefill_by_rule(width, DTYPE.itemsize, hopper(device))
            what = f"{model} attention, prompt of {tokens}"
            self._search(what, float("nan"), [case], self.table.prefill_attention, first, PREFILL_ATTENTION_AXES)

    def tune_pointwise(self, model: str, sizes: Sequence[int]) -> None:
        """Whether norms and gated activations between products are faster as dependent launches."""
        times = {False: 0.0, True: 0.0}
        for dependent in times if self.dependent else ():
            kernels = GpuKernels(_pointwise_table(dependent))
            for rows in sizes:
                times[dependent] += self.timer(_layers_of(kernels, model, rows, self.device))
        self.pointwise = {"in turn": times[False], "dependent": times[True]}
        self.table.dependent_pointwise = self.dependent and times[True] < GAIN * times[False]

    def _delta_rule(self, case: DeltaCase) -> DeltaPlan:
        segments = case.segments
        group = DeltaGroup(case.problem.in_features, case.problem.out_features, 1, DTYPE, torch.device(self.device))
        return plan_by_rule(case.rows, group, segments, DTYPE, processors(torch.device(self.device)))

    def _search(
        self,
        what: str,
        base: float,
        cases: Cases,
        plans: dict[Any, Any],
        start: Plan,
        axes: Axes,
    ) -> None:
        """Put the best plan of a problem into `plans`."""
        problem, tried = cases[0].problem, {}

        def cost(plan: Plan) -> float:
            if plan not in tried:
                plans[problem] = plan
                forget_plans()
                tried[plan] = self._cost(cases, f"{what}: {plan}")
            return tried[plan]

        best, before = start, cost(start)
        for name, values in axes.items():
            for value in values:
                candidate = _changed(best, name, value)
                if candidate is None or (value == "dependent" and not self.dependent) or self.over:
                    continue
                if name == "gated" and not getattr(cases[0], "gated", False):
                    continue
                if cost(candidate) < GAIN * cost(best):
                    best = candidate
        plans[problem] = best
        forget_plans()
        if cost(best) == float("inf"):
            del plans[problem]
        else:
            self.found.append(Tuned(what, base, before, cost(best), best, len(tried)))

    def _cost(self, cases: Cases, what: str) -> float:
        """Seconds per call, the mean over the cases; infinite for a plan that fails."""
        try:
            for case in cases:
                error = case.error()
                if not error <= TOLERANCE:
                    raise PlanFails(f"its results differ from the reference's by {error:.2g}")
            return statistics.mean(self.timer(case.run) / case.calls for case in cases)
        except (PlanFails, RuntimeError, triton.TritonError) as error:
            self.failures[what] = str(error).strip().partition("\n")[0]
            return float("inf")


def _changed(plan: Plan, name: str, value: object) -> Plan | None:
    """The plan with another value of a field; None if it cannot be."""
    try:
        return msgspec.structs.replace(plan, **{name: value})
    except ValueError:
        return None


def _matmul_rule(case: MatmulCase, scheme: Scheme, processors: int) -> MatmulPlan:
    problem = case.problem
    wide, runs = RUN // 2 if scheme == "int4" else RUN, triton.cdiv(problem.in_features, RUN)
    p = matmul.tiling(case.rows, problem.out_features, runs, wide, processors)
    return MatmulPlan(p.splits, p.block_m, p.block_n, p.warps, p.stages)


def _pointwise_table(dependent: bool) -> PlanTable:
    table = PlanTable()
    table.dependent_pointwise = dependent
    return table


def _layers_of(kernels: GpuKernels, model: str, rows: int, device: str) -> Run:
    """A layer's products and what lies between them but attention, of random weights."""
    shape = SHAPES[model]
    sizes = [(shape.hidden, shape.hidden), (2 * shape.intermediate, shape.hidden), (shape.hidden, shape.intermediate)]
    weights = [(torch.randn(size, device=device) / size[1] ** 0.5).to(DTYPE) for size in sizes]
    o, both, down = (kernels.pack([weight])[0] for weight in weights)
    scale = torch.ones(shape.hidden, dtype=DTYPE, device=device)
    x = torch.randn(rows, shape.hidden, device=device).to(DTYPE)

    def run() -> list[list[Tensor]]:
        residual, y = x, x
        for _ in range(4):
            (attended,) = kernels.linear(y, [(o, None)])
            residual, y = kernels.add_rms_norm(residual, attended, scale, 1e-6, plus_one=False)
            gate, up = kernels.linear(y, [(both, None)])[0].chunk(2, 1)
            (out,) = kernels.linear(kernels.gated_activation(gate, up, "silu"), [(down, None)])
            residual, y = kernels.add_rms_norm(residual, out, scale, 1e-6, plus_one=False)
        return [[residual]]

    return run
