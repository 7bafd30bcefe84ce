"""Throughput, TTFT, memory and idle CPU of several servers under the same load, run in turns.

    python -m bench.peers.compare --start "ours=lora-serve serve MODEL --adapters DIR --port {port}" \\
        --start "vllm=env VLLM_CPU_KVCACHE_SPACE=2 vllm serve MODEL --enable-lora … --port {port}" --clients 8,1

Works with any server that has `/v1/models` and streams `/v1/completions`; `bench/peers/README.md` says how to start
some. All servers stay up for the whole comparison, one at a time gets requests, and the order is reversed on every
second repeat. A server that uses CPU while idle slows the others down, so its idle CPU is printed too.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from typing import get_args

from bench.machine import describe
from bench.peers.peer_server import Peer, started_peer
from bench.png_plots import add_png_option, write_png
from bench.report import json_line, number, table
from bench.serving.client import Server, list_models
from bench.serving.load import Load, Mix, add_load_arguments, load_from, mixes, run_interleaved
from bench.serving.summary import Summary, failures, medians, records, summary_table

FIELDS = ("model", "adapter")  # request field that selects an adapter; most servers know the first only
SETTLE, IDLE = 1.0, 5.0  # seconds after the last load, and of the measurement of idle CPU
BUSY = 0.05  # of one core: a server that uses more while idle is reported


@dataclass(frozen=True)
class Footprint:
    """Seconds from a server's command to its first answer, bytes of memory, CPU cores used while idle."""

    ready: float
    memory: float
    idle: float


def scenarios(
    servers: Mapping[str, Server], adapters: Mapping[str, tuple[str, ...]], loads: Mapping[str, Load]
) -> dict[str, tuple[Server, Load]]:
    """The runs, by `SERVER LOAD`: for each load, the servers one after the other.

    A server without adapters only gets the loads on the base.
    """
    return {
        f"{name} {kind}": (server, replace(load, adapters=adapters[name]))
        for kind, load in loads.items()
        for name, server in servers.items()
        if load.mix == "none" or adapters[name]
    }


def footprints(peers: Mapping[str, Peer]) -> dict[str, Footprint]:
    """Footprints of all servers, while none has requests."""
    time.sleep(SETTLE)
    begin, before = time.monotonic(), {name: peer.cpu() for name, peer in peers.items()}
    time.sleep(IDLE)
    seconds = time.monotonic() - begin
    used = {name: peer.cpu() - before[name] for name, peer in peers.items()}
    return {name: Footprint(peer.ready, peer.memory(), used[name] / seconds) for name, peer in peers.items()}


def side_by_side(
    results: Mapping[str, Sequence[Summary]], footprints: Mapping[str, Footprint], kinds: Sequence[str]
) -> str:
    """A table with one row per server and one column per load: tokens per second · median TTFT in seconds."""

    def cell(runs: Sequence[Summary]) -> str:
        found = medians(runs)
        return f"{number(found['throughput'], 1)} · {number(found['ttft_median'], 2)}"

    rows = [
        [
            name,
            *(cell(results[f"{name} {kind}"]) if f"{name} {kind}" in results else "–" for kind in kinds),
            number(cost.ready, 0),
            number(cost.memory / 1e9, 2),
            number(100 * cost.idle, 1),
        ]
        for name, cost in footprints.items()
    ]
    return table(["tok/s · TTFT s", *kinds, "ready s", "memory GB", "idle CPU %"], rows)


def named(text: str) -> tuple[str, str]:
    """Parse `NAME=VALUE`; the value may contain further equals signs."""
    name, _, value = text.partition("=")
    if not (name and value):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    return name, value


