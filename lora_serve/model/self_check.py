"""Self-check at start: the resident base compared with the model as transformers loaded it.

The oracle is computed before anything is fused, packed, quantised or replaced: the model's own modules under its own
eager attention. Two sequences of different lengths are prefilled together in one flat batch, prefilled further beside
decoding, and decoded over the KV of the earlier steps; each row must have the oracle's logits. Twice:

- *In float32*, before weights are packed, every operation of both sides: what differs then differs in its formula, and
  no rounding hides it, neither the dtype's nor that of `--quantize`.
- *As it is served*, weights packed, in the model's dtype: within a few times the error that the model's own modules
  have in that dtype. What `--quantize` costs is the operator's choice; with it, this only tells a model from noise.

Only a few tokens are looked at: what goes wrong in long contexts alone is not seen.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from lora_serve.errors import ModelUnsupported, ServeError
from lora_serve.model.batch import AdapterRows, Batch
from lora_serve.model.host_weights import reading_host_weights

log = logging.getLogger(__name__)

# Positions of two sequences, by step: prefill, prefill beside decoding, decoding.
STEPS = (
    (range(9), range(12)),
    (range(9, 18), range(12, 13)),
    (range(18, 19), range(13, 14)),
)
LENGTH = 19  # of the longer one
# Relative errors of logits that are accepted.
FLOAT32_TOLERANCE = 1e-4
OWN_ERROR_FACTOR = 3.0  # over the error of the model's own modules in its dtype
FLOOR = {torch.float16: 1e-3, torch.bfloat16: 5e-3}  # added to that: a small model may happen to be nearly exact
ROUTED_FLOAT32_TOLERANCE, ROUTED_TOLERANCE = 2e-2, 0.5  # see `Oracle`
UNMEASURED_TOLERANCE = {torch.float16: 2e-2, torch.bfloat16: 1e-1}  # where the model's own error is not known
EXTERNAL_TOLERANCE = 1e-1  # of a base that another library quantised
QUANTIZED_TOLERANCE = 1.0  # logits that have nothing to do with the oracle's are as far from them as zeros, or further
LOOKUPS = {torch.ops.aten.embedding.default, torch.ops.aten.index.Tensor, torch.ops.aten.index_select.default}
HALF = (torch.float16, torch.bfloat16)
ROUTERS = {
    torch.ops.aten.topk.default,
    torch.ops.aten.sort.default,
    torch.ops.aten.max.dim,
    torch.ops.aten.argmax.default,
}


@dataclass(frozen=True)
class Oracle:
    """Reference logits of the unmodified model, and tolerances for the served one.

    A model that routes tokens by values (to experts, by their scores) may route one otherwise where two scores are
    nearly equal, and then gives other logits without being wrong. Such models have wider tolerances.

    Attributes:
        kind: the model's type, for messages.
        tokens: ids of two sequences of one length; causal, so a beginning of one has the same logits.
        logits: float32 [2, tokens, vocab], on the host.
        float32_tolerance: relative error accepted in float32; None: the model does not run in it.
        tolerance: the same in the model's dtype.
    """

    kind: str
    tokens: list[list[int]]
    logits: Tensor
    float32_tolerance: float | None
    tolerance: float


class InFloat32(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Dispatch mode that runs half-precision operations in float32.

    Attributes:
        routed: whether an operation chose among values, as routers of experts do.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.routed = False

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.routed |= func in ROUTERS
        if func.is_view:  # of one expert's weights, say: what reads it makes it wide
            return func(*args, **(kwargs or {}))
        if func in LOOKUPS:  # some rows, not the whole table
            return tree_map(_widened, func(*args, **(kwargs or {})))
        written = {arg.name for arg in func._schema.arguments if arg.alias_info is not None and arg.alias_info.is_write}
        names = [arg.name for arg in func._schema.arguments]
        wide = [
            value if name in written else tree_map(_widened, value) for name, value in zip(names, args, strict=False)
        ]
        named = {
            name: value if name in written else tree_map(_widened, value) for name, value in (kwargs or {}).items()
        }
        return func(*wide, **named)


def _widened(value: Any) -> Any:
    if isinstance(value, Tensor) and value.dtype in HALF:
        return value.float()
    return torch.float32 if isinstance(value, torch.dtype) and value in HALF else value


@contextmanager
def eager_experts(model: Any) -> Iterator[None]:
    """Use eager expert computation in this context; other implementations cast all experts' weights at once."""
    before = model.config._experts_implementation
    model.set_experts_implementation("eager")
    try:
        yield
    finally:
        model.set_experts_implementation(before)


