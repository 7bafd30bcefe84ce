"""Self-check at start: the resident base held against the model as transformers loaded it.

The oracle is computed before anything is fused, packed, quantised or replaced: the model's own modules under its own
eager attention, once in its own dtype and once with every operation in a wider one. What the two differ by is the
error that the model has anyway, and the resident base may have little more. It must give the oracle's logits for two
sequences of different lengths, prefilled together in one flat batch, prefilled in chunks, and decoded token by token
beside each other over the KV of earlier steps. What is seen on a few tokens only: longer contexts are not checked.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from lora_serve.errors import ModelUnsupported, ServeError
from lora_serve.model.batch import AdapterRows, Batch

log = logging.getLogger(__name__)

LENGTHS = (19, 13)  # tokens of the two sequences
# Relative errors of logits. `SHARE` of the model's own error in its dtype is accepted, and a little more: a model of a
# few layers may happen to be nearly exact. Nothing that is further off than `MOST` is a matter of rounding.
SHARE = 3.0
LEAST = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}
MOST = 0.5
UNMEASURED = {torch.float32: 1e-3, torch.float16: 2e-2}  # where nothing wider runs; 1e-1 for others
WIDER = {torch.float32: torch.float64, torch.float16: torch.float32, torch.bfloat16: torch.float32}


@dataclass(frozen=True)
class Oracle:
    """What the untouched model computes.

    Attributes:
        kind: the model's type, for messages.
        tokens: ids of the sequences, all of one length; causal, so a sequence's beginning has the same logits.
        logits: float32 [sequences, tokens, vocab], on the host.
        tolerance: relative error of logits that is rounding.
    """

    kind: str
    tokens: list[list[int]]
    logits: Tensor
    tolerance: float


class _Widened(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Run every operation on tensors of a wider type than `narrow`; parameters are cast for one operation at a time."""

    def __init__(self, narrow: torch.dtype) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._wide = WIDER[narrow]
        self._narrow = {kind for kind in WIDER if kind.itemsize < self._wide.itemsize}

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten.embedding.default:  # a few rows, not the whole table
            return self._wider(func(*args, **(kwargs or {})))
        written = {arg.name for arg in func._schema.arguments if arg.alias_info is not None and arg.alias_info.is_write}
        given = dict(zip((arg.name for arg in func._schema.arguments), args, strict=False)) | (kwargs or {})
        wide = {name: value if name in written else tree_map(self._wider, value) for name, value in given.items()}
        return func(*list(wide.values())[: len(args)], **dict(list(wide.items())[len(args) :]))

    def _wider(self, value: Any) -> Any:
        if isinstance(value, Tensor) and value.dtype in self._narrow:
            return value.to(self._wide)
        return self._wide if isinstance(value, torch.dtype) and value in self._narrow else value


