"""A device that is made of host memory, for tests of what is where: operations across devices fail as on a GPU.

Tensors on it are wrappers around tensors on the CPU, which compute.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import finalize

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

# torch's C++ code needs to know how to switch to the device; "meta" without a number stays what it is.
DEVICE = torch.device("meta", 0)
COPIES = {torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default}
HALF = {torch.bfloat16, torch.float16}


@contextmanager
def second_device() -> Iterator[SecondDevice]:
    """A context in which there is the device."""
    with _DataOnDevice(), SecondDevice() as device:
        yield device


class SecondDevice(TorchDispatchMode):
    """The device.

    Attributes:
        copied: bytes of living tensors in half precision that were copied from the host.
        peak: the most that these ever were.
    """

    def __init__(self) -> None:
        super().__init__()
        self.copied = self.peak = 0
        self._views: Counter[int] = Counter()  # living tensors by the address of a copied one

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        with self:  # in inference mode, `to` comes as it was called
            parts = func.decompose(*args, **(kwargs or {}))
        if parts is not NotImplemented:
            return parts
        options = {name: value for name, value in (kwargs or {}).items() if name != "pin_memory"}
        given = [each for each in tree_leaves((args, options)) if isinstance(each, Tensor)]
        inside = [isinstance(each, _Wrapper) for each in given if each.ndim or isinstance(each, _Wrapper)]
        if any(inside) and not all(inside) and func not in COPIES:
            raise RuntimeError(f"{func}: expected all tensors to be on the same device")
        target = options.get("device")
        here = target == DEVICE if target is not None else inside[:1] == [True]
        if here and target is not None:
            options["device"] = torch.device("cpu")
        arrives = func is torch.ops.aten._to_copy.default and here and not isinstance(given[0], _Wrapper)
        plain, named = tree_map(_unwrapped, (args, options))
        if func is torch.ops.aten.histc.default:  # which a CPU has for no integers
            plain = (plain[0].float(), *plain[1:])
        own = func(*plain, **named)
        returned = func._schema.returns[0].alias_info if func._schema.returns else None
        if returned is not None and returned.is_write:
            return args[0] if "out" not in options else options["out"]
        if func is torch.ops.aten._to_copy.default and own.data_ptr() == plain[0].data_ptr():
            own = own.clone()
        if not here:
            return own
        return tree_map(lambda each: self._wrapped(each, arrives) if isinstance(each, Tensor) else each, own)

    def _wrapped(self, own: Tensor, arrives: bool) -> Tensor:
        storage = own.untyped_storage()
        address = storage.data_ptr()
        if own.dtype in HALF and (arrives or address in self._views):
            if address not in self._views:
                self.copied += storage.nbytes()
                self.peak = max(self.peak, self.copied)
            self._views[address] += 1
            finalize(own, self._release, address, storage.nbytes())
        return _Wrapper(own)

    def _release(self, address: int, size: int) -> None:
        self._views[address] -= 1
        if not self._views[address]:
            del self._views[address]
            self.copied -= size


class _DataOnDevice(TorchFunctionMode):
    """`torch.tensor` copies to the device where no dispatch mode sees it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = dict(kwargs or {})
        if func is torch.tensor and options.get("device") == DEVICE:
            del options["device"]
            return func(*args, **options).to(DEVICE)
        return func(*args, **options)


class _Wrapper(torch.Tensor):
    own: Tensor

    @staticmethod
    def __new__(cls, own: Tensor) -> Any:
        with torch.inference_mode(False):  # else there are no views of it
            wrapper = torch.Tensor._make_wrapper_subclass(
                cls,
                own.shape,
                strides=own.stride(),
                storage_offset=own.storage_offset(),
                dtype=own.dtype,
                device=DEVICE,
            )
        wrapper.own = own
        return wrapper

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.tolist, Tensor.data_ptr):
            return func(args[0].own)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} outside the device's context")


def _unwrapped(value: Any) -> Any:
    return value.own if isinstance(value, _Wrapper) else value
