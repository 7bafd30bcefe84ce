"""Lowers adapters in processes of their own, with bounded memory and CPU time, and in small slices beside requests.

Each adapter is lowered in a fresh process, forked from one that has imported everything: a crash, a kill or a leak
costs that adapter alone, and starting one takes milliseconds. A limit is the kernel's: memory that is not there, or the
end of the process.

While requests run, a process runs for `SLICE` and is stopped for `PAUSE`, again and again. A low priority would not do:
steps compute on all cores and wait for the slowest, so one whole slice of the system's for somebody else, or a core
that is taken for as long as lowering takes, is a gap in every stream.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import multiprocessing
import os
import pickle
import resource
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import msgspec
import torch

from lora_serve.adapters.lowering_job import LoweredVersion, LoweringContext, LoweringJob, run
from lora_serve.errors import AdapterInvalid, EngineFault, Failure, ServeError, StorageFull

SLICE, PAUSE = 0.003, 0.015  # seconds
_PR_SET_PDEATHSIG = 1  # of Linux's prctl
# Imported once, not by each process; the second one comes with a base whose weights it reads.
_IMPORTED = [__name__, "lora_serve.model.checkpoint_weights"]
log = logging.getLogger(__name__)


class _Outcome(msgspec.Struct):
    """What a process sends: one of both."""

    version: LoweredVersion | None = None
    failure: Failure | None = None


@dataclass(frozen=True)
class CompilerLimits:
    """What lowering one adapter may take: bytes of memory, and seconds of CPU time."""

    memory: int
    seconds: int


def start_compilers() -> None:
    """Start the process that those of all compilers are forked from, unless it runs; does not wait for it."""
    forkserver.set_forkserver_preload(_IMPORTED)
    forkserver.ensure_running()


class Compiler:
    """Lowers adapters for one resident base. Methods may be called from any thread.

    Attributes:
        is_busy: whether requests run, which lowering must not delay; asked from any thread.

    Args:
        context: what adapters are lowered for.
    """

    def __init__(self, context: LoweringContext, limits: CompilerLimits) -> None:
        self.fingerprint = context.fingerprint
        self._context = pickle.dumps(context)
        self._limits = limits
        self.is_busy: Callable[[], bool] = lambda: False
        self._processes = multiprocessing.get_context("forkserver")

    def warm_up(self) -> None:
        """Start a process that does nothing, and wait for it: then nothing is left to import for the next one."""
        start_compilers()
        process = self._processes.Process(target=_do_nothing, daemon=True)
        process.start()
        process.join()

    def lower(self, job: LoweringJob) -> LoweredVersion:
        """Lower one adapter and wait for it; the first time, for what `start_compilers` starts as well.

        Raises AdapterInvalid, TooLarge and AdapterBroken about the adapter; EngineFault if its process died.
        """
        start_compilers()
        results, sender = self._processes.Pipe(duplex=False)
        arguments = (sender, self._context, msgspec.json.encode(job), self._limits)
        try:
            process = self._start(arguments)
        except (OSError, EOFError):  # the process that they are forked from was killed; it is started again
            process = self._start(arguments)
        finally:
            sender.close()
        try:
            results.recv_bytes()  # it begins; stopped before, it would outlive this process
            self._wait(process, results)
            outcome = msgspec.json.decode(results.recv_bytes(), type=_Outcome)
        except EOFError:
            process.join()
            if process.exitcode == -signal.SIGXCPU:
                raise AdapterInvalid(
                    f"lowering the adapter needs more than {self._limits.seconds} s of CPU time (--compiler-cpu-time)"
                ) from None
            raise EngineFault(f"the process that read the adapter ended ({process.exitcode})") from None
        finally:
            results.close()
        process.join()
        if outcome.version is None:
            assert outcome.failure is not None
            raise outcome.failure.error()
        return outcome.version

    def _wait(self, process: BaseProcess, results: Connection) -> None:
        """Wait for what a process sends, or for its end; beside requests let it run in slices."""
        assert process.pid is not None
        while not results.poll(SLICE):
            if self.is_busy():
                with suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGSTOP)
                    time.sleep(PAUSE)
                    os.kill(process.pid, signal.SIGCONT)

    def _start(self, arguments: tuple[Any, ...]) -> BaseProcess:
        process = self._processes.Process(target=_main, args=arguments, daemon=True)
        process.start()
        return process


def _do_nothing() -> None:
    pass


def _main(results: Connection, context: bytes, job: bytes, limits: CompilerLimits) -> None:
    """Lower one adapter in this process, and send the result or the failure."""
    _end_with_parent()
    results.send_bytes(b"")
    for number in (signal.SIGINT, signal.SIGTERM):  # sent to the whole group; the server drains, then ends this too
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
    gc.disable()  # the process ends with this adapter, of which there may be 100,000 small tensors
    try:
        what_for = pickle.loads(context)
        _bound(limits, what_for)
        outcome = _Outcome(run(msgspec.json.decode(job, type=LoweringJob), what_for))
    except Exception as error:
        if _is_out_of_memory(error):
            error = AdapterInvalid(
                f"lowering the adapter needs more than {limits.memory} bytes of memory (--compiler-memory)"
            )
        elif isinstance(error, OSError) and error.errno in StorageFull.errnos:
            error = StorageFull("the disk of the adapter store is full")
        elif not isinstance(error, ServeError):
            log.exception("lowering an adapter failed")
        outcome = _Outcome(failure=Failure.of(error))
    results.send_bytes(msgspec.json.encode(outcome))
    results.close()
    os._exit(0)


def _end_with_parent() -> None:
    """End this process when the engine's ends, also while it is stopped.

    The process that it was forked from ends with the engine, once nobody else holds its pipe; then the system kills
    this one.
    """
    alive = getattr(getattr(forkserver, "_forkserver", None), "_forkserver_alive_fd", None)
    if alive is not None:
        os.close(alive)
    with suppress(AttributeError):  # Linux has it
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _bound(limits: CompilerLimits, context: LoweringContext) -> None:
    """Let this process run no longer, and become no larger, than allowed."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    seconds = int(used.ru_utime + used.ru_stime) + limits.seconds
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    memory = _data_size() + limits.memory + context.base_bytes
    resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))


def _data_size() -> int:
    """Bytes of this process that count for RLIMIT_DATA; 0 where that is unknown."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("VmData:")), 0)


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "can't allocate" in str(error))
