"""The resident base: runs a batch through the Hugging Face model, with adapters installed and KV in blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from lora_serve.adapters.adapter import Prefix
from lora_serve.adapters.device_slots import DeviceSlots
from lora_serve.kernels.contract import Kernels
from lora_serve.kv.tensors import KVTensors
from lora_serve.model.batch import AdapterRows, Batch
from lora_serve.model.cuda_graphs import CudaGraphs
from lora_serve.model.forward_context import ForwardContext
from lora_serve.model.input_buffers import InputBuffers
from lora_serve.model.install import install, pack_linears
from lora_serve.model.load import LoadedModel
from lora_serve.model.module_overrides import ModuleOverrides
from lora_serve.model.recorded_steps import RecordedSteps
from lora_serve.model.self_check import QUANTIZED_TOLERANCE, InFloat32, blocks_needed, check, eager_experts, refusing
from lora_serve.model.step_executor import EagerSteps, StepExecutor


class ResidentBase:
    """Runs flat batches.

    Args:
        loaded: the model as it came from disk; adapters are installed into it in place. Its linear modules compute on
            their own weights until these are packed.
        device_slots: the adapters on the device.
        kernels: the backend.
        kv: memory for keys and values.
        sampled: int64 [most rows], on the device: the tokens sampled last, where batches may refer to these; see `Batch`.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        device_slots: DeviceSlots,
        kernels: Kernels,
        kv: KVTensors,
        sampled: Tensor | None = None,
    ) -> None:
        self._loaded, self._device_slots = loaded, device_slots
        self._model: Any = loaded.model
        self._keeps_logits = loaded.keeps_logits
        self._quantized = bool(loaded.shape.quantized)
        self._device = loaded.device
        self._kv = kv
        self._sampled = sampled
        self._context = ForwardContext(kernels, kv, loaded.windows, device_slots.prefixes)
        self._embedding = loaded.shape.input_embedding
        self._ids = loaded.shape.modules[self._embedding]["weight"][0]  # that the embedding knows
        self._overrides = ModuleOverrides(
            self._model, loaded.shape, device_slots.overrides, head_rows=self._keeps_logits
        )
        self._eager = EagerSteps(self._forward, device_slots.ranks, loaded.device)
        self._steps = _executor(self._eager, kernels, replayable=loaded.replayable)
        install(loaded, device_slots, self._context)

    @torch.inference_mode()
    def forward(self, batch: Batch) -> Tensor:
        """Logits [logits rows, vocab] of a batch, in the model's dtype; valid until the next pass.

        The vocabulary is the largest of the rows' own; tokens that a row's does not have are -inf.
        """
        overrides = self._overrides.of(batch)
        if not overrides and not batch.virtual_rows:
            return self._steps(batch)
        with ExitStack() as stack:
            if overrides:
                stack.enter_context(self._overrides.applied(overrides, batch))
            if batch.virtual_rows:  # after the overrides, so that virtual rows have the last word
                embedding = self._model.get_submodule(self._embedding)
                stack.enter_context(_virtual_tokens(embedding, batch.virtual_rows, self._context.prefixes))
                self._context.virtual_rows = batch.virtual_rows
                stack.callback(setattr, self._context, "virtual_rows", ())
            return self._overrides.masked(self._eager(batch), batch)

    def _forward(self, inputs: InputBuffers) -> Tensor:
        """The model's own pass, with whatever hooks are on its modules."""
        self._context.inputs = inputs
        keep = {"logits_to_keep": inputs.logits_rows} if self._keeps_logits else {}
        ids = inputs.token_ids
        if self._sampled is not None:
            ids = torch.where(ids < 0, self._sampled[(-1 - ids).clamp(min=0)], ids)
        logits: Tensor = self._model(
            input_ids=ids.unsqueeze(0),
            position_ids=inputs.positions.unsqueeze(0),
            use_cache=False,
            forward_context=self._context,
            **keep,
        ).logits[0]
        return logits if self._keeps_logits else logits[inputs.logits_rows]

    @torch.inference_mode()
    def prepare(self, max_rows: int, max_tokens: int, blocks: int) -> None:
        """Capture CUDA graphs where the backend has them, and check that replayed steps give the eager logits.

        Run once at start, on an empty KV pool of at least two blocks, whose tensors stay.

        Args:
            max_rows, max_tokens: largest number of decode rows, and of all rows, in a step.
            blocks: KV blocks of the longest sequence.
        """
        size = self._kv.keys[0].shape[1]
        self._steps.prepare(max_rows, max_tokens, blocks, blocks * size)
        lengths, ids = self._trial()
        last = [range(n - 1, n) for n in lengths]
        self._steps.check(
            _side_by_side([own[:1] for own in reversed(ids)], last, size),
            _side_by_side([own[-1:] for own in ids], last, size),
            lambda x, y: _apart(x, y) <= self._rounding,
        )

    def graph_memory(self, max_rows: int, free: Callable[[], int]) -> int:
        """Bytes of the device that `prepare` will take beside the batches; `free` says how many are free."""
        return self._steps.graph_memory(max_rows, free)

    @property
    def notes(self) -> list[str]:
        """What an operator should know."""
        disabled = self._steps.disabled
        return [] if disabled is None or self._device.type == "cpu" else [f"steps run without CUDA graphs: {disabled}"]

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

    def pack(self) -> None:
        """Lay the linear modules' weights out for the kernels, quantised if that was asked for."""
        pack_linears(self._loaded, self._device_slots, self._context)

    @torch.no_grad()  # not inference mode: see `compute_oracle`
    def self_check(self) -> None:
        """Compare the base with the untouched model, pack it, and compare it once more as it is served.

        Run once at start, on an empty KV pool of at least `blocks_needed` blocks. Raises ModelUnsupported. See
        `self_check.py`.
        """
        loaded, context, oracle = self._loaded, self._context, self._loaded.oracle
        size = context.kv.keys[0].shape[1]
        if oracle.float32_tolerance is not None:
            own = context.kv
            context.kv = KVTensors(loaded.layers, blocks_needed(size), size, torch.float32, self._device)
            with InFloat32(), eager_experts(self._model):
                check(self._eager, oracle, size, oracle.float32_tolerance)
            context.kv = own
        with refusing(oracle.kind):
            self.pack()
        check(self._eager, oracle, size, oracle.tolerance if loaded.scheme is None else QUANTIZED_TOLERANCE)


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


def _executor(eager: EagerSteps, kernels: Kernels, *, replayable: bool) -> StepExecutor:
    """How steps run: replayed in the way the backend supports, if the model's passes can be replayed at all."""
    if not replayable:
        eager.disabled = "not every step of one shape makes the same calls"
    elif kernels.replay == "recorded_steps":
        return RecordedSteps(eager, kernels)
    elif kernels.replay == "cuda_graphs" and kernels.graph_buckets is not None:
        return CudaGraphs(eager, kernels, kernels.graph_buckets)
    else:
        eager.disabled = f"the {kernels.name} kernels cannot replay a step"
    return eager


@contextmanager
def _virtual_tokens(
    embedding: nn.Module, virtual_rows: Sequence[AdapterRows], prefixes: Mapping[int, Prefix]
) -> Iterator[None]:
    """Have the input embedding [1, tokens] → [1, tokens, hidden] return the adapters' embeddings of virtual tokens.

    They replace rows of what the module returns, so whatever the model does to its embeddings after that is done to
    them too, as in PEFT.
    """

    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        for start, end, slot, _, first in virtual_rows:
            rows = prefixes[slot].embeddings
            if rows is not None:
                output[0, start:end] = rows[first : first + end - start]
        return output

    handle = embedding.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
