"""What the commands of this folder share: options, what they do without a GPU, parts of a run, the JSON line."""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

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


def run_parts(parts: Mapping[str, Callable[[], object]], end: float, device: torch.device) -> list[str]:
    """Run the parts by name; those that fail, or would start after `end` (monotonic), are left out, with the reason."""
    failures = []
    for name, part in parts.items():
        note(f"{name} starts")
        if time.monotonic() > end:
            failures.append(f"{name}: no time was left")
            continue
        try:
            part()
        except Exception as error:  # earlier results are kept
            traceback.print_exc()
            failures.append(f"{name}: {type(error).__name__}: {error}")
        used_memory(device)  # also frees what the part held
    return failures


def finish(line: str, file: Path | None) -> None:
    """Print the JSON line, and write it to the file."""
    print(line)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(line + "\n")


def note(text: str) -> None:
    """Say what happens, beside the results."""
    print(f"# {text}", file=sys.stderr, flush=True)
