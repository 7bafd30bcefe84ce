"""Time of an engine step by kernel, for decode and prefill.

    python -m bench.kernels.step_breakdown --folder .bench/qwen2.5-0.5b --serve "--quantize int8"

runs the engine in this process with a timer around every kernel call, and prints medians over the decode steps of all
clients and over the prefill of all their prompts together. A recorded step shows as one part; `--no-recorded-steps`
runs every step through Python, so that its kernels can be seen. A timer costs about a microsecond per call.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.report import json_line, number, table
from bench.serving.engine_throughput import Driver, started_engine
from bench.serving.load import Load, mixes
from lora_serve.engine import runner, startup
from lora_serve.kernels.cpu.recording import CallRecording
from lora_serve.model import recorded_steps
from lora_serve.model.input_buffers import InputBuffers

HEAD = 30_000  # a linear module with at least so many outputs is the LM head


class Timers:
    """Seconds of the current step by part."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = defaultdict(float)

    def timed(self, part: str | Callable[..., str], call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            result = call(*args, **kwargs)
            self.spent[part if isinstance(part, str) else part(*args)] += time.perf_counter() - begin
            return result

        return timed


def instrument(timers: Timers) -> None:
    """Time the parts of every engine that is built from now on."""
    select = startup.select

    def timed(*args: Any) -> Any:
        kernels = select(*args)
        public = [name for name in dir(kernels) if not name.startswith("_") and callable(getattr(kernels, name))]
        for name in public:
            if name in ("adapted_linear", "adapted_gated_linear"):  # their parts are timed
                continue
            setattr(kernels, name, timers.timed(_linear if name == "linear" else name, getattr(kernels, name)))
        return kernels

    startup.select = timed
    CallRecording.replay = timers.timed("recorded step", CallRecording.replay)  # type: ignore[method-assign]
    runner.build_batch = timers.timed("build batch", runner.build_batch)
    runner.sample = timers.timed("sample", runner.sample)
    InputBuffers.write = timers.timed("write inputs", InputBuffers.write)  # type: ignore[method-assign]


def _linear(x: Any, weights: Any) -> str:
    return "head" if weights[0][0].shape[0] >= HEAD else "linear"


def measure(folder: Path, serve: str, mix: list[Any], clients: int, output: int) -> dict[str, dict[str, float]]:
    """Milliseconds by part for each mix and kind of step; `other` is what no timer covers."""
    timers = Timers()
    instrument(timers)
    folder_of_adapters = folder / "adapters"
    adapters = tuple(sorted(path.name for path in folder_of_adapters.iterdir()))
    found: dict[str, dict[str, float]] = {}
    steps: dict[str, list[dict[str, float]]] = defaultdict(list)
    with started_engine(folder / "model", serve, folder_of_adapters) as (engine, wake):
        step, kind = engine.step, ""

        def timed() -> Any:
            timers.spent.clear()
            begin = time.perf_counter()
            update = step()
            whole = time.perf_counter() - begin
            if update.step is not None and update.step.sequences == clients:
                phase = "decode" if update.step.tokens == clients else "prefill"
                other = whole - sum(timers.spent.values())
                steps[f"{kind}, {phase}"].append({"step": whole, **timers.spent, "other": other})
            return update

        engine.step = timed  # type: ignore[method-assign]
        load = Load(adapters=adapters, clients=clients, requests=3 * clients, output=(output, output))
        for salt, each in enumerate(mix):
            kind = each
            Driver(engine, wake).run(replace(load, mix=each, salt=salt))
    for name, all_steps in steps.items():
        parts = sorted({part for each in all_steps for part in each})
        found[name] = {part: 1e3 * statistics.median(each.get(part, 0.0) for each in all_steps) for part in parts}
        found[name]["steps"] = len(all_steps)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="what bench.make_model wrote")
    parser.add_argument("--serve", default="", metavar="ARGS", help="further options of `lora-serve serve`")
    parser.add_argument("--mix", type=mixes, default=["none", "distinct"])
    parser.add_argument("--no-recorded-steps", action="store_true", help="run every step through Python")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--output", type=int, default=32, help="output tokens per request")
    args = parser.parse_args(arguments)
    if args.no_recorded_steps:
        recorded_steps.MAX_ROWS = 0
    found = measure(args.folder, args.serve, args.mix, args.clients, args.output)
    parts = sorted({part for each in found.values() for part in each} - {"step", "steps"})
    order = ["steps", "step", *sorted(parts, key=lambda part: -max(each.get(part, 0.0) for each in found.values()))]
    rows = [
        [part, *(number(each.get(part, 0.0), 0 if part == "steps" else 2) for each in found.values())] for part in order
    ]
    print(table(["ms", *found], rows))
    print(json_line(found))


if __name__ == "__main__":
    main()
