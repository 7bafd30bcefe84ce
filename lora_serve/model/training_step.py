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


@dataclass(frozen=True)
class AdapterSpan:
    """Rows `start` to `end` of a batch, of the adapter in a slot.

    Attributes:
        magnitudes: DoRA's, by module; empty without it.
    """

    start: int
    end: int
    slot: int
    magnitudes: Mapping[str, Magnitude] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainingStep:
    """One flat batch, or some rows of it at the LM head.

    Attributes:
        lengths: of the sequences, one after the other.
        spans: rows that have an adapter, ascending.
        segments: the same for the kernels.
    """

    lengths: Sequence[int]
    spans: Sequence[AdapterSpan]
    segments: Segments
