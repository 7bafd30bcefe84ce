"""Servers side by side: the same work for each, in turns, by the same client.

    python bench/compare.py --start "ours=lora-serve serve MODEL --adapters DIR --port {port}" \\
        --start "vllm=env VLLM_CPU_KVCACHE_SPACE=2 vllm serve MODEL --enable-lora … --port {port}" --clients 8,1

Any server will do that has `/v1/models` and streams `/v1/completions`; `bench/peers.md` says how some are started. All
stay up from the first run to the last, one at a time has work, and every repeat turns the order round; so what a server
does while it has no work is printed too: one that spins disturbs the others and makes the comparison worthless.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import get_args

if __package__ in (None, ""):  # started as a file: the repository's root belongs on the path, not this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from bench.client import Server
from bench.load import Load, Mix, Summary
from bench.machine import describe
from bench.peer import Peer, started
from bench.report import failures, json_line, medians, number, record, summary_table, table
from bench.serve import compare, discover, load_arguments, load_of, mixes

FIELDS = ("model", "adapter")  # where a request may name its adapter; most servers know the first only
SETTLE, REST = 1.0, 5.0  # seconds after the last load, and over which a server at rest is watched
SPINS = 0.05  # of one core: more than this at rest is said aloud


@dataclass(frozen=True)
class Cost:
    """What a server takes besides the work: seconds from command to first answer, bytes, cores while it has no work."""

    ready: float
    memory: float
    idle: float


def scenarios(
    servers: Mapping[str, Server], adapters: Mapping[str, tuple[str, ...]], loads: Mapping[str, Load]
) -> dict[str, tuple[Server, Load]]:
    """What is run, by `NAME KIND`: of each kind of load, the servers one after the other.

    A server without adapters has no part in the loads that name them.
    """
    return {
        f"{name} {kind}": (server, replace(load, adapters=adapters[name]))
        for kind, load in loads.items()
        for name, server in servers.items()
        if load.mix == "none" or adapters[name]
    }


def costs(peers: Mapping[str, Peer]) -> dict[str, Cost]:
    """What all servers take now, when none has work."""
    time.sleep(SETTLE)
    begin, before = time.monotonic(), {name: peer.cpu() for name, peer in peers.items()}
    time.sleep(REST)
    seconds = time.monotonic() - begin
    used = {name: peer.cpu() - before[name] for name, peer in peers.items()}
    return {name: Cost(peer.ready, peer.memory(), used[name] / seconds) for name, peer in peers.items()}


def side_by_side(results: Mapping[str, Sequence[Summary]], costs: Mapping[str, Cost], kinds: Sequence[str]) -> str:
    """One row a server, one column a kind of load: tokens a second · median seconds to the first token."""

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
        for name, cost in costs.items()
    ]
    return table(["tok/s · TTFT s", *kinds, "ready s", "memory GB", "idle CPU %"], rows)


def named(text: str) -> tuple[str, str]:
    """`NAME=VALUE`; the value may have further equals signs."""
    name, _, value = text.partition("=")
    if not (name and value):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    return name, value


def command(text: str) -> tuple[str, str]:
    """`NAME=COMMAND` with a place for the port."""
    name, value = named(text)
    if "{port}" not in value:
        raise argparse.ArgumentTypeError(f"the command of {name} has no {{port}}")
    return name, value


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line, checked; `server`, `start`, `model` and `adapter_field` are by a server's name."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, conflict_handler="resolve"
    )
    for option, metavar, read, meaning in (
        ("--server", "NAME=URL", named, "one that runs already"),
        ("--start", "NAME=COMMAND", command, "one to start here; {port} in it is set"),
        ("--model", "NAME=ID", named, "what it calls the base (default: the first of /v1/models)"),
        ("--adapter-field", "NAME=FIELD", named, f"how it is told the adapter: {' or '.join(FIELDS)} (default: model)"),
    ):
        parser.add_argument(option, metavar=metavar, type=read, action="append", default=[], help=meaning)
    parser.add_argument("--mix", type=mixes, default=["none", "one", "distinct"], help=", ".join(get_args(Mix)))
    load_arguments(parser)
    parser.add_argument("--clients", type=numbers, default=[8, 1], help="of the closed loops, comma separated")
    parser.add_argument("--requests", type=int, default=3, help="of each client in one run")
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
    return [int(each) for each in text.split(",")]


def loads_of(args: argparse.Namespace) -> dict[str, Load]:
    """The kinds of load, by `MIX ×CLIENTS`; a lone client's distinct adapters would be `one` again."""
    load = load_of(args)
    return {
        f"{mix} ×{clients}": replace(load, mix=mix, clients=clients, requests=clients * args.requests)
        for clients in args.clients
        for mix in args.mix
        if (mix, clients) != ("distinct", 1)
    }


def measure(args: argparse.Namespace, loads: Mapping[str, Load]) -> tuple[dict[str, list[Summary]], dict[str, Cost]]:
    """All runs by scenario, and what each server takes."""
    with ExitStack() as stack:
        peers = {name: Peer(url.rstrip("/")) for name, url in args.server.items()}
        for name, start in args.start.items():
            peers[name] = stack.enter_context(started(start))
            print(f"# {name} answers after {peers[name].ready:.1f} s", file=sys.stderr)
        servers, adapters = {}, {}
        for name, peer in peers.items():
            base, listed = discover(peer.url, None)
            field = args.adapter_field.get(name, "model")
            servers[name], adapters[name] = Server(peer.url, args.model.get(name, base), field), tuple(listed)
        return compare(
            scenarios(servers, adapters, loads),
            repeats=args.repeats,
            warm_up=max(args.clients) if args.warm_up is None else args.warm_up,
            seed=args.seed,
        ), costs(peers)


def main(arguments: Sequence[str] | None = None) -> None:
    given = list(sys.argv[1:] if arguments is None else arguments)
    args = parse(given)
    loads = loads_of(args)
    results, taken = measure(args, loads)
    print(summary_table(results), side_by_side(results, taken, list(loads)), sep="\n\n")
    for line in failures(results):
        print(line)
    for name, cost in taken.items():
        if cost.idle > SPINS:
            print(f"{name} uses {cost.idle:.2f} cores while it has no work: what was measured beside it is too low")
    content = {
        "bench": "compare",
        "machine": describe(),
        "arguments": given,
        "loads": {kind: asdict(load) for kind, load in loads.items()},
        "costs": {name: asdict(cost) for name, cost in taken.items()},
        "results": record(results),
    }
    print(json_line(content))


if __name__ == "__main__":
    main()