@contextmanager
def refusing(kind: str) -> Iterator[None]:
    """Make whatever error a model of the type `kind` ends in a ModelUnsupported, but for those that say enough."""
    try:
        yield
    except (ServeError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # the modelling code's own, or a kernel's that the model does not fit
        reason = str(error).strip().partition("\n")[0]
        raise ModelUnsupported(f"{kind} cannot be served ({type(error).__name__}: {reason})") from error


@torch.inference_mode()
def consult(model: Any, device: torch.device, most: int, *, external: bool) -> Oracle:
    """Ask the untouched model; it must be under the attention function that it is to be asked with.

    Args:
        most: tokens that its context has.
        foreign: another library quantised it, so there is no wider type to run it in.
    Raises ModelUnsupported if its logits are not finite.
    """
    kind, dtype = model.config.model_type, model.dtype
    generator = torch.Generator().manual_seed(0)
    ids = model.get_input_embeddings().weight.shape[0]
    tokens = torch.randint(0, ids, (len(LENGTHS), min(most, max(LENGTHS))), generator=generator)

    def logits() -> Tensor:
        found: Tensor = model(input_ids=tokens.to(device), use_cache=False).logits
        return found.cpu().float()

    own = logits()
    if not own.isfinite().all():
        raise ModelUnsupported(
            f"{kind} gives logits in {str(dtype).removeprefix('torch.')} that are not finite; try another --dtype"
        )
    exact = None if external else _exactly(logits, dtype)
    if exact is None:
        return Oracle(kind, tokens.tolist(), own, 1e-1 if external else UNMEASURED.get(dtype, 1e-1))
    tolerance = min(SHARE * relative_error(own, exact) + LEAST.get(dtype, 1e-2), MOST)
    return Oracle(kind, tokens.tolist(), exact, tolerance)


def _exactly(logits: Callable[[], Tensor], dtype: torch.dtype) -> Tensor | None:
    """The logits with all operations in a wider type; None where some operation does not run in it, or for memory."""
    try:
        with _Widened(dtype):
            return logits()
    except Exception as error:
        log.info("the model's own rounding error is not known: %s", str(error).partition("\n")[0])
        return None


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """Of logits [..., vocab], up to what a softmax does not see."""
    got, wanted = (each.double() - each.double().mean(-1, keepdim=True) for each in (got, wanted))
    return float((got - wanted).norm() / wanted.norm())


def blocks_needed(block_size: int) -> int:
    """KV blocks that the check takes."""
    return len(LENGTHS) * -(-max(LENGTHS) // block_size)


def check(run: Callable[[Batch], Tensor], oracle: Oracle, block_size: int) -> None:
    """Hold a base against the oracle; raises ModelUnsupported where they differ by more than rounding.

    Args:
        run: the base's logits of a batch, on a pool of at least `blocks_needed` KV blocks that hold nothing.
    """
    with refusing(oracle.kind):
        for stage in _stages(oracle):
            error = _error(run, oracle, stage, block_size)
            if not error <= oracle.tolerance:
                raise ModelUnsupported(
                    f"{oracle.kind} {stage.name} differs from the model itself: the relative error of its logits is "
                    f"{error:.2g}, where rounding explains {oracle.tolerance:.2g}"
                )


def check_quantized(run: Callable[[Batch], Tensor], oracle: Oracle, block_size: int) -> None:
    """Hold a base that passed `check` in full precision against the oracle again, its linear modules quantised.

    What quantising costs differs from model to model and is the operator's choice, so it sets no bound on what is
    accepted here. This only tells a quantised model from a broken one, whose logits have nothing to do with the
    oracle's: they are as far from them as zeros, or further.
    """
    with refusing(oracle.kind):
        error = _error(run, oracle, next(_stages(oracle)), block_size)
        if not error < 1:
            raise ModelUnsupported(f"{oracle.kind}, quantised, is not what it was: relative error {error:.2g}")


@dataclass(frozen=True)
class _Stage:
    """One way to compute the logits of two sequences.

    Attributes:
        order: the oracle's sequences, the longer one first.
        steps: by step, the positions of each sequence.
        adapted: all rows are in a segment, of a slot without an adapter.
    """

    name: str
    order: tuple[int, int]
    steps: list[tuple[range, range]]
    adapted: bool = False


def _stages(oracle: Oracle) -> Iterator[_Stage]:
    """The sequences change places from stage to stage, so that no KV of the stage before is right by chance."""
    long, short = (min(len(oracle.tokens[0]), length) for length in LENGTHS)
    whole = (range(long), range(short))
    yield _Stage("in a flat batch", (0, 1), [whole])
    edges = [(0, long // 3, 2 * long // 3, long), (0, short // 2, short - 1, short)]
    chunks = [(range(*first), range(*second)) for first, second in zip(*map(pairwise, edges), strict=True)]
    yield _Stage("in chunks", (1, 0), chunks)
    singles = [(range(long - left, long - left + 1), range(short - left, short - left + 1)) for left in (3, 2, 1)]
    yield _Stage("decoding", (0, 1), [(range(long - 3), range(short - 3)), *singles])
    yield _Stage("beside adapters", (1, 0), [whole], adapted=True)


def _error(run: Callable[[Batch], Tensor], oracle: Oracle, stage: _Stage, block_size: int) -> float:
    """Relative error of a stage's logits, those of all its steps together."""
    tokens = [oracle.tokens[each] for each in stage.order]
    got = [run(_batch(tokens, step, block_size, adapted=stage.adapted)).cpu().float() for step in stage.steps]
    wanted = [
        oracle.logits[each, at.start : at.stop]
        for step in stage.steps
        for each, at in zip(stage.order, step, strict=True)
    ]
    return relative_error(torch.cat(got), torch.cat(wanted))


def _batch(tokens: Sequence[list[int]], step: Sequence[range], block_size: int, *, adapted: bool) -> Batch:
    """Sequences at the given positions; KV blocks are dealt out to them in turn, so that none has neighbours."""
    each = blocks_needed(block_size) // len(tokens)
    tables = [[1 + index + len(tokens) * block for block in range(each)] for index in range(len(tokens))]
    counts = [len(at) for at in step]
    segments = [AdapterRows(0, sum(counts), 0)] if adapted else []
    return Batch(
        token_ids=[own[position] for own, at in zip(tokens, step, strict=True) for position in at],
        positions=[position for at in step for position in at],
        kv_index=[
            table[position // block_size] * block_size + position % block_size
            for table, at in zip(tables, step, strict=True)
            for position in at
        ],
        query_start=[0, *accumulate(counts)],
        context=[at.stop for at in step],
        block_tables=tables,
        logits_rows=range(sum(counts)),
        adapter_rows=segments,
        logits_adapter_rows=segments,
    )
