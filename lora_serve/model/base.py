"""The resident base: the Hugging Face model with adapters within reach and its KV in blocks."""

from __future__ import annotations

from contextlib import ExitStack
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from lora_serve.adapters.bank import Bank
from lora_serve.errors import ModelUnsupported
from lora_serve.kernels.contract import DeltaGroup, Kernels, Spans
from lora_serve.kv.tensors import KVTensors
from lora_serve.model.attention import BLOCKS, PagedKV
from lora_serve.model.batch import Batch
from lora_serve.model.changes import Changes
from lora_serve.model.experts import AdaptedExperts
from lora_serve.model.lean import lean
from lora_serve.model.linear import AdaptedLinear, Routing, SharedInput
from lora_serve.model.load import LoadedModel
from lora_serve.model.packed import PackedEmbedding, PackedLinear
from lora_serve.model.replay import Replay
from lora_serve.model.virtual import embedded


class ResidentBase:
    """Runs flat batches.

    Args:
        loaded: the model as it came from disk; its linear modules are packed and wrapped in place, one after the other.
        bank: the adapters on the device.
        kernels: the backend for deltas and attention.
        kv: memory for keys and values.
    """

    def __init__(self, loaded: LoadedModel, bank: Bank, kernels: Kernels, kv: KVTensors) -> None:
        self._model: Any = loaded.model
        self._keeps_logits = loaded.keeps_logits
        self._quantized = loaded.scheme is not None
        self._windows = loaded.windows
        self._kernels = kernels
        self._kv = kv
        self._routing = Routing(kernels)
        self._replay = Replay(self._logits, kernels)
        self._prefixes = bank.prefixes
        self._embedding = loaded.shape.input_embedding
        self._ids = loaded.shape.modules[self._embedding]["weight"][0]  # that the embedding knows
        self._changes = Changes(self._model, loaded.shape, bank.changes, head_rows=self._keeps_logits)
        lean(self._model, loaded.dtype, kernels)
        table = self._model.get_submodule(self._embedding)
        stacks: dict[str, dict[str, list[DeltaGroup]]] = {}  # modules of stacked experts → parameter → by expert
        for names, group in bank.groups.items():
            if names[0].endswith("]"):
                module, _, parameter = names[0].partition("[")[0].rpartition(".")
                stacks.setdefault(module, {}).setdefault(parameter, []).append(group)
                continue
            maps = [self._model.get_submodule(name) for name in names]
            bases = [PackedLinear(each, kernels, loaded.scheme) for each in maps]
            shared = SharedInput(bases, group, kernels)
            for index, (name, base) in enumerate(zip(names, bases, strict=True)):
                head = name == loaded.shape.head and self._keeps_logits
                _replace(self._model, name, AdaptedLinear(base, shared, index, self._routing, head=head))
                tied = type(table) is nn.Embedding and maps[index].weight is table.weight
                if tied and base.packed.scheme is None:
                    _replace(self._model, self._embedding, PackedEmbedding(base.packed, kernels))
        for module, groups in stacks.items():
            _replace(self._model, module, AdaptedExperts(self._model.get_submodule(module), groups, self._routing))
        for left in self._model.parameters():
            if left.is_cpu:  # a rest of a file's mapping keeps all of it in memory
                left.data = left.data.clone()

    @torch.inference_mode()
    def forward(self, batch: Batch) -> Tensor:
        """Logits [logits_rows, vocab] of the wanted rows, in the model's dtype; valid until the next pass.

        The vocabulary is the largest of the rows' own; tokens that a row's does not have are -inf.
        """
        parts = self._changes.of(batch)
        if not parts and not batch.virtual:
            return self._replay(batch)
        with ExitStack() as meanwhile:
            if parts:
                meanwhile.enter_context(self._changes.applied(parts, batch))
            if batch.virtual:  # after the changes, so that its rows have the last word
                embedding = self._model.get_submodule(self._embedding)
                meanwhile.enter_context(embedded(embedding, batch.virtual, self._prefixes))
            return self._changes.masked(self._logits(batch), batch)

    def _logits(self, batch: Batch) -> Tensor:
        """The model's pass, whatever hooks are on its modules."""
        self._routing.tokens = batch.segments
        self._routing.logits = batch.logits_segments
        given = [run for run in batch.virtual if self._prefixes[run.slot].keys]
        paged = PagedKV(self._kernels, self._kv, batch.kv_index, batch.spans, self._windows, given, self._prefixes)
        keep = {"logits_to_keep": batch.logits_rows} if self._keeps_logits else {}
        logits: Tensor = self._model(
            input_ids=batch.token_ids.unsqueeze(0),
            position_ids=batch.positions.unsqueeze(0),
            use_cache=False,
            paged=paged,
            **keep,
        ).logits[0]
        return logits if self._keeps_logits else logits[batch.logits_rows]

    @torch.inference_mode()
    def prove(self) -> None:
        """Hold two sequences in one flat batch against the model's own forward of each alone.

        Run once at start, on an empty KV pool of at least two blocks. Raises ModelUnsupported where they differ by more
        than rounding: such a model keeps state that a flat batch would leak from one request to another.
        """
        device = self._kv.keys[0].device
        size = self._kv.keys[0].shape[1]
        lengths = (min(7, size), min(5, size))
        generator = torch.Generator().manual_seed(0)
        tokens = [torch.randint(0, self._ids, (n,), generator=generator).to(device) for n in lengths]
        flat = self.forward(_side_by_side(tokens, [list(range(n)) for n in lengths], size)).float()
        self._model.set_attn_implementation("eager")
        try:
            alone = torch.cat([self._model(input_ids=ids.unsqueeze(0), use_cache=False).logits[0] for ids in tokens])
        finally:
            self._model.set_attn_implementation(BLOCKS)
        apart = (flat - alone.float()).norm() / alone.float().norm()
        bound = 1e-1 if self._quantized else {torch.float32: 1e-3, torch.float16: 2e-2}.get(self._model.dtype, 1e-1)
        if not apart <= bound:
            raise ModelUnsupported(
                f"{self._model.config.model_type} in a flat batch differs from itself alone "
                f"(relative error {apart:.2g}, at most {bound:g} is rounding)"
            )
        last = [[n - 1] for n in lengths]
        others = [ids[:1] for ids in reversed(tokens)]
        self._replay.prove(_side_by_side(others, last, size), _side_by_side([ids[-1:] for ids in tokens], last, size))


def _side_by_side(tokens: list[Tensor], positions: list[list[int]], block_size: int) -> Batch:
    """Sequences at the given positions, each in one block of its own, as a batch of the base."""
    device = tokens[0].device

    def int32(values: list[Any]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    counts = [len(each) for each in tokens]
    places = [block_size * (i + 1) + position for i, own in enumerate(positions) for position in own]
    return Batch(
        token_ids=torch.cat(tokens),
        positions=torch.tensor([position for own in positions for position in own], device=device),
        kv_index=torch.tensor(places, device=device),
        spans=Spans(
            int32([0, *accumulate(counts)]),
            int32([own[-1] + 1 for own in positions]),
            int32([[i + 1] for i in range(len(tokens))]),
            max(counts),
            max(own[-1] + 1 for own in positions),
        ),
        logits_rows=torch.arange(sum(counts), device=device),
        segments=None,
        logits_segments=None,
    )


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
