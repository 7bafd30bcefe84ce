"""What a training run does to the streams that are served beside it, and how fast it trains meanwhile.

    python -m bench.make_model --shape qwen2.5-0.5b --adapters 1
    python -m bench.training_beside_serving --model .bench/qwen2.5-0.5b/model --threads 2

drives an engine process of its own, without HTTP. Under full load each client sends a request as soon as its last one
has ended. Under half load requests arrive at random times, half as many a second as were answered under full load
without a run, whether earlier ones have ended or not, and at the same times with a run and without. For every load,
times with and without a run take turns. Printed are the gaps between two tokens of a stream, tokens served and trained
per second, and the share of the time that training took. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench.machine import describe
from bench.png_plots import add_png_option, write_png
from bench.report import json_line, number, table
from lora_serve.config import ServeConfig
from lora_serve.engine.client import EngineClient
from lora_serve.messages import Stats
from lora_serve.request import Finished, Request, Sampling, Tokens
from lora_serve.training_messages import (
    CloseRun,
    CreateRun,
    ForwardBackward,
    OptimizerStep,
    RunSettings,
    TrainingExample,
)

LOADS = ("full", "half", "none")
WARM_UP = 3.0  # seconds before measuring


@dataclass
class Window:
    """What was measured in a time: seconds of each gap, tokens served and trained, seconds of training."""

    seconds: float = 0.0
    gaps: list[float] = field(default_factory=list)
    served: int = 0
    trained: int = 0
    training: float = 0.0

    def gap(self, quantile: float) -> float:
        """A quantile of the gaps in milliseconds; nan if there were none."""
        ordered = sorted(self.gaps)
        return 1e3 * ordered[int(quantile * (len(ordered) - 1))] if ordered else float("nan")


class Loaded:
    """An engine with clients and perhaps a run.

    Attributes:
        window: what is being measured; None: nothing.
    """

    def __init__(self, engine: EngineClient, options: argparse.Namespace) -> None:
        self._engine, self._options = engine, options
        self._draw = random.Random(options.seed)
        self._requests = 0
        self.window: Window | None = None

    async def measure(self, load: str, rate: float, round_: int, *, training: bool) -> Window:
        """Serve and train for a while.

        Args:
            rate: of arrivals under half load, in requests a second.
            round_: decides when these are.
        """
        options = self._options
        tasks: list[asyncio.Task[None]] = []
        if load == "full":
            tasks += [asyncio.ensure_future(self._client()) for _ in range(options.clients)]
        if load == "half":
            tasks.append(asyncio.ensure_future(self._arrivals(rate, random.Random(1000 * options.seed + round_))))
        if training:
            await self._engine.call(CreateRun("bench", RunSettings(r=options.rank, lora_alpha=2.0 * options.rank)))
            tasks.append(asyncio.ensure_future(self._train()))
        await asyncio.sleep(WARM_UP if load == "full" else 2 * WARM_UP)  # arrivals take a while to become streams
        self.window, before, begun = Window(), self._totals(), time.perf_counter()
        await asyncio.sleep(options.seconds)
        window, self.window = self.window, None
        window.seconds = time.perf_counter() - begun
        window.trained, window.training = (now - then for now, then in zip(self._totals(), before, strict=True))
        for task in tasks:
            task.cancel()
        for task in tasks:
            with suppress(asyncio.CancelledError):
                await task
        await self._engine.call(CloseRun("bench"))
        return window

    def _totals(self) -> tuple[int, float]:
        stats = self._engine.stats
        return stats.training_tokens_total, sum(stats.training_seconds_total.values())

    async def _client(self) -> None:
        while True:
            await self._request()

    async def _arrivals(self, rate: float, draw: random.Random) -> None:
        async with asyncio.TaskGroup() as group:
            while True:
                await asyncio.sleep(draw.expovariate(rate))
                group.create_task(self._request())

    async def _request(self) -> None:
        """Send a request and note its gaps and tokens."""
        options = self._options
        self._requests += 1
        prompt = self._draw.choices(range(300, 2000), k=options.prompt)
        sampling = Sampling(max_tokens=options.output, temperature=0.0, ignore_eos=True)
        last = None
        async for event in self._engine.generate(Request(f"r{self._requests}", prompt, sampling)):
            now = time.perf_counter()
            if isinstance(event, Finished) and event.failure is not None:
                raise event.failure.error()
            if isinstance(event, Tokens):
                if self.window is not None:
                    self.window.served += len(event.token_ids)
                    self.window.gaps += [] if last is None else [now - last]
                last = now

    async def _train(self) -> None:
        options, length = self._options, self._options.length
        while True:
            rows = [self._draw.choices(range(300, 2000), k=length + 1) for _ in range(options.batch)]
            weights = [1 / (length * options.batch)] * length
            examples = [TrainingExample(row[:-1], row[1:], {"weights": weights}) for row in rows]
            await self._engine.call(ForwardBackward("bench", examples))
            await self._engine.call(OptimizerStep("bench", 1e-4))


def joined(windows: Sequence[Window]) -> Window:
    """Several times as one."""
    return Window(
        sum(each.seconds for each in windows),
        [gap for each in windows for gap in each.gaps],
        sum(each.served for each in windows),
        sum(each.trained for each in windows),
        sum(each.training for each in windows),
    )


async def run(options: argparse.Namespace) -> dict[str, dict[str, list[Window]]]:
    """By load, and "off" or "on": what was measured."""
    with tempfile.TemporaryDirectory() as store:
        config = ServeConfig(
            model=str(options.model),
            store=Path(store) / "store",
            threads=options.threads,
            training_memory=options.memory,
            training_share=options.share,
            kv_cache_memory="1GiB",  # type: ignore[arg-type]
            log_level="warning",
        )
        engine = EngineClient(config)
        await engine.start()
        try:
            loaded = Loaded(engine, options)
            found: dict[str, dict[str, list[Window]]] = {}
            for load in options.loads:
                found[load] = {"off": [], "on": []}
                rate = served_per_second(found["full"]["off"]) / options.output / 2 if load == "half" else 0.0
                for round_ in range(options.rounds):
                    for state in ("off", "on") if load != "none" else ("on",):
                        found[load][state].append(await loaded.measure(load, rate, round_, training=state == "on"))
                        print(load, state, quanta(engine.stats), file=sys.stderr, flush=True)
            return found
        finally:
            await engine.stop()


def served_per_second(windows: Sequence[Window]) -> float:
    all_ = joined(windows)
    return all_.served / all_.seconds


def quanta(stats: Stats) -> str:
    """Number and mean milliseconds of quanta so far, by kind."""
    counts, seconds = stats.training_quanta_total, stats.training_seconds_total
    return ", ".join(f"{kind} {count} of {1e3 * seconds[kind] / count:.1f} ms" for kind, count in counts.items())


def rows(found: dict[str, dict[str, list[Window]]]) -> list[list[str]]:
    """The table, a row for each load with and without a run, and what the run changed."""
    lines = []
    for load, states in found.items():
        for state, windows in states.items():
            if windows:
                all_ = joined(windows)
                parts = (all_.served / all_.seconds, all_.trained / all_.seconds, 100 * all_.training / all_.seconds)
                gaps = [all_.gap(quantile) for quantile in (0.5, 0.99, 1.0)]
                lines.append([f"{load}, {state}", *(number(value, 1) for value in (*gaps, *parts))])
        if states["off"]:
            off, on = joined(states["off"]), joined(states["on"])
            ratios = [on.gap(quantile) / off.gap(quantile) for quantile in (0.5, 0.99, 1.0)]
            served = served_per_second(states["on"]) / served_per_second(states["off"])
            lines.append([f"{load}, on ÷ off", *(number(ratio, 2) for ratio in ratios), number(served, 2), "", ""])
    return lines


def record(windows: Sequence[Window]) -> dict[str, Any]:
    all_ = joined(windows)
    figures: dict[str, Any] = {key: value for key, value in asdict(all_).items() if key != "gaps"}
    return figures | {"gap_ms": {str(each): all_.gap(each) for each in (0.5, 0.9, 0.99, 0.999, 1.0) if all_.gaps}}


def main(arguments: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of a checkpoint (bench.make_model makes one)")
    parser.add_argument("--loads", nargs="+", choices=LOADS, default=LOADS, help="half needs full before it")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--output", type=int, default=128, help="tokens of an answer")
    parser.add_argument("--length", type=int, default=128, help="tokens of a sequence to train on")
    parser.add_argument("--batch", type=int, default=8, help="sequences of an optimizer step")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--memory", default="2GiB", help="--training-memory")
    parser.add_argument("--share", type=float, default=0.003, help="--training-share")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=12.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=2, help="measurements of each kind")
    parser.add_argument("--seed", type=int, default=0)
    add_png_option(parser)
    options = parser.parse_args(given)
    if "half" in options.loads and "full" not in options.loads[: options.loads.index("half")]:
        parser.error("half load is half of full load, which has to be measured before it")
    found = asyncio.run(run(options))
    print(
        table(
            ["load, run", "gap P50 ms", "P99 ms", "longest ms", "served tokens/s", "trained tokens/s", "% of the time"],
            rows(found),
        )
    )
    figures = {
        load: {state: record(windows) for state, windows in states.items() if windows} for load, states in found.items()
    }
    settings = {key: value for key, value in vars(options).items() if key not in ("model", "png")}
    content = {
        "bench": "training_beside_serving",
        "machine": describe(),
        "arguments": given,
        "settings": settings,
        "loads": figures,
    }
    line = json_line(content)
    print(line)
    write_png(line, options.png)
    return 0


if __name__ == "__main__":
    sys.exit(main())
