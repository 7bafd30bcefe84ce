"""Trains adapters on the resident base: what the rest of the engine uses of this package.

    trainer = Trainer(base, memory)
    adapter = trainer.create("name", LoraSettings(r=16), AdamSettings())
    running = trainer.forward_backward([MicroBatch(adapter, sequences), …])    # of one or several adapters
    while running.advance(): …                                                 # a quantum each; serve in between
    losses = [result.loss for result in running.results]
    adapter.optimizer_step(learning_rate)                                      # one quantum
    save_peft(adapter, folder)

Gradients add up until the adapter's optimizer step, so any number of passes may come before one. The loss of a
micro-batch is a sum: who wants a mean divides its weights. Not thread-safe: quanta run in the engine's loop.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from lora_serve.engine.training.fused_pass import FusedPass, pass_bytes
from lora_serve.engine.training.heap_limit import HeapLimit
from lora_serve.engine.training.initial_weights import InitialWeights, lora_weights
from lora_serve.engine.training.method_settings import AdapterSettings
from lora_serve.engine.training.micro_batch import MicroBatch
from lora_serve.engine.training.trainable_adapter import TrainableAdapter, adapter_bytes, step_bytes
from lora_serve.engine.training.training_settings import AdamSettings, LoraSettings
from lora_serve.errors import BadRequest, Overloaded
from lora_serve.model.trainable_base import TrainableBase


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes that training takes beside the resident base.

    Attributes:
        adapter: weights, gradients and the optimizer's state of one adapter, as long as it is trained.
        step: of its optimizer's step, as long as that runs.
        running: of the pass that is running.
    """

    adapter: int
    step: int
    running: int


class Trainer:
    """The adapters that are trained on one base, within a memory budget.

    Attributes:
        adapters: by name.
        memory: bytes for all adapters in training, a step of an optimizer and one running pass.

    Args:
        base: checked (`TrainableBase.check`).
    """

    def __init__(self, base: TrainableBase, memory: int) -> None:
        self._base, self.memory = base, memory
        self.adapters: dict[str, TrainableAdapter] = {}
        self._heap = HeapLimit() if base.device.type == "cpu" else None

    def __repr__(self) -> str:
        return f"<Trainer {len(self.adapters)} adapters, {_mib(self.used)} of {_mib(self.memory)}>"

    @property
    def used(self) -> int:
        """Bytes of the adapters in training."""
        return sum(adapter.nbytes for adapter in self.adapters.values())

    @property
    def free(self) -> int:
        """Bytes that are left for a running pass, beside the adapters and a step of the largest one's optimizer."""
        return self.memory - self.used - self._step

    @property
    def _step(self) -> int:
        """Bytes of a step of the largest adapter's optimizer, which may come between two quanta of a pass."""
        return max((step_bytes(adapter.nbytes) for adapter in self.adapters.values()), default=0)

    def needed(self, settings: AdapterSettings, tokens: int) -> TrainingMemory:
        """What an adapter with these settings, and a pass over so many tokens, would take."""
        adapter = adapter_bytes(self._base.shape, settings)
        return TrainingMemory(adapter, step_bytes(adapter), pass_bytes(self._base, tokens))

    def check(self, name: str, settings: AdapterSettings) -> None:
        """Raise BadRequest for an adapter that can never be made, Overloaded, with the numbers, if not now."""
        if name in self.adapters:
            raise BadRequest(f"{name!r} is in training already", param="name")
        adapter = adapter_bytes(self._base.shape, settings)
        step = step_bytes(adapter)
        takes = f"training {name!r} takes {_mib(adapter)}, and {_mib(step)} for a step of its optimizer"
        if adapter + step > self.memory:
            raise BadRequest(f"{takes}; all training has {_mib(self.memory)}", param=settings.SIZED_BY)
        free = self.memory - self.used - max(step, self._step)
        if adapter > free or not self._base.free_slots:
            raise Overloaded(
                f"{takes}; {_mib(max(0, free))} of {_mib(self.memory)} and {self._base.free_slots} of "
                f"{self._base.deltas.slots} slots are free beside what is trained already: {len(self.adapters)}"
            )

    def initial_weights(self, settings: LoraSettings, go_on: Callable[[], bool]) -> dict[str, InitialWeights]:
        """What an adapter begins with, for `create`; see `lora_weights`. May run in any thread."""
        return lora_weights(self._base, settings, go_on)

    def create(
        self,
        name: str,
        settings: AdapterSettings,
        adam: AdamSettings | None = None,
        initial: Mapping[str, InitialWeights] | None = None,
    ) -> TrainableAdapter:
        """Start to train an adapter. Raises as `check` does.

        Args:
            initial: `lora_weights` of the settings; None: they are computed now.
        """
        self.check(name, settings)
        adapter = TrainableAdapter(name, self._base, settings, adam, initial)
        self.adapters[name] = adapter
        return adapter

    def close(self, adapter: TrainableAdapter) -> None:
        """Stop to train an adapter; its weights can still be read, and a pass over it must not go on."""
        if self.adapters.pop(adapter.name, None) is not None:
            adapter.close()

    def forward_backward(self, batches: Sequence[MicroBatch]) -> FusedPass:
        """A pass that adds the gradients of all micro-batches' losses to those of their adapters.

        What is left of the memory keeps layers from being computed twice.
        Raises BadRequest naming what does not fit, before anything is computed.
        """
        tokens = self._check(batches)
        layer = self._layer_bytes(batches)
        free = self.free - pass_bytes(self._base, tokens) - layer
        kept = max(0, min(self._base.layers, free // (tokens * self._base.token_bytes + layer)))
        return FusedPass(self._base, batches, gradients=True, kept_layers=kept, heap=self._heap)

    def evaluate(self, batches: Sequence[MicroBatch]) -> FusedPass:
        """A pass that computes losses and log-probabilities only."""
        self._check(batches)
        return FusedPass(self._base, batches, gradients=False, heap=self._heap)

    def _check(self, batches: Sequence[MicroBatch]) -> int:
        """The number of tokens."""
        for batch in batches:
            if self.adapters.get(batch.adapter.name) is not batch.adapter:
                raise BadRequest(f"{batch.adapter.name!r} is not in training")
            for sequence in batch.sequences:
                before = batch.adapter.virtual_tokens + batch.adapter.prefix_tokens
                sequence.check(self._base.vocabulary, self._base.max_length - before)
        tokens = sum(batch.tokens for batch in batches)
        if not tokens:
            raise BadRequest("there is nothing to train on", param="sequences")
        needed = pass_bytes(self._base, tokens)
        if needed > self.free:
            raise BadRequest(
                f"a pass over {tokens} tokens takes {_mib(needed)}; "
                f"{_mib(self.free)} of {_mib(self.memory)} are free: make it smaller",
                param="sequences",
            )
        return tokens

    def _layer_bytes(self, batches: Sequence[MicroBatch]) -> int:
        """Bytes that a layer saves for its backward pass because of the adapters: gains, magnitudes, prefixes."""
        item, heads = self._base.dtype.itemsize, self._base.shape.kv
        cached = item * max((count * (keys + values) for count, keys, values in heads), default=0)
        return sum(
            batch.tokens * item * -(-batch.adapter.layout.saved // self._base.layers)
            + len(batch.sequences) * batch.adapter.prefix_tokens * cached
            for batch in batches
        )


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"
