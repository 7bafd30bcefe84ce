"""The resident base: the Hugging Face model with adapters within reach and its KV in blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from lora_serve.adapters.device_slots import DeviceSlots
from lora_serve.kernels.contract import DeltaGroup, Kernels
from lora_serve.kernels.packed_weight import Scheme
from lora_serve.kv.tensors import KVTensors
from lora_serve.model.batch import Batch, VirtualRun
from lora_serve.model.cuda_graphs import CudaGraphs
from lora_serve.model.experts import AdaptedExperts
from lora_serve.model.external_linear import ExternalLinear
from lora_serve.model.external_quantization import is_externally_quantized
from lora_serve.model.fused import fuse
from lora_serve.model.input_buffers import Placed, placed
from lora_serve.model.linear import AdaptedLinear, Routing, SharedInput
from lora_serve.model.load import LoadedModel
from lora_serve.model.module_overrides import ModuleOverrides
from lora_serve.model.packed_linear import PackedEmbedding, PackedLinear
from lora_serve.model.paged_attention import PagedKV
from lora_serve.model.recorded_steps import RecordedSteps
from lora_serve.model.self_check import QUANTIZED_TOLERANCE, InFloat32, blocks_needed, check, eager_experts, refusing
from lora_serve.model.shape import base_of
from lora_serve.model.virtual import embedded


class ResidentBase:
    """Runs flat batches.

    Args:
        loaded: the model as it came from disk; its modules are replaced in place, one after the other. Linear modules
            compute themselves until they are packed.
        bank: the adapters on the device.
        kernels: the backend for deltas and attention.
        kv: memory for keys and values.
        drawn: int64 [most rows], on the device: the tokens drawn last, where batches may ask for these; see `Batch`.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        device_slots: DeviceSlots,
        kernels: Kernels,
        kv: KVTensors,
        drawn: Tensor | None = None,
    ) -> None:
        self._model: Any = loaded.model
        self._keeps_logits = loaded.keeps_logits
        self._quantized = bool(loaded.shape.quantized)
        self._windows = loaded.windows
        self._kernels = kernels
        self._kv = kv
        self._routing = Routing(kernels)
        self._device = loaded.device
        self._drawn = drawn
        self._ranks = device_slots.ranks
        ladder = kernels.ladder if loaded.steady else None
        self._replay = (
            RecordedSteps(
                self._logits,
                kernels,
                device_slots.ranks,
                loaded.device,
                None if loaded.steady else "not all of it is known to repeat",
            )
            if ladder is None
            else CudaGraphs(self._logits, kernels, ladder, device_slots.ranks, loaded.device)
        )
        self._prefixes = device_slots.prefixes
        self._embedding = loaded.shape.input_embedding
        self._ids = loaded.shape.modules[self._embedding]["weight"][0]  # that the embedding knows
        self._changes = ModuleOverrides(self._model, loaded.shape, device_slots.overrides, head_rows=self._keeps_logits)
        fuse(self._model, loaded.dtype, kernels)
        self._shape, self._layers = loaded.shape, loaded.layers
        self._scheme, self._oracle = loaded.scheme, loaded.oracle
        self._groups: dict[tuple[str, ...], DeltaGroup] = {}  # of linear modules
        stacks: dict[str, dict[str, list[DeltaGroup]]] = {}  # modules of stacked experts → parameter → by expert
        for names, group in device_slots.groups.items():
            if names[0].endswith("]"):
                module, _, parameter = names[0].partition("[")[0].rpartition(".")
                stacks.setdefault(module, {}).setdefault(parameter, []).append(group)
            else:
                self._groups[names] = group
        for module, groups in stacks.items():
            _replace(self._model, module, AdaptedExperts(self._model.get_submodule(module), groups, self._routing))
        self._wrap_linear(packed=False)

    def pack(self) -> None:
        """Put the linear modules' weights into the form that the kernels read, quantised if that was asked for."""
        self._wrap_linear(packed=True)
        for left in self._model.parameters():
            if left.is_cpu:  # a rest of a file's mapping keeps all of it in memory
                left.data = left.data.clone()

    def _wrap_linear(self, *, packed: bool) -> None:
        """Put an `AdaptedLinear` in the place of every linear module, around its packed weights or around itself."""
        table = self._model.get_submodule(self._embedding)
        for names, group in self._groups.items():
            maps = [base_of(self._model, name) for name in names]
            bases = [_kept(each, self._kernels, self._scheme) for each in maps] if packed else maps
            laid = [base for base in bases if isinstance(base, PackedLinear)]
            if len(laid) == len(bases):
                for own, beside in zip(laid, self._kernels.beside([base.packed for base in laid]), strict=True):
                    own.packed = beside
            shared = SharedInput(bases, group, self._kernels)
            for index, (name, base) in enumerate(zip(names, bases, strict=True)):
                head = name == self._shape.head and self._keeps_logits
                _replace(self._model, name, AdaptedLinear(base, shared, index, self._routing, head=head))
                if not isinstance(base, PackedLinear):
                    continue
                tied = type(table) is nn.Embedding and maps[index].weight is table.weight
                if tied and base.packed.scheme is None:
                    _replace(self._model, self._embedding, PackedEmbedding(base.packed, self._kernels))

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
            logits = self._logits(placed(batch, self._ranks, self._device), batch.virtual)
            return self._changes.masked(logits, batch)

    def _logits(self, step: Placed, virtual: Sequence[VirtualRun] = ()) -> Tensor:
        """The model's pass, whatever hooks are on its modules."""
        self._routing.tokens = step.segments
        self._routing.logits = step.logits_segments
        given = [run for run in virtual if self._prefixes[run.slot].keys]
        paged = PagedKV(self._kernels, self._kv, step.kv_index, step.spans, self._windows, given, self._prefixes)
        keep = {"logits_to_keep": step.logits_rows} if self._keeps_logits else {}
        ids = step.token_ids
        if self._drawn is not None:
            ids = torch.where(ids < 0, self._drawn[(-1 - ids).clamp(min=0)], ids)
        logits: Tensor = self._model(
            input_ids=ids.unsqueeze(0),
            position_ids=step.positions.unsqueeze(0),
            use_cache=False,
            paged=paged,
            **keep,
        ).logits[0]
        return logits if self._keeps_logits else logits[step.logits_rows]

    @torch.inference_mode()
    def prepare(self, most_rows: int, most_tokens: int, blocks: int) -> None:
        """Make ready for steps of up to `most_tokens`, `most_rows` of them of sequences that decode.

        Sequences have up to `blocks` KV blocks.

        Run once at start, on an empty KV pool of at least two blocks, whose tensors stay.
        """
        size = self._kv.keys[0].shape[1]
        self._replay.prepare(most_rows, most_tokens, blocks, blocks * size)
        lengths, ids = self._trial()
        last = [range(n - 1, n) for n in lengths]
        self._replay.prove(
            _side_by_side([own[:1] for own in reversed(ids)], last, size),
            _side_by_side([own[-1:] for own in ids], last, size),
            lambda x, y: _apart(x, y) <= self._rounding,
        )

    def graph_memory(self, most_rows: int, free: Callable[[], int]) -> int:
        """Bytes of the device that `prepare` will take beside the batches; `free` says how many are free."""
        return self._replay.memory(most_rows, free)

    @property
    def notes(self) -> list[str]:
        """What an operator should know."""
        refused = self._replay.refused
        return [] if refused is None or self._device.type == "cpu" else [f"steps run without CUDA graphs: {refused}"]

    @property
    def _rounding(self) -> float:
        """Relative error of what is the same but for the order of its sums."""
        return 1e-1 if self._quantized else {torch.float32: 1e-3, torch.float16: 2e-2}.get(self._model.dtype, 1e-1)

    def _trial(self) -> tuple[tuple[int, int], list[list[int]]]:
        """Lengths and tokens of two sequences that fit a KV block each."""
        size = self._kv.keys[0].shape[1]
        lengths = (min(7, size), min(5, size))
        generator = torch.Generator().manual_seed(0)
        return lengths, [torch.randint(0, self._ids, (n,), generator=generator).tolist() for n in lengths]

    @torch.no_grad()  # not inference mode: see `compute_oracle`
    def prove(self) -> None:
        """Compare the base with the untouched model, pack it, and compare it once more; see `self_check`.

        Run once at start, on an empty KV pool of at least `blocks_needed` blocks. Raises ModelUnsupported.
        """
        oracle, own = self._oracle, self._kv
        size = own.keys[0].shape[1]
        if oracle.float32_tolerance is not None:
            self._kv = KVTensors(self._layers, blocks_needed(size), size, torch.float32, self._device)
            with InFloat32(), eager_experts(self._model):
                check(self._eagerly, oracle, size, oracle.float32_tolerance)
            self._kv = own
        with refusing(oracle.kind):
            self.pack()
        check(self._eagerly, oracle, size, oracle.tolerance if self._scheme is None else QUANTIZED_TOLERANCE)

    def _eagerly(self, batch: Batch) -> Tensor:
        return self._replay.eagerly(batch)


def _apart(x: Tensor, y: Tensor) -> float:
    return float((x.float() - y.float()).norm() / y.float().norm())


def _side_by_side(ids: list[list[int]], positions: list[range], block_size: int) -> Batch:
    """Sequences at the given positions, each in one block of its own, as a batch of the base."""
    counts = [len(each) for each in ids]
    return Batch(
        token_ids=[token for own in ids for token in own],
        positions=[position for own in positions for position in own],
        kv_index=[block_size * (i + 1) + position for i, own in enumerate(positions) for position in own],
        query_start=[0, *accumulate(counts)],
        context=[own[-1] + 1 for own in positions],
        block_tables=[[i + 1] for i in range(len(ids))],
        logits_rows=range(sum(counts)),
    )


def _kept(module: nn.Module, kernels: Kernels, scheme: Scheme | None) -> PackedLinear | ExternalLinear:
    """A linear module's stand-in: its weights as the kernels want them, or itself where they cannot read them."""
    return ExternalLinear(module) if is_externally_quantized(module) else PackedLinear(module, kernels, scheme)


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
