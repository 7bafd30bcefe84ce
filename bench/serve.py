"""Load on an OpenAI-style server over HTTP: throughput, time to first token, gaps between tokens.

    python bench/serve.py --start "MODEL --adapters DIR" --mix none,one,distinct
    python bench/serve.py --url http://127.0.0.1:8000 --adapter-field model --mix none,zipf --rate 2
    python bench/serve.py laws --folder .bench/qwen2.5-0.5b

The mixes of one call take turns, forwards then backwards, so that a machine that changes its mind hurts all alike.
Tokens are counted by the server's own usage. The last line printed is JSON. `laws` measures the laws of speed that this
kind of load can decide (see `bench/laws.py`).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shlex
import sys
import urllib.request
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from itertools import count
from pathlib import Path
from typing import get_args

if __package__ in (None, ""):  # started as a file: the repository's root belongs on the path, not this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from bench.client import Server
from bench.launch import launched
from bench.load import Load, Mix, Summary, run, summarise
from bench.machine import describe
from bench.report import failures, json_line, record, summary_table


def compare(
    targets: dict[str, tuple[Server, Load]], *, repeats: int, warm_up: int, seed: int = 0
) -> dict[str, list[Summary]]:
    """Run several loads in turns; each repeat turns the order round.

    Args:
        targets: by the scenario's name. Prompts are new in every run, so no prefix cache helps; the rest of a repeat's
            work is the same for all.
        warm_up: requests of each load, of few tokens, before anything is measured.
    """
    found: dict[str, list[Summary]] = {name: [] for name in targets}
    salt = count()
    if warm_up:
        for server, load in targets.values():
            asyncio.run(run(server, replace(load, requests=warm_up, rate=None, output=(4, 4), salt=next(salt))))
    for repeat in range(repeats):
        for name in list(targets) if repeat % 2 == 0 else reversed(targets):
            server, load = targets[name]
            timings = asyncio.run(run(server, replace(load, seed=seed + repeat, salt=next(salt))))
            found[name].append(summarise(timings))
            print(f"# {repeat + 1}/{repeats} {name}: {found[name][-1].throughput:.1f} tok/s", file=sys.stderr)
    return found


def span(text: str) -> tuple[int, int]:
    """`64` or `32-96`, both ends included."""
    low, _, high = text.partition("-")
    return int(low), int(high or low)


def mixes(text: str) -> list[Mix]:
    found = [mix for mix in get_args(Mix) if mix in text.split(",")]
    if set(found) != set(text.split(",")):
        raise argparse.ArgumentTypeError(f"mixes are {', '.join(get_args(Mix))}")
    return sorted(found, key=text.split(",").index)


def load_arguments(parser: argparse.ArgumentParser) -> None:
    """What both modes know of a load."""
    parser.add_argument("--clients", type=int, default=8, help="of the closed loop")
    parser.add_argument("--prompt", type=span, default=(64, 64), help="tokens of a prompt: 64 or 32-96")
    parser.add_argument("--output", type=span, default=(64, 64), help="new tokens: 64 or 32-96")
    parser.add_argument("--requests", type=int, default=24, help="of one run")
    parser.add_argument("--seconds", type=float, default=120, help="after which a run begins no more requests")
    parser.add_argument("--timeout", type=float, default=300, help="seconds that one request may take")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--warm-up", type=int, default=None, help="requests of each load first (default: one a client)")
    parser.add_argument("--token-ids", type=span, default=(300, 1999), help="range that prompts are drawn from")
    parser.add_argument("--seed", type=int, default=0)


def load_of(args: argparse.Namespace) -> Load:
    return Load(
        clients=args.clients,
        prompt=args.prompt,
        output=args.output,
        requests=args.requests,
        seconds=args.seconds,
        timeout=args.timeout,
        token_ids=args.token_ids,
    )


def discover(url: str, api_key: str | None) -> tuple[str, list[str]]:
    """The base's name and the adapters', as `/v1/models` lists them."""
    headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
    with urllib.request.urlopen(urllib.request.Request(f"{url}/v1/models", headers=headers), timeout=60) as answer:
        models = [model["id"] for model in json.load(answer)["data"]]
    return models[0], models[1:]


def main(arguments: Sequence[str] | None = None) -> None:
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["laws"]:
        from bench import laws  # needs this module

        laws.main(given[1:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--url", help="of a server that runs")
    where.add_argument("--start", metavar="ARGS", help="start `lora-serve serve ARGS` for the length of the run")
    parser.add_argument("--model", help="the base's name (default: the first of /v1/models)")
    parser.add_argument("--adapters", help="names, comma separated (default: the rest of /v1/models)")
    parser.add_argument("--adapter-field", choices=("adapter", "model"), default="adapter", help="how one is named")
    parser.add_argument("--api-key")
    parser.add_argument("--mix", type=mixes, default=["none"], help=f"of {','.join(get_args(Mix))}; comma separated")
    parser.add_argument("--alpha", type=float, default=1.0, help="exponent of zipf")
    parser.add_argument("--rate", type=float, help="requests a second: an open loop instead of --clients")
    load_arguments(parser)
    args = parser.parse_args(given)
    with launched(shlex.split(args.start)) if args.start else nullcontext(args.url.rstrip("/")) as url:
        base, listed = discover(url, args.api_key) if args.model is None or args.adapters is None else ("", [])
        server = Server(url, args.model or base, args.adapter_field, args.api_key)
        adapters = tuple(listed if args.adapters is None else args.adapters.split(","))
        load = replace(load_of(args), rate=args.rate, alpha=args.alpha, adapters=adapters)
        results = compare(
            {mix: (server, replace(load, mix=mix)) for mix in args.mix},
            repeats=args.repeats,
            warm_up=args.clients if args.warm_up is None else args.warm_up,
            seed=args.seed,
        )
    print(summary_table(results))
    for line in failures(results):
        print(line)
    sizes = asdict(replace(load, adapters=())) | {"adapters": len(adapters), "repeats": args.repeats}
    print(
        json_line(
            {"bench": "serve", "machine": describe(), "arguments": given, "load": sizes, "results": record(results)}
        )
    )


if __name__ == "__main__":
    main()
