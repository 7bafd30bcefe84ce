"""Training on a GPU: tokens a second over a random base, and gradients of deltas by the kernels and by torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from bench.gpu.forward_pass import BLOCK, DTYPE, random_weights_on, time_in_turns
from bench.shapes import Shape
from lora_serve.adapters.device_slots import DeviceSlots
from lora_serve.engine.training.fused_pass import FusedPass
from lora_serve.engine.training.micro_batch import MicroBatch, TrainingSequence
from lora_serve.engine.training.trainable_adapter import TrainableAdapter
from lora_serve.engine.training.trainer import Trainer
from lora_serve.engine.training.training_settings import LoraSettings
from lora_serve.kernels.composed import ComposedBackward
from lora_serve.kernels.contract import Segments
from lora_serve.kernels.select import select
from lora_serve.kv.tensors import KVTensors
from lora_serve.model.base import ResidentBase
from lora_serve.model.load import load
from lora_serve.model.self_check import blocks_needed
from lora_serve.model.trainable_base import TrainableBase

JOBS = 4
MEMORY = 1 << 34  # of adapters in training and one pass
SETTINGS = LoraSettings(r=16, lora_alpha=32)


def measure_training(
    shape: Shape, folder: Path, device: torch.device, tokens: int, budget: float
) -> dict[str, dict[str, float]]:
    """Tokens a second of a step of `JOBS` sequences, and microseconds of one group's gradients, by how.

    Args:
        tokens: of a sequence.
        budget: about the seconds for one repeat.
    """
    base = _trainable(folder, device)
    trainer = Trainer(base, MEMORY)
    adapters = [trainer.create(str(index), SETTINGS) for index in range(JOBS)]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, shape.vocabulary, (JOBS, tokens), generator=generator).tolist()
    sequences = [TrainingSequence(own[:-1], own[1:], [1 / (JOBS * tokens)] * (tokens - 1)) for own in ids]

    def step(parts: Sequence[tuple[TrainableAdapter, list[TrainingSequence]]]) -> None:
        FusedPass(base, [MicroBatch(*part) for part in parts], gradients=True).finish()
        for adapter, _ in parts:
            adapter.optimizer_step(1e-5)

    each = [(adapter, [own]) for adapter, own in zip(adapters, sequences, strict=True)]
    steps = {"one adapter": lambda: step([(adapters[0], sequences)]), f"{JOBS} adapters": lambda: step(each)}
    rates = {name: JOBS * tokens / seconds for name, seconds in time_in_turns(steps, device, budget).items()}
    return {"tokens/s": rates, "gradients of q, k and v, µs": _time_gradients(base, device, tokens, budget / 10)}


def _trainable(folder: Path, device: torch.device) -> TrainableBase:
    """A base of random weights in service, to be trained on."""
    kernels = select(device)
    with random_weights_on(device):
        loaded = load(str(folder), revision=None, dtype="bfloat16", device=device, progress=lambda stage, done: None)
    base = TrainableBase(loaded, kernels, JOBS)
    kv = KVTensors(loaded.layers, blocks_needed(BLOCK), BLOCK, DTYPE, device)
    ResidentBase(loaded, DeviceSlots(loaded.shape, 1, DTYPE, device), kernels, kv).pack()
    base.check()
    return base


def _time_gradients(base: TrainableBase, device: torch.device, tokens: int, budget: float) -> dict[str, float]:
    """Microseconds of `delta_backward` of the first group, with a segment for each adapter."""
    kernels = select(device)
    names, group = next(iter(base.deltas.groups.items()))
    gradients = base.gradients.groups[names]
    edges = torch.arange(0, (JOBS + 1) * tokens, tokens, dtype=torch.int32, device=device)
    slots = torch.arange(1, JOBS + 1, dtype=torch.int32, device=device)
    segments = Segments(edges[:-1], edges[1:], slots, torch.ones(JOBS, device=device), tokens, SETTINGS.r)
    x, *grads = (
        torch.randn(JOBS * tokens, width, device=device).to(DTYPE) for width in (group.in_features, *group.out_features)
    )
    dx = torch.zeros_like(x)
    calls = {
        "kernels": lambda: kernels.delta_backward(x, grads, dx, group, segments, gradients),
        "torch": lambda: ComposedBackward().delta_backward(x, grads, dx, group, segments, gradients),
    }
    with torch.no_grad():
        return {name: 1e6 * seconds for name, seconds in time_in_turns(calls, device, budget).items()}
