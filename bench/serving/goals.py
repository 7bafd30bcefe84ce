"""Performance goals of serving, each measured beside its target: adapter overhead, memory, roofline, HTTP overhead.

    python -m bench.serving.goals --folder .bench/qwen2.5-0.5b

The folder is what `bench.make_model` wrote, with at least as many adapters as there are clients. Goals 1 and 2 compare
loads on one server; 3 compares it with a second server without adapters; 12 compares it with the engine in a process of
its own (`bench.serving.engine_throughput`), which also gives 9 and 11. All run in turns within every repeat, with the
same lengths and other tokens. A missed target is printed like any other.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from itertools import count
from pathlib import Path
from typing import Any

from bench.machine import describe
from bench.png_plots import add_png_option, write_png
from bench.report import Goal, goal_records, goal_table, json_line
from bench.serving.client import Server, list_models
from bench.serving.launch import launched
from bench.serving.load import Load, Mix, add_load_arguments, load_from, run
from bench.serving.summary import Summary, failures, records, summarise, summary_table

PLAIN = "plain base"  # the scenario on the server without adapters
GOALS = (1, 2, 3, 9, 11, 12)


def evaluate(
    over_http: dict[str, list[Summary]], in_process: list[dict[str, Any]], wanted: Sequence[int]
) -> list[Goal]:
    """The wanted goals, from the HTTP runs by scenario and the JSON of each in-process run."""

    def http(name: str) -> float:
        return statistics.median(run.throughput for run in over_http[name])

    def engine(mix: str) -> float:
        return statistics.median(float(each["engine"][mix]) for each in in_process)

    def ratio(above: float, below: float) -> str:
        return f"{above:.1f} ÷ {below:.1f} tok/s"

    def mixed_batch() -> list[Goal]:
        above, below = http("distinct"), http("one")
        return [Goal(1, "mixed batch: all distinct ÷ all same", above / below, 0.95, ratio(above, below))]

    def overhead() -> list[Goal]:
        above, below = http("one"), http("none")
        return [Goal(2, "adapter overhead: one adapter ÷ base", above / below, 0.90, ratio(above, below))]

    def idle_overhead() -> list[Goal]:
        above, below = http("none"), http(PLAIN)
        return [Goal(3, "idle overhead: base with adapters loaded ÷ without", above / below, 0.99, ratio(above, below))]

    def memory() -> list[Goal]:
        seen = next(each["memory"] for each in in_process if "memory" in each)
        returned = f"{seen['freed']:,} ÷ {seen['taken']:,} bytes, {seen['adapters']} adapters"
        return [
            Goal(9, "memory: bytes ÷ file bytes", seen["bytes_over_file"], 1.05, "worst adapter", at_most=True),
            Goal(9, "memory: freed ÷ taken", seen["freed"] / seen["taken"], 1.0, returned),
        ]

    def roofline() -> list[Goal]:
        found = []
        for kind in ("none", "distinct"):
            steps = [each["decode"][kind] for each in in_process if kind in each["decode"]]
            if steps:
                middle = sorted(steps, key=lambda step: float(step["ratio"]))[len(steps) // 2]
                of = (
                    f"{1e3 * middle['step']:.1f} ÷ {1e3 * middle['floor']:.1f} ms, {middle['bandwidth'] / 1e9:.1f} GB/s"
                )
                found.append(Goal(11, f"roofline: decode step, {kind}", middle["ratio"], 1.4, of, at_most=True))
        return found

    def http_overhead() -> list[Goal]:
        above, below = http("distinct"), engine("distinct")
        return [Goal(12, "HTTP overhead: HTTP ÷ engine in process", above / below, 0.97, ratio(above, below))]

    by_number: dict[int, Callable[[], list[Goal]]] = {
        1: mixed_batch,
        2: overhead,
        3: idle_overhead,
        9: memory,
        11: roofline,
        12: http_overhead,
    }
    return [goal for number, goals in by_number.items() if number in wanted for goal in goals()]


def measure(args: argparse.Namespace) -> tuple[dict[str, list[Summary]], list[dict[str, Any]]]:
    """Run what the wanted goals need; returns the HTTP runs by scenario and the in-process results."""
    load = replace(load_from(args), adapters=tuple(sorted(path.name for path in (args.folder / "adapters").iterdir())))
    wanted = set(args.goals)
    over_http: dict[str, list[Summary]] = {}
    in_process: list[dict[str, Any]] = []
    with ExitStack() as stack:
        turns: dict[str, Callable[[int], None]] = {}
        salt = count()

        def add(name: str, url: str, mix: Mix) -> None:
            server = Server(url, list_models(url)[0])
            over_http[name] = []

            def once(load: Load) -> Summary:
                return summarise(asyncio.run(run(server, replace(load, mix=mix, salt=next(salt)))))

            def turn(repeat: int) -> None:
                over_http[name].append(once(replace(load, seed=args.seed + repeat)))
                print(f"# {name}: {over_http[name][-1].throughput:.1f} tok/s", file=sys.stderr)

            once(replace(load, requests=args.clients if args.warm_up is None else args.warm_up, output=(4, 4)))
            turns[name] = turn

        if wanted & {3}:
            add(PLAIN, stack.enter_context(_server(stack, args, adapters=False)), "none")
        if wanted & {1, 2, 3, 12}:
            url = stack.enter_context(_server(stack, args, adapters=True))
            for mix in _mixes(wanted):
                add(mix, url, mix)
        if wanted & {9, 11, 12}:
            turns["in process"] = lambda repeat: in_process.append(_run_in_process(args, repeat))
        for repeat in range(args.repeats):
            for name in list(turns) if repeat % 2 == 0 else reversed(list(turns)):
                turns[name](repeat)
    return over_http, in_process


def _mixes(wanted: set[int]) -> list[Mix]:
    # Distinct comes first: its warm-up loads the adapters that goal 3 needs on the device.
    needs: dict[Mix, set[int]] = {"distinct": {1, 3, 12}, "one": {1, 2}, "none": {2, 3}}
    return [mix for mix, goals in needs.items() if goals & wanted]


def _server(stack: ExitStack, args: argparse.Namespace, *, adapters: bool) -> Any:
    store = stack.enter_context(tempfile.TemporaryDirectory())
    more = ["--adapters", str(args.folder / "adapters")] if adapters else []
    return launched([str(args.folder / "model"), "--store", store, *more, *shlex.split(args.serve)])


def _run_in_process(args: argparse.Namespace, repeat: int) -> dict[str, Any]:
    """The JSON of one run of `bench.serving.engine_throughput` with the same load."""
    load = load_from(args)
    options = {
        "--folder": args.folder,
        "--serve": args.serve,
        "--mix": "none,distinct" if 11 in args.goals else "distinct",
        "--clients": load.clients,
        "--prompt": "{}-{}".format(*load.prompt),
        "--output": "{}-{}".format(*load.output),
        "--requests": load.requests,
        "--seconds": load.seconds,
        "--token-ids": "{}-{}".format(*load.token_ids),
        "--seed": args.seed + repeat,
    }
    command = [
        sys.executable,
        "-m",
        "bench.serving.engine_throughput",
        *(f"{name}={value}" for name, value in options.items()),
    ]
    if 9 in args.goals and repeat == 0:
        command.append("--memory")
    limit = 3 * (load.seconds + load.timeout)
    done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
    if done.returncode:
        raise RuntimeError(f"the engine failed in process:\n{done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(f"# in process: {result['engine']}", file=sys.stderr)
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="what bench.make_model wrote")
    parser.add_argument("--goals", type=lambda text: [int(each) for each in text.split(",")], default=list(GOALS))
    parser.add_argument("--serve", default="", metavar="ARGS", help="further options of `lora-serve serve`")
    add_load_arguments(parser)
    add_png_option(parser)
    args = parser.parse_args(given)
    if not set(args.goals) <= set(GOALS):
        parser.error(f"goals are {', '.join(map(str, GOALS))}")
    args.folder = args.folder.resolve()
    over_http, in_process = measure(args)
    goals = evaluate(over_http, in_process, args.goals)
    if over_http:
        print(summary_table(over_http), end="\n\n")
    print(goal_table(goals))
    for line in failures(over_http):
        print(line)
    content = {
        "bench": "goals",
        "machine": describe(),
        "arguments": given,
        "load": asdict(load_from(args)) | {"repeats": args.repeats},
        "goals": goal_records(goals),
        "results": records(over_http),
        "in_process": in_process,
    }
    line = json_line(content)
    print(line)
    write_png(line, args.png)


if __name__ == "__main__":
    main()
