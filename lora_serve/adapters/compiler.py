"""Lowers adapters in processes of their own, with bounded memory and CPU time, and in small slices beside requests.

Each adapter is lowered in a fresh process, forked from one that has imported everything: a crash, a kill or a leak
costs that adapter alone, and starting one takes milliseconds. A limit is the kernel's: memory that is not there, or the
end of the process.

While requests run, a process runs for `SLICE` and is stopped for `PAUSE`, again and again. A low priority would not do:
steps compute on all cores and wait for the slowest, so one whole slice of the system's for somebody else, or a core
that is taken for as long as lowering takes, is a gap in every stream.
"""

from __future__ import annotations

import gc
import logging
import os
import pickle
import resource
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import msgspec
import torch

from lora_serve.adapters.fork_server import ForkedProcess, ForkServer
from lora_serve.adapters.lowering_job import LoweredVersion, LoweringContext, LoweringJob, run
from lora_serve.errors import AdapterInvalid, EngineFault, Failure, ServeError, StorageFull

SLICE, PAUSE = 0.003, 0.015  # seconds
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


def fork_compilers() -> None:
    """Fork the server of compiler processes from this one, before it has threads. Otherwise the first adapter waits."""
    _FORKS.fork()


class Compiler:
    """Lowers adapters for one resident base. Methods may be called from any thread.

    Attributes:
        is_busy: whether requests run, which lowering must not delay; asked from any thread.

    Args:
        context: what adapters are lowered for.
    """

    def __init__(self, context: LoweringContext, limits: CompilerLimits) -> None:
        self.fingerprint = context.fingerprint
        self._own_context, self._context = context, pickle.dumps(context)
        self._limits = limits
        self.is_busy: Callable[[], bool] = lambda: False

    def lower(self, job: LoweringJob) -> LoweredVersion:
        """Lower one adapter and wait for it.

        Raises AdapterInvalid, TooLarge and AdapterBroken about the adapter; EngineFault if its process died.
        """
        try:
            process = _FORKS.start()
        except (OSError, EOFError) as error:
            raise EngineFault("no process could be started that reads the adapter") from error
        outcome = _Outcome()
        try:
            for part in (self._context, msgspec.json.encode(job), pickle.dumps(self._limits)):
                process.connection.send_bytes(part)
            self._wait(process)
            outcome = msgspec.json.decode(process.connection.recv_bytes(), type=_Outcome)
        except (OSError, EOFError):  # it has ended
            pass
        finally:
            status = process.close()
        if outcome.failure is not None:
            raise outcome.failure.error()
        if outcome.version is not None:
            return outcome.version
        if status == -signal.SIGXCPU:
            raise AdapterInvalid(
                f"lowering the adapter needs more than {self._limits.seconds} s of CPU time (--compiler-cpu-time)"
            )
        raise EngineFault(f"the process that read the adapter ended ({status})")

    def lower_own(self, job: LoweringJob) -> LoweredVersion:
        """Lower an adapter whose files this engine wrote itself, in the calling thread: nothing in it is untrusted."""
        return run(job, self._own_context)

    def _wait(self, process: ForkedProcess) -> None:
        """Wait for what a process sends, or for its end; beside requests let it run in slices."""
        while not process.connection.poll(SLICE):
            if self.is_busy():
                with suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGSTOP)
                    time.sleep(PAUSE)
                    os.kill(process.pid, signal.SIGCONT)


def run_compiler(connection: Connection) -> None:
    """Lower one adapter in this process: take context, job and limits, and send the result or the failure."""
    what_for, job, limits = (connection.recv_bytes() for _ in range(3))
    torch.set_num_threads(1)
    gc.disable()  # the process ends with this adapter, of which there may be 100,000 small tensors
    try:
        bounds: CompilerLimits = pickle.loads(limits)
        context: LoweringContext = pickle.loads(what_for)
        _bound(bounds, context)
        outcome = _Outcome(run(msgspec.json.decode(job, type=LoweringJob), context))
    except Exception as error:
        if _is_out_of_memory(error):
            error = AdapterInvalid(
                f"lowering the adapter needs more than {bounds.memory} bytes of memory (--compiler-memory)"
            )
        elif isinstance(error, OSError) and error.errno in StorageFull.errnos:
            error = StorageFull("the disk of the adapter store is full")
        elif not isinstance(error, ServeError):
            log.exception("lowering an adapter failed")
        outcome = _Outcome(failure=Failure.of(error))
    connection.send_bytes(msgspec.json.encode(outcome))


def _bound(limits: CompilerLimits, context: LoweringContext) -> None:
    """Let this process run no longer, and become no larger, than allowed."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    seconds = int(used.ru_utime + used.ru_stime) + limits.seconds
    _limit(resource.RLIMIT_CPU, seconds, seconds + 1)
    _limit(resource.RLIMIT_CORE, 0, 0)
    memory = _data_size() + limits.memory + context.base_bytes
    _limit(resource.RLIMIT_DATA, memory, memory)


def _limit(kind: int, soft: int, hard: int) -> None:
    """Set a limit of this process, or leave it at what it is held to already, which no process may raise."""
    _, most = resource.getrlimit(kind)
    hard = hard if most == resource.RLIM_INFINITY else min(hard, most)
    resource.setrlimit(kind, (min(soft, hard), hard))


def _data_size() -> int:
    """Bytes of this process that count for RLIMIT_DATA; 0 where that is unknown."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("VmData:")), 0)


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "can't allocate" in str(error))


# The second module comes with a base whose weights are read.
_FORKS = ForkServer(run_compiler, [__name__, "lora_serve.model.checkpoint_weights"])
