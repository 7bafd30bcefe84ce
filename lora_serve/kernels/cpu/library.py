"""The shared library with the native kernels, as Python calls it: a function takes one packed struct of arguments."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lora_serve.kernels.cpu.build import BuildError
from lora_serve.kernels.cpu.calls import CALLS
from lora_serve.kernels.cpu.recording import CallRecording

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class _ThreadRecording(threading.local):
    """Each thread's own recording, so that calls of a thread that loads an adapter are not part of a step's."""

    recording: CallRecording | None = None


class Library:
    """Functions of a shared library of the kernels; any thread may call them.

    Raises:
        BuildError: it was compiled for another CPU, or lays out the arguments of its calls otherwise than `calls`.
        OSError: it cannot be loaded.
    """

    def __init__(self, path: Path) -> None:
        self._loaded = ctypes.CDLL(str(path))
        missing_feature = self._loaded["lora_missing_feature"]
        missing_feature.restype = ctypes.c_char_p
        if missing := missing_feature():
            raise BuildError(f"the library is compiled for a CPU that has {missing.decode()}, which this one has not")
        self._thread = _ThreadRecording()
        size = self.call("lora_struct_size")
        for name, struct in CALLS.items():
            if (theirs := size(name.encode())) != struct.size:
                raise BuildError(f"the library's struct {name} has {theirs} bytes, not {struct.size}")

    def call(self, name: str) -> Callable[[bytes], int]:
        """A native function of one packed struct; a recording active on this thread also records the call."""
        function = self._loaded[name]
        function.argtypes = [ctypes.c_char_p]
        function.restype = ctypes.c_int64
        address = ctypes.cast(function, ctypes.c_void_p).value
        assert address is not None

        def call(packed: bytes) -> int:
            recording = self._thread.recording
            if recording is not None:
                recording.add_call(address, packed)
            done: int = function(packed)
            return done

        return call

    def number(self, name: str) -> int:
        """The result of a function without arguments."""
        function = self._loaded[name]
        function.restype = ctypes.c_int64
        return int(function())

    def replay(self) -> Callable[[Any, int], int]:
        """The function that makes recorded calls again: `lora_replay`, given their addresses and how many they are."""
        function = self._loaded["lora_replay"]
        function.argtypes = [ctypes.c_void_p, ctypes.c_int64]
        function.restype = ctypes.c_int64
        replay: Callable[[Any, int], int] = function
        return replay

    def record_on(self, recording: CallRecording | None) -> None:
        """Record every call that this thread makes from now on; None: stop."""
        self._thread.recording = recording


def type_number(dtype: torch.dtype) -> int:
    """The number of a type in C++ (`Type` in simd.h); TypeError for one that is not served."""
    try:
        return TYPES[dtype]
    except KeyError:
        raise TypeError(f"the native kernels know no {dtype}") from None
