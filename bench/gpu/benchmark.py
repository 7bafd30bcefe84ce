"""GPU benchmark: decode steps beside their roofline, adapter overhead, prefill, load stalls, start-up, training.

    python -m bench.gpu.benchmark --shape llama-3.1-8b --json gpu.json

needs a GPU (exit status 3 without one), no network and no model: weights are random. First forward passes are timed as
the engine's runner calls them, without sampling; then an engine serves the same shape, and adapters are trained on it.
A part that fails or that there is no time for is reported and left out. Prints tables, goals and, last, one line of
JSON.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.gpu import engine, training
from bench.gpu.command import Part, add_sizes, command_parser, describe_gpu, finish, note, require_device, run_parts
from bench.gpu.figures import (
    GOAL_ROWS,
    ITEM,
    Limits,
    Stall,
    adapter_bytes,
    kv_bytes,
    step_table,
    weights_read,
)
from bench.gpu.forward_pass import measure_limits, synchronize, write_config
from bench.gpu.goals import GOALS, STALL, reached, stall_value, step_values
from bench.gpu.operation_pairs import time_operation_pairs
from bench.gpu.steps import RANK, StepFigures, StepSizes, measure_steps
from bench.machine import describe
from bench.png_plots import add_png_option, write_png
from bench.report import Goal, goal_records, goal_table, json_line, number, table
from bench.shapes import SHAPES, Shape
from lora_serve.kernels.select import select


@dataclass(frozen=True)
class Sizes:
    """Sizes of a run. `trained`: tokens of a training sequence; `budget`: seconds for one repeat of a step, about."""

    rows: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256)
    context: int = 512
    prompts: tuple[int, ...] = (512, 2048)
    longest: int = 8192
    trained: int = 512
    budget: float = 0.15
    work: engine.EngineLoad = field(default_factory=engine.EngineLoad)


QUICK = Sizes(
    rows=(1, 4),
    context=32,
    prompts=(64,),
    longest=2048,
    trained=16,
    budget=0.01,
    work=engine.EngineLoad(adapters=3, clients=4, prompt=16, output=8, longest=2048, quiet=0.3, loads=2),
)


@dataclass
class Results:
    """The measurements so far."""

    limits: Limits
    steps: StepFigures = field(default_factory=StepFigures)
    operations: dict[str, dict[str, float]] = field(default_factory=dict)
    engine: dict[str, Any] = field(default_factory=dict)
    training: dict[str, dict[str, float]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    @property
    def stall(self) -> Stall | None:
        return self.engine.get("stall")

    @property
    def prompts(self) -> dict[str, float]:
        """Tokens per second of prompts, by tokens and mix."""
        return {name: int(name.split()[0]) / each for name, each in self.steps.prompts.items()}

    def goals(self, shape: Shape) -> list[Goal]:
        """The goals of what is measured here."""
        values = step_values(self.steps, shape, self.limits)
        if self.stall is not None:
            values[STALL] = stall_value(self.stall)
        return reached(values, [row for row in GOALS if row.part == "steps" or row.name == STALL])


def needed_memory(shape: Shape, rows: int, context: int) -> int:
    """Bytes of the base and of `rows` sequences with an adapter each, plus a tenth and 2 GB for temporary tensors."""
    return round(
        1.1 * (ITEM * weights_read(shape) + kv_bytes(shape, rows * (context + 16)) + rows * adapter_bytes(shape, RANK))
        + 2e9
    )


def largest_fitting(names: Iterable[str], wanted: str, sizes: Sizes, memory: float) -> tuple[str, tuple[int, ...]]:
    """The shape to measure and the batch sizes that fit: the wanted shape if 32 rows fit, else the largest one.

    Raises ValueError if none fits.
    """
    least = max(rows for rows in sizes.rows if rows <= GOAL_ROWS)
    order = sorted(names, key=lambda name: weights_read(SHAPES[name]), reverse=True)
    for name in [wanted, *(name for name in order if weights_read(SHAPES[name]) < weights_read(SHAPES[wanted]))]:
        rows = tuple(rows for rows in sizes.rows if needed_memory(SHAPES[name], rows, sizes.context) <= memory)
        if least in rows:
            return name, rows
    raise ValueError("no shape fits")


def measure_operations(shape: Shape, folder: Path, device: torch.device, sizes: Sizes, found: Results) -> None:
    """Time operations that one kernel runs beside those that it stands for."""
    rows = [each for each in sizes.rows if each in (1, GOAL_ROWS)] + [max(sizes.rows)]
    found.operations = time_operation_pairs(select(device), shape, rows, device, sizes.budget / 10)


def measure_forward_passes(shape: Shape, folder: Path, device: torch.device, sizes: Sizes, found: Results) -> None:
    """Time decode steps by mix and batch size, prompts and mixed steps."""
    chosen = StepSizes(sizes.rows, sizes.rows, sizes.context, sizes.prompts, sizes.longest, sizes.budget)
    measure_steps(shape, folder, device, chosen, found.steps)


def measure_engine(shape: Shape, folder: Path, device: torch.device, sizes: Sizes, found: Results) -> None:
    """Measure start-up, decode steps and load stalls of an engine."""
    with tempfile.TemporaryDirectory() as scratch:
        adapters = engine.make_adapters(shape, Path(scratch, "adapters"), sizes.work.adapters)
        engine.measure(shape, device, sizes.work, folder, adapters, Path(scratch, "store"), found.engine)


def measure_training(shape: Shape, folder: Path, device: torch.device, sizes: Sizes, found: Results) -> None:
    """Measure steps of training."""
    found.training = training.measure_training(shape, folder, device, sizes.trained, sizes.budget)


def measure(shape: Shape, device: torch.device, sizes: Sizes, deadline: float) -> Results:
    """Run all parts; one that fails, or that would start after the deadline, is recorded as a failure."""
    found = Results(measure_limits(device))
    with tempfile.TemporaryDirectory() as scratch:
        folder = write_config(shape, Path(scratch, "model"))
        parts = {
            "operations": measure_operations,
            "steps": measure_forward_passes,
            "engine": measure_engine,
            "training": measure_training,
        }
        calls = {name: Part(partial(part, shape, folder, device, sizes, found)) for name, part in parts.items()}
        found.failures += [f"{name}: {why}" for name, why in run_parts(calls, deadline, device).items()]
    return found


def report(found: Results, shape: Shape) -> str:
    """Tables and goals as text."""
    best = found.limits
    lines = [
        f"memory read {best.read / 1e9:,.0f} GB/s, copy {best.copy / 1e9:,.0f} GB/s, host-to-device "
        f"{best.host_to_device / 1e9:,.1f} GB/s from pinned memory, bf16 {best.flops / 1e12:,.1f} TFLOP/s",
        step_table(found.steps.decode, best),
    ]
    if found.operations:
        rows = [
            [name, *(number(1e6 * each[kind], 1) for kind in ("apart", "fused"))]
            for name, each in found.operations.items()
        ]
        lines.append(table(["all layers", "two kernels µs", "one kernel µs"], rows))
    if found.prompts:
        rows = [[name, number(value, 0)] for name, value in found.prompts.items()]
        lines.append(table(["prefill", "tok/s"], rows))
    if "decode" in found.engine:
        rows = [
            [mix, number(1e3 * each["step"], 2), number(each["tokens per second"], 0)]
            for mix, each in found.engine["decode"].items()
        ]
        lines.append(table(["engine", "decode step ms", "tok/s with prefill"], rows))
    for what, each in found.training.items():
        lines.append(table(["training", what], [[name, number(value, 0)] for name, value in each.items()]))
    startup = found.steps.startup | {f"start: {stage}": each for stage, each in found.engine.get("startup", {}).items()}
    rows = [[name, number(each, 2) if each < 1e5 else f"{each / 1e9:,.2f} GB"] for name, each in startup.items()]
    lines.append(table(["start-up", "seconds or bytes"], rows))
    lines.append(goal_table(found.goals(shape)))
    return "\n\n".join([*lines, *(f"not measured: {failure}" for failure in found.failures)])


def record(found: Results, name: str, sizes: Sizes, device: torch.device) -> dict[str, Any]:
    """All results, for `json_line`."""
    engine = found.engine | (
        {} if found.stall is None else {"stall": asdict(found.stall) | {"ratio": found.stall.ratio}}
    )
    return {
        "bench": "gpu",
        "machine": describe() | describe_gpu(device),
        "shape": name,
        "sizes": asdict(sizes),
        "limits": asdict(found.limits),
        "steps": [asdict(each) | {"ratio": each.ratio(found.limits)} for each in found.steps.decode],
        "operations": found.operations,
        "prompts": found.prompts,
        "mixed": found.steps.mixed,
        "startup": found.steps.startup,
        "engine": engine,
        "training": found.training,
        "goals": goal_records(found.goals(SHAPES[name])),
        "failures": found.failures,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command_parser(__doc__, 330.0)
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.1-8b")
    add_sizes(parser)
    add_png_option(parser)
    args = parser.parse_args(arguments)
    device = require_device("benchmark", args.device)
    sizes = QUICK if args.quick else Sizes()
    memory = 0.9 * torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 8e9
    name, rows = largest_fitting(SHAPES, args.shape, sizes, memory)
    if name != args.shape or rows != sizes.rows:
        note(f"{memory / 1e9:.0f} GB of free memory fit {name} with up to {rows[-1]} rows: measuring that")
        sizes = replace(sizes, rows=rows)
    note(", ".join(f"{key} {value}" for key, value in (describe() | describe_gpu(device)).items()))
    found = measure(SHAPES[name], device, sizes, time.monotonic() + args.seconds)
    synchronize(device)
    line = json_line(record(found, name, sizes, device))
    about = f"{name}, bf16, context {sizes.context}, adapters of rank {RANK} on all linear modules"
    print(about, report(found, SHAPES[name]), "", sep="\n\n")
    finish(line, args.json)
    write_png(line, args.png)
    if found.failures:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
