"""The resident base: runs batches through the Hugging Face model with adapters installed and paged KV."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from lora_serve.adapters.adapter import Prefix
from lora_serve.adapters.device_slots import DeviceSlots
from lora_serve.errors import BadRequest
from lora_serve.kernels.contract import Kernels
from lora_serve.kernels.host_device_copy import to_device
from lora_serve.kv.tensors import KVTensors
from lora_serve.model.batch import AdapterRows, Batch
from lora_serve.model.cuda_graphs import CudaGraphs
from lora_serve.model.forward_context import ForwardContext
from lora_serve.model.host_weights import reading_host_weights
from lora_serve.model.input_buffers import InputBuffers
from lora_serve.model.install import install, pack
from lora_serve.model.loaded_model import LoadedModel
from lora_serve.model.module_overrides import ModuleOverrides
from lora_serve.model.quantization_note import quantization_note
from lora_serve.model.recorded_steps import RecordedSteps
from lora_serve.model.self_check import (
    QUANTIZED_TOLERANCE,
    InFloat32,
    blocks_needed,
    check,
    eager_experts,
    refusing,
    relative_error,
)
from lora_serve.model.step_executor import EagerSteps, StepExecutor

log = logging.getLogger(__name__)


class ResidentBase:
    """A Hugging Face model that runs flat batches.

    Args:
        loaded: the loaded model; adapters are installed into it in place. Its linear modules compute on their own
            weights until `pack`.
        device_slots: the adapters on the device.
        kernels: the backend.
        kv: the KV cache.
        sampled: int64 [rows], on the device: tokens sampled by the previous step, which batches may refer to (`Batch`).
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
        self._embedding, self._body = loaded.shape.input_embedding, loaded.shape.body
        self._ids = loaded.shape.modules[self._embedding]["weight"][0]  # size of the vocabulary
        self._overrides = ModuleOverrides(
            self._model, loaded.shape, device_slots.overrides, head_sees_logits_rows=self._keeps_logits
        )
        self._packing_notes: list[str] = []
        self._eager = EagerSteps(self._forward, device_slots.ranks, loaded.device)
        self._steps = _executor(self._eager, kernels, replayable=loaded.replayable)
        install(loaded, device_slots, self._context)

    @torch.inference_mode()
    def forward(self, batch: Batch) -> Tensor:
        """Logits [logits rows, vocab] of a batch, in the model's dtype; valid until the next forward pass.

        `vocab` is the largest of the rows' vocabularies; tokens that are not in a row's own are -inf.
        """
        if self._sampled is not None and self._loaded.parallel is not None:
            self._loaded.parallel.broadcast(self._sampled)  # tokens are sampled by rank 0 alone
        overrides = self._overrides.for_batch(batch)
        if not overrides and not batch.virtual_rows and not batch.hidden_rows:
            return self._steps(batch)
        with ExitStack() as stack:
            if overrides:
                stack.enter_context(self._overrides.apply(overrides, batch))
            if batch.virtual_rows:  # after the overrides, which must not change virtual rows
                embedding = self._model.get_submodule(self._embedding)
                stack.enter_context(_virtual_tokens(embedding, batch.virtual_rows, self._context.prefixes))
                self._context.virtual_rows = batch.virtual_rows
                stack.callback(setattr, self._context, "virtual_rows", ())
            return self._overrides.mask_logits(self._eager(batch), batch)

    @torch.inference_mode()
    def forward_with_hidden(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits as from `forward`, and the final hidden states [hidden rows, hidden] that the head would get."""
        if not self._body:
            raise BadRequest(
                f"a {self._model.config.model_type} base gives no hidden states to embed with", param="model"
            )
        kept: list[Tensor] = []
        body = self._model.get_submodule(self._body)
        handle = body.register_forward_hook(lambda module, args, output: kept.append(output[0][0]))
        try:
            logits = self.forward(batch)
        finally:
            handle.remove()
        return logits, kept[0].index_select(0, to_device(batch.hidden_rows, torch.int64, self._device))

    def _forward(self, inputs: InputBuffers) -> Tensor:
        """Run the model eagerly, including any hooks on its modules."""
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
        """Capture CUDA graphs if the backend uses them, and check that replayed steps give the eager logits.

        Called once at start, on an empty KV pool of at least two blocks, whose tensors are final.

        Args:
            max_rows, max_tokens: largest number of decode rows, and of all rows, in a step.
            blocks: KV blocks of the longest sequence.
        """
        size = self._kv.keys[0].shape[1]
        self._steps.prepare(max_rows, max_tokens, blocks, blocks * size)
        lengths, (long, short) = self._check_tokens()
        last = [range(n - 1, n) for n in lengths]
        decode = [
            _sequences_batch([own[:1] for own in (short, long)], last, size),
            _sequences_batch([own[-1:] for own in (long, short)], last, size),
        ]
        first, whole = range(1), [range(n) for n in lengths]
        mixed = [
            _sequences_batch([long[:1], short], [first, whole[1]], size),
            _sequences_batch([long, short[:1]], [whole[0], first], size),
        ]
        self._steps.check(
            [(decode[0], decode[1]), (mixed[0], mixed[1])], lambda x, y: relative_error(x, y) <= self._rounding
        )

    def graph_memory(self, max_rows: int, max_tokens: int, blocks: int, free: Callable[[], int]) -> int:
        """Bytes of device memory that CUDA graphs will take in `prepare`; `free` returns the free bytes."""
        context = blocks * self._kv.keys[0].shape[1]
        return self._steps.graph_memory(max_rows, max_tokens, blocks, context, free)

    @property
    def token_buckets(self) -> Sequence[int]:
        """Numbers of rows that steps with prompt tokens are padded to, ascending; larger steps are not padded."""
        return self._steps.token_buckets

    @property
    def notes(self) -> list[str]:
        """Remarks for the operator, in the start-up summary."""
        disabled = self._steps.disabled
        graphs = disabled is None or self._device.type == "cpu"
        return [*self._packing_notes, *([] if graphs else [f"steps run without CUDA graphs: {disabled}"])]

    @property
    def _rounding(self) -> float:
        """Relative error allowed between results that differ in the order of summation only."""
        return 1e-1 if self._quantized else {torch.float32: 1e-3, torch.float16: 2e-2}.get(self._model.dtype, 1e-1)

    def _check_tokens(self) -> tuple[tuple[int, int], list[list[int]]]:
        """Lengths and random tokens of two sequences that fit in one KV block each."""
        size = self._kv.keys[0].shape[1]
        lengths = (min(7, size), min(5, size))
        generator = torch.Generator().manual_seed(0)
        return lengths, [torch.randint(0, self._ids, (n,), generator=generator).tolist() for n in lengths]

    def pack(self) -> None:
        """Pack the weights for the kernels, and quantise them if configured."""
        loaded, kernels = self._loaded, self._context.kernels
        pack(loaded, self._device_slots, self._context)
        if loaded.scheme is not None:
            dtype = str(loaded.dtype).removeprefix("torch.")
            note = quantization_note(self._model, loaded.shape, loaded.scheme, dtype, kernels.name)
            self._packing_notes = [note]

    @torch.no_grad()  # not inference mode: see `compute_oracle`
    def self_check(self) -> None:
        """Compare the base with the untouched model, pack it, and compare it again as it is served.

        Called once at start, on an empty KV pool of at least `blocks_needed` blocks. Raises ModelUnsupported. See
        `self_check.py`.
        """
        loaded, context, oracle = self._loaded, self._context, self._loaded.oracle
        size = context.kv.keys[0].shape[1]
        if oracle.float32_tolerance is not None:
            own = context.kv
            try:
                context.kv = KVTensors(loaded.layers, blocks_needed(size), size, torch.float32, self._device)
                with InFloat32(), eager_experts(self._model), reading_host_weights(self._model, self._device):
                    check(self._eager, oracle, size, oracle.float32_tolerance)
            except torch.OutOfMemoryError as error:  # what is served needs less memory: see below
                if loaded.parallel is not None:  # the other ranks wait in the middle of the check
                    raise
                log.info("%s: float32 self-check skipped: %s", oracle.kind, str(error).partition("\n")[0])
            finally:
                context.kv = own
        with refusing(oracle.kind):
            self.pack()
        check(self._eager, oracle, size, oracle.tolerance if loaded.scheme is None else QUANTIZED_TOLERANCE)
        self._loaded = replace(loaded, oracle=replace(oracle, logits=torch.empty(0)))  # megabytes, not needed any more


def _sequences_batch(ids: list[list[int]], positions: list[range], block_size: int) -> Batch:
    """A batch of base sequences at the given positions, each in a KV block of its own; its last rows' logits."""
    counts = [len(each) for each in ids]
    return Batch(
        token_ids=[token for own in ids for token in own],
        positions=[position for own in positions for position in own],
        kv_index=[block_size * (i + 1) + position for i, own in enumerate(positions) for position in own],
        query_start=[0, *accumulate(counts)],
        context=[own[-1] + 1 for own in positions],
        block_tables=[[i + 1] for i in range(len(ids))],
        logits_rows=[end - 1 for end in accumulate(counts)],
    )


def _executor(eager: EagerSteps, kernels: Kernels, *, replayable: bool) -> StepExecutor:
    """The executor of the kernel backend: recorded steps, CUDA graphs, or eager if steps cannot be replayed."""
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
    """Replace rows of the input embedding's output [1, tokens, hidden] by the adapters' virtual-token embeddings.

    Whatever the model does to its embeddings afterwards is done to these too, as in PEFT.
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
