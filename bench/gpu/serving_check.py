"""Does serving on a GPU keep what its decode steps give? Steps with prompts, mixed steps, an engine and a server.

    python -m bench.gpu.serving_check [--profile FILE] [--json FILE]

takes at most five minutes on a card, needs no network and no model, and ends with one line of JSON. Times of steps are
those of many in a row without waiting for each: as long as Python is faster than the device, the device's. Each step is
timed as it is served (replayed from a CUDA graph) and eagerly. Parts that fail, or that would start too late, are
reported and left out. `--profile` adds the device's time by kernel.
"""

from __future__ import annotations

import asyncio
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from bench.gpu import engine
from bench.gpu.benchmark import RANK, describe_gpu
from bench.gpu.command import add_sizes, command_parser, finish, require_device, run_parts
from bench.gpu.figures import Limits
from bench.gpu.forward_pass import (
    RandomBase,
    decode_batch,
    measure_limits,
    mixed_batch,
    prefill_batch,
    random_adapter,
    time_in_turns,
    used_memory,
    write_config,
)
from bench.gpu.kernel_profile import kernel_times
from bench.machine import describe
from bench.make_model import make_model
from bench.png_plots import add_png_option, write_png
from bench.report import Goal, goal_records, goal_table, json_line, number, table
from bench.serving.client import Server, list_models
from bench.serving.engine_throughput import Driver
from bench.serving.launch import launched
from bench.serving.load import Load, run
from bench.serving.summary import summarise
from bench.shapes import SHAPES, Shape
from lora_serve.model.batch import Batch

SERVE = (sys.executable, "-m", "lora_serve", "serve")


@dataclass(frozen=True)
class CheckSizes:
    """Sizes of a run.

    Attributes:
        rows, context: of decode steps; the first of `prompts` is that of the mixed step.
        clients, prompt, output, requests: of the closed loop; requests of each client.
        budget: about the seconds for one repeat of one step.
    """

    rows: int = 32
    context: int = 512
    prompts: tuple[int, ...] = (512, 128, 2048)
    longest: int = 8192
    clients: int = 64
    prompt: int = 128
    output: int = 128
    requests: int = 4
    budget: float = 0.1


QUICK_CHECK = CheckSizes(
    rows=4, context=32, prompts=(48, 64), longest=512, clients=4, prompt=16, output=8, requests=2, budget=0.01
)


@dataclass
class Findings:
    """What was measured so far: seconds of steps by name, as served and eagerly, and figures of the other parts."""

    limits: Limits
    steps: dict[str, dict[str, float]] = field(default_factory=dict)
    kernels: dict[str, Any] = field(default_factory=dict)
    startup: dict[str, float] = field(default_factory=dict)
    engine: dict[str, Any] = field(default_factory=dict)
    http: dict[str, Any] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def seconds(self, name: str) -> float:
        """Seconds of a step as it is served; NaN if it was not measured."""
        return self.steps.get(name, {}).get("served", math.nan)


def compute_floor(shape: Shape, tokens: int, limits: Limits) -> float:
    """Seconds of a prompt's arithmetic at the device's peak: linear modules, causal attention, one row of the head."""
    linear = shape.layers * sum(wide * tall for wide, tall in shape.linears().values())
    attention = shape.layers * shape.heads * shape.head_dim * tokens * (tokens + 1)
    return (2 * linear * tokens + 2 * attention + 2 * shape.vocabulary * shape.hidden) / limits.flops


