"""The laws of speed that a load on one machine decides, each measured beside its goal.

    python bench/serve.py laws --folder .bench/qwen2.5-0.5b

needs a folder that `bench/make_model.py` made with at least as many adapters as there are clients. Laws 1 and 2 compare
loads on one server; 3 compares it with a second one that was started without adapters; 12 compares it with the engine
in a process of its own (`bench/inprocess.py`), which also gives 9 and 11. All take turns within every repeat and get
the same lengths, with other tokens. A figure that misses its goal is printed like any other.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

from bench.client import Server
from bench.launch import launched
from bench.load import Load, Mix, Summary, run, summarise
from bench.machine import describe
from bench.report import failures, json_line, number, record, summary_table, table
from bench.serve import discover, load_arguments, load_of

PLAIN = "plain base"  # the scenario on the server without adapters
LAWS = (1, 2, 3, 9, 11, 12)


@dataclass(frozen=True)
class Law:
    """One measured law; it holds if `value` is at least (or `most`: at most) `goal`."""

    number: int
    name: str
    value: float
    goal: float
    of: str
    most: bool = False

    @property
    def holds(self) -> bool:
        return self.value <= self.goal if self.most else self.value >= self.goal


def judge(over_http: dict[str, list[Summary]], inside: list[dict[str, Any]], wanted: Sequence[int]) -> list[Law]:
    """The laws from what was measured: HTTP runs by scenario, and each in-process run's JSON."""

    def http(name: str) -> float:
        return statistics.median(run.throughput for run in over_http[name])

    def engine(mix: str) -> float:
        return statistics.median(float(each["engine"][mix]) for each in inside)

    def ratio(above: float, below: float) -> str:
        return f"{above:.1f} ÷ {below:.1f} tok/s"

    def mix() -> list[Law]:
        above, below = http("distinct"), http("one")
        return [Law(1, "mix: all distinct ÷ all same", above / below, 0.95, ratio(above, below))]

    def tax() -> list[Law]:
        above, below = http("one"), http("none")
        return [Law(2, "tax: one adapter ÷ base", above / below, 0.90, ratio(above, below))]

    def idle() -> list[Law]:
        above, below = http("none"), http(PLAIN)
        return [Law(3, "idle tax: base with adapters loaded ÷ without", above / below, 0.99, ratio(above, below))]

    def memory() -> list[Law]:
        seen = next(each["memory"] for each in inside if "memory" in each)
        returned = f"{seen['freed']:,} ÷ {seen['taken']:,} bytes, {seen['adapters']} adapters"
        return [
            Law(9, "memory: bytes ÷ file bytes", seen["bytes_over_file"], 1.05, "worst adapter", most=True),
            Law(9, "memory: freed ÷ taken", seen["freed"] / seen["taken"], 1.0, returned),
        ]

    def floors() -> list[Law]:
        found = []
        for kind in ("none", "distinct"):
            steps = [each["decode"][kind] for each in inside if kind in each["decode"]]
            if steps:
                middle = sorted(steps, key=lambda step: float(step["ratio"]))[len(steps) // 2]
                of = (
                    f"{1e3 * middle['step']:.1f} ÷ {1e3 * middle['floor']:.1f} ms, {middle['bandwidth'] / 1e9:.1f} GB/s"
                )
                found.append(Law(11, f"floor: decode step, {kind}", middle["ratio"], 1.4, of, most=True))
        return found

    def server() -> list[Law]:
        above, below = http("distinct"), engine("distinct")
        return [Law(12, "server: HTTP ÷ engine in process", above / below, 0.97, ratio(above, below))]

    each: dict[int, Callable[[], list[Law]]] = {1: mix, 2: tax, 3: idle, 9: memory, 11: floors, 12: server}
    return [law for number, judged in each.items() if number in wanted for law in judged()]


def law_table(laws: Sequence[Law]) -> str:
    rows = [
        [
            f"{law.number} {law.name}",
            law.of,
            number(law.value, 3),
            f"{'≤' if law.most else '≥'} {law.goal:g}",
            "yes" if law.holds else "no",
        ]
        for law in laws
    ]
    return table(["law", "of", "measured", "goal", "holds"], rows)


def measure(args: argparse.Namespace) -> tuple[dict[str, list[Summary]], list[dict[str, Any]]]:
    """Everything that the wanted laws need: HTTP runs by scenario, and in-process results."""
    load = replace(load_of(args), adapters=tuple(sorted(path.name for path in (args.folder / "adapters").iterdir())))
    wanted = set(args.laws)
    over_http: dict[str, list[Summary]] = {}
    inside: list[dict[str, Any]] = []
    with ExitStack() as stack:
        rotation: dict[str, Callable[[int], None]] = {}

        salt = count()

        def add(name: str, url: str, mix: Mix) -> None:
            server = Server(url, discover(url, None)[0])
            over_http[name] = []

            def once(load: Load) -> Summary:
                return summarise(asyncio.run(run(server, replace(load, mix=mix, salt=next(salt)))))

            def turn(repeat: int) -> None:
                over_http[name].append(once(replace(load, seed=args.seed + repeat)))
                print(f"# {name}: {over_http[name][-1].throughput:.1f} tok/s", file=sys.stderr)

            once(replace(load, requests=args.clients if args.warm_up is None else args.warm_up, output=(4, 4)))
            rotation[name] = turn

        if wanted & {3}:
            add(PLAIN, stack.enter_context(_server(stack, args, adapters=False)), "none")
        if wanted & {1, 2, 3, 12}:
            url = stack.enter_context(_server(stack, args, adapters=True))
            for mix in _mixes(wanted):
                add(mix, url, mix)
        if wanted & {9, 11, 12}:
            rotation["in process"] = lambda repeat: inside.append(_inside(args, repeat))
        for repeat in range(args.repeats):
            for name in list(rotation) if repeat % 2 == 0 else reversed(rotation):
                rotation[name](repeat)
    return over_http, inside


def _mixes(wanted: set[int]) -> list[Mix]:
    # Distinct comes first: its warm-up brings the adapters onto the device that law 3 wants there.
    needs: dict[Mix, set[int]] = {"distinct": {1, 3, 12}, "one": {1, 2}, "none": {2, 3}}
    return [mix for mix, laws in needs.items() if laws & wanted]


def _server(stack: ExitStack, args: argparse.Namespace, *, adapters: bool) -> Any:
    store = stack.enter_context(tempfile.TemporaryDirectory())
    more = ["--adapters", str(args.folder / "adapters")] if adapters else []
    return launched([str(args.folder / "model"), "--store", store, *more, *shlex.split(args.serve)])


def _inside(args: argparse.Namespace, repeat: int) -> dict[str, Any]:
    """One run of `bench.inprocess`, with the load of this one."""
    load = load_of(args)
    kept = {
        "--folder": args.folder,
        "--serve": args.serve,
        "--mix": "none,distinct" if 11 in args.laws else "distinct",
        "--clients": load.clients,
        "--prompt": "{}-{}".format(*load.prompt),
        "--output": "{}-{}".format(*load.output),
        "--requests": load.requests,
        "--seconds": load.seconds,
        "--token-ids": "{}-{}".format(*load.token_ids),
        "--seed": args.seed + repeat,
    }
    command = [sys.executable, "-m", "bench.inprocess", *(f"{name}={value}" for name, value in kept.items())]
    if 9 in args.laws and repeat == 0:
        command.append("--memory")
    root = Path(__file__).resolve().parents[1]
    limit = 3 * (load.seconds + load.timeout)
    done = subprocess.run(command, capture_output=True, text=True, timeout=limit, env=_environment(root))
    if done.returncode:
        raise RuntimeError(f"the engine failed in process:\n{done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(f"# in process: {result['engine']}", file=sys.stderr)
    return result


def _environment(root: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH", "")]))}


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="serve.py laws", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True, help="what bench/make_model.py made")
    parser.add_argument("--laws", type=lambda text: [int(each) for each in text.split(",")], default=list(LAWS))
    parser.add_argument("--serve", default="", metavar="ARGS", help="further options of `lora-serve serve`")
    load_arguments(parser)
    args = parser.parse_args(arguments)
    if not set(args.laws) <= set(LAWS):
        parser.error(f"this bench measures the laws {', '.join(map(str, LAWS))}")
    args.folder = args.folder.resolve()
    over_http, inside = measure(args)
    laws = judge(over_http, inside, args.laws)
    if over_http:
        print(summary_table(over_http), end="\n\n")
    print(law_table(laws))
    for line in failures(over_http):
        print(line)
    content = {
        "bench": "laws",
        "machine": describe(),
        "arguments": list(arguments),
        "load": asdict(load_of(args)) | {"repeats": args.repeats},
        "laws": [asdict(law) | {"holds": law.holds} for law in laws],
        "results": record(over_http),
        "inside": inside,
    }
    print(json_line(content))
