"""A small base that serves and trains, and the same model under PEFT and torch's own AdamW."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import torch

from lora_serve.adapters.device_slots import DeviceSlots
from lora_serve.engine.training.micro_batch import TrainingSequence
from lora_serve.kernels.packed_weight import Scheme
from lora_serve.kernels.select import select
from lora_serve.kv.tensors import KVTensors
from lora_serve.model.base import ResidentBase
from lora_serve.model.load import load
from lora_serve.model.trainable_base import TrainableBase

CPU = torch.device("cpu")


def trainable_base(
    folder: Path, *, native: bool = True, dtype: str = "float32", scheme: Scheme | None = None, slots: int = 8
) -> TrainableBase:
    """A base in service, of which this is the trainable view."""
    kernels = select(CPU, native)
    loaded = load(
        str(folder),
        revision=None,
        dtype=dtype,
        device=CPU,
        progress=lambda stage, done: None,
        scheme=scheme,
        quantizes_experts=kernels.has_grouped_linear,
    )
    trainable = TrainableBase(loaded, kernels, slots)
    device_slots = DeviceSlots(loaded.shape, 2, loaded.dtype, CPU)
    base = ResidentBase(loaded, device_slots, kernels, KVTensors(loaded.layers, 20, 4, loaded.dtype, CPU))
    base.self_check()
    trainable.check()
    return trainable


def examples(count: int, vocabulary: int, seed: int, shortest: int = 6, longest: int = 24) -> list[TrainingSequence]:
    """Random prompts and completions, each completion token with the weight of its share of all of them."""
    generator = torch.Generator().manual_seed(seed)
    pairs = []
    for _ in range(count):
        length = int(torch.randint(shortest, longest + 1, (), generator=generator))
        tokens = torch.randint(3, vocabulary, (length,), generator=generator).tolist()
        pairs.append((tokens[: length // 3], tokens[length // 3 :]))
    total = sum(len(completion) for _, completion in pairs)
    return [TrainingSequence.completion(prompt, completion, 1 / total) for prompt, completion in pairs]


def peft_model(base: Any, folder: Path) -> Any:
    """What PEFT loads from an adapter's folder, to be trained."""
    return peft.PeftModel.from_pretrained(copy.deepcopy(base), folder, is_trainable=True).eval()


def peft_losses(
    model: Any, steps: Sequence[Sequence[TrainingSequence]], rate: float, max_grad_norm: float = 1.0
) -> list[float]:
    """Train with torch's AdamW, a sequence at a time; the losses before each step."""
    parameters = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    losses = []
    for sequences in steps:
        total = 0.0
        for each in sequences:
            logits = model(input_ids=torch.tensor([each.tokens]), use_cache=False).logits[0]
            terms = torch.nn.functional.cross_entropy(logits.float(), torch.tensor(each.targets), reduction="none")
            loss = (terms * torch.tensor(each.weights)).sum()
            loss.backward()
            total += float(loss)
        torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses
