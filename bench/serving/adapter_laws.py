"""The laws of adapters, each a ratio beside its target, measured on real servers over HTTP.

    python -m bench.serving.adapter_laws --model .bench/qwen2.5-0.5b/model
    python -m bench.serving.adapter_laws --model .bench/tiny/model --laws 4 --adapters 2000
    python -m bench.serving.adapter_laws --model demo/model --quick

Laws: 4 registry, 5 cliff, 6 stall, 7 cold start, 8 rank isolation, 9 memory, 10 fairness, 15 time to publish,
16 arrival. What each compares is in its function's docstring. What is compared runs in turns on one server, and
figures are medians of the repeats. Adapters are PEFT folders with random weights, made for the model (of Llama's or
Qwen2's architecture) in a temporary folder: TMPDIR chooses the disk, which needs about 20 GB for the 0.5B shape.
`--device cuda` measures a GPU; `--serve` adds options of the server, such as `--adapter-slots 32
--adapter-cache-memory 62MiB` for law 4 with adapters that do not all fit.

On a quiet machine of two cores all laws take some 15 to 20 minutes with the 0.5B shape; the JSON has each one's time.
A third is law 4, which publishes twice as many adapters as `--adapters` says: of rank 8, and of mixed ranks. Those are
on fewer modules if a set would take more than 2 GiB; which ones is in the JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch

from bench.machine import describe
from bench.png_plots import add_png_option, write_png
from bench.report import Goal, goal_records, goal_table, json_line
from bench.serving import residency_laws, throughput_laws
from bench.serving.adapter_server import Scale, Workspace
from bench.serving.adapter_sets import AdapterMaker
from bench.serving.adapter_traffic import Sizes
from bench.serving.arrival_law import arrival
from bench.serving.load import token_range
from bench.serving.throughput_laws import Figures, Law
from bench.shapes import shape_of

LAWS: dict[int, Law] = {
    4: throughput_laws.registry,
    5: throughput_laws.cliff,
    6: residency_laws.stall,
    7: residency_laws.cold_start,
    8: throughput_laws.rank_isolation,
    9: residency_laws.memory,
    10: throughput_laws.fairness,
    15: residency_laws.publish,
    16: arrival,
}
FULL = Scale(adapters=2000, started=64, repeats=3, seconds=8.0)
QUICK = Scale(adapters=60, started=6, repeats=1, seconds=3.0)
SCALE = ("adapters", "started", "repeats", "seconds", "clients")  # of `Scale`, and options


def measure(workspace: Workspace, laws: Mapping[int, Law]) -> tuple[list[Goal], dict[str, Figures]]:
    """The goals of the laws, and each law's figures. A law that fails says why in its figures, and meets no goal."""
    goals: list[Goal] = []
    figures: dict[str, Figures] = {}
    for number, law in laws.items():
        name, begin = law.__name__, time.monotonic()
        print(f"# {number} {name}", file=sys.stderr)
        try:
            found, figures[name] = law(workspace)
        except Exception as error:
            traceback.print_exc()
            found, figures[name] = [Goal(number, name, math.nan, math.nan, "failed")], {"error": str(error)}
        figures[name]["took"] = time.monotonic() - begin
        for goal in found:
            print(f"# {goal.name}: {goal.value:.3f} ({goal.of})", file=sys.stderr)
        goals += found
    return goals, figures


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and return 1 if a law could not be measured."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    args = _parser().parse_args(given)
    if not set(args.laws) <= LAWS.keys():
        _parser().error(f"laws are {', '.join(map(str, LAWS))}")
    sizes = Sizes(args.prompt, args.output, args.token_ids)
    chosen = {name: value for name in SCALE if (value := getattr(args, name)) is not None}
    scale = replace(QUICK if args.quick else FULL, sizes=sizes, **chosen)
    config = json.loads((args.model / "config.json").read_text())
    shape = shape_of(config)
    dtype = args.dtype if args.dtype != "auto" else config.get("dtype") or config.get("torch_dtype")
    with tempfile.TemporaryDirectory(prefix="adapter-laws-") as folder:
        workspace = Workspace(
            model=args.model.resolve(),
            folder=Path(folder),
            maker=AdapterMaker(shape, Path(folder) / "adapters"),
            dtype=getattr(torch, dtype),
            options=("--device", args.device, "--dtype", args.dtype, *shlex.split(args.serve)),
            context=shape.context,
            scale=scale,
        )
        goals, figures = measure(workspace, {number: LAWS[number] for number in args.laws})
    print(goal_table(goals))
    content = {
        "bench": "adapter_laws",
        "machine": describe(),
        "arguments": given,
        "scale": asdict(scale),
        "goals": goal_records(goals),
        "figures": figures,
    }
    line = json_line(content)
    print(line)
    write_png(line, args.png)
    return int(any("error" in each for each in figures.values()))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a model's folder")
    parser.add_argument("--laws", type=lambda text: [int(each) for each in text.split(",")], default=list(LAWS))
    parser.add_argument("--quick", action="store_true", help="few adapters, short loads, one repeat: a smoke test")
    parser.add_argument("--adapters", type=int, help=f"adapters in use for law 4 (default: {FULL.adapters})")
    parser.add_argument("--started", type=int, help=f"adapters given at start for law 15 (default: {FULL.started})")
    parser.add_argument("--repeats", type=int, help=f"default: {FULL.repeats}")
    parser.add_argument("--seconds", type=float, help=f"of one load (default: {FULL.seconds:g})")
    parser.add_argument(
        "--clients", type=int, help=f"concurrent clients; law 5 has twice as many (default: {FULL.clients})"
    )
    parser.add_argument("--prompt", type=token_range, default=(32, 32), help="prompt tokens: 64 or 32-96")
    parser.add_argument("--output", type=token_range, default=(16, 48), help="output tokens: 64 or 32-96")
    parser.add_argument("--token-ids", type=token_range, default=(300, 1500), help="range of prompt token ids")
    parser.add_argument("--device", default="auto", help="of the server")
    parser.add_argument("--dtype", default="auto", help="of the server: bfloat16, float16 or float32")
    parser.add_argument("--serve", default="", metavar="ARGS", help="further options of `lora-serve serve`")
    add_png_option(parser)
    return parser


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that servers are stopped and folders removed
    sys.exit(main())
