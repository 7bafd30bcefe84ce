"""Launch plans measured on a GPU: block sizes, splits and launch order by class of problem, one JSON file per card.

`make gpu-tune` measures and writes a file into the folder `tuned` beside this module. A card's own file is used;
without one, that of another card of the same compute capability. A problem that it does not hold, or a card without a
file, gets the plans that `delta.py`, `matmul.py` and `attention.py` choose by rule. A plan decides speed alone: every
plan gives the same result up to the order of sums.
"""

from __future__ import annotations

import logging
from functools import cache
from pathlib import Path
from typing import Literal

import msgspec
import torch

from lora_serve.kernels.packed_weight import Scheme

log = logging.getLogger(__name__)

FOLDER = Path(__file__).with_name("tuned")
FORMAT = 1  # of the files
MOST_ROWS = 1 << 13  # rows beyond are planned as so many

# How a kernel follows the one before: after it; on a stream beside the base's product; or with its programs started
# while the one before still runs (programmatic dependent launch, from compute capability 9 on).
Launch = Literal["in_turn", "beside", "dependent"]


class DeltaProblem(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A group's calls that share a plan.

    Attributes:
        rows: `rows_bucket` of the call's rows.
        long: whether a segment may be longer than a tile of few rows.
    """

    in_features: int
    out_features: tuple[int, ...]
    rows: int
    long: bool


class DeltaPlan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How shrink and expand are launched.

    Attributes:
        splits: most parts that the input is cut into.
        block_m, block_k, block_n: rows, inputs and outputs per iteration of a program.
        block_r: ranks per iteration.
        shrink_warps, expand_warps: of a program.
        launch: "beside": shrink, while a CUDA graph is captured; "dependent": both.
        gated: whether the projections of a gated MLP are expanded and gated by one kernel, a row to a program.
    """

    splits: int
    block_m: int
    block_k: int
    block_n: int
    block_r: int
    shrink_warps: int
    expand_warps: int
    launch: Launch
    gated: bool = False

    def __post_init__(self) -> None:
        _check_range("splits", self.splits, 1, 16)
        _check_range("block_m", self.block_m, 16, 128)
        _check_range("block_k", self.block_k, 16, 1024)
        _check_range("block_n", self.block_n, 16, 2048)
        _check_range("block_r", self.block_r, 16, 128)
        _check_range("shrink_warps", self.shrink_warps, 1, 16)
        _check_range("expand_warps", self.expand_warps, 1, 16)


class MatmulProblem(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A quantised layer's calls that share a plan; `rows` is `rows_bucket` of the call's."""

    in_features: int
    out_features: int
    scheme: Scheme
    rows: int


class MatmulPlan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a product of quantised weights is launched.

    Attributes:
        splits: most parts that the input is cut into.
        block_m, block_n: rows and outputs of a program.
        warps, stages: of a program.
    """

    splits: int
    block_m: int
    block_n: int
    warps: int
    stages: int

    def __post_init__(self) -> None:
        _check_count("splits", self.splits, 64)
        _check_range("block_m", self.block_m, 16, 256)
        _check_range("block_n", self.block_n, 16, 512)
        _check_range("warps", self.warps, 1, 16)
        _check_count("stages", self.stages, 8)


class AttentionProblem(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Calls of attention that share a plan.

    Attributes:
        share: query heads of a kv head.
        itemsize: bytes of a number.
        size: `rows_bucket` of the sequences that decode, or of a step's tokens where there are prompts.
    """

    kv_heads: int
    share: int
    key_dim: int
    value_dim: int
    itemsize: int
    size: int


class DecodeAttentionPlan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How sequences of one row attend.

    Attributes:
        tokens, warps, stages: of a program: context tokens per iteration, and iterations under way.
        programs: per multiprocessor, until which contexts are cut into splits.
        least_part: fewest tokens of a split.
    """

    tokens: int
    warps: int
    stages: int
    programs: int
    least_part: int

    def __post_init__(self) -> None:
        _check_range("tokens", self.tokens, 16, 256)
        _check_range("warps", self.warps, 1, 16)
        _check_count("stages", self.stages, 8)
        _check_count("programs", self.programs, 32)
        _check_range("least_part", self.least_part, 16, 4096)


class PrefillAttentionPlan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How sequences of more rows attend: query rows and context tokens per iteration of a program, warps, stages."""

    rows: int
    tokens: int
    warps: int
    stages: int

    def __post_init__(self) -> None:
        _check_range("rows", self.rows, 16, 256)
        _check_range("tokens", self.tokens, 16, 256)
        _check_range("warps", self.warps, 1, 16)
        _check_count("stages", self.stages, 8)


class DeltaEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    problem: DeltaProblem
    plan: DeltaPlan


class MatmulEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    problem: MatmulProblem
    plan: MatmulPlan


class DecodeAttentionEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    problem: AttentionProblem
    plan: DecodeAttentionPlan


class PrefillAttentionEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    problem: AttentionProblem
    plan: PrefillAttentionPlan


class PlanFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A file's content.

    Attributes:
        card, capability, triton: what it was measured on.
        pointwise: launch of norms, gated activations and rotary embeddings; not "beside".
    """

    format: int
    card: str
    capability: tuple[int, int]
    triton: str
    pointwise: Literal["in_turn", "dependent"]
    delta: tuple[DeltaEntry, ...]
    matmul: tuple[MatmulEntry, ...]
    decode_attention: tuple[DecodeAttentionEntry, ...] = ()
    prefill_attention: tuple[PrefillAttentionEntry, ...] = ()

    def __post_init__(self) -> None:
        if self.format != FORMAT:
            raise ValueError(f"format {self.format} is not {FORMAT}")
        for entries in (self.delta, self.matmul, self.decode_attention, self.prefill_attention):
            problems = [entry.problem for entry in entries]
            if len(set(problems)) < len(problems):
                raise ValueError("a problem has two plans")
        if self.capability < (9, 0) and "dependent" in {self.pointwise, *(entry.plan.launch for entry in self.delta)}:
            raise ValueError("dependent launches need compute capability 9")


class PlanTable:
    """Plans by problem.

    Attributes:
        dependent_pointwise: whether norms, gated activations and rotary embeddings are dependent launches.
    """

    def __init__(self, file: PlanFile | None = None) -> None:
        self.delta = {} if file is None else {entry.problem: entry.plan for entry in file.delta}
        self.matmul = {} if file is None else {entry.problem: entry.plan for entry in file.matmul}
        self.decode_attention = {} if file is None else {each.problem: each.plan for each in file.decode_attention}
        self.prefill_attention = {} if file is None else {each.problem: each.plan for each in file.prefill_attention}
        self.dependent_pointwise = file is not None and file.pointwise == "dependent"


NO_PLANS = PlanTable()


@cache
def rows_bucket(rows: int) -> int:
    """The next power of two, up to MOST_ROWS."""
    return min(MOST_ROWS, 1 << max(0, rows - 1).bit_length())


def read(path: Path) -> PlanFile:
    """Read a file. Raises ValueError for one that is broken, has an unknown field or a plan that cannot be."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=PlanFile)
    except msgspec.MsgspecError as error:
        raise ValueError(f"{path.name}: {error}") from error


def write(file: PlanFile, folder: Path = FOLDER) -> Path:
    """Write a card's file, replacing the one before; its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{'-'.join(file.card.lower().split())}.json"
    path.write_bytes(msgspec.json.format(msgspec.json.encode(file), indent=1) + b"\n")
    return path


def find(card: str, capability: tuple[int, int], folder: Path = FOLDER) -> PlanTable:
    """The plans for a card: its own, or of its compute capability, or none; a broken file is only warned of."""
    files = []
    for path in sorted(folder.glob("*.json")):
        try:
            files.append(read(path))
        except (ValueError, OSError) as error:
            log.warning("GPU launch plans are not used (%s); kernels are launched by rule instead", error)
    fitting = [file for file in files if file.capability == capability]
    return PlanTable(next((file for file in fitting if file.card == card), fitting[0] if fitting else None))


def current() -> PlanTable:
    """The plans for the current CUDA device; none without one."""
    if not torch.cuda.is_available():
        return NO_PLANS
    return find(torch.cuda.get_device_name(), torch.cuda.get_device_capability())


def _check_count(name: str, value: int, most: int) -> None:
    """Raise ValueError unless `value` is between 1 and `most`."""
    if not 1 <= value <= most:
        raise ValueError(f"{name} {value} is not between 1 and {most}")


def _check_range(name: str, value: int, least: int, most: int) -> None:
    """Raise ValueError unless `value` is a power of two in the range."""
    if not least <= value <= most or value & (value - 1):
        raise ValueError(f"{name} {value} is not a power of two from {least} to {most}")
