"""Reading prompts: the engine beside plain transformers, in one process, in turns.

    python -m bench.prefill --folder .bench/qwen2.5-0.5b

Eight prompts of 512 tokens, of which both give the first new token: transformers in one batch by one forward pass in
bf16 (logits of the last tokens only), the engine as it schedules them, for each way the base can be kept. Medians; the
last line is JSON.
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

from bench.inprocess import opened
from bench.machine import describe
from bench.report import json_line, number, table
from lora_serve.messages import Generate
from lora_serve.request import Request, Sampling

KINDS = {"ours, bf16": "", "ours, int8": "--quantize int8", "ours, int4": "--quantize int4"}


def transformers(model: Path) -> Callable[[list[list[int]]], None]:
    """Reads prompts of one length as plain transformers does."""
    plain: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval()

    def read(prompts: list[list[int]]) -> None:
        with torch.inference_mode():
            plain(torch.tensor(prompts), use_cache=True, logits_to_keep=1).logits.argmax(-1)

    return read


def ours(model: Path, serve: str, stack: ExitStack) -> Callable[[list[list[int]]], None]:
    """Reads prompts as the engine does; its prefix cache never helps, since prompts are new."""
    engine, _ = stack.enter_context(opened(model, serve))

    def read(prompts: list[list[int]]) -> None:
        for index, prompt in enumerate(prompts):
            engine.receive(Generate(Request(str(index), prompt, Sampling(max_tokens=1, temperature=0.0), ())))
        while engine.busy:
            engine.step()

    return read


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="what bench/make_model.py made")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args(arguments)
    draw = random.Random(0)
    with ExitStack() as stack:
        model = args.folder / "model"
        readers = {kind: ours(model, serve, stack) for kind, serve in KINDS.items()}  # set the number of threads
        readers = {"transformers, bf16": transformers(model)} | readers
        taken: dict[str, list[float]] = {kind: [] for kind in readers}
        for repeat in range(args.repeats + 1):
            for kind, read in readers.items():
                prompts = [draw.choices(range(300, 2000), k=args.tokens) for _ in range(args.prompts)]
                begin = time.perf_counter()
                read(prompts)
                if repeat:
                    taken[kind].append(time.perf_counter() - begin)
    seconds = {kind: statistics.median(each) for kind, each in taken.items()}
    plain, tokens = seconds["transformers, bf16"], args.prompts * args.tokens
    rows = [
        [kind, number(each, 2), number(tokens / each, 0), number(plain / each, 2)] for kind, each in seconds.items()
    ]
    print(table([f"{args.prompts} × {args.tokens} tokens", "s", "tokens/s", "× transformers"], rows))
    print(json_line({"bench": "prefill", "machine": describe(), "tokens": tokens, "seconds": seconds}))


if __name__ == "__main__":
    main()
