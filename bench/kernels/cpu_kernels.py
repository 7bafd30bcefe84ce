"""LoRA delta and attention kernels on the CPU: native against the torch reference and the memory-bandwidth floor.

    python -m bench.kernels.cpu_kernels --quick

Figures are medians. The floor is the bytes that a call has to read ÷ the bandwidth measured at the start; a second
measurement at the end shows whether that was stable. Calls cycle through the weights and KV of many layers, so that
they are not in the L2 cache. A large last-level cache can still be faster than memory: then the ratio is below one.
Prefill is bound by arithmetic, so every row also gives GFLOP/s. The last line is JSON.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch

from bench.machine import describe
from bench.report import json_line
from bench.roofline import read_bandwidth
from lora_serve.kernels.contract import AttentionMetadata, Delta, DeltaGroup, Kernels, Segments
from lora_serve.kernels.reference import ReferenceKernels
from lora_serve.kernels.select import select

CPU = torch.device("cpu")
DTYPE = torch.bfloat16
GROUPS = {  # Qwen2.5-0.5B: (in, out of each module that shares the input)
    "qkv": (896, (896, 128, 128)),
    "o": (896, (896,)),
    "gate_up": (896, (4864, 4864)),
    "down": (4864, (896,)),
}
HEADS, KV_HEADS, HEAD_DIM, BLOCK = 14, 2, 64, 16
MIXED = (8, 16, 32, 64, 128)
ROTATE_BYTES = 160 << 20  # weights or KV that the calls of one row cycle through
MAX_LAYERS = 24


@dataclass(frozen=True)
class Row:
    """One measured size: times in µs, native ÷ floor, GFLOP/s of the native kernel."""

    kernel: str
    what: str
    native_us: float
    reference_us: float
    floor_us: float
    ratio: float
    gflops: float


@dataclass(frozen=True)
class Work:
    """A call to time, `call(kernels, turn)`, with the bytes that it has to read and its operations."""

    kernel: str
    what: str
    nbytes: int
    operations: int
    call: Callable[[Kernels, int], object]


def median_us(call: Callable[[int], object], repeats: int) -> float:
    """Median time of a call in µs, after one warm-up."""
    call(0)
    taken = []
    for turn in range(1, repeats + 1):
        begin = time.perf_counter()
        call(turn)
        taken.append(time.perf_counter() - begin)
    return statistics.median(taken) * 1e6


def int32(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def layers_for(nbytes: int) -> int:
    return max(2, min(MAX_LAYERS, ROTATE_BYTES // nbytes))


def delta_work(name: str, ranks: tuple[int, ...], rows: int) -> Work:
    """The LoRA delta of one group of modules: a segment of `rows` rows per rank, each with its own adapter."""
    in_features, out_features = GROUPS[name]
    width = in_features * len(out_features) + sum(out_features)
    nbytes = sum(ranks) * width * DTYPE.itemsize
    groups = []
    for _ in range(layers_for(nbytes)):
        group = DeltaGroup(in_features, out_features, len(ranks) + 1, DTYPE, CPU)
        for module, out in enumerate(out_features):
            for slot, rank in enumerate(ranks, start=1):
                group.set(
                    module, slot, Delta(torch.randn(rank, in_features).to(DTYPE), torch.randn(rank, out).to(DTYPE))
                )
        groups.append(group)
    tokens = rows * len(ranks)
    starts = list(range(0, tokens, rows))
    segments = Segments(
        int32(starts),
        int32([start + rows for start in starts]),
        int32(list(range(1, len(ranks) + 1))),
        torch.ones(len(ranks)),
        max_rows=rows,
        max_rank=max(ranks),
    )
    x = torch.randn(tokens, in_features).to(DTYPE)
    outputs = [torch.zeros(tokens, out, dtype=DTYPE) for out in out_features]
    kinds = "mixed" if len(set(ranks)) > 1 else f"r{ranks[0]}"
    what = f"{name} {kinds}, {len(ranks)} × {rows} rows"

    def call(kernels: Kernels, turn: int) -> None:
        kernels.delta(x, outputs, groups[turn % len(groups)], segments)

    return Work("delta", what, nbytes, 2 * rows * sum(ranks) * width, call)


def attention_work(sequences: int, context: int, rows: int) -> Work:
    """Paged attention of `rows` query rows per sequence."""
    per_sequence = -(-context // BLOCK)
    blocks = sequences * per_sequence
    nbytes = sequences * context * KV_HEADS * HEAD_DIM * 2 * DTYPE.itemsize
    pools = [
        [torch.randn(blocks, BLOCK, KV_HEADS, HEAD_DIM).to(DTYPE) for _ in range(2)] for _ in range(layers_for(nbytes))
    ]
    metadata = AttentionMetadata(
        int32(list(range(0, rows * sequences + 1, rows))),
        int32([context] * sequences),
        torch.randperm(blocks).int().view(sequences, per_sequence),
        rows,
        context,
    )
    q = torch.randn(HEADS, sequences * rows, HEAD_DIM).to(DTYPE).transpose(0, 1)
    scores = sequences * HEADS * sum(range(context - rows + 1, context + 1))

    def call(kernels: Kernels, turn: int) -> None:
        keys, values = pools[turn % len(pools)]
        kernels.attention(q, keys, values, metadata, HEAD_DIM**-0.5)

    what = f"{sequences} × {rows} rows, context {context}"
    return Work("attention", what, nbytes, 4 * HEAD_DIM * scores, call)


def overhead_work() -> Work:
    """The smallest possible delta: the overhead of a call."""
    group = DeltaGroup(16, (16,), 2, DTYPE, CPU)
    group.set(0, 1, Delta(torch.zeros(1, 16, dtype=DTYPE), torch.zeros(1, 16, dtype=DTYPE)))
    segments = Segments(int32([0]), int32([1]), int32([1]), torch.ones(1), max_rows=1, max_rank=1)
    x = torch.zeros(1, 16, dtype=DTYPE)
    return Work("delta", "call overhead, 1 module", 64, 64, lambda kernels, _: kernels.delta(x, [x], group, segments))


def works(quick: bool) -> Iterator[Work]:
    """All sizes to measure."""
    yield overhead_work()
    ranks = (16, 128) if quick else (8, 16, 64, 128)
    for name in GROUPS:
        for rank in ranks:
            for distinct in (1, 8, 32):
                yield delta_work(name, (rank,) * distinct, rows=1)
            for rows in (8,) if quick else (8, 32):
                yield delta_work(name, (rank,), rows)
            for rows in (64, 512) if quick else (64, 128, 256, 512):
                yield delta_work(name, (rank,), rows)
        yield delta_work(name, (MIXED * 2)[:8], rows=1)
        yield delta_work(name, MIXED, rows=64)
    for context in (128, 1024, 4096):
        yield attention_work(8, context, rows=1)
    yield attention_work(1, 512, rows=512)
    yield attention_work(1, 2048, rows=512)


def measure(work: Work, native: Kernels, reference: Kernels, bytes_per_second: float, repeats: int) -> Row:
    native_us = median_us(lambda turn: work.call(native, turn), repeats)
    reference_us = median_us(lambda turn: work.call(reference, turn), max(3, repeats // 10))
    floor_us = work.nbytes / bytes_per_second * 1e6
    return Row(
        work.kernel,
        work.what,
        native_us,
        reference_us,
        floor_us,
        native_us / floor_us,
        work.operations / native_us / 1e3,
    )


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--quick", action="store_true", help="fewer sizes and repeats")
    options.add_argument("--threads", type=int, default=torch.get_num_threads())
    chosen = options.parse_args()
    torch.set_num_threads(chosen.threads)
    torch.manual_seed(0)
    native, reference = select(CPU), ReferenceKernels()
    before = read_bandwidth(CPU)
    head = {
        "bench": "cpu_kernels",
        "threads": chosen.threads,
        "backend": native.name,
        "dtype": str(DTYPE),
    }
    print(*(f"{key}: {value}" for key, value in {**describe(), **head}.items()), sep="\n")
    print(f"\n{'':44}{'native µs':>11}{'torch µs':>11}{'floor µs':>11}{'÷ floor':>9}{'GFLOP/s':>9}")
    rows = []
    for work in works(chosen.quick):
        row = measure(work, native, reference, before, repeats=20 if chosen.quick else 60)
        rows.append(row)
        print(
            f"{row.kernel + ' ' + row.what:44}{row.native_us:11.1f}{row.reference_us:11.1f}"
            f"{row.floor_us:11.1f}{row.ratio:9.2f}{row.gflops:9.0f}"
        )
    after = read_bandwidth(CPU)
    print(f"\nmemory read at {before / 1e9:.1f} GB/s at the start (used for the floors), {after / 1e9:.1f} at the end")
    print(
        json_line(head | {"machine": describe(), "bandwidth": [before, after], "rows": [asdict(row) for row in rows]})
    )


if __name__ == "__main__":
    main()
