"""Decode step and resident memory of a small mixture of experts, in bf16, int8 and int4.

    python -m bench.kernels.experts

makes a Qwen3-MoE of random weights and PEFT LoRA adapters on its experts (kept in `--folder`), starts an engine of each
kind in a process of its own, and lets them decode in turns, so that noise of the machine hits all alike: medians over
the turns, and the median over the turns of each one's ratio to bf16 in the same turn.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import peft
import psutil
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from bench.machine import describe
from bench.make_model import make_tokenizer
from bench.report import json_line, number, table
from bench.serving.engine_throughput import Driver, started_engine
from bench.serving.load import Load, Mix

KINDS = {"bf16": "", "int8": "--quantize int8", "int4": "--quantize int4"}
CONFIG = Qwen3MoeConfig(
    vocab_size=4096,
    hidden_size=1024,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=128,
    num_experts=32,
    num_experts_per_tok=4,
    moe_intermediate_size=512,
    max_position_embeddings=2048,
    eos_token_id=4095,
    bos_token_id=None,
)
TARGETS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
ADAPTERS, RANK = 8, 8
CASES: list[tuple[int, Mix]] = [(1, "none"), (8, "none"), (1, "one"), (8, "distinct")]


def make(folder: Path) -> None:
    """Write the model and its adapters, unless an earlier run did."""
    if (folder / "adapters" / f"a{ADAPTERS - 1}" / "adapter_config.json").exists():
        return
    torch.manual_seed(0)
    model: Any = Qwen3MoeForCausalLM(CONFIG).bfloat16()
    model.save_pretrained(folder / "model")
    make_tokenizer(CONFIG.vocab_size).save_pretrained(folder / "model")
    config = peft.LoraConfig(r=RANK, target_modules=[], target_parameters=TARGETS, init_lora_weights=False)
    for index in range(ADAPTERS):
        adapted = peft.get_peft_model(model, config)
        adapted.save_pretrained(folder / "adapters" / f"a{index}")
        model = adapted.unload()


def serve(folder: Path, options: str, commands: Connection) -> None:
    """Run an engine here: sends its resident bytes and notes, then for each load the median decode step in seconds."""
    given = f"{options} --threads 2 --kv-cache-memory 64MiB --max-model-len 512"
    with started_engine(folder / "model", given, folder / "adapters") as (engine, wake):
        gc.collect()
        commands.send((psutil.Process().memory_info().rss, engine.info.notes))
        driver = Driver(engine, wake)
        for load in iter(commands.recv, None):
            commands.send(statistics.median(driver.run(load).decode_steps))


def measure(folder: Path, repeats: int, output: int) -> dict[str, Any]:
    """Resident bytes and notes by kind; seconds of each turn by case and kind."""
    context = get_context("spawn")
    engines: dict[str, Connection] = {}
    found: dict[str, Any] = {"resident": {}, "notes": {}, "seconds": {}}
    adapters = tuple(f"a{index}" for index in range(ADAPTERS))
    for kind, options in KINDS.items():
        engines[kind], theirs = context.Pipe()
        context.Process(target=serve, args=(folder, options, theirs), daemon=True).start()
        found["resident"][kind], found["notes"][kind] = engines[kind].recv()
    load = Load(adapters=adapters, prompt=(32, 32), output=(output, output), token_ids=(300, 4000))
    for turn in range(-1, repeats):  # the first one warms up
        for rows, mix in CASES:
            for kind in KINDS if turn % 2 else reversed(KINDS):
                engines[kind].send(replace(load, mix=mix, clients=rows, requests=rows, salt=turn))
                seconds = engines[kind].recv()
                print(f"# {turn + 1}/{repeats} {rows} rows, {mix}, {kind}: {1e3 * seconds:.2f} ms", file=sys.stderr)
                if turn >= 0:
                    found["seconds"].setdefault(f"{rows} rows, {mix}", {}).setdefault(kind, []).append(seconds)
    for engine in engines.values():
        engine.send(None)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(".bench/experts"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=int, default=96, help="tokens of a request")
    args = parser.parse_args(arguments)
    make(args.folder)
    found = measure(args.folder, args.repeats, args.output)
    rows = [["resident MB", *(number(found["resident"][kind] / 1e6, 0) for kind in KINDS)]]
    for case, seconds in found["seconds"].items():
        middle = [number(1e3 * statistics.median(seconds[kind]), 2) for kind in KINDS]
        ratios = [
            statistics.median(own / plain for own, plain in zip(seconds[kind], seconds["bf16"], strict=True))
            for kind in KINDS
        ]
        cells = [f"{ms} ({number(ratio, 2)})" for ms, ratio in zip(middle, ratios, strict=True)]
        rows.append([f"ms a step, {case}", *cells])
    print(table(["", *KINDS], rows), end="\n\n")
    print(json_line({"bench": "experts", "machine": describe(), **found}))


if __name__ == "__main__":
    main()
