"""Lowers adapters in processes of their own, of low priority and with bounded memory and CPU time.

Each adapter is lowered in a fresh process, forked from one that has imported everything: a crash, a kill or a leak
costs that adapter alone, and starting one takes milliseconds. A limit is the kernel's: memory that is not there, or the
end of the process.
"""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
import pickle
import resource
import signal
import threading
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import msgspec
import torch

from lora_serve.adapters.lowering_job import LoweredVersion, LoweringContext, LoweringJob, run
from lora_serve.errors import AdapterInvalid, EngineFault, Failure, ServeError

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
        niceness: of the processes from now on: 0 before there are steps to disturb.

    Args:
        context: what adapters are lowered for.
    """

    def __init__(self, context: LoweringContext, limits: CompilerLimits) -> None:
        self.fingerprint = context.fingerprint
        self._context = pickle.dumps(context)
        self._limits = limits
        self.niceness = 0
        self._processes = multiprocessing.get_context("forkserver")

    def lower(self, job: LoweringJob) -> LoweredVersion:
        """Lower one adapter and wait for it; the first time, for what `start_compilers` starts as well.

        Raises AdapterInvalid, TooLarge and AdapterBroken about the adapter; EngineFault if its process died.
        """
        start_compilers()
        results, sender = self._processes.Pipe(duplex=False)
        arguments = (sender, self._context, msgspec.json.encode(job), self._limits, self.niceness)
        try:
            process = self._start(arguments)
        except (OSError, EOFError):  # the process that they are forked from was killed; it is started again
            process = self._start(arguments)
        finally:
            sender.close()
        try:
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

    def _start(self, arguments: tuple[Any, ...]) -> BaseProcess:
        process = self._processes.Process(target=_main, args=arguments, daemon=True)
        process.start()
        return process


def _main(results: Connection, context: bytes, job: bytes, limits: CompilerLimits, niceness: int) -> None:
    """Lower one adapter in this process, and send the result or the failure."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    for number in (signal.SIGINT, signal.SIGTERM):  # sent to the whole group; the server drains, then ends this too
        signal.signal(number, signal.SIG_IGN)
    os.nice(niceness)
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
        elif not isinstance(error, ServeError):
            log.exception("lowering an adapter failed")
        outcome = _Outcome(failure=Failure.of(error))
    results.send_bytes(msgspec.json.encode(outcome))
    results.close()
    os._exit(0)


def _end_with_parent() -> None:
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
