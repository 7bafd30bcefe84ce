"""What steps and copies cost on a device: the models that the simulated device follows.

`python -m bench.simulation.simulate` prints them beside its results. What was measured says so; the rest are guesses
until a device confirms them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lora_serve.engine.step_costs import padded
from lora_serve.kernels.gpu.graph_sizes import GRAPH_SIZES


@dataclass(frozen=True)
class Costs:
    """Seconds of a step by what is in it, and of moving adapters.

    Attributes:
        decode: of a step in which every sequence decodes: fixed, and per row.
        prompts: what any prompt token adds to a step, however few: without and with adapters.
        row: per decoding row.
        token: per prompt token.
        context: per token that a decoding row attends to.
        adapter_byte: per byte of a distinct adapter in the step.
        read_byte: per byte of an adapter, from disk to host memory.
        copy_byte: per byte of an adapter, from host memory to the device; on a CPU it stays where it is.
        overlaps: whether a step is scheduled while the one before it runs.
        buckets: tokens that a step with prompt tokens is padded to; what it is padded by costs as prompt tokens do.
    """

    name: str
    decode: float
    row: float
    prompts: tuple[float, float]
    token: float
    context: float
    adapter_byte: float
    read_byte: float
    copy_byte: float | None
    overlaps: bool
    buckets: tuple[int, ...] = ()

    def step(self, decoding: int, prompt: int, context: int, adapter_bytes: Sequence[int]) -> float:
        """Seconds of a step."""
        if prompt:
            prompt = padded(decoding + prompt, self.buckets) - decoding
        fixed = self.decode + (self.prompts[bool(adapter_bytes)] if prompt else 0.0)
        rows = self.row * decoding + self.token * prompt + self.context * context
        return fixed + rows + self.adapter_byte * sum(adapter_bytes)


# Shape of Qwen2.5-0.5B on two cores of an AMD EPYC with AVX-512 and BF16, adapters of rank 16 (18 MB).
CPU_BF16 = Costs(
    "CPU, bf16, 0.5B", decode=0.0235, row=0.0006, prompts=(0.0, 0.0), token=0.0021, context=1.2e-6,
    adapter_byte=4e-11, read_byte=1 / 1.5e9, copy_byte=None, overlaps=False,
)  # fmt: skip
CPU_INT8 = Costs(
    "CPU, int8, 0.5B", decode=0.0105, row=0.0004, prompts=(0.0, 0.0), token=0.0007, context=1.2e-6,
    adapter_byte=4e-11, read_byte=1 / 1.5e9, copy_byte=None, overlaps=False,
)  # fmt: skip
# Shape of Llama 3.1 8B on an NVIDIA H200, as measured: a decode step is replayed from a graph, one with prompt tokens
# is not and takes 24 ms whatever its size, 44 with adapters; from 1,000 tokens on their arithmetic is seen.
H200_MEASURED = Costs(
    "H200, 8B, as measured", decode=0.0049, row=2.6e-5, prompts=(0.0175, 0.0375), token=1.4e-5, context=2.2e-8,
    adapter_byte=1 / 1.0e12, read_byte=1 / 1.5e9, copy_byte=1 / 55e9, overlaps=True,
)  # fmt: skip
# The same with mixed steps replayed too, padded to buckets: what is intended, confirmed by no device.
H200_INTENDED = Costs(
    "H200, 8B, mixed steps replayed (intended)", decode=0.0049, row=2.6e-5, prompts=(0.0005, 0.0008), token=2.2e-5,
    context=2.2e-8, adapter_byte=1 / 2.5e12, read_byte=1 / 1.5e9, copy_byte=1 / 55e9, overlaps=True,
    buckets=GRAPH_SIZES.tokens,
)  # fmt: skip
ALL = (CPU_BF16, CPU_INT8, H200_MEASURED, H200_INTENDED)
