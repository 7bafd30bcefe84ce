"""Problems that `tune.py` measures launch plans on: layers with deltas, quantised ones and attention of known models.

As in a step, every call reads weights that no cache holds: the layers of a problem are as many as it takes to be larger
than the cache, each with adapters of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.shapes import SHAPES
from lora_serve.kernels.contract import AttentionMetadata, Delta, DeltaGroup, Kernels, Segments
from lora_serve.kernels.gpu.graph_sizes import MAX_RANK, MAX_SEGMENT_ROWS
from lora_serve.kernels.gpu.plan_table import AttentionProblem, DeltaProblem, MatmulProblem, rows_bucket
from lora_serve.kernels.packed_weight import PackedWeight, Scheme
from lora_serve.kernels.reference import ReferenceKernels

DTYPE = torch.bfloat16
RANK = 16
RANKS = (8, 16, 32, 64, 128)
MOST_LAYERS = 4
TOLERANCE = 2e-2  # of the largest output
MODELS = ("llama-3.1-8b", "qwen2.5-1.5b", "qwen2.5-0.5b")
DECODE_ROWS = (1, 32, 8, 64, 16, 2, 4, 128, 256)  # the ones that goals are set for first
PREFILL_ROWS = (2048, 512, 1024, 256, 128)
QUANTIZED_ROWS = (1, 32, 8, 128, 512, 2048)
ATTENTION_ROWS = (32, 1, 8, 64, 128, 256)
CONTEXT, LONGEST = 512, 8192  # tokens of sequences that decode; of the longest one, which graphs are captured for
BLOCK = 16  # tokens of a KV block
REFERENCE = ReferenceKernels()


@dataclass(frozen=True)
class Group:
    """Linear modules of a model that read the same input."""

    model: str
    name: str
    in_features: int
    out_features: tuple[int, ...]


def groups(model: str) -> list[Group]:
    """The four groups of a layer."""
    linears = SHAPES[model].linears()
    members = {
        "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "o": ("self_attn.o_proj",),
        "gate+up": ("mlp.gate_proj", "mlp.up_proj"),
        "down": ("mlp.down_proj",),
    }
    return [
        Group(model, name, linears[own[0]][0], tuple(linears[each][1] for each in own)) for name, own in members.items()
    ]


class DeltaCase:
    """One group at one number of rows, with one mix of adapters.

    Args:
        ranks: of the rows' adapters, one each, or of the one adapter that all rows have.
        long: whether the rows are one segment, as of a prompt; else segments are cut as CUDA graphs cut them.
        cache: bytes that weights must be more than.
    """

    def __init__(
        self, kernels: Kernels, group: Group, rows: int, ranks: Sequence[int], *, long: bool, cache: int, device: str
    ) -> None:
        self.kernels, self.rows = kernels, rows
        self.problem = DeltaProblem(group.in_features, group.out_features, rows_bucket(rows), long)
        nbytes = DTYPE.itemsize * group.in_features * sum(group.out_features)
        self._layers: list[list[tuple[PackedWeight, None]]] = []
        self._groups: list[DeltaGroup] = []
        self.x = torch.randn(rows, group.in_features, device=device).to(DTYPE)
        for _ in range(min(MOST_LAYERS, cache // nbytes + 2)):
            weights = [
                (torch.randn(out, group.in_features, device=device) / group.in_features**0.5).to(DTYPE)
                for out in group.out_features
            ]
            self._layers.append([(packed, None) for packed in kernels.pack(weights)])
            self._groups.append(_random_deltas(group, ranks, device))
        self.gated = group.name == "gate+up"
        self.segments = _segments(rows, len(ranks), device, long=long, rank=max(ranks))
        self._wanted: list[Tensor] = []

    def run(self) -> list[list[Tensor]]:
        """All layers with deltas, one after the other."""
        return [self._call(self.kernels, layer) for layer in range(self.calls)]

    def base(self) -> list[list[Tensor]]:
        """All layers without deltas."""
        found = [self.kernels.linear(self.x, layers) for layers in self._layers]
        return [[self.kernels.gated_activation(*pair, "silu")] for pair in found] if self.gated else found

    def _call(self, kernels: Kernels, layer: int) -> list[Tensor]:
        given = (self.x, self._layers[layer], self._groups[layer], self.segments)
        return [kernels.adapted_gated_linear(*given, "silu")] if self.gated else kernels.adapted_linear(*given)

    @property
    def calls(self) -> int:
        return len(self._layers)

    def error(self) -> float:
        """The largest error of the first layer, relative to its largest output."""
        self._wanted = self._wanted or self._call(REFERENCE, 0)
        got = self._call(self.kernels, 0)
        return max(relative_error(*pair) for pair in zip(got, self._wanted, strict=True))


class MatmulCase:
    """One quantised layer, of all outputs of a group, at one number of rows."""

    def __init__(self, kernels: Kernels, group: Group, rows: int, scheme: Scheme, *, cache: int, device: str) -> None:
        self.kernels, self.rows = kernels, rows
        out, wide = sum(group.out_features), group.in_features
        self.problem = MatmulProblem(wide, out, scheme, rows_bucket(rows))
        self.x = torch.randn(rows, wide, device=device).to(DTYPE)
        count = min(2 * MOST_LAYERS, 2 * cache // (out * wide) + 2)
        weights = [(torch.randn(out, wide, device=device) / wide**0.5).to(DTYPE) for _ in range(count)]
        self._layers = [kernels.pack([weight], scheme)[0] for weight in weights]
        (self._wanted,) = REFERENCE.linear(self.x, [(REFERENCE.pack(weights[:1], scheme)[0], None)])

    def run(self) -> list[list[Tensor]]:
        return [self.kernels.linear(self.x, [(packed, None)]) for packed in self._layers]

    @property
    def calls(self) -> int:
        return len(self._layers)

    def error(self) -> float:
        """As of `DeltaCase`."""
        (got,) = self.kernels.linear(self.x, [(self._layers[0], None)])
        return relative_error(got, self._wanted)


class AttentionCase:
    """Attention of several layers: of sequences that decode, or of one prompt, at a model's heads.

    Args:
        sequences, rows: how many, and rows of each; its context is `CONTEXT`, or the prompt itself.
        cache: bytes that keys and values must be more than.
    """

    def __init__(self, kernels: Kernels, model: str, sequences: int, rows: int, *, cache: int, device: str) -> None:
        shape = SHAPES[model]
        context, self.kernels, self.rows = max(CONTEXT if rows == 1 else 0, rows), kernels, sequences * rows
        share, self._scale = shape.heads // shape.kv_heads, shape.head_dim**-0.5
        heads = (shape.kv_heads, share, shape.head_dim, shape.head_dim)
        self.problem = AttentionProblem(*heads, DTYPE.itemsize, rows_bucket(sequences if rows == 1 else rows))
        width = -(-context // BLOCK)
        pool = (sequences * width, BLOCK, shape.kv_heads, shape.head_dim)
        nbytes = 2 * DTYPE.itemsize * sequences * context * shape.kv_heads * shape.head_dim
        self._pools = [
            tuple(torch.randn(pool, device=device).to(DTYPE) for _ in range(2))
            for _ in range(min(MOST_LAYERS, cache // nbytes + 2))
        ]
        self._q = torch.randn(self.rows, shape.heads, shape.head_dim, device=device).to(DTYPE)
        counts = {"dtype": torch.int32, "device": device}
        self._metadata = AttentionMetadata(
            torch.arange(0, self.rows + 1, rows, **counts),
            torch.full((sequences,), context, **counts),
            torch.randperm(pool[0], device=device).to(torch.int32).view(sequences, width),
            rows,
            max(LONGEST, context),
        )
        self._wanted: Tensor | None = None

    def run(self) -> list[list[Tensor]]:
        return [[self._call(self.kernels, layer)] for layer in range(self.calls)]

    def _call(self, kernels: Kernels, layer: int) -> Tensor:
        return kernels.attention(self._q, *self._pools[layer], self._metadata, self._scale)

    @property
    def calls(self) -> int:
        return len(self._pools)

    def error(self) -> float:
        """As of `DeltaCase`."""
        self._wanted = self._call(REFERENCE, 0) if self._wanted is None else self._wanted
        return relative_error(self._call(self.kernels, 0), self._wanted)


def delta_cases(
    kernels: Kernels, group: Group, rows: int, *, long: bool, cache: int, device: str
) -> Iterator[DeltaCase]:
    """The mixes that one plan must serve: a graph does not know which adapters its rows will have."""
    mixes = [[RANK]]
    if not long and rows > 1:
        mixes += [[RANK] * rows, [RANKS[row % len(RANKS)] for row in range(rows)]]
    for ranks in mixes:
        yield DeltaCase(kernels, group, rows, ranks, long=long, cache=cache, device=device)


def _random_deltas(group: Group, ranks: Sequence[int], device: str) -> DeltaGroup:
    made = DeltaGroup(group.in_features, group.out_features, len(ranks) + 1, DTYPE, torch.device(device))
    for module, out in enumerate(group.out_features):
        for slot, rank in enumerate(ranks, 1):
            a = torch.randn(rank, group.in_features, device=device) / group.in_features**0.5
            made.set(module, slot, Delta(a.to(DTYPE), (torch.randn(rank, out, device=device) / rank**0.5).to(DTYPE)))
    return made


def _segments(rows: int, adapters: int, device: str, *, long: bool, rank: int) -> Segments:
    """One segment of all rows; or, with the bounds and the number of segments of a graph, short ones and empty ones."""
    if long:
        runs, bounds = [(0, rows, 1)], (rows, rank)
    else:
        step = 1 if adapters > 1 else MAX_SEGMENT_ROWS
        runs = [(row, min(row + step, rows), row + 1 if adapters > 1 else 1) for row in range(0, rows, step)]
        runs += [(0, 0, 0)] * (rows - len(runs))
        bounds = (MAX_SEGMENT_ROWS, MAX_RANK)
    start, end, slot = (torch.tensor(each, dtype=torch.int32, device=device) for each in zip(*runs, strict=True))
    return Segments(start, end, slot, torch.ones(len(runs), device=device), *bounds)


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """The largest error relative to the largest value; infinite if something is not finite."""
    if not bool(got.isfinite().all()):
        return torch.inf
    return float((got.float() - wanted.float()).abs().max() / wanted.float().abs().max())
