"""What the commands of this folder share: options, what they do without a GPU, parts of a run, the JSON line."""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.gpu.forward_pass import used_memory

NO_GPU = 3


def command_parser(description: str | None, seconds: float) -> argparse.ArgumentParser:
    """A parser with --json and --seconds, the time after which nothing new starts."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the JSON line to this file")
    parser.add_argument("--seconds", type=float, default=seconds, help="nothing new starts later than this")
    return parser


def add_sizes(parser: argparse.ArgumentParser) -> None:
    """Add --quick and, for the tests, --device."""
    parser.add_argument("--quick", action="store_true", help="few and small sizes, to see that it runs")
    parser.add_argument("--device", default="cuda", help=argparse.SUPPRESS)


def require_device(command: str, name: str = "cuda") -> torch.device:
    """The device; exits with `NO_GPU` and a message where it is a GPU and there is none."""
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        print(f"bench.gpu.{command}: torch {torch.__version__} sees no GPU here, so nothing is done", file=sys.stderr)
        raise SystemExit(NO_GPU)
    return device


@dataclass(frozen=True)
class Part:
    """One part of a run, and about the seconds that it takes."""

    call: Callable[[], object]
    seconds: float = 0.0


def run_parts(
    parts: Mapping[str, Part], end: float, device: torch.device, clock: Callable[[], float] = time.monotonic
) -> dict[str, str]:
    """Run the parts by name; those that fail, or would not be done by `end`, are returned with the reason."""
    missing = {}
    for name, part in parts.items():
        left = end - clock()
        if left < part.seconds:
            missing[name] = f"cut: takes about {part.seconds:.0f} s, and {max(0.0, left):.0f} s of the budget were left"
            note(f"{name} is {missing[name]}")
            continue
        note(f"{name} starts")
        try:
            part.call()
        except Exception as error:  # earlier results are kept
            traceback.print_exc()
            missing[name] = f"{type(error).__name__}: {error}"
        used_memory(device)  # also frees what the part held
        note(f"{name} took {left - (end - clock()):.1f} s")
    return missing


def describe_gpu(device: torch.device) -> dict[str, Any]:
    """Name, memory and software versions of the GPU."""
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


def finish(line: str, file: Path | None) -> None:
    """Print the JSON line, and write it to the file."""
    print(line)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(line + "\n")


def note(text: str) -> None:
    """Say what happens, beside the results."""
    print(f"# {text}", file=sys.stderr, flush=True)