def named_command(text: str) -> tuple[str, str]:
    """Parse `NAME=COMMAND`, which has to contain `{port}`."""
    name, value = named(text)
    if "{port}" not in value:
        raise argparse.ArgumentTypeError(f"the command of {name} has no {{port}}")
    return name, value


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line; `server`, `start`, `model` and `adapter_field` become dicts by the server's name."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, conflict_handler="resolve"
    )
    for option, metavar, read, meaning in (
        ("--server", "NAME=URL", named, "a running server"),
        ("--start", "NAME=COMMAND", named_command, "a server to start; {port} is replaced"),
        ("--model", "NAME=ID", named, "the base's name there (default: the first of /v1/models)"),
        (
            "--adapter-field",
            "NAME=FIELD",
            named,
            f"field that selects an adapter: {' or '.join(FIELDS)} (default: model)",
        ),
    ):
        parser.add_argument(option, metavar=metavar, type=read, action="append", default=[], help=meaning)
    parser.add_argument("--mix", type=mixes, default=["none", "one", "distinct"], help=", ".join(get_args(Mix)))
    add_load_arguments(parser)
    parser.add_argument("--clients", type=numbers, default=[8, 1], help="clients of the closed loops, comma-separated")
    parser.add_argument("--requests", type=int, default=3, help="requests per client and run")
    add_png_option(parser)
    args = parser.parse_args(arguments)
    names = [name for name, _ in args.server + args.start]
    if not names or len(set(names)) < len(names):
        parser.error("name some servers with --server and --start, each once")
    for option in ("server", "start", "model", "adapter_field"):
        given = dict(getattr(args, option))
        if not set(given) <= set(names):
            parser.error(f"--{option.replace('_', '-')} names a server that is not there")
        setattr(args, option, given)
    if not set(args.adapter_field.values()) <= set(FIELDS):
        parser.error(f"an adapter is named by one of the fields {', '.join(FIELDS)}")
    return args


def numbers(text: str) -> list[int]:
    """Parse a comma-separated list of integers."""
    return [int(each) for each in text.split(",")]


def loads_of(args: argparse.Namespace) -> dict[str, Load]:
    """The loads, by `MIX ×CLIENTS`; `distinct` with one client is left out, being the same as `one`."""
    load = load_from(args)
    return {
        f"{mix} ×{clients}": replace(load, mix=mix, clients=clients, requests=clients * args.requests)
        for clients in args.clients
        for mix in args.mix
        if (mix, clients) != ("distinct", 1)
    }


def measure(
    args: argparse.Namespace, loads: Mapping[str, Load]
) -> tuple[dict[str, list[Summary]], dict[str, Footprint]]:
    """All runs by scenario, and each server's footprint."""
    with ExitStack() as stack:
        peers = {name: Peer(url.rstrip("/")) for name, url in args.server.items()}
        for name, start in args.start.items():
            peers[name] = stack.enter_context(started_peer(start))
            print(f"# {name} answers after {peers[name].ready:.1f} s", file=sys.stderr)
        servers, adapters = {}, {}
        for name, peer in peers.items():
            base, listed = list_models(peer.url)
            field = args.adapter_field.get(name, "model")
            servers[name], adapters[name] = Server(peer.url, args.model.get(name, base), field), tuple(listed)
        return run_interleaved(
            scenarios(servers, adapters, loads),
            repeats=args.repeats,
            warm_up=max(args.clients) if args.warm_up is None else args.warm_up,
            seed=args.seed,
        ), footprints(peers)


def main(arguments: Sequence[str] | None = None) -> None:
    given = list(sys.argv[1:] if arguments is None else arguments)
    args = parse(given)
    loads = loads_of(args)
    results, costs = measure(args, loads)
    print(summary_table(results), side_by_side(results, costs, list(loads)), sep="\n\n")
    for line in failures(results):
        print(line)
    for name, cost in costs.items():
        if cost.idle > BUSY:
            print(f"{name} uses {cost.idle:.2f} cores while idle, which slowed the other servers down")
    content = {
        "bench": "compare",
        "machine": describe(),
        "arguments": given,
        "loads": {kind: asdict(load) for kind, load in loads.items()},
        "footprints": {name: asdict(cost) for name, cost in costs.items()},
        "results": records(results),
    }
    line = json_line(content)
    print(line)
    write_png(line, args.png)


if __name__ == "__main__":
    main()
