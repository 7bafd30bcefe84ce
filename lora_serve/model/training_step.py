"""What the modules of a training pass read besides their inputs: the flat batch's sequences and adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from lora_serve.kernels.contract import Segments


@dataclass
class Magnitude:
    """DoRA's magnitude of one adapter at one module: y = (values / norm) ⊙ (W + ΔW) x + bias.

    Attributes:
        values: m, float32 [out].
        gradient: of m, added to; the norm is a constant to it, as in PEFT.
        norm: ‖W + ΔW‖ of each output; None: not computed since W + ΔW changed.
    """

    values: Tensor
    gradient: Tensor
    norm: Tensor | None = None

    def of(self, outputs: slice) -> Magnitude:
        """That of some outputs, in the same memory."""
        return Magnitude(
            self.values[outputs], self.gradient[outputs], None if self.norm is None else self.norm[outputs]
        )


@dataclass(frozen=True)
class Gain:
    """IA³'s gain of one adapter at one module: y = values ⊙ (W x + b), or W (values ⊙ x) + b.

    Attributes:
        values: float32 [out], or [in] on the input.
        gradient: of the values, added to.
    """

    values: Tensor
    gradient: Tensor
    on_input: bool


@dataclass(frozen=True)
class DeltaDropout:
    """Dropout of the deltas' input: each number is left out with probability `rate`, others are divided by 1 − rate.

    The mask of a module depends on the seed only, so a layer that is computed again has the same one.

    Attributes:
        first, count: the rows are those from `first` on of a mask over so many; None: they are all of them.
    """

    rate: float
    seed: int
    first: int = 0
    count: int | None = None


@dataclass(frozen=True)
class AdapterSpan:
    """Rows `start` to `end` of a batch, of the adapter in a slot.

    Attributes:
        magnitudes: DoRA's, by module; empty without it.
        gains: IA³'s, by module.
        dropout: of the deltas' input; such a span is in no segment.
    """

    start: int
    end: int
    slot: int
    magnitudes: Mapping[str, Magnitude] = field(default_factory=dict)
    gains: Mapping[str, Gain] = field(default_factory=dict)
    dropout: DeltaDropout | None = None


@dataclass(frozen=True)
class VirtualTokens:
    """Learned embeddings of one adapter, which take the place of the input embedding's.

    Attributes:
        table: [tokens, hidden]; requires a gradient if it is wanted.
        gradient: of the table, added to.
        rows: [sequences, tokens], the rows of the batch that they are.
    """

    table: Tensor
    gradient: Tensor
    rows: Tensor


@dataclass(frozen=True)
class TrainedPrefix:
    """Learned keys and values of virtual tokens, which consecutive sequences of one adapter attend to.

    Attributes:
        sequences: of the batch.
        values: float32 [tokens, layers · 2, heads, dim]; of layer i keys are [:, 2i], values [:, 2i + 1].
        gradient: the same, added to.
    """

    sequences: range
    values: Tensor
    gradient: Tensor


@dataclass(frozen=True)
class TrainingStep:
    """One flat batch, or some rows of it at the LM head.

    Attributes:
        lengths: of the sequences, one after the other.
        spans: rows that have an adapter, ascending.
        segments: the same for the kernels, without spans that have dropout.
        virtual_tokens, prefixes: of the adapters that have any.
    """

    lengths: Sequence[int]
    spans: Sequence[AdapterSpan]
    segments: Segments
    virtual_tokens: Sequence[VirtualTokens] = ()
    prefixes: Sequence[TrainedPrefix] = ()
