"""Where a step goes: the kernels' calls by kind, and what is left around them.

    python -m bench.steps --folder .bench/qwen2.5-0.5b --serve "--quantize int8"

drives the engine in its own process, with a clock around every call of the kernels, and prints medians over the steps
of each kind: decode steps of all clients, and a prefill of all their prompts together. Steps that are played from a
tape show as one part; `--untaped` makes them through Python, so that its parts can be seen. The clocks themselves cost
about a microsecond a call.
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

from bench.inprocess import Driver, opened
from bench.load import Load
from bench.report import json_line, number, table
from bench.serve import mixes
from lora_serve.engine import assemble, runner
from lora_serve.kernels.cpu.recording import CallRecording
from lora_serve.model import place, replay

HEAD = 30_000  # outputs from which a map is the head


class Clocks:
    """Seconds by part, of the step that runs."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = defaultdict(float)

    def around(self, part: str | Callable[..., str], call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            result = call(*args, **kwargs)
            self.spent[part if isinstance(part, str) else part(*args)] += time.perf_counter() - begin
            return result

        return timed


def watch(clocks: Clocks) -> None:
    """Put clocks around what an engine that is built from now on does."""
    select = assemble.select

    def timed(*args: Any) -> Any:
        kernels = select(*args)
        for name in [name for name in dir(kernels) if not name.startswith("_") and callable(getattr(kernels, name))]:
            setattr(kernels, name, clocks.around(_map if name == "linear" else name, getattr(kernels, name)))
        return kernels

    assemble.select = timed
    CallRecording.play = clocks.around("played from tape", CallRecording.play)  # type: ignore[method-assign]
    runner.flatten = clocks.around("flatten", runner.flatten)
    runner.draw = clocks.around("draw", runner.draw)
    place.Place.write = clocks.around("write", place.Place.write)  # type: ignore[method-assign]


def _map(x: Any, maps: Any) -> str:
    return "head" if maps[0][0].shape[0] >= HEAD else "linear"


def measure(folder: Path, serve: str, mix: list[Any], clients: int, output: int) -> dict[str, dict[str, float]]:
    """Milliseconds by part for each mix and kind of step; `around` is all that no clock saw."""
    clocks = Clocks()
    watch(clocks)
    folder_of_adapters = folder / "adapters"
    adapters = tuple(sorted(path.name for path in folder_of_adapters.iterdir()))
    found: dict[str, dict[str, float]] = {}
    steps: dict[str, list[dict[str, float]]] = defaultdict(list)
    with opened(folder / "model", serve, folder_of_adapters) as (engine, wake):
        step, kind = engine.step, ""

        def timed() -> Any:
            clocks.spent.clear()
            begin = time.perf_counter()
            update = step()
            whole = time.perf_counter() - begin
            if update.step is not None and update.step.sequences == clients:
                phase = "decode" if update.step.tokens == clients else "prefill"
                around = whole - sum(clocks.spent.values())
                steps[f"{kind}, {phase}"].append({"step": whole, **clocks.spent, "around": around})
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
    parser.add_argument("--folder", type=Path, required=True, help="what bench/make_model.py made")
    parser.add_argument("--serve", default="", metavar="ARGS", help="further options, as of `lora-serve serve`")
    parser.add_argument("--mix", type=mixes, default=["none", "distinct"])
    parser.add_argument("--untaped", action="store_true", help="make every step through Python")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--output", type=int, default=32, help="tokens a request")
    args = parser.parse_args(arguments)
    if args.untaped:
        replay.MOST_ROWS = 0
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