@contextmanager
def refusing(kind: str) -> Iterator[None]:
    """Turn unexpected errors of the model's code into ModelUnsupported."""
    try:
        yield
    except (ServeError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # the modelling code's own, or a kernel's that the model does not fit
        reason = str(error).strip().partition("\n")[0]
        raise ModelUnsupported(f"{kind} cannot be served ({type(error).__name__}: {reason})") from error


@torch.no_grad()  # not inference mode, in which some operators of experts do not run in float32
def compute_oracle(model: Any, device: torch.device, *, external: bool) -> Oracle:
    """Compute the oracle with the untouched model, which must be under eager attention.

    Args:
        external: whether another library quantised it; its modules then compute in no other dtype.
    Raises ModelUnsupported if its logits are not finite.
    """
    kind, dtype = model.config.model_type, model.dtype
    ids = model.get_input_embeddings().weight.shape[0]
    tokens = torch.randint(0, ids, (2, LENGTH), generator=torch.Generator().manual_seed(0))

    def logits() -> Tensor:
        with reading_host_weights(model, device):
            found: Tensor = model(input_ids=tokens.to(device), use_cache=False).logits
        return found.cpu().float()

    own = logits()
    if not own.isfinite().all():
        raise ModelUnsupported(
            f"{kind} gives logits in {str(dtype).removeprefix('torch.')} that are not finite; try another --dtype"
        )
    if external:
        return Oracle(kind, tokens.tolist(), own, None, EXTERNAL_TOLERANCE)
    mode = InFloat32()
    try:
        with mode:
            exact = logits()
    except Exception as error:  # some operation has no float32, or the memory is short
        log.info("%s: float32 self-check skipped: %s", kind, str(error).partition("\n")[0])
        return Oracle(kind, tokens.tolist(), own, None, UNMEASURED_TOLERANCE.get(dtype, FLOAT32_TOLERANCE))
    if mode.routed:
        return Oracle(kind, tokens.tolist(), exact, ROUTED_FLOAT32_TOLERANCE, ROUTED_TOLERANCE)
    tolerance = OWN_ERROR_FACTOR * relative_error(own, exact) + FLOOR.get(dtype, FLOAT32_TOLERANCE)
    return Oracle(kind, tokens.tolist(), exact, FLOAT32_TOLERANCE, min(tolerance, QUANTIZED_TOLERANCE))


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """Relative error of logits, ignoring a constant per row, to which softmax is invariant."""
    got, wanted = (each.double() - each.double().mean(-1, keepdim=True) for each in (got, wanted))
    return float((got - wanted).norm() / wanted.norm())


def blocks_needed(block_size: int) -> int:
    """KV blocks that the check takes."""
    return 2 * -(-LENGTH // block_size)


def check(run: Callable[[Batch], Tensor], oracle: Oracle, block_size: int, tolerance: float) -> None:
    """Compare a base with the oracle; raises ModelUnsupported if its logits differ by more than `tolerance`.

    Args:
        run: the base's logits of a batch, on a pool of at least `blocks_needed` KV blocks that hold nothing.
    """
    with refusing(oracle.kind):
        got, wanted = [], []
        for number, step in enumerate(STEPS):
            # The second step's rows are all in a segment, of a slot without an adapter.
            got.append(run(_batch(oracle.tokens, step, block_size, segmented=number == 1)).cpu().float())
            wanted.append(torch.cat([own[at.start : at.stop] for own, at in zip(oracle.logits, step, strict=True)]))
        error = relative_error(torch.cat(got), torch.cat(wanted))
        if not error <= tolerance:
            first, *rest = (f"{relative_error(*pair):.2g}" for pair in zip(got, wanted, strict=True))
            raise ModelUnsupported(
                f"{oracle.kind} in flat batches differs from itself alone: the relative error of its logits is "
                f"{error:.2g}, more than {tolerance:.2g} (prefilling {first}, then {', '.join(rest)})"
            )


def _batch(tokens: Sequence[list[int]], step: Sequence[range], block_size: int, *, segmented: bool) -> Batch:
    """Sequences at the given positions; KV blocks are dealt out to them in turn, so that none has neighbours."""
    each = blocks_needed(block_size) // len(tokens)
    tables = [[1 + index + len(tokens) * block for block in range(each)] for index in range(len(tokens))]
    counts = [len(at) for at in step]
    segments = [AdapterRows(0, sum(counts), 0)] if segmented else []
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
