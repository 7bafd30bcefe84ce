"""Prefill throughput of the engine beside plain transformers, run in turns in one process.

    python -m bench.peers.transformers_prefill --folder .bench/qwen2.5-0.5b

Eight prompts of 512 tokens, up to the first output token: transformers in one batched forward pass in bf16 (logits of
the last tokens only), the engine as it schedules them, with a bf16, int8 and int4 base. Medians; the last line is JSON.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from bench.machine import describe
from bench.report import json_line, number, table
from bench.serving.engine_throughput import started_engine
from lora_serve.messages import Generate
from lora_serve.request import Request, Sampling

CASES = {"ours, bf16": "", "ours, int8": "--quantize int8", "ours, int4": "--quantize int4"}


def transformers_prefill(model: Path) -> Callable[[list[list[int]]], None]:
    """Prefill of prompts of one length by plain transformers."""
    plain: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval()

    def prefill(prompts: list[list[int]]) -> None:
        with torch.inference_mode():
            plain(torch.tensor(prompts), use_cache=True, logits_to_keep=1).logits.argmax(-1)

    return prefill


def engine_prefill(model: Path, serve: str, stack: ExitStack) -> Callable[[list[list[int]]], None]:
    """Prefill by the engine; prompts have to be new, so that the prefix cache does not help."""
    engine, _ = stack.enter_context(started_engine(model, serve))

    def prefill(prompts: list[list[int]]) -> None:
        for index, prompt in enumerate(prompts):
            engine.receive(Generate(Request(str(index), prompt, Sampling(max_tokens=1, temperature=0.0), ())))
        while engine.busy:
            engine.step()

    return prefill


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="what bench.make_model wrote")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args(arguments)
    draw = random.Random(0)
    with ExitStack() as stack:
        model = args.folder / "model"
        cases = {
            name: engine_prefill(model, serve, stack) for name, serve in CASES.items()
        }  # sets the number of threads
        cases = {"transformers, bf16": transformers_prefill(model)} | cases
        taken: dict[str, list[float]] = {name: [] for name in cases}
        for repeat in range(args.repeats + 1):
            for name, prefill in cases.items():
                prompts = [draw.choices(range(300, 2000), k=args.tokens) for _ in range(args.prompts)]
                begin = time.perf_counter()
                prefill(prompts)
                if repeat:
                    taken[name].append(time.perf_counter() - begin)
    seconds = {name: statistics.median(each) for name, each in taken.items()}
    plain, tokens = seconds["transformers, bf16"], args.prompts * args.tokens
    rows = [
        [name, number(each, 2), number(tokens / each, 0), number(plain / each, 2)] for name, each in seconds.items()
    ]
    print(table([f"{args.prompts} × {args.tokens} tokens", "s", "tokens/s", "× transformers"], rows))
    print(json_line({"bench": "transformers_prefill", "machine": describe(), "tokens": tokens, "seconds": seconds}))


if __name__ == "__main__":
    main()
