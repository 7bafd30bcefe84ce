"""A GPU's figures in one run: decode steps beside their floor, taxes of adapters, prompts, load stalls, start-up.

    python -m bench.gpu --shape llama-3.1-8b --json gpu.json

needs a GPU (without one it says so and exits with status 3), no network and no model: weights are random. Decode steps
are made as the engine's runner makes them, on a base that never samples; then an engine serves the same shape. What
fails or finds no time is said and left out. Prints tables, goals and, last, one line of JSON.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from bench import gpu_engine
from bench.gpu_base import Resident, decoding, in_turns, limits, random_adapter, reading, settle, taken, write_config
from bench.gpu_figures import ITEM, LIMIT, Limits, Stall, Step, adapter, floor, kv, laws, seconds, step_table, weights
from bench.laws import law_table
from bench.machine import describe
from bench.report import json_line, number, table
from bench.shapes import SHAPES, Shape

NO_GPU = 3
RANK = 16
MIXED = (8, 16, 32, 64, 128)


@dataclass(frozen=True)
class Plan:
    """Sizes of a run. `budget` is about what one repeat of one step may take, in seconds."""

    rows: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256)
    context: int = 512
    prompts: tuple[int, ...] = (512, 2048)
    longest: int = 8192
    budget: float = 0.15
    work: gpu_engine.Work = field(default_factory=gpu_engine.Work)


QUICK = Plan(
    rows=(1, 4),
    context=32,
    prompts=(64,),
    longest=2048,
    budget=0.01,
    work=gpu_engine.Work(adapters=3, clients=4, prompt=16, output=8, longest=2048, quiet=0.3, loads=2),
)


@dataclass
class Found:
    """What was measured so far."""

    limits: Limits
    steps: list[Step] = field(default_factory=list)
    idle: float = float("nan")
    prompts: dict[str, float] = field(default_factory=dict)
    notes: dict[str, float] = field(default_factory=dict)
    engine: dict[str, Any] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    @property
    def stall(self) -> Stall | None:
        return self.engine.get("stall")


def needed(shape: Shape, rows: int, context: int) -> int:
    """Bytes of the base, of so many sequences with an adapter each, and of a tenth more for all that passes by."""
    return round(1.1 * (ITEM * weights(shape) + kv(shape, rows * (context + 16)) + rows * adapter(shape, RANK)) + 2e9)


def fitting(names: Iterable[str], wanted: str, plan: Plan, memory: float) -> tuple[str, tuple[int, ...]]:
    """The shape to take and the rows that fit: the wanted one if it can decode 32 rows, else the largest that can.

    ValueError if none can.
    """
    least = max(rows for rows in plan.rows if rows <= LIMIT)
    order = sorted(names, key=lambda name: weights(SHAPES[name]), reverse=True)
    for name in [wanted, *(name for name in order if weights(SHAPES[name]) < weights(SHAPES[wanted]))]:
        rows = tuple(rows for rows in plan.rows if needed(SHAPES[name], rows, plan.context) <= memory)
        if least in rows:
            return name, rows
    raise ValueError("no shape fits")


def measure_steps(shape: Shape, folder: Path, device: torch.device, plan: Plan, found: Found) -> None:
    """Decode steps by mix and size, prompts; into `found` as they come."""
    most = max(plan.rows)
    base = Resident(folder, device, rows=most, context=plan.context, slots=most, longest=plan.longest)
    found.notes |= base.notes
    middle = max(rows for rows in plan.rows if rows <= LIMIT)

    def of(slots: Sequence[int]) -> Callable[[], object]:
        return base.step(decoding(slots, plan.context))

    before = in_turns({"none": of([0] * middle)}, device, plan.budget)["none"]
    slots = [base.load_adapter(random_adapter(base.shape, RANK, f"same {index}", device)) for index in range(most)]
    slots.sort()
    for rows in plan.rows:
        mixes = {"none": [0] * rows, "one": slots[:1] * rows, "distinct": slots[:rows]}
        ranks = {"none": 0, "one": 1, "distinct": rows}
        for mix, each in in_turns({mix: of(own) for mix, own in mixes.items()}, device, plan.budget).items():
            found.steps.append(Step(mix, rows, each, floor(shape, rows, plan.context, [RANK] * ranks[mix])))
    found.idle = before / seconds(found.steps, "none", middle)
    for tokens in plan.prompts:
        calls = {f"{tokens} base": base.step(reading(tokens, 0)), f"{tokens} one": base.step(reading(tokens, slots[0]))}
        found.prompts |= {name: tokens / each for name, each in in_turns(calls, device, plan.budget).items()}
    base.clear()
    ranks_of = [MIXED[index % len(MIXED)] for index in range(middle)]
    slots = [base.load_adapter(random_adapter(base.shape, rank, f"{i}", device)) for i, rank in enumerate(ranks_of)]
    mixed = in_turns({"mixed": of(sorted(slots))}, device, plan.budget)["mixed"]
    found.steps.append(Step("ranks 8…128", middle, mixed, floor(shape, middle, plan.context, ranks_of)))


def measure_engine(shape: Shape, folder: Path, device: torch.device, plan: Plan, found: Found) -> None:
    """Start-up, decode steps and load stalls of an engine."""
    with tempfile.TemporaryDirectory() as scratch:
        adapters = gpu_engine.make_adapters(shape, Path(scratch, "adapters"), plan.work.adapters)
        gpu_engine.measure(shape, device, plan.work, folder, adapters, Path(scratch, "store"), found.engine)


def measure(shape: Shape, device: torch.device, plan: Plan, deadline: float) -> Found:
    """All of it; a part that fails, or that would begin after the deadline, is a failure and no more."""
    found = Found(limits(device))
    with tempfile.TemporaryDirectory() as scratch:
        folder = write_config(shape, Path(scratch, "model"))
        for part in (measure_steps, measure_engine):
            _say(f"{part.__name__} begins")
            if time.monotonic() > deadline:
                found.failures.append(f"{part.__name__}: no time was left")
                continue
            try:
                part(shape, folder, device, plan, found)
            except Exception as error:  # what was measured before is kept
                traceback.print_exc()
                found.failures.append(f"{part.__name__}: {type(error).__name__}: {error}")
            taken(device)  # and what it held is given back
    return found


def report(found: Found) -> str:
    """Tables and goals, for people."""
    best = found.limits
    lines = [
        f"reads {best.read / 1e9:,.0f} GB/s, copies {best.copied / 1e9:,.0f} GB/s, is sent {best.sent / 1e9:,.1f} GB/s "
        f"from pinned memory, multiplies bf16 at {best.peak / 1e12:,.1f} TFLOP/s",
        step_table(found.steps, best),
    ]
    if found.prompts:
        rows = [[name, number(value, 0)] for name, value in found.prompts.items()]
        lines.append(table(["prompt", "tok/s"], rows))
    if "decode" in found.engine:
        rows = [
            [mix, number(1e3 * each["step"], 2), number(each["tokens a second"], 0)]
            for mix, each in found.engine["decode"].items()
        ]
        lines.append(table(["through the engine", "step ms", "tok/s with prompts"], rows))
    notes = found.notes | {f"start: {stage}": each for stage, each in found.engine.get("startup", {}).items()}
    rows = [[name, number(each, 2) if each < 1e5 else f"{each / 1e9:,.2f} GB"] for name, each in notes.items()]
    lines.append(table(["start-up", "seconds or bytes"], rows))
    lines.append(law_table(laws(found.steps, found.idle, best, found.stall)))
    return "\n\n".join([*lines, *(f"not measured: {failure}" for failure in found.failures)])


def content(found: Found, name: str, plan: Plan, device: torch.device) -> dict[str, Any]:
    """The same for machines."""
    judged = laws(found.steps, found.idle, found.limits, found.stall)
    engine = found.engine | (
        {} if found.stall is None else {"stall": asdict(found.stall) | {"ratio": found.stall.ratio}}
    )
    return {
        "bench": "gpu",
        "machine": describe() | gpu(device),
        "shape": name,
        "plan": asdict(plan),
        "limits": asdict(found.limits),
        "steps": [asdict(each) | {"ratio": each.ratio(found.limits)} for each in found.steps],
        "prompts": found.prompts,
        "notes": found.notes,
        "engine": engine,
        "laws": [asdict(law) | {"holds": law.holds} for law in judged],
        "failures": found.failures,
    }


def gpu(device: torch.device) -> dict[str, Any]:
    """What the GPU is called, and what drives it."""
    if device.type != "cuda":
        return {"gpu": str(device)}
    import triton

    about = torch.cuda.get_device_properties(device)
    versions = {"cuda": torch.version.cuda, "triton": triton.__version__}
    return {
        "gpu": about.name,
        "gpu_gb": round(about.total_memory / 1e9, 1),
        "sms": about.multi_processor_count,
    } | versions


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.1-8b")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the JSON line there")
    parser.add_argument("--seconds", type=float, default=330.0, help="no part begins later than that")
    parser.add_argument("--quick", action="store_true", help="few and small sizes: whether it runs at all")
    parser.add_argument("--device", default="cuda", help=argparse.SUPPRESS)  # for the tests
    args = parser.parse_args(arguments)
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print(f"bench/gpu.py: torch {torch.__version__} sees no GPU here, so nothing was measured", file=sys.stderr)
        raise SystemExit(NO_GPU)
    plan = QUICK if args.quick else Plan()
    memory = 0.9 * torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 8e9
    name, rows = fitting(SHAPES, args.shape, plan, memory)
    if name != args.shape or rows != plan.rows:
        _say(f"{memory / 1e9:.0f} GB of memory hold no more than {name} with up to {rows[-1]} rows: that is measured")
        plan = replace(plan, rows=rows)
    _say(", ".join(f"{key} {value}" for key, value in (describe() | gpu(device)).items()))
    found = measure(SHAPES[name], device, plan, time.monotonic() + args.seconds)
    settle(device)
    line = json_line(content(found, name, plan, device))
    about = f"{name}, bf16, context {plan.context}, adapters of rank {RANK} on all linear modules"
    print(about, report(found), line, sep="\n\n")
    if args.json is not None:
        args.json.write_text(line + "\n")
    if found.failures:
        raise SystemExit(1)


def _say(text: str) -> None:
    print(f"# {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
