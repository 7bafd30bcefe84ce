"""The built library, as Python calls it: a function takes one packed call, which a recording may note."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lora_serve.kernels.cpu.recording import CallRecording

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class _ThreadRecording(threading.local):
    """The recording that each thread records its calls on: a thread that loads an adapter meanwhile is not recorded."""

    recording: CallRecording | None = None


class Library:
    """Functions of a shared library that `build.library` built; any thread may call them."""

    def __init__(self, path: Path) -> None:
        self._loaded = ctypes.CDLL(str(path))
        self._thread = _ThreadRecording()

    def call(self, name: str) -> Callable[[bytes], int]:
        """The function of one packed call, whose bytes live until it returns (or as long as a recording that notes it)."""
        function = self._loaded[name]
        function.argtypes = [ctypes.c_char_p]
        function.restype = ctypes.c_int64
        address = ctypes.cast(function, ctypes.c_void_p).value
        assert address is not None

        def call(packed: bytes) -> int:
            recording = self._thread.recording
            if recording is not None:
                recording.call(address, packed)
            done: int = function(packed)
            return done

        return call

    def number(self, name: str) -> int:
        """What a function without arguments returns."""
        function = self._loaded[name]
        function.restype = ctypes.c_int64
        return int(function())

    def replay(self) -> Callable[[Any, int], int]:
        """The function that makes noted calls again."""
        function = self._loaded["lora_replay"]
        function.argtypes = [ctypes.c_void_p, ctypes.c_int64]
        function.restype = ctypes.c_int64
        replay: Callable[[Any, int], int] = function
        return replay

    def listen(self, recording: CallRecording | None) -> None:
        """Tell the recording of every call that this thread makes from now on; None: nobody."""
        self._thread.recording = recording


def type_number(dtype: torch.dtype) -> int:
    """What C++ calls a type; TypeError for one that it does not know."""
    try:
        return TYPES[dtype]
    except KeyError:
        raise TypeError(f"the native kernels know no {dtype}") from None
