"""Rank 0's side of tensor parallelism: starts the other ranks' processes and has them do what it does.

The engine is rank 0. The other ranks (`engine/follower.py`) load their parts of the base while it loads its own, and
then follow its commands. None of them outlives the engine, and the engine does not outlive any of them: they wait for
each other in every step, so it ends, and is started again with all of them.
"""

from __future__ import annotations

import logging
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_serve.adapters.adapter import Adapter
from lora_serve.adapters.device_slots import DeviceSlots
from lora_serve.adapters.lowered_file import FlatLayout
from lora_serve.config import ServeConfig
from lora_serve.engine.cores import compute_threads
from lora_serve.engine.rank_commands import (
    EmptySlot,
    FillSlot,
    JoinRanks,
    Leave,
    RankCommand,
    RankConnection,
    RunStep,
    encode_command,
    fill_slot,
    shared_memory,
)
from lora_serve.errors import ModelUnsupported
from lora_serve.model.base import ResidentBase
from lora_serve.model.batch import Batch
from lora_serve.model.tensor_parallel import RanksOutOfStep, TensorParallel

LEAVE_SECONDS = 5.0  # for a process to end by itself

log = logging.getLogger(__name__)


class Ranks:
    """The other ranks of the engine's base.

    Attributes:
        parallel: the engine's own end of the process groups.
        following: whether they follow commands; before that, all ranks do the same by themselves.
    """

    def __init__(self, processes: list[subprocess.Popen[bytes]], connections: list[RankConnection]) -> None:
        self.following = False
        self.parallel: TensorParallel | None = None
        self._processes, self._connections = processes, connections
        self._closing = False
        for rank, process in enumerate(processes, 1):
            watch = threading.Thread(target=self._watch, args=(rank, process), name=f"rank-{rank}", daemon=True)
            watch.start()

    @classmethod
    def start(cls, config: ServeConfig, device: torch.device, overlap: bool | None) -> Ranks:
        """Start all other ranks, and wait until they are connected. Raises ModelUnsupported where that cannot be."""
        if not hasattr(os, "memfd_create"):
            raise ModelUnsupported("--tensor-parallel needs Linux")
        size = config.tensor_parallel
        folder = Path(tempfile.mkdtemp(prefix="lora-serve-ranks-"))  # mode 0700
        processes, connections = [], []
        environment = os.environ | {"OMP_NUM_THREADS": str(compute_threads(config.threads, size))}
        try:
            for rank in range(1, size):
                ours, theirs = socket.socketpair()
                command = [sys.executable, "-m", "lora_serve.engine.rank_main", str(theirs.fileno()), str(os.getpid())]
                processes.append(
                    subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()], env=environment)
                )
                theirs.close()
                connections.append(RankConnection(ours))
                join = JoinRanks(rank, config.model_dump_json(exclude={"config"}), str(folder / "meeting"), overlap)
                connections[-1].send(encode_command(join))
            ranks = cls(processes, connections)
            ranks.parallel = TensorParallel(0, size, device, folder / "meeting")
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        return ranks

    def tell(self, command: RankCommand, flat: Tensor | None = None) -> None:
        """Give all ranks a command, with an adapter's flat tensor if it needs one. Raises RanksOutOfStep."""
        message = encode_command(command)
        descriptor = None if flat is None else shared_memory(flat)
        try:
            for connection in self._connections:
                connection.send(message, descriptor)
        except OSError as error:
            raise RanksOutOfStep("a rank of the base is gone") from error
        finally:
            if descriptor is not None:
                os.close(descriptor)

    def answers(self) -> list[Any]:
        """Wait for an answer from every rank. Raises RanksOutOfStep."""
        try:
            return [connection.receive()[0] for connection in self._connections]
        except (EOFError, OSError) as error:
            raise RanksOutOfStep("a rank of the base is gone") from error

    def close(self) -> None:
        """End the processes, and wait for that."""
        self._closing = True
        try:
            self.tell(Leave())
        except RanksOutOfStep:
            log.warning("a rank of the base was gone before the engine ended")
        for process in self._processes:
            try:
                process.wait(LEAVE_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for connection in self._connections:
            connection.close()

    def kill(self) -> None:
        """End the processes at once."""
        self._closing = True
        for process in self._processes:
            process.kill()
            process.wait()

    def _watch(self, rank: int, process: subprocess.Popen[bytes]) -> None:
        """End this process at once if a rank ends: the engine may wait for it in a collective, for ever."""
        status = process.wait()
        if not self._closing:
            log.error("rank %d of the base ended with %d; so does the engine", rank, status)
            logging.shutdown()
            os._exit(1)


class LeadingBase(ResidentBase):
    """Rank 0's part of the base: its forward passes are run by all ranks."""

    def __init__(self, ranks: Ranks, *parts: Any) -> None:
        super().__init__(*parts)
        self._ranks = ranks

    def forward(self, batch: Batch) -> Tensor:
        """Logits of a batch. Raises RanksOutOfStep if anything fails: the other ranks are in the middle of the pass."""
        if not self._ranks.following:
            return super().forward(batch)
        self._ranks.tell(RunStep(batch))
        try:
            return super().forward(batch)
        except Exception as error:
            log.exception("the forward pass failed")
            raise RanksOutOfStep("the forward pass failed in one of the ranks of the base") from error


class LeadingDeviceSlots(DeviceSlots):
    """Rank 0's adapter slots: what is loaded and evicted is loaded and evicted by all ranks."""

    def __init__(self, ranks: Ranks, *parts: Any) -> None:
        super().__init__(*parts)
        self._ranks = ranks

    def load(self, adapter: Adapter) -> int:
        """Assign the same slot of all ranks. Raises torch.OutOfMemoryError, without effect, if one has no memory."""
        dtype = str(adapter.flat.dtype).removeprefix("torch.")
        self._ranks.tell(FillSlot(adapter.digest, FlatLayout.of(adapter), dtype, adapter.flat.numel()), adapter.flat)
        own = fill_slot(super().load, adapter)
        slots: set[int | None] = {own.slot, *(answer.slot for answer in self._ranks.answers())}
        taken = {slot for slot in slots if slot is not None}
        if len(taken) > 1:
            raise RanksOutOfStep("the ranks of the base loaded one adapter into different slots")
        if None in slots:
            for slot in taken:
                self.evict(slot)
            raise torch.OutOfMemoryError("one of the devices has no memory left for this adapter")
        return taken.pop()

    def evict(self, slot: int) -> None:
        self._ranks.tell(EmptySlot(slot))
        if slot in self:
            super().evict(slot)
