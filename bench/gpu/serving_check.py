"""Measure every goal of the GPU path (`bench/gpu/goals.py`) in one run, and end with one line of JSON.

    python -m bench.gpu.serving_check --json check.json [--profile] [--parts steps,cliff]

takes at most six minutes on a card, needs no network and no model: weights are random. Each part has an estimate of its
time (`PARTS`, from the figures of one H200), and one that would not fit in what is left of `--seconds` is cut and named
in the JSON. Times of steps are those of many in a row without waiting for each: as long as Python is faster than the
device, the device's. Parts that fail are left out, with the reason. It writes some 30 GB into TMPDIR.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench.gpu.command import Part, add_sizes, command_parser, describe_gpu, finish, note, require_device, run_parts
from bench.gpu.figures import Limits, step_table
from bench.gpu.forward_pass import measure_limits, used_memory, write_config
from bench.gpu.goals import EIGHT_BITS, FOUR_BITS, Value, quantized_values, reached, step_values
from bench.gpu.served import ServedFigures, ServedModels, ServedSizes
from bench.gpu.steps import StepFigures, StepSizes, measure_decode, measure_steps
from bench.machine import describe
from bench.png_plots import add_png_option, write_png
from bench.report import goal_records, goal_table, json_line, number, table
from bench.shapes import SHAPES, Shape
from lora_serve.kernels.select import refuse_scheme

# Parts in their order, and about the seconds of each with the 8B and the 1.5B shape: a base with its graphs takes
# 8 s to 25 s, a step 0.7 s, a server of the 1.5B shape 15 s, the files of the 8B shape 20 s.
PARTS = {"steps": 60.0, "quantized": 50.0, "small server": 45.0, "large server": 90.0, "cliff": 40.0, "registry": 70.0}
BUDGET = 360.0  # seconds of all


@dataclass(frozen=True)
class CheckSizes:
    """Sizes of a run; `quantized`: rows of the decode steps of quantised bases."""

    steps: StepSizes
    served: ServedSizes
    quantized: tuple[int, ...]


FULL = CheckSizes(
    StepSizes((1, 8, 32, 64, 128, 256), (32,), 512, (512, 128, 2048), 8192, 0.1, loop=(64, ServedSizes().context)),
    ServedSizes(),
    quantized=(1, 8, 32),
)
QUICK = CheckSizes(
    StepSizes((1, 4), (4,), 32, (48, 64), 512, 0.01, loop=(4, 20)),
    ServedSizes(4, 16, 8, requests=2, longest=512, adapters=9, registry=12, repeats=1, seconds=1.0),
    quantized=(1, 4),
)


@dataclass
class Findings:
    """What was measured so far.

    Attributes:
        quantized: seconds of a decode step without adapters, by scheme and rows.
        missing: parts that were cut or failed, with the reason.
    """

    limits: Limits
    steps: StepFigures = field(default_factory=StepFigures)
    quantized: dict[str, dict[int, float]] = field(default_factory=dict)
    served: ServedFigures = field(default_factory=ServedFigures)
    missing: dict[str, str] = field(default_factory=dict)

    def values(self, shape: Shape) -> dict[str, Value]:
        """Values of goals, by name."""
        found = step_values(self.steps, shape, self.limits) | quantized_values(self.steps.decode, self.quantized)
        return found | self.served.values


def measure_quantized(folder: Path, device: torch.device, sizes: CheckSizes, found: Findings) -> None:
    """Decode steps of a base in each scheme that the device has."""
    steps = sizes.steps
    for scheme in (*EIGHT_BITS, *FOUR_BITS):
        if reason := refuse_scheme(scheme, device):
            note(reason)
            continue
        found.quantized[scheme] = measure_decode(folder, device, sizes.quantized, steps.context, steps.budget, scheme)
        note(f"{scheme}: {found.quantized[scheme]}")
        used_memory(device)  # frees the base


def check_parts(
    large: str, small: str, device: torch.device, sizes: CheckSizes, found: Findings, scratch: Path, *, profile: bool
) -> dict[str, Part]:
    """All parts, in their order.

    Args:
        large, small: names of the shapes.
        scratch: an empty folder.
    """
    shape, folder = SHAPES[large], write_config(SHAPES[large], scratch / "large-config")
    served = ServedModels(scratch, device, sizes.served, sizes.steps.budget, found.served)
    calls = {
        "steps": lambda: measure_steps(shape, folder, device, sizes.steps, found.steps, profile=profile),
        "quantized": lambda: measure_quantized(folder, device, sizes, found),
        "small server": lambda: served.small_server(small),
        "large server": lambda: served.large_server(large, found.steps.loop),
        "cliff": lambda: served.cliff(small),
        "registry": lambda: served.registry(small),
    }
    return {name: Part(calls[name], seconds) for name, seconds in PARTS.items()}


def report(found: Findings, shape: Shape) -> str:
    """Tables, and what is missing, as text."""
    lines = [step_table(found.steps.decode, found.limits)]
    served = found.steps.prompts | {f"mixed {name}": each[0] for name, each in found.steps.mixed.items()}
    rows = [[name, number(1e3 * each, 2), number(1e3 * found.steps.eager[name], 2)] for name, each in served.items()]
    lines.append(table(["step", "served ms", "eager ms"], rows))
    schemes = [[name, *(number(1e3 * each, 2) for each in found.quantized[name].values())] for name in found.quantized]
    if schemes:
        header = [f"{rows} rows ms" for rows in next(iter(found.quantized.values()))]
        lines.append(table(["decode step, base", *header], schemes))
    for name, each in found.steps.kernels.items():
        lines.append(f"{name}: busy {1e3 * each['busy']:.2f} ms")
        kernels = [[kernel[:60], number(count, 1), number(us, 1)] for kernel, count, us in each["kernels"]]
        lines.append(table(["kernel", "launches", "µs"], kernels))
    lines.append(goal_table(reached(found.values(shape), missing=found.missing)))
    return "\n\n".join([*lines, *(f"{part}: {why}" for part, why in found.missing.items())])


def record(found: Findings, large: str, small: str, sizes: CheckSizes, device: torch.device) -> dict[str, Any]:
    """All results, for `json_line`."""
    steps = asdict(found.steps)
    decode = [each | {"ratio": step.ratio(found.limits)} for each, step in zip(
        steps.pop("decode"), found.steps.decode, strict=True
    )]  # fmt: skip
    return {
        "bench": "gpu serving",
        "machine": describe() | describe_gpu(device),
        "shape": large,
        "served shape": small,
        "sizes": asdict(sizes),
        "limits": asdict(found.limits),
        "decode": decode,
        **steps,
        "quantized": found.quantized,
        "served": found.served.parts,
        "goals": goal_records(reached(found.values(SHAPES[large]), missing=found.missing)),
        "missing": found.missing,
    }


def chosen_parts(text: str) -> list[str]:
    """Names of parts, comma-separated. Raises ValueError for others."""
    names = text.split(",")
    if unknown := set(names) - PARTS.keys():
        raise ValueError(f"no parts: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    return names


def main(arguments: Sequence[str] | None = None) -> None:
    begin = time.monotonic()
    parser = command_parser(__doc__, BUDGET)
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.1-8b", help="the large one")
    parser.add_argument("--served-shape", choices=SHAPES, default="qwen2.5-1.5b", help="the small one")
    parser.add_argument("--parts", type=chosen_parts, default=list(PARTS), help=f"of {', '.join(PARTS)}")
    parser.add_argument("--profile", action="store_true", help="also the device's time by kernel")
    add_sizes(parser)
    add_png_option(parser)
    args = parser.parse_args(arguments)
    device = require_device("serving_check", args.device)
    sizes = QUICK if args.quick else FULL
    found = Findings(measure_limits(device))
    with tempfile.TemporaryDirectory(prefix="serving-check-") as scratch:
        parts: Mapping[str, Part] = check_parts(
            args.shape, args.served_shape, device, sizes, found, Path(scratch), profile=args.profile
        )
        wanted = {name: part for name, part in parts.items() if name in args.parts}
        found.missing = dict.fromkeys(parts.keys() - wanted.keys(), "left out by --parts")
        found.missing |= run_parts(wanted, begin + args.seconds, device)
    print(report(found, SHAPES[args.shape]), "", sep="\n")
    line = json_line(record(found, args.shape, args.served_shape, sizes, device))
    finish(line, args.json)
    write_png(line, args.png)
    if found.missing.keys() & wanted.keys():
        raise SystemExit(1)


if __name__ == "__main__":
    main()
