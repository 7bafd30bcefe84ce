"""Record a forward pass call by call, and replay it without the model's Python: the CPU's counterpart of a CUDA graph.

A step of the same sizes makes the same calls on the same memory, with other numbers in it. `Library` records native
calls, torch's dispatch records torch's operators. Results lie in an arena that all recordings share, as one of them is
replayed at a time. A pass whose Python depends on tensor values, or that draws random numbers, cannot be recorded.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

_VARYING = (torch.Tag.dynamic_output_shape, torch.Tag.nondeterministic_seeded)
_ADD = torch.ops.aten.add.Tensor
_EMPTY = torch.ops.aten.empty.memory_format
_VIEWS = {
    torch.ops.aten.view.default,
    torch.ops.aten.transpose.int,
    torch.ops.aten.select.int,
    torch.ops.aten.slice.Tensor,
    torch.ops.aten.unsqueeze.default,
}  # the most frequent operators that compute nothing
_CPU = torch.device("cpu")

Replay = Callable[[Any, int], int]  # pairs (function, arguments), their number → 0, or 1 + index of one that failed


class Arena:
    """Bump allocator that all recorded passes share, reset before each; untouched pages take no memory."""

    def __init__(self, nbytes: int) -> None:
        self._memory = torch.empty(nbytes, dtype=torch.uint8)
        self._aligned = -self._memory.data_ptr() % 64
        self._taken = 0

    def begin(self) -> None:
        """Allocate from the beginning again."""
        self._taken = self._aligned

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Allocate an uninitialised tensor; with memory of its own where the arena has not enough left."""
        nbytes = math.prod(shape) * dtype.itemsize
        start, end = self._taken, self._taken + nbytes
        if end > self._memory.numel():
            return torch.empty(*shape, dtype=dtype)
        self._taken = end + -nbytes % 64
        return self._memory[start:end].view(dtype).view(*shape)


class CallRecording(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Recording of one pass: records inside its context, replays afterwards.

    Args:
        arena: where results are allocated.
        replay: makes native calls again, one after the other.
        add: adds two contiguous tensors of one shape and type natively into a third; False if it cannot.
        record_on: sets the recording that this thread's native calls are added to, or None.
        check_values: also detect values that leave tensors past dispatch, which doubles the time; needed once a model.
    """

    def __init__(
        self,
        arena: Arena,
        replay: Replay,
        add: Callable[[Tensor, Tensor, Tensor], bool],
        record_on: Callable[[CallRecording | None], None],
        *,
        check_values: bool,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.unsupported: str | None = None
        self._arena, self._replay, self._add, self._record_on = arena, replay, add, record_on
        self._kept: dict[int, Tensor] = {}  # every tensor that the pass allocated, by storage
        self._steps: list[Callable[[], object]] = []
        self._values = _Values(self.refuse) if check_values else nullcontext()
        self._calls: list[tuple[int, bytes]] = []  # native calls since the last operator

    def add_call(self, function: int, packed: bytes) -> None:
        """Record a native call: the function's address and its packed arguments."""
        self._calls.append((function, packed))

    def __enter__(self) -> CallRecording:
        self._arena.begin()
        self._values.__enter__()
        self._record_on(self)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)  # type: ignore[no-untyped-call]
        self._record_on(None)
        self._values.__exit__(*raised)
        self._flush()

    def record(self, run: Callable[[], Tensor]) -> Tensor:
        """Run a pass and record it; its result, whose memory every replay writes again."""
        with self:
            return run()

    def refuse(self, operator: str) -> None:
        """Mark the pass as one that cannot be replayed, because of this operator."""
        self.unsupported = self.unsupported or operator

    def replay(self) -> None:
        """Run the pass again. Raises ValueError if a native call finds an index out of its range."""
        for step in self._steps:
            step()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is _EMPTY and kwargs.get("device", _CPU) == _CPU and not kwargs.get("pin_memory"):
            return self._allocate(args[0], kwargs.get("dtype") or torch.get_default_dtype())
        if func is _ADD and len(args) == 2 and not kwargs and _same_layout(*args):
            total = self._allocate(args[0].shape, args[0].dtype)
            if self._add(*args, total):
                return total
        result = func(*args, **kwargs)
        if func in _VIEWS:
            return result
        given = {_storage(x) for x in _leaves((args, tuple(kwargs.values()))) if isinstance(x, Tensor)}
        outputs = list(_leaves(result))
        fresh = [(i, x) for i, x in enumerate(outputs) if isinstance(x, Tensor) and _storage(x) not in given]
        if not all(isinstance(x, Tensor) for x in outputs) or (fresh and _varies(func, args)):
            self.refuse(str(func))
        elif func._schema.is_mutable:
            self._add_step(lambda: func(*args, **kwargs))
        elif fresh and not func.name().startswith("aten::empty"):
            self._add_step(lambda: _run_again(func, args, kwargs, fresh))
        for x in outputs:
            if isinstance(x, Tensor):
                self._kept.setdefault(_storage(x), x)
        return result

    def _allocate(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        x = self._arena.take(shape, dtype)
        self._kept.setdefault(_storage(x), x)
        return x

    def _add_step(self, step: Callable[[], object]) -> None:
        self._flush()
        self._steps.append(step)

    def _flush(self) -> None:
        if not self._calls:
            return
        calls, self._calls = self._calls, []
        pairs: list[int | None] = []
        for function, packed in calls:
            pairs += (function, ctypes.cast(ctypes.c_char_p(packed), ctypes.c_void_p).value)
        memory = (ctypes.c_int64 * len(pairs))(*pairs)  # type: ignore[misc]  # bytes have an address

        def step() -> None:
            wrong = self._replay(memory, len(calls))  # `calls` holds what the addresses point to
            if wrong:
                raise ValueError(f"call {wrong - 1} of a recorded pass has an index out of its range")

        self._steps.append(step)


class _Values(TorchFunctionMode):
    """Detects values that reach Python without passing dispatch."""

    def __init__(self, refuse: Callable[[str], None]) -> None:
        super().__init__()
        self._refuse = refuse

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in (Tensor.tolist, Tensor.numpy):
            self._refuse(func.__name__)
        return func(*args, **(kwargs or {}))


def _leaves(value: object) -> Iterator[object]:
    """An operator's arguments or results, lists unpacked."""
    if isinstance(value, list | tuple):
        for each in value:
            yield from _leaves(each)
    else:
        yield value


def _same_layout(x: Tensor, y: object) -> bool:
    """Whether both are contiguous tensors of one shape, type and device."""
    same = isinstance(y, Tensor) and x.shape == y.shape and x.dtype is y.dtype and x.device == y.device
    return same and x.is_contiguous() and y.is_contiguous()  # type: ignore[attr-defined]


def _varies(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether the operator's result has a size that depends on values, or random numbers."""
    if func is torch.ops.aten.index.Tensor:  # a mask varies, indices do not
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    return any(tag in func.tags for tag in _VARYING)


def _storage(x: Tensor) -> int:
    number: int = x.untyped_storage()._cdata
    return number


def _run_again(func: Any, args: Any, kwargs: Any, fresh: list[tuple[int, Tensor]]) -> None:
    """Run an operator on the same tensors and copy its results over the recorded ones."""
    outputs = list(_leaves(func(*args, **kwargs)))
    for index, x in fresh:
        output = outputs[index]
        assert isinstance(output, Tensor)
        x.copy_(output)