def measure_steps(
    shape: Shape, device: torch.device, sizes: CheckSizes, found: Findings, *, profile: bool = False
) -> None:
    """Time decode, prompt and mixed steps, without adapters, with one, and decode with all distinct."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = write_config(shape, Path(scratch, "model"))
        base = RandomBase(
            folder, device, rows=max(sizes.rows, sizes.clients), context=sizes.context, slots=sizes.rows,
            longest=sizes.longest,
        )  # fmt: skip
    found.startup |= base.startup
    slots = sorted(base.load(random_adapter(base.shape, RANK, f"{i}", device)) for i in range(sizes.rows))
    rows, context = sizes.rows, sizes.context
    batches = {"decode distinct": decode_batch(slots, context)}
    for name, slot in (("base", 0), ("one", slots[0])):
        batches[f"decode {name}"] = decode_batch([slot] * rows, context)
        batches |= {f"prompt {tokens} {name}": prefill_batch(tokens, slot) for tokens in sizes.prompts}
        batches[f"mixed {name}"] = mixed_batch(rows, context, sizes.prompts[0], slot)
    for name, batch in batches.items():
        calls = {"served": base.step(batch), "eager": base.step(batch, eager=True)}
        found.steps[name] = time_in_turns(calls, device, sizes.budget)
        print(f"# {name}: {found.steps[name]}", file=sys.stderr, flush=True)
    if profile:
        found.kernels = {name: kernel_times(base.step(batch), device) for name, batch in batches.items()}


def measure_decode_rate(shape: Shape, device: torch.device, sizes: CheckSizes) -> float:
    """Tokens per second of decode steps with all clients, at their mean context, without engine and server."""
    context = sizes.prompt + sizes.output // 2
    with tempfile.TemporaryDirectory() as scratch:
        folder = write_config(shape, Path(scratch, "model"))
        base = RandomBase(
            folder, device, rows=sizes.clients, context=context, slots=1, longest=sizes.prompt + sizes.output
        )
    batch: Batch = decode_batch([0] * sizes.clients, context)
    return sizes.clients / time_in_turns({"decode": base.step(batch)}, device, sizes.budget)["decode"]


def closed_loop(shape: Shape, sizes: CheckSizes) -> Load:
    """The load of the engine and of the server."""
    return Load(
        clients=sizes.clients, requests=sizes.clients * sizes.requests, prompt=(sizes.prompt, sizes.prompt),
        output=(sizes.output, sizes.output), token_ids=(1, min(2000, shape.vocabulary) - 1),
    )  # fmt: skip


def measure_engine(shape: Shape, device: torch.device, sizes: CheckSizes, found: Findings) -> None:
    """The engine in this process, without HTTP: throughput, and its steps in which all clients decode."""
    work = engine.EngineLoad(adapters=1, clients=sizes.clients, longest=sizes.longest)
    load = closed_loop(shape, sizes)
    with tempfile.TemporaryDirectory() as scratch:
        folder = write_config(shape, Path(scratch, "model"))
        adapters = engine.make_adapters(shape, Path(scratch, "adapters"), 1)
        startup: dict[str, float] = {}
        with engine.started_engine(folder, adapters, Path(scratch, "store"), device, work, startup) as (served, wake):
            driver = Driver(served, wake)
            driver.run(replace(load, requests=sizes.clients, salt=1))
            result = driver.run(load)
            costs = served.stats().step_costs
    steps = result.decode_steps
    found.engine = {
        "tokens per second": result.throughput,
        "decode step": statistics.median(steps) if steps else math.nan,
        "decode steps with all clients": len(steps),
        "learnt costs": costs,
        "startup": startup,
    }


def measure_http(shape: Shape, device: torch.device, sizes: CheckSizes, found: Findings) -> None:
    """A server's throughput in a closed loop, beside the decode rate of the same batch."""
    found.http["decode rate"] = measure_decode_rate(shape, device, sizes)
    used_memory(device)  # frees it
    load = closed_loop(shape, sizes)
    with tempfile.TemporaryDirectory() as scratch:
        model = Path(scratch, "model")
        make_model(shape, model)
        options = ("--device", device.type, "--dtype", "bfloat16", "--max-num-seqs", str(sizes.clients))
        options += ("--store", str(Path(scratch, "store")), "--max-model-len", str(sizes.longest))
        begin = time.perf_counter()
        with launched([str(model), *options], command=SERVE, timeout=150) as url:
            found.http["start"] = time.perf_counter() - begin
            server = Server(url, list_models(url)[0], "adapter", None)
            asyncio.run(run(server, replace(load, requests=sizes.clients, salt=1)))
            summary = summarise(asyncio.run(run(server, load)))
    found.http |= {key: value for key, value in asdict(summary).items() if key != "failures"}


