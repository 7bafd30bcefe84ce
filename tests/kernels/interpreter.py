"""Patches of Triton's interpreter, so that it computes what a GPU would: import this before any Triton kernel.

Unpatched, Triton 3.6 with numpy 2.4 (which converts no array to an int) cannot run loops whose bounds come from memory,
multiplies the bits of bfloat16 matrices, and truncates float32 where it should round it to bfloat16.
Dependent launches are ordinary ones to it: each kernel ends before the next begins.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

_builder: Any = interpreter.InterpreterBuilder
_patch_tensor, _cast, _dot = interpreter._patch_lang_tensor, _builder.cast_impl, _builder.create_dot


def _tensor_with_index(tensor: Any, scope: Any) -> None:
    _patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


def _rounding_cast(self: Any, source: Any, to: Any) -> Any:
    if source.dtype.scalar is tl.float32 and to.scalar is tl.bfloat16:
        rounded = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16()
        return interpreter.TensorHandle(rounded.view(torch.uint16).numpy(), tl.bfloat16)
    return _cast(self, source, to)


def _widening_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
    a, b = (self.cast_impl(x, tl.float32) if x.dtype.scalar is tl.bfloat16 else x for x in (a, b))
    return _dot(self, a, b, *rest)


interpreter._patch_lang_tensor = _tensor_with_index
_builder.cast_impl = _rounding_cast
_builder.create_fp_trunc = _rounding_cast
_builder.create_dot = _widening_dot


def _nothing(*args: Any, **kwargs: Any) -> None:
    """In place of an instruction that only orders kernels."""


_cuda: Any = import_module("triton.language.extra.cuda")  # an import statement finds another copy of the module
_cuda.gdc_wait = _cuda.gdc_launch_dependents = _nothing
