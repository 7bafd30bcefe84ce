"""A small base that serves and trains, and the same model under PEFT and torch's own AdamW."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file
from support import VOCABULARY
from torch import Tensor, nn

from lora_serve.adapters.device_slots import DeviceSlots
from lora_serve.engine.training.method_settings import AdapterSettings
from lora_serve.engine.training.micro_batch import MicroBatch, TrainingSequence
from lora_serve.engine.training.trainable_adapter import TrainableAdapter
from lora_serve.engine.training.trained_files import peft_tensors, save_peft
from lora_serve.engine.training.trainer import Trainer
from lora_serve.engine.training.training_settings import AdamSettings
from lora_serve.kernels.contract import Kernels
from lora_serve.kernels.packed_weight import Scheme
from lora_serve.kernels.select import select
from lora_serve.kv.tensors import KVTensors
from lora_serve.learning_rate import LearningRate
from lora_serve.model.base import ResidentBase
from lora_serve.model.batch import dummy_batch
from lora_serve.model.load import load
from lora_serve.model.loaded_model import LoadedModel
from lora_serve.model.packed_experts import PackedExperts
from lora_serve.model.shape import base_module
from lora_serve.model.trainable_base import TrainableBase

CPU = torch.device("cpu")
STEPS = int(os.environ.get("TRAINING_STEPS", "6"))
LOSS, WEIGHTS = 1e-4, 1e-3  # the issue's own bounds
HEAD_OUTPUTS = 32  # that are computed at a time: a third of the vocabulary
MEMORY = 1 << 25  # not enough to keep what a layer saves


class TrainingDriver:
    """A base in service, and a trainer over it."""

    def __init__(
        self,
        folder: Path,
        *,
        native: bool = True,
        dtype: str = "float32",
        scheme: Scheme | None = None,
        slots: int = 4,
        device: torch.device = CPU,
        kernels: Kernels | None = None,
    ) -> None:
        kernels = kernels or select(device, native)
        self.loaded = load_small(folder, dtype, scheme, device)
        self.trainable = TrainableBase(self.loaded, kernels, slots, head_weights=HEAD_OUTPUTS * 64)
        served = DeviceSlots(self.loaded.shape, 2, self.loaded.dtype, device)
        kv = KVTensors(self.loaded.layers, 20, 4, self.loaded.dtype, device)
        self.base = ResidentBase(self.loaded, served, kernels, kv)
        self.base.self_check()
        self.trainable.check()
        self.trainer = Trainer(self.trainable, MEMORY)

    def serve(self) -> Tensor:
        """Logits of a step of the serving base."""
        return self.base.forward(dummy_batch([5], 2)).clone()

    @torch.no_grad()
    def with_resident_weights(self, model: Any) -> Any:
        """A copy of a model with the weights that the resident base computes with."""
        model = copy.deepcopy(model)
        for name in self.loaded.shape.sites:
            path, _, expert = name.partition("[")
            if expert and expert != "0]":
                continue
            parent, _, leaf = (path if expert else f"{path}.weight").rpartition(".")
            own: Any = base_module(self.loaded.model, parent)
            weight = own.parameter(leaf) if isinstance(own, PackedExperts) else getattr(own, leaf)
            setattr(model.get_submodule(parent), leaf, nn.Parameter(weight.float().clone()))
        return model


def load_small(
    folder: Path, dtype: str = "float32", scheme: Scheme | None = None, device: torch.device = CPU
) -> LoadedModel:
    """A base, before it is brought into service."""
    return load(
        str(folder),
        revision=None,
        dtype=dtype,
        device=device,
        progress=lambda stage, done: None,
        scheme=scheme,
        quantizes_experts=True,
    )


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


def load_trainable(base: Any, folder: Path, adapter: TrainableAdapter | None = None) -> Any:
    """What PEFT loads from an adapter's folder onto a copy of a base, to be trained; an encoder is the adapter's."""
    config: Any = peft.PeftConfig.from_pretrained(folder)
    if not config.is_prompt_learning:
        return peft.PeftModel.from_pretrained(copy.deepcopy(base), folder, is_trainable=True).eval()
    config.inference_mode = False
    model = peft.get_peft_model(copy.deepcopy(base), config)
    if adapter is not None and adapter.layout.encoder is not None:
        encoder: Any = model.prompt_encoder["default"]
        encoder.load_state_dict(adapter.layout.encoder.parameters(adapter.masters))
        return model.eval()
    peft.set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors"))
    return model.eval()


def train_peft(
    model: Any,
    steps: Sequence[Sequence[TrainingSequence]],
    rates: Sequence[float],
    max_grad_norm: float = 1.0,
    weight_decay: float = 0.0,
) -> list[float]:
    """Train a PEFT model with torch's AdamW, a sequence at a time; the losses before each step."""
    parameters = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.0, weight_decay=weight_decay)
    losses = []
    for sequences, rate in zip(steps, rates, strict=True):
        total = 0.0
        for each in sequences:
            logits = model(input_ids=torch.tensor([each.tokens]), use_cache=False).logits[0][-len(each.tokens) :]
            terms = nn.functional.cross_entropy(logits.float(), torch.tensor(each.targets), reduction="none")
            loss = (terms * torch.tensor(each.weights)).sum()
            loss.backward()
            total += float(loss.detach())
        nn.utils.clip_grad_norm_(parameters, max_grad_norm)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


def check_parity(
    driver: TrainingDriver, base: Any, folder: Path, kinds: Mapping[str, AdapterSettings], steps: int = STEPS
) -> None:
    """Train one adapter of each kind, all in one batch, and each alone in PEFT from the same weights and data."""
    rate = LearningRate(5e-3, steps=steps, warmup=2, decay="cosine")
    adapters, models, data = [], [], []
    for index, (name, settings) in enumerate(kinds.items()):
        adapter = driver.trainer.create(name, settings, AdamSettings(weight_decay=0.01))
        save_peft(adapter, folder / name)
        adapters.append(adapter)
        models.append(load_trainable(base, folder / name, adapter))
        data.append([examples(3, VOCABULARY, seed=100 * index + step) for step in range(steps)])
    rates = [rate.at(step) for step in range(steps)]
    losses: list[list[float]] = [[] for _ in adapters]
    for step, at in enumerate(rates):
        batches = [MicroBatch(adapter, own[step]) for adapter, own in zip(adapters, data, strict=True)]
        for own, result in zip(losses, driver.trainer.forward_backward(batches).finish(), strict=True):
            own.append(result.loss)
        for adapter in adapters:
            adapter.optimizer_step(at)
    for adapter, model, own, got in zip(adapters, models, data, losses, strict=True):
        start = peft_tensors(adapter)
        wanted = train_peft(model, own, rates, weight_decay=0.01)
        torch.testing.assert_close(torch.tensor(got), torch.tensor(wanted), atol=LOSS, rtol=0)
        theirs = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
        assert start.keys() == theirs.keys()
        for key, tensor in start.items():
            torch.testing.assert_close(tensor, theirs[key].detach(), atol=WEIGHTS, rtol=0)
        if adapter.layout.encoder is not None:
            state = model.prompt_encoder["default"].state_dict()
            parameters = adapter.layout.encoder.parameters(adapter.masters)
            assert state.keys() == parameters.keys()
            for key, tensor in parameters.items():
                torch.testing.assert_close(tensor, state[key], atol=WEIGHTS, rtol=0)
        driver.trainer.close(adapter)
