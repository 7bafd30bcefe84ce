"""Memory that training takes, measured beside what the server says that it takes.

    python -m bench.make_model --shape qwen2.5-0.5b
    python -m bench.training_memory --model .bench/qwen2.5-0.5b/model

Each precision has a process of its own, which loads the base, creates an adapter of rank 16 on all linear modules, and
runs passes over random tokens, each followed by a step of AdamW. Printed is the growth of the process's memory at its
highest, as Linux counts it (VmHWM), beside `Trainer.needed`: without kept layers, and with as many as the memory
allows. The last line is JSON. On a CPU only.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.machine import describe
from bench.report import json_line, table
from lora_serve.adapters.device_slots import DeviceSlots
from lora_serve.engine.memory_plan import step_bytes_on_cpu
from lora_serve.engine.sizing import StepLimits, largest_step
from lora_serve.engine.training.fused_pass import pass_bytes
from lora_serve.engine.training.micro_batch import MicroBatch, TrainingSequence
from lora_serve.engine.training.trainer import Trainer
from lora_serve.engine.training.training_settings import LoraSettings
from lora_serve.kernels.select import select
from lora_serve.kv.tensors import KVTensors
from lora_serve.malloc import trim
from lora_serve.model.base import ResidentBase
from lora_serve.model.load import load
from lora_serve.model.self_check import blocks_needed
from lora_serve.model.trainable_base import TrainableBase

PRECISIONS = ("float32", "bfloat16", "int8")
BATCHES = ((4, 128), (8, 512))  # sequences, tokens of each
RANK = 16


def main() -> None:
    """Measure every precision in a process of its own."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", required=True, help="folder of the base")
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=PRECISIONS)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--keep", action="store_true", help="keep layers in twice the memory of a pass without")
    parser.add_argument("--one", choices=PRECISIONS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.model, options.one, options.threads, keep=options.keep)))
        return
    print(describe())
    found = {}
    for precision in options.precisions:
        command = [sys.executable, "-m", "bench.training_memory", *sys.argv[1:], "--one", precision]
        result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        found[precision] = json.loads(result.stdout.splitlines()[-1])
    rows = [
        [precision, row["part"], f"{row['measured'] / 2**20:.0f}", f"{row['counted'] / 2**20:.0f}"]
        for precision, rows in found.items()
        for row in rows
    ]
    print(table(["base", "part", "measured MiB", "counted MiB"], rows))
    print(json_line({"training_memory": found}))


def measure(model: str, precision: str, threads: int, *, keep: bool) -> list[dict[str, Any]]:
    """What each part takes at its highest, in bytes, and what is counted for it."""
    torch.set_num_threads(threads)
    device = torch.device("cpu")
    kernels = select(device, True)
    loaded = load(
        model,
        revision=None,
        dtype="bfloat16" if precision == "int8" else precision,
        device=device,
        progress=lambda stage, done: None,
        scheme="int8" if precision == "int8" else None,
        quantizes_experts=True,
    )
    trainable = TrainableBase(loaded, kernels, 4)
    kv = KVTensors(loaded.layers, blocks_needed(16), 16, loaded.dtype, device)
    base = ResidentBase(loaded, DeviceSlots(loaded.shape, 4, loaded.dtype, device), kernels, kv)
    base.self_check()
    trainable.check()
    release()
    rows = [{"part": "base, and the process", "measured": resident(), "counted": 0}]
    limits = StepLimits(64, 512)
    measured = peak(lambda: largest_step(base, 16, limits, loaded.max_model_len))
    rows.append({"part": "step of 512 tokens", "measured": measured, "counted": step_bytes_on_cpu(loaded, limits)})
    settings = LoraSettings(r=RANK)
    trainer = Trainer(trainable, 1 << 40)
    needed = trainer.needed(settings, 1)
    measured = peak(lambda: trainer.create("run", settings))
    rows.append({"part": "creating the run", "measured": measured, "counted": needed.adapter})
    adapter = trainer.adapters["run"]
    generator = torch.Generator().manual_seed(0)
    for sequences, tokens in BATCHES:
        counted = pass_bytes(trainable, sequences * tokens)
        trainer.memory = needed.adapter + needed.step + (2 if keep else 1) * counted
        ids = torch.randint(3, trainable.vocabulary, (sequences, tokens), generator=generator).tolist()
        batch = MicroBatch(adapter, [TrainingSequence(each[:-1], each[1:], [1.0] * (tokens - 1)) for each in ids])
        adapter.optimizer_step(1e-4)  # now there are moments
        measured = peak(lambda batch=batch: trainer.forward_backward([batch]).finish())  # type: ignore[misc]
        rows.append({"part": f"pass over {sequences} × {tokens} tokens", "measured": measured, "counted": trainer.free})
    measured = peak(lambda: adapter.optimizer_step(1e-4))
    rows.append({"part": "step of the optimizer", "measured": measured, "counted": needed.step})
    return rows


def peak(run: Callable[[], Any]) -> int:
    """Bytes by which the process's memory grows at its highest while something runs."""
    release()
    before = resident()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    run()
    return status("VmHWM") - before


def resident() -> int:
    """Bytes of the process in memory."""
    return status("VmRSS")


def status(field: str) -> int:
    """A field of /proc/self/status, in bytes."""
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), flags=re.MULTILINE)
    assert found is not None
    return int(found[1]) << 10


def release() -> None:
    """Give freed memory back to the system."""
    gc.collect()
    trim()


if __name__ == "__main__":
    main()
