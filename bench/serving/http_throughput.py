"""Throughput, TTFT and inter-token latency of an OpenAI-compatible server over HTTP, by mix of adapters.

    python -m bench.serving.http_throughput --start "MODEL --adapters DIR" --mix none,one,distinct
    python -m bench.serving.http_throughput --url http://127.0.0.1:8000 --adapter-field model --mix none,zipf --rate 2

The mixes are run in turns, in reverse order on every second repeat, so that noise of the machine affects all alike.
Tokens are counted by the server's `usage`. The last line printed is JSON.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from typing import get_args

from bench.machine import describe
from bench.report import json_line
from bench.serving.client import Server, list_models
from bench.serving.launch import launched
from bench.serving.load import Mix, add_load_arguments, load_from, mixes, run_interleaved
from bench.serving.summary import failures, records, summary_table


def main(arguments: Sequence[str] | None = None) -> None:
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--url", help="of a running server")
    where.add_argument("--start", metavar="ARGS", help="start `lora-serve serve ARGS` for the run")
    parser.add_argument("--model", help="name of the base (default: the first of /v1/models)")
    parser.add_argument("--adapters", help="names, comma-separated (default: the rest of /v1/models)")
    parser.add_argument(
        "--adapter-field", choices=("adapter", "model"), default="adapter", help="request field that selects an adapter"
    )
    parser.add_argument("--api-key")
    parser.add_argument("--mix", type=mixes, default=["none"], help=f"of {','.join(get_args(Mix))}; comma-separated")
    parser.add_argument("--alpha", type=float, default=1.0, help="exponent of zipf")
    parser.add_argument("--rate", type=float, help="requests per second: an open loop instead of --clients")
    add_load_arguments(parser)
    args = parser.parse_args(given)
    with launched(shlex.split(args.start)) if args.start else nullcontext(args.url.rstrip("/")) as url:
        base, listed = list_models(url, args.api_key) if args.model is None or args.adapters is None else ("", [])
        server = Server(url, args.model or base, args.adapter_field, args.api_key)
        adapters = tuple(listed if args.adapters is None else args.adapters.split(","))
        load = replace(load_from(args), rate=args.rate, alpha=args.alpha, adapters=adapters)
        results = run_interleaved(
            {mix: (server, replace(load, mix=mix)) for mix in args.mix},
            repeats=args.repeats,
            warm_up=args.clients if args.warm_up is None else args.warm_up,
            seed=args.seed,
        )
    print(summary_table(results))
    for line in failures(results):
        print(line)
    sizes = asdict(replace(load, adapters=())) | {"adapters": len(adapters), "repeats": args.repeats}
    content = {"machine": describe(), "arguments": given, "load": sizes, "results": records(results)}
    print(json_line({"bench": "http_throughput"} | content))


if __name__ == "__main__":
    main()
