"""What a grammar costs a decode step: the same batch with and without, in pairs of runs on one engine.

    python -m bench.structured_output.decode_step --model .bench/qwen2.5-0.5b/model --rows 8

Rows sample with temperature 1, all of them with the same schema, which holds as long as the run; every run is
`--tokens` steps long. Steps in which not every row decodes exactly one token are left out. Prints one line of JSON:
median step seconds, and the median ratio of the pairs.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from itertools import count
from pathlib import Path
from typing import Any

from bench.report import json_line
from lora_serve.api.openai.structured_output import json_schema_grammar
from lora_serve.config import ServeConfig
from lora_serve.engine.engine import Engine
from lora_serve.messages import Generate
from lora_serve.request import Finished, Request, Sampling, Tokens

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 5},
        "email_address": {"type": "string", "minLength": 5},
        "age": {"type": "integer"},
        "kind": {"enum": ["customer", "employee", "supplier"]},
        "tags": {"type": "array", "items": {"type": "string"}, "minItems": 1},
    },
    "required": ["name", "email_address", "age", "kind", "tags"],
    "additionalProperties": False,
}
SCHEMA = {"type": "array", "items": PERSON, "minItems": 200}
PROMPT = list(range(1000, 1016))

_ids = count()


def run(engine: Engine, rows: int, tokens: int, **options: Any) -> tuple[list[float], float]:
    """Seconds of each full decode step, and tokens per second of the whole run."""
    for row in range(rows):
        params = Sampling(max_tokens=tokens, ignore_eos=True, seed=row, **options)
        engine.receive(Generate(Request(f"{next(_ids)}", PROMPT, params)))
    steps: list[float] = []
    left, seconds, generated = rows, 0.0, 0
    while left:
        update = engine.step()
        for event in update.events:
            if isinstance(event, Finished):
                left -= 1
                if event.failure is not None:
                    raise RuntimeError(event.failure.message)
            elif isinstance(event, Tokens):
                generated += len(event.token_ids)
        if update.step is not None:
            seconds += update.step.seconds
            if update.step.tokens == update.step.sequences == rows:
                steps.append(update.step.seconds)
    return steps, generated / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--pairs", type=int, default=6)
    parser.add_argument("--temperature", type=float, default=1.0)
    arguments = parser.parse_args()
    grammar = json_schema_grammar(SCHEMA, "schema")
    with tempfile.TemporaryDirectory() as folder:
        config = ServeConfig(model=arguments.model, store=Path(folder) / "store", max_model_len=512)
        engine = Engine.build(config, wake=lambda: None, progress=lambda stage, done: None)
        kinds: dict[str, dict[str, Any]] = {"plain": {}, "logprobs": {"logprobs": 0}, "grammar": {"grammar": grammar}}
        # With log-probabilities no token is forced: the cost of masks alone is that of the last beside the second.
        kinds["grammar and logprobs"] = kinds["logprobs"] | kinds["grammar"]
        steps: dict[str, list[float]] = {name: [] for name in kinds}
        rates: dict[str, list[float]] = {name: [] for name in kinds}
        for pair in range(arguments.pairs + 1):
            for name, options in kinds.items():
                found, rate = run(
                    engine, arguments.rows, arguments.tokens, temperature=arguments.temperature, **options
                )
                if pair:  # the first compiles the grammar and records steps
                    steps[name].append(statistics.median(found) if found else float("nan"))
                    rates[name].append(rate)
        engine.close()
    masks = [a / b for a, b in zip(steps["grammar and logprobs"], steps["logprobs"], strict=True)]
    print(
        json_line(
            {
                "rows": arguments.rows,
                "step_seconds": {name: statistics.median(values) for name, values in steps.items()},
                "tokens_per_second": {name: statistics.median(values) for name, values in rates.items()},
                "masked_step_ratio": statistics.median(masks),
                "masked_step_ratios": masks,
            }
        )
    )


if __name__ == "__main__":
    main()
