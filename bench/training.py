"""Training on the resident base beside PEFT: tokens a second and peak memory, on one model, in one run.

    python -m bench.training --model folder

Each way to train runs in a process of its own, whose peak memory is its own: PEFT with torch's AdamW in float32, with
gradient checkpointing and without, and this project's trainer over a base in float32, bf16 and int8. Every step is
`--sequences` random sequences of `--length` tokens, all of which have a loss, at rank 16 on all linear modules. Figures
are of the median step after the first, and of the best one, which other work on the machine disturbs least. The trainer
computes layers twice, except where it says that they are kept. Then small batches of four adapters: all in one pass,
and one after the other.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from bench.machine import describe
from bench.report import json_line, number, table
from lora_serve.adapters.device_slots import DeviceSlots
from lora_serve.engine.training.fused_pass import FusedPass
from lora_serve.engine.training.micro_batch import MicroBatch, TrainingSequence
from lora_serve.engine.training.trainer import Trainer
from lora_serve.engine.training.training_settings import LoraSettings
from lora_serve.kernels.select import select
from lora_serve.kv.tensors import KVTensors
from lora_serve.model.base import ResidentBase
from lora_serve.model.load import load
from lora_serve.model.self_check import blocks_needed
from lora_serve.model.trainable_base import TrainableBase

RANK, RATE = 16, 1e-4
PEFT = {"PEFT, float32": False, "PEFT, float32, gradient checkpointing": True}
OURS: dict[str, tuple[str, Any, bool]] = {
    "trainer, float32 base": ("float32", None, False),
    "trainer, float32 base, layers kept": ("float32", None, True),
    "trainer, bf16 base": ("bfloat16", None, False),
    "trainer, bf16 base, layers kept": ("bfloat16", None, True),
    "trainer, int8 base": ("bfloat16", "int8", False),
}
SETTINGS = LoraSettings(r=RANK, lora_alpha=2 * RANK)
JOBS = 4
SMALL = {"4 adapters in one pass": True, "4 adapters one after the other": False}
Step = Callable[[list[list[int]]], None]


def peft_step(model: Path, *, checkpointing: bool) -> Step:
    """A step of PEFT and AdamW, in float32, as a trainer does it."""
    import peft
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    adapted: Any = peft.get_peft_model(
        loaded, peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    if checkpointing:
        adapted.enable_input_require_grads()
        adapted.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    adapted.train()
    parameters = [each for each in adapted.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=RATE)

    def step(sequences: list[list[int]]) -> None:
        ids = torch.tensor(sequences)
        adapted(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def started_base(model: Path, dtype: str, scheme: Any) -> TrainableBase:
    """A base in service, to be trained on."""
    device = torch.device("cpu")
    kernels = select(device)
    loaded = load(
        str(model), revision=None, dtype=dtype, device=device, progress=lambda stage, done: None, scheme=scheme
    )
    trainable = TrainableBase(loaded, kernels, JOBS)
    slots = DeviceSlots(loaded.shape, 1, loaded.dtype, device)
    base = ResidentBase(loaded, slots, kernels, KVTensors(loaded.layers, blocks_needed(16), 16, loaded.dtype, device))
    base.self_check()
    trainable.check()
    return trainable


def batch_of(sequences: list[list[int]]) -> list[TrainingSequence]:
    """Sequences whose tokens after the first all have a loss, of which the step's is the mean."""
    share = 1 / sum(len(own) - 1 for own in sequences)
    return [TrainingSequence(own[:-1], own[1:], [share] * (len(own) - 1)) for own in sequences]


def trainer_step(model: Path, dtype: str, scheme: Any, kept: bool) -> Step:
    """A step of this project's trainer.

    Args:
        kept: keep what all layers save for their backward pass.
    """
    base = started_base(model, dtype, scheme)
    adapter = Trainer(base, memory=1 << 33).create("bench", SETTINGS)

    def step(sequences: list[list[int]]) -> None:
        batch = MicroBatch(adapter, batch_of(sequences))
        FusedPass(base, [batch], gradients=True, kept_layers=base.layers if kept else 0).finish()
        adapter.optimizer_step(RATE)

    return step


def fused_step(model: Path, *, fused: bool) -> Step:
    """A step of several adapters, a sequence each, over a bf16 base."""
    base = started_base(model, "bfloat16", None)
    trainer = Trainer(base, memory=1 << 33)
    adapters = [trainer.create(str(index), SETTINGS) for index in range(JOBS)]

    def step(sequences: list[list[int]]) -> None:
        batches = [MicroBatch(adapter, batch_of([own])) for adapter, own in zip(adapters, sequences, strict=True)]
        for together in [batches] if fused else [[each] for each in batches]:
            FusedPass(base, together, gradients=True).finish()
        for adapter in adapters:
            adapter.optimizer_step(RATE)

    return step


def step_of(name: str, model: Path) -> Step:
    """The step of a row of the tables."""
    if name in PEFT:
        return peft_step(model, checkpointing=PEFT[name])
    return trainer_step(model, *OURS[name]) if name in OURS else fused_step(model, fused=SMALL[name])


def measure(name: str, model: Path, data: list[list[list[int]]], result: Connection) -> None:
    """Seconds of each step after the first, and the process's peak memory before and after, in bytes."""
    step = step_of(name, model)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = []
    for sequences in data:
        begin = time.perf_counter()
        step(sequences)
        seconds.append(time.perf_counter() - begin)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result.send((seconds[1:], before * 1024, after * 1024))


def run(name: str, model: Path, data: list[list[list[int]]]) -> dict[str, Any]:
    """Measure one way to train in a process of its own."""
    context = get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=measure, args=(name, model, data, theirs))
    process.start()
    theirs.close()
    seconds, before, after = ours.recv()
    process.join()
    tokens = sum(map(len, data[0]))
    return {
        "name": name,
        "tokens_per_second": tokens / statistics.median(seconds),
        "best": tokens / min(seconds),
        "seconds": seconds,
        "loaded_gib": before / 2**30,
        "peak_gib": after / 2**30,
    }


def random_steps(steps: int, sequences: int, length: int) -> list[list[list[int]]]:
    """Random tokens, the same for all."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 4000, (sequences, length), generator=generator).tolist() for _ in range(steps + 1)]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of a checkpoint (bench.make_model makes one)")
    parser.add_argument("--steps", type=int, default=3, help="measured steps of each")
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--small", type=int, default=32, help="tokens of each adapter's small batch; 0: none")
    parser.add_argument("--only", choices=[*PEFT, *OURS, *SMALL], action="append")
    args = parser.parse_args(arguments)
    large = random_steps(args.steps, args.sequences, args.length)
    small = random_steps(args.steps, JOBS, args.small) if args.small else []
    plan = dict.fromkeys((*PEFT, *OURS), large) | (dict.fromkeys(SMALL, small) if small else {})
    found = []
    for name, data in plan.items():
        if not args.only or name in args.only:
            found.append(run(name, args.model, data))
            print(f"{name}: {found[-1]['tokens_per_second']:.1f} tokens/s", file=sys.stderr, flush=True)
    rows = [
        [
            each["name"],
            *(number(each[key], 1) for key in ("tokens_per_second", "best")),
            *(number(each[key], 2) for key in ("loaded_gib", "peak_gib")),
        ]
        for each in found
    ]
    print(table(["", "tokens/s", "best step", "GiB before the first step", "peak GiB"], rows))
    print(json_line({"training": found, "length": args.length, "sequences": args.sequences} | describe()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
