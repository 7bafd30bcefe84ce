"""Whether a server's answers are valid for the schemas of the JSON-Schema-Test-Suite that it accepts.

    python -m bench.structured_output.schema_answers --suite JSON-Schema-Test-Suite/tests/draft2020-12 \
        --url http://127.0.0.1:8000 --adapters ,shout,json

Each schema is asked for as `response_format`, sampled with temperature 1, with each of the adapters in turn (an empty
name is the base). Complete answers are judged by the package jsonschema; one that was cut off by `max_tokens` is
counted apart. Prints one line of JSON; the exit status is 1 if an answer was invalid, or a status neither 200 nor 400.
"""

from __future__ import annotations

import argparse
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import jsonschema

from bench.report import json_line
from bench.structured_output.schema_suite import groups


def outcome(client: httpx.Client, name: str, schema: dict[str, Any], adapter: str, seed: int, tokens: int) -> str:
    """What became of one request: refused, cut off, valid, or a description of the fault."""
    form = {"type": "json_schema", "json_schema": {"name": "suite", "schema": schema}}
    body = {"messages": [{"role": "user", "content": "Answer."}], "response_format": form, "max_tokens": tokens}
    answer = client.post("/v1/chat/completions", json=body | {"seed": seed, "adapter": adapter or None})
    if answer.status_code == 400:
        return "refused"
    if answer.status_code != 200:
        return f"{name}: status {answer.status_code}"
    choice = answer.json()["choices"][0]
    if choice["finish_reason"] == "length":
        return "cut off"
    text = choice["message"]["content"]
    try:
        jsonschema.Draft202012Validator(schema).validate(json.loads(text))
    except (ValueError, jsonschema.ValidationError) as error:
        return f"{name}: {text[:100]!r} is invalid: {str(error).splitlines()[0]}"
    return "valid"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", type=Path, required=True)
    parser.add_argument("--url", required=True)
    parser.add_argument("--adapters", default="", help="comma-separated; an empty name is the base")
    parser.add_argument("--tokens", type=int, default=200)
    arguments = parser.parse_args()
    adapters = arguments.adapters.split(",")
    asked = [(name, schema) for name, schema, _ in groups(arguments.suite) if isinstance(schema, dict)]
    with httpx.Client(base_url=arguments.url, timeout=120) as client, ThreadPoolExecutor(8) as pool:
        found = [
            pool.submit(outcome, client, name, schema, adapters[seed % len(adapters)], seed, arguments.tokens)
            for seed, (name, schema) in enumerate(asked)
        ]
        outcomes = [each.result() for each in found]
    counts = {kind: outcomes.count(kind) for kind in ("valid", "refused", "cut off")}
    faults = [each for each in outcomes if each not in counts]
    print(json_line({"schemas": len(asked), **counts, "faults": faults}))
    return int(bool(faults))


if __name__ == "__main__":
    raise SystemExit(main())
