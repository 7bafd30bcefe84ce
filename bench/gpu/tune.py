"""Tune the launch plans of the GPU kernels on this machine's card, and write them where the kernels find them.

    python -m bench.gpu.tune [--models llama-3.1-8b,...] [--seconds 200] [--json tune.json]

needs a GPU (exit status 3 without one), no network and no model: weights are random. For the linear layers of known
models, with deltas in decode and prefill steps and with quantised weights, and for their attention, it searches for
the fastest plan from the one by rule on (`plan_search.py`). The card's file is written after every part, the most
important first, so that it holds what was found when the time is over. Prints a table of before and after and, last,
one line of JSON.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import msgspec
import torch
import triton

from bench.gpu.command import command_parser, finish, note, require_device
from bench.gpu.plan_search import GraphTimer, Tuner
from bench.gpu.tuning_problems import ATTENTION_ROWS, DECODE_ROWS, MODELS, PREFILL_ROWS, QUANTIZED_ROWS
from bench.report import json_line, number, table
from lora_serve.kernels.gpu import plan_table
from lora_serve.kernels.gpu.backend import GpuKernels
from lora_serve.kernels.gpu.plan_table import (
    DecodeAttentionEntry,
    DeltaEntry,
    MatmulEntry,
    PlanFile,
    PlanTable,
    PrefillAttentionEntry,
)


def file_of(table: PlanTable, card: str, capability: tuple[int, int]) -> PlanFile:
    """The table as a file's content."""
    return PlanFile(
        format=plan_table.FORMAT,
        card=card,
        capability=capability,
        triton=triton.__version__,
        pointwise="dependent" if table.dependent_pointwise else "in_turn",
        delta=tuple(DeltaEntry(problem, plan) for problem, plan in table.delta.items()),
        matmul=tuple(MatmulEntry(problem, plan) for problem, plan in table.matmul.items()),
        decode_attention=tuple(DecodeAttentionEntry(*each) for each in table.decode_attention.items()),
        prefill_attention=tuple(PrefillAttentionEntry(*each) for each in table.prefill_attention.items()),
    )


def report(tuner: Tuner) -> str:
    """Before and after as a table, and what failed."""
    rows = [
        [
            each.what,
            number(1e6 * each.base, 1),
            number(1e6 * each.before, 1),
            number(1e6 * each.after, 1),
            str(each.tried),
            " ".join(f"{name}={value}" for name, value in msgspec.structs.asdict(each.plan).items()),
        ]
        for each in tuner.found
    ]
    lines = [table(["problem", "base µs", "by rule µs", "tuned µs", "plans", "plan"], rows)]
    lines += [f"layers with pointwise kernels {name}: {1e6 * each:.1f} µs" for name, each in tuner.pointwise.items()]
    lines += [f"failed: {what}: {reason}" for what, reason in tuner.failures.items()]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command_parser(__doc__, 200.0)
    parser.add_argument("--models", default=",".join(MODELS), help="of bench/shapes.py, the most important first")
    parser.add_argument("--folder", type=Path, default=plan_table.FOLDER, help="where the card's file is written")
    args = parser.parse_args(arguments)
    require_device("tune")
    about = torch.cuda.get_device_properties("cuda")
    capability = (about.major, about.minor)
    plans, begin = PlanTable(), time.monotonic()
    kernels = GpuKernels(plans)
    tuner = Tuner(
        kernels,
        plans,
        GraphTimer(kernels, "cuda"),
        begin + args.seconds,
        2 * about.L2_cache_size,
        "cuda",
        dependent=capability >= (9, 0),
    )
    with torch.inference_mode():
        path = tune(tuner, args.models.split(","), lambda: file_of(plans, about.name, capability), args.folder)
    seconds = time.monotonic() - begin
    line = json_line(
        {
            "bench": "gpu-tune",
            "gpu": about.name,
            "triton": triton.__version__,
            "seconds": seconds,
            "over": tuner.over,
            "pointwise": tuner.pointwise,
            "found": [asdict(each) | {"plan": msgspec.structs.asdict(each.plan)} for each in tuner.found],
            "failures": tuner.failures,
        }
    )
    print(report(tuner), f"{path}, after {seconds:.0f} s", "", sep="\n\n")
    finish(line, args.json)


def tune(tuner: Tuner, models: Sequence[str], content: Callable[[], PlanFile], folder: Path) -> Path:
    """Tune everything, the first model's deltas first; the file is written again after each part."""
    first, *others = models
    parts: list[Callable[[], None]] = [
        lambda: tuner.tune_pointwise(first, (1, 32)),
        lambda: tuner.tune_delta(first, DECODE_ROWS[:4], PREFILL_ROWS[:2]),
        lambda: tuner.tune_attention(first, ATTENTION_ROWS[:3], PREFILL_ROWS[:2]),
        lambda: tuner.tune_matmul(first, QUANTIZED_ROWS[:2]),
        lambda: tuner.tune_delta(first, DECODE_ROWS[4:], PREFILL_ROWS[2:]),
        lambda: tuner.tune_attention(first, ATTENTION_ROWS[3:], PREFILL_ROWS[2:]),
    ]
    for model in others:
        parts.append(lambda model=model: tuner.tune_delta(model, DECODE_ROWS[:4], PREFILL_ROWS[:2]))  # type: ignore[misc]
    for model in models:
        parts.append(lambda model=model: tuner.tune_matmul(model, QUANTIZED_ROWS))  # type: ignore[misc]
    path = plan_table.write(content(), folder)
    for part in parts:
        part()
        path = plan_table.write(content(), folder)
        note(f"{len(tuner.found)} problems tuned")
    return path


if __name__ == "__main__":
    main()