def check_goals(shape: Shape, sizes: CheckSizes, found: Findings) -> list[Goal]:
    """The goals; NaN, which meets no target, where a measurement is missing."""
    at = found.seconds

    def ms(*names: str) -> str:
        return " ÷ ".join(f"{1e3 * at(name):.2f}" for name in names) + " ms"

    goals = [
        Goal(12, f"HTTP throughput, {sizes.clients} clients ÷ decode rate of the same batch",
             found.http.get("throughput", math.nan) / found.http.get("decode rate", math.nan), 0.85,
             f"{found.http.get('throughput', math.nan):.0f} ÷ {found.http.get('decode rate', math.nan):.0f} tok/s"),
    ]  # fmt: skip
    for tokens in sorted(sizes.prompts):
        floor, step = compute_floor(shape, tokens, found.limits), at(f"prompt {tokens} base")
        target = 1.15 if tokens >= 2048 else 1.3
        if tokens >= 512:
            of = f"{1e3 * step:.2f} ÷ {1e3 * floor:.2f} ms"
            goals.append(Goal(11, f"prompt of {tokens} ÷ compute floor", step / floor, target, of, at_most=True))
        names = f"prompt {tokens} base", f"prompt {tokens} one"
        goals.append(
            Goal(2, f"prompt of {tokens} kept with one adapter", at(names[0]) / at(names[1]), 0.93, ms(*names))
        )
    for name in ("base", "one"):
        parts = at(f"decode {name}") + at(f"prompt {sizes.prompts[0]} {name}")
        of = f"{1e3 * at(f'mixed {name}'):.2f} ÷ {1e3 * parts:.2f} ms"
        what = f"mixed step, {sizes.rows} + {sizes.prompts[0]}, {name} ÷ its two parts"
        goals.append(Goal(0, what, at(f"mixed {name}") / parts, 1.15, of, at_most=True))
    for law, what, left, right, target in (
        (2, "kept with one adapter", "decode base", "decode one", 0.92),
        (1, "all same ÷ all distinct", "decode one", "decode distinct", 0.95),
    ):
        goals.append(Goal(law, f"decode, {sizes.rows} rows: {what}", at(left) / at(right), target, ms(left, right)))
    return goals


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command_parser(__doc__, 200.0)
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.1-8b", help="of the steps")
    parser.add_argument("--served-shape", choices=SHAPES, default="qwen2.5-1.5b", help="of the engine and the server")
    parser.add_argument("--profile", action="store_true", help="also the device's time by kernel")
    add_sizes(parser)
    add_png_option(parser)
    args = parser.parse_args(arguments)
    device = require_device("serving_check", args.device)
    sizes, end = QUICK_CHECK if args.quick else CheckSizes(), time.monotonic() + args.seconds
    shape, served = SHAPES[args.shape], SHAPES[args.served_shape]
    found = Findings(measure_limits(device))
    parts: dict[str, Callable[[], None]] = {
        "steps": lambda: measure_steps(shape, device, sizes, found, profile=args.profile),
        "http": lambda: measure_http(served, device, sizes, found),
        "engine": lambda: measure_engine(served, device, sizes, found),
    }
    found.failures += run_parts(parts, end, device)
    goals = check_goals(shape, sizes, found)
    rows = [[name, *(number(1e3 * each[how], 2) for how in ("served", "eager"))] for name, each in found.steps.items()]
    print(table(["step", "served ms", "eager ms"], rows), goal_table(goals), *found.failures, sep="\n\n")
    for name, each in found.kernels.items():
        print(f"\n{name}: busy {1e3 * each['busy']:.2f} ms\n")
        print(
            table(["kernel", "launches", "µs"], [[k[:60], number(n, 1), number(us, 1)] for k, n, us in each["kernels"]])
        )
    line = json_line(
        {"bench": "gpu serving", "machine": describe() | describe_gpu(device), "shape": args.shape,
         "served shape": args.served_shape, "sizes": asdict(sizes)} | asdict(found) | {"goals": goal_records(goals)}
    )  # fmt: skip
    finish(line, args.json)
    write_png(line, args.png)
    if found.failures:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
