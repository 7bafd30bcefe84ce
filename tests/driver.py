"""Runs the engine's own scheduler, batches and forward pass over given tokens, and keeps every row's logits."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from lora_serve.adapters.adapter import Adapter, Lowered, flatten
from lora_serve.adapters.device_slots import DeviceSlots
from lora_serve.adapters.traits import Traits, traits
from lora_serve.engine.batch_builder import build_batch
from lora_serve.engine.fairness import Fairness
from lora_serve.engine.scheduler import Scheduler
from lora_serve.engine.sequence import Sequence
from lora_serve.engine.slot_rotation import SlotRotation
from lora_serve.kernels.contract import Kernels
from lora_serve.kernels.packed_weight import Scheme
from lora_serve.kernels.select import select
from lora_serve.kv.pool import BlockPool
from lora_serve.kv.tensors import KVTensors
from lora_serve.model.base import ResidentBase
from lora_serve.model.load import load
from lora_serve.model.tensor_parallel import TensorParallel
from lora_serve.request import Request, Sampling, Served

CPU = torch.device("cpu")


class Driver:
    """One base with its KV cache and device slots, without sampling: given tokens in, logits out.

    Args:
        kernels: None: selected by the device and `native`.
        parallel: the ranks that share the base, all of which run the same steps.
    """

    def __init__(
        self,
        folder: Path,
        *,
        dtype: str = "float32",
        native: bool = True,
        max_tokens: int = 64,
        block_size: int = 4,
        slots: int = 16,
        scheme: Scheme | None = None,
        device: torch.device = CPU,
        kernels: Kernels | None = None,
        parallel: TensorParallel | None = None,
    ) -> None:
        self.kernels = kernels or select(device, native)
        self.loaded = load(
            str(folder),
            revision=None,
            dtype=dtype,
            device=device,
            progress=lambda stage, done: None,
            scheme=scheme,
            quantizes_experts=self.kernels.has_grouped_linear,
            parallel=parallel,
        )
        self.device_slots = DeviceSlots(self.loaded.shape, slots, self.loaded.dtype, device, self.loaded.sharding)
        kv = KVTensors(self.loaded.layers, 200, block_size, self.loaded.dtype, device)
        self.base = ResidentBase(self.loaded, self.device_slots, self.kernels, kv)
        self.base.self_check()
        self.base.prepare(64, max_tokens, 50)
        fairness = Fairness()
        rotation = SlotRotation(fairness, slots, 4)
        self.scheduler = Scheduler(
            BlockPool(200, block_size), rotation, fairness, max_seqs=64, max_tokens=max_tokens, prefix_cache=True
        )
        self.slots: dict[str, int] = {}
        self.traits: dict[str, Traits] = {}
        self.sequences: list[list[int]] = []
        self.computed = 0  # rows, over all steps

    def load_adapter(self, adapter: Adapter, invocation: tuple[int, ...] = ()) -> str:
        """Put an adapter on the device; its digest names it in `teach`."""
        self.slots[adapter.digest] = self.device_slots.load(adapter)
        virtual = 0 if adapter.prefix is None else adapter.prefix.length
        self.traits[adapter.digest] = Traits(virtual=virtual, invocation=invocation)
        return adapter.digest

    def load_lowered(self, lowered: Lowered) -> str:
        """Put a lowered adapter on the device, with its traits; its digest names it in `teach`."""
        adapter = flatten(f"adapter {len(self.traits)}", lowered, self.loaded.dtype)
        self.load_adapter(adapter)
        self.traits[adapter.digest] = traits(lowered, self.loaded.shape)
        return adapter.digest

    def teach(
        self,
        prompts: list[list[int]],
        decode: int,
        adapters: list[list[tuple[str, float]]] | None = None,
        *,
        look_up: bool = False,
    ) -> list[Tensor]:
        """Logits [tokens, vocab] of every row of every sequence: its prompt, then `decode` greedy tokens one by one.

        Args:
            adapters: per sequence, (digest, weight) pairs; empty is the base.
            look_up: look prompts up in the prefix cache; then only their last row's logits are there.
        """
        sampling = Sampling(max_tokens=decode, prompt_logprobs=None if look_up else 0)
        seqs = []
        for index, prompt in enumerate(prompts):
            uses = tuple(Served(digest[:8], digest, weight) for digest, weight in (adapters or [[]] * 99)[index])
            traits = {use.digest: self.traits[use.digest] for use in uses}
            seq = Sequence(
                request=Request(str(index), prompt, sampling),
                order=index,
                adapters=uses,
                seed=0,
                stop_ids=frozenset(),
                limit=sum(each.virtual for each in traits.values()) + len(prompt) + decode,
                traits=traits,
            )
            seqs.append(seq)
            self.scheduler.add(seq)
        rows: dict[int, list[Tensor]] = {seq.order: [] for seq in seqs}
        while self.scheduler.running or self.scheduler.waiting:
            self.scheduler.assign_slots(lambda digest: True)
            scheduled = self.scheduler.schedule()
            batch, owners = build_batch(scheduled, self.slots, self.scheduler.pool.block_size)
            logits = self.base.forward(batch).clone()  # the next pass may write over it
            for part, own in owners:
                seq = part.seq
                self.scheduler.mark_launched(part)
                self.scheduler.mark_computed(part)
                self.computed += part.count
                rows[seq.order].append(logits[own])
                if part.samples:
                    if part.end == seq.limit:
                        self.scheduler.remove(seq)
                    else:
                        seq.tokens[part.end] = int(logits[own.stop - 1].argmax())
        self.sequences = [seq.tokens[seq.virtual : seq.limit] for seq in seqs]
        return [_stacked(rows[seq.order]) for seq in seqs]


def _stacked(rows: list[Tensor]) -> Tensor:
    """Stack rows of several steps; where a step's vocabulary is smaller, logits are padded with -inf."""
    width = max(row.shape[1] for row in rows)
    return torch.cat([torch.nn.functional.pad(row, (0, width - row.shape[1]), value=-torch.inf) for row in rows])
