"""Patches of Triton's interpreter, so that it computes what a GPU would: import this before any Triton kernel.

Unpatched, Triton 3.6 with numpy 2.4 (which converts no array to an int) cannot run loops whose bounds come from memory,
multiplies the bits of bfloat16 matrices, and truncates float32 where it should round it to bfloat16.
Dependent launches are ordinary ones to it: each kernel ends before the next begins.

Three things that took half of its time are done faster here. It puts its own functions into Triton's language anew for
every call of a function of a kernel, makes a table of NumPy's types for every operation, and checks each integer
operation for overflow by some twenty others.
"""

from __future__ import annotations

import functools
import operator
import os
from importlib import import_module
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

_builder: Any = interpreter.InterpreterBuilder
_patch_language = interpreter._patch_lang
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


_numpy_type_of_element = functools.cache(interpreter._get_np_dtype)


def _numpy_type(kind: Any) -> Any:
    element = kind.element_ty if isinstance(kind, tl.block_type) else kind
    return np.dtype(np.uint64) if isinstance(element, tl.pointer_type) else _numpy_type_of_element(element)


_patched: set[Any] = set()


def _patch_once(function: Any) -> Any:
    scope = interpreter._LangPatchScope() if function in _patched else _patch_language(function)
    _patched.add(function)
    scope._changes.clear()  # so that nothing is restored
    return scope


interpreter._patch_lang = _patch_once
interpreter._patch_lang_tensor = _tensor_with_index
interpreter._get_np_dtype = _numpy_type
_builder.cast_impl = _rounding_cast
_builder.create_fp_trunc = _rounding_cast
_builder.create_dot = _widening_dot


_OPERATORS = {"add": operator.add, "sub": operator.sub, "mul": operator.mul}


def _check_overflow(self: Any, left: Any, right: Any, operation: Any) -> None:
    kind = left.type.scalar
    if kind.int_bitwidth >= 64:
        return
    result = _OPERATORS[operation.__name__](left.handle.data.astype(np.int64), right.handle.data.astype(np.int64))
    fits = kind.get_int_min_value() <= result.min() and result.max() <= kind.get_int_max_value()
    assert fits, f"int{kind.int_bitwidth} overflow detected for operation {operation.__name__}"


def _nothing(*args: Any, **kwargs: Any) -> None:
    """In place of an instruction that only orders kernels."""


interpreter.interpreter_semantic.binary_op_sanitize_overflow_impl = functools.partial(  # type: ignore[method-assign]
    _check_overflow, interpreter.interpreter_semantic
)
_cuda: Any = import_module("triton.language.extra.cuda")  # an import statement finds another copy of the module
_cuda.gdc_wait = _cuda.gdc_launch_dependents = _nothing
